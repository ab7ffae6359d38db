"""A narrower stream: the dense model's, confined to the directions that cost least, stored in fewer entries.

A layer norm takes out the mean over the entries, so a stream x of d entries lives in the d - 1 directions without one.
With U (d, r) orthonormal among those and H (r, r + 1) with orthonormal rows that sum to zero, a stream x = U H y has
the length of y, and y has no mean either: the layer norm of y in r + 1 entries says the same as that of x in d, but for
a factor of sqrt(d / (r + 1)). So a model whose stream is confined to U is the same function with r + 1 entries in place
of d (the rotation of SliceGPT, arXiv 2401.15024, without its other norm and its matrix in every residual connection).

U starts as the principal components of what the layer norms read and is then learned, by a few steps of gradient on the
divergence of the confined model from the dense one: with no other weight to change, little can be learnt by heart.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, layer_norm

from .compensation.drift import tokens_computed
from .embeddings import prefix_tokens, projection_factors
from .linalg import eigh
from .progress import track
from .rank_plan import with_hidden_size
from .remote.modeling_lowrank_vit import InterpolativeLinear, LowRankViTForImageClassification
from .schedule import warm_up_and_cosine
from .statistics import TokenGroups

# Each is used once. With 176 of its 192 entries DeiT-tiny is 0.14 nats from itself by 640, by 160 images 0.03 more.
MOST_IMAGES = 640
IMAGES_A_STEP = 16
LEARNING_RATE = 2e-3
WARM_UP_STEPS = 5


def stream_basis(
    model: LowRankViTForImageClassification, images: Tensor, hidden_size: int, seed: int, images_at_once: int
) -> Tensor:
    """Orthonormal directions (d, hidden_size - 1), without a mean, that the stream of `model` is best confined to.

    images: embeddings (images, tokens, d), each used once. images_at_once: how many gradients are computed of.
    """
    directions, expected = _principal_directions(model, images, images_at_once)
    free = directions[:, hidden_size - 1 :].clone().requires_grad_()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).split(IMAGES_A_STEP)
    optimizer = torch.optim.Adam([free], LEARNING_RATE)
    schedule = warm_up_and_cosine(optimizer, WARM_UP_STEPS, len(order))
    for chosen in track(order, "Stream", len(images), size=len):
        optimizer.zero_grad()
        for part in chosen.split(images_at_once):
            logits = _confined_logits(model, images[part], _dropped(free).float()).cpu()
            divergence = kl_div(
                logits.log_softmax(-1), expected[part].log_softmax(-1), log_target=True, reduction="sum"
            )
            (divergence / len(chosen)).backward()
        optimizer.step()
        schedule.step()
    return torch.linalg.qr(_dropped(free.detach()), mode="complete")[0][:, 1 + free.shape[1] :]


def narrowed(model: LowRankViTForImageClassification, basis: Tensor) -> LowRankViTForImageClassification:
    """The model whose stream is confined to the directions `basis` (d, r), in r + 1 entries."""
    return restated(model, entries(basis).mT)


def entries(basis: Tensor) -> Tensor:
    """(d, r + 1): a stream (..., d) times this is the stream of the narrower model (..., r + 1)."""
    return basis @ zero_mean_basis(basis.shape[1])


def widened(model: LowRankViTForImageClassification, hidden_size: int) -> LowRankViTForImageClassification:
    """The same function in more entries, in directions as good as any."""
    before = model.config.hidden_size
    return restated(model, zero_mean_basis(hidden_size - 1)[: before - 1].mT @ zero_mean_basis(before - 1))


def zero_mean_basis(size: int) -> Tensor:
    """(size, size + 1): orthonormal rows whose entries sum to zero (Helmert's), in float64."""
    rows, columns = torch.arange(1, size + 1).unsqueeze(1).double(), torch.arange(size + 1).double()
    basis = torch.where(columns < rows, 1.0, torch.where(columns == rows, -rows, 0.0))
    return basis / (rows * (rows + 1)).sqrt()


def _dropped(directions: Tensor) -> Tensor:
    """(d, 1 + k): orthonormal, the mean's direction first, of the space that it and the directions (d, k) span."""
    return torch.linalg.qr(torch.cat((torch.ones_like(directions[:, :1]), directions), 1))[0]


@torch.no_grad()
def _principal_directions(
    model: LowRankViTForImageClassification, images: Tensor, images_at_once: int
) -> tuple[Tensor, Tensor]:
    """Those of what all layer norms read, each time divided by its deviation: (d, d - 1), strongest first; and the
    logits (images, classes). A token that the classifier reads counts as the root of the number of the others does."""
    hidden_size, num_read = images.shape[-1], model.config.num_tokens_read
    seen = TokenGroups.zeros(hidden_size)

    def watch(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.add(layer_norm(inputs[0], (hidden_size,)), num_read)

    norms = [norm for norm in model.modules() if isinstance(norm, nn.LayerNorm)]
    handles = [norm.register_forward_pre_hook(watch) for norm in norms]
    try:
        logits = [_confined_logits(model, part).cpu() for part in images.split(images_at_once)]
    finally:
        for handle in handles:
            handle.remove()
    second = seen.weighted(max(seen.other.count / seen.read.count, 1.0) ** -0.5).second
    flat = zero_mean_basis(hidden_size - 1)
    _, vectors = eigh(flat @ second @ flat.mT)
    return flat.mT @ vectors.flip(1), torch.cat(logits)


def _confined_logits(model: LowRankViTForImageClassification, images: Tensor, dropped: Tensor | None = None) -> Tensor:
    """(images, classes), from embeddings (images, tokens, d); all that is added to the stream loses its part in the
    directions `dropped` (d, k), which are fewer than those that it keeps and so the cheaper ones to project on."""
    if dropped is not None:
        dropped = dropped.to(model.device)

    def confined(written: Tensor) -> Tensor:
        return written if dropped is None else written - written @ dropped @ dropped.mT

    stream = confined(images.to(model.device))
    blocks: Any = model.vit.blocks
    for layer, block in enumerate(blocks):
        queries = tokens_computed(model.config, layer)
        update, _ = block.attention(block.attention_norm(stream), queries)
        stream = stream[:, :queries] + confined(update)
        stream = stream + confined(block.mlp(block.mlp_norm(stream)))
    return model.classify(model.vit.norm(stream))[0]


@torch.no_grad()
def restated(model: LowRankViTForImageClassification, change: Tensor) -> LowRankViTForImageClassification:
    """The same function, whose stream is `change` (m, n) times that of `model` (n,): the rows or the columns of
    `change` are orthonormal, all sum to zero, and what of the stream lies outside of the rows is dropped."""
    other = LowRankViTForImageClassification(with_hidden_size(model.config, len(change))).eval()
    _restate_embeddings(model, other, change)
    pairs: Any = zip(model.vit.blocks, other.vit.blocks, strict=True)
    for theirs, ours in pairs:
        attention, mlp = ours.attention, ours.mlp
        for their_writer, our_writer in zip(_writers(theirs), _writers(ours), strict=True):
            _map_outputs(their_writer, our_writer, change)
        _map_inputs(theirs.attention_norm, theirs.attention.query, attention.query, change)
        shift = _map_inputs(theirs.attention_norm, theirs.attention.key_value, attention.key_value, change)
        # A softmax does not see what is the same for all keys, and attention rows, which sum to one, keep it of values.
        _add_to_bias(attention.output, attention.output, shift[sum(attention.query_key_ranks) :])
        _map_inputs(theirs.mlp_norm, _reader(theirs.mlp.up), _reader(mlp.up), change)
        if isinstance(mlp.up, InterpolativeLinear):
            mlp.up.rest.load_state_dict(theirs.mlp.up.rest.state_dict())
        if mlp.bypass is not None:
            shift = _map_inputs(theirs.mlp_norm, theirs.mlp.bypass.reduce, mlp.bypass.reduce, change)
            _add_to_bias(mlp.down, mlp.bypass.expand, shift)
    heads: Any = zip(_heads(model), _heads(other), strict=True)
    for their_head, our_head in heads:
        _map_inputs(model.vit.norm, their_head, our_head, change)
    return nn.Module.to(other, model.device)


def _restate_embeddings(
    model: LowRankViTForImageClassification, other: LowRankViTForImageClassification, change: Tensor
) -> None:
    """What the embeddings put into the stream; the first of two factors stays as it is."""
    theirs, ours = (projection_factors(one.vit.embeddings) for one in (model, other))
    _map_outputs(theirs[-1], ours[-1], change)
    for their_tokens, our_tokens in zip(_tokens(model), _tokens(other), strict=True):
        our_tokens.copy_(their_tokens.cpu().double() @ change.mT)
    if len(theirs) > 1:
        ours[0].weight.copy_(theirs[0].weight)
    if model.vit.embeddings.position_basis is not None:
        other.vit.embeddings.position_embeddings.copy_(model.vit.embeddings.position_embeddings)


def _map_outputs(source: Any, target: Any, change: Tensor) -> None:
    """change · (W x + b) of a linear map or a convolution W, whose bias may be missing."""
    target.weight.copy_((change @ source.weight.cpu().double().flatten(1)).unflatten(1, source.weight.shape[1:]))
    if source.bias is not None:
        target.bias.copy_(change @ source.bias.cpu().double())


def _map_inputs(norm: nn.LayerNorm, source: nn.Linear, target: nn.Linear, change: Tensor) -> Tensor:
    """The linear map behind a layer norm that is left without scale and shift. What the shift did to the outputs is
    returned; it becomes the bias, but of a map that has none it is the caller's to add somewhere."""
    weight, scale = source.weight.cpu().double(), (change.shape[1] / change.shape[0]) ** 0.5
    target.weight.copy_(scale * (weight * norm.weight.cpu().double()) @ change.mT)
    shift = weight @ norm.bias.cpu().double()
    if target.bias is not None:
        target.bias.copy_(shift if source.bias is None else source.bias.cpu().double() + shift)
    return shift


def _add_to_bias(target: nn.Linear, linear: nn.Linear, inputs: Tensor) -> None:
    """What `linear` makes of inputs that never change."""
    target.bias.copy_(target.bias.double() + linear.weight.double() @ inputs)


def _reader(up: Any) -> nn.Linear:
    """Of an up weight, what reads the stream."""
    return up.read if isinstance(up, InterpolativeLinear) else up


def _writers(block: Any) -> Iterator[nn.Linear]:
    """The linear maps whose outputs are added to the stream."""
    yield from (block.attention.output, block.mlp.down)
    if block.mlp.bypass is not None:
        yield block.mlp.bypass.expand


def _heads(model: LowRankViTForImageClassification) -> list[nn.Module]:
    return [head for head in (model.classifier, model.distillation_classifier) if head is not None]


def _tokens(model: LowRankViTForImageClassification) -> list[Tensor]:
    """Parameters of the embeddings whose last axis is that of the stream."""
    embeddings = model.vit.embeddings
    places = embeddings.position_embeddings if embeddings.position_basis is None else embeddings.position_basis
    return [*prefix_tokens(embeddings), places]
