"""The paper's own method: the ranks by its greedy rule, and what BA and GY of every weight are fitted to."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from test_presets_factored import product, random_inputs, root_of

from hf_vit_lowrank.candidates.factored import FactoredCandidate
from hf_vit_lowrank.evaluation import count_parameters
from hf_vit_lowrank.linear_statistics import linear_of, query_scale, traced_linears, whole_weights
from hf_vit_lowrank.presets.inputs import PresetInputs
from hf_vit_lowrank.presets.paper import paper, paper_ranks
from hf_vit_lowrank.remote.modeling_lowrank_vit import LowRankViTForImageClassification

SHAPES = {"query_key_value": (144, 48), "output": (48, 48), "up": (96, 48), "down": (48, 96)}
SECOND = {"query_key_value": 1, "output": 1, "up": 1, "down": 1}  # 5 % of 36, 24, 32 and 32
# Directions in which inputs vary less than this, as a share, are rounding: compressed contexts have few dimensions.
SMALLEST_SHARE = 1e-3

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture(scope="module")
def inputs() -> PresetInputs:
    inputs = random_inputs(0.3)
    for block in inputs.model.vit.blocks:
        block.attention.query.weight *= 5  # so that contexts vary
    return inputs


def best_second_tensor(
    rest: torch.Tensor, moment: torch.Tensor, rank: int, generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """What Adam is to come near: G and Y in closed form."""
    inverse = torch.linalg.pinv(root_of(moment), rtol=SMALLEST_SHARE)
    left, singular, right = torch.linalg.svd(rest @ inverse.mT, full_matrices=False)
    return left[:, :rank] * singular[:rank], right[:rank] @ inverse


@pytest.fixture(scope="module")
def small(inputs) -> LowRankViTForImageClassification:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_vit_lowrank.presets.paper.second_tensor", best_second_tensor)
        return paper(inputs, int(0.5 * count_parameters(inputs.model)))


@pytest.fixture(scope="module")
def dense_inputs(inputs) -> list[dict[str, torch.Tensor]]:
    """Per block what each weight reads in the dense model (tokens, n)."""
    stream, found = torch.cat(inputs.embeddings), []
    for block in inputs.model.vit.blocks:
        trace = traced_linears(block, stream)
        found.append({name: x.flatten(0, 1).double() for name, x in trace.inputs.items()})
        stream = trace.after
    return found


@pytest.fixture(scope="module")
def small_inputs(inputs, small) -> list[dict[str, torch.Tensor]]:
    """Per block what each pair reads in the compressed model (tokens, n)."""
    found: list[dict[str, torch.Tensor]] = [{} for _ in small.vit.blocks]

    def keep(own, name, module, read):
        own[name] = read[0].flatten(0, 1).double()

    hooks = [
        linear_of(block, name).register_forward_pre_hook(partial(keep, own, name))
        for block, own in zip(small.vit.blocks, found, strict=True)
        for name in SHAPES
    ]
    stream = torch.cat(inputs.embeddings)
    with torch.no_grad():
        for block in small.vit.blocks:
            stream, _ = block(stream)
    for hook in hooks:
        hook.remove()
    return found


def first_product(small, layer: int, name: str) -> torch.Tensor:
    """BA alone of what stands for one of `whole_weights`."""
    pair, rank = linear_of(small.vit.blocks[layer], name), small.config.factor_ranks[layer][name] - SECOND[name]
    weight = (pair.expand.weight[:, :rank] @ pair.reduce.weight[:rank]).detach().double()
    if name == "query_key_value":
        weight[:48] /= query_scale(small.vit.blocks[layer])
    return weight


def greedy(curves: list[list[float]], costs: list[int], budget: float) -> list[int]:
    """The rule by its text: the cost falls along an exponential, each time at the expense of the piece that loses the
    least share of its energy per cost. curves: errors of the sizes 0, 1, …"""
    sizes = [len(errors) - 1 for errors in curves]
    start = sum(size * cost for size, cost in zip(sizes, costs, strict=True))
    for step in range(1, 501):
        allowed = budget + (start - budget) * math.exp(-step / 80) if step < 500 else budget
        while (cost := sum(size * cost for size, cost in zip(sizes, costs, strict=True))) > allowed:
            options = []
            for piece, errors in enumerate(curves):
                left = max(1, sizes[piece] - math.ceil((cost - allowed) / costs[piece]))
                if left < sizes[piece]:
                    lost = (errors[left] - errors[sizes[piece]]) / errors[0]
                    options.append((lost / (sizes[piece] - left) / costs[piece], piece, left))
            _, piece, left = min(options)
            sizes[piece] = left
    return sizes


def budget_of_first(inputs: PresetInputs, limit: int) -> int:
    """What of a limit is left for BA: all but what is no weight of a block, GY, and the biases of keys and values."""
    weights = sum(m * n for m, n in SHAPES.values())
    second = sum(SECOND[name] * sum(shape) for name, shape in SHAPES.items())
    return limit - (count_parameters(inputs.model) - 2 * weights + 2 * second + 2 * 96)


def test_ranks_are_those_of_the_greedy_rule(inputs, small, dense_inputs):
    curves, costs = [], []
    for block, own in zip(inputs.model.vit.blocks, dense_inputs, strict=True):
        for name, weight in whole_weights(block).items():
            squares = torch.linalg.svdvals(weight.double() @ root_of(own[name].mT @ own[name])).square()
            m, n = weight.shape
            largest = max(rank for rank in range(m) if rank * (m + n) < m * n) - SECOND[name]
            curves.append([float(squares[rank:].sum()) for rank in range(largest + 1)])
            costs.append(m + n)
    expected = greedy(curves, costs, budget_of_first(inputs, int(0.5 * count_parameters(inputs.model))))
    found = [rank - SECOND[name] for own in small.config.factor_ranks for name, rank in own.items()]
    assert found == expected
    assert len(set(found)) > 3


def candidates_with(errors: list[dict[str, list[float]]]) -> list[dict[str, FactoredCandidate]]:
    factors = {name: (torch.empty(m, 48), torch.empty(48, n)) for name, (m, n) in SHAPES.items()}
    return [{name: FactoredCandidate(torch.tensor(own[name]), *factors[name]) for name in own} for own in errors]


def test_ranks_of_weights_whose_energy_ends_are_where_it_ends(inputs):
    ends = [
        {"query_key_value": 9, "output": 5, "up": 20, "down": 1},
        {"query_key_value": 4, "output": 17, "up": 2, "down": 13},
    ]
    errors = [{name: [max(0.0, rank - k) for k in range(49)] for name, rank in own.items()} for own in ends]
    cost = sum(rank * sum(SHAPES[name]) for own in ends for name, rank in own.items())
    limit = cost - budget_of_first(inputs, 0)
    assert paper_ranks(inputs.model, candidates_with(errors), limit) == (ends, [SECOND, SECOND])


def test_no_rank_is_above_the_largest_with_which_a_weight_gets_smaller(inputs):
    errors = [{name: [48.0 - rank for rank in range(49)] for name in SHAPES} for _ in range(2)]
    first, _ = paper_ranks(inputs.model, candidates_with(errors), 2 * count_parameters(inputs.model))
    # 144 · 48 / (144 + 48) = 36, at which a pair is no smaller, and GY has one of the ranks below.
    assert first == 2 * [{"query_key_value": 34, "output": 22, "up": 30, "down": 30}]


def test_first_product_is_the_best_on_the_dense_activations(inputs, small, dense_inputs):
    for layer, block in enumerate(inputs.model.vit.blocks):
        for name, weight in whole_weights(block).items():
            outputs = dense_inputs[layer][name] @ weight.double().mT
            error = (outputs - dense_inputs[layer][name] @ first_product(small, layer, name).mT).square().sum()
            rank = small.config.factor_ranks[layer][name] - SECOND[name]
            best = torch.linalg.svdvals(outputs)[rank:].square().sum()
            assert float(error) == pytest.approx(float(best), rel=1e-3)


def test_second_product_is_the_best_on_the_compressed_stream_for_the_dense_outputs(
    inputs, small, dense_inputs, small_inputs
):
    for layer, block in enumerate(inputs.model.vit.blocks):
        for name, weight in whole_weights(block).items():
            x, outputs = small_inputs[layer][name], dense_inputs[layer][name] @ weight.double().mT
            left = outputs - x @ first_product(small, layer, name).mT
            # The best of its rank: the truncated SVD of the part of what is left that is linear in x.
            linear = x @ torch.linalg.lstsq(x, left, rcond=SMALLEST_SHARE, driver="gelsd").solution
            best = (left - linear).square().sum() + torch.linalg.svdvals(linear)[SECOND[name] :].square().sum()
            reached, alone = (outputs - x @ product(small, layer, name).mT).square().sum(), left.square().sum()
            assert abs(float((reached - best) / (alone - best))) < 1e-3
