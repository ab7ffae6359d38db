"""transformers' ViT and DeiT classifiers in this package's own layout, at full rank, and back.

The only file that knows the module names of transformers, of 4.x and of 5.x. Everything after it works on
`LowRankViTForImageClassification`, whether it is still at full rank or already smaller.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from .errors import UserError
from .remote.configuration_lowrank_vit import LowRankViTConfig
from .remote.modeling_lowrank_vit import LowRankViTForImageClassification

# Name of a part inside a block: in transformers 5, in transformers 4.
_BLOCK_NAMES = {
    "attention_norm": ("layernorm_before", "layernorm_before"),
    "mlp_norm": ("layernorm_after", "layernorm_after"),
    "query": ("attention.q_proj", "attention.attention.query"),
    "key": ("attention.k_proj", "attention.attention.key"),
    "value": ("attention.v_proj", "attention.attention.value"),
    "output": ("attention.o_proj", "attention.output.dense"),
    "up": ("mlp.fc1", "intermediate.dense"),
    "down": ("mlp.fc2", "output.dense"),
}
_LAYER_PREFIXES = ("layers", "encoder.layer")
# Fields that our configuration shares with transformers' ViTConfig and DeiTConfig.
SHARED_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "layer_norm_eps",
    "image_size",
    "patch_size",
    "num_channels",
    "qkv_bias",
    "problem_type",
)


def from_transformers(dense: PreTrainedModel) -> LowRankViTForImageClassification:
    """The same function in this package's layout, at full rank, in float32 and eval mode.

    Exact but for rounding: the score scale 1/sqrt(head size) moves into the query, the key bias vanishes in the softmax
    over keys, and the value bias moves through the output weight into the output bias, since attention rows sum to one.
    """
    state = {name: tensor.detach().float() for name, tensor in dense.state_dict().items()}
    prefix = dense.base_model_prefix + "."
    config = _full_rank_config(dense, f"{prefix}embeddings.distillation_token" in state)
    model = LowRankViTForImageClassification(config)
    converted = _embeddings_and_heads(state, prefix)
    for layer in range(config.num_hidden_layers):
        converted.update(_block(state, prefix, layer, dense.config))
    model.load_state_dict(converted)
    return model.eval()


def to_transformers(model: LowRankViTForImageClassification) -> PreTrainedModel:
    """The way back: the same function as transformers' own classifier, in float32 and eval mode.

    Exact but for rounding: the query weights lose the score scale 1/sqrt(head size), which transformers has outside,
    and biases that were folded away become zeros. A model with a distillation token becomes a DeiT, any other a ViT.

    Raises:
        UserError: the plan is not uniform (see `why_not_uniform`), or this transformers has no heads of that size.
    """
    config = model.config
    why_not = why_not_uniform(config)
    if why_not:
        raise UserError(f"transformers has no class for this model: {why_not}.")
    dense = _empty_transformers(config)
    state = {name: tensor.detach().float().cpu() for name, tensor in model.state_dict().items()}
    target, prefix = dense.state_dict(), dense.base_model_prefix + "."
    converted = {
        theirs + suffix: state[ours + suffix]
        for theirs, ours in _outer_names(prefix).items()
        for suffix in ("", ".weight", ".bias")
        if theirs + suffix in target
    }
    for layer in range(config.num_hidden_layers):
        converted.update(_block_back(state, target, prefix, layer, config))
    dense.load_state_dict(converted)
    return dense.eval()


def why_not_uniform(config: LowRankViTConfig) -> str | None:
    """What keeps a plan out of transformers' own classes, which have one head size (for queries, keys and values of all
    blocks), one MLP width, whole weights and no bypass; None where nothing does."""
    if config.embedding_ranks:
        return f"the {min(config.embedding_ranks)} of its embeddings is a product of two"
    for layer, (factors, bypass) in enumerate(zip(config.factor_ranks, config.bypass_ranks, strict=True)):
        if factors:
            return f"weight '{min(factors)}' of block {layer} is a product of two"
        if bypass:
            return f"block {layer} has a low-rank bypass around its MLP"
    if config.hidden_size % config.num_attention_heads:
        return f"its stream of {config.hidden_size} entries is no multiple of its {config.num_attention_heads} heads"
    sizes = {rank for layer in (*config.query_key_ranks, *config.value_output_ranks) for rank in layer}
    if len(sizes) > 1:
        return f"its heads have different ranks, from {min(sizes)} to {max(sizes)}"
    if len(set(config.mlp_widths)) > 1:
        return f"its MLPs have different widths, from {min(config.mlp_widths)} to {max(config.mlp_widths)}"
    return None


def require_free_head_sizes(who_needs: str) -> None:
    """Raises UserError where transformers' own classes know one head size for a width alone."""
    if int(transformers.__version__.split(".")[0]) < 5:
        raise UserError(f"{who_needs} transformers 5.5 or newer, and this is {transformers.__version__}.")


def _empty_transformers(config: LowRankViTConfig) -> PreTrainedModel:
    kind = "DeiT" if config.use_distillation_token else "ViT"
    head = "ForImageClassificationWithTeacher" if config.use_distillation_head else "ForImageClassification"
    fields = {name: getattr(config, name) for name in SHARED_FIELDS}
    fields |= {"intermediate_size": config.mlp_widths[0], "id2label": config.id2label, "label2id": config.label2id}
    head_size = config.query_key_ranks[0][0]
    if head_size != config.hidden_size // config.num_attention_heads:
        require_free_head_sizes(
            f"{config.num_attention_heads} heads of size {head_size} in a model of width {config.hidden_size} need"
        )
        fields["head_dim"] = head_size
    return getattr(transformers, kind + head)(getattr(transformers, f"{kind}Config")(**fields))


def _full_rank_config(dense: PreTrainedModel, distilled: bool) -> LowRankViTConfig:
    source = dense.config
    head_size = _head_size(source)
    fields = {name: getattr(source, name) for name in SHARED_FIELDS}
    ranks = [[head_size] * source.num_attention_heads for _ in range(source.num_hidden_layers)]
    return LowRankViTConfig(
        **fields,
        id2label=source.id2label,
        label2id=source.label2id,
        use_distillation_token=distilled,
        use_distillation_head=type(dense).__name__.endswith("WithTeacher"),
        query_key_ranks=ranks,
        value_output_ranks=[list(layer) for layer in ranks],
    )


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _outer_names(prefix: str) -> dict[str, str]:
    """Their names and ours of everything outside the blocks."""
    return {
        f"{prefix}embeddings.cls_token": "vit.embeddings.cls_token",
        f"{prefix}embeddings.distillation_token": "vit.embeddings.distillation_token",
        f"{prefix}embeddings.position_embeddings": "vit.embeddings.position_embeddings",
        f"{prefix}embeddings.patch_embeddings.projection": "vit.embeddings.projection",
        f"{prefix}layernorm": "vit.norm",
        "classifier": "classifier",
        "cls_classifier": "classifier",
        "distillation_classifier": "distillation_classifier",
    }


def _embeddings_and_heads(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    converted = {}
    for theirs, ours in _outer_names(prefix).items():
        for suffix in ("", ".weight", ".bias"):
            if theirs + suffix in state:
                converted[ours + suffix] = state[theirs + suffix]
    return converted


def _block(state: dict[str, torch.Tensor], prefix: str, layer: int, config: Any) -> dict[str, torch.Tensor]:
    def read(part: str, kind: str) -> torch.Tensor | None:
        for layers, name in zip(_LAYER_PREFIXES, _BLOCK_NAMES[part], strict=True):
            tensor = state.get(f"{prefix}{layers}.{layer}.{name}.{kind}")
            if tensor is not None:
                return tensor
        return None

    def weight(part: str) -> torch.Tensor:
        tensor = read(part, "weight")
        if tensor is None:
            raise UserError(f"Block {layer} has no weight '{part}': this transformers release names it in a new way.")
        return tensor

    scale = _head_size(config) ** -0.5
    output_bias, value_bias = read("output", "bias"), read("value", "bias")
    if output_bias is not None and value_bias is not None:
        output_bias = output_bias + weight("output") @ value_bias
    block = {
        "attention.query.weight": weight("query") * scale,
        "attention.key_value.weight": torch.cat((weight("key"), weight("value"))),
        "attention.output.weight": weight("output"),
        "attention.output.bias": output_bias,
    }
    query_bias = read("query", "bias")
    if query_bias is not None:
        block["attention.query.bias"] = query_bias * scale
    for ours, part in (
        ("attention_norm", "attention_norm"),
        ("mlp_norm", "mlp_norm"),
        ("mlp.up", "up"),
        ("mlp.down", "down"),
    ):
        block[f"{ours}.weight"], block[f"{ours}.bias"] = weight(part), read(part, "bias")
    return {f"vit.blocks.{layer}.{name}": tensor for name, tensor in block.items()}


def _block_back(
    state: dict[str, torch.Tensor],
    target: dict[str, torch.Tensor],
    prefix: str,
    layer: int,
    config: LowRankViTConfig,
) -> dict[str, torch.Tensor]:
    own = f"vit.blocks.{layer}."
    key, value = state[own + "attention.key_value.weight"].chunk(2)
    scale = config.query_key_ranks[layer][0] ** 0.5
    parts = {"query.weight": state[own + "attention.query.weight"] * scale, "key.weight": key, "value.weight": value}
    if config.qkv_bias:
        zeros = key.new_zeros(len(key))
        parts |= {"query.bias": state[own + "attention.query.bias"] * scale, "key.bias": zeros, "value.bias": zeros}
    for part, ours in (
        ("attention_norm", "attention_norm"),
        ("mlp_norm", "mlp_norm"),
        ("output", "attention.output"),
        ("up", "mlp.up"),
        ("down", "mlp.down"),
    ):
        parts |= {f"{part}.{kind}": state[f"{own}{ours}.{kind}"] for kind in ("weight", "bias")}
    converted = {}
    for name, tensor in parts.items():
        part, kind = name.split(".")
        for layers, theirs in zip(_LAYER_PREFIXES, _BLOCK_NAMES[part], strict=True):
            if f"{prefix}{layers}.{layer}.{theirs}.{kind}" in target:
                converted[f"{prefix}{layers}.{layer}.{theirs}.{kind}"] = tensor
    return converted
