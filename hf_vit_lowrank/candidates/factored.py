"""One weight as a product of two: the best rank-r BA in a metric on its outputs and one on its inputs (design 3.3).

min ‖L (W - BA) R‖_F over B (m, r) and A (r, n), LᵀL the metric on outputs and R Rᵀ the metric on inputs. Eckart-Young:
the truncated SVD of L W R, taken back by the pseudo-inverses of the roots. What the metrics do not see is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..allocation import ErrorCurve
from ..linalg import square_root


@dataclass(frozen=True)
class FactoredCandidate:
    """One weight (m, n). `errors[r]` is ‖L (W - BA) R‖² at rank r, r = 0..min(m, n)."""

    errors: Tensor
    expand: Tensor
    reduce: Tensor

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """B (m, rank) and A (rank, n)."""
        return self.expand[:, :rank], self.reduce[:rank]

    def curve(self, scale: float, largest: int, unit_cost: int, step: int = 1) -> ErrorCurve:
        """The errors times `scale` up to the rank `largest`, the last at which two factors are cheaper than the weight;
        one rank more stands for the whole weight, with no error.

        That rank costs at least what the whole weight does, so a budget holds.
        """
        errors = scale * self.errors[: largest + 1]
        return ErrorCurve(torch.cat((errors, errors.new_zeros(1))).numpy(), unit_cost, step=step)


def factored_candidate(weight: Tensor, output_metric: Tensor, input_metric: Tensor) -> FactoredCandidate:
    """weight (m, n), output_metric LᵀL (m, m), input_metric R Rᵀ (n, n): positive semi-definite, of any rank.

    B and A share the singular values evenly, so that their magnitudes stay comparable (half precision).
    """
    left, left_inverse = square_root(output_metric)
    right, right_inverse = square_root(input_metric)
    U, singular, Vt = torch.linalg.svd(left @ weight.double() @ right, full_matrices=False)
    errors = torch.cat((singular.square().flip(0).cumsum(0).flip(0), singular.new_zeros(1)))
    scale = singular.sqrt()
    return FactoredCandidate(errors, left_inverse @ U * scale, scale.unsqueeze(1) * Vt @ right_inverse)


def bias_change(weight: Tensor, factors: tuple[Tensor, Tensor], mean: Tensor) -> Tensor:
    """What to add to the bias (m,) so that inputs at their mean (n,) give what they gave: (W - BA) μ.

    With it the error is that of the centred inputs, so the covariance is the metric to minimise it in.
    """
    expand, reduce = factors
    return weight.double() @ mean - expand @ (reduce @ mean)
