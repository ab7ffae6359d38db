"""Train a smaller model block by block towards the dense stream (design 3.5.2).

Each block's input is the stream that the smaller model really produces, its target the dense stream after the block, so
that the drift of earlier blocks is corrected. Images that nothing is fitted on decide block by block whether the
trained weights are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .. import processes
from ..candidates.block import output_metric
from ..linalg import square_root
from ..memory import near
from ..precision import half_precision
from ..progress import track
from ..remote.modeling_lowrank_vit import LowRankViTBlock, LowRankViTForImageClassification
from ..run_folder import RunFolder
from ..statistics import BlockStatistics, token_weight
from .closed_form import refit_block
from .drift import moved, tokens_computed

EPOCHS = 4
LEARNING_RATE = 1e-3
WARM_UP_STEPS = 20


@dataclass(frozen=True)
class BlockTraining:
    """Error of the block's output on held-back images, before and after training, in the metric of the loss gradient
    and relative to the dense stream's variance; `kept` says whether the trained weights were better and stayed."""

    before: float
    after: float
    kept: bool


def compensate_gradient(
    dense: LowRankViTForImageClassification,
    small: LowRankViTForImageClassification,
    statistics: Sequence[BlockStatistics],
    inputs: Tensor,
    held_back: Sequence[Tensor],
    *,
    images: int,
    size: int,
    refit: bool,
    seed: int,
    run: RunFolder,
) -> list[BlockTraining]:
    """Train `small` in place on this process's embeddings (images, tokens, d), of images and of random views of them.

    inputs: moved through the blocks in place; with a second stream as large, all that is held of the views.
    images: how many of `inputs`, from the first on, are of images as they are. size: of a batch.
    refit: fit each block in closed form first, on the stream that the trained blocks before it produce; on the images
        alone, since two views of one in the two halves of the images would make its noise look like knowledge.
    run: where finished blocks are kept.
    """
    num_read, layers = dense.config.num_tokens_read, len(dense.vit.blocks)
    targets = inputs.clone()
    held_targets, held_inputs = list(held_back), list(held_back)
    records = []
    blocks: Any = zip(dense.vit.blocks, small.vit.blocks, statistics, strict=True)
    for layer, (source, block, moments) in enumerate(track(blocks, "Training block by block", layers, "blocks")):
        queries = tokens_computed(dense.config, layer)
        stage = f"block-{layer:02}"
        done = run.has(stage)
        if refit and not done:
            dense_stream, small_stream = (list(stream[:images].split(size)) for stream in (targets, inputs))
            refit_block(source, block, moments, dense_stream, small_stream, queries, num_read)
        targets, held_targets = _moved_in_place(source, targets, queries, size), moved(source, held_targets, queries)
        if done:
            state, fields = run.load(stage)
            block.load_state_dict(state)
            record = BlockTraining(**fields)
        else:
            error = _Error(moments, targets, num_read, dense.device, size)
            held = held_inputs, held_targets
            record = _train(block, queries, error, (inputs, targets), held, seed + layer, size)
            run.save(stage, (block.state_dict(), asdict(record)))
        records.append(record)
        inputs, held_inputs = _moved_in_place(block, inputs, queries, size), moved(block, held_inputs, queries)
    return records


def _moved_in_place(block: LowRankViTBlock, stream: Tensor, queries: int | None, size: int) -> Tensor:
    """The stream (images, tokens, d) behind a block, written over that before it, `size` images at once."""
    for batch in stream.split(size):
        batch[:, :queries] = moved(block, [batch], queries)[0]
    return stream[:, :queries]


class _Error:
    """Mean of ‖Γ^½ (output - target)‖² over tokens, a token weighing what it weighs in the refits, relative to what the
    mean of all targets would give."""

    def __init__(self, statistics: BlockStatistics, targets: Tensor, num_read: int, device: torch.device, size: int):
        self.weight, self.num_read = token_weight(statistics.mlp_gradient), num_read
        self.root = square_root(output_metric(statistics.mlp_gradient, self.weight))[0].float().to(device)
        self.scale = 1.0
        images, total = processes.total(len(targets)), targets.sum(0, dtype=torch.float64)
        processes.add_up(total)
        mean = (total / images).float().to(device)
        errors = sum(len(batch) * float(self(batch.to(device), mean)) for batch in targets.split(size))
        self.scale = max(processes.total(errors) / images, 1e-30)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(images, tokens, d) both."""
        errors = ((outputs.float() - targets) @ self.root).square().sum(-1)
        weighted = errors[:, : self.num_read].sum() + self.weight * errors[:, self.num_read :].sum()
        return weighted / (max(len(outputs), 1) * self.scale)  # a process may have none of a step's images


def _train(
    block: LowRankViTBlock,
    queries: int | None,
    error: Callable[[Tensor, Tensor], Tensor],
    fitting: tuple[Tensor, Tensor],
    held_back: tuple[list[Tensor], list[Tensor]],
    seed: int,
    size: int,
) -> BlockTraining:
    before = _mean_error(block, queries, error, *held_back)
    start = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    _descend(block, queries, error, *fitting, seed, size)
    after = _mean_error(block, queries, error, *held_back)
    kept = after < before  # false for NaN as well
    if not kept:
        block.load_state_dict(start)
    return BlockTraining(before, after, kept)


def _descend(
    block: LowRankViTBlock,
    queries: int | None,
    error: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    seed: int,
    size: int,
) -> None:
    device, generator = next(block.parameters()).device, torch.Generator().manual_seed(seed)
    inputs, targets = near([inputs, targets], device)
    counts = processes.gather(len(inputs))
    first = sum(counts[: processes.index()])
    steps = EPOCHS * -(-sum(counts) // size)
    optimizer = torch.optim.Adam(block.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / WARM_UP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps)),
    )
    half = half_precision(device)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(sum(counts), generator=generator).split(size):
            own = chosen[(chosen >= first) & (chosen < first + len(inputs))] - first
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                outputs, _ = block(inputs[own].to(device), queries)
            optimizer.zero_grad(set_to_none=False)
            (error(outputs, targets[own].to(device)) * (len(own) / len(chosen))).backward()
            processes.add_up(*(parameter.grad for parameter in block.parameters() if parameter.grad is not None))
            optimizer.step()
            schedule.step()


@torch.no_grad()
def _mean_error(
    block: LowRankViTBlock,
    queries: int | None,
    error: Callable[[Tensor, Tensor], Tensor],
    inputs: list[Tensor],
    targets: list[Tensor],
) -> float:
    device = next(block.parameters()).device
    sums = [
        len(batch) * error(block(batch.to(device), queries)[0], target.to(device)).item()
        for batch, target in zip(inputs, targets, strict=True)
    ]
    return processes.total(sum(sums)) / processes.total(sum(map(len, inputs)))
