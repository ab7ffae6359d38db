"""How much memory a run will take, and how its blocks are handled in groups where that is more than allowed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import UserError
from .rank_plan import num_tokens, plan_cost
from .remote.configuration_lowrank_vit import LowRankViTConfig

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
# Python, torch and its libraries, and their buffers.
_PROGRAM = 10**9
# Matrices of an MLP's moments that choosing its units, its bypass or its refit has at hand at once: measured.
_WORKING_MATRICES = 11
# Of the free memory of a GPU that data may take which could as well come batch by batch.
_NEAR_SHARE = 0.25


@dataclass(frozen=True)
class MemoryPlan:
    """batch_size: images at once. group: blocks whose moments are collected in one pass over the images.

    peak: bytes that the process is expected to take at most. moments: bytes of the moments of all blocks, which a run
    folder holds.
    """

    batch_size: int
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


def memory_plan(config: LowRankViTConfig, images: int, batch_size: int, limit: int | None = None) -> MemoryPlan:
    """For a model at full rank. Smaller batches come first, then fewer blocks at once, each group a pass of its own.

    Raises:
        UserError: a single block and a single image take more than `limit` bytes; says how much that is.
    """
    layers, moments = config.num_hidden_layers, _moment_bytes(config)
    weights, embeddings = 4 * plan_cost(config, "parameters"), 4 * images * num_tokens(config) * config.hidden_size
    fixed = _PROGRAM + weights + embeddings
    width = config.intermediate_size + config.hidden_size
    # All blocks' moments, and the covariances that bypasses are made from, unless they are parked.
    kept = 0 if limit else layers * (moments + 8 * width**2)
    # The smaller model, and the streams of both, beside the work on one block; and while loading, both layouts.
    later = max(fixed + weights + 2 * embeddings + kept + _WORKING_MATRICES * 8 * width**2, _PROGRAM + 2 * weights)

    def peak(batch: int, group: int) -> int:
        return max(fixed + layers * batch * _activation_bytes(config) + group * moments, later)

    batch, group = batch_size, layers
    if limit is not None:
        while batch > 1 and peak(batch, 1) > (fixed + limit) // 2:
            batch //= 2
        while group > 1 and peak(batch, group) > limit:
            group -= 1
        if peak(batch, group) > limit:
            raise UserError(
                f"{limit / 1e9:.1f} GB do not do for this model and {images} images: allow at least "
                f"{peak(batch, group) / 1e9:.1f} GB."
            )
    return MemoryPlan(batch, group, -(-layers // group), peak(batch, group), layers * moments)


def _moment_bytes(config: LowRankViTConfig) -> int:
    """The statistics of one block: float64, read and other tokens apart."""
    hidden = config.hidden_size
    return 8 * (2 * (config.intermediate_size + hidden) ** 2 + 6 * hidden**2)


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
