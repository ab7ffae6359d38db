"""A Vision Transformer whose heads have ranks, and whose MLPs have widths, of their own.

Attention multiplies its weights in pairs: scores are products of a query and a key, and a head adds the product of a
value and an output weight. Only the inner size of a pair (its rank) is smaller than in the dense ViT, so the arithmetic
shrinks with the parameters and no extra matrix product appears. Heads of one layer may differ in rank: their factors
are stored side by side without padding, and padded only where the attention kernel wants one size. Besides, any single
weight, that of the patches and the position embeddings included, may be a product of two low-rank ones, and an MLP may
have a low-rank map beside it. The basis inside of a product is free, so that a part of it can be an identity, which is
not stored (`PivotedLinear`, `InterpolativeLinear`).

This file is copied into every checkpoint. It needs nothing but torch and transformers.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import PreTrainedModel

from .configuration_lowrank_vit import LowRankViTConfig

# A processor takes longer to prepare one head's product in half precision for fewer images than to compute it.
FEW_IMAGES = 8


@dataclass
class LowRankViTImageClassifierOutput(ImageClassifierOutput):
    """As `ImageClassifierOutput`, with the two heads' logits of a distilled DeiT, each (batch, labels)."""

    cls_logits: torch.Tensor | None = None
    distillation_logits: torch.Tensor | None = None


def pair(size: Any) -> tuple[int, int]:
    """(height, width) of a size that a configuration gives as one number or as two."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


class LowRankViTEmbeddings(nn.Module):
    """Pixels (batch, channels, height, width) to tokens (batch, prefix + patches, hidden)."""

    def __init__(self, config: LowRankViTConfig):
        super().__init__()
        self.image_size, self.patch_size = pair(config.image_size), pair(config.patch_size)
        self.num_channels = config.num_channels
        self.grid = (self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1])
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.distillation_token = (
            nn.Parameter(torch.zeros(1, 1, config.hidden_size)) if config.use_distillation_token else None
        )
        num_positions = config.num_prefix_tokens + self.grid[0] * self.grid[1]
        rank = config.embedding_ranks.get("positions")
        self.position_embeddings = nn.Parameter(torch.zeros(1, num_positions, rank or config.hidden_size))
        # No linear map, which quantisers and adapters would take for one of the model's.
        self.position_basis = nn.Parameter(torch.zeros(rank, config.hidden_size)) if rank else None
        rank, pivots = config.embedding_ranks.get("projection"), config.projection_pivots
        self.projection = self._projection(config, rank)
        self.expand = PivotedLinear([rank], config.hidden_size, pivots) if rank and pivots else None
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.num_prefix_tokens = config.num_prefix_tokens

    def _projection(self, config: LowRankViTConfig, rank: int | None) -> nn.Module:
        channels, hidden, size = config.num_channels, config.hidden_size, self.patch_size
        if rank is None:
            return nn.Conv2d(channels, hidden, size, stride=size)
        reduce = nn.Conv2d(channels, rank, size, stride=size, bias=False)
        if config.projection_pivots:
            return reduce
        return nn.Sequential(OrderedDict(reduce=reduce, expand=nn.Conv2d(rank, hidden, kernel_size=1)))

    def positions(self, height: int, width: int) -> torch.Tensor:
        """Position embeddings for images of this size: (1, prefix + patches, hidden)."""
        same_grid = (height // self.patch_size[0], width // self.patch_size[1]) == self.grid
        positions = self.position_embeddings if same_grid else self._interpolated(height, width)
        return positions if self.position_basis is None else positions @ self.position_basis

    def _interpolated(self, height: int, width: int) -> torch.Tensor:
        """For another image size, bicubic over the patch grid, as transformers' ViT does it."""
        grid = (height // self.patch_size[0], width // self.patch_size[1])
        prefix = self.position_embeddings[:, : self.num_prefix_tokens]
        patches = self.position_embeddings[:, self.num_prefix_tokens :]
        patches = patches.reshape(1, *self.grid, -1).permute(0, 3, 1, 2)
        patches = nn.functional.interpolate(patches, size=grid, mode="bicubic", align_corners=False)
        return torch.cat((prefix, patches.flatten(2).transpose(1, 2)), dim=1)

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        batch, channels, height, width = pixel_values.shape
        if channels != self.num_channels:
            raise ValueError(f"The model takes images of {self.num_channels} channels, but got {channels}.")
        if not interpolate_pos_encoding and (height, width) != self.image_size:
            raise ValueError(
                f"The model takes images of {self.image_size[0]}x{self.image_size[1]}, but got {height}x{width}: "
                "resize them with the image processor, or pass interpolate_pos_encoding=True."
            )
        patches = self.projection(pixel_values).flatten(2).transpose(1, 2)
        if self.expand is not None:
            patches = self.expand(patches)
        prefix = [self.cls_token] if self.distillation_token is None else [self.cls_token, self.distillation_token]
        tokens = torch.cat([token.expand(batch, -1, -1) for token in prefix] + [patches], dim=1)
        return self.dropout(tokens + self.positions(height, width))


class _WithConstants(nn.Module):
    """A module with buffers that follow from its sizes. No checkpoint holds them."""

    def constants(self) -> dict[str, torch.Tensor]:
        """By the name of the buffer; none if not said otherwise."""
        return {}

    def register_constants(self, **empty: torch.Tensor) -> None:
        for name, buffer in empty.items():
            self.register_buffer(name, buffer, persistent=False)
        self.fill_constants()

    def fill_constants(self) -> None:
        """Write them: a model made on the meta device, which holds no values, gets them when it is loaded."""
        if any(buffer.is_meta for buffer in self.buffers(recurse=False)):
            return
        with torch.device("cpu"):
            for name, values in self.constants().items():
                getattr(self, name).copy_(values)

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        super()._load_from_state_dict(*arguments, **options)
        self.fill_constants()


class PivotedLinear(_WithConstants):
    """Groups of inputs side by side, (…, sum of sizes), to (…, outputs).

    Of the first `pivots` outputs, each is the sum of the groups' inputs of that number as they are; `rest` makes the
    others. The basis inside of a group being free, that is a whole linear map with fewer weights.
    """

    identity: torch.Tensor

    def __init__(self, sizes: list[int], outputs: int, pivots: int):
        super().__init__()
        self.sizes, self.pivots = sizes, pivots
        self.rest = nn.Linear(sum(sizes), outputs - pivots, bias=False)
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.register_constants(identity=torch.empty(pivots, sum(sizes)))

    def constants(self) -> dict[str, torch.Tensor]:
        return {"identity": torch.cat([torch.eye(self.pivots, size) for size in self.sizes], 1)}

    def whole_weight(self) -> torch.Tensor:
        """Of the linear map that this is: (outputs, sum of sizes)."""
        return torch.cat((self.identity, self.rest.weight))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        rest = self.rest
        if type(rest) is nn.Linear and type(rest.weight) is nn.Parameter and not rest.weight.is_meta:
            return nn.functional.linear(inputs, self.whole_weight(), self.bias)  # a fifth faster than what follows
        # A quantiser or an adapter has put something of its own in the place of `rest`, or its weight is elsewhere and
        # comes when it is called.
        groups = [group[..., : self.pivots] for group in inputs.split(self.sizes, -1)]
        return torch.cat((torch.stack(groups).sum(0), self.rest(inputs)), -1) + self.bias


class PlainNorm(_WithConstants):
    """A layer norm whose scale and shift are part of the linear maps behind it."""

    ones: torch.Tensor
    zeros: torch.Tensor

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.size, self.eps = size, eps
        self.register_constants(ones=torch.empty(size), zeros=torch.empty(size))

    def constants(self) -> dict[str, torch.Tensor]:
        return {"ones": torch.ones(self.size), "zeros": torch.zeros(self.size)}

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # A processor takes two to three times as long without them.
        return nn.functional.layer_norm(hidden_states, (self.size,), self.ones, self.zeros, self.eps)


def make_norm(config: LowRankViTConfig) -> Any:
    if config.layer_norm_affine:
        return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
    return PlainNorm(config.hidden_size, config.layer_norm_eps)


def leading(tokens: torch.Tensor, number: int | None) -> torch.Tensor:
    """The first `number` of (batch, tokens, hidden), or all without a call."""
    return tokens if number is None else tokens[:, :number]


def split_heads(states: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(batch, tokens, heads * size) to (batch, heads, tokens, size)."""
    return states.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(context: torch.Tensor) -> torch.Tensor:
    """The way back: (batch, heads, tokens, size) to (batch, tokens, heads * size)."""
    return context.transpose(1, 2).flatten(2)


def make_linear(inputs: int, outputs: int, rank: int | None, bias: bool = True) -> Any:
    """A linear map, whole (`rank` None) or as two of them, `reduce` to the rank and `expand` from it."""
    if rank is None:
        return nn.Linear(inputs, outputs, bias=bias)
    reduce, expand = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=bias)
    return nn.Sequential(OrderedDict(reduce=reduce, expand=expand))


class InterpolativeLinear(nn.Module):
    """A linear map of some rank: as many outputs are read from the inputs, and `rest` makes the others of those.

    Two factors of that rank have rank² more weights (interpolative decomposition, Cheng et al. 2005).
    """

    def __init__(self, inputs: int, outputs: int, rank: int):
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.read = nn.Linear(inputs, rank)
        self.rest = nn.Linear(rank, outputs - rank)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs = self.read(inputs)
        return torch.cat((outputs, self.rest(outputs)), dim=-1)


class LowRankViTAttention(_WithConstants):
    """Self-attention with one query-key rank and one value-output rank per head.

    The factor 1/sqrt(head size) is part of the query weights. Keys have no bias, since a softmax over keys does not see
    what is the same for all of them; values have none, since attention rows sum to one and it lives in the output bias.
    As a product of two, the weights of queries, keys and values are one, which has a bias for all three.
    """

    query_columns: torch.Tensor
    query_mask: torch.Tensor
    key_value_columns: torch.Tensor
    context_columns: torch.Tensor

    def __init__(self, config: LowRankViTConfig, layer: int):
        super().__init__()
        self.config = config
        self.query_key_ranks = list(config.query_key_ranks[layer])
        self.value_output_ranks = list(config.value_output_ranks[layer])
        self.dropout = config.attention_probs_dropout_prob
        scores_size, context_size = sum(self.query_key_ranks), sum(self.value_output_ranks)
        hidden_size, factors = config.hidden_size, config.factor_ranks[layer]
        self.is_factored = "query_key_value" in factors
        if self.is_factored:
            outputs = 2 * scores_size + context_size
            self.query_key_value = make_linear(hidden_size, outputs, factors["query_key_value"])
        else:
            self.query = nn.Linear(hidden_size, scores_size, bias=config.qkv_bias)
            self.key_value = nn.Linear(hidden_size, scores_size + context_size, bias=False)
        pivots = config.output_pivots[layer]
        if pivots:
            self.output: Any = PivotedLinear(self.value_output_ranks, hidden_size, pivots)
        else:
            self.output = make_linear(context_size, hidden_size, factors.get("output"))
        ranks = self.query_key_ranks + self.value_output_ranks
        # The fused kernels want one head size for all, a multiple of 8 on most devices.
        self.fused_size = -(-max(ranks) // 8) * 8
        self.is_padded = any(rank != self.fused_size for rank in ranks)
        if self.is_padded:
            padded = len(self.query_key_ranks) * self.fused_size
            self.register_constants(
                query_columns=torch.empty(padded, dtype=torch.long),
                query_mask=torch.empty(padded, dtype=torch.bool),
                key_value_columns=torch.empty(2 * padded, dtype=torch.long),
                context_columns=torch.empty(context_size, dtype=torch.long),
            )

    def constants(self) -> dict[str, torch.Tensor]:
        """How heads are filled up to one size, and cut again: the column that each column comes from, by buffer.

        One gather for all heads, since on a GPU every call costs more than what it does. Heads are filled up with
        columns of the next ones, which a query of zeros does not see, and which are cut off from the contexts.
        """
        if not self.is_padded:
            return {}
        heads, size, scores_size = len(self.query_key_ranks), self.fused_size, sum(self.query_key_ranks)
        ranks, places = torch.tensor(self.query_key_ranks + self.value_output_ranks), torch.arange(size)
        ends = ranks.cumsum(0)
        columns = ((ends - ranks)[:, None] + places).clamp(max=ends[-1] - 1)
        kept = places < ranks[:, None]
        return {
            "query_columns": columns[:heads].flatten().clamp(max=scores_size - 1),
            "query_mask": kept[:heads].flatten(),
            "key_value_columns": columns.flatten(),
            "context_columns": kept[heads:].flatten().nonzero().flatten(),
        }

    def forward(
        self, hidden_states: torch.Tensor, num_queries: int | None = None, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(batch, tokens, hidden) to (batch, queries, hidden); only the first `num_queries` tokens ask if given."""
        context, attention = self.context(hidden_states, num_queries, output_attentions)
        return self.output(context), attention

    def context(
        self, hidden_states: torch.Tensor, num_queries: int | None = None, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the output weight reads, the attention-averaged values: (batch, queries, sum of value-output ranks)."""
        query, key_value = self._query_and_key_value(hidden_states, num_queries)
        if self._is_fused(query.device, output_attentions):
            return self._fused(query, key_value), None
        return self._head_by_head(query, key_value, output_attentions)

    def _is_fused(self, device: torch.device, output_attentions: bool) -> bool:
        """Whether a fused kernel does it. A processor is faster head by head than with heads filled up to one size."""
        if self.config._attn_implementation != "sdpa" or output_attentions:
            return False
        return device.type != "cpu" or len({*self.query_key_ranks, *self.value_output_ranks}) == 1

    def _query_and_key_value(
        self, hidden_states: torch.Tensor, num_queries: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, queries, sum of query-key ranks), and keys and values side by side, (batch, tokens, sum of both)."""
        if not self.is_factored:
            return self.query(leading(hidden_states, num_queries)), self.key_value(hidden_states)
        scores_size, context_size = sum(self.query_key_ranks), sum(self.value_output_ranks)
        all_three = self.query_key_value(hidden_states)
        query, key_value = all_three.split([scores_size, scores_size + context_size], dim=-1)
        return leading(query, num_queries), key_value

    def _fused(self, query: torch.Tensor, key_value: torch.Tensor) -> torch.Tensor:
        if self.is_padded:
            query = query.index_select(-1, self.query_columns) * self.query_mask
            key_value = key_value.index_select(-1, self.key_value_columns)
        num_heads = len(self.query_key_ranks)
        key, value = split_heads(key_value, 2 * num_heads).chunk(2, dim=1)
        context = nn.functional.scaled_dot_product_attention(
            split_heads(query, num_heads), key, value, dropout_p=self.dropout if self.training else 0.0, scale=1.0
        )
        return merge_heads(context).index_select(-1, self.context_columns) if self.is_padded else merge_heads(context)

    def _head_by_head(
        self, query: torch.Tensor, key_value: torch.Tensor, output_attentions: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        dtype = query.dtype
        if _is_faster_in_single_precision(query):
            query, key_value = query.float(), key_value.float()
        key, value = key_value.split([sum(self.query_key_ranks), sum(self.value_output_ranks)], dim=-1)
        # Every call costs microseconds, so there are as few as can be; a softmax adds in float32 whatever it is given.
        heads = zip(  # noqa: B905  (Python 3.9, which transformers 4.57 runs on, has no `strict`)
            query.split(self.query_key_ranks, -1),
            key.transpose(1, 2).split(self.query_key_ranks, 1),
            value.split(self.value_output_ranks, -1),
        )
        contexts, attentions = [], []
        for head_query, head_key, head_value in heads:
            attention = torch.bmm(head_query, head_key).softmax(-1)
            if output_attentions:
                attentions.append(attention)
            if self.training and self.dropout:
                attention = nn.functional.dropout(attention, self.dropout)
            contexts.append(torch.bmm(attention, head_value))
        context = torch.cat(contexts, dim=-1).to(dtype)
        return context, torch.stack(attentions, dim=1).to(dtype) if output_attentions else None


def _is_faster_in_single_precision(query: torch.Tensor) -> bool:
    """Whether attention head by head is: of few images in half precision on a processor. A compiled graph, which serves
    any number of images, stays in the precision of the model."""
    is_half = query.device.type == "cpu" and query.dtype in (torch.bfloat16, torch.float16)
    return is_half and not torch.compiler.is_compiling() and len(query) < FEW_IMAGES


class LowRankViTMLP(nn.Module):
    """Two linear maps with an activation between them and, where the layer has one, a low-rank bypass beside them."""

    def __init__(self, config: LowRankViTConfig, layer: int):
        super().__init__()
        hidden_size, width, factors = config.hidden_size, config.mlp_widths[layer], config.factor_ranks[layer]
        rank = config.up_ranks[layer]
        if rank:
            self.up: Any = InterpolativeLinear(hidden_size, width, rank)
        else:
            self.up = make_linear(hidden_size, width, factors.get("up"))
        self.activation = ACT2FN[config.hidden_act]
        self.down = make_linear(width, hidden_size, factors.get("down"))
        bypass_rank = config.bypass_ranks[layer]
        self.bypass = make_linear(hidden_size, hidden_size, bypass_rank, bias=False) if bypass_rank else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        output = self.down(self.activation(self.up(hidden_states)))
        return output if self.bypass is None else output + self.bypass(hidden_states)


class LowRankViTBlock(GradientCheckpointingLayer):
    def __init__(self, config: LowRankViTConfig, layer: int):
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = LowRankViTAttention(config, layer)
        self.mlp_norm = make_norm(config)
        self.mlp = LowRankViTMLP(config, layer)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, hidden_states: torch.Tensor, num_queries: int | None = None, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        update, attention = self.attention(self.attention_norm(hidden_states), num_queries, output_attentions)
        hidden_states = leading(hidden_states, num_queries) + self.dropout(update)
        hidden_states = hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))
        return hidden_states, attention


class LowRankViTPreTrainedModel(PreTrainedModel):
    config: LowRankViTConfig
    config_class = LowRankViTConfig
    base_model_prefix = "vit"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LowRankViTEmbeddings", "LowRankViTBlock"]  # noqa: RUF012
    _supports_sdpa = True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """Eager and sdpa can be exchanged at any time; transformers would look for its own attention interface here."""
        return True

    def _init_weights(self, module: nn.Module) -> None:
        init = _initialisers()
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init.trunc_normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.zeros_(module.bias)
            init.ones_(module.weight)
        elif isinstance(module, LowRankViTEmbeddings):
            for name in ("cls_token", "distillation_token", "position_embeddings", "position_basis"):
                if (parameter := getattr(module, name)) is not None:
                    init.trunc_normal_(parameter, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, _WithConstants):
            module.fill_constants()
            if isinstance(module, PivotedLinear):
                init.zeros_(module.bias)


def _initialisers() -> Any:
    """transformers 5 has initialisers that leave loaded weights alone; 4.x calls us for missing weights only."""
    try:
        from transformers import initialization
    except ImportError:
        return nn.init
    return initialization


class LowRankViTModel(LowRankViTPreTrainedModel):
    """The encoder: pixels to the tokens after the last layer norm, (batch, tokens, hidden). It has no pooler."""

    _keys_to_ignore_on_load_unexpected = ["classifier"]  # noqa: RUF012  (a checkpoint of the whole classifier is meant)

    def __init__(self, config: LowRankViTConfig):
        super().__init__(config)
        self.embeddings = LowRankViTEmbeddings(config)
        self.blocks = nn.ModuleList([LowRankViTBlock(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = make_norm(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.projection

    def forward(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_tokens_read: int | None = None,
    ) -> BaseModelOutputWithPooling | tuple:
        """Arguments and outputs of transformers' ViT; besides:

        num_tokens_read: compute only this many leading tokens in the last block (exact, since nothing after it mixes
            tokens). Ignored where hidden states or attentions are asked for.
        """
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions or output_hidden_states:
            num_tokens_read = None
        hidden_states = self.embeddings(
            pixel_values.to(self.embeddings.cls_token.dtype), bool(interpolate_pos_encoding)
        )
        all_hidden_states, all_attentions = [hidden_states], []
        for layer, block in enumerate(self.blocks):
            num_queries = num_tokens_read if layer == len(self.blocks) - 1 else None
            hidden_states, attention = block(hidden_states, num_queries, output_attentions)
            if output_hidden_states:
                all_hidden_states.append(hidden_states)
            if output_attentions:
                all_attentions.append(attention)
        output = BaseModelOutputWithPooling(
            last_hidden_state=self.norm(hidden_states),
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
            attentions=tuple(all_attentions) if output_attentions else None,
        )
        return output if _wants_dict(return_dict, self.config) else output.to_tuple()


class LowRankViTForImageClassification(LowRankViTPreTrainedModel):
    """The encoder with a classifier on the class token and, for a distilled DeiT, one on the distillation token."""

    def __init__(self, config: LowRankViTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vit = LowRankViTModel(config)
        self.classifier = _classifier(config)
        self.distillation_classifier = _classifier(config) if config.use_distillation_head else None
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> LowRankViTImageClassifierOutput | tuple:
        """labels: (batch,) class indices or regression targets, or (batch, labels) for several labels or targets."""
        encoded = self.vit(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            num_tokens_read=self.config.num_tokens_read,
        )
        logits, cls_logits, distillation_logits = self.classify(encoded.last_hidden_state)
        output = LowRankViTImageClassifierOutput(
            loss=None if labels is None else self._loss(logits, labels),
            logits=logits,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
            cls_logits=cls_logits,
            distillation_logits=distillation_logits,
        )
        return output if _wants_dict(return_dict, self.config) else output.to_tuple()

    def classify(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Normed tokens (batch, tokens, hidden) to the logits and, with two heads, those of each: (batch, labels)."""
        cls_logits = self.classifier(tokens[:, 0])
        if self.distillation_classifier is None:
            return cls_logits, None, None
        distillation_logits = self.distillation_classifier(tokens[:, 1])
        return (cls_logits + distillation_logits) / 2, cls_logits, distillation_logits

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        labels = labels.to(logits.device)
        if self.config.problem_type is None:
            if self.num_labels == 1:
                self.config.problem_type = "regression"
            elif labels.dtype in (torch.long, torch.int):
                self.config.problem_type = "single_label_classification"
            else:
                self.config.problem_type = "multi_label_classification"
        if self.config.problem_type == "regression":
            return nn.functional.mse_loss(logits.squeeze(), labels.squeeze())
        if self.config.problem_type == "single_label_classification":
            return nn.functional.cross_entropy(logits, labels.view(-1).long())
        return nn.functional.binary_cross_entropy_with_logits(logits, labels)


def _classifier(config: Any) -> nn.Module:
    return nn.Linear(config.hidden_size, config.num_labels) if config.num_labels > 0 else nn.Identity()


def _wants_dict(return_dict: bool | None, config: Any) -> bool:
    return getattr(config, "return_dict", True) if return_dict is None else return_dict


__all__ = ["LowRankViTForImageClassification", "LowRankViTModel", "LowRankViTPreTrainedModel"]
