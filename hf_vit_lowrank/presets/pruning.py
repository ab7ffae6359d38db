"""Structured pruning by weight magnitude and by the first-order Taylor criterion, without any refit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..remote.configuration_lowrank_vit import LowRankViTConfig
from ..remote.modeling_lowrank_vit import LowRankViTBlock, LowRankViTForImageClassification, merge_heads
from ..statistics import drawn_label_loss, with_draws
from ..surgery import resized
from .pair_form import (
    best,
    largest_config,
    project,
    selection,
    set_attention,
    set_mlp,
    sparse_config,
    with_sizes,
)

if TYPE_CHECKING:
    from .inputs import PresetInputs


@dataclass(frozen=True)
class BlockScores:
    """Importance of every inner dimension of a block: query-key and value-output (heads, e), hidden units (w)."""

    query_key: Tensor
    value_output: Tensor
    width: Tensor


def magnitude(inputs: PresetInputs, limit: int) -> LowRankViTForImageClassification:
    """A model with at most `limit` parameters; the inner dimensions with the least weights are removed.

    The importance of a dimension is the squared L2 norm of the weights that fall with it (the group norm of DepGraph,
    arXiv 2301.12900, and of torch-pruning's `GroupNormImportance(p=2)`, without biases): a query and a key row, a
    value row and an output column, an up row and a down column. As in torch-pruning's default, every layer loses the
    same share; here every head chooses its own dimensions. The scale 1/√e, which this package keeps in the query
    weights, is taken out again.

    Raises:
        UserError: the limit cannot be reached.
    """
    dense = inputs.model
    scores = [magnitude_scores(block) for block in _blocks(dense)]
    config = largest_config(limit, lambda share: sparse_config(dense.config, [share] * len(scores)))
    return _pruned(dense, config, scores)


def taylor(inputs: PresetInputs, limit: int) -> LowRankViTForImageClassification:
    """A model with at most `limit` parameters; the inner dimensions that the loss feels least are removed.

    The importance of a dimension is the mean over images of (∂loss/∂gate)², a gate of 1 on the dimension in all tokens:
    (Σ activation · gradient)² (Molchanov et al. 2019, arXiv 1906.10771, eq. 8 with the gates of section 3.2). The loss
    is the cross-entropy against a label drawn from the model's own prediction, since there are no labels; its gradients
    vanish in the mean over images, hence the square of each image's. As in the paper, all dimensions of the model are
    ranked together (torch-pruning's default, the same share for every layer, agrees less with the dense model); here
    at once, by the dense model's gradients, where the paper removes a few at a time while it fine-tunes, and measures
    again.

    Raises:
        UserError: the limit cannot be reached.
    """
    scores = taylor_scores(inputs)
    return _pruned(inputs.model, largest_config(limit, globally_ranked(inputs.model.config, scores)), scores)


@torch.no_grad()
def magnitude_scores(block: LowRankViTBlock) -> BlockScores:
    """Squared group norms of a block at full rank."""
    attention, mlp = block.attention, block.mlp
    heads, size = len(attention.query_key_ranks), attention.query_key_ranks[0]
    key, value = attention.key_value.weight.chunk(2)
    query_key = size * _squares(attention.query.weight) + _squares(key)
    value_output = _squares(value) + _squares(attention.output.weight.mT)
    return BlockScores(
        query_key.unflatten(0, (heads, size)),
        value_output.unflatten(0, (heads, size)),
        _squares(mlp.up.weight) + _squares(mlp.down.weight.mT),
    )


def _squares(weight: Tensor) -> Tensor:
    """Squared norm of every row."""
    return weight.cpu().double().square().sum(1)


def taylor_scores(inputs: PresetInputs) -> list[BlockScores]:
    """Sums over images of the squared gradients of the gates, per block."""
    model = inputs.model
    heads, size = model.config.num_attention_heads, model.config.query_key_ranks[0][0]
    shapes = ((heads, size), (heads, size), (model.config.intermediate_size,))
    scores = [BlockScores(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes)) for _ in model.vit.blocks]
    sums = [total for block in scores for total in (block.query_key, block.value_output, block.width)]
    for part, draws in with_draws(inputs.embeddings, model.config.num_labels or 0, inputs.seed, inputs.images_at_once):
        for total, gradient in zip(sums, _gate_gradients(model, part, draws), strict=True):
            total += gradient.square().sum(0).cpu().double()
    return scores


def _gate_gradients(model: LowRankViTForImageClassification, embeddings: Tensor, draws: Tensor) -> tuple[Tensor, ...]:
    """Per block three gradients, one row an image: query-key and value-output (images, heads, e), width (images, w)."""
    stream = embeddings.to(model.device)
    gates: list[Tensor] = []
    for block in _blocks(model):
        heads, size = len(block.attention.query_key_ranks), block.attention.query_key_ranks[0]
        own = [
            stream.new_ones(len(stream), *shape, requires_grad=True)
            for shape in ((heads, size), (heads, size), (block.mlp.up.out_features,))
        ]
        gates += own
        stream = gated_block(block, stream, *own)
    logits = model.classify(model.vit.norm(stream))[0]
    loss = drawn_label_loss(logits, draws)
    return torch.autograd.grad(loss, gates)


def gated_block(
    block: LowRankViTBlock, stream: Tensor, query_key: Tensor, value_output: Tensor, width: Tensor
) -> Tensor:
    """A block at full rank with a factor on every inner dimension: (images, heads, e) twice and (images, w)."""
    query, key, value = project(block.attention, block.attention_norm(stream))
    scores = (query * query_key.unsqueeze(2)) @ key.transpose(-1, -2)
    context = scores.softmax(-1) @ value * value_output.unsqueeze(2)
    stream = stream + block.attention.output(merge_heads(context))
    hidden = block.mlp.activation(block.mlp.up(block.mlp_norm(stream)))
    return stream + block.mlp.down(hidden * width.unsqueeze(1))


def globally_ranked(dense: LowRankViTConfig, scores: list[BlockScores]) -> Callable[[float], LowRankViTConfig]:
    """share -> the sizes that are left when that share of all inner dimensions, those with the lowest scores, is gone.

    A head keeps at least one dimension of each pair, an MLP one unit.
    """
    everything = [values for block in scores for values in (block.query_key, block.value_output, block.width)]
    ranked = torch.cat([values.flatten() for values in everything]).sort().values

    def at(share: float) -> LowRankViTConfig:
        least = float(ranked[int(share * len(ranked))]) if share < 1 else math.inf

        def left(values: Tensor) -> int:
            return max(1, int((values >= least).sum()))

        return with_sizes(
            dense,
            [[left(head) for head in block.query_key] for block in scores],
            [[left(head) for head in block.value_output] for block in scores],
            [left(block.width) for block in scores],
        )

    return at


def _pruned(
    dense: LowRankViTForImageClassification, config: LowRankViTConfig, scores: list[BlockScores]
) -> LowRankViTForImageClassification:
    """A model of that configuration with the dense weights of the dimensions that have the highest scores."""
    small = resized(dense, config)
    for block, source, importance in zip(_blocks(small), _blocks(dense), scores, strict=True):
        kept = selection(importance.query_key, block.attention.query_key_ranks)
        values = selection(importance.value_output, block.attention.value_output_ranks)
        output = source.attention.output.weight.detach().cpu().double() @ torch.block_diag(*values).mT
        set_attention(block.attention, source.attention, kept, kept, values, output)
        units = best(importance.width, block.mlp.up.out_features)
        set_mlp(block, source, units, source.mlp.down.weight[:, units], source.mlp.down.bias)
    return small


def _blocks(model: LowRankViTForImageClassification) -> Any:
    return model.vit.blocks
