"""Work on images that goes on with fewer at once where memory does not suffice."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from . import processes
from .errors import RunError

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


def with_smaller_batches(stage: str, work: Callable[[int], Result], size: int) -> Result:
    """`work` on `size` images at once; out of memory, the whole of it again on half as many.

    stage: its name in messages. work: starts over each time it is called.

    Raises:
        RunError: not even single images fit, or several processes run.
    """
    while True:
        try:
            return work(size)
        except (RuntimeError, MemoryError) as error:
            if not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
                raise
            if size == 1:
                raise RunError(
                    f"{stage}: not even one image at a time fits into the memory of the device: use a larger one, or "
                    "--device cpu."
                ) from error
            if processes.count() > 1:  # the others would wait for this one's sums
                raise RunError(
                    f"{stage} ran out of memory with {size} images at once: choose a smaller --batch-size."
                ) from error
        # Behind the handler, whose error keeps the tensors of the failed attempt alive.
        half = -(-size // 2)
        logger.warning("%s ran out of memory with %d images at once: once more with %d", stage, size, half)
        clear_device_cache(garbage_collection=True)
        size = half
