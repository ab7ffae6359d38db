"""What every preset gets: the dense model, the images, and what the images told about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from ..linear_statistics import LinearStatistics, collect_linear_statistics
from ..remote.modeling_lowrank_vit import LowRankViTForImageClassification
from ..statistics import BlockStatistics


@dataclass(frozen=True)
class PresetInputs:
    """model: dense, at full rank, in eval mode, parameters without gradients. embeddings: batches of (images, tokens,
    d) on the CPU, what its first block reads. statistics: one per block. seed: of every random choice. images_at_once:
    of a batch, in passes backward."""

    model: LowRankViTForImageClassification
    embeddings: list[Tensor]
    statistics: Sequence[BlockStatistics]
    seed: int
    images_at_once: int

    @cached_property
    def linear_statistics(self) -> list[dict[str, LinearStatistics]]:
        """Per block and linear weight; collected when a preset first asks, since only some need them."""
        return collect_linear_statistics(self.model, self.embeddings, self.seed, self.images_at_once)
