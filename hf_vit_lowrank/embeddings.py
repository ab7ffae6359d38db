"""What the blocks of a smaller model read, from what the dense model's read: pixels are needed once only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .linalg import RELATIVE_FLOOR, eigh
from .remote.modeling_lowrank_vit import LowRankViTEmbeddings, LowRankViTForImageClassification


@torch.no_grad()
def embedded_by(
    small: LowRankViTForImageClassification, dense: LowRankViTForImageClassification, batches: Sequence[Tensor]
) -> list[Tensor]:
    """Embeddings of the same images by `small`, from batches of those by `dense`: (images, tokens, own hidden size)."""
    change = embedding_change(small, dense)
    return [change(batch) for batch in batches]


@torch.no_grad()
def embedding_change(
    small: LowRankViTForImageClassification, dense: LowRankViTForImageClassification
) -> Callable[[Tensor], Tensor]:
    """The map from embeddings by `dense` to those by `small` of the same images: (images, tokens, own hidden size).

    The rows of the smaller projection W' are sums of those of the dense W, so W' x = W' W⁺ (W x).
    """
    ours, theirs = ((*whole_projection(one.vit.embeddings), _constant(one.vit.embeddings)) for one in (small, dense))
    if all(map(torch.equal, ours, theirs)):
        return lambda batch: batch
    (our_weight, our_bias, our_tokens), (weight, bias, their_tokens) = ours, theirs
    values, vectors = eigh(weight @ weight.mT)
    kept = values > RELATIVE_FLOOR * values[-1]
    change = our_weight @ weight.mT @ (vectors * torch.where(kept, values, 1.0).reciprocal() * kept) @ vectors.mT
    prefix = dense.config.num_prefix_tokens
    shift = our_tokens[prefix:] + our_bias - (their_tokens[prefix:] + bias) @ change.mT
    tokens, change, shift = our_tokens[:prefix].float(), change.float(), shift.float()
    return lambda batch: torch.cat((tokens.expand(len(batch), -1, -1), batch[:, prefix:] @ change.mT + shift), 1)


def whole_projection(embeddings: LowRankViTEmbeddings) -> tuple[Tensor, Tensor]:
    """Weight (d, values of a patch), multiplied out, and bias (d,): float64, on the CPU."""
    factors = [(factor.weight.flatten(1), factor.bias) for factor in projection_factors(embeddings)]
    if embeddings.expand is not None:
        factors.append((embeddings.expand.whole_weight(), embeddings.expand.bias))
    weight, *others = (weight.detach().cpu().double() for weight, _ in factors)
    for other in others:
        weight = other @ weight
    return weight, factors[-1][1].detach().cpu().double()


def projection_factors(embeddings: LowRankViTEmbeddings) -> list[Any]:
    """Of the patches: one convolution, or the two factors of it; but not one with pivots."""
    projection: Any = embeddings.projection
    return [projection] if hasattr(projection, "weight") else list(projection)


def whole_positions(embeddings: LowRankViTEmbeddings) -> Tensor:
    """(tokens, d), multiplied out: float64, on the CPU."""
    positions, basis = embeddings.position_embeddings.detach()[0].cpu().double(), embeddings.position_basis
    return positions if basis is None else positions @ basis.detach().cpu().double()


def prefix_tokens(embeddings: LowRankViTEmbeddings) -> list[Tensor]:
    """The class token and, for DeiT, the distillation token: the parameters (1, 1, d)."""
    return [token for token in (embeddings.cls_token, embeddings.distillation_token) if token is not None]


def _constant(embeddings: LowRankViTEmbeddings) -> Tensor:
    """What every image's tokens (tokens, d) have in them, but for the projection's bias."""
    tokens = whole_positions(embeddings).clone()
    prefix = [token.detach()[0] for token in prefix_tokens(embeddings)]
    tokens[: len(prefix)] += torch.cat(prefix).cpu().double()
    return tokens
