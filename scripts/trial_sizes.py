"""A trial of `bench_trials.py`: sizes learned by gradient, in place of those that the error curves say.

Queries are masked softly in the order of their importance; the weights behind values and units are read from a path of
least-squares fits at a grid of sizes, linear between them. So the divergence at the model's end is a smooth function
of the sizes, which descends on them under the budget. The model on the path is not compensated.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from hf_vit_lowrank.bisection import last_that_fits
from hf_vit_lowrank.budget import recipe_ranks
from hf_vit_lowrank.calibration import Calibrated
from hf_vit_lowrank.divergence import stream_logits
from hf_vit_lowrank.embeddings import embedded_by
from hf_vit_lowrank.plan_costs import model_costs
from hf_vit_lowrank.rank_plan import RankPlan
from hf_vit_lowrank.recipe import CompressionRecipe
from hf_vit_lowrank.statistics import Moments, token_weight
from hf_vit_lowrank.surgery import _refit, shrink

STEPS, IMAGES, RATE = 240, 16, 0.05
# Dimensions over which a query's mask goes from one to zero.
SOFTNESS = 6.0
# Of all values, of all units of an MLP, on the path.
GRID_STEPS = 12, 16
SMALLEST = 4.0
MULTIPLE = 8


def learned_plan(calibrated: Calibrated, recipe: CompressionRecipe, share: float) -> RankPlan:
    """The plan of `recipe` without bypasses, its sizes moved by `share` of the way (in logarithms) to learned ones."""
    plan = recipe_ranks(calibrated.dense, list(calibrated.candidates), calibrated.embedding, recipe)
    plan = replace(plan, bypass_ranks=[0] * len(plan.mlp_widths))
    budget = _Budget.of(calibrated, plan)
    learned = _descended(calibrated, plan, budget)
    return budget.plan(calibrated, plan, budget.sizes * (learned / budget.sizes) ** share)


@dataclass(frozen=True)
class _Budget:
    """Sizes (layers, 3): query-key, value-output, MLP; their largest values (3); what one more costs (layers, 3)."""

    sizes: Tensor
    largest: Tensor
    costs: Tensor

    @classmethod
    def of(cls, calibrated: Calibrated, plan: RankPlan) -> _Budget:
        config = calibrated.dense.model.config
        largest = [config.hidden_size, config.hidden_size, config.intermediate_size]
        ranks = plan.query_key_ranks, plan.value_output_ranks
        sizes = [*([sum(heads) for heads in kind] for kind in ranks), plan.mlp_widths]
        costs = [
            [unit.query_key, unit.value_output, unit.width] for unit in model_costs(config, "parameters", False)[0]
        ]
        return cls(*(torch.tensor(values).double() for values in (list(zip(*sizes, strict=True)), largest, costs)))

    def scaled(self, sizes: Tensor) -> Tensor:
        """The same sizes, larger or smaller by one factor, at the cost of those that are given."""
        limit = self.cost(self.sizes)
        change = last_that_fits(lambda change: self.cost(self._clamped(sizes, change)) <= limit, -2.0, 2.0)
        return self._clamped(sizes, change)

    def cost(self, sizes: Tensor) -> float:
        return float((sizes * self.costs).sum())

    def _clamped(self, sizes: Tensor, exponent: float) -> Tensor:
        return torch.minimum((sizes * math.exp(exponent)).clamp_min(SMALLEST), self.largest)

    def plan(self, calibrated: Calibrated, plan: RankPlan, sizes: Tensor) -> RankPlan:
        """With sizes near these that are multiples of MULTIPLE and cost no more than those of `plan`."""
        wanted = self.scaled(sizes)
        rounded = torch.minimum((wanted / MULTIPLE).round().clamp_min(1.0) * MULTIPLE, self.largest)
        while self.cost(rounded) > self.cost(self.sizes):
            excess = ((rounded - wanted) / wanted).masked_fill(rounded <= MULTIPLE, -math.inf)
            rounded.view(-1)[excess.argmax()] -= MULTIPLE
        while True:
            left = self.cost(self.sizes) - self.cost(rounded)
            full = (rounded >= self.largest) | (MULTIPLE * self.costs > left)
            if full.all():
                break
            rounded.view(-1)[((rounded - wanted) / wanted).masked_fill(full, math.inf).argmin()] += MULTIPLE
        layers: Any = zip(calibrated.candidates, rounded.int().tolist(), strict=True)
        heads = [(own.query_key.head_ranks(q), own.value_output.head_ranks(v), w) for own, (q, v, w) in layers]
        query_key, value_output, widths = map(list, zip(*heads, strict=True))
        return replace(plan, query_key_ranks=query_key, value_output_ranks=value_output, mlp_widths=widths)


def _descended(calibrated: Calibrated, plan: RankPlan, budget: _Budget) -> Tensor:
    """Sizes under the budget that the divergence of the model on the path asks for, mean over the second half."""
    dense = calibrated.dense.model
    small = shrink(dense, list(calibrated.candidates), calibrated.embedding, calibrated.statistics, plan)
    images, embeddings = torch.cat(calibrated.fitting), torch.cat(embedded_by(small, dense, calibrated.fitting))
    path, expected = _Path(calibrated), stream_logits(dense, images.split(IMAGES)).float().log_softmax(-1)
    logs = budget.sizes.log().requires_grad_(True)
    optimizer, generator = torch.optim.Adam([logs], RATE, betas=(0.9, 0.98)), torch.Generator().manual_seed(0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    late = []
    for step in range(STEPS):
        chosen = torch.randint(len(images), (IMAGES,), generator=generator)
        logits = path.logits(embeddings[chosen], logs.exp()).log_softmax(-1)
        optimizer.zero_grad()
        kl_div(logits, expected[chosen], log_target=True, reduction="batchmean").backward()
        with torch.no_grad():
            # What only asks for more of everything is taken out.
            prices = logs.exp() * budget.costs
            logs.grad -= (logs.grad * prices).sum() / prices.square().sum() * prices
            optimizer.step()
            schedule.step()
            logs.copy_(budget.scaled(logs.exp()).log())
        if step >= STEPS // 2:
            late.append(logs.detach().exp())
    return torch.stack(late).mean(0)


class _Path:
    """The dense model with every piece at a size that is a number with a gradient."""

    def __init__(self, calibrated: Calibrated):
        self.dense = calibrated.dense.model
        blocks: Any = zip(self.dense.vit.blocks, calibrated.candidates, calibrated.statistics, strict=True)
        self.pieces = [_pieces(*block) for block in blocks]

    def logits(self, stream: Tensor, sizes: Tensor) -> Tensor:
        for block, pieces, own in zip(self.dense.vit.blocks, self.pieces, sizes, strict=True):
            stream = stream + pieces.attended(block.attention_norm(stream), own[0], own[1])
            units = block.mlp.activation(block.mlp.up(block.mlp_norm(stream)))
            stream = stream + pieces.down.at(units, own[2])
        return self.dense.classify(self.dense.vit.norm(stream))[0]


@dataclass(frozen=True)
class _Fits:
    """Weights (sizes, d, n) and biases (sizes, d) fitted at a grid of sizes, `step` apart."""

    weights: Tensor
    biases: Tensor
    step: int

    def at(self, inputs: Tensor, size: Tensor) -> Tensor:
        place = (size / self.step).clamp(0, len(self.weights) - 1 - 1e-6)
        below = int(place.detach())
        share = (place - below).float()
        weight, bias = ((1 - share) * all_[below] + share * all_[below + 1] for all_ in (self.weights, self.biases))
        return inputs @ weight.mT + bias


@dataclass(frozen=True)
class _Pieces:
    """Of one block: queries with their importance, keys and values; what is fitted behind values and units."""

    query: torch.nn.Linear
    order: Tensor
    key_value: Tensor
    heads: int
    output: _Fits
    down: _Fits

    def attended(self, states: Tensor, query_key: Tensor, value_output: Tensor) -> Tensor:
        mask = torch.sigmoid((query_key.float() - self.order - 0.5) / SOFTNESS)
        query = self.query(states) * (mask if query_key < len(mask) else torch.ones_like(mask))
        key, value = (states @ self.key_value.mT).chunk(2, -1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, key, value))
        context = (query @ key.mT).softmax(-1) @ value
        return self.output.at(context.transpose(1, 2).flatten(2), value_output)


@torch.no_grad()
def _pieces(block: Any, candidates: Any, statistics: Any) -> _Pieces:
    heads, hidden = len(candidates.query_key.heads), block.attention.query.in_features
    sides = zip(*(head.maps(hidden // heads) for head in candidates.query_key.heads), strict=True)
    query_map, key_map = (torch.block_diag(*side) for side in sides)
    query = copy.deepcopy(block.attention.query)
    query.weight.copy_(query_map @ query.weight.double())
    if query.bias is not None:
        query.bias.copy_(query_map @ query.bias.double())
    key, value = block.attention.key_value.weight.double().split([hidden, hidden])
    rotation = torch.block_diag(*candidates.value_output.basis)
    order = torch.empty(hidden)
    order[candidates.query_key.order] = torch.arange(float(hidden))
    contexts = statistics.context.weighted(token_weight(statistics.attention_gradient))
    width = block.mlp.down.in_features
    units = statistics.mlp.weighted(token_weight(statistics.mlp_gradient)).part(slice(width))
    return _Pieces(
        *(query, order, torch.cat((key_map @ key, rotation @ value)).float(), heads),
        _fits(block.attention.output, candidates.value_output.elimination.kept, contexts, rotation, GRID_STEPS[0]),
        _fits(block.mlp.down, candidates.width.kept, units, torch.eye(width).double(), GRID_STEPS[1]),
    )


def _fits(linear: torch.nn.Linear, kept: Callable[[int], Tensor], seen: Moments, rotation: Tensor, steps: int) -> _Fits:
    """Of the weight behind inputs that are rotated, of which `kept(size)` stay."""
    outputs, inputs = linear.weight.shape
    step, dense = inputs // steps, linear.weight.double()
    weights, biases = [], []
    for size in range(0, inputs + 1, step):
        weight, change = torch.zeros(outputs, inputs).double(), dense @ seen.first / seen.count
        if size:
            own = rotation[kept(size)]
            weight[:, kept(size)], change = _refit(dense, lambda values, own=own: own @ values, seen)
        weights.append(weight.float())
        biases.append((linear.bias.double() + change).float())
    return _Fits(torch.stack(weights), torch.stack(biases), step)
