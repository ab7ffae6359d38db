"""CORP: one-shot structured pruning with closed-form compensation (arXiv 2602.05243)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..linalg import RELATIVE_FLOOR, eigh, ridge_solve
from ..remote.modeling_lowrank_vit import LowRankViTAttention, LowRankViTForImageClassification
from ..statistics import Moments
from ..surgery import resized
from .pair_form import best, dense_traces, largest_config, set_attention, set_mlp, sparse_config

if TYPE_CHECKING:
    from .inputs import PresetInputs

# Defaults of the authors' code: least ridge, and the share of the root mean square above which a unit is active.
RIDGE = 1e-3
ACTIVE_SHARE = 0.01


def corp(inputs: PresetInputs, limit: int) -> LowRankViTForImageClassification:
    """A model with at most `limit` parameters by CORP: the same share of MLP units and query-key dimensions removed in
    every layer and head, values whole; every statistic is the dense model's, all tokens equal.

    MLP: units are ranked by E[z²] · P(|z| > 0.01 rms); a removed unit is predicted from those kept, z_P ≈ B z_S + c
    with B = Σ_PS (Σ_SS + λ I)⁻¹ and c = μ_P - B μ_S, and folded into the down weight: W_S + W_P B, bias + W_P c.
    λ is the larger of 1e-3 and the OAS shrinkage of Σ_SS. Query-key: dimensions are ranked by E[q_j² k_j²]; the removed
    part of the scores is predicted by q_Sᵀ M k_S, where G_Q M G_K + λ M = C_Q C_K (G: second moments of the kept
    dimensions, C: with the removed ones), and the SVD of I + M is shared between the two weights. There λ, of the
    covariance of the kept queries, meets sums over tokens and does next to nothing.

    Open in the paper and chosen here: the scale of the scores stays 1/√e of the dense head (the authors' code offers
    this as a switch, and it is the better one); the rms is taken over all images, not per batch; sizes have no lower
    bound but one. Keys have no bias in this package's layout, to which the softmax is blind.

    Raises:
        UserError: the limit cannot be reached.
    """
    dense = inputs.model
    layers = dense.config.num_hidden_layers
    config = largest_config(limit, lambda share: sparse_config(dense.config, [share] * layers, value_output=False))
    small = resized(dense, config)
    hidden = [statistics.hidden.weighted(1.0) for statistics in inputs.statistics]
    activity = _collect(dense, inputs.embeddings, [ACTIVE_SHARE * _root_mean_square(units) for units in hidden])
    parts: Any = zip(small.vit.blocks, dense.vit.blocks, inputs.statistics, hidden, activity, strict=True)
    for block, source, statistics, units, seen in parts:
        if block.attention.query_key_ranks != source.attention.query_key_ranks:
            _shrink_attention(block.attention, source.attention, statistics.query.weighted(1.0), seen)
        width = block.mlp.up.out_features
        if width < source.mlp.up.out_features:
            kept = best(units.second.diagonal() * seen.active, width)
            set_mlp(block, source, kept, *folded_down(source.mlp.down, units, kept))
    return small


def _shrink_attention(
    small: LowRankViTAttention, dense: LowRankViTAttention, queries: Moments, seen: _Activity
) -> None:
    maps = []
    for head, rank in enumerate(small.query_key_ranks):
        kept = best(seen.joint[head], rank)
        covariance = queries.covariance()[head][kept][:, kept] / queries.count
        ridge = _shrinkage(covariance, queries.count)
        maps.append(query_key_maps(queries.second[head], seen.key.second[head], kept, ridge))
    query_maps, key_maps = zip(*maps, strict=True)
    whole = [torch.eye(rank, dtype=torch.float64) for rank in dense.value_output_ranks]
    set_attention(small, dense, query_maps, key_maps, whole, dense.output.weight)


def folded_down(down: torch.nn.Linear, hidden: Moments, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Down weight (d, kept) and bias (d) with the affine prediction of the removed units folded in."""
    removed = _others(kept, len(hidden.first))
    covariance, mean = hidden.covariance() / hidden.count, hidden.first / hidden.count
    inner = covariance[kept][:, kept]
    # ridge_solve takes its ridge relative to the mean of the diagonal.
    scale = inner.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    prediction = ridge_solve(inner, covariance[kept][:, removed], float(_shrinkage(inner, hidden.count) / scale))
    weight = down.weight.detach().cpu().double()
    change = mean[removed] - prediction @ mean[kept]
    return (
        weight[:, kept] + weight[:, removed] @ prediction,
        down.bias.detach().cpu().double() + weight[:, removed] @ change,
    )


def query_key_maps(query: Tensor, key: Tensor, kept: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Maps (kept, e) for the query and key weights of a head; query, key (e, e): second moments, summed over tokens.

    The ridge is that of the paper's equation for sums, G_Q M G_K + λ M = C_Q C_K.
    """
    removed = _others(kept, len(query))
    query_values, query_vectors = eigh(query[kept][:, kept])
    key_values, key_vectors = eigh(key[kept][:, kept])
    cross = query[kept][:, removed] @ key[removed][:, kept]
    spectrum = torch.outer(query_values.clamp_min(0), key_values.clamp_min(0))
    floor = (RELATIVE_FLOOR * spectrum.max()).clamp_min(ridge)
    correction = query_vectors @ ((query_vectors.mT @ cross @ key_vectors) / (spectrum + floor)) @ key_vectors.mT
    left, singular, right = torch.linalg.svd(torch.eye(len(kept), dtype=torch.float64) + correction)
    root = singular.sqrt()
    identity = torch.eye(len(query), dtype=torch.float64)[kept]
    return (left * root).mT @ identity, (root.unsqueeze(-1) * right) @ identity


@dataclass
class _Activity:
    """Of one block: moments of the keys (heads, e), sums of q² k² (heads, e), and how often a unit was active (w)."""

    key: Moments
    joint: Tensor
    active: Tensor


def _collect(
    model: LowRankViTForImageClassification, embeddings: Sequence[Tensor], thresholds: Sequence[float]
) -> list[_Activity]:
    config = model.config
    heads, size = config.num_attention_heads, config.query_key_ranks[0][0]
    activity = [
        _Activity(
            Moments.zeros(heads, size),
            torch.zeros(heads, size, dtype=torch.float64),
            torch.zeros(config.intermediate_size, dtype=torch.float64),
        )
        for _ in thresholds
    ]
    for layer, trace in dense_traces(model, embeddings):
        seen = activity[layer]
        seen.key.add(trace.key.transpose(0, 1).flatten(1, 2))
        seen.joint += (trace.query * trace.key).square().sum((0, 2)).cpu().double()
        seen.active += (trace.hidden.abs() > thresholds[layer]).sum((0, 1)).cpu().double()
    return activity


def _root_mean_square(units: Moments) -> float:
    return float((units.second.diagonal().mean() / units.count).sqrt())


def _shrinkage(covariance: Tensor, count: float) -> float:
    """λ: at least RIDGE, else the oracle approximating shrinkage (Chen et al. 2010, eq. 23) times the mean variance."""
    size = len(covariance)
    trace, square = float(covariance.trace()), float(covariance.square().sum())
    spread = (count + 1 - 2 / size) * (square - trace**2 / size)
    share = min(1.0, ((1 - 2 / size) * square + trace**2) / spread) if spread > 0 else 1.0
    return max(RIDGE, share * trace / size)


def _others(kept: Tensor, size: int) -> Tensor:
    left = torch.ones(size, dtype=torch.bool)
    left[kept] = False
    return left.nonzero().squeeze(1)
