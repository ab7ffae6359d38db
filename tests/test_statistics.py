"""The moments against sums over tokens taken one by one, the gradients against the loss itself."""

from __future__ import annotations

import pytest
import torch
from conftest import random_model

from hf_vit_lowrank.errors import RunError
from hf_vit_lowrank.statistics import (
    SMALLEST_TOKEN_WEIGHT,
    Moments,
    TokenGroups,
    collect_statistics,
    token_weight,
)


@pytest.fixture(scope="module")
def model():
    return random_model(0.4, hidden_size=12, num_attention_heads=3, intermediate_size=10, image_size=8, num_labels=4)


@pytest.fixture(scope="module")
def embeddings(model):
    return model.vit.embeddings(torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1)))


def test_moments_weighted_and_centred_by_hand():
    groups = TokenGroups.zeros(2)
    tokens = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], [[0.0, 1.0], [1.0, 0.0], [2.0, 2.0]]])
    groups.add(tokens, num_read=1)
    weighted = groups.weighted(0.5)
    weights = torch.tensor([1.0, 0.5, 0.5, 1.0, 0.5, 0.5], dtype=torch.float64)
    flat = tokens.flatten(0, 1).double()
    mean = (weights[:, None] * flat).sum(0) / weights.sum()
    centred = flat - mean
    assert weighted.count == 4.0
    assert torch.allclose(weighted.covariance(), (centred.mT * weights) @ centred)


def test_block_moments_equal_token_by_token_sums(model, embeddings):
    statistics = collect_statistics(model, embeddings.split(4))[0]
    block = model.vit.blocks[0]
    normed = block.attention_norm(embeddings)
    keys = block.attention.key_value(normed)[..., :12]
    queries = block.attention.query(normed)
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        read = sum(torch.outer(q, q) for q in queries[:, 0, part].double())
        assert torch.allclose(statistics.query.read.second[head], read, rtol=1e-4, atol=1e-5)
        centred = keys[..., part] - keys[..., part].mean(1, keepdim=True)
        expected = sum(torch.outer(k, k) for k in centred.reshape(-1, 4).double())
        assert torch.allclose(statistics.key.second[head], expected, rtol=1e-4, atol=1e-5)
    contexts = block.attention.context(normed)[0][:, 1:].reshape(-1, 12).double()
    assert torch.allclose(statistics.context.other.second, contexts.mT @ contexts, rtol=1e-4, atol=1e-5)
    assert statistics.images == 6
    assert statistics.query.count == 6 * 5


def test_moments_of_an_mlp_are_of_one_patch_in_three_that_counts_for_all(model, embeddings):
    """A class token, then patches 0 to 3, of which 0 and 3 are summed."""
    statistics, block = collect_statistics(model, embeddings.split(4))[0], model.vit.blocks[0]
    after = embeddings + block.attention(block.attention_norm(embeddings))[0]
    inputs = block.mlp_norm(after)
    before = block.mlp.up(inputs)
    both = torch.cat((block.mlp.activation(before), inputs), -1).double()
    slopes = torch.func.vmap(torch.func.grad(block.mlp.activation))(before.flatten()).view_as(before).double()
    for groups, values in ((statistics.mlp, both), (statistics.slope, slopes)):
        patches = values[:, [1, 4]].flatten(0, 1)
        assert (groups.read.count, groups.other.count) == (6, 3 * 12)
        assert torch.allclose(groups.other.first.flatten(), 3 * patches.sum(0), rtol=1e-4, atol=1e-4)
    patches, read = both[:, [1, 4]].flatten(0, 1), both[:, 0]
    assert torch.allclose(statistics.mlp.other.second, 3 * patches.mT @ patches, rtol=1e-4, atol=1e-4)
    assert torch.allclose(statistics.mlp.read.second, read.mT @ read, rtol=1e-4, atol=1e-4)
    squares = 3 * slopes[:, [1, 4]].square().sum((0, 1))
    assert torch.allclose(statistics.slope.other.second.flatten(), squares, rtol=1e-4, atol=1e-4)


def test_the_parts_of_a_batch_change_nothing_not_even_the_labels_drawn(model, embeddings):
    whole = collect_statistics(model, embeddings.split(4), seed=3)
    parts = collect_statistics(model, embeddings.split(4), seed=3, images_at_once=3)
    for one, other in zip(whole, parts, strict=True):
        assert one.images == other.images
        assert torch.allclose(one.score_gradient, other.score_gradient, rtol=1e-4)
        assert torch.allclose(one.mlp_gradient.read.second, other.mlp_gradient.read.second, rtol=1e-4, atol=1e-7)


def test_gradients_are_those_of_the_loss_against_the_drawn_label(model, embeddings):
    statistics = collect_statistics(model, [embeddings], seed=3)
    # The same draw, and the gradient at the last block's output by autograd on the plain model.
    with torch.no_grad():
        stream = embeddings
        for block in model.vit.blocks:
            stream, _ = block(stream)
    stream = stream.requires_grad_(True)
    logits = model.classify(model.vit.norm(stream))[0]
    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=torch.Generator().manual_seed(3)).squeeze(1)
    torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
    gradient = stream.grad[:, 0].double()
    assert torch.allclose(statistics[-1].mlp_gradient.read.second, gradient.mT @ gradient, rtol=1e-4, atol=1e-7)
    assert statistics[-1].mlp_gradient.other.second.abs().max() == 0
    assert token_weight(statistics[-1].mlp_gradient) == 0.0
    assert SMALLEST_TOKEN_WEIGHT <= token_weight(statistics[0].mlp_gradient) <= 1.0


def test_batch_size_does_not_matter(model, embeddings):
    whole, parts = collect_statistics(model, [embeddings])[0], collect_statistics(model, embeddings.split(1))[0]
    for one, other in ((whole.key.second, parts.key.second), (whole.hidden.read.second, parts.hidden.read.second)):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def test_nothing_is_left_on_the_model(model, embeddings):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    collect_statistics(model, [embeddings])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


def test_overflow_names_the_block(model, embeddings):
    with pytest.raises(RunError, match="block 0"):
        collect_statistics(model, [embeddings * torch.inf])


def test_sums_stay_in_float64():
    moments = Moments.zeros(1)
    for _ in range(4096):
        moments.add(torch.full((1, 1), 1.0 + 2**-20))
    assert moments.first.item() == 4096 + 2**-8  # a float32 sum would have lost the second part
    assert moments.second.dtype == torch.float64


def test_bfloat16_gives_nearly_the_same_moments_in_float64(model, embeddings):
    exact = collect_statistics(model, [embeddings])[0]
    half = collect_statistics(model, [embeddings], precision=torch.bfloat16)[0]
    for one, other in ((exact.key.second, half.key.second), (exact.hidden.other.second, half.hidden.other.second)):
        assert other.dtype == torch.float64
        assert not torch.equal(one, other)
        assert (one - other).norm() < 0.05 * one.norm()


def test_sums_have_the_same_bits_in_any_order():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([1e4, 1.0, 1e-3, 1e-5, 0.0])  # the last is never seen in the first batch
    batches = [sizes * (1 + torch.randn(50, 5, generator=generator)) for _ in range(60)]
    batches += [torch.eye(5)[4:] * 0.5]
    plain, exact = torch.zeros(5, 5, dtype=torch.float64), torch.zeros(5, 5, dtype=torch.float64)
    sums = []
    for order in (batches, [batches[0], *batches[:0:-1]]):
        moments = Moments.zeros(5)
        for batch in order:
            moments.add(batch)
        sums.append(moments)
    assert torch.equal(sums[0].first, sums[1].first)
    assert torch.equal(sums[0].second, sums[1].second)
    for batch in batches:
        plain += (batch.mT @ batch).double()
        exact += batch.mT.double() @ batch.double()
    scale = exact.diagonal().sqrt()
    scale = torch.outer(scale, scale)
    # Rounding to the grid adds nothing to what float32 products have lost.
    assert ((sums[0].second - exact) / scale).abs().max() < 1.1 * ((plain - exact) / scale).abs().max()


def test_sums_may_be_read_between_batches():
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, 40, 300, generator=generator) for _ in range(3)]
    moments, expected = Moments.zeros(2, 300), torch.zeros(2, 300, 300, dtype=torch.float64)
    for batch in batches:
        moments.add(batch)
        expected += batch.mT.double() @ batch.double()
        assert torch.equal(moments.second, moments.second.mT)
        assert torch.allclose(moments.second, expected, rtol=0, atol=1e-4)


def test_a_model_without_gradients_in_the_first_batch_keeps_its_later_ones():
    moments = Moments.zeros(2)
    moments.add(torch.zeros(3, 2))
    moments.add(torch.tensor([[1e-9, 3.0]]))
    assert torch.allclose(moments.second, torch.tensor([[1e-18, 3e-9], [3e-9, 9.0]]).double(), rtol=1e-6, atol=0)


def test_a_first_image_with_small_values_does_not_undo_that():
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(1, 5, 200, generator=generator) for _ in range(60)]
    images[0][:, 0] *= 1e-5  # the token read
    sums = []
    for order in (images, [images[0], *images[:0:-1]]):
        groups = TokenGroups.zeros(200)
        for image in order:
            groups.add(image, num_read=1)
        sums.append(groups)
    assert torch.equal(sums[0].read.second, sums[1].read.second)
    assert torch.equal(sums[0].other.second, sums[1].other.second)
