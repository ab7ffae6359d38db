"""A trial of `bench_trials.py`: the stream of each tenth of the images is moved by refits on the other nine.

So the later blocks are fitted on errors such as other images would have, not on those of images learnt by heart.
"""

from __future__ import annotations

import copy
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from hf_vit_lowrank.candidates.block import output_metric
from hf_vit_lowrank.candidates.mlp_width import mlp_width_candidate
from hf_vit_lowrank.regression import Regression, RegressionSums, Solution, WeightedSums
from hf_vit_lowrank.statistics import Moments, token_weight
from hf_vit_lowrank.surgery import keep_units, set_linear

FOLDS = 10


class _Folds:
    """A regression for every fold, of batches dealt out in turn. The first of all results is that of all images."""

    def __init__(self, inputs: int, targets: int, other_weight: float, watched: int = 0):
        self.folds = [RegressionSums(inputs, targets, other_weight, watched) for _ in range(FOLDS)]

    def add(self, index: int, inputs: Tensor, targets: Tensor, num_read: int) -> None:
        self.folds[index % FOLDS].add(inputs, targets, num_read)

    def solve(self, prior: Tensor, metric: Tensor) -> tuple[list[Solution], list[Moments]]:
        """Those of all images and of all but each fold, with the ridge that halves of all ask for; and the moments of
        the inputs that each was fitted on."""
        folds = [fold.add_up() for fold in self.folds]
        halves = zip(*(fold.halves for fold in folds), strict=True)
        everything = Regression([reduce(WeightedSums.plus, parts) for parts in halves])
        results, seen = [everything.solve(prior, metric)], [everything.seen]
        for fold in folds:
            rest = Regression([_without(*pair) for pair in zip(everything.halves, fold.halves, strict=True)])
            results.append(rest.with_ridge(prior.double(), results[0].ridge))
            seen.append(rest.seen)
        return results, seen


def _without(sums: WeightedSums, part: WeightedSums) -> WeightedSums:
    return WeightedSums(sums.inputs.plus(part.inputs, -1.0), sums.target - part.target, sums.cross - part.cross)


def refit_attention(
    source: Any,
    block: Any,
    statistics: Any,
    dense_stream: list[Tensor],
    small_stream: list[Tensor],
    queries: int | None,
    num_read: int,
    _: int,
) -> float:
    """In place of `closed_form._refit_attention`."""
    output, weight = block.attention.output, token_weight(statistics.attention_gradient)
    fit, contexts = _Folds(output.in_features, output.out_features, weight), []
    for index, (dense_batch, small_batch) in enumerate(zip(dense_stream, small_stream, strict=True)):
        update, _ = source.attention(source.attention_norm(dense_batch), queries)
        dense_stream[index], small_stream[index] = dense_batch[:, :queries] + update, small_batch[:, :queries]
        context, _ = block.attention.context(block.attention_norm(small_batch), queries)
        fit.add(index, context, dense_stream[index] - small_stream[index], num_read)
        contexts.append(context)
    results, _ = fit.solve(output.weight, output_metric(statistics.attention_gradient, weight))
    outputs = [output, *(copy.deepcopy(output) for _ in range(FOLDS))]
    for own, result in zip(outputs, results, strict=True):
        set_linear(own, result.weight, result.bias)
    for index, context in enumerate(contexts):
        small_stream[index] = small_stream[index] + outputs[1 + index % FOLDS](context)
    return results[0].ridge


def refit_mlp(
    source: Any,
    block: Any,
    statistics: Any,
    dense_stream: list[Tensor],
    small_stream: list[Tensor],
    num_read: int,
    *_: float,
) -> None:
    """In place of `closed_form._refit_mlp`; the units are those that all images choose."""
    down, mlp, weight = block.mlp.down, source.mlp, token_weight(statistics.mlp_gradient)
    fit = _Folds(mlp.down.in_features, down.out_features, weight, watched=down.out_features)
    for index, (dense_batch, small_batch) in enumerate(zip(dense_stream, small_stream, strict=True)):
        dense_stream[index] = dense_batch + mlp(source.mlp_norm(dense_batch))
        normed = block.mlp_norm(small_batch)
        hidden = mlp.activation(mlp.up(normed))
        fit.add(index, torch.cat((hidden, normed), -1), dense_stream[index] - small_batch, num_read)
    slopes = statistics.slope.weighted(weight)
    metric = output_metric(statistics.mlp_gradient, weight)
    results, seen = fit.solve(mlp.down.weight, metric)
    covariance = seen[0].part(slice(mlp.down.in_features)).covariance()
    kept = mlp_width_candidate(results[0].weight, covariance, metric).kept(down.in_features)
    blocks = [block, *(copy.deepcopy(block) for _ in range(FOLDS))]
    for own, result, moments in zip(blocks, results, seen, strict=True):
        if down.in_features == mlp.down.in_features:
            set_linear(own.mlp.down, result.weight, result.bias)
        else:
            keep_units(own, source, kept, result.weight, result.bias, moments, slopes, metric)
    for index, batch in enumerate(small_stream):
        own = blocks[1 + index % FOLDS]
        small_stream[index] = batch + own.mlp(own.mlp_norm(batch))
