"""What the calibration images tell about a dense classifier: the moments of design 3.1.

Everything is kept in the spaces where it is used: queries, keys and contexts (attention-averaged values) per head, so
that no input moment of the whole hidden size is needed. All sums run over tokens and images, in float64.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import processes
from .errors import RunError
from .exact_sums import add_gram, mirror, rounded_sum, units_of
from .linalg import FLOAT32_ROUNDING, eigh
from .remote.modeling_lowrank_vit import LowRankViTBlock, LowRankViTForImageClassification, merge_heads, split_heads

logger = logging.getLogger(__name__)

# Read tokens get weight 1. Other tokens get at least this, or a block would be fitted to one token an image alone.
SMALLEST_TOKEN_WEIGHT = 0.002
# The moments of MLPs are by far the largest, and an image's patches much alike: one in so many is summed and counts for
# all. With all of them statistics and refits take two forward passes more, and models are no better (README, trials).
ONE_PATCH_IN = 3


@dataclass
class Moments:
    """Sums over tokens: count, sum of x (..., n) and of x xᵀ (..., n, n), in float64, added batch by batch.

    units: of x (..., n), while batches are added: the first one decides, and the sums have the same bits in any order.
    """

    count: float
    first: Tensor
    _second: Tensor
    units: Tensor | None = None
    _one_sided: bool = False  # whether batches were added above the diagonal and not yet below it

    @property
    def second(self) -> Tensor:
        """Of x xᵀ; while batches are added, what is below the diagonal costs as much as all else and waits."""
        if self._one_sided:
            mirror(self._second)
            self._one_sided = False
        return self._second

    @classmethod
    def zeros(cls, *shape: int) -> Moments:
        return cls(0.0, torch.zeros(shape, dtype=torch.float64), torch.zeros(*shape, shape[-1], dtype=torch.float64))

    def add(self, values: Tensor) -> None:
        """values: (..., tokens, n), one leading shape as in `zeros`."""
        if self.units is None:
            self.units = units_of(values, values.shape[-2])
        self.count += values.shape[-2]
        self.first += rounded_sum(values, self.units)
        add_gram(self._second, values, self.units)
        self._one_sided = True

    def add_up(self) -> None:
        """Make these the sums over all processes; nothing is added after this."""
        self.units = None
        self.count = processes.total(self.count)
        processes.add_up(self.first, self.second)

    def plus(self, other: Moments, weight: float) -> Moments:
        """self + weight · other."""
        return Moments(
            self.count + weight * other.count, self.first + weight * other.first, self.second + weight * other.second
        )

    def times(self, factor: float) -> Moments:
        """As of so many times the tokens."""
        return Moments(factor * self.count, factor * self.first, factor * self.second)

    def part(self, chosen: Tensor | slice) -> Moments:
        """The moments of some of the entries of x."""
        return Moments(self.count, self.first[..., chosen], self.second[..., chosen, :][..., chosen])

    def covariance(self) -> Tensor:
        """Centred second moment, summed (not averaged) over tokens: (..., n, n).

        An entry that float32 cannot tell from a constant varies with no other, and by what rounding may have hidden.
        """
        centred = self.second - self.first.unsqueeze(-1) * self.first.unsqueeze(-2) / self.count
        hidden = FLOAT32_ROUNDING * self.second.diagonal(dim1=-2, dim2=-1)
        constant = centred.diagonal(dim1=-2, dim2=-1) < hidden
        if constant.any():
            centred = centred.masked_fill(constant.unsqueeze(-1) | constant.unsqueeze(-2), 0.0)
            centred = centred + torch.diag_embed(hidden * constant)
        return centred

    def rank(self) -> int:
        """Of the covariance (n, n), as far as float32 products tell."""
        values, _ = eigh(self.covariance())
        return int((values > FLOAT32_ROUNDING * self.second.trace()).sum())


@dataclass
class TokenGroups:
    """One set of moments for the tokens that the classifier reads, one for all others (design 3.6, recipe E)."""

    read: Moments
    other: Moments

    @classmethod
    def zeros(cls, *shape: int) -> TokenGroups:
        return cls(Moments.zeros(*shape), Moments.zeros(*shape))

    def add(self, values: Tensor, num_read: int) -> None:
        """values: (images, ..., tokens, n); the first `num_read` tokens are those that the classifier reads."""
        for moments, tokens in ((self.read, slice(num_read)), (self.other, slice(num_read, None))):
            own = _images_inside(values[..., tokens, :])
            if moments.units is None:
                moments.units = units_of(_images_inside(values), own.shape[-2])
            moments.add(own)

    def add_up(self) -> None:
        """Make these the sums over all processes."""
        self.read.add_up()
        self.other.add_up()

    def weighted(self, token_weight: float) -> Moments:
        """One set of moments in which a read token counts 1 and any other `token_weight`."""
        return self.read.plus(self.other, token_weight)

    @property
    def count(self) -> float:
        """Tokens of both groups."""
        return self.read.count + self.other.count


def sampled(values: Tensor, num_read: int) -> Tensor:
    """The tokens that the classifier reads and one in ONE_PATCH_IN of the others: (images, tokens, n)."""
    return torch.cat((values[:, :num_read], values[:, num_read::ONE_PATCH_IN]), 1)


def _images_inside(values: Tensor) -> Tensor:
    """(images, ..., tokens, n) to (..., images · tokens, n)."""
    return values.movedim(0, -3).flatten(-3, -2)


@dataclass
class BlockStatistics:
    """The moments of one block; e is the head size, d the hidden size, w the MLP width, sums run over all images.

    images: their number. query, context, mlp: token groups of the queries (heads, e), of the concatenated contexts
    (heads · e), and of the MLP's hidden units and its input side by side (w + d). slope: of the slope of each hidden
    unit's activation (w, 1). Of mlp and slope the other tokens are a sample (`sampled`) that counts for all. key:
    moments of the keys centred within each image (heads, e). score_gradient: sum of (∂loss/∂s_ij)² per head.
    attention_gradient, mlp_gradient: token groups of the loss gradient at the block's two outputs (d).
    """

    images: int
    query: TokenGroups
    key: Moments
    context: TokenGroups
    mlp: TokenGroups
    slope: TokenGroups
    score_gradient: Tensor
    attention_gradient: TokenGroups
    mlp_gradient: TokenGroups

    @classmethod
    def zeros(cls, heads: int, head_size: int, hidden_size: int, width: int) -> BlockStatistics:
        return cls(
            images=0,
            query=TokenGroups.zeros(heads, head_size),
            key=Moments.zeros(heads, head_size),
            context=TokenGroups.zeros(heads * head_size),
            mlp=TokenGroups.zeros(width + hidden_size),
            slope=TokenGroups.zeros(width, 1),
            score_gradient=torch.zeros(heads, dtype=torch.float64),
            attention_gradient=TokenGroups.zeros(hidden_size),
            mlp_gradient=TokenGroups.zeros(hidden_size),
        )

    @property
    def hidden(self) -> TokenGroups:
        """The hidden units alone (w)."""
        units = slice(len(self.mlp.read.first) - len(self.mlp_gradient.read.first))
        return TokenGroups(self.mlp.read.part(units), self.mlp.other.part(units))


def token_weight(gradient: TokenGroups) -> float:
    """Weight ω of the other tokens against a read token: (e_other / e_read)^½ of their mean squared output gradients.

    Zero where other tokens do not matter at all (the last block). Exponents 1 and 0 were measured to be worse.
    """
    read = gradient.read.second.diagonal().sum().item() / gradient.read.count
    other = gradient.other.second.diagonal().sum().item() / gradient.other.count
    if other == 0.0:
        return 0.0
    return min(max((other / read) ** 0.5, SMALLEST_TOKEN_WEIGHT), 1.0) if read > 0 else 1.0


def collect_statistics(
    model: LowRankViTForImageClassification,
    embeddings: Iterable[Tensor],
    seed: int = 0,
    precision: torch.dtype = torch.float32,
    layers: range | None = None,
    images_at_once: int | None = None,
) -> list[BlockStatistics]:
    """One pass forward and backward over batches of embeddings (images, tokens, d); one result per block.

    Each process of several gives its own batches, every process gets the sums. layers: the blocks wanted, one after the
    other, all if None. images_at_once: parts of a batch that are worked on at once, whole batches if None. The same
    batches and seed give the same results, and the same labels in any parts and number of processes.

    The loss is the cross-entropy against a label drawn from the model's own prediction, so the gradients are those of
    the true Fisher information and no labels are needed. With `precision` bfloat16 the pass runs under autocast; the
    moments are products of float32 copies and their sums float64 all the same.

    Raises:
        RunError: no image came, or a gradient is not finite.
    """
    config = model.config
    layers = range(config.num_hidden_layers) if layers is None else layers
    heads, head_size = config.num_attention_heads, config.query_key_ranks[0][0]
    statistics = [BlockStatistics.zeros(heads, head_size, config.hidden_size, config.intermediate_size) for _ in layers]
    for part, draws in with_draws(embeddings, config.num_labels or 0, seed, images_at_once, shared=True):
        traces = _traced_backward(model, part, draws, precision, layers)
        for block_statistics, trace in zip(statistics, traces, strict=True):
            _add(block_statistics, trace, config.num_tokens_read)
    if statistics[0].images == 0:
        raise RunError("No calibration image was seen: the calibration data are empty.")
    for block_statistics in statistics:
        _add_up(block_statistics)
    tokens = int(statistics[0].mlp.read.count + statistics[0].mlp.other.count / ONE_PATCH_IN)
    if tokens < config.intermediate_size:
        logger.warning(
            "the moments of an MLP are of %d tokens, fewer than its %d hidden units: use more images",
            *(tokens, config.intermediate_size),
        )
    return statistics


def _add_up(statistics: BlockStatistics) -> None:
    """Sums over the images of all processes, in which sampled tokens count for all."""
    statistics.images = int(processes.total(statistics.images))
    processes.add_up(statistics.score_gradient)
    for moments in vars(statistics).values():
        if isinstance(moments, Moments | TokenGroups):
            moments.add_up()
    for groups in (statistics.mlp, statistics.slope):
        groups.other = groups.other.times(ONE_PATCH_IN)


@dataclass
class _Trace:
    """One block's tensors of one batch, those of the MLP of sampled tokens, and the loss gradients at its scores and at
    its two outputs."""

    query: Tensor
    key: Tensor
    scores: Tensor
    context: Tensor
    after_attention: Tensor
    mlp_input: Tensor
    slope: Tensor
    hidden: Tensor
    after_mlp: Tensor
    gradients: tuple[Tensor, ...] = ()


def _traced_backward(
    model: LowRankViTForImageClassification,
    embeddings: Tensor,
    draws: Tensor,
    precision: torch.dtype,
    layers: range,
) -> Iterator[_Trace]:
    """Of the blocks in `layers`; gradients go no deeper than the first of them."""
    stream = embeddings.detach().to(model.device)
    traces = []
    blocks: Any = model.vit.blocks
    with torch.autocast(stream.device.type, precision, enabled=precision != torch.float32):
        for layer, block in enumerate(blocks):
            if layer == layers.start:
                stream.requires_grad_(True)
            trace = _traced_block(block, stream, model.config.num_tokens_read)
            if layer in layers:
                traces.append(trace)
            stream = trace.after_mlp
            _require_finite(stream, "activations", layer)
    logits = model.classify(model.vit.norm(stream))[0].float()
    loss = drawn_label_loss(logits, draws)
    watched = [t for trace in traces for t in (trace.scores, trace.after_attention, trace.after_mlp)]
    gradients = torch.autograd.grad(loss, watched)
    for index, (layer, trace) in enumerate(zip(layers, traces, strict=True)):
        trace.gradients = gradients[3 * index : 3 * index + 3]
        _require_finite(trace.gradients[2], "gradients", layer)
        yield trace


def label_draws(images: int, classes: int, generator: torch.Generator) -> Tensor:
    """Exponential variables (images, classes), which draw a label for each image in `drawn_label_loss`."""
    return torch.empty(images, classes).exponential_(generator=generator)


def with_draws(
    batches: Iterable[Tensor], classes: int, seed: int, images_at_once: int | None, shared: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """The parts of batches, of so many images (None: whole), and the draws of their labels: the same in parts of any
    size and, of batches that are `shared` out among processes, in any number of those."""
    generator = torch.Generator().manual_seed(seed)
    for number, batch in enumerate(batches):
        if shared:
            if number == 0:
                whole_batch = max(processes.gather(len(batch)))
            others = processes.count() - 1 if number else processes.index()
            label_draws(others * whole_batch, classes, generator)  # those of the other processes' batches
        draws = label_draws(len(batch), classes, generator)
        size = images_at_once or len(batch)
        yield from zip(batch.split(size), draws.split(size), strict=True)


def drawn_label_loss(logits: Tensor, draws: Tensor) -> Tensor:
    """Cross-entropy, summed over images, against labels drawn from the prediction itself; both (images, classes).

    The second moments of its gradients are the true Fisher information, for which no labels are needed. Of exponential
    variables divided by probabilities, each is the least with its probability.
    """
    drawn = (logits.detach().softmax(-1).cpu() / draws).argmax(-1)
    return torch.nn.functional.cross_entropy(logits, drawn.to(logits.device), reduction="sum")


def _require_finite(values: Tensor, what: str, layer: int) -> None:
    if not torch.isfinite(values).all():
        raise RunError(f"The {what} of block {layer} are not finite: the source model overflows on these images.")


def _traced_block(block: LowRankViTBlock, stream: Tensor, num_read: int) -> _Trace:
    attention, num_heads = block.attention, len(block.attention.query_key_ranks)
    normed = block.attention_norm(stream)
    query = split_heads(attention.query(normed), num_heads)
    key, value = split_heads(attention.key_value(normed), 2 * num_heads).chunk(2, dim=1)
    scores = query @ key.transpose(-1, -2)
    context = merge_heads(scores.softmax(-1) @ value)
    after_attention = stream + attention.output(context)
    mlp_input = block.mlp_norm(after_attention)
    before = block.mlp.up(mlp_input)
    hidden, slope = block.mlp.activation(before), _slope(block.mlp.activation, sampled(before, num_read))
    after_mlp = after_attention + block.mlp.down(hidden)
    mlp_input, hidden = sampled(mlp_input, num_read), sampled(hidden, num_read)
    return _Trace(query, key, scores, context, after_attention, mlp_input, slope, hidden, after_mlp)


def _slope(activation: nn.Module, before: Tensor) -> Tensor:
    """That of an activation at the values before it, of the same shape."""
    before = before.detach().requires_grad_()
    return torch.autograd.grad(activation(before).sum(), before)[0]


@torch.no_grad()
def _add(statistics: BlockStatistics, trace: _Trace, num_read: int) -> None:
    score_gradient, attention_gradient, mlp_gradient = (gradient.float() for gradient in trace.gradients)
    statistics.images += trace.query.shape[0]
    statistics.query.add(trace.query.float(), num_read)
    centred = trace.key.float() - trace.key.float().mean(-2, keepdim=True)
    statistics.key.add(_images_inside(centred))
    statistics.context.add(trace.context.float(), num_read)
    statistics.mlp.add(torch.cat((trace.hidden.float(), trace.mlp_input.float()), -1), num_read)
    statistics.slope.add(trace.slope.float().mT.unsqueeze(-1), num_read)
    statistics.score_gradient += score_gradient.square().sum((0, 2, 3)).cpu().double()
    statistics.attention_gradient.add(attention_gradient, num_read)
    statistics.mlp_gradient.add(mlp_gradient, num_read)
