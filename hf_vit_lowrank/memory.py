"""How much memory a run will take, and how its blocks are handled in groups where that is more than allowed."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import processes
from .errors import UserError
from .plan_costs import num_tokens, plan_cost
from .rank_plan import STREAM_FROM
from .recipe import FACTORED, OURS, TRAINED, VIEWS, CompressionRecipe
from .remote.configuration_lowrank_vit import LowRankViTConfig
from .remote.modeling_lowrank_vit import pair

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
# Python, torch and its libraries, and their buffers.
_PROGRAM = 10**9
# Matrices of an MLP's moments that choosing its units, its bypass or its refit has at hand at once: measured.
_WORKING_MATRICES = 11
# Tensors of the size of all images' embeddings, beside those. The smaller model's embeddings, both streams, and as much
# as two more that batches of earlier blocks leave in the C library's allocator: measured.
_REFIT_STREAMS = 5
# Two streams, those behind a refitted probe, and as much in the allocator.
_PROBE_STREAMS = 6
# Of images and views: inputs, dense inputs and targets; more than those and a refit of the images without the targets.
_TRAINING_STREAMS = 3
# Bytes of an image from which views are made, for each of the model's pixels and channels.
_BYTES_OF_A_PIXEL = 3
# Of the smaller model: its gradients, Adam's two averages, and the start that may have to come back.
_COPIES = 4
# Of the free memory of a GPU that data may take which could as well come batch by batch.
_NEAR_SHARE = 0.25


@dataclass(frozen=True)
class MemoryPlan:
    """batch_size: images at once. distilled: images at once of those that the whole smaller model is trained on.
    group: blocks whose moments are collected in one pass over the images.

    peak: bytes that the process is expected to take at most. moments: bytes of the moments of all blocks, which a run
    folder holds.
    """

    batch_size: int
    distilled: int
    group: int
    passes: int
    peak: int
    moments: int


def parse_bytes(text: str) -> int:
    """ "16GB" as 16,000,000,000. Raises UserError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper())
    if match is None:
        raise UserError(f"'{text}' is no amount of memory: write 16GB, or 800MB.")
    return int(float(match[1]) * _UNITS[match[2]])


def memory_plan(
    config: LowRankViTConfig, recipe: CompressionRecipe, batch_size: int, limit: int | None = None
) -> MemoryPlan:
    """For a model at full rank. Smaller batches come first, then fewer blocks at once, each group a pass of its own.

    batch_size: images at once, but for those that the whole smaller model is trained on: as many as the recipe says, or
    fewer where memory is short.

    Raises:
        UserError: a single block and a single image, or the compensation, take more than `limit` bytes; says how much.
    """
    layers, moments = config.num_hidden_layers, _moment_bytes(config)
    weights, embeddings = 4 * plan_cost(config, "parameters"), _own_images(recipe) * _stream_bytes(config)
    fixed = _PROGRAM + weights + embeddings
    if recipe.may_narrow and (recipe.reduction is None or recipe.reduction > STREAM_FROM):
        fixed += weights + embeddings  # the dense model stays beside a narrower one
    if recipe.preset in FACTORED:
        fixed += layers * _linear_moment_bytes(config)
    width = config.intermediate_size + config.hidden_size
    # All blocks' moments, and the covariances that bypasses are made from, unless they are parked.
    kept = 0 if limit else layers * (moments + 8 * width**2)
    working = kept + _WORKING_MATRICES * 8 * width**2

    def statistics(batch: int, group: int) -> int:
        return fixed + layers * batch * _activation_bytes(config) + group * moments

    def compensation(batch: int, distilled: int) -> int:
        # Or, while loading, both layouts.
        steps = _compensation_bytes(config, recipe, weights, batch, distilled)
        return max(fixed + weights + steps + working, _PROGRAM + 2 * weights)

    batch, distilled, group = batch_size, recipe.batch_size, layers
    if limit is not None:
        while batch > 1 and statistics(batch, 1) > (fixed + limit) // 2:
            batch //= 2
        while group > 1 and statistics(batch, group) > limit:
            group -= 1
        while distilled > 1 and compensation(batch, distilled) > limit:
            distilled //= 2
    peak = max(statistics(batch, group), compensation(batch, distilled))
    if limit is not None and peak > limit:
        raise UserError(
            f"{limit / 1e9:.1f} GB do not do for this model and {recipe.samples} images: allow at least "
            f"{peak / 1e9:.1f} GB."
        )
    return MemoryPlan(batch, distilled, group, -(-layers // group), peak, layers * moments)


def _own_images(recipe: CompressionRecipe) -> int:
    """Of one of several processes; for another method than ours each of them has all."""
    return -(-recipe.samples // processes.count()) if recipe.preset == OURS else recipe.samples


def _compensation_bytes(
    config: LowRankViTConfig, recipe: CompressionRecipe, weights: int, batch: int, distilled: int
) -> int:
    """Of the step that takes most, beside both models, the images' embeddings and the work on one block."""
    own, stream, activations = _own_images(recipe), _stream_bytes(config), _activation_bytes(config)
    steps = [own * (_PROBE_STREAMS if recipe.probe else _REFIT_STREAMS) * stream]
    if recipe.compensation in TRAINED:
        # Every process makes its views from all images.
        pixels = recipe.samples * _BYTES_OF_A_PIXEL * config.num_channels * math.prod(pair(config.image_size))
        steps.append(pixels + own * _TRAINING_STREAMS * (1 + VIEWS) * stream + batch * activations)
        if recipe.compensation == "distill":
            layers = config.num_hidden_layers
            blocks = layers * stream + activations if recipe.gradient_checkpointing else layers * activations
            teacher = recipe.batch_size * (1 + layers) * stream
            steps.append(pixels + _COPIES * weights + teacher + distilled * blocks)
    return max(steps)


def _stream_bytes(config: LowRankViTConfig) -> int:
    """The tokens of one image in float32."""
    return 4 * num_tokens(config) * config.hidden_size


def _moment_bytes(config: LowRankViTConfig) -> int:
    """The statistics of one block: float64, read and other tokens apart."""
    hidden = config.hidden_size
    return 8 * (2 * (config.intermediate_size + hidden) ** 2 + 6 * hidden**2)


def _linear_moment_bytes(config: LowRankViTConfig) -> int:
    """Those of a block's four weights, at their inputs and their outputs: float64."""
    return 8 * (14 * config.hidden_size**2 + 2 * config.intermediate_size**2)


def _activation_bytes(config: LowRankViTConfig) -> int:
    """What a pass forward and backward holds of one image in one block: float32."""
    tokens, hidden = num_tokens(config), config.hidden_size
    scores = 3 * config.num_attention_heads * tokens**2
    return 4 * (tokens * (2 * config.intermediate_size + 14 * hidden) + scores)


def near(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The tensors on a GPU if there is plenty of room for them all, else as they are."""
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    room = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    return [tensor.to(device) for tensor in tensors] if needed < _NEAR_SHARE * room else list(tensors)
