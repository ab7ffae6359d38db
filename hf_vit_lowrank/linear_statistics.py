"""What the calibration images tell about each single weight of a dense classifier (design 3.3), in one pass.

Every token counts the same here, as in the methods that these statistics are for. Sums in float64. Queries, keys and
values read the same and have one weight (m = 3d), the query's being scaled as the source model has it: one product of
two for all three needs fewer parameters than three, and is what those methods' code for vision transformers factors.
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
from .statistics import Moments, drawn_label_loss, with_draws
from .surgery import set_linear


@dataclass
class LinearStatistics:
    """Sums over tokens and images about one weight (m, n).

    images: their number. inputs: moments of its inputs (n). absolute: sum of absolute inputs (n,). gradient: sum of
    g gᵀ (m, m), g the loss gradient at its output. input_fisher: sum over images and outputs of the squared gradient of
    an image's loss in the weight (n,).
    """

    images: int
    inputs: Moments
    absolute: Tensor
    gradient: Tensor
    input_fisher: Tensor


def collect_linear_statistics(
    model: LowRankViTForImageClassification, embeddings: Iterable[Tensor], seed: int, images_at_once: int
) -> list[dict[str, LinearStatistics]]:
    """One pass forward and backward over batches of embeddings (images, tokens, d); per block, by name of the weight.

    model: at full rank. images_at_once: of a batch, the rest of which waits. The loss is the cross-entropy against a
    label drawn from the model's own prediction.

    Raises:
        RunError: no image came, or a gradient is not finite.
    """
    blocks: Any = model.vit.blocks
    statistics = [_zeros(block) for block in blocks]
    for part, draws in with_draws(embeddings, model.config.num_labels or 0, seed, images_at_once):
        for of_block, trace, gradients in zip(statistics, *_traced_backward(model, part, draws), strict=True):
            _add(of_block, trace, gradients)
    if statistics[0]["output"].images == 0:
        raise RunError("No calibration image was seen: the calibration data are empty.")
    return statistics


def whole_weights(block: LowRankViTBlock) -> dict[str, Tensor]:
    """The four weights (m, n) of a block at full rank, by name (`FACTORABLE`)."""
    query, key_value = block.attention.query.weight.detach(), block.attention.key_value.weight.detach()
    together = torch.cat((query / query_scale(block), key_value))
    return {"query_key_value": together} | {name: linear_of(block, name).weight.detach() for name in FACTORABLE[1:]}


def weight_shapes(block: LowRankViTBlock) -> dict[str, tuple[int, int]]:
    """(m, n) of each of `whole_weights`."""
    query, key_value = block.attention.query, block.attention.key_value
    together = query.out_features + key_value.out_features, query.in_features
    return {"query_key_value": together} | {name: linear_of(block, name).weight.shape for name in FACTORABLE[1:]}


def set_whole_weight(block: LowRankViTBlock, name: str, weight: Tensor) -> None:
    """The way back: write one of `whole_weights` into a block at full rank."""
    if name == "query_key_value":
        query, key_value = block.attention.query, block.attention.key_value
        stored = as_stored(block, name, weight).split([query.out_features, key_value.out_features])
        set_linear(query, stored[0])
        set_linear(key_value, stored[1])
    else:
        set_linear(linear_of(block, name), weight)


def linear_of(block: LowRankViTBlock, name: str) -> Any:
    """A block's linear map by name: `reduce` and `expand`, or whole, as queries, keys and values never are in one."""
    return getattr(block.mlp if name in ("up", "down") else block.attention, name)


def as_stored(block: LowRankViTBlock, name: str, rows: Tensor) -> Tensor:
    """Rows (m, …) that belong to one of `whole_weights`, with the query's scale as part of them."""
    if name != "query_key_value":
        return rows
    queries = sum(block.attention.query_key_ranks)
    return torch.cat((rows[:queries] * query_scale(block), rows[queries:]))


def query_scale(block: LowRankViTBlock) -> float:
    """The factor on the dot products of a head at full rank, which is part of our query weights."""
    return float(block.attention.query_key_ranks[0] ** -0.5)


@dataclass
class LinearTrace:
    """One batch inside a block at full rank: inputs and outputs (images, tokens, n or m) of its four weights, by name,
    and the stream after it."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    after: Tensor


def traced_linears(block: LowRankViTBlock, stream: Tensor) -> LinearTrace:
    """Run a block at full rank on a stream (images, tokens, d)."""
    attention, mlp = block.attention, block.mlp
    num_heads = len(attention.query_key_ranks)
    normed = block.attention_norm(stream)
    query_key_value = torch.cat((attention.query(normed) / query_scale(block), attention.key_value(normed)), dim=-1)
    query, key, value = split_heads(query_key_value, 3 * num_heads).chunk(3, dim=1)
    scores = query_scale(block) * query @ key.mT
    context = merge_heads(scores.softmax(-1) @ value)
    output = attention.output(context)
    mlp_normed = block.mlp_norm(stream + output)
    up = mlp.up(mlp_normed)
    hidden = mlp.activation(up)
    down = mlp.down(hidden)
    inputs = {"query_key_value": normed, "output": context, "up": mlp_normed, "down": hidden}
    outputs = {"query_key_value": query_key_value, "output": output, "up": up, "down": down}
    return LinearTrace(inputs, outputs, stream + output + down)


def _zeros(block: LowRankViTBlock) -> dict[str, LinearStatistics]:
    statistics: dict[str, LinearStatistics] = {}
    for name, (outputs, inputs) in weight_shapes(block).items():
        statistics[name] = LinearStatistics(
            images=0,
            inputs=Moments.zeros(inputs),
            absolute=torch.zeros(inputs, dtype=torch.float64),
            gradient=torch.zeros(outputs, outputs, dtype=torch.float64),
            input_fisher=torch.zeros(inputs, dtype=torch.float64),
        )
    return statistics


@torch.enable_grad()  # a preset may ask from where gradients are off
def _traced_backward(
    model: LowRankViTForImageClassification, embeddings: Tensor, draws: Tensor
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
    loss = drawn_label_loss(logits, draws)
    gradients = iter(torch.autograd.grad(loss, [trace.outputs[name] for trace in traces for name in FACTORABLE]))
    return traces, ({name: next(gradients) for name in FACTORABLE} for _ in traces)


@torch.no_grad()
def _add(statistics: dict[str, LinearStatistics], trace: LinearTrace, gradients: dict[str, Tensor]) -> None:
    for name, of_weight in statistics.items():
        inputs, gradient = trace.inputs[name], gradients[name]
        of_weight.images += len(inputs)
        of_weight.inputs.add(inputs.flatten(0, 1))
        of_weight.absolute += inputs.abs().sum((0, 1)).cpu().double()
        flat = gradient.flatten(0, 1)
        of_weight.gradient += (flat.mT @ flat).cpu().double()
        of_weight.input_fisher += (gradient.mT @ inputs).square().sum((0, 1)).cpu().double()
