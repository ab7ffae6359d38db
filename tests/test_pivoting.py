"""The same function in fewer parameters: identities that are not stored, and layer norms without scale and shift."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload
from conftest import random_model
from hypothesis import given
from hypothesis import strategies as st
from test_narrowing import PLANS, SHAPE, logits, random_basis
from torch import nn

from hf_vit_lowrank.candidates.pivots import num_pivots, pivots_first
from hf_vit_lowrank.evaluation import count_parameters
from hf_vit_lowrank.export import densified
from hf_vit_lowrank.narrowing import narrowed
from hf_vit_lowrank.pivoting import _with_identity, pivoted, unpivoted
from hf_vit_lowrank.plan_costs import plan_cost
from hf_vit_lowrank.rank_plan import stored
from hf_vit_lowrank.remote.configuration_lowrank_vit import LowRankViTConfig
from hf_vit_lowrank.remote.modeling_lowrank_vit import PivotedLinear


def random_matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_number_of_pivots():
    assert num_pivots([40, 64, 50], 192) == 36
    assert num_pivots([40, 0], 192) == num_pivots([1], 192) == 0
    assert num_pivots([13], 12) == 0  # a rank beyond the space has no basis of its own


@given(st.integers(1, 8), st.integers(0, 9), st.data())
def test_a_basis_with_an_identity_changes_nothing(rank, more, data):
    pivots, weight = data.draw(st.integers(1, rank)), random_matrix(rank + more, rank, seed=rank)
    changed, inverse = _with_identity(weight, pivots)
    torch.testing.assert_close(changed[:pivots], torch.eye(pivots, rank, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(changed @ inverse, weight, atol=1e-9, rtol=1e-6)


def test_pivots_are_those_of_the_largest_volume_one_by_one():
    spaces = [torch.linalg.qr(random_matrix(9, rank, seed=rank))[0].mT for rank in (3, 5)]
    order = pivots_first([(spaces[0], 2), (spaces[1], 4)], 9)
    assert sorted(order) == list(range(9))

    def volume(chosen: list[int]) -> float:
        own = [spaces[0][:, chosen]] if len(chosen) <= 2 else []
        return sum(float(torch.linalg.svdvals(rows).log().sum()) for rows in [*own, spaces[1][:, chosen]])

    for step in range(4):
        others = [entry for entry in range(9) if entry not in order[:step]]
        assert order[step] == max(others, key=lambda entry: volume([*order[:step], entry]))


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_pivoted_is_the_same_function_in_as_many_parameters_as_planned(plan):
    model = random_model(0.4, **SHAPE, **plan)
    small = pivoted(model)
    assert small.config.to_dict() == stored(model.config).to_dict()
    assert count_parameters(small) == plan_cost(small.config, "parameters") < count_parameters(model)
    torch.testing.assert_close(logits(small), logits(model), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(unpivoted(small)), logits(model), atol=1e-4, rtol=1e-4)
    assert count_parameters(unpivoted(small)) == plan_cost(unpivoted(small).config, "parameters")


def test_multiplied_out_values_and_outputs_of_a_head_have_the_same_scale():
    model = random_model(0.4, **SHAPE)
    model.vit.blocks[0].attention.output.weight.mul_(100)
    whole = unpivoted(pivoted(model))
    torch.testing.assert_close(logits(whole), logits(model), atol=1e-4, rtol=1e-4)
    for block in whole.vit.blocks:
        attention, ranks = block.attention, block.attention.value_output_ranks
        values = attention.key_value.weight[sum(attention.query_key_ranks) :].double().split(ranks)
        for output, value in zip(attention.output.weight.double().split(ranks, 1), values, strict=True):
            torch.testing.assert_close(output.mT @ output, value @ value.mT, atol=1e-5, rtol=1e-4)


def test_a_narrower_model_is_pivoted_and_exported_at_dense_size():
    model = narrowed(random_model(0.4, **SHAPE, **PLANS["full rank"]), random_basis(16, 11))
    small = pivoted(model)
    assert (small.config.hidden_size, small.config.dense_hidden_size) == (12, 16)
    torch.testing.assert_close(logits(small), logits(model), atol=1e-4, rtol=1e-4)
    whole = densified(small)
    assert whole.config.hidden_size == 16
    torch.testing.assert_close(logits(whole), logits(model), atol=1e-4, rtol=1e-4)


def test_heads_that_write_to_entries_of_their_own_have_pivots_too():
    model = random_model(0.4, **SHAPE)
    for block in model.vit.blocks:
        block.attention.output.weight.copy_(torch.eye(16))
    small = pivoted(model)
    assert min(small.config.output_pivots) == 7
    largest = max(block.attention.output.rest.weight.abs().max().item() for block in small.vit.blocks)
    assert largest < 20
    torch.testing.assert_close(logits(small), logits(model), atol=1e-4, rtol=1e-4)


def test_pivoted_weights_may_be_loaded_when_they_are_called():
    model = pivoted(random_model(0.4, **SHAPE))
    expected = logits(model)
    torch.testing.assert_close(logits(cpu_offload(model, torch.device("cpu"))), expected)


def test_weights_of_zero_have_pivots_too():
    model = random_model(0.4, **SHAPE)
    model.vit.blocks[0].attention.output.weight.zero_()
    torch.testing.assert_close(logits(pivoted(model)), logits(model), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_pivoted_map_is_its_whole_weight_also_for_quantisers():
    linear = PivotedLinear([3, 5, 4], 9, 2)
    for parameter in linear.parameters():
        parameter.normal_(generator=torch.Generator().manual_seed(3))
    inputs, weight = torch.randn(4, 7, 12), linear.whole_weight()
    assert torch.equal(
        weight[:2], torch.tensor([[1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0], [0, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0.0]])
    )
    expected = inputs @ weight.mT + linear.bias
    torch.testing.assert_close(linear(inputs), expected, atol=1e-5, rtol=1e-5)
    other = copy.deepcopy(linear)
    other.rest = nn.Sequential(linear.rest)  # as one that puts a module of its own in the place of a linear map
    torch.testing.assert_close(other(inputs), expected, atol=1e-5, rtol=1e-5)


def test_old_configurations_have_no_pivots():
    config = LowRankViTConfig()
    assert set(config.output_pivots) == {0} == {config.projection_pivots}
    assert config.layer_norm_affine
