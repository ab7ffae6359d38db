"""One weight as BA: against other factors of its rank, and what the statistics behind it are."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import random_model
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vit_lowrank.candidates.factored import bias_change, factored_candidate
from hf_vit_lowrank.errors import RunError
from hf_vit_lowrank.evaluation import count_parameters
from hf_vit_lowrank.linear_statistics import (
    collect_linear_statistics,
    query_scale,
    set_whole_weight,
    traced_linears,
    weight_shapes,
    whole_weights,
)
from hf_vit_lowrank.presets.factored import uniform_ranks


def random_metric(generator: torch.Generator, size: int, rank: int) -> torch.Tensor:
    factor = torch.randn(size, rank, generator=generator, dtype=torch.float64)
    return factor @ factor.mT


def error(weight, factors, output_metric, input_metric) -> float:
    """‖L (W - BA) R‖² written as the trace it stands for."""
    change = weight - factors[0] @ factors[1]
    return float(torch.trace(change.mT @ output_metric @ change @ input_metric))


@given(seed=st.integers(0, 10_000), rank=st.integers(0, 5), left=st.integers(1, 5), right=st.integers(1, 7))
@settings(max_examples=25, deadline=None)
def test_error_is_reached_and_not_undercut_in_metrics_of_any_rank(seed, rank, left, right):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    metrics = random_metric(generator, 5, left), random_metric(generator, 7, right)
    candidate = factored_candidate(weight, *metrics)
    factors = candidate.factors(rank)
    reached, whole = error(weight, factors, *metrics), float(candidate.errors[0])
    assert candidate.errors.shape == (6,)
    assert error(weight, candidate.factors(0), *metrics) == pytest.approx(whole)
    assert reached == pytest.approx(float(candidate.errors[rank]), rel=1e-6, abs=1e-7 * whole)
    for step in (1e-3, 1e-1, 1.0):
        moved = [f + step * torch.randn(f.shape, generator=generator, dtype=torch.float64) for f in factors]
        assert error(weight, moved, *metrics) >= reached - 1e-7 * whole


def test_alternating_least_squares_finds_nothing_better():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    G, C = random_metric(generator, 6, 9), random_metric(generator, 8, 12)
    reached = error(weight, factored_candidate(weight, G, C).factors(3), G, C)
    B = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    for _ in range(200):  # each half step is an exact minimum, so this is descent from a random start
        A = torch.linalg.solve(B.mT @ G @ B, B.mT @ G @ weight)
        B = weight @ C @ A.mT @ torch.linalg.inv(A @ C @ A.mT)
    assert error(weight, (B, A), G, C) == pytest.approx(reached, rel=1e-6)


def test_by_hand():
    # L W R = diag(2·1·3, 1·2·0.5): the first direction is worth 36, the second 1.
    candidate = factored_candidate(
        torch.diag(torch.tensor([1.0, 2.0])),
        torch.diag(torch.tensor([4.0, 1.0])).double(),
        torch.diag(torch.tensor([9.0, 0.25])).double(),
    )
    assert candidate.errors.tolist() == pytest.approx([37, 1, 0])
    B, A = candidate.factors(1)
    assert torch.allclose(B @ A, torch.diag(torch.tensor([1.0, 0.0])).double())


def test_covariance_with_the_mean_in_the_bias_is_the_least_squares_fit_of_the_outputs():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(300, 5, generator=generator, dtype=torch.float64) + 3.0
    weight, bias = torch.randn(4, 5, generator=generator, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    y, mean = x @ weight.mT + bias, x.mean(0)
    factors = factored_candidate(weight, torch.eye(4), (x - mean).mT @ (x - mean)).factors(2)
    fitted = x @ (factors[0] @ factors[1]).mT + bias + bias_change(weight, factors, mean)
    # The best affine map of rank 2 is the projection on the principal components of y.
    centred = y - y.mean(0)
    lost = torch.linalg.svdvals(centred)[2:].square().sum()
    assert torch.allclose((fitted - y).square().sum(), lost)
    assert torch.allclose(fitted.mean(0), y.mean(0))


@pytest.fixture(scope="module")
def model():
    return random_model(0.4, hidden_size=12, num_attention_heads=3, intermediate_size=10, image_size=8, num_labels=4)


@pytest.fixture(scope="module")
def embeddings(model):
    return model.vit.embeddings(torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1)))


def test_traced_block_is_the_block(model, embeddings):
    for block in model.vit.blocks:
        trace = traced_linears(block, embeddings)
        torch.testing.assert_close(trace.after, block(embeddings)[0])
        for name, weight in whole_weights(block).items():
            without_bias = trace.inputs[name] @ weight.mT
            bias = (trace.outputs[name] - without_bias)[0, 0]
            torch.testing.assert_close(trace.outputs[name], without_bias + bias)


def test_whole_weights_are_as_the_source_has_them_and_go_back(model):
    block = copy.deepcopy(model.vit.blocks[0])
    weights = whole_weights(block)
    assert query_scale(block) == 0.5  # heads of size four
    assert torch.equal(weights["query_key_value"][:12], 2 * block.attention.query.weight)
    assert torch.equal(weights["query_key_value"][12:], block.attention.key_value.weight)
    assert weight_shapes(block) == {name: weight.shape for name, weight in weights.items()}
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    for name, weight in weights.items():
        set_whole_weight(block, name, 3 * weight)
    for name, tensor in block.state_dict().items():
        changed = "norm" not in name and name.endswith("weight")
        torch.testing.assert_close(tensor, (3 if changed else 1) * before[name])


@pytest.mark.parametrize("images_at_once", [4, 3])
def test_statistics_equal_sums_image_by_image(images_at_once, model, embeddings):
    statistics = collect_linear_statistics(model, embeddings.split(4), seed=3, images_at_once=images_at_once)
    generator = torch.Generator().manual_seed(3)
    chunks = [model_logits(model, part) for part in embeddings.split(4)]
    labels = torch.cat([torch.multinomial(part.softmax(-1), 1, generator=generator) for part in chunks]).squeeze(1)
    fisher, moment, absolute = torch.zeros(10), torch.zeros(10, 10), torch.zeros(10)
    down = model.vit.blocks[0].mlp.down
    for image, label in zip(embeddings, labels, strict=True):
        down.weight.requires_grad_(True)
        torch.nn.functional.cross_entropy(model_logits(model, image[None]), label[None]).backward()
        fisher += down.weight.grad.square().sum(0)
        down.weight.grad = None
        down.weight.requires_grad_(False)
        hidden = traced_linears(model.vit.blocks[0], image[None]).inputs["down"][0]
        moment, absolute = moment + hidden.mT @ hidden, absolute + hidden.abs().sum(0)
    found = statistics[0]["down"]
    assert (found.images, found.inputs.count) == (6, 30)
    for ours, expected in ((found.input_fisher, fisher), (found.inputs.second, moment), (found.absolute, absolute)):
        torch.testing.assert_close(ours, expected.double(), rtol=1e-4, atol=1e-7)
    assert {own.inputs.count for own in statistics[0].values()} == {30}


def model_logits(model, embeddings):
    stream = embeddings
    for block in model.vit.blocks:
        stream, _ = block(stream)
    return model.classify(model.vit.norm(stream))[0]


def test_gradient_moments_are_those_of_the_loss_against_the_drawn_label(model, embeddings):
    statistics = collect_linear_statistics(model, [embeddings], seed=3, images_at_once=4)[-1]
    with torch.no_grad():
        stream = model.vit.blocks[0](embeddings)[0]
    down = traced_linears(model.vit.blocks[1], stream.requires_grad_(True))
    logits = model.classify(model.vit.norm(down.after))[0]
    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=torch.Generator().manual_seed(3)).squeeze(1)
    loss = torch.nn.functional.cross_entropy(logits, drawn, reduction="sum")
    names = list(statistics)
    for name, gradient in zip(names, torch.autograd.grad(loss, [down.outputs[name] for name in names]), strict=True):
        flat = gradient.flatten(0, 1).double()
        torch.testing.assert_close(statistics[name].gradient, flat.mT @ flat, rtol=1e-4, atol=1e-7)


def test_ranks_for_the_dense_size_leave_all_weights_whole():
    """Of this shape, (break-even + 1) / share · share is less than break-even + 1 by rounding."""
    model = random_model(0.3, hidden_size=88, intermediate_size=176, num_attention_heads=2, image_size=16)
    for limit in (count_parameters(model), 2 * count_parameters(model)):
        assert not any(uniform_ranks(model, limit))


def test_nothing_is_left_on_the_model(model, embeddings):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    collect_linear_statistics(model, [embeddings], seed=0, images_at_once=4)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


def test_no_image_and_overflow_are_errors(model, embeddings):
    with pytest.raises(RunError, match="No calibration image"):
        collect_linear_statistics(model, [], seed=0, images_at_once=4)
    with pytest.raises(RunError, match="not finite"):
        collect_linear_statistics(model, [embeddings * torch.inf], seed=0, images_at_once=4)
