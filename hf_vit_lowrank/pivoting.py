"""The same function in fewer parameters: what a model says twice is stored once.

- Scale and shift of a layer norm go into the linear maps behind it.
- The stream is turned, which a layer norm without scale and shift does not see, and the basis of every head's contexts
  with it, so that the output weights of the stream's first entries are an identity (`candidates/pivots.py`); the same
  for the second factor of the projection of the patches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .candidates.pivots import pivots_first
from .embeddings import projection_factors
from .narrowing import restated, zero_mean_basis
from .rank_plan import stored
from .remote.configuration_lowrank_vit import LowRankViTConfig
from .remote.modeling_lowrank_vit import InterpolativeLinear, LowRankViTForImageClassification, PivotedLinear


@torch.no_grad()
def pivoted(model: LowRankViTForImageClassification) -> LowRankViTForImageClassification:
    """A model on the CPU as `rank_plan.stored` describes it; exact but for rounding."""
    config = stored(model.config)
    turned = restated(model, _turn(model, config))
    state = {name: tensor for name, tensor in turned.state_dict().items() if "norm." not in name}
    blocks: Any = turned.vit.blocks
    for layer, (block, pivots) in enumerate(zip(blocks, config.output_pivots, strict=True)):
        if pivots:
            _pivot_output(state, f"vit.blocks.{layer}.attention.", block.attention, pivots)
    if config.projection_pivots:
        _pivot_projection(state, "vit.embeddings.", turned.vit.embeddings, config.projection_pivots)
    smaller = LowRankViTForImageClassification(config).eval()
    smaller.load_state_dict(state)
    return smaller


@torch.no_grad()
def unpivoted(model: LowRankViTForImageClassification) -> LowRankViTForImageClassification:
    """The way back to whole weights, of up weights too, and to layer norms with a scale and a shift, which then do
    nothing.

    The values and the output weights of a head share the scale of their product, as weights of few bits want it.
    """
    plain = {"output_pivots": None, "projection_pivots": 0, "up_ranks": None, "layer_norm_affine": True}
    whole = LowRankViTForImageClassification(LowRankViTConfig.from_dict({**model.config.to_dict(), **plain})).eval()
    state = dict(model.state_dict())
    blocks: Any = model.vit.blocks
    for layer, block in enumerate(blocks):
        if isinstance(block.attention.output, PivotedLinear):
            _unpivot_output(state, f"vit.blocks.{layer}.attention.", block.attention)
        if isinstance(block.mlp.up, InterpolativeLinear):
            _unpivot_up(state, f"vit.blocks.{layer}.mlp.up.", block.mlp.up)
    expand, own = model.vit.embeddings.expand, "vit.embeddings."
    if expand is not None:
        state[own + "projection.reduce.weight"] = state.pop(own + "projection.weight")
        state[own + "projection.expand.weight"] = expand.whole_weight()[..., None, None]
        state[own + "projection.expand.bias"] = state.pop(own + "expand.bias")
        del state[own + "expand.rest.weight"]
    norms = {name: tensor for name, tensor in whole.state_dict().items() if "norm." in name}  # ones and zeros
    whole.load_state_dict({**norms, **state})
    return whole


def _turn(model: LowRankViTForImageClassification, config: LowRankViTConfig) -> Tensor:
    """(d, d): turns streams without a mean, so that the first entries are good pivots for all products.

    At random first, since the heads of some model may write to entries of their own; then entries change places.
    """
    flat = zero_mean_basis(config.hidden_size - 1)
    values = torch.randn(len(flat), len(flat), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turn = flat.mT @ torch.linalg.qr(values)[0] @ flat
    blocks: Any = model.vit.blocks
    products = []
    for block, ranks, pivots in zip(blocks, config.value_output_ranks, config.output_pivots, strict=True):
        if pivots:
            outputs = (turn @ block.attention.output.weight.cpu().double()).split(ranks, 1)
            products += [(torch.linalg.qr(output)[0].mT, pivots) for output in outputs]
    if config.projection_pivots:
        expand = projection_factors(model.vit.embeddings)[-1].weight.flatten(1).cpu().double()
        products.append((torch.linalg.qr(turn @ expand)[0].mT, config.projection_pivots))
    return turn[pivots_first(products, config.hidden_size)]


def _with_identity(weight: Tensor, pivots: int) -> tuple[Tensor, Tensor]:
    """B T and T⁻¹ of a left factor B (d, r): the first rows of B T are those of an identity."""
    space, coordinates = torch.linalg.qr(weight)
    rotation, triangle = torch.linalg.qr(space[:pivots].mT, mode="complete")
    lower = triangle[:pivots].mT
    changed, inverse = space @ rotation, rotation.mT @ coordinates
    changed[:, :pivots] = torch.linalg.solve_triangular(lower, changed[:, :pivots], upper=False, left=False)
    inverse[:pivots] = lower @ inverse[:pivots]
    return changed, inverse


def _pivot_output(state: dict[str, Tensor], own: str, attention: Any, pivots: int) -> None:
    """Rewrite the values and the output weights of a layer, whose names begin with `own`."""
    ranks = attention.value_output_ranks
    key, value = attention.key_value.weight.double().split([sum(attention.query_key_ranks), sum(ranks)])
    outputs = attention.output.weight.double().split(ranks, 1)
    changed, inverses = zip(*(_with_identity(output, pivots) for output in outputs), strict=True)
    state[own + "key_value.weight"] = torch.cat((key, torch.block_diag(*inverses) @ value))
    del state[own + "output.weight"]
    state[own + "output.rest.weight"] = torch.cat(changed, 1)[pivots:]


def _unpivot_output(state: dict[str, Tensor], own: str, attention: Any) -> None:
    """The way back, every head's product written by the roots of its singular values on both sides."""
    ranks = attention.value_output_ranks
    key, value = attention.key_value.weight.cpu().double().split([sum(attention.query_key_ranks), sum(ranks)])
    outputs, values = [], []
    weights = zip(attention.output.whole_weight().cpu().double().split(ranks, 1), value.split(ranks), strict=True)
    for output_weight, value_weight in weights:
        space, coordinates = torch.linalg.qr(output_weight)
        left, scales, right = torch.linalg.svd(coordinates @ value_weight, full_matrices=False)
        outputs.append(space @ left * scales.sqrt())
        values.append(scales.sqrt()[:, None] * right)
    state[own + "key_value.weight"] = torch.cat((key, *values))
    state[own + "output.weight"] = torch.cat(outputs, 1)
    del state[own + "output.rest.weight"]


def _unpivot_up(state: dict[str, Tensor], own: str, up: InterpolativeLinear) -> None:
    read, rest = up.read, up.rest
    others = rest.weight.cpu().double()
    bias = others @ read.bias.cpu().double() + rest.bias.cpu().double()
    state[own + "weight"] = torch.cat((read.weight.cpu().double(), others @ read.weight.cpu().double()))
    state[own + "bias"] = torch.cat((read.bias.cpu().double(), bias))
    for part in ("read", "rest"):
        del state[f"{own}{part}.weight"], state[f"{own}{part}.bias"]


def _pivot_projection(state: dict[str, Tensor], own: str, embeddings: Any, pivots: int) -> None:
    reduce, expand = projection_factors(embeddings)
    changed, inverse = _with_identity(expand.weight.flatten(1).double(), pivots)
    del state[own + "projection.expand.weight"], state[own + "projection.reduce.weight"]
    state[own + "projection.weight"] = (inverse @ reduce.weight.flatten(1).double()).view_as(reduce.weight)
    state[own + "expand.rest.weight"] = changed[pivots:]
    state[own + "expand.bias"] = state.pop(own + "projection.expand.bias")
