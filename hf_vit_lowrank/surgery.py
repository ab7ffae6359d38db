"""Model surgery: a smaller model from the dense one, its candidates and a rank plan, refitted on the dense moments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .candidates.block import BlockCandidates
from .candidates.bypass import bypass_candidate
from .candidates.embedding import EmbeddingCandidates
from .candidates.up_rank import input_metric, low_rank
from .embeddings import prefix_tokens, whole_positions, whole_projection
from .linalg import ridge_solve
from .rank_plan import RankPlan
from .remote.configuration_lowrank_vit import LowRankViTConfig
from .remote.modeling_lowrank_vit import InterpolativeLinear, LowRankViTBlock, LowRankViTForImageClassification
from .statistics import BlockStatistics, Moments, token_weight

REFIT_RIDGE = 1e-5


def shrink(
    dense: LowRankViTForImageClassification,
    candidates: Sequence[BlockCandidates],
    embedding: EmbeddingCandidates,
    statistics: Sequence[BlockStatistics],
    plan: RankPlan,
) -> LowRankViTForImageClassification:
    """A model with the sizes of `plan`; its output and down weights are refitted on the dense statistics alone.

    What the plan leaves whole is copied as it is.
    """
    small = resized(dense, plan.apply(dense.config))
    _shrink_embeddings(small, dense, embedding)
    parts: Any = zip(small.vit.blocks, dense.vit.blocks, candidates, statistics, strict=True)
    for block, source, candidate, moments in parts:
        shrink_block(block, source, candidate, moments)
    return small


@torch.no_grad()
def shrink_block(
    block: LowRankViTBlock, source: LowRankViTBlock, candidates: BlockCandidates, statistics: BlockStatistics
) -> None:
    """Write the dense block `source` into a block of smaller sizes, as `shrink` does with all."""
    _shrink_attention(block, source, candidates, statistics)
    if block.mlp.up.out_features < source.mlp.up.out_features:
        weight = token_weight(statistics.mlp_gradient)
        seen, slopes = statistics.mlp.weighted(weight), statistics.slope.weighted(weight)
        down, kept = source.mlp.down, candidates.width.kept(block.mlp.up.out_features)
        keep_units(block, source, kept, down.weight, down.bias, seen, slopes, candidates.mlp_metric)


def resized(dense: LowRankViTForImageClassification, config: LowRankViTConfig) -> LowRankViTForImageClassification:
    """A model of that configuration in eval mode; it has the dense weights wherever their shape is the same."""
    small = LowRankViTForImageClassification(config).eval()
    nn.Module.to(small, dense.device)
    _copy_same_shapes(small, dense)
    return small


def resized_block(dense: LowRankViTBlock, config: LowRankViTConfig, layer: int) -> LowRankViTBlock:
    """One block of that configuration, as in `resized`."""
    small = LowRankViTBlock(config, layer).eval().to(dense.mlp.down.weight.device)
    _copy_same_shapes(small, dense)
    return small


def _copy_same_shapes(small: nn.Module, dense: nn.Module) -> None:
    shapes = {name: tensor.shape for name, tensor in small.state_dict().items()}
    same = {name: tensor for name, tensor in dense.state_dict().items() if shapes.get(name) == tensor.shape}
    small.load_state_dict(same, strict=False)


def keep_units(
    small: LowRankViTBlock,
    dense: LowRankViTBlock,
    kept: Tensor,
    down: Tensor,
    bias: Tensor,
    seen: Moments,
    slopes: Moments,
    metric: Tensor,
) -> None:
    """Leave the MLP the units `kept`; its down weight is refitted to what `down` (d, w) and `bias` do with all of them,
    together with the bypass if there is one.

    seen: moments of all w units and the MLP's input side by side. slopes: of their activation's slopes (w, 1).
    metric: Γ (d, d), in which a bypass and an up weight of lower rank are chosen.
    """
    units, up = seen.part(slice(down.shape[1])), small.mlp.up
    if small.mlp.bypass is None:
        weight, change = _refit(down, lambda values: values[kept], units)
    else:
        rank = small.mlp.bypass.reduce.out_features
        candidate = bypass_candidate(down.detach().cpu(), kept, seen.covariance() / seen.count, metric)
        expand, reduce, weight = candidate.weights(rank)
        set_linear(small.mlp.bypass.reduce, reduce)
        set_linear(small.mlp.bypass.expand, expand)
        mean, inputs = units.first / seen.count, seen.first[down.shape[1] :] / seen.count
        change = down.detach().cpu().double() @ mean - weight @ mean[kept] - expand @ (reduce @ inputs)
    rows, own_bias = dense.mlp.up.weight[kept], dense.mlp.up.bias[kept]
    if isinstance(up, InterpolativeLinear):
        own_slopes = Moments(slopes.count, slopes.first[kept], slopes.second[kept])
        needed = input_metric(rows, weight, metric, own_slopes)
        order = _read_less(up, rows, own_bias, seen.part(slice(down.shape[1], None)), needed)
        weight = weight[:, order]
    else:
        set_linear(up, rows, own_bias)
    set_linear(small.mlp.down, weight, bias.detach().cpu().double() + change)


def _read_less(up: InterpolativeLinear, weight: Tensor, bias: Tensor, inputs: Moments, metric: Tensor) -> Tensor:
    """Write an up weight (w, d) and its bias at a lower rank; the order in which its units then are.

    inputs: moments of what it reads (d). metric: N (d, d), see `up_rank.py`.
    """
    weight, bias = weight.detach().cpu().double(), bias.detach().cpu().double()
    order, read, others = low_rank(weight, inputs.covariance(), metric, up.read.out_features)
    lost = weight[order] - torch.cat((read, others @ read))
    first, rest = (bias[order] + lost @ (inputs.first / inputs.count)).split([len(read), len(others)])
    set_linear(up.read, read, first)
    set_linear(up.rest, others, rest - others @ first)
    return order


@torch.no_grad()
def set_linear(linear: nn.Linear, weight: Tensor, bias: Tensor | None = None) -> None:
    """Write a weight and, if given, a bias, whatever their precision and device."""
    linear.weight.copy_(weight)
    if bias is not None:
        linear.bias.copy_(bias)


@torch.no_grad()
def _shrink_embeddings(
    small: LowRankViTForImageClassification, dense: LowRankViTForImageClassification, candidates: EmbeddingCandidates
) -> None:
    """What all patches share goes into the projection's bias, the positions of the prefix tokens into the tokens."""
    ranks, prefix = small.config.embedding_ranks, small.config.num_prefix_tokens
    embeddings: Any = small.vit.embeddings
    projection = embeddings.projection
    weight, bias = whole_projection(dense.vit.embeddings)
    if "projection" in ranks:
        expand, reduce = candidates.projection.factors(ranks["projection"])
        projection.reduce.weight.copy_((reduce @ weight).view_as(projection.reduce.weight))
        projection.expand.weight.copy_(expand[:, :, None, None])
        bias = candidates.projection_mean + expand @ (reduce @ (bias - candidates.projection_mean))
    if "positions" in ranks:
        expand, reduce = candidates.positions.factors(ranks["positions"])
        embeddings.position_embeddings.zero_()
        embeddings.position_embeddings[0, prefix:] = expand
        embeddings.position_basis.copy_(reduce)
        bias = bias + candidates.positions_mean
        places = whole_positions(dense.vit.embeddings)[:prefix]
        for token, place in zip(prefix_tokens(embeddings), places, strict=True):
            token += place.to(token)
    if ranks:
        getattr(projection, "expand", projection).bias.copy_(bias)


def _shrink_attention(
    block: LowRankViTBlock, dense: LowRankViTBlock, candidates: BlockCandidates, statistics: BlockStatistics
) -> None:
    attention, source = block.attention, dense.attention
    query, query_bias = source.query.weight.cpu().double(), source.query.bias
    key, value = (
        source.key_value.weight.cpu().double().split([sum(source.query_key_ranks), sum(source.value_output_ranks)])
    )
    if attention.query_key_ranks != source.query_key_ranks:
        maps = [
            candidate.maps(rank)
            for candidate, rank in zip(candidates.query_key.heads, attention.query_key_ranks, strict=True)
        ]
        query_map, key_map = (torch.block_diag(*side) for side in zip(*maps, strict=True))
        query, key = query_map @ query, key_map @ key
        query_bias = None if query_bias is None else query_map @ query_bias.cpu().double()
    if attention.value_output_ranks != source.value_output_ranks:
        kept = candidates.value_output.elimination.kept(sum(attention.value_output_ranks))
        rotation = torch.block_diag(*candidates.value_output.basis)[kept]
        contexts = statistics.context.weighted(token_weight(statistics.attention_gradient))
        weight, change = _refit(source.output.weight, lambda values: rotation @ values, contexts)
        value = rotation @ value
        set_linear(attention.output, weight, source.output.bias.cpu().double() + change)
    set_linear(attention.query, query, query_bias)
    set_linear(attention.key_value, torch.cat((key, value)))


def _refit(weight: Tensor, inputs: Callable[[Tensor], Tensor], moments: Moments) -> tuple[Tensor, Tensor]:
    """Least squares: (W', b') such that W' inputs(x) + b' is nearest to weight @ x.

    weight (m, n), inputs: a linear map of n rows to k rows, moments of x (n). W' is (m, k), b' (m,).
    """
    weight = weight.detach().cpu().double()
    covariance = moments.covariance()
    seen = inputs(covariance)
    refitted = ridge_solve(inputs(seen.mT), seen @ weight.mT, REFIT_RIDGE)
    mean = moments.first / moments.count
    return refitted, weight @ mean - refitted @ inputs(mean)
