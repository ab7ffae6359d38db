"""Presets that factor single weights: each minimises what it says, within the limit, in the checkpoint format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import random_model
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vit_lowrank.allocation import ErrorCurve, ImpossibleBudgetError, energy_greedy
from hf_vit_lowrank.checkpoint import load_checkpoint, save_checkpoint
from hf_vit_lowrank.errors import UserError
from hf_vit_lowrank.evaluation import count_parameters
from hf_vit_lowrank.linear_statistics import linear_of, query_scale, traced_linears, whole_weights
from hf_vit_lowrank.pixels import load_image_processor
from hf_vit_lowrank.presets import PRESETS
from hf_vit_lowrank.presets.factored import all_candidates, factored_parameters, uniform_ranks
from hf_vit_lowrank.presets.inputs import PresetInputs
from hf_vit_lowrank.presets.paper import _second_moment, paper_ranks, second_tensor
from hf_vit_lowrank.remote.modeling_lowrank_vit import LowRankViTForImageClassification

NAMES = ("svd", "fwsvd", "asvd", "svd-llm", "svd-llm-blockwise", "afm", "kfac-svd", "flar-svd", "paper")


SIZES = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 96, "image_size": 16, "num_labels": 5}

pytestmark = pytest.mark.usefixtures("quiet")


def random_inputs(spread: float) -> PresetInputs:
    """Of a small model whose parameters are all normal with this standard deviation, and noise."""
    model = random_model(spread, **SIZES)
    pixels = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(1)) + 1.0
    return PresetInputs(model, list(model.vit.embeddings(pixels).split(16)), [], seed=0, images_at_once=16)


@pytest.fixture(scope="module")
def inputs() -> PresetInputs:
    return random_inputs(0.15)


@pytest.fixture(scope="module")
def limit(inputs: PresetInputs) -> int:
    return int(0.7 * count_parameters(inputs.model))


@pytest.fixture(scope="module")
def models(inputs: PresetInputs, limit: int) -> dict[str, LowRankViTForImageClassification]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_vit_lowrank.presets.paper.ADAM_STEPS", 50)  # enough to see it work
        return {name: PRESETS[name](inputs, limit) for name in NAMES}


def product(model, layer: int, name: str) -> torch.Tensor:
    """What stands for one of `whole_weights`: the query's scale is taken out again."""
    pair = linear_of(model.vit.blocks[layer], name)
    weight = (pair.expand.weight @ pair.reduce.weight).detach().double()
    if name == "query_key_value":
        weight[:48] /= query_scale(model.vit.blocks[layer])
    return weight


def logits(model, embeddings):
    for block in model.vit.blocks:
        embeddings, _ = block(embeddings)
    return model.classify(model.vit.norm(embeddings))[0]


@pytest.mark.parametrize("name", NAMES)
def test_limit_is_kept_and_nearly_used(models, limit, name):
    small = models[name]
    assert not small.training
    assert 0.95 * limit < count_parameters(small) <= limit
    assert any(small.config.factor_ranks)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_a_block_weight_stays(inputs, models, name):
    dense = inputs.model.state_dict()
    for key, tensor in models[name].state_dict().items():
        if "norm" in key or "embeddings" in key or "classifier" in key:
            assert torch.equal(tensor, dense[key])


@pytest.mark.parametrize("name", NAMES)
def test_limit_of_the_dense_model_leaves_it_as_it_is(inputs, name):
    same = PRESETS[name](inputs, count_parameters(inputs.model))
    assert not any(same.config.factor_ranks)
    assert torch.equal(logits(same, inputs.embeddings[0]), logits(inputs.model, inputs.embeddings[0]))


@pytest.mark.parametrize("name", NAMES)
def test_unreachable_limit_says_what_can_be_reached(inputs, name):
    with pytest.raises(UserError, match="cannot be reached") as raised:
        PRESETS[name](inputs, 1000)
    smallest = int(str(raised.value).split("still has ")[1].split(";")[0].replace(",", ""))
    if name not in ("flar-svd", "paper"):  # these take longer
        assert count_parameters(PRESETS[name](inputs, smallest)) == smallest


def expected_metric(inputs: PresetInputs, preset: str, x: torch.Tensor, fisher: torch.Tensor) -> torch.Tensor:
    """The input metric of a preset from all tokens x (count, n), by its definition."""
    if preset == "svd":
        return torch.eye(x.shape[1], dtype=torch.float64)
    if preset == "fwsvd":
        return torch.diag(fisher)
    if preset == "asvd":
        return torch.diag(x.abs().mean(0))  # (mean |x|)^½, squared
    return x.mT @ x if preset in ("svd-llm", "flar-svd") else (x - x.mean(0)).mT @ (x - x.mean(0))


def root_of(metric: torch.Tensor) -> torch.Tensor:
    """R with R Rᵀ the metric."""
    values, vectors = torch.linalg.eigh(metric)
    return vectors * values.clamp_min(0.0).sqrt()


@pytest.mark.parametrize("preset", ["svd", "fwsvd", "asvd", "svd-llm", "afm", "kfac-svd", "flar-svd"])
def test_every_weight_minimises_the_criterion_of_its_preset(inputs, models, preset):
    small = models[preset]
    stream = torch.cat(inputs.embeddings)
    for layer, block in enumerate(inputs.model.vit.blocks):
        trace = traced_linears(block, stream)
        for name, rank in small.config.factor_ranks[layer].items():
            weight = whole_weights(block)[name].double()
            x = trace.inputs[name].flatten(0, 1).double()
            statistics = inputs.linear_statistics[layer][name]
            root = root_of(expected_metric(inputs, preset, x, statistics.input_fisher))
            left = torch.eye(len(weight), dtype=torch.float64)
            if preset == "kfac-svd":
                left = root_of(statistics.gradient + 1e-3 * statistics.gradient.diagonal().mean() * left).mT
            reached = (left @ (weight - product(small, layer, name)) @ root).square().sum()
            best = torch.linalg.svdvals(left @ weight @ root)[rank:].square().sum()
            assert float(reached) == pytest.approx(float(best), rel=1e-3)
        stream = trace.after


def test_uniform_ranks_are_the_largest_of_one_ratio(inputs, limit):
    ranks = uniform_ranks(inputs.model, limit)
    assert ranks[0] == ranks[1]
    assert ranks[0]["query_key_value"] / 36 == pytest.approx(ranks[0]["output"] / 24, abs=1 / 24)
    assert factored_parameters(inputs.model, ranks) <= limit
    small = PRESETS["svd"](inputs, limit)
    assert count_parameters(small) == factored_parameters(inputs.model, ranks)
    larger = [{name: rank + 1 for name, rank in own.items()} for own in ranks]
    assert factored_parameters(inputs.model, larger) > limit


def test_biases_that_a_pair_adds_are_counted():
    sizes = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 96, "image_size": 16}
    model = random_model(0.15, **sizes, num_labels=5, qkv_bias=False)
    inputs = PresetInputs(model, [model.vit.embeddings(torch.randn(4, 3, 16, 16))], [], seed=0, images_at_once=16)
    ranks = uniform_ranks(model, int(0.7 * count_parameters(model)))
    assert all("query_key_value" in own for own in ranks)
    assert count_parameters(PRESETS["svd"](inputs, int(0.7 * count_parameters(model)))) == factored_parameters(
        model, ranks
    )


def test_blockwise_uses_the_compressed_stream(models):
    one_shot, blockwise = models["svd-llm"], models["svd-llm-blockwise"]
    assert one_shot.config.factor_ranks == blockwise.config.factor_ranks
    assert torch.allclose(product(one_shot, 0, "down"), product(blockwise, 0, "down"), atol=1e-5)
    assert not torch.allclose(product(one_shot, 1, "up"), product(blockwise, 1, "up"), atol=1e-3)


@pytest.mark.parametrize("preset", ["afm", "kfac-svd"])
def test_means_are_folded(inputs, models, preset):
    # Of what the dense model has there, the mean output of each factored weight is the dense one.
    stream = torch.cat(inputs.embeddings)
    for layer, (block, source) in enumerate(zip(models[preset].vit.blocks, inputs.model.vit.blocks, strict=True)):
        dense = traced_linears(source, stream)
        for name in models[preset].config.factor_ranks[layer]:
            found, expected = linear_of(block, name)(dense.inputs[name]).mean((0, 1)), dense.outputs[name].mean((0, 1))
            if name == "query_key_value":
                found[:48] /= query_scale(source)
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        stream = dense.after


def test_kfac_predicts_what_its_metric_says_and_moves_ranks_to_where_they_count(inputs, models):
    small, images = models["kfac-svd"], 40
    ranks = small.config.factor_ranks
    uniform = uniform_ranks(inputs.model, count_parameters(small))

    def predicted(layer: int, name: str, rank: int | None) -> float:
        weight = whole_weights(inputs.model.vit.blocks[layer])[name].double()
        own = inputs.linear_statistics[layer][name]
        gradient = own.gradient + 1e-3 * own.gradient.diagonal().mean() * torch.eye(len(weight), dtype=torch.float64)
        roots = [root_of(metric) for metric in (gradient, own.inputs.covariance())]
        singular = torch.linalg.svdvals(roots[0].mT @ weight @ roots[1])
        tokens = own.inputs.count / images
        lost = 0.0 if rank is None else float(singular[rank:].square().sum())
        return 0.5 * tokens * lost / (images * tokens) ** 2

    def total(plan) -> float:
        names = inputs.linear_statistics[0]
        return sum(predicted(layer, name, own.get(name)) for layer, own in enumerate(plan) for name in names)

    assert len({rank for own in ranks for rank in own.values()}) > 3
    assert total(ranks) < total(uniform)


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded(models, tmp_path: Path, name):
    values = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    save_checkpoint(models[name], load_image_processor(str(tmp_path)), tmp_path / "out", record={}, card="")
    again, _, _ = load_checkpoint(tmp_path / "out")
    assert again.config.factor_ranks == models[name].config.factor_ranks


# --------------------------------------------------------------------------------------------------------- the paper's


def test_paper_has_a_second_tensor_of_five_percent_and_fits_better_with_it(inputs, models, limit):
    candidates = all_candidates(inputs, _second_moment)
    first, second = paper_ranks(inputs.model, candidates, limit)
    small = models["paper"]
    stream = torch.cat(inputs.embeddings)
    for layer, (block, compressed) in enumerate(zip(inputs.model.vit.blocks, small.vit.blocks, strict=True)):
        trace = traced_linears(block, stream)
        for name, rank in first[layer].items():
            weight = whole_weights(block)[name].double()
            q = second[layer][name]
            assert q == max(1, int(0.05 * weight.numel() / sum(weight.shape)))
            assert small.config.factor_ranks[layer][name] == rank + q
            if layer == 0 and name == "query_key_value":  # what it reads is the dense stream
                x = trace.inputs[name].flatten(0, 1).double()
                B, A = candidates[layer][name].factors(rank)
                alone = (x @ (weight - B @ A).mT).square().sum()
                both = (x @ (weight - product(small, layer, name)).mT).square().sum()
                assert both < alone
                stored = linear_of(compressed, name).expand.weight[48:, :rank].double()
                assert torch.allclose(stored, B[48:], atol=1e-5)
        stream = trace.after


@pytest.mark.parametrize("seed", [0, 1])
def test_second_tensor_comes_near_the_best_of_its_rank(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 10, generator=generator, dtype=torch.float64) @ torch.diag(torch.linspace(0.2, 2, 10)).double()
    e = x @ torch.randn(10, 8, generator=generator, dtype=torch.float64) * 0.01
    G, Y = second_tensor(e.mT @ x, x.mT @ x, 2, generator)
    assert (G.shape, Y.shape) == ((8, 2), (2, 10))
    best = torch.linalg.svdvals(e)[2:].square().sum()
    reached, start = (e - x @ (G @ Y).mT).square().sum(), e.square().sum()
    assert best * 0.999 <= reached < best + 0.1 * (start - best)


def test_second_tensor_of_nothing_left_is_zero():
    G, Y = second_tensor(torch.zeros(3, 4).double(), torch.eye(4).double(), 1, torch.Generator().manual_seed(0))
    assert torch.equal(G @ Y, torch.zeros(3, 4).double())


def test_energy_greedy_by_hand(monkeypatch):
    # Two steps. Shares lost: the first piece 0.1, 0.4, 1 (of 10), the second 0.3, 1 (of 2), at 1 and 2 per size. From 8
    # to 5: half of it is 1.5, so step 1 takes two of the first piece (0.4 - 0.0 over 2) or one of the second (0.3 over
    # 2): the second. Then one more: the first (0.1) against nothing left to take of the second.
    curves = [
        ErrorCurve(torch.tensor([10.0, 6.0, 4.0, 1.0, 0.0]).numpy(), 1),
        ErrorCurve(torch.tensor([2.0, 0.6, 0.0]).numpy(), 2),
    ]
    monkeypatch.setattr("hf_vit_lowrank.allocation.GREEDY_STEPS", 2)
    monkeypatch.setattr("hf_vit_lowrank.allocation.GREEDY_DECAY", 1 / 0.6931471805599453)
    assert energy_greedy(curves, 5) == [3, 1]
    assert energy_greedy(curves, 8) == [4, 2]
    assert energy_greedy(curves, 3) == [1, 1]
    with pytest.raises(ImpossibleBudgetError):
        energy_greedy(curves, 2)


@given(
    pieces=st.lists(
        st.tuples(st.lists(st.floats(0, 1), min_size=2, max_size=12), st.integers(1, 9)), min_size=1, max_size=5
    ),
    share=st.floats(0, 1),
)
@settings(max_examples=40, deadline=None)
def test_energy_greedy_stays_within_the_budget_and_uses_it(pieces, share):
    curves = [ErrorCurve(torch.tensor([*steps, 0.0]).flip(0).cumsum(0).flip(0).numpy(), cost) for steps, cost in pieces]
    smallest = sum(curve.unit_cost for curve in curves)
    largest = sum(curve.largest * curve.unit_cost for curve in curves)
    budget = smallest + int(share * (largest - smallest))
    sizes = energy_greedy(curves, budget)
    cost = sum(size * curve.unit_cost for size, curve in zip(sizes, curves, strict=True))
    assert cost <= budget
    assert cost > budget - max(curve.unit_cost for curve in curves)
    assert all(1 <= size <= curve.largest for size, curve in zip(sizes, curves, strict=True))
