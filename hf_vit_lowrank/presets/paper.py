"""The method that this package starts from: arXiv 2402.06004."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..allocation import ErrorCurve, ImpossibleBudgetError, energy_greedy
from ..candidates.factored import FactoredCandidate
from ..evaluation import count_parameters
from ..linear_statistics import LinearStatistics, weight_shapes, whole_weights
from ..progress import track
from ..rank_plan import unreachable
from ..remote.modeling_lowrank_vit import LowRankViTBlock, LowRankViTForImageClassification
from .factored import (
    FactorRanks,
    added_biases,
    all_candidates,
    factored_model,
    factored_parameters,
    largest_rank,
    set_factors,
    whole_ranks,
)

if TYPE_CHECKING:
    from .inputs import PresetInputs

SECOND_SHARE = 0.05  # of a weight's parameters that its second tensor has
ADAM_STEPS = 300
ADAM_RATE = 3e-2


@torch.no_grad()
def paper(inputs: PresetInputs, limit: int) -> LowRankViTForImageClassification:
    """A model with at most `limit` parameters: every weight of the blocks becomes BA + GY (arXiv 2402.06004).

    BA is the truncated SVD that minimises the layer's output error on the dense activations, ‖(W - BA) E[x xᵀ]^½‖. The
    rank of every BA comes from the greedy energy rule (`allocation.energy_greedy`). GY has 5 % of the weight's
    parameters and is fitted with BA frozen, layer by layer, by Adam on the output error over all calibration images:
    the inputs are those behind the layers that are compressed already, the target is the dense layer's output. BA and
    GY are stored as one pair of rank r + q.

    What the text leaves open and how it is filled here: G starts at zero and Y at random, so that the fit starts at BA
    and never ends above it (the best step is kept); 300 steps of Adam, peak rate 0.03, cosine; the gradient of the
    squared error needs only second moments of the inputs, so each step sees all images at once; query, key and value
    are one weight; the energy rule starts at the largest rank at which a pair is smaller than the weight, and the
    share of GY is within the budget; biases stay.

    Raises:
        UserError: the limit cannot be reached.
    """
    dense = inputs.model
    if limit >= count_parameters(dense):
        return factored_model(dense, whole_ranks(dense))
    candidates = all_candidates(inputs, _second_moment)
    first, second = paper_ranks(dense, candidates, limit)
    both = [{name: rank + second[layer][name] for name, rank in own.items()} for layer, own in enumerate(first)]
    small = factored_model(dense, both)
    _fit(inputs, small, candidates, first, second)
    return small


def paper_ranks(
    dense: LowRankViTForImageClassification, candidates: Sequence[dict[str, FactoredCandidate]], limit: int
) -> tuple[FactorRanks, FactorRanks]:
    """The ranks r of all BA and q of all GY."""
    second: FactorRanks = whole_ranks(dense)
    blocks: Any = dense.vit.blocks
    curves, names, fixed = [], [], count_parameters(dense)
    for layer, own in enumerate(candidates):
        for name, candidate in own.items():
            outputs, inputs = len(candidate.expand), candidate.reduce.shape[1]
            rank = _second_rank(outputs, inputs)
            second[layer][name] = rank
            fixed += rank * (outputs + inputs) - outputs * inputs + added_biases(blocks[layer], name)
            largest = max(1, largest_rank(outputs, inputs) - rank)
            curves.append(ErrorCurve(candidate.errors[: largest + 1].numpy(), outputs + inputs))
            names.append((layer, name))
    try:
        sizes = energy_greedy(curves, limit - fixed)
    except ImpossibleBudgetError as error:
        raise unreachable(limit, "parameters", fixed + error.smallest_cost) from error
    first = whole_ranks(dense)
    for (layer, name), size in zip(names, sizes, strict=True):
        first[layer][name] = size
    return first, second


def smallest_paper(dense: LowRankViTForImageClassification) -> int:
    """Parameters with rank 1 of all BA, beside GY."""
    blocks: Any = dense.vit.blocks
    return factored_parameters(
        dense,
        [{name: 1 + _second_rank(*shape) for name, shape in weight_shapes(block).items()} for block in blocks],
    )


def _second_rank(outputs: int, inputs: int) -> int:
    return max(1, int(SECOND_SHARE * outputs * inputs / (outputs + inputs)))


def _second_moment(statistics: LinearStatistics) -> tuple[Tensor, Tensor]:
    return torch.eye(len(statistics.gradient), dtype=torch.float64), statistics.inputs.second


def _fit(
    inputs: PresetInputs,
    small: LowRankViTForImageClassification,
    candidates: Sequence[dict[str, FactoredCandidate]],
    first: FactorRanks,
    second: FactorRanks,
) -> None:
    """Write BA + GY into every weight of `small`, in the order in which tokens pass them."""
    generator = torch.Generator().manual_seed(inputs.seed)
    dense_stream, small_stream = list(inputs.embeddings), list(inputs.embeddings)
    blocks: Any = zip(inputs.model.vit.blocks, small.vit.blocks, strict=True)
    for layer, (source, block) in enumerate(track(blocks, "Fitting GY", len(first), "blocks")):
        weights = whole_weights(source)
        for name, read, advance in _STAGES:
            cross, moment = _moments(source, block, dense_stream, small_stream, read)
            B, A = candidates[layer][name].factors(first[layer][name])
            rest = weights[name].cpu().double() @ cross - B @ (A @ moment)
            G, Y = second_tensor(rest, moment, second[layer][name], generator)
            set_factors(block, name, (torch.cat((B, G), 1), torch.cat((A, Y))))
            if advance is not None:
                dense_stream = [advance(source, batch) for batch in dense_stream]
                small_stream = [advance(block, batch) for batch in small_stream]


def second_tensor(rest: Tensor, moment: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """G (m, rank) and Y (rank, n), by Adam from G = 0, that lower Σ ‖e - GYx‖² over tokens.

    rest: Σ e xᵀ (m, n) of what BA leaves, e, and the inputs x; moment: Σ x xᵀ (n, n).
    """
    outputs, size = rest.shape
    # Inputs of unit variance and a G near one, so that one learning rate suits every weight.
    input_scale = (moment.diagonal().mean() or torch.tensor(1.0)).double()
    C, D = moment / input_scale, rest / input_scale
    output_scale = D.square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    G = torch.zeros(outputs, rank, dtype=torch.float64)
    Y = torch.randn(rank, size, generator=generator, dtype=torch.float64) / size**0.5
    best = (0.0, G.clone(), Y.clone())
    with torch.enable_grad():
        G.requires_grad_(), Y.requires_grad_()
        optimizer = torch.optim.Adam([G, Y], lr=ADAM_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, ADAM_STEPS)
        for _ in range(ADAM_STEPS):
            error = ((G.mT @ G) * (Y @ C @ Y.mT)).sum() - 2 * ((D / output_scale) @ Y.mT * G).sum()
            if error.item() < best[0]:
                best = (error.item(), G.detach().clone(), Y.detach().clone())
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            schedule.step()
    return best[1] * output_scale, best[2]


def _moments(
    source: LowRankViTBlock,
    block: LowRankViTBlock,
    dense_stream: Sequence[Tensor],
    small_stream: Sequence[Tensor],
    read: Callable[[LowRankViTBlock, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Σ x x̂ᵀ and Σ x̂ x̂ᵀ over tokens, x what is read in the dense block and x̂ in the smaller one."""
    sums: list[Any] = [0.0, 0.0]
    for dense_batch, small_batch in zip(dense_stream, small_stream, strict=True):
        x, seen = read(source, dense_batch).flatten(0, 1), read(block, small_batch).flatten(0, 1)
        sums[0] += (x.mT @ seen).double()
        sums[1] += (seen.mT @ seen).double()
    return sums[0], sums[1]


def _attention_input(block: LowRankViTBlock, stream: Tensor) -> Tensor:
    return block.attention_norm(stream.to(_device(block))).cpu()


def _context(block: LowRankViTBlock, stream: Tensor) -> Tensor:
    return block.attention.context(block.attention_norm(stream.to(_device(block))))[0].cpu()


def _after_attention(block: LowRankViTBlock, stream: Tensor) -> Tensor:
    stream = stream.to(_device(block))
    return (stream + block.attention(block.attention_norm(stream))[0]).cpu()


def _mlp_input(block: LowRankViTBlock, stream: Tensor) -> Tensor:
    return block.mlp_norm(stream.to(_device(block))).cpu()


def _hidden(block: LowRankViTBlock, stream: Tensor) -> Tensor:
    return block.mlp.activation(block.mlp.up(block.mlp_norm(stream.to(_device(block))))).cpu()


def _after_mlp(block: LowRankViTBlock, stream: Tensor) -> Tensor:
    stream = stream.to(_device(block))
    return (stream + block.mlp(block.mlp_norm(stream))).cpu()


def _device(block: LowRankViTBlock) -> torch.device:
    return block.mlp_norm.weight.device


# A weight, what it reads, and how the stream goes on once it is fitted.
_STAGES: Any = (
    ("query_key_value", _attention_input, None),
    ("output", _context, _after_attention),
    ("up", _mlp_input, None),
    ("down", _hidden, _after_mlp),
)
