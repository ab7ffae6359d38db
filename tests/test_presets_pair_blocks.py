"""Every block of CORP's and MoDeGPT's models, recomputed with numpy from the activations of the dense model."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_model, statistics_of_all_patches

from hf_vit_lowrank.evaluation import count_parameters
from hf_vit_lowrank.presets.corp import corp
from hf_vit_lowrank.presets.modegpt import modegpt

HEADS = (slice(0, 6), slice(6, 12))


@pytest.fixture(scope="module")
def inputs() -> Any:
    """Stands in for PresetInputs. Small keys, and queries of other sizes in each head, so that ridges matter; some of
    the hidden units are strong where they are active, but seldom are."""
    model = random_model(0.3, hidden_size=12, num_attention_heads=2, intermediate_size=20, image_size=8, num_labels=5)
    for block in model.vit.blocks:
        block.attention.query.weight[6:] *= 3
        block.attention.key_value.weight[:12] *= 0.05
        block.mlp.up.weight[:5] *= 6
        block.mlp.up.bias[:5] -= 6
    pixels = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    embeddings = list(model.vit.embeddings(pixels).split(16))
    statistics = statistics_of_all_patches(model, embeddings)
    return SimpleNamespace(model=model, embeddings=embeddings, statistics=statistics, seed=0, images_at_once=16)


@pytest.fixture(scope="module")
def seen(inputs) -> list[SimpleNamespace]:
    """Per block the input of the attention, queries, keys, values and hidden units (tokens, n), in float64."""
    model, blocks = copy.deepcopy(inputs.model).double(), []
    stream = torch.cat(inputs.embeddings).double()
    for block in model.vit.blocks:
        normed = block.attention_norm(stream)
        key, value = block.attention.key_value(normed).chunk(2, -1)
        after = stream + block.attention(normed)[0]
        hidden = block.mlp.activation(block.mlp.up(block.mlp_norm(after)))
        read = {"normed": normed, "query": block.attention.query(normed), "key": key, "value": value, "hidden": hidden}
        blocks.append(SimpleNamespace(**{name: values.flatten(0, 1).numpy() for name, values in read.items()}))
        stream = block(stream)[0]
    return blocks


def weights_of(block) -> SimpleNamespace:
    """The weights of a block in float64, those of the queries with their bias as the last column, and e per head."""
    attention, mlp = block.attention, block.mlp
    queries = torch.cat((attention.query.weight, attention.query.bias[:, None]), 1)
    keys, values = attention.key_value.weight.split([sum(attention.query_key_ranks), sum(attention.value_output_ranks)])
    named = {"query": queries, "key": keys, "value": values, "output": attention.output.weight}
    named |= {"up": mlp.up.weight, "down": mlp.down.weight, "bias": mlp.down.bias}
    return SimpleNamespace(
        **{name: tensor.detach().double().numpy() for name, tensor in named.items()},
        scores_size=attention.query_key_ranks[0],
        context_size=attention.value_output_ranks[0],
    )


def highest(scores: np.ndarray, size: int) -> np.ndarray:
    return np.sort(np.argsort(-scores)[:size])


def shrinkage(covariance: np.ndarray, count: int) -> float:
    """Chen et al. 2010, eq. 23, times the mean variance; at least 1e-3."""
    size, trace, square = len(covariance), np.trace(covariance), np.trace(covariance @ covariance)
    share = ((1 - 2 / size) * square + trace**2) / ((count + 1 - 2 / size) * (square - trace**2 / size))
    return max(1e-3, min(1.0, share) * trace / size)


def test_blocks_of_corp(inputs, seen):
    small = corp(inputs, int(0.75 * count_parameters(inputs.model)))
    for block, source, x in zip(small.vit.blocks, inputs.model.vit.blocks, seen, strict=True):
        found, dense = weights_of(block), weights_of(source)
        width, size = len(found.up), found.scores_size
        assert width < 20
        assert size < 6
        # Units by their energy and how often they are active; the others predicted from them by ridge regression.
        rms = np.sqrt((x.hidden**2).mean())
        units = highest((x.hidden**2).mean(0) * (np.abs(x.hidden) > 0.01 * rms).mean(0), width)
        others = np.setdiff1d(np.arange(20), units)
        mean, covariance = x.hidden.mean(0), np.cov(x.hidden.T, bias=True)
        inner = covariance[np.ix_(units, units)]
        ridged = inner + shrinkage(inner, len(x.hidden)) * np.eye(width)
        prediction = np.linalg.solve(ridged, covariance[np.ix_(units, others)]).T
        down = dense.down[:, units] + dense.down[:, others] @ prediction
        assert np.allclose(found.up, dense.up[units])
        assert np.allclose(found.down, down, atol=1e-5)
        bias = dense.bias + dense.down[:, others] @ (mean[others] - prediction @ mean[units])
        assert np.allclose(found.bias, bias, atol=1e-5)
        for head, old in enumerate(HEADS):
            new = slice(head * size, (head + 1) * size)
            query, key = x.query[:, old], x.key[:, old]
            kept = highest((query**2 * key**2).mean(0), size)
            lost = np.setdiff1d(np.arange(6), kept)
            # G_Q M G_K + λ M = C_Q C_K, row by row of M.
            ridge = shrinkage(np.cov(query[:, kept].T, bias=True), len(query))
            system = np.kron(query[:, kept].T @ query[:, kept], key[:, kept].T @ key[:, kept])
            cross = query[:, kept].T @ query[:, lost] @ key[:, lost].T @ key[:, kept]
            correction = np.linalg.solve(system + ridge * np.eye(size**2), cross.ravel()).reshape(size, size)
            scores = dense.query[old][kept].T @ (np.eye(size) + correction) @ dense.key[old][kept]
            assert np.allclose(found.query[new].T @ found.key[new], scores, atol=1e-5)
        assert np.array_equal(found.value, dense.value)
        assert np.array_equal(found.output, dense.output)


def test_blocks_of_modegpt(inputs, seen):
    small = modegpt(inputs, int(0.75 * count_parameters(inputs.model)))
    for block, source, x in zip(small.vit.blocks, inputs.model.vit.blocks, seen, strict=True):
        found, dense = weights_of(block), weights_of(source)
        width, size, rank = len(found.up), found.scores_size, found.context_size
        assert width < 20
        assert max(size, rank) < 6
        moment = x.hidden.T @ x.hidden
        units = highest(np.diag(moment @ np.linalg.inv(moment + np.eye(20))), width)
        down = np.linalg.lstsq(x.hidden[:, units], x.hidden @ dense.down.T, rcond=None)[0].T
        assert np.allclose(found.up, dense.up[units])
        assert np.allclose(found.down, down, atol=1e-4)
        assert np.allclose(found.bias, dense.bias)
        for head, old in enumerate(HEADS):
            kept = highest(np.linalg.norm(x.query[:, old], axis=0) * np.linalg.norm(x.key[:, old], axis=0), size)
            new = slice(head * size, (head + 1) * size)
            scores = dense.query[old][kept].T @ dense.key[old][kept]
            assert np.allclose(found.query[new].T @ found.key[new], scores, atol=1e-7)
            # The best of that rank on what the attention reads: a projection of its outputs.
            both = dense.output[:, old] @ dense.value[old]
            directions = np.linalg.svd(both @ x.normed.T, full_matrices=False)[0][:, :rank]
            new = slice(head * rank, (head + 1) * rank)
            assert np.allclose(found.output[:, new] @ found.value[new], directions @ directions.T @ both, atol=1e-4)
