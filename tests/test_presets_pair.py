"""The presets that shrink inner dimensions: every criterion against brute force, and the limit they are given."""

from __future__ import annotations

from itertools import combinations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_model, statistics_of_all_patches

from hf_vit_lowrank.errors import UserError
from hf_vit_lowrank.evaluation import count_parameters
from hf_vit_lowrank.plan_costs import plan_cost
from hf_vit_lowrank.presets.corp import ACTIVE_SHARE, RIDGE, corp, folded_down, query_key_maps
from hf_vit_lowrank.presets.modegpt import ENTROPY_WEIGHT, layer_shares, leverage_scores, modegpt, nystrom, value_output
from hf_vit_lowrank.presets.pair_form import best, dense_traces, largest_config, sparse_config
from hf_vit_lowrank.presets.pruning import gated_block, magnitude, magnitude_scores, taylor, taylor_scores
from hf_vit_lowrank.statistics import Moments

PRESETS = [corp, modegpt, magnitude, taylor]


@pytest.fixture(scope="module")
def inputs() -> Any:
    """Stands in for PresetInputs: a random model of two layers and 24 images in two batches."""
    model = random_model(0.3, hidden_size=12, num_attention_heads=2, intermediate_size=20, image_size=8, num_labels=5)
    pixels = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    embeddings = list(model.vit.embeddings(pixels).split(16))
    return SimpleNamespace(
        model=model,
        embeddings=embeddings,
        statistics=statistics_of_all_patches(model, embeddings),
        seed=0,
        images_at_once=16,
        pixels=pixels,
    )


@pytest.fixture(scope="module")
def traces(inputs):
    """All images of each block in one tensor per field, in float64."""
    per_layer: list[list[Any]] = [[] for _ in inputs.model.vit.blocks]
    for layer, trace in dense_traces(inputs.model, inputs.embeddings):
        per_layer[layer].append(vars(trace))
    return [
        SimpleNamespace(**{name: torch.cat([part[name] for part in parts]).double() for name in parts[0]})
        for parts in per_layer
    ]


def flat(values: torch.Tensor) -> np.ndarray:
    """(images, tokens, n) to (images · tokens, n)."""
    return values.flatten(0, 1).numpy()


def moments(values: np.ndarray) -> Moments:
    tokens = torch.from_numpy(values).double()
    return Moments(len(tokens), tokens.sum(0), tokens.mT @ tokens)


# Sizes and the limit


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("share", [0.95, 0.8, 0.65])
def test_limit_is_kept_and_nearly_used(inputs, preset, share):
    limit = int(share * count_parameters(inputs.model))
    small = preset(inputs, limit)
    assert not small.training
    # The coarsest step takes a dimension of every head and some units of every layer.
    assert limit - 250 <= count_parameters(small) <= limit
    assert torch.isfinite(small(inputs.pixels).logits).all()
    for name, tensor in small.state_dict().items():
        if "blocks" not in name or "norm" in name:
            assert torch.equal(tensor, inputs.model.state_dict()[name])


@pytest.mark.parametrize("preset", PRESETS)
def test_whole_model_at_the_limit_is_the_dense_one(inputs, preset):
    whole = preset(inputs, count_parameters(inputs.model))
    assert torch.allclose(whole(inputs.pixels).logits, inputs.model(inputs.pixels).logits, atol=1e-6)


@pytest.mark.parametrize("preset", PRESETS)
def test_unreachable_limit_says_what_is_reachable(inputs, preset):
    with pytest.raises(UserError, match=r"cannot be reached.* still has ([\d,]+)") as caught:
        preset(inputs, 100)
    reachable = int(str(caught.value).split("still has ")[1].split(";")[0].replace(",", ""))
    assert count_parameters(preset(inputs, reachable)) == reachable


def test_no_larger_uniform_sizes_fit(inputs):
    config, limit = inputs.model.config, int(0.75 * count_parameters(inputs.model))
    sizes = [sparse_config(config, [share, share]) for share in np.arange(0, 1.0001, 1e-3)]
    by_hand = next(size for size in sizes if plan_cost(size, "parameters") <= limit)
    chosen = largest_config(limit, lambda share: sparse_config(config, [share, share]))
    assert chosen.mlp_widths == by_hand.mlp_widths
    assert chosen.query_key_ranks == by_hand.query_key_ranks


# CORP


def test_corp_down_weight_is_the_ridge_regression(traces, inputs):
    hidden, down = flat(traces[0].hidden), inputs.model.vit.blocks[0].mlp.down
    kept = torch.tensor([0, 3, 4, 9, 17])
    removed = [unit for unit in range(20) if unit not in kept]
    weight, bias = folded_down(down, moments(hidden), kept)
    seen, lost = hidden[:, kept], hidden[:, removed]
    inner = np.cov(seen.T, bias=True)
    # Shrinkage by hand (Chen et al. 2010, eq. 23), as rows below the centred data.
    trace, square, count = np.trace(inner), np.trace(inner @ inner), len(hidden)
    share = ((1 - 2 / 5) * square + trace**2) / ((count + 1 - 2 / 5) * (square - trace**2 / 5))
    ridge = max(RIDGE, min(1.0, share) * trace / 5)
    rows = np.vstack((seen - seen.mean(0), np.sqrt(count * ridge) * np.eye(5)))
    solution = np.linalg.lstsq(rows, np.vstack((lost - lost.mean(0), np.zeros((5, 15)))), rcond=None)[0]
    predicted = (seen - seen.mean(0)) @ solution + lost.mean(0)
    full = down.weight.double().numpy()
    expected = seen @ full[:, kept].T + predicted @ full[:, removed].T + down.bias.double().numpy()
    assert np.allclose(seen @ weight.numpy().T + bias.numpy(), expected, atol=1e-6)


def test_corp_scores_are_the_least_squares_over_all_pairs_of_tokens(traces):
    query, key = flat(traces[0].query[:, 0]), flat(traces[0].key[:, 0])
    kept = torch.tensor([1, 2, 4])
    ridge = 0.7
    query_map, key_map = query_key_maps(torch.from_numpy(query.T @ query), torch.from_numpy(key.T @ key), kept, ridge)
    removed = [0, 3, 5]
    target = (query[:, removed] @ key[:, removed].T).ravel()
    features = np.kron(query[:, kept], key[:, kept])
    rows = np.vstack((features, np.sqrt(ridge) * np.eye(9)))
    correction = np.linalg.lstsq(rows, np.concatenate((target, np.zeros(9))), rcond=None)[0].reshape(3, 3)
    expected = query[:, kept] @ (np.eye(3) + correction) @ key[:, kept].T
    assert np.allclose((query @ query_map.numpy().T) @ (key @ key_map.numpy().T).T, expected, atol=1e-8)
    # Both weights carry the same share of the correction.
    assert query_map.norm() == pytest.approx(float(key_map.norm()))


def test_corp_keeps_the_dimensions_with_the_most_energy(inputs, traces):
    small = corp(inputs, int(0.8 * count_parameters(inputs.model)))
    for block, source, trace in zip(small.vit.blocks, inputs.model.vit.blocks, traces, strict=True):
        hidden = trace.hidden.flatten(0, 1)
        active = (hidden.abs() > ACTIVE_SHARE * hidden.square().mean().sqrt()).double().mean(0)
        width = block.mlp.up.out_features
        units = best(hidden.square().mean(0) * active, width)
        assert 1 < width < 20
        assert torch.equal(block.mlp.up.weight, source.mlp.up.weight[units])
        joint = (trace.query.square() * trace.key.square()).mean((0, 2))
        rank = block.attention.query_key_ranks[0]
        spans = [source.attention.query.weight.view(2, 6, 12)[head, best(joint[head], rank)] for head in range(2)]
        for own, span in zip(block.attention.query.weight.view(2, rank, 12), spans, strict=True):
            assert torch.linalg.matrix_rank(torch.cat((own, span)), rtol=1e-4) == rank
        assert block.attention.value_output_ranks == source.attention.value_output_ranks


# MoDeGPT


def test_nystrom_is_the_regression_without_a_bias(traces, inputs):
    hidden, down = flat(traces[1].hidden), inputs.model.vit.blocks[1].mlp.down.weight
    kept = torch.tensor([2, 3, 11, 19])
    weight = nystrom(down, moments(hidden).second, kept)
    target = hidden @ down.double().numpy().T
    assert np.allclose(weight.numpy().T, np.linalg.lstsq(hidden[:, kept], target, rcond=None)[0], atol=1e-6)


def test_leverage_scores_by_the_formula(traces):
    moment = moments(flat(traces[0].hidden)).second
    expected = (moment @ torch.linalg.inv(moment + torch.eye(20, dtype=torch.float64))).diagonal()
    assert torch.allclose(leverage_scores(moment), expected, atol=1e-9)


def test_cr_selection_is_the_best_of_all_subsets(inputs, traces):
    # The criterion of a subset is the sum of its dimensions' ‖C_Q^½ e_i‖ ‖C_K^½ e_i‖.
    small = modegpt(inputs, int(0.75 * count_parameters(inputs.model)))
    checked = 0
    for block, source, trace in zip(small.vit.blocks, inputs.model.vit.blocks, traces, strict=True):
        rank = block.attention.query_key_ranks[0]
        for head in range(2):
            query, key = trace.query[:, head].flatten(0, 1), trace.key[:, head].flatten(0, 1)
            scores = query.norm(dim=0) * key.norm(dim=0)
            subset = max(combinations(range(6), rank), key=lambda chosen: float(scores[list(chosen)].sum()))
            rows = source.attention.query.weight.view(2, 6, 12)[head, list(subset)]
            assert torch.allclose(block.attention.query.weight.view(2, rank, 12)[head], rows)
            checked += rank < 6
    assert checked


def test_value_output_is_the_truncated_svd_in_the_metric_of_the_input(traces, inputs):
    block = inputs.model.vit.blocks[0]
    normed = block.attention_norm(traces[0].before.float()).double().flatten(0, 1).numpy()
    value_weight = block.attention.key_value.weight.double().numpy()[12:18]
    output = block.attention.output.weight.double()[:, :6]
    values = normed @ value_weight.T
    for rank in range(1, 7):
        value_map, narrow = value_output(output, torch.from_numpy(values.T @ values), rank)
        error = np.linalg.norm(values @ output.numpy().T - values @ value_map.numpy().T @ narrow.numpy().T)
        singular = np.linalg.svd(normed @ value_weight.T @ output.numpy().T, compute_uv=False)
        assert error == pytest.approx(np.sqrt((singular[rank:] ** 2).sum()), abs=1e-4)


def test_layer_shares_maximise_importance_and_entropy():
    importance = torch.tensor([0.7, 0.2, 0.1, 0.4], dtype=torch.float64)
    shares = np.array(layer_shares(importance, 0.35))
    assert shares.max() == 1.0
    assert (np.array(layer_shares(importance, 1.0)) == 1.0).all()

    def objective(phi: np.ndarray) -> float:
        return float((importance.numpy() * (1 - phi)).sum() - ENTROPY_WEIGHT * (phi * np.log(phi)).sum())

    generator = np.random.default_rng(0)
    for _ in range(200):
        step = generator.normal(0, 0.02, 4)
        other = shares + step - step.mean()
        if other.min() > 0 and other.max() <= 1:
            assert objective(other) <= objective(shares) + 1e-12


def test_modegpt_measures_importance_by_the_cosine(inputs, traces):
    importance = [float((1 - torch.nn.functional.cosine_similarity(t.before, t.after, dim=-1)).mean()) for t in traces]
    config = modegpt(inputs, int(0.8 * count_parameters(inputs.model))).config
    expected = largest_config(
        int(0.8 * count_parameters(inputs.model)),
        lambda t: sparse_config(inputs.model.config, layer_shares(torch.tensor(importance), t)),
    )
    assert importance[0] != pytest.approx(importance[1], rel=0.05)
    assert config.mlp_widths == expected.mlp_widths


# Magnitude and Taylor


def test_magnitude_is_the_norm_of_the_weights_that_fall_together(inputs):
    block = inputs.model.vit.blocks[1]
    scores = magnitude_scores(block)
    attention, mlp = block.attention, block.mlp
    query, (key, value) = attention.query.weight * 6**0.5, attention.key_value.weight.split(12)
    for index in range(12):
        head, dimension = divmod(index, 6)
        pairs = (
            (scores.query_key, query[index], key[index]),
            (scores.value_output, value[index], attention.output.weight[:, index]),
        )
        for score, one, other in pairs:
            assert float(score[head, dimension]) == pytest.approx(
                float(torch.cat((one, other)).square().sum()), rel=1e-5
            )
    unit = torch.cat((mlp.up.weight[7], mlp.down.weight[:, 7]))
    assert float(scores.width[7]) == pytest.approx(float(unit.square().sum()), rel=1e-5)


def open_gates(scores: torch.Tensor, size: int) -> torch.Tensor:
    """One for the `size` highest scores, else zero."""
    return (scores >= scores.topk(size).values[-1]).float()


@pytest.mark.parametrize("preset", [magnitude, taylor])
def test_pruned_model_is_the_dense_one_with_closed_gates(inputs, preset):
    scores = taylor_scores(inputs) if preset is taylor else [magnitude_scores(b) for b in inputs.model.vit.blocks]
    small = preset(inputs, int(0.7 * count_parameters(inputs.model)))
    dense_stream = small_stream = inputs.embeddings[0]
    for block, source, score in zip(small.vit.blocks, inputs.model.vit.blocks, scores, strict=True):
        attention = block.attention
        gates = [
            torch.stack([open_gates(*head) for head in zip(score.query_key, attention.query_key_ranks, strict=True)]),
            torch.stack(
                [open_gates(*head) for head in zip(score.value_output, attention.value_output_ranks, strict=True)]
            ),
            open_gates(score.width, block.mlp.up.out_features),
        ]
        gates = [gate.expand(len(dense_stream), *gate.shape) for gate in gates]
        dense_stream = gated_block(source, dense_stream, *gates)
        small_stream = block(small_stream)[0]
    assert torch.allclose(dense_stream, small_stream, atol=1e-5)


def test_taylor_ranks_all_dimensions_together(inputs):
    scores = taylor_scores(inputs)
    config = taylor(inputs, int(0.7 * count_parameters(inputs.model))).config
    kept, removed = [], []
    for layer, block in enumerate(scores):
        pieces = [*block.query_key, *block.value_output, block.width]
        sizes = [*config.query_key_ranks[layer], *config.value_output_ranks[layer], config.mlp_widths[layer]]
        for values, size in zip(pieces, sizes, strict=True):
            ranked = values.sort(descending=True).values
            kept += ranked[: size if size > 1 else 0].tolist()  # the last one of a piece stays whatever its score
            removed += ranked[size:].tolist()
    assert max(removed) < min(kept)
    assert len(set(config.mlp_widths)) == 2


def test_taylor_score_is_the_squared_derivative_of_each_image_loss(inputs):
    scores = taylor_scores(inputs)
    generator = torch.Generator().manual_seed(inputs.seed)
    blocks, expected = inputs.model.vit.blocks, torch.zeros(3, dtype=torch.float64)
    model = inputs.model.to(torch.float64)
    try:
        for batch in inputs.embeddings:
            logits = torch.stack([classified(model, image) for image in batch.double()])
            drawn = torch.multinomial(logits.float().softmax(-1), 1, generator=generator).squeeze(1)
            for image, label in zip(batch.double(), drawn, strict=True):
                expected += torch.tensor([derivative(model, image, label, what) ** 2 for what in range(3)])
    finally:
        model.to(torch.float32)
    found = [scores[0].query_key[1, 2], scores[0].value_output[0, 4], scores[0].width[5]]
    assert len(blocks) == 2
    assert torch.stack(found).tolist() == pytest.approx(expected.tolist(), rel=1e-3)


def classified(model, image, gates=None):
    """Logits of one image (tokens, d), the first block with gates."""
    ones = [torch.ones(1, 2, 6), torch.ones(1, 2, 6), torch.ones(1, 20)]
    stream = image.unsqueeze(0)
    for layer, block in enumerate(model.vit.blocks):
        chosen = gates if gates is not None and layer == 0 else [one.double() for one in ones]
        stream = gated_block(block, stream, *chosen)
    return model.classify(model.vit.norm(stream))[0][0]


def derivative(model, image, label, what: int) -> float:
    """Central difference of one image's loss in one gate of the first block."""
    losses = []
    for step in (1e-4, -1e-4):
        gates = [torch.ones(1, *shape, dtype=torch.float64) for shape in ((2, 6), (2, 6), (20,))]
        gates[what][((0, 1, 2), (0, 0, 4), (0, 5))[what]] += step
        losses.append(float(-classified(model, image, gates).log_softmax(-1)[label]))
    return (losses[0] - losses[1]) / 2e-4
