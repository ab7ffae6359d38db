"""Refit a smaller model block by block, by least squares, so that its stream meets the dense stream (design 3.5.1).

Two streams of tokens run side by side through the blocks: the dense model's and the smaller model's. In each block the
output weight, then the down weight, is fitted to (dense stream after - smaller stream before), so that the drift of
earlier blocks is corrected and not passed on. The MLP's units are chosen on the smaller stream, where they will work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .. import processes
from ..candidates.block import output_metric
from ..candidates.mlp_width import mlp_width_candidate
from ..exact_sums import rounded_products, rounded_sum, units_of
from ..linalg import ridge_solve
from ..progress import track
from ..remote.modeling_lowrank_vit import LowRankViTBlock, LowRankViTForImageClassification
from ..run_folder import RunFolder
from ..statistics import BlockStatistics, Moments, TokenGroups, token_weight
from ..surgery import keep_units, set_linear
from .drift import drift, moved

OUTPUT_RIDGE = 1e-4
DOWN_RIDGE = 1e-5


@dataclass(frozen=True)
class BlockDrift:
    """Drift of the smaller stream from the dense one after the block's attention and after its MLP (see `drift`)."""

    after_attention: float
    after_mlp: float


@torch.no_grad()
def compensate_closed_form(
    dense: LowRankViTForImageClassification,
    small: LowRankViTForImageClassification,
    statistics: Sequence[BlockStatistics],
    embeddings: Sequence[Tensor],
    run: RunFolder,
) -> list[BlockDrift]:
    """Refit `small` in place on this process's batches of embeddings (images, tokens, d), which both models share.

    Holds two streams in memory, each of the size of `embeddings`. run: where finished blocks are kept.
    """
    num_read, layers = dense.config.num_tokens_read, len(dense.vit.blocks)
    dense_stream, small_stream = list(embeddings), list(embeddings)
    drifts = []
    blocks: Any = zip(dense.vit.blocks, small.vit.blocks, statistics, strict=True)
    for layer, (source, block, moments) in enumerate(track(blocks, "Compensating", layers, "blocks")):
        # Nothing reads the other tokens after the last block.
        queries = num_read if layer == layers - 1 else None
        stage = f"block-{layer:02}"
        if run.has(stage):
            state, record = run.load(stage)
            block.load_state_dict(state)
            after = BlockDrift(**record)
            dense_stream, small_stream = moved(source, dense_stream, queries), moved(block, small_stream, queries)
        else:
            after = refit_block(source, block, moments, dense_stream, small_stream, queries, num_read)
            run.save(stage, (block.state_dict(), asdict(after)))
        drifts.append(after)
    return drifts


@torch.no_grad()
def refit_block(
    source: LowRankViTBlock,
    block: LowRankViTBlock,
    statistics: BlockStatistics,
    dense_stream: list[Tensor],
    small_stream: list[Tensor],
    queries: int | None,
    num_read: int,
) -> BlockDrift:
    """Refit one block in place; both streams, batches of (images, tokens, d), are moved behind it, in place.

    queries: leading tokens that the block computes, all if None. num_read: those that the classifier reads.
    """
    _refit_attention(source, block, statistics, dense_stream, small_stream, queries, num_read)
    after_attention = drift(dense_stream, small_stream, num_read)
    _refit_mlp(source, block, statistics, dense_stream, small_stream, num_read)
    return BlockDrift(after_attention, drift(dense_stream, small_stream, num_read))


def _refit_attention(
    source: LowRankViTBlock,
    block: LowRankViTBlock,
    statistics: BlockStatistics,
    dense_stream: list[Tensor],
    small_stream: list[Tensor],
    queries: int | None,
    num_read: int,
) -> None:
    """Fit the output weight; both streams are moved behind the attention, in place."""
    output = block.attention.output
    device = output.weight.device
    fit = _Regression(output.in_features, output.out_features, token_weight(statistics.attention_gradient))
    contexts = []
    for index, (dense_batch, small_batch) in enumerate(zip(dense_stream, small_stream, strict=True)):
        dense_batch, small_batch = dense_batch.to(device), small_batch.to(device)
        update, _ = source.attention(source.attention_norm(dense_batch), queries)
        dense_after = dense_batch[:, :queries] + update
        context, _ = block.attention.context(block.attention_norm(small_batch), queries)
        fit.add(context, dense_after - small_batch[:, :queries], num_read)
        dense_stream[index], small_stream[index] = dense_after.cpu(), small_batch[:, :queries].cpu()
        contexts.append(context.cpu())
    fit.add_up()
    set_linear(output, *fit.solve(OUTPUT_RIDGE, prior=output.weight))
    processes.same_parameters(output)
    for index, context in enumerate(contexts):
        small_stream[index] = small_stream[index] + output(context.to(device)).cpu()


def _refit_mlp(
    source: LowRankViTBlock,
    block: LowRankViTBlock,
    statistics: BlockStatistics,
    dense_stream: list[Tensor],
    small_stream: list[Tensor],
    num_read: int,
) -> None:
    """Fit the down weight on all units, choose the units, fit it on those; both streams are moved behind the MLP."""
    down, mlp = block.mlp.down, source.mlp
    device = down.weight.device
    weight = token_weight(statistics.mlp_gradient)
    fit = _Regression(mlp.down.in_features, down.out_features, weight, watched=down.out_features)
    for index, (dense_batch, small_batch) in enumerate(zip(dense_stream, small_stream, strict=True)):
        dense_batch, small_batch = dense_batch.to(device), small_batch.to(device)
        dense_after = dense_batch + mlp(source.mlp_norm(dense_batch))
        normed = block.mlp_norm(small_batch)
        hidden = mlp.activation(mlp.up(normed))
        fit.add(torch.cat((hidden, normed), -1), dense_after - small_batch, num_read)
        dense_stream[index] = dense_after.cpu()
    fit.add_up()
    full, bias = fit.solve(DOWN_RIDGE, prior=mlp.down.weight)
    if down.in_features == mlp.down.in_features:
        set_linear(down, full, bias)
    else:
        metric = output_metric(statistics.mlp_gradient, weight)
        kept = mlp_width_candidate(full, fit.inputs.covariance(), metric).kept(down.in_features)
        keep_units(block, source, kept, full, bias, fit.seen, metric)
    processes.same_parameters(block.mlp)
    for index, small_batch in enumerate(small_stream):
        small_batch = small_batch.to(device)
        small_stream[index] = (small_batch + block.mlp(block.mlp_norm(small_batch))).cpu()


class _Regression:
    """Weighted least squares with a bias, from sums over tokens. `watched` values beside the inputs have their moments
    taken too."""

    def __init__(self, inputs: int, targets: int, other_weight: float, watched: int = 0):
        self.other_weight, self.size = other_weight, inputs
        self.groups = TokenGroups.zeros(inputs + watched)
        self.read, self.other = _CrossMoments(inputs, targets), _CrossMoments(inputs, targets)

    def add(self, inputs: Tensor, targets: Tensor, num_read: int) -> None:
        """(images, tokens, n + watched) and (images, tokens, m)."""
        self.groups.add(inputs, num_read)
        for group, tokens in ((self.read, slice(num_read)), (self.other, slice(num_read, None))):
            x, y = inputs[:, tokens, : self.size].flatten(0, 1), targets[:, tokens].flatten(0, 1)
            if group.units is None:
                everything = inputs[..., : self.size].flatten(0, 1), targets.flatten(0, 1)
                group.units = units_of(everything[0], len(x)), units_of(everything[1], len(x))
            group.add(x, y)

    def add_up(self) -> None:
        """Make these the sums over the batches of all processes."""
        self.groups.add_up()
        processes.add_up(self.read.target, self.read.cross, self.other.target, self.other.cross)

    @property
    def seen(self) -> Moments:
        return self.groups.weighted(self.other_weight)

    @property
    def inputs(self) -> Moments:
        return self.seen.part(slice(self.size))

    def solve(self, ridge: float, prior: Tensor) -> tuple[Tensor, Tensor]:
        """Weight (m, n), drawn towards `prior` where the data say little, and bias (m,)."""
        inputs, prior = self.inputs, prior.detach().cpu().double()
        covariance = inputs.covariance()
        target_sum = self.read.target + self.other_weight * self.other.target
        cross = self.read.cross + self.other_weight * self.other.cross
        cross -= torch.outer(inputs.first, target_sum) / inputs.count
        weight = prior + ridge_solve(covariance, cross - covariance @ prior.mT, ridge)
        return weight, (target_sum - weight @ inputs.first) / inputs.count


class _CrossMoments:
    """Sums over tokens of y (m) and of x yᵀ (n, m), in float64 and with the same bits in any order."""

    def __init__(self, inputs: int, targets: int):
        self.target = torch.zeros(targets, dtype=torch.float64)
        self.cross = torch.zeros(inputs, targets, dtype=torch.float64)
        self.units: tuple[Tensor, Tensor] | None = None  # of x and y, which the first batch decides

    def add(self, x: Tensor, y: Tensor) -> None:
        """(tokens, n) and (tokens, m)."""
        assert self.units is not None
        self.target += rounded_sum(y, self.units[1])
        self.cross += rounded_products(x, y, *self.units)
