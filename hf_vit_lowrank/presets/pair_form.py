"""What the presets that shrink inner dimensions share: sizes from a limit, a dense pass, and writing smaller blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..bisection import last_that_fits
from ..plan_costs import plan_cost
from ..rank_plan import RankPlan, unreachable
from ..remote.configuration_lowrank_vit import LowRankViTConfig
from ..remote.modeling_lowrank_vit import (
    LowRankViTAttention,
    LowRankViTBlock,
    LowRankViTForImageClassification,
    split_heads,
)
from ..surgery import set_linear


def largest_config(limit: int, at: Callable[[float], LowRankViTConfig]) -> LowRankViTConfig:
    """The largest of the configurations `at(strength)` with at most `limit` parameters.

    Strength runs from 0 (dense) to 1 (smallest); sizes must fall with it.

    Raises:
        UserError: even `at(1)` is larger; says how large.
    """
    if plan_cost(at(0.0), "parameters") <= limit:
        return at(0.0)
    smallest = plan_cost(at(1.0), "parameters")
    if smallest > limit:
        raise unreachable(limit, "parameters", smallest)
    return at(last_that_fits(lambda strength: plan_cost(at(strength), "parameters") <= limit, 1.0, 0.0))


def sparse_config(
    dense: LowRankViTConfig, sparsities: Sequence[float], *, value_output: bool = True
) -> LowRankViTConfig:
    """Every inner size of layer l smaller by the share `sparsities[l]`, the same for all heads; nothing falls to zero.

    value_output: whether value-output ranks shrink too.
    """

    def shorter(ranks: list[list[int]]) -> list[list[int]]:
        return [[_remaining(rank, share) for rank in layer] for layer, share in zip(ranks, sparsities, strict=True)]

    return with_sizes(
        dense,
        shorter(dense.query_key_ranks),
        shorter(dense.value_output_ranks) if value_output else dense.value_output_ranks,
        [_remaining(width, share) for width, share in zip(dense.mlp_widths, sparsities, strict=True)],
    )


def _remaining(size: int, sparsity: float) -> int:
    return max(1, size - math.floor(size * sparsity))


def with_sizes(
    dense: LowRankViTConfig, query_key: list[list[int]], value_output: list[list[int]], widths: list[int]
) -> LowRankViTConfig:
    """A copy of a configuration with these sizes."""
    return RankPlan(query_key, value_output, widths, dense.bypass_ranks, predicted_loss=math.nan).apply(dense)


@dataclass(frozen=True)
class BlockTrace:
    """One batch inside a dense block: the stream before and after it (images, tokens, d), its queries, keys and values
    (images, heads, tokens, e) and the MLP's hidden units (images, tokens, w)."""

    before: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    hidden: Tensor
    after: Tensor


@torch.no_grad()
def dense_traces(
    model: LowRankViTForImageClassification, embeddings: Sequence[Tensor]
) -> Iterator[tuple[int, BlockTrace]]:
    """(layer, trace) for every batch of embeddings (images, tokens, d) and every block of a model at full rank."""
    blocks: Any = model.vit.blocks
    for batch in embeddings:
        stream = batch.to(model.device)
        for layer, block in enumerate(blocks):
            trace = _trace(block, stream)
            yield layer, trace
            stream = trace.after


def _trace(block: LowRankViTBlock, stream: Tensor) -> BlockTrace:
    attention = block.attention
    normed = block.attention_norm(stream)
    query, key, value = project(attention, normed)
    after_attention = stream + attention(normed)[0]
    hidden = block.mlp.activation(block.mlp.up(block.mlp_norm(after_attention)))
    return BlockTrace(stream, query, key, value, hidden, after_attention + block.mlp.down(hidden))


def project(attention: LowRankViTAttention, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (images, heads, tokens, e) of an attention at full rank."""
    num_heads = len(attention.query_key_ranks)
    key, value = split_heads(attention.key_value(normed), 2 * num_heads).chunk(2, dim=1)
    return split_heads(attention.query(normed), num_heads), key, value


def best(scores: Tensor, size: int) -> Tensor:
    """Indices of the `size` highest of a vector of scores, in rising order; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:size].sort().values


def selection(scores: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """Per head a (rank, e) map that keeps the dimensions with the highest scores (heads, e)."""
    identity = torch.eye(scores.shape[-1], dtype=torch.float64)
    return [identity[best(head, rank)] for head, rank in zip(scores, ranks, strict=True)]


def set_attention(
    small: LowRankViTAttention,
    dense: LowRankViTAttention,
    query_maps: Sequence[Tensor],
    key_maps: Sequence[Tensor],
    value_maps: Sequence[Tensor],
    output: Tensor,
) -> None:
    """Per head, (rank, e) maps in front of the dense query, key and value weights; output: the new weight (d, rank)."""
    key, value = dense.key_value.weight.detach().cpu().double().chunk(2)
    query_map = torch.block_diag(*query_maps)
    bias = None if dense.query.bias is None else query_map @ dense.query.bias.detach().cpu().double()
    set_linear(small.query, query_map @ dense.query.weight.detach().cpu().double(), bias)
    set_linear(small.key_value, torch.cat((torch.block_diag(*key_maps) @ key, torch.block_diag(*value_maps) @ value)))
    set_linear(small.output, output, dense.output.bias)


def set_mlp(small: LowRankViTBlock, dense: LowRankViTBlock, kept: Tensor, down: Tensor, bias: Tensor) -> None:
    """Leave the MLP the hidden units `kept`, read by the down weight (d, kept) and bias (d)."""
    set_linear(small.mlp.up, dense.mlp.up.weight[kept], dense.mlp.up.bias[kept])
    set_linear(small.mlp.down, down, bias)
