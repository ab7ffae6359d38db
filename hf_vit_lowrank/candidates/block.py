"""All candidates of one block, their error curves in one unit (predicted rise of the loss), and what a plan leaves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from ..allocation import ErrorCurve, hull_slopes
from ..statistics import BlockStatistics, TokenGroups, token_weight
from .bypass import bypass_candidate
from .elimination import Elimination
from .mlp_width import mlp_width_candidate
from .pivots import num_pivots
from .query_key import QueryKeyLayer, query_key_candidate, query_key_layer
from .up_rank import best_ranks, input_metric, rank_errors
from .value_output import ValueOutputCandidate, value_output_candidate

# Value-output curves predict too little as well. Chosen on held-back calibration images of DeiT-tiny: at -60 % the KL
# to the dense model is 2.00, 1.92 and 1.96 nats for factors 1, 2 and 3.
VALUE_OUTPUT_WEIGHT = 2.0
# Of what lower ranks of up weights lose, refits repair more. Chosen as above, behind refits: 0.953 and 0.937 nats for
# factors 1 and 0.5 at -60 %, 0.300 and 0.305 at -40 %; with whole up weights 0.969 and 0.312.
UP_RANK_WEIGHT = 0.5
# Nothing behind the last MLP makes its errors larger, while the more is removed the more do those of all others end up
# as several times what their curves say. This is the factor on its curve from some size on; where nothing is removed it
# would be the second, and between it falls in a straight line. Chosen as above, after compensation: see README, trials.
LAST_WIDTH_WEIGHT = 0.2
LAST_WIDTH_WEIGHT_WHOLE = 2.0
LAST_WIDTH_WEIGHT_FROM = 0.4


def last_width_weight(removed: float) -> float:
    """The factor on the error curve of the last MLP in a plan that removes this share of the whole model."""
    fall = (LAST_WIDTH_WEIGHT_WHOLE - LAST_WIDTH_WEIGHT) * removed / LAST_WIDTH_WEIGHT_FROM
    return max(LAST_WIDTH_WEIGHT, LAST_WIDTH_WEIGHT_WHOLE - fall)


@dataclass(frozen=True)
class UnitCosts:
    """What one unit of inner size costs in a block, in parameters or FLOPs; of that, `pivot` is what a pivot saves of
    each dimension of value-output (`pivots.py`), and `entry` what one entry of the MLP's up weight costs, 0 where that
    has to stay whole."""

    query_key: int
    value_output: int
    width: int
    bypass: int
    pivot: int = 0
    entry: int = 0

    def saved_by_rank(self, width: Any, rank: Any, hidden_size: int) -> Any:
        """What an up weight of some rank, 0 for whole, saves in an MLP of some width (numbers or arrays)."""
        return self.entry * (width - rank) * (hidden_size - rank) * (rank > 0)


# Where of a curve only the errors are read.
FREE = UnitCosts(1, 1, 1, 1)


@dataclass(frozen=True)
class BlockCandidates:
    """query_key, value_output: of all heads; width: the MLP's units; `bypass` around those kept.

    rank_errors: of each rank of the up weight, 0, 1, … (`up_rank.py`).
    moment_ranks: of the covariances that the images have determined, of contexts and the MLP's inputs.
    down_weight (d, w), mlp_covariance (w + d, w + d) and mlp_metric (d, d) are what bypasses are made from.
    reads_all_tokens: false for the last block only. factors: on the errors of query-key, value-output and width, from
    what was measured (`probing.py`).
    """

    query_key: QueryKeyLayer
    value_output: ValueOutputCandidate
    width: Elimination
    rank_errors: Tensor
    moment_ranks: dict[str, int]
    down_weight: Tensor
    mlp_covariance: Tensor
    mlp_metric: Tensor
    reads_all_tokens: bool
    factors: tuple[float, ...] = (1.0, 1.0, 1.0)

    def curves(
        self, costs: UnitCosts, query_key_weight: float, multiple: int, last_width: float = LAST_WIDTH_WEIGHT
    ) -> list[ErrorCurve]:
        """Of query-key, value-output and width, in sizes of a multiple; half a squared gradient is a loss. What a width
        costs, and its error, are with the rank of the up weight that goes with it.

        last_width: see `last_width_weight`.
        """
        heads = len(self.query_key.heads)
        query_key = 0.5 * self.factors[0] * query_key_weight * self.query_key.errors
        value_output = 0.5 * self.factors[1] * VALUE_OUTPUT_WEIGHT * self.value_output.elimination.errors
        return [
            ErrorCurve(query_key.numpy(), costs.query_key, smallest=heads, step=multiple),
            ErrorCurve(value_output.numpy(), costs.value_output, step=multiple, saved=self._saved(costs)),
            self._width_and_ranks(costs, multiple, last_width)[0],
        ]

    def up_ranks(self, costs: UnitCosts, multiple: int, last_width: float = LAST_WIDTH_WEIGHT) -> np.ndarray:
        """For each width 0, 1, … of the MLP the rank of its up weight, 0 where that stays whole."""
        return self._width_and_ranks(costs, multiple, last_width)[1]

    def _width_and_ranks(self, costs: UnitCosts, multiple: int, last_width: float) -> tuple[ErrorCurve, np.ndarray]:
        """The curve of the width, and the ranks that go with it.

        Up weights always stay whole where only the tokens read count: of few images those span no more than a part of
        the inputs.
        """
        factor = 0.5 * self.factors[2] * (1.0 if self.reads_all_tokens else last_width)
        whole = ErrorCurve((factor * self.width.errors).numpy(), costs.width, step=multiple)
        if not self.reads_all_tokens:
            return whole, np.zeros(len(whole.errors), dtype=int)
        losses, hidden_size = (factor * UP_RANK_WEIGHT * self.rank_errors).numpy(), len(self.down_weight)
        ranks = best_ranks(losses, hull_slopes(whole), costs.entry, hidden_size, multiple)
        errors = whole.errors + np.where(ranks > 0, losses[ranks], 0.0)
        saved = costs.saved_by_rank(np.arange(len(ranks)), ranks, hidden_size)
        return replace(whole, errors=errors, saved=saved), ranks

    def _saved(self, costs: UnitCosts) -> np.ndarray:
        """By the pivots of every value-output size."""
        counts, hidden_size = self.value_output.head_counts().numpy(), len(self.down_weight)
        pivots = np.array([num_pivots(ranks, hidden_size) for ranks in counts.tolist()])
        return costs.pivot * pivots * np.arange(len(counts))

    def bypass_curve(self, width: int, costs: UnitCosts) -> ErrorCurve:
        """What a bypass can still take from the error that `width` units leave; nothing where all units are kept.

        Where only the tokens read count there are too few of them to tell a bypass from chance.
        """
        if not self.reads_all_tokens or width == len(self.width.order):
            return ErrorCurve(np.zeros(1), costs.bypass, smallest=0)
        kept = self.width.kept(width)
        gains = 0.5 * bypass_candidate(self.down_weight, kept, self.mlp_covariance, self.mlp_metric).gains.numpy()
        return ErrorCurve(gains.sum() - np.concatenate(([0.0], gains.cumsum())), costs.bypass, smallest=0)


def block_candidates(
    output_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    statistics: BlockStatistics,
    even_heads: bool = False,
) -> BlockCandidates:
    """Candidates of a block at full rank from its dense statistics.

    output_weight (d, heads · e), up_weight (w, d), down_weight (d, w): of the attention and of the MLP. even_heads: see
    `value_output_candidate`.

    Moments are per image. The gradients of all tokens are spread evenly over the token weights, so that an error of the
    same size in every token is predicted as it is.
    """
    attention_weight, mlp_weight = token_weight(statistics.attention_gradient), token_weight(statistics.mlp_gradient)
    images, heads = statistics.images, len(statistics.key.second)
    queries = statistics.query.weighted(attention_weight)
    output_weight, down_weight = output_weight.detach().cpu(), down_weight.detach().cpu()
    hidden_and_inputs = statistics.mlp.weighted(mlp_weight)
    mlp_covariance = hidden_and_inputs.covariance() / images
    scales = statistics.score_gradient * images / (queries.count * statistics.query.count)
    mlp_metric, width = output_metric(statistics.mlp_gradient, mlp_weight), down_weight.shape[1]
    contexts, slopes = statistics.context.weighted(attention_weight), statistics.slope.weighted(mlp_weight)
    return BlockCandidates(
        query_key=query_key_layer(
            [
                query_key_candidate(query / images, key / images)
                for query, key in zip(queries.second, statistics.key.second, strict=True)
            ],
            scales.tolist(),
        ),
        value_output=value_output_candidate(
            output_weight,
            contexts.covariance() / images,
            output_metric(statistics.attention_gradient, attention_weight),
            heads,
            even_heads,
        ),
        width=mlp_width_candidate(down_weight, mlp_covariance[:width, :width], mlp_metric),
        rank_errors=rank_errors(
            mlp_covariance[width:, width:], input_metric(up_weight, down_weight, mlp_metric, slopes)
        ),
        moment_ranks={"contexts": contexts.rank(), "MLP inputs": hidden_and_inputs.part(slice(width, None)).rank()},
        down_weight=down_weight,
        mlp_covariance=mlp_covariance,
        mlp_metric=mlp_metric,
        reads_all_tokens=mlp_weight > 0,
    )


def output_metric(gradient: TokenGroups, weight: float) -> Tensor:
    """Γ (d, d): the sum of g gᵀ over all tokens, divided by the sum of their weights."""
    return (gradient.read.second + gradient.other.second) / (gradient.read.count + weight * gradient.other.count)
