"""The methods that replace every single weight W of the blocks by a product BA, told apart by their metrics.

All of them minimise ‖L (W - BA) R‖_F (design 3.3, `candidates/factored.py`); embeddings, norms and head stay whole.
Queries, keys and values are one weight (`linear_statistics.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..allocation import ErrorCurve, ImpossibleBudgetError, allocate
from ..bisection import last_that_fits
from ..candidates.factored import FactoredCandidate, bias_change, factored_candidate
from ..evaluation import count_parameters
from ..linear_statistics import (
    LinearStatistics,
    as_stored,
    linear_of,
    traced_linears,
    weight_shapes,
    whole_weights,
)
from ..progress import track
from ..rank_plan import unreachable
from ..remote.configuration_lowrank_vit import LowRankViTConfig
from ..remote.modeling_lowrank_vit import LowRankViTBlock, LowRankViTForImageClassification
from ..statistics import Moments
from ..surgery import set_linear

if TYPE_CHECKING:
    from .inputs import PresetInputs

# Per layer, the rank of each factored weight by name, as in the configuration: a weight that is not named is whole.
FactorRanks = list[dict[str, int]]
ASVD_ALPHA = 0.5
# Share of its mean diagonal that is added to Γ, which has no full rank where only the class tokens have gradients.
KFAC_DAMPING = 1e-3


def svd(inputs: PresetInputs, limit: int) -> LowRankViTForImageClassification:
    """A model with at most `limit` parameters: the truncated SVD of every weight, the same ratio for all.

    L = R = I (Eckart and Young 1936). A weight (m, n) gets the rank ⌊ratio · mn / (m + n)⌋.

    Raises:
        UserError: the limit cannot be reached.
    """
    return _uniform(inputs, limit, lambda statistics: torch.eye(len(statistics.absolute), dtype=torch.float64))


def fwsvd(inputs: PresetInputs, limit: int) -> LowRankViTForImageClassification:
    """As `svd`, every input weighed by its Fisher information: R = diag(f)^½ (Hsu et al., arXiv 2207.00112, eq. 6).

    The paper writes Z = XW and weighs the rows of W, which are the columns of a weight (m, n) here: f is the sum of the
    squared gradients of a column over outputs and images. Its labels are replaced by labels drawn from the model's
    prediction. An input without any gradient is weighed as nothing and dropped.
    """
    return _uniform(inputs, limit, lambda statistics: torch.diag(statistics.input_fisher))


def asvd(inputs: PresetInputs, limit: int) -> LowRankViTForImageClassification:
    """As `svd`, every input scaled by its magnitude: R = diag(mean |x|)^α, α = 0.5 (arXiv 2312.05821, section 3.2).

    The paper's ranks come from a search by sensitivity (section 3.3); here all weights have the same ratio.
    """
    return _uniform(
        inputs,
        limit,
        lambda statistics: torch.diag((statistics.absolute / statistics.inputs.count) ** (2 * ASVD_ALPHA)),
    )


def svd_llm(inputs: PresetInputs, limit: int) -> LowRankViTForImageClassification:
    """As `svd` on whitened inputs: R = E[x xᵀ]^½, all moments from the dense model (arXiv 2403.07378, section 3.1).

    The paper's root is a Cholesky factor; any root gives the same BA. Its parameter update by LoRA (section 3.2) is
    training and left out.
    """
    return _uniform(inputs, limit, lambda statistics: statistics.inputs.second)


@torch.no_grad()
def svd_llm_blockwise(inputs: PresetInputs, limit: int) -> LowRankViTForImageClassification:
    """As `svd_llm`, block by block: the moments of a block are those behind the blocks that are compressed already.

    It is the "progressive" variant that FLAR-SVD compares with; SVD-LLM's own code takes all moments from the dense
    model.
    """
    dense = inputs.model
    ranks = uniform_ranks(dense, limit)
    small = factored_model(dense, ranks)
    stream = list(inputs.embeddings)
    blocks: Any = zip(dense.vit.blocks, small.vit.blocks, ranks, strict=True)
    for source, block, own in track(blocks, "Block by block", len(ranks), "blocks"):
        moments = _input_moments(source, stream)
        weights = whole_weights(source)
        for name, rank in own.items():
            weight = weights[name].cpu()
            identity = torch.eye(len(weight), dtype=torch.float64)
            candidate = factored_candidate(weight, identity, moments[name].second)
            set_factors(block, name, candidate.factors(rank))
        stream = [block(batch.to(dense.device))[0].cpu() for batch in stream]
    return small


def afm(inputs: PresetInputs, limit: int) -> LowRankViTForImageClassification:
    """As `svd` on the outputs: U_r U_rᵀ (y - μ) + μ, U the eigenvectors of Cov(y) (Yu and Wu, AAAI 2023, "Features are
    low-rank, but weights are not!", atomic feature mimicking).

    The same as R = Cov(x)^½ with the mean folded into the bias. The paper's adaptive ranks (AAFM) and its fine-tuning
    (GFM) are left out.
    """
    ranks = uniform_ranks(inputs.model, limit)
    candidates = all_candidates(inputs, lambda statistics: (_eye(statistics), statistics.inputs.covariance()))
    small = factored_model(inputs.model, ranks, candidates)
    fold_means(inputs, small)
    return small


def kfac_svd(inputs: PresetInputs, limit: int) -> LowRankViTForImageClassification:
    """Truncated SVD in the metric of the Kronecker-factored Fisher information, ranks chosen for the whole model.

    L = Γ^½, R = Cov(x)^½, means folded into the biases (K-FAC: Martens and Grosse, arXiv 1503.05671, section 3). With
    independent tokens the loss of an image rises by ½ · tokens · ‖L (W - BA) R‖², L and R from means over tokens; these
    curves go to `allocate` (design 3.4). A weight is kept whole where the pair does not pay; the budget counts biases
    of queries, keys and values for it all the same, so that up to 3 d of them a block stay unused.

    Raises:
        UserError: the limit cannot be reached.
    """
    dense = inputs.model
    if limit >= count_parameters(dense):
        return factored_model(dense, whole_ranks(dense))
    candidates = all_candidates(
        inputs, lambda statistics: (_damped(statistics.gradient), statistics.inputs.covariance())
    )
    names = [(layer, name) for layer, of_block in enumerate(candidates) for name in of_block]
    curves = [_loss_curve(candidates[layer][name], inputs.linear_statistics[layer][name]) for layer, name in names]
    fixed = count_parameters(dense) + sum(
        added_biases(block, name) - outputs * inputs
        for block in _blocks(dense)
        for name, (outputs, inputs) in weight_shapes(block).items()
    )
    try:
        sizes = allocate(curves, limit - fixed)
    except ImpossibleBudgetError as error:
        raise unreachable(limit, "parameters", fixed + error.smallest_cost) from error
    ranks = whole_ranks(dense)
    for (layer, name), curve, size in zip(names, curves, sizes, strict=True):
        if size < curve.largest:
            ranks[layer][name] = size
    small = factored_model(dense, ranks, candidates)
    fold_means(inputs, small)
    return small


def _loss_curve(candidate: FactoredCandidate, statistics: LinearStatistics) -> ErrorCurve:
    """Predicted rise of an image's loss at every rank that pays."""
    outputs, inputs = len(candidate.expand), candidate.reduce.shape[1]
    scale = 0.5 / (statistics.images * statistics.inputs.count)
    return candidate.curve(scale, largest_rank(outputs, inputs), outputs + inputs)


# ------------------------------------------------------------------------------------------------------------- ranks


def largest_rank(outputs: int, inputs: int) -> int:
    """The largest rank at which a pair has fewer parameters than the weight."""
    return (outputs * inputs - 1) // (outputs + inputs)


def factored_parameters(dense: LowRankViTForImageClassification, ranks: FactorRanks) -> int:
    """What `dense` has with these ranks."""
    total = count_parameters(dense)
    for block, own in zip(_blocks(dense), ranks, strict=True):
        shapes = weight_shapes(block)
        total += sum(rank * sum(shapes[name]) - math.prod(shapes[name]) for name, rank in own.items())
        total += sum(added_biases(block, name) for name in own)
    return total


def added_biases(block: LowRankViTBlock, name: str) -> int:
    """Biases that a product of two has and the whole weight has not: those of keys and values."""
    if name != "query_key_value":
        return 0
    query, key_value = block.attention.query, block.attention.key_value
    return key_value.out_features + (query.out_features if query.bias is None else 0)


def smallest_factored(dense: LowRankViTForImageClassification) -> int:
    """Parameters with rank 1 wherever that is smaller than the weight."""
    ones = [
        {name: 1 for name, shape in weight_shapes(block).items() if largest_rank(*shape) >= 1}
        for block in _blocks(dense)
    ]
    return factored_parameters(dense, ones)


def whole_ranks(dense: LowRankViTForImageClassification) -> FactorRanks:
    """No weight is factored."""
    return [{} for _ in _blocks(dense)]


def uniform_ranks(dense: LowRankViTForImageClassification, limit: int) -> FactorRanks:
    """The largest ranks of one ratio for all weights with at most `limit` parameters in total (see `svd`).

    Raises:
        UserError: rank 1 everywhere has more.
    """
    return scaled_ranks(dense, limit, lambda layer, name, break_even: break_even)


def scaled_ranks(
    dense: LowRankViTForImageClassification, limit: int, rank_of: Callable[[int, str, float], float]
) -> FactorRanks:
    """Ranks in the proportions of `rank_of(layer, name, break-even rank)`, as large as `limit` parameters allow.

    A weight is left whole where the pair would not be smaller.

    Raises:
        UserError: rank 1 everywhere has more.
    """
    wanted = [
        {
            name: (rank_of(layer, name, m * n / (m + n)), largest_rank(m, n))
            for name, (m, n) in weight_shapes(block).items()
        }
        for layer, block in enumerate(_blocks(dense))
    ]

    def at(scale: float) -> FactorRanks:
        return [
            {
                name: rank
                for name, (share, largest) in own.items()
                if (rank := max(1, math.floor(scale * share))) <= largest
            }
            for own in wanted
        ]

    if limit >= count_parameters(dense):
        return whole_ranks(dense)
    smallest = smallest_factored(dense)
    if smallest > limit:
        raise unreachable(limit, "parameters", smallest)

    def fits(scale: float) -> bool:
        return factored_parameters(dense, at(scale)) <= limit

    whole = max((largest + 1) / share for own in wanted for share, largest in own.values())
    return at(whole if fits(whole) else last_that_fits(fits, 0.0, whole))


# ---------------------------------------------------------------------------------------------------- making the model


def all_candidates(
    inputs: PresetInputs, metrics: Callable[[LinearStatistics], tuple[Tensor, Tensor]]
) -> list[dict[str, FactoredCandidate]]:
    """Per block and weight the factors in (output metric, input metric) of its statistics."""
    blocks: Any = zip(_blocks(inputs.model), inputs.linear_statistics, strict=True)
    return [
        {
            name: factored_candidate(weight.cpu(), *metrics(statistics[name]))
            for name, weight in whole_weights(block).items()
        }
        for block, statistics in track(blocks, "Factors", len(inputs.model.vit.blocks), "blocks")
    ]


def _uniform(
    inputs: PresetInputs, limit: int, input_metric: Callable[[LinearStatistics], Tensor]
) -> LowRankViTForImageClassification:
    ranks = uniform_ranks(inputs.model, limit)
    candidates = all_candidates(inputs, lambda statistics: (_eye(statistics), input_metric(statistics)))
    return factored_model(inputs.model, ranks, candidates)


@torch.no_grad()
def factored_model(
    dense: LowRankViTForImageClassification,
    ranks: FactorRanks,
    candidates: Sequence[dict[str, FactoredCandidate]] | None = None,
) -> LowRankViTForImageClassification:
    """A model in eval mode with these ranks, biases and whole weights as in `dense`.

    candidates: what the factors are taken from; without them the factors are random.
    """
    fields = {**dense.config.to_dict(), "factor_ranks": ranks}
    small = LowRankViTForImageClassification(LowRankViTConfig.from_dict(fields)).eval()
    nn.Module.to(small, dense.device)
    names = small.state_dict().keys()
    small.load_state_dict({name: tensor for name, tensor in dense.state_dict().items() if name in names}, strict=False)
    for layer, (block, source, own) in enumerate(zip(_blocks(small), _blocks(dense), ranks, strict=True)):
        for name, rank in own.items():
            linear_of(block, name).expand.bias.copy_(_whole_bias(source, name))
            if candidates is not None:
                set_factors(block, name, candidates[layer][name].factors(rank))
    return small


def set_factors(block: LowRankViTBlock, name: str, factors: tuple[Tensor, Tensor]) -> None:
    """Write B and A of one of `whole_weights`."""
    pair = linear_of(block, name)
    set_linear(pair.expand, as_stored(block, name, factors[0]))
    set_linear(pair.reduce, factors[1])


def _whole_bias(block: LowRankViTBlock, name: str) -> Tensor:
    """(m,) of a block at full rank, as stored."""
    if name != "query_key_value":
        return linear_of(block, name).bias
    query, key_value = block.attention.query, block.attention.key_value
    bias = key_value.weight.new_zeros(query.out_features + key_value.out_features)
    if query.bias is not None:
        bias[: query.out_features] = query.bias
    return bias


@torch.no_grad()
def fold_means(inputs: PresetInputs, small: LowRankViTForImageClassification) -> None:
    """Change biases so that every factored weight gives what it gave at the mean of its inputs."""
    layers: Any = zip(_blocks(small), _blocks(inputs.model), inputs.linear_statistics, strict=True)
    for layer, (block, source, statistics) in enumerate(layers):
        weights = whole_weights(source)
        for name in small.config.factor_ranks[layer]:
            pair, moments = linear_of(block, name), statistics[name].inputs
            factors = pair.expand.weight.cpu().double(), pair.reduce.weight.cpu().double()
            weight = as_stored(block, name, weights[name]).cpu()
            change = bias_change(weight, factors, moments.first / moments.count)
            pair.expand.bias += change.to(pair.expand.bias)


def _input_moments(block: LowRankViTBlock, stream: Sequence[Tensor]) -> dict[str, Moments]:
    """Moments of what the weights of a block at full rank read, by name, from batches of its input."""
    moments: dict[str, Moments] = {}
    for batch in stream:
        inputs = traced_linears(block, batch.to(block.mlp.down.weight.device)).inputs
        for name, values in inputs.items():
            moments.setdefault(name, Moments.zeros(values.shape[-1])).add(values.flatten(0, 1))
    return moments


def _eye(statistics: LinearStatistics) -> Tensor:
    return torch.eye(len(statistics.gradient), dtype=torch.float64)


def _damped(gradient: Tensor) -> Tensor:
    return gradient + KFAC_DAMPING * gradient.diagonal().mean() * torch.eye(len(gradient), dtype=torch.float64)


def _blocks(model: LowRankViTForImageClassification) -> Any:
    return model.vit.blocks
