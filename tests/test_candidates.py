"""The closed forms against brute force."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vit_lowrank.candidates.block import last_width_weight
from hf_vit_lowrank.candidates.elimination import eliminate
from hf_vit_lowrank.candidates.query_key import query_key_candidate, query_key_layer
from hf_vit_lowrank.candidates.value_output import value_output_candidate
from hf_vit_lowrank.linalg import ridge_solve, square_root


def random_moment(generator: torch.Generator, size: int, rank: int | None = None) -> torch.Tensor:
    factor = torch.randn(size, rank or size, generator=generator, dtype=torch.float64)
    return factor @ factor.mT


def score_change(product: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> float:
    """‖Q^½ (I - K) C^½‖² written as the trace it stands for."""
    left_out = torch.eye(len(product), dtype=torch.float64) - product
    return float(torch.trace(left_out.mT @ queries @ left_out @ keys))


@given(seed=st.integers(0, 10_000), rank=st.integers(0, 6))
@settings(max_examples=25, deadline=None)
def test_query_key_error_is_reached_and_not_undercut(seed, rank):
    generator = torch.Generator().manual_seed(seed)
    queries, keys = random_moment(generator, 6), random_moment(generator, 6)
    candidate = query_key_candidate(queries, keys)
    query_map, key_map = candidate.maps(rank)
    reached = score_change(query_map.mT @ key_map, queries, keys)
    assert reached == pytest.approx(float(candidate.errors[rank]), rel=1e-6, abs=1e-6 * float(candidate.errors[0]))
    for step in (1e-3, 1e-1):
        moved = (
            m + step * torch.randn(m.shape, generator=generator, dtype=torch.float64) for m in (query_map, key_map)
        )
        other_query, other_key = moved
        assert score_change(other_query.mT @ other_key, queries, keys) >= reached * (1 - 1e-9)


def test_query_key_by_hand():
    # Diagonal moments: singular values 2·3, 1·1, 0.5·0.5, so rank 1 leaves 1² + 0.25² and keeps the first direction.
    queries = torch.diag(torch.tensor([4.0, 1.0, 0.25], dtype=torch.float64))
    keys = torch.diag(torch.tensor([9.0, 1.0, 0.25], dtype=torch.float64))
    candidate = query_key_candidate(queries, keys)
    assert candidate.errors.tolist() == pytest.approx([36 + 1 + 1 / 16, 1 + 1 / 16, 1 / 16, 0])
    query_map, key_map = candidate.maps(1)
    assert torch.allclose(query_map.mT @ key_map, torch.diag(torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)))


def test_query_key_of_rank_deficient_moments_is_exact_at_their_rank():
    generator = torch.Generator().manual_seed(0)
    queries, keys = random_moment(generator, 8, rank=3), random_moment(generator, 8, rank=5)
    candidate = query_key_candidate(queries, keys)
    query_map, key_map = candidate.maps(3)
    assert score_change(query_map.mT @ key_map, queries, keys) < 1e-9 * float(candidate.errors[0])
    assert torch.isfinite(candidate.query_map).all()
    assert torch.isfinite(candidate.key_map).all()


def test_the_heads_of_a_layer_share_a_size_in_the_best_way():
    generator = torch.Generator().manual_seed(0)
    heads = [query_key_candidate(random_moment(generator, 4), random_moment(generator, 4)) for _ in range(3)]
    scales = [1.0, 10.0, 0.1]
    layer = query_key_layer(heads, scales)
    for size in range(3, 13):
        splits = [ranks for ranks in product(range(1, 5), repeat=3) if sum(ranks) == size]
        errors = {
            ranks: sum(scale * float(head.errors[rank]) for head, scale, rank in zip(heads, scales, ranks, strict=True))
            for ranks in splits
        }
        assert float(layer.errors[size]) == pytest.approx(min(errors.values()), rel=1e-9, abs=1e-12)
        assert errors[tuple(layer.head_ranks(size))] == pytest.approx(float(layer.errors[size]), rel=1e-9, abs=1e-12)


def refit_error(weight, covariance, metric, kept) -> float:
    """E‖Γ^½ (W x - W' x_S)‖² at the best W', solved directly."""
    change = weight.clone()
    if kept:
        inner = covariance[kept][:, kept]
        change[:, kept] -= torch.linalg.solve(inner, covariance[kept] @ weight.mT).mT
    return float(torch.trace(metric @ change @ covariance @ change.mT))


@given(seed=st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_every_elimination_step_equals_the_full_refit_and_is_the_best_step(seed):
    generator = torch.Generator().manual_seed(seed)
    size = 7
    covariance, metric = random_moment(generator, size, 12), random_moment(generator, 3)
    weight = torch.randn(3, size, generator=generator, dtype=torch.float64)
    sweep = eliminate(weight, covariance, square_root(metric)[0], 1e-13)
    for count in range(size):
        kept, larger = sweep.kept(count).tolist(), sweep.kept(count + 1).tolist()
        error = refit_error(weight, covariance, metric, kept)
        assert float(sweep.errors[count]) == pytest.approx(error, rel=1e-6)
        rivals = [refit_error(weight, covariance, metric, list(subset)) for subset in combinations(larger, count)]
        assert error == pytest.approx(min(rivals), rel=1e-6)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=10, deadline=None)
def test_groups_lose_inputs_in_turns_and_the_errors_stay_exact(seed):
    generator = torch.Generator().manual_seed(seed)
    covariance, metric = random_moment(generator, 6, 12), random_moment(generator, 3)
    weight = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    groups = torch.tensor([0, 1, 2]).repeat_interleave(2)
    sweep = eliminate(weight, covariance, square_root(metric)[0], 1e-13, groups)
    for count in range(6):
        kept = sweep.kept(count)
        sizes = torch.bincount(groups[kept], minlength=3)
        assert sizes.max() - sizes.min() <= 1
        assert float(sweep.errors[count]) == pytest.approx(
            refit_error(weight, covariance, metric, kept.tolist()), rel=1e-6
        )


def test_pending_updates_do_not_change_the_sweep():
    # More inputs than one block of pending updates, so the flush is crossed twice.
    generator = torch.Generator().manual_seed(1)
    size = 150
    covariance, metric = random_moment(generator, size, 400), random_moment(generator, 5)
    weight = torch.randn(5, size, generator=generator, dtype=torch.float64)
    sweep = eliminate(weight, covariance, square_root(metric)[0], 1e-13)
    assert sorted(sweep.order.tolist()) == list(range(size))
    for count in (149, 90, 60, 20, 1, 0):
        error = refit_error(weight, covariance, metric, sweep.kept(count).tolist())
        assert float(sweep.errors[count]) == pytest.approx(error, rel=1e-5)


def test_dead_and_duplicate_inputs_go_first_and_cost_nothing():
    generator = torch.Generator().manual_seed(2)
    data = torch.randn(500, 6, generator=generator, dtype=torch.float64)
    data[:, 2], data[:, 4] = 0.0, data[:, 1]
    covariance = data.mT @ data
    weight = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    sweep = eliminate(weight, covariance, torch.eye(4, dtype=torch.float64), 1e-9)
    assert set(sweep.order[:2].tolist()) in ({2, 1}, {2, 4})
    assert float(sweep.errors[4]) < 1e-6 * float(sweep.errors[0])


def test_value_output_of_one_head_is_the_truncated_svd():
    generator = torch.Generator().manual_seed(3)
    covariance, metric = random_moment(generator, 6), random_moment(generator, 10)
    weight = torch.randn(10, 6, generator=generator, dtype=torch.float64)
    candidate = value_output_candidate(weight, covariance, metric, heads=1)
    singular = torch.linalg.svdvals(square_root(metric)[0] @ weight @ square_root(covariance)[0])
    for rank in range(7):
        best = float(singular[rank:].square().sum())
        assert float(candidate.elimination.errors[rank]) == pytest.approx(best, rel=1e-4, abs=1e-4)


def test_value_output_sees_what_two_heads_share():
    # Two heads with the same context: half of all dimensions carry nothing new, which separate SVDs cannot see.
    generator = torch.Generator().manual_seed(4)
    one = torch.randn(400, 4, generator=generator, dtype=torch.float64)
    contexts = torch.cat((one, one @ torch.randn(4, 4, generator=generator, dtype=torch.float64)), dim=1)
    weight = torch.randn(9, 8, generator=generator, dtype=torch.float64)
    candidate = value_output_candidate(weight, contexts.mT @ contexts, torch.eye(9, dtype=torch.float64), heads=2)
    errors = candidate.elimination.errors
    assert float(errors[4]) < 1e-4 * float(errors[0])
    for size in range(9):
        left = candidate.elimination.kept(size)
        assert candidate.head_ranks(size) == [int((left // 4 == head).sum()) for head in range(2)]


@given(seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_square_root_of_any_rank(seed):
    generator = torch.Generator().manual_seed(seed)
    matrix = random_moment(generator, 6, rank=1 + seed % 6)
    root, inverse = square_root(matrix)
    assert torch.allclose(root @ root, matrix, atol=1e-8 * float(matrix.diagonal().max()))
    assert torch.allclose(root @ inverse @ root, root, atol=1e-6 * float(root.diagonal().max()))


def test_ridge_solve_is_least_squares():
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    targets = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    weight = ridge_solve(inputs.mT @ inputs, inputs.mT @ targets, 0.0)
    assert torch.allclose(weight.mT, torch.linalg.lstsq(inputs, targets).solution, atol=1e-8)


def test_ridge_solve_without_any_variance_is_zero():
    zero = torch.zeros(3, 3, dtype=torch.float64)
    assert torch.equal(
        ridge_solve(zero, torch.zeros(3, 2, dtype=torch.float64), 1e-5), torch.zeros(2, 3, dtype=torch.float64)
    )


def test_the_last_mlp_weighs_the_more_the_less_is_removed():
    assert [last_width_weight(removed) for removed in (0.0, 0.2, 0.4, 0.9)] == pytest.approx([2.0, 1.1, 0.2, 0.2])
