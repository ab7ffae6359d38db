"""Refit a smaller model block by block, by least squares, so that its stream meets the dense stream (design 3.5.1).

Two streams of tokens run side by side through the blocks: the dense model's and the smaller model's. In each block the
output weight, then the down weight, is fitted to (dense stream after - smaller stream before), so that the drift of
earlier blocks is corrected and not passed on, as far as one half of the images foretells that of the other. The MLP's
units are chosen on the smaller stream, where they will work. A fit sees a part of that drift (`drift.partly_drifted`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import processes
from ..candidates.block import output_metric
from ..candidates.mlp_width import mlp_width_candidate
from ..progress import track
from ..regression import RegressionSums
from ..remote.modeling_lowrank_vit import LowRankViTBlock, LowRankViTForImageClassification
from ..run_folder import RunFolder
from ..statistics import ONE_PATCH_IN, BlockStatistics, sampled, token_weight
from ..surgery import keep_units, set_linear
from .drift import in_parts, moved, partly_drifted, tokens_computed


@torch.no_grad()
def compensate_closed_form(
    dense: LowRankViTForImageClassification,
    small: LowRankViTForImageClassification,
    statistics: Sequence[BlockStatistics],
    embeddings: Sequence[Tensor],
    images_at_once: int,
    run: RunFolder,
) -> None:
    """Refit `small` in place on this process's batches of embeddings (images, tokens, d), which both models share.

    Holds two streams in memory, each of the size of `embeddings`. images_at_once: how many of a batch go through a
    block together. run: where finished blocks are kept.
    """
    num_read, layers = dense.config.num_tokens_read, len(dense.vit.blocks)
    dense_stream, small_stream = list(embeddings), list(embeddings)
    blocks: Any = zip(dense.vit.blocks, small.vit.blocks, statistics, strict=True)
    for layer, (source, block, moments) in enumerate(track(blocks, "Compensating", layers, "blocks")):
        queries = tokens_computed(dense.config, layer)
        stage = f"block-{layer:02}"
        if run.has(stage):
            block.load_state_dict(run.load(stage))
            dense_stream = moved(source, dense_stream, queries, images_at_once)
            small_stream = moved(block, small_stream, queries, images_at_once)
        else:
            refit_block(source, block, moments, dense_stream, small_stream, queries, num_read, images_at_once)
            run.save(stage, block.state_dict())


@torch.no_grad()
def refit_block(
    source: LowRankViTBlock,
    block: LowRankViTBlock,
    statistics: BlockStatistics,
    dense_stream: list[Tensor],
    small_stream: list[Tensor],
    queries: int | None,
    num_read: int,
    images_at_once: int,
) -> None:
    """Refit one block in place; both streams, batches of (images, tokens, d), are moved behind it, in place.

    queries: leading tokens that the block computes, all if None. num_read: those that the classifier reads.
    images_at_once: how many of a batch go through the block together. Sums are added batch by batch, since to add to
    moments of a wide MLP takes as long for one image as for many.
    """
    ridge = _refit_attention(source, block, statistics, dense_stream, small_stream, queries, num_read, images_at_once)
    _refit_mlp(source, block, statistics, dense_stream, small_stream, num_read, images_at_once, ridge)


def _refit_attention(
    source: LowRankViTBlock,
    block: LowRankViTBlock,
    statistics: BlockStatistics,
    dense_stream: list[Tensor],
    small_stream: list[Tensor],
    queries: int | None,
    num_read: int,
    images_at_once: int,
) -> float:
    """Fit the output weight, with a ridge that is returned; both streams are moved behind the attention, in place."""
    output = block.attention.output
    weight = token_weight(statistics.attention_gradient)
    sums = RegressionSums(output.in_features, output.out_features, weight)

    def fitted_on(dense: Tensor, small: Tensor) -> tuple[Tensor, ...]:
        seen = partly_drifted(dense, small)
        update, _ = source.attention(source.attention_norm(dense), queries)
        dense_after = dense[:, :queries] + update
        context, _ = block.attention.context(block.attention_norm(seen), queries)
        return context, dense_after - seen[:, :queries], dense_after.cpu()

    for index, batches in enumerate(zip(dense_stream, small_stream, strict=True)):
        context, target, dense_stream[index] = in_parts(fitted_on, images_at_once, output.weight.device, *batches)
        sums.add(context, target, num_read)
    fitted = sums.add_up().solve(output.weight, output_metric(statistics.attention_gradient, weight))
    set_linear(output, fitted.weight, fitted.bias)
    processes.same_parameters(output)

    def behind(small: Tensor) -> tuple[Tensor, ...]:
        update, _ = block.attention(block.attention_norm(small), queries)
        return ((small[:, :queries] + update).cpu(),)

    for index, batch in enumerate(small_stream):
        (small_stream[index],) = in_parts(behind, images_at_once, output.weight.device, batch)
    return fitted.ridge


def _refit_mlp(
    source: LowRankViTBlock,
    block: LowRankViTBlock,
    statistics: BlockStatistics,
    dense_stream: list[Tensor],
    small_stream: list[Tensor],
    num_read: int,
    images_at_once: int,
    ridge: float,
) -> None:
    """Fit the down weight on all units, choose the units, fit it on those; both streams are moved behind the MLP.

    ridge: that of the attention. The same images say about as much about this, whose every try takes long.
    """
    down, mlp = block.mlp.down, source.mlp
    device = down.weight.device
    weight = token_weight(statistics.mlp_gradient)
    sums = RegressionSums(mlp.down.in_features, down.out_features, ONE_PATCH_IN * weight, watched=down.out_features)

    def fitted_on(dense: Tensor, small: Tensor) -> tuple[Tensor, ...]:
        seen = partly_drifted(dense, small)
        dense_after = dense + mlp(source.mlp_norm(dense))
        normed = block.mlp_norm(sampled(seen, num_read))
        hidden = mlp.activation(mlp.up(normed))
        return torch.cat((hidden, normed), -1), sampled(dense_after - seen, num_read), dense_after.cpu()

    for index, batches in enumerate(zip(dense_stream, small_stream, strict=True)):
        inputs, target, dense_stream[index] = in_parts(fitted_on, images_at_once, device, *batches)
        sums.add(inputs, target, num_read)
    fit = sums.add_up()
    del sums  # as large again
    metric = output_metric(statistics.mlp_gradient, weight)
    full, bias, _ = fit.solve(mlp.down.weight, metric, near=ridge)
    if down.in_features == mlp.down.in_features:
        set_linear(down, full, bias)
    else:
        kept = mlp_width_candidate(full, fit.covariance(), metric).kept(down.in_features)
        keep_units(block, source, kept, full, bias, fit.seen, statistics.slope.weighted(weight), metric)
    processes.same_parameters(block.mlp)

    def behind(small: Tensor) -> tuple[Tensor, ...]:
        return ((small + block.mlp(block.mlp_norm(small))).cpu(),)

    for index, batch in enumerate(small_stream):
        (small_stream[index],) = in_parts(behind, images_at_once, device, batch)
