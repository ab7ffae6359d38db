"""The search of FLAR-SVD, against a scan of all ranks with errors and factors computed from the images."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import random_model
from test_presets_factored import SIZES, random_inputs, root_of

from hf_vit_lowrank.candidates.factored import FactoredCandidate
from hf_vit_lowrank.evaluation import count_parameters
from hf_vit_lowrank.linear_statistics import traced_linears, whole_weights
from hf_vit_lowrank.presets.flar_svd import _FeatureError, _smallest_rank, flar_svd
from hf_vit_lowrank.presets.inputs import PresetInputs

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture(scope="module")
def inputs() -> PresetInputs:
    return random_inputs(0.15)


@pytest.fixture(scope="module")
def weights(inputs) -> dict[tuple[int, str], torch.Tensor]:
    """Every weight of the dense model by layer and name."""
    blocks = inputs.model.vit.blocks
    return {(layer, name): w.double() for layer, block in enumerate(blocks) for name, w in whole_weights(block).items()}


@pytest.fixture(scope="module")
def roots(inputs) -> dict[tuple[int, str], torch.Tensor]:
    """R with R Rᵀ = Σ x xᵀ over all tokens of the dense model, for every weight."""
    stream, found = torch.cat(inputs.embeddings), {}
    for layer, block in enumerate(inputs.model.vit.blocks):
        trace = traced_linears(block, stream)
        for name, read in trace.inputs.items():
            x = read.flatten(0, 1).double()
            found[layer, name] = root_of(x.mT @ x)
        stream = trace.after
    return found


def truncated(weight: torch.Tensor, root: torch.Tensor, rank: int) -> torch.Tensor:
    """What of that rank is nearest to a weight on these inputs."""
    left, singular, right = torch.linalg.svd(weight @ root, full_matrices=False)
    return (left[:, :rank] * singular[:rank]) @ right[:rank] @ torch.linalg.pinv(root)


def feature_error(model, stream: torch.Tensor, replaced: dict[tuple[int, str], torch.Tensor], read: int = 1) -> float:
    """Mean squared change of the first normed tokens over their mean square, with these weights for the dense ones."""
    changed = copy.deepcopy(model)
    for (layer, name), weight in replaced.items():
        block = changed.vit.blocks[layer]
        if name == "query_key_value":
            block.attention.query.weight.copy_(weight[:48] / 4)  # 1/√16 of the scores
            block.attention.key_value.weight.copy_(weight[48:])
        else:
            getattr(block.mlp if name in ("up", "down") else block.attention, name).weight.copy_(weight)
    features = []
    for each in (model, changed):
        after = stream
        for block in each.vit.blocks:
            after, _ = block(after)
        features.append(each.vit.norm(after)[:, :read].double())
    return float((features[1] - features[0]).square().mean() / features[1].square().mean())


def largest_that_fit(inputs: PresetInputs, weights, shares, limit: int) -> dict[tuple[int, str], int]:
    """The ranks ⌊scale · share⌋, at least 1, of the largest scale within the limit, by trying every scale at which a
    rank changes; a weight whose pair would not be smaller is whole and has none."""
    scales = sorted({k / share for share in shares.values() for k in range(1, 50)}, reverse=True)
    for scale in scales:
        ranks = {}
        for key, weight in weights.items():
            rank = max(1, math.floor(scale * shares[key] + 1e-9))
            if rank * sum(weight.shape) < weight.numel():
                ranks[key] = rank
        saved = sum(weights[key].numel() - rank * sum(weights[key].shape) for key, rank in ranks.items())
        biases = sum(96 for _, name in ranks if name == "query_key_value")  # a pair has them for keys and values too
        if count_parameters(inputs.model) - saved + biases <= limit:
            return ranks
    raise AssertionError("no scale fits")


@pytest.mark.parametrize("distilled", [False, True])
def test_error_of_a_weight_is_that_of_the_tokens_that_the_classifier_reads(distilled):
    model = random_model(0.15, **SIZES, use_distillation_token=distilled, use_distillation_head=distilled)
    stream = model.vit.embeddings(torch.randn(7, 3, 16, 16, generator=torch.Generator().manual_seed(1)))
    search = _FeatureError(model, stream)
    for layer, block in enumerate(model.vit.blocks):
        for name, weight in whole_weights(block).items():
            expected = feature_error(model, stream, {(layer, name): 0.8 * weight}, read=2 if distilled else 1)
            assert search.of_weight(layer, name, 0.8 * weight) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("shape", [(15, 15), (34, 34), (90, 600), (600, 90)])  # the largest: none, 16 itself, below 80
def test_smallest_rank_is_that_of_a_scan(shape):
    # The product of a rank is a diagonal of so many ones, its error falls by one with each.
    candidate = FactoredCandidate(torch.empty(0), torch.eye(shape[0], min(shape)), torch.eye(min(shape), shape[1]))
    search = SimpleNamespace(of_weight=lambda layer, name, weight: 100 - float(weight.trace()))
    tried = [rank for rank in range(8, 100, 8) if rank * sum(shape) < math.prod(shape)]
    for threshold in range(100):
        expected = next((rank for rank in tried if 100 - rank <= threshold), None)
        assert _smallest_rank(search, 0, "up", candidate, threshold) == expected


@pytest.mark.parametrize("share", [0.7, 0.5])  # at 0.7 no rank is good enough for one of the weights
def test_ranks_are_those_of_the_smallest_good_enough_scaled_to_the_limit(inputs, weights, roots, share):
    limit, stream = int(share * count_parameters(inputs.model)), torch.cat(inputs.embeddings)[:32]
    even = {key: weight.numel() / sum(weight.shape) for key, weight in weights.items()}
    uniform = largest_that_fit(inputs, weights, even, limit)
    replaced = {key: truncated(weights[key], roots[key], rank) for key, rank in uniform.items()}
    threshold = feature_error(inputs.model, stream, replaced) / 8
    shares = {}
    for key, weight in weights.items():
        tried = [rank for rank in range(8, 100, 8) if rank < even[key]]
        errors = [feature_error(inputs.model, stream, {key: truncated(weight, roots[key], rank)}) for rank in tried]
        good_enough = [rank for rank, error in zip(tried, errors, strict=True) if error <= threshold]
        shares[key] = min(good_enough, default=even[key])
    expected = largest_that_fit(inputs, weights, shares, limit)
    found = flar_svd(inputs, limit).config.factor_ranks
    assert {(layer, name): rank for layer, own in enumerate(found) for name, rank in own.items()} == expected
    assert expected != uniform
