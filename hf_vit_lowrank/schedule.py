"""How a learning rate changes."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warm_up_and_cosine(optimizer: Optimizer, warm_up: int, steps: int) -> LambdaLR:
    """Half a cosine from the whole rate to none in so many steps, of which the first `warm_up` are made smaller."""
    return LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
