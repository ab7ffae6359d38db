"""Fewer hidden units for an MLP: which to keep, with fc2 refitted on them (design 3.2).

Minimises E‖Γ^½ (W₂ z - W₂' z_S - b')‖² over the kept units S one by one, z the hidden units, centred since b' is free.
"""

from __future__ import annotations

from torch import Tensor

from ..linalg import square_root
from .elimination import Elimination, eliminate

RIDGE = 1e-6


def mlp_width_candidate(down_weight: Tensor, hidden_covariance: Tensor, metric: Tensor) -> Elimination:
    """down_weight (d, w), hidden_covariance (w, w), metric Γ (d, d)."""
    return eliminate(down_weight.double(), hidden_covariance, square_root(metric)[0], RIDGE)
