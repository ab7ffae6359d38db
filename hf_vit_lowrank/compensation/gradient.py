"""Train a smaller model block by block towards the dense stream (design 3.5.2).

Each block's input is the stream that the smaller model produces, its target the dense stream after the block, so that
the drift of earlier blocks is corrected; a part of it is seen, as in the refits. Images that nothing is fitted on
decide block by block whether the trained weights are kept. What the last block gets of an image is little but the
tokens read, which are soon learnt by heart: it is trained on blends of two images' streams, for which the dense block
gives the target (mixup, Zhang et al., arXiv 1710.09412, in hidden states as in arXiv 1806.05236, but with the exact
answer in place of a blended one). Of the other blocks, which see many tokens of an image, a step trains on some.
"""

from __future__ import annotations

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
from ..schedule import warm_up_and_cosine
from ..statistics import BlockStatistics, token_weight
from .closed_form import refit_block
from .drift import moved, partly_drifted, tokens_computed

EPOCHS = 6
LEARNING_RATE = 1e-3
WARM_UP_STEPS = 20
# Of an image's tokens that the classifier does not read, a step trains on so many, chosen at random; attention still
# reads all of them. Six passes so leave 1 % less error on held-back images behind the first blocks of DeiT-tiny than
# four on all 196 tokens, in seven tenths of the time.
SAMPLED = 64
# A blend has up to so much of a second image in it.
LARGEST_SHARE = 0.5


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
    batch_size: int,
    size: int,
    refit: bool,
    seed: int,
    run: RunFolder,
) -> list[BlockTraining]:
    """Train `small` in place on this process's embeddings (images, tokens, d), of images and of random views of them.

    inputs: moved through the blocks in place; with two more streams as large, all that is held of the views.
    images: how many of `inputs`, from the first on, are of images as they are. batch_size: of a step of training, which
    works on `size` images at once, as all else does.
    refit: fit each block in closed form first, on the stream that the trained blocks before it produce; on the images
        alone, since two views of one in the two halves of the images would make its noise look like knowledge.
    run: where finished blocks are kept.
    """
    num_read, layers = dense.config.num_tokens_read, len(dense.vit.blocks)
    dense_inputs, spare = inputs.clone(), torch.empty_like(inputs)
    held_targets, held_inputs = list(held_back), list(held_back)
    records = []
    blocks: Any = zip(dense.vit.blocks, small.vit.blocks, statistics, strict=True)
    for layer, (source, block, moments) in enumerate(track(blocks, "Training block by block", layers, "blocks")):
        queries = tokens_computed(dense.config, layer)
        stage = f"block-{layer:02}"
        done = run.has(stage)
        if refit and not done:
            dense_stream, small_stream = (list(one[:images].split(batch_size)) for one in (dense_inputs, inputs))
            refit_block(source, block, moments, dense_stream, small_stream, queries, num_read, size)
        held_targets = moved(source, held_targets, queries)
        examples: _Examples
        if queries is None:
            targets = _move(source, dense_inputs, spare, queries, size)
            examples = _Examples(inputs, dense_inputs, targets, num_read=num_read, seed=seed + layer)
        else:
            targets = torch.cat(moved(source, dense_inputs.split(size), queries))
            examples = _Blends(inputs, dense_inputs, source=source, num_read=num_read, seed=seed)
        if done:
            state, fields = run.load(stage)
            block.load_state_dict(state)
            record = BlockTraining(**fields)
        else:
            error = _Error(moments, targets, num_read, dense.device, size)
            held = held_inputs, held_targets
            record = _train(block, queries, error, examples, held, seed + layer, batch_size, size)
            run.save(stage, (block.state_dict(), asdict(record)))
        records.append(record)
        inputs, held_inputs = _move(block, inputs, inputs, queries, size), moved(block, held_inputs, queries)
        dense_inputs, spare = targets, dense_inputs
    return records


def _move(block: LowRankViTBlock, stream: Tensor, behind: Tensor, queries: int | None, size: int) -> Tensor:
    """The stream (images, tokens, d) behind a block, written over the tensor `behind`, `size` images at once."""
    for before, after in zip(stream.split(size), behind.split(size), strict=True):
        after[:, :queries] = moved(block, [before], queries)[0]
    return behind[:, :queries]


class _Examples:
    """What a block is trained on, (images, tokens, d) each: the smaller and the dense stream before it, and the dense
    one behind it. The first `num_read` tokens are those that the classifier reads."""

    def __init__(self, *streams: Tensor, num_read: int, seed: int):
        self.streams: Sequence[Tensor] = streams
        self.num_read, self.generator = num_read, torch.Generator().manual_seed(seed + processes.index())

    def __len__(self) -> int:
        return len(self.streams[0])

    def move_near(self, device: torch.device) -> None:
        self.streams = near(self.streams, device)

    def batch(self, chosen: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Of the images chosen: inputs, their tokens in an order in which those trained on come first, and targets of
        those. A block does not see the order."""
        others = torch.randperm(self.streams[0].shape[1] - self.num_read, generator=self.generator)
        order, images = torch.cat((torch.arange(self.num_read), self.num_read + others)), chosen[:, None]
        inputs, dense_inputs = (stream[images, order].to(device) for stream in self.streams[:2])
        targets = self.streams[2][images, order[: self.num_read + SAMPLED]].to(device)
        return partly_drifted(dense_inputs, inputs), targets


class _Blends(_Examples):
    """Of the last block `source`, which computes the tokens read alone: both streams before it, of which each image
    gets up to LARGEST_SHARE of another one."""

    def __init__(self, *streams: Tensor, source: LowRankViTBlock, num_read: int, seed: int):
        super().__init__(*streams, num_read=num_read, seed=seed)
        self.source = source

    def batch(self, chosen: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        others = torch.randint(len(self), (len(chosen),), generator=self.generator)
        shares = LARGEST_SHARE * torch.rand(len(chosen), 1, 1, generator=self.generator).to(device)
        inputs, dense_inputs = (
            stream[chosen].to(device).lerp(stream[others].to(device), shares) for stream in self.streams
        )
        with torch.no_grad():
            return partly_drifted(dense_inputs, inputs), self.source(dense_inputs, self.num_read)[0]


class _Error:
    """Mean of ‖Γ^½ (output - target)‖² over tokens, a token weighing what it weighs in the refits, relative to what the
    mean of all targets would give. Of tokens that the classifier does not read, some stand for all."""

    def __init__(self, statistics: BlockStatistics, targets: Tensor, num_read: int, device: torch.device, size: int):
        self.weight, self.num_read = token_weight(statistics.mlp_gradient), num_read
        self.root = square_root(output_metric(statistics.mlp_gradient, self.weight))[0].float().to(device)
        self.scale, self.others = 1.0, targets.shape[1] - num_read
        images, total = processes.total(len(targets)), targets.sum(0, dtype=torch.float64)
        processes.add_up(total)
        mean = (total / images).float().to(device)
        errors = sum(len(batch) * float(self(batch.to(device), mean)) for batch in targets.split(size))
        self.scale = max(processes.total(errors) / images, 1e-30)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(images, tokens, d) both."""
        errors = ((outputs.float() - targets) @ self.root).square().sum(-1)
        read, others = errors.split([self.num_read, errors.shape[1] - self.num_read], 1)
        weighted = read.sum() + self.weight * others.sum() * self.others / max(others.shape[1], 1)
        return weighted / (max(len(outputs), 1) * self.scale)  # a process may have none of a step's images


def _train(
    block: LowRankViTBlock,
    queries: int | None,
    error: Callable[[Tensor, Tensor], Tensor],
    examples: _Examples,
    held_back: tuple[list[Tensor], list[Tensor]],
    seed: int,
    batch_size: int,
    size: int,
) -> BlockTraining:
    before = _mean_error(block, queries, error, *held_back)
    start = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    _descend(block, error, examples, seed, batch_size, size)
    after = _mean_error(block, queries, error, *held_back)
    kept = after < before  # false for NaN as well
    if not kept:
        block.load_state_dict(start)
    return BlockTraining(before, after, kept)


def _descend(
    block: LowRankViTBlock,
    error: Callable[[Tensor, Tensor], Tensor],
    examples: _Examples,
    seed: int,
    batch_size: int,
    size: int,
) -> None:
    device, generator = next(block.parameters()).device, torch.Generator().manual_seed(seed)
    examples.move_near(device)
    counts = processes.gather(len(examples))
    first = sum(counts[: processes.index()])
    steps = EPOCHS * -(-sum(counts) // batch_size)
    optimizer = torch.optim.Adam(block.parameters(), LEARNING_RATE)
    schedule = warm_up_and_cosine(optimizer, WARM_UP_STEPS, steps)
    half = half_precision(device)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(sum(counts), generator=generator).split(batch_size):
            own = chosen[(chosen >= first) & (chosen < first + len(examples))] - first
            optimizer.zero_grad(set_to_none=False)
            for part in own.split(size):
                inputs, targets = examples.batch(part, device)
                with torch.autocast(device.type, torch.bfloat16, enabled=half):
                    outputs, _ = block(inputs, targets.shape[1])
                (error(outputs, targets) * (len(part) / len(chosen))).backward()
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
