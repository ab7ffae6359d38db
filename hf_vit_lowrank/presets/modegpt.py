"""MoDeGPT: modular decomposition of matrix pairs (arXiv 2408.09632, ICLR 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..linalg import eigh, ridge_solve, square_root
from ..remote.modeling_lowrank_vit import LowRankViTAttention, LowRankViTForImageClassification
from ..statistics import BlockStatistics, Moments
from ..surgery import resized
from .pair_form import (
    best,
    dense_traces,
    largest_config,
    selection,
    set_attention,
    set_mlp,
    sparse_config,
)

if TYPE_CHECKING:
    from .inputs import PresetInputs

# ε of the entropy term. Chosen on 200 calibration images of DeiT-tiny: agreement with the dense model for
# 0.1, 0.2, 0.5 is 76, 78, 78 % at -20 %, 34, 45, 47 % at -40 % (all layers alike: 40 %), 2, 4, 4 % at -60 %. At 0.1 the
# last two layers are all but removed.
ENTROPY_WEIGHT = 0.5
# λ of the ridge leverage scores, of moments summed over tokens.
LEVERAGE_RIDGE = 1.0


def modegpt(inputs: PresetInputs, limit: int) -> LowRankViTForImageClassification:
    """A model with at most `limit` parameters by MoDeGPT, from the dense model's statistics, all tokens equal.

    Type I (MLP, Nyström): the units with the highest ridge leverage scores diag(C (C + I)⁻¹), C the second moment of
    the hidden units; down weight W C_:S C_SS⁻¹. Type II (query-key, CR): per head the dimensions with the highest
    ‖C_Q^½ e_i‖ ‖C_K^½ e_i‖, not refitted. Type III (value-output, SVD): per head the truncated SVD of
    C^½ W_v W_o, C the second moment of the input. Every module of a layer loses the same share, layer l the share
    min(1, t exp(-s_l / ε)): the maximum of Σ s_l (1 - φ_l) + ε H(φ) under 0 <= φ_l <= 1 and a given mean, with the
    importance s_l = 1 - the mean cosine of a token before and after the block. The limit decides t.

    Chosen here: ε, which depends on the model; λ = 1 of moments summed over tokens; sizes stay at least one. Biases:
    the down bias stays, the value bias is part of the output bias and needs nothing (attention rows sum to one), keys
    have none.

    Raises:
        UserError: the limit cannot be reached.
    """
    dense = inputs.model
    seen = _collect(dense, inputs.embeddings)
    importance = torch.tensor([block.distance / block.value.count for block in seen], dtype=torch.float64)
    config = largest_config(limit, lambda strength: sparse_config(dense.config, layer_shares(importance, strength)))
    small = resized(dense, config)
    parts: Any = zip(small.vit.blocks, dense.vit.blocks, inputs.statistics, seen, strict=True)
    for block, source, statistics, collected in parts:
        if block.attention.query_key_ranks != source.attention.query_key_ranks:
            _shrink_attention(block.attention, source.attention, statistics, collected)
        width = block.mlp.up.out_features
        if width < source.mlp.up.out_features:
            hidden = statistics.hidden.weighted(1.0).second
            units = best(leverage_scores(hidden), width)
            set_mlp(block, source, units, nystrom(source.mlp.down.weight, hidden, units), source.mlp.down.bias)
    return small


def _shrink_attention(
    small: LowRankViTAttention, dense: LowRankViTAttention, statistics: BlockStatistics, collected: _Collected
) -> None:
    queries = statistics.query.weighted(1.0).second.diagonal(dim1=-2, dim2=-1)
    keys = collected.key.second.diagonal(dim1=-2, dim2=-1)
    # ‖C^½ e_i‖² is the i-th entry of C's diagonal.
    kept = selection(queries * keys, small.query_key_ranks)
    output = dense.output.weight.detach().cpu().double().chunk(len(dense.value_output_ranks), dim=1)
    heads = zip(output, collected.value.second, small.value_output_ranks, strict=True)
    value_maps, outputs = zip(*(value_output(*head) for head in heads), strict=True)
    set_attention(small, dense, kept, kept, value_maps, torch.cat(outputs, dim=1))


def layer_shares(importance: Tensor, strength: float) -> list[float]:
    """Share to remove of each layer: min(1, t exp(-s / ε)), where strength 1 is the least t that removes all."""
    relative = ((importance.max() - importance) / ENTROPY_WEIGHT).exp()
    return (strength * relative).clamp_max(1.0).tolist()


def leverage_scores(moment: Tensor) -> Tensor:
    """diag(C (C + λ I)⁻¹) of a second moment (w, w)."""
    values, vectors = eigh(moment)
    values = values.clamp_min(0)
    return vectors.square() @ (values / (values + LEVERAGE_RIDGE))


def nystrom(down: Tensor, moment: Tensor, kept: Tensor) -> Tensor:
    """The weight (d, kept) that comes nearest to `down` (d, w) when only the units `kept` are seen, without a bias."""
    return ridge_solve(moment[kept][:, kept], moment[kept] @ down.detach().cpu().double().mT, 0.0)


def value_output(output: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Value map (rank, e) and output weight (d, rank) of a head; output (d, e), moment (e, e) of its values.

    The SVD of C^½ W_v W_o with C the moment of the input, written in the e dimensions of the values v = W_v x: the
    best rank r of W_o (W_v C W_vᵀ)^½.
    """
    root, inverse = square_root(moment)
    _, _, right = torch.linalg.svd(output @ root, full_matrices=False)
    return right[:rank] @ inverse, output @ root @ right[:rank].mT


@dataclass
class _Collected:
    """Of one block: moments of keys and values (heads, e), and the sum over tokens of 1 - cosine(before, after)."""

    key: Moments
    value: Moments
    distance: float = 0.0


def _collect(model: LowRankViTForImageClassification, embeddings: Sequence[Tensor]) -> list[_Collected]:
    heads, size = model.config.num_attention_heads, model.config.query_key_ranks[0][0]
    collected = [_Collected(Moments.zeros(heads, size), Moments.zeros(heads, size)) for _ in model.vit.blocks]
    for layer, trace in dense_traces(model, embeddings):
        seen = collected[layer]
        seen.key.add(trace.key.transpose(0, 1).flatten(1, 2))
        seen.value.add(trace.value.transpose(0, 1).flatten(1, 2))
        before, after = trace.before.cpu().double(), trace.after.cpu().double()
        cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1)
        seen.distance += float((1 - cosine).sum())
    return collected
