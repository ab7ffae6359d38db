"""The sizes of every piece of a model, and how a budget turns into them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np

from .allocation import SMALLEST_SIZE, ErrorCurve, ImpossibleBudgetError, allocate, allocate_pair, hull_corners
from .candidates.block import FREE, LAST_WIDTH_WEIGHT, BlockCandidates, UnitCosts, last_width_weight
from .candidates.embedding import EmbeddingCandidates
from .candidates.pivots import num_pivots
from .errors import UserError
from .plan_costs import embedding_costs, largest_embedding_ranks, model_costs, plan_cost
from .remote.configuration_lowrank_vit import LowRankViTConfig

BYPASS_ROUNDS = 3
# From this share removed on the stream gets narrower, by as large a share of its entries as is removed on top, in steps
# of a multiple of STREAM_MULTIPLE, of which there are about STREAM_STEPS.
STREAM_FROM = 0.5
STREAM_STEPS = 24
STREAM_MULTIPLE = 8
# A recorded curve has about this many points: enough to draw it.
CURVE_POINTS = 12
_NO_BYPASS = ErrorCurve(np.zeros(1), 0, smallest=0)


@dataclass(frozen=True)
class RankPlan:
    """Per layer (and head): inner sizes of query-key, of value-output, of the MLP and the bypass around it; the rise of
    the loss; the ranks of the MLPs' up weights, 0 for a whole one, and of the pieces of the embeddings that are not
    whole; and the factor on the last MLP's error curve with which the plan was chosen."""

    query_key_ranks: list[list[int]]
    value_output_ranks: list[list[int]]
    mlp_widths: list[int]
    bypass_ranks: list[int]
    predicted_loss: float
    up_ranks: list[int] | None = None
    embedding_ranks: dict[str, int] = field(default_factory=dict)
    last_width: float = LAST_WIDTH_WEIGHT

    def apply(self, config: LowRankViTConfig) -> LowRankViTConfig:
        """A copy of a configuration with these sizes."""
        fields = config.to_dict()
        fields.update(
            query_key_ranks=self.query_key_ranks,
            value_output_ranks=self.value_output_ranks,
            mlp_widths=self.mlp_widths,
            up_ranks=self.up_ranks,
            bypass_ranks=self.bypass_ranks,
            embedding_ranks=self.embedding_ranks,
        )
        return LowRankViTConfig.from_dict(fields)

    def sizes(self, layer: int) -> tuple[int, int, int]:
        """Of the three curves of a block (see `BlockCandidates.curves`)."""
        return sum(self.query_key_ranks[layer]), sum(self.value_output_ranks[layer]), self.mlp_widths[layer]


def stream_size(config: LowRankViTConfig, removed: float) -> int:
    """Entries of the stream of a model that this share of a dense model is removed from.

    What a narrower stream loses no refit gives back, but every unit of every block costs less: see README, trials.
    """
    step = max(STREAM_MULTIPLE, config.hidden_size // STREAM_STEPS // STREAM_MULTIPLE * STREAM_MULTIPLE)
    wanted = (1 - max(0.0, removed - STREAM_FROM)) * config.hidden_size
    return min(math.ceil(wanted / step) * step, config.hidden_size)


def with_hidden_size(config: LowRankViTConfig, hidden_size: int) -> LowRankViTConfig:
    """Of the same model with a stream of other size: the shifts of its layer norms become biases, also of queries."""
    changed = {
        "hidden_size": hidden_size,
        "dense_hidden_size": max(hidden_size, config.dense_hidden_size),
        "qkv_bias": True,
        # Of a variance, which is the mean over the entries of what stays the same in all.
        "layer_norm_eps": config.layer_norm_eps * config.hidden_size / hidden_size,
    }
    return LowRankViTConfig.from_dict({**config.to_dict(), **changed})


def stored(config: LowRankViTConfig, native: bool = False) -> LowRankViTConfig:
    """Of the same model as it is stored: see `pivoting.pivoted`. A native one is stored as it is."""
    if native:
        return config
    rank, hidden_size = config.embedding_ranks.get("projection"), config.hidden_size
    changed = {
        "output_pivots": [num_pivots(heads, hidden_size) for heads in config.value_output_ranks],
        "projection_pivots": num_pivots([rank], hidden_size) if rank else 0,
        "layer_norm_affine": False,
        "qkv_bias": True,
    }
    return LowRankViTConfig.from_dict({**config.to_dict(), **changed})


def choose_ranks(
    candidates: Sequence[BlockCandidates],
    costs: Sequence[UnitCosts],
    budget: int,
    query_key_weight: float,
    multiple: int,
    with_bypasses: bool = True,
    embedding: Mapping[str, ErrorCurve] | None = None,
    last_width: float = LAST_WIDTH_WEIGHT,
) -> RankPlan:
    """The plan with the least predicted loss whose pieces cost at most `budget` (the rest of the model not counted).

    embedding: curves of pieces of the embeddings, by name, whose largest size stands for the whole piece.
    multiple: what the sizes of a layer, heads taken together, are multiples of; but a bypass is small, and free.

    What a bypass gains depends on the width beside it: after a first plan without, each of a few rounds offers the
    allocator the bypasses that go with the widths of the round before. The best of all plans is taken.

    Raises:
        ImpossibleBudgetError: the smallest sizes cost more.
    """
    per_block, up_ranks = [], []
    for block, cost in zip(candidates, costs, strict=True):  # once, since they may be on disk
        per_block.append(block.curves(cost, query_key_weight, multiple, last_width))
        up_ranks.append(block.up_ranks(cost, multiple, last_width))
    bypasses, plans, embedding = [_NO_BYPASS] * len(per_block), [], embedding or {}

    @cache  # most widths stay from round to round
    def bypass_curve(block: int, width: int) -> ErrorCurve:
        return candidates[block].bypass_curve(width, costs[block])

    for _ in range(1 + BYPASS_ROUNDS * with_bypasses):
        pieces, others = _allocated(per_block, bypasses, list(embedding.values()), budget)
        # 8 bits by torchao fail on weights with a single input or output.
        pieces = [[*own[:-1], own[-1] if own[-1] > 1 else 0] for own in pieces]
        if with_bypasses:
            bypasses = [bypass_curve(block, own[2]) for block, own in enumerate(pieces)]
        plan = _plan(candidates, per_block, up_ranks, bypasses, pieces)
        plans.append(_with_embedding(plan, embedding, others))
    return min(plans, key=lambda plan: plan.predicted_loss)


def choose_native_ranks(
    candidates: Sequence[BlockCandidates],
    costs: Sequence[UnitCosts],
    budget: int,
    query_key_weight: float,
    last_width: float = LAST_WIDTH_WEIGHT,
) -> RankPlan:
    """One head size (for query-key and value-output alike) and one MLP width for all blocks, and no bypass.

    The candidates must have been made with even heads. The pair with the least predicted loss within `budget` is taken.

    Raises:
        ImpossibleBudgetError: the smallest sizes cost more.
    """
    pairs = zip(candidates, costs, strict=True)
    per_block = [block.curves(cost, query_key_weight, 1, last_width) for block, cost in pairs]
    heads, layers = len(candidates[0].query_key.heads), len(candidates)
    shared = [0.5 * query_key_weight * block.query_key.even_errors.numpy() for block in candidates]
    # A value-output curve counts the dimensions of all heads together.
    shared += [value_output.errors[::heads] for _, value_output, _ in per_block]
    head_cost = heads * sum(cost.query_key + cost.value_output for cost in costs)
    head_curve = ErrorCurve(np.sum(shared, axis=0), head_cost)
    width_curve = ErrorCurve(
        np.sum([width.errors for _, _, width in per_block], axis=0), sum(cost.width for cost in costs)
    )
    size, width = allocate_pair(head_curve, width_curve, budget)
    ranks = [[size] * heads for _ in range(layers)]
    loss = float(head_curve.errors[size] + width_curve.errors[width])
    return RankPlan(ranks, [list(layer) for layer in ranks], [width] * layers, [0] * layers, loss)


def _allocated(
    per_block: Sequence[Sequence[ErrorCurve]],
    bypasses: Sequence[ErrorCurve],
    others: Sequence[ErrorCurve],
    budget: int,
) -> tuple[list[list[int]], list[int]]:
    """Per block the sizes of its curves, then the rank of its bypass; and the sizes of the other curves."""
    offered = [[*curves, bypass] for curves, bypass in zip(per_block, bypasses, strict=True)]
    sizes = iter(allocate([*(curve for block in offered for curve in block), *others], budget))
    return [[next(sizes) for _ in block] for block in offered], list(sizes)


def _with_embedding(plan: RankPlan, curves: Mapping[str, ErrorCurve], sizes: Sequence[int]) -> RankPlan:
    chosen = dict(zip(curves, sizes, strict=True))
    return replace(
        plan,
        predicted_loss=plan.predicted_loss + sum(float(curves[name].errors[size]) for name, size in chosen.items()),
        embedding_ranks={name: size for name, size in chosen.items() if size < curves[name].largest},
    )


def _plan(
    candidates: Sequence[BlockCandidates],
    per_block: Sequence[Sequence[ErrorCurve]],
    up_ranks: Sequence[np.ndarray],
    bypasses: Sequence[ErrorCurve],
    pieces: Sequence[Sequence[int]],
) -> RankPlan:
    """up_ranks: those of all widths. bypasses: the curves that go with the widths of this very plan."""
    loss = 0.0
    for curves, bypass, own in zip(per_block, bypasses, pieces, strict=True):
        loss += sum(float(curve.errors[size]) for curve, size in zip(curves, own[:-1], strict=True))
        loss -= float(bypass.errors[0] - bypass.errors[min(own[-1], bypass.largest)])
    return RankPlan(
        query_key_ranks=[
            candidate.query_key.head_ranks(own[0]) for candidate, own in zip(candidates, pieces, strict=True)
        ],
        value_output_ranks=[
            candidate.value_output.head_ranks(own[1]) for candidate, own in zip(candidates, pieces, strict=True)
        ],
        mlp_widths=[own[2] for own in pieces],
        bypass_ranks=[own[3] for own in pieces],
        predicted_loss=loss,
        up_ranks=[int(ranks[own[2]]) for ranks, own in zip(up_ranks, pieces, strict=True)],
    )


def budgeted_ranks(
    candidates: Sequence[BlockCandidates],
    embedding: EmbeddingCandidates,
    config: LowRankViTConfig,
    limit: int,
    cost: str,
    query_key_weight: float,
    multiple: int,
    trained: bool = False,
    native: bool = False,
) -> RankPlan:
    """The plan for a whole model of at most `limit` parameters or FLOPs; `native` as in `CompressionRecipe`.

    trained: by what compensates it, which gets more out of the units that a bypass stands in for than out of that.

    Raises:
        UserError: the limit lies below what the smallest ranks cost; says how much that is.
    """
    costs, fixed = model_costs(stored(config, native), cost, native)
    of_embedding = embedding_costs(config, cost)
    # At full size there is nothing to choose; two factors may end just above what the piece costs as it is.
    stay_whole = native or limit >= plan_cost(config, cost)
    largest = {} if stay_whole else largest_embedding_ranks(config, cost, multiple)
    fixed += sum(whole for name, (_, whole) in of_embedding.items() if name not in largest)
    last_width = last_width_weight(1 - limit / plan_cost(config, cost, native))
    blocks = (candidates, costs, limit - fixed, query_key_weight)
    try:
        if native:
            plan = choose_native_ranks(*blocks, last_width=last_width)
        else:
            units = {name: unit for name, (unit, _) in of_embedding.items()}
            curves = embedding.curves(largest, units, multiple, costs[0].pivot)
            plan = choose_ranks(
                *blocks, multiple=multiple, with_bypasses=not trained, embedding=curves, last_width=last_width
            )
        return replace(plan, last_width=last_width)
    except ImpossibleBudgetError as error:
        raise unreachable(limit, cost, fixed + error.smallest_cost) from error


def unreachable(limit: int, cost: str, smallest: int, multiple: int = 1) -> UserError:
    """The error of a limit of parameters or FLOPs below the smallest size that a method can make, in such multiples."""
    finer = f", or for a --rank-multiple below {multiple}" if multiple > 1 else ""
    return UserError(
        f"At most {limit:,} {cost} cannot be reached: with the smallest sizes of this method the model still has "
        f"{smallest:,}; ask for at least that{finer}."
    )


def smallest_config(config: LowRankViTConfig, multiple: int, cost: str, native: bool) -> LowRankViTConfig:
    """The smallest sizes that `budgeted_ranks` can choose; how a layer's are spread over its heads costs nothing."""
    layers, heads, width = config.num_hidden_layers, config.num_attention_heads, config.intermediate_size
    whole = sum(config.query_key_ranks[0])

    def spread(smallest: int) -> list[int]:
        even, extra = divmod(min(-(-smallest // multiple) * multiple, whole), heads)
        return [even + (head < extra) for head in range(heads)]

    smallest = RankPlan(
        query_key_ranks=[spread(heads) for _ in range(layers)],
        value_output_ranks=[spread(heads if native else SMALLEST_SIZE) for _ in range(layers)],
        mlp_widths=[min(multiple, width)] * layers,
        bypass_ranks=[0] * layers,
        predicted_loss=math.nan,
        embedding_ranks={} if native else dict.fromkeys(largest_embedding_ranks(config, cost, multiple), multiple),
    )
    return stored(smallest.apply(config), native)


def curve_records(
    candidates: Sequence[BlockCandidates], query_key_weight: float, multiple: int, plan: RankPlan
) -> dict[str, list[dict[str, Any]]]:
    """The error curves that `plan` was chosen from, thinned out to some corners of their hulls; JSON-able.

    Under "query_key", "value_output" and "mlp_width" a curve for each layer, the heads together (a native plan, whose
    heads are even, loses somewhat more, and so does an up weight of lower rank). A curve has "sizes", "errors" (rise of
    the loss, six digits) and "chosen", one of the sizes.
    """
    records: dict[str, list[Any]] = {"query_key": [], "value_output": [], "mlp_width": []}
    for layer, block in enumerate(candidates):
        # Pivots apart, corners are where they are whatever a unit costs.
        curves = block.curves(FREE, query_key_weight, multiple, plan.last_width)
        for curves_of_kind, curve, size in zip(records.values(), curves, plan.sizes(layer), strict=True):
            curves_of_kind.append(_curve_record(curve, size))
    return records


def _curve_record(curve: ErrorCurve, chosen: int) -> dict[str, Any]:
    corners = hull_corners(curve)
    drawn = np.linspace(0, len(corners) - 1, CURVE_POINTS).round().astype(int)
    sizes = sorted({chosen, *(corners[index] for index in drawn)})
    return {"sizes": sizes, "errors": [float(f"{curve.errors[size]:.6g}") for size in sizes], "chosen": chosen}
