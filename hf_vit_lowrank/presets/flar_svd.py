"""FLAR-SVD: a rank for every weight by a search on the error of the model's last feature."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..candidates.factored import FactoredCandidate
from ..evaluation import count_parameters
from ..linear_statistics import LinearStatistics, set_whole_weight
from ..progress import track
from ..remote.modeling_lowrank_vit import LowRankViTBlock, LowRankViTForImageClassification
from .factored import all_candidates, factored_model, largest_rank, scaled_ranks, uniform_ranks, whole_ranks

if TYPE_CHECKING:
    from .inputs import PresetInputs

RANK_STEP = 8
SEARCH_IMAGES = 32


@torch.no_grad()
def flar_svd(inputs: PresetInputs, limit: int) -> LowRankViTForImageClassification:
    """A model with at most `limit` parameters: SVD-LLM's factors, ranks by a search (Thoma et al., CVPRW 2025).

    For every weight the smallest rank, a multiple of 8, is found by bisection at which compressing this weight alone
    changes the last feature (what the classifier reads) by no more than a threshold, as a share of the mean square of
    the feature it makes. The threshold is the change made by the uniform model of this size, divided by the number of
    weights; the ranks found are then scaled to the size, as in the authors' code. Different here: a weight that no rank
    is good enough for counts with its break-even rank and is scaled too, ranks are not rounded to multiples of 8 after
    scaling, moments are not shrunk as by Ledoit and Wolf batch by batch (in the authors' code an intensity that
    rounding decides), and there is no filter by latency. Each weight is searched alone in the dense model, which is
    their default, too. The search runs on the first 32 calibration images, theirs on 512 that are blended.

    Raises:
        UserError: the limit cannot be reached.
    """
    dense = inputs.model
    if limit >= count_parameters(dense):
        return factored_model(dense, whole_ranks(dense))
    candidates = all_candidates(inputs, _whitened)
    embeddings = torch.cat(inputs.embeddings)[:SEARCH_IMAGES].to(dense.device)
    search = _FeatureError(dense, embeddings)
    uniform = factored_model(dense, uniform_ranks(dense, limit), candidates)
    threshold = search.of_blocks(uniform.vit.blocks) / sum(map(len, candidates))
    found = [
        {name: _smallest_rank(search, layer, name, candidate, threshold) for name, candidate in own.items()}
        for layer, own in enumerate(track(candidates, "Searching ranks", len(candidates), "blocks"))
    ]
    ranks = scaled_ranks(dense, limit, lambda layer, name, break_even: found[layer][name] or break_even)
    return factored_model(dense, ranks, candidates)


def _whitened(statistics: LinearStatistics) -> tuple[Tensor, Tensor]:
    return torch.eye(len(statistics.gradient), dtype=torch.float64), statistics.inputs.second


def _smallest_rank(
    search: _FeatureError, layer: int, name: str, candidate: FactoredCandidate, threshold: float
) -> int | None:
    """In multiples of 8; None where not even the largest tried is good enough."""
    best = None
    low, high = 1, largest_rank(len(candidate.expand), candidate.reduce.shape[1]) // RANK_STEP + 1
    while low < high:
        middle = (low + high) // 2
        expand, reduce = candidate.factors(middle * RANK_STEP)
        if search.of_weight(layer, name, expand @ reduce) <= threshold:
            best, high = middle * RANK_STEP, middle
        else:
            low = middle + 1
    return best


@dataclass
class _FeatureError:
    """How much the last feature changes with a block or a weight: mean squared change over mean square."""

    model: LowRankViTForImageClassification
    embeddings: Tensor

    def __post_init__(self) -> None:
        self.streams = [self.embeddings]
        for block in self.model.vit.blocks:
            self.streams.append(block(self.streams[-1])[0])
        self.expected = self._read(self.streams[-1])

    def of_blocks(self, blocks: Any, first: int = 0) -> float:
        """With all blocks from `first` on replaced by these."""
        stream = self.streams[first]
        for block in blocks:
            stream, _ = block(stream)
        feature = self._read(stream)
        return float((feature - self.expected).square().mean() / feature.square().mean())

    def of_weight(self, layer: int, name: str, weight: Tensor) -> float:
        """With one weight replaced by this (m, n)."""
        blocks: list[Any] = list(self.model.vit.blocks)[layer:]
        blocks[0] = _with_weight(blocks[0], name, weight)
        return self.of_blocks(blocks, layer)

    def _read(self, stream: Tensor) -> Tensor:
        return self.model.vit.norm(stream)[:, : self.model.config.num_tokens_read]


def _with_weight(block: LowRankViTBlock, name: str, weight: Tensor) -> LowRankViTBlock:
    changed = copy.deepcopy(block)
    set_whole_weight(changed, name, weight)
    return changed
