"""All candidates of one block, their error curves in one unit (predicted rise of the loss), and what a plan leaves."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..allocation import ErrorCurve
from ..remote.modeling_lowrank_vit import LowRankViTBlock
from ..statistics import BlockStatistics, TokenGroups, token_weight
from .elimination import Elimination
from .mlp_width import mlp_width_candidate
from .query_key import QueryKeyCandidate, query_key_candidate
from .value_output import ValueOutputCandidate, value_output_candidate

# Value-output curves predict too little as well. Chosen on held-back calibration images of DeiT-tiny: at -60 % the KL
# to the dense model is 2.00, 1.92 and 1.96 nats for factors 1, 2 and 3.
VALUE_OUTPUT_WEIGHT = 2.0


@dataclass(frozen=True)
class UnitCosts:
    """What one unit of inner size costs in a block, in parameters or FLOPs."""

    query_key: int
    value_output: int
    width: int


@dataclass(frozen=True)
class BlockCandidates:
    """query_key: one per head; value_output: one per layer; width: the MLP's units."""

    query_key: list[QueryKeyCandidate]
    value_output: ValueOutputCandidate
    width: Elimination
    query_key_scales: list[float]

    def curves(self, costs: UnitCosts, query_key_weight: float) -> list[ErrorCurve]:
        """The heads' query-key curves, the value-output curve, the width curve; half a squared gradient is a loss."""
        scores = [
            ErrorCurve((0.5 * query_key_weight * scale * candidate.errors).numpy(), costs.query_key)
            for candidate, scale in zip(self.query_key, self.query_key_scales, strict=True)
        ]
        value_output = ErrorCurve(
            (0.5 * VALUE_OUTPUT_WEIGHT * self.value_output.elimination.errors).numpy(), costs.value_output
        )
        return [*scores, value_output, ErrorCurve((0.5 * self.width.errors).numpy(), costs.width)]


def block_candidates(block: LowRankViTBlock, statistics: BlockStatistics) -> BlockCandidates:
    """Candidates of a block at full rank from its dense statistics.

    Moments are per image. The gradients of all tokens are spread evenly over the token weights, so that an error of the
    same size in every token is predicted as it is.
    """
    attention_weight, mlp_weight = token_weight(statistics.attention_gradient), token_weight(statistics.mlp_gradient)
    images, heads = statistics.images, len(statistics.key)
    queries = statistics.query.weighted(attention_weight)
    return BlockCandidates(
        query_key=[
            query_key_candidate(query / images, key / images)
            for query, key in zip(queries.second, statistics.key, strict=True)
        ],
        value_output=value_output_candidate(
            block.attention.output.weight.detach().cpu(),
            statistics.context.weighted(attention_weight).covariance() / images,
            output_metric(statistics.attention_gradient, attention_weight),
            heads,
        ),
        width=mlp_width_candidate(
            block.mlp.down.weight.detach().cpu(),
            statistics.hidden.weighted(mlp_weight).covariance() / images,
            output_metric(statistics.mlp_gradient, mlp_weight),
        ),
        query_key_scales=(statistics.score_gradient * images / (queries.count * statistics.query.count)).tolist(),
    )


def output_metric(gradient: TokenGroups, weight: float) -> Tensor:
    """Γ (d, d): the sum of g gᵀ over all tokens, divided by the sum of their weights."""
    return (gradient.read.second + gradient.other.second) / (gradient.read.count + weight * gradient.other.count)
