"""The processes of `accelerate launch`: whose share of the work is which, and sums over all of them.

Started in any other way there is one process, whose share is everything. All processes call these functions in the
same order, as collective operations need.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

Item = TypeVar("Item")

# Of torchrun, and of the MPIs that `accelerate launch --cpu` may start.
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def join() -> None:
    """Meet the other processes, if `accelerate launch` (or torchrun) started any."""
    if any(int(os.environ.get(name, "1")) > 1 for name in _SIZES):
        from accelerate import PartialState
        from accelerate.utils import parse_flag_from_env

        # Without being told so, accelerate makes one process of many where there is no accelerator.
        PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
        atexit.register(_leave)


def _leave() -> None:
    """Threads of a group that is still there when Python ends may abort the process ("terminate called …")."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def count() -> int:
    """Number of processes."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def index() -> int:
    """Number of this process, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return index() == 0


def device() -> torch.device:
    """The one that belongs to this process, of several."""
    from accelerate import PartialState

    return PartialState().device


def share(items: Sequence[Item]) -> Sequence[Item]:
    """This process's items: every `count()`-th."""
    return items[index() :: count()]


def add_up(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over all processes, in place."""
    if count() > 1:
        for tensor in tensors:
            moved = tensor.to(device())
            distributed.all_reduce(moved)
            tensor.copy_(moved)


def total(value: float) -> float:
    """The sum of a number over all processes."""
    sums = torch.tensor(value, dtype=torch.float64)
    add_up(sums)
    return sums.item()


def gather(value: Item) -> list[Item]:
    """The value of every process, in their order."""
    values: list[Any] = [value] * count()
    if count() > 1:
        distributed.all_gather_object(values, value)
    return values


def from_main(value: Item) -> Item:
    """The main process's value, in every process."""
    values = [value]
    if count() > 1:
        distributed.broadcast_object_list(values, src=0)
    return values[0]


def same_parameters(module: nn.Module) -> None:
    """Give every process the main process's parameters, lest processors that round differently drift apart."""
    if count() > 1:
        for parameter in module.parameters():
            parameter.data.copy_(from_main(parameter.data.cpu()))
