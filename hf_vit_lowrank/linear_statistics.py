"""What the calibration images tell about each single weight of a dense classifier (design 3.3), in one pass.

Every token counts the same here, as in the methods that these statistics are for. Sums in float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import RunError
from .remote.configuration_lowrank_vit import FACTORABLE
from .remote.modeling_lowrank_vit import LowRankViTBlock, LowRankViTForImageClassification, merge_heads, split_heads
from .statistics import Moments, drawn_label_loss, label_draws


@dataclass
class LinearStatistics:
    """Sums over tokens and images about one weight (m, n).

    images: their number. inputs: moments of its inputs (n), one object for query, key and value. absolute: sum of
    absolute inputs (n,). gradient: sum of g gᵀ (m, m), g the loss gradient at its output. input_fisher: sum over images
    and outputs of the squared gradient of an image's loss in the weight (n,).
    """

    images: int
    inputs: Moments
    absolute: Tensor
    gradient: Tensor
    input_fisher: Tensor


def collect_linear_statistics(
    model: LowRankViTForImageClassification, embeddings: Iterable[Tensor], seed: int
) -> list[dict[str, LinearStatistics]]:
    """One pass forward and backward over batches of embeddings (images, tokens, d); per block, by name of the weight.

    model: at full rank. The loss is the cross-entropy against a label drawn from the model's own prediction.

    Raises:
        RunError: no image came, or a gradient is not finite.
    """
    blocks: Any = model.vit.blocks
    statistics = [_zeros(block) for block in blocks]
    generator = torch.Generator().manual_seed(seed)
    for batch in embeddings:
        for of_block, trace, gradients in zip(statistics, *_traced_backward(model, batch, generator), strict=True):
            _add(of_block, trace, gradients)
    if statistics[0]["query"].images == 0:
        raise RunError("No calibration image was seen: the calibration data are empty.")
    return statistics


def whole_weights(block: LowRankViTBlock) -> dict[str, Tensor]:
    """The six weights (m, n) of a block at full rank, by name: views of its parameters."""
    attention, mlp = block.attention, block.mlp
    key, value = attention.key_value.weight.detach().split(
        [sum(attention.query_key_ranks), sum(attention.value_output_ranks)]
    )
    others = {"query": attention.query, "output": attention.output, "up": mlp.up, "down": mlp.down}
    weights = {"key": key, "value": value} | {name: linear.weight.detach() for name, linear in others.items()}
    return {name: weights[name] for name in FACTORABLE}


@dataclass
class LinearTrace:
    """One batch inside a block at full rank: inputs and outputs (images, tokens, n or m) of its six weights, by name,
    and the stream after it."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    after: Tensor


def traced_linears(block: LowRankViTBlock, stream: Tensor) -> LinearTrace:
    """Run a block at full rank on a stream (images, tokens, d)."""
    attention, mlp = block.attention, block.mlp
    ranks, value_ranks = attention.query_key_ranks, attention.value_output_ranks
    normed = block.attention_norm(stream)
    query = attention.query(normed)
    key, value = attention.key_value(normed).split([sum(ranks), sum(value_ranks)], dim=-1)
    scores = split_heads(query, ranks, ranks[0]) @ split_heads(key, ranks, ranks[0]).mT
    context = merge_heads(scores.softmax(-1) @ split_heads(value, value_ranks, value_ranks[0]), value_ranks)
    output = attention.output(context)
    mlp_normed = block.mlp_norm(stream + output)
    up = mlp.up(mlp_normed)
    hidden = mlp.activation(up)
    down = mlp.down(hidden)
    inputs = {"query": normed, "key": normed, "value": normed, "output": context, "up": mlp_normed, "down": hidden}
    outputs = {"query": query, "key": key, "value": value, "output": output, "up": up, "down": down}
    return LinearTrace(inputs, outputs, stream + output + down)


def _zeros(block: LowRankViTBlock) -> dict[str, LinearStatistics]:
    statistics: dict[str, LinearStatistics] = {}
    for name, weight in whole_weights(block).items():
        outputs, inputs = weight.shape
        moments = statistics["query"].inputs if name in ("key", "value") else Moments.zeros(inputs)
        statistics[name] = LinearStatistics(
            images=0,
            inputs=moments,
            absolute=torch.zeros(inputs, dtype=torch.float64),
            gradient=torch.zeros(outputs, outputs, dtype=torch.float64),
            input_fisher=torch.zeros(inputs, dtype=torch.float64),
        )
    return statistics


@torch.enable_grad()  # a preset may ask from where gradients are off
def _traced_backward(
    model: LowRankViTForImageClassification, embeddings: Tensor, generator: torch.Generator
) -> tuple[list[LinearTrace], Iterator[dict[str, Tensor]]]:
    """Traces of all blocks, and the loss gradients at the outputs of their weights."""
    stream = embeddings.detach().to(model.device).requires_grad_(True)
    traces = []
    blocks: Any = model.vit.blocks
    for block in blocks:
        traces.append(traced_linears(block, stream))
        stream = traces[-1].after
    logits = model.classify(model.vit.norm(stream))[0]
    if not torch.isfinite(logits).all():
        raise RunError("The logits are not finite: the source model overflows on these images.")
    loss = drawn_label_loss(logits, label_draws(len(logits), logits.shape[1], generator))
    gradients = iter(torch.autograd.grad(loss, [trace.outputs[name] for trace in traces for name in FACTORABLE]))
    return traces, ({name: next(gradients) for name in FACTORABLE} for _ in traces)


@torch.no_grad()
def _add(statistics: dict[str, LinearStatistics], trace: LinearTrace, gradients: dict[str, Tensor]) -> None:
    for name, of_weight in statistics.items():
        inputs, gradient = trace.inputs[name], gradients[name]
        of_weight.images += len(inputs)
        if name not in ("key", "value"):  # theirs are the query's
            of_weight.inputs.add(inputs.flatten(0, 1))
        of_weight.absolute += inputs.abs().sum((0, 1)).cpu().double()
        flat = gradient.flatten(0, 1)
        of_weight.gradient += (flat.mT @ flat).cpu().double()
        of_weight.input_fisher += (gradient.mT @ inputs).square().sum((0, 1)).cpu().double()
