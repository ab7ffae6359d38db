"""Configuration of a Vision Transformer whose layers have ranks and widths of their own."""

from __future__ import annotations

from typing import Any

from transformers.configuration_utils import PretrainedConfig

FORMAT_VERSION = 3
# The weights of a block that can be a product of two; queries, keys and values then share one.
FACTORABLE = ("query_key_value", "output", "up", "down")
# The pieces of the embeddings that can: the projection of the patches, and the position embeddings.
FACTORABLE_EMBEDDINGS = ("projection", "positions")
# Far above any real model. What is larger is damage or an attack, and refused before anything of that size is made.
LARGEST = {
    "hidden_size": 100_000,
    "num_hidden_layers": 1_000,
    "num_attention_heads": 1_000,
    "intermediate_size": 1_000_000,
    "num_channels": 10_000,
}
LARGEST_IMAGE = 100_000
MOST_LABELS = 10_000_000
MOST_PARAMETERS = 10**11


class LowRankViTConfig(PretrainedConfig):
    """A ViT/DeiT configuration plus the rank plan; it alone rebuilds every tensor shape.

    Args:
        query_key_ranks: per layer and head, the inner size of the query-key product (the dense head size at full rank).
        value_output_ranks: per layer and head, the inner size of the value-output product; a head may have none left.
        mlp_widths: per layer, the number of hidden units of the MLP.
        factor_ranks: per layer, the ranks of the weights stored as a product of two, by name (`FACTORABLE`); a weight
            that is not named is whole.
        up_ranks: per layer, how many of the MLP's hidden units read its input, the others being read from those
            (`InterpolativeLinear`); 0 where all of them do.
        bypass_ranks: per layer, the rank of a low-rank map beside the MLP, from its input to its output; 0 for none.
        embedding_ranks: the ranks of the pieces of the embeddings stored as a product of two, by name
            (`FACTORABLE_EMBEDDINGS`); one that is not named is whole.
        output_pivots: per layer, for how many entries of the stream the output weights of the heads are an identity,
            which is not stored (`PivotedLinear`); 0 for none.
        projection_pivots: the same for the second factor of the projection of the patches.
        layer_norm_affine: whether layer norms have a scale and a shift of their own.
        dense_hidden_size: hidden size of the dense model, where `hidden_size` is smaller; else the same.
        use_distillation_token: a second prefix token, as in DeiT.
        use_distillation_head: a second classifier that reads the distillation token; the logits are averaged.
        format_version: layout of the parameters; a newer one than this code knows is refused.
        The other arguments are those of transformers' `ViTConfig`. Ranks and widths left out mean the dense ones.

    Raises:
        ValueError: a size is no whole number or absurdly large, the plan does not fit the dense fields, or
            `format_version` is newer than this code.
    """

    model_type = "lowrank_vit"

    def __init__(
        self,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        hidden_act: str = "gelu",
        hidden_dropout_prob: float = 0.0,
        attention_probs_dropout_prob: float = 0.0,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-12,
        image_size: int | list[int] = 224,
        patch_size: int | list[int] = 16,
        num_channels: int = 3,
        qkv_bias: bool = True,
        use_distillation_token: bool = False,
        use_distillation_head: bool = False,
        query_key_ranks: list[list[int]] | None = None,
        value_output_ranks: list[list[int]] | None = None,
        mlp_widths: list[int] | None = None,
        factor_ranks: list[dict[str, int]] | None = None,
        up_ranks: list[int] | None = None,
        bypass_ranks: list[int] | None = None,
        embedding_ranks: dict[str, int] | None = None,
        output_pivots: list[int] | None = None,
        projection_pivots: int = 0,
        layer_norm_affine: bool = True,
        dense_hidden_size: int | None = None,
        format_version: int = FORMAT_VERSION,
        **kwargs: Any,
    ):
        self.hidden_size = hidden_size
        self.dense_hidden_size = hidden_size if dense_hidden_size is None else dense_hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        self.image_size = image_size
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.qkv_bias = qkv_bias
        self.use_distillation_token = use_distillation_token
        self.use_distillation_head = use_distillation_head
        self.format_version = format_version
        self._check_sizes(kwargs)
        dense_ranks = [[hidden_size // num_attention_heads] * num_attention_heads for _ in range(num_hidden_layers)]
        self.query_key_ranks = dense_ranks if query_key_ranks is None else query_key_ranks
        self.value_output_ranks = dense_ranks if value_output_ranks is None else value_output_ranks
        self.mlp_widths = [intermediate_size] * num_hidden_layers if mlp_widths is None else mlp_widths
        self.factor_ranks = [{} for _ in range(num_hidden_layers)] if factor_ranks is None else factor_ranks
        self.up_ranks = [0] * num_hidden_layers if up_ranks is None else up_ranks
        self.bypass_ranks = [0] * num_hidden_layers if bypass_ranks is None else bypass_ranks
        self.embedding_ranks = {} if embedding_ranks is None else embedding_ranks
        self.output_pivots = [0] * num_hidden_layers if output_pivots is None else output_pivots
        self.projection_pivots = projection_pivots
        self.layer_norm_affine = layer_norm_affine
        self._check()
        self._check_total(kwargs)
        super().__init__(**kwargs)

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens in front of the patches: the class token and, for DeiT, the distillation token."""
        return 2 if self.use_distillation_token else 1

    @property
    def num_tokens_read(self) -> int:
        """Tokens that the classifier reads: the class token, and the distillation token where it has a head."""
        return 2 if self.use_distillation_head else 1

    def _check_sizes(self, labels: dict[str, Any]) -> None:
        if not _is_count(self.format_version, 1):
            raise ValueError(f"format_version must be a whole number from 1, not {self.format_version!r}.")
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"This checkpoint has format_version {self.format_version}, but the code knows only up to "
                f"{FORMAT_VERSION}: load it with the .py files of its own folder, or upgrade hf-vit-lowrank."
            )
        for name, largest in LARGEST.items():
            if not _is_count(getattr(self, name), 1, largest):
                raise ValueError(f"{name} must be a whole number from 1 to {largest}, not {getattr(self, name)!r}.")
        if not _is_count(self.dense_hidden_size, self.hidden_size, LARGEST["hidden_size"]):
            raise ValueError(
                f"dense_hidden_size must be a whole number from hidden_size, {self.hidden_size}, to "
                f"{LARGEST['hidden_size']}, not {self.dense_hidden_size!r}."
            )
        for name in ("image_size", "patch_size"):
            sides = _sides(getattr(self, name))
            if len(sides) != 2 or not all(_is_count(side, 1, LARGEST_IMAGE) for side in sides):
                raise ValueError(
                    f"{name} must be one or two whole numbers from 1 to {LARGEST_IMAGE}, not {getattr(self, name)!r}."
                )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "layer_norm_eps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be a number from 0, not {value!r}.")
        if not isinstance(self.hidden_act, str):
            raise ValueError(f"hidden_act must be a name, not {self.hidden_act!r}.")
        if labels.get("num_labels") is not None and not _is_count(labels["num_labels"], 0, MOST_LABELS):
            raise ValueError(f"num_labels must be a whole number up to {MOST_LABELS}, not {labels['num_labels']!r}.")
        if labels.get("id2label") is not None and not isinstance(labels["id2label"], dict):
            raise ValueError("id2label must map numbers to names.")

    def _check(self) -> None:
        if self.use_distillation_head and not self.use_distillation_token:
            raise ValueError("use_distillation_head needs use_distillation_token.")
        for name in ("query_key_ranks", "value_output_ranks"):
            ranks = getattr(self, name)
            shape = (self.num_hidden_layers, self.num_attention_heads)
            if not _is_list(ranks, shape[0]) or not all(_is_list(layer, shape[1]) for layer in ranks):
                raise ValueError(
                    f"{name} must hold {self.num_hidden_layers} lists (layers) of {self.num_attention_heads} ranks "
                    "(heads)."
                )
            if any(not _is_count(rank, 0, self.dense_hidden_size) for layer in ranks for rank in layer):
                raise ValueError(f"{name} must be whole numbers from 0 to {self.dense_hidden_size}.")
            if any(sum(layer) == 0 for layer in ranks):
                raise ValueError(f"{name} must leave at least one rank in each layer.")
        if not _is_list(self.mlp_widths, self.num_hidden_layers):
            raise ValueError(f"mlp_widths must hold {self.num_hidden_layers} numbers, one per layer.")
        if any(not _is_count(width, 1, self.intermediate_size) for width in self.mlp_widths):
            raise ValueError(f"mlp_widths must be whole numbers from 1 to {self.intermediate_size}.")
        self._check_factors()

    def _check_factors(self) -> None:
        if not _is_list(self.factor_ranks, self.num_hidden_layers):
            raise ValueError(f"factor_ranks must hold {self.num_hidden_layers} dictionaries, one per layer.")
        for ranks in self.factor_ranks:
            self._check_named_ranks("factor_ranks", ranks, FACTORABLE)
        self._check_named_ranks("embedding_ranks", self.embedding_ranks, FACTORABLE_EMBEDDINGS)
        if not _is_list(self.bypass_ranks, self.num_hidden_layers):
            raise ValueError(f"bypass_ranks must hold {self.num_hidden_layers} numbers, one per layer.")
        if any(not _is_count(rank, 0, self.hidden_size) for rank in self.bypass_ranks):
            raise ValueError(f"bypass_ranks must be whole numbers from 0 to {self.hidden_size}.")
        if not _is_list(self.up_ranks, self.num_hidden_layers):
            raise ValueError(f"up_ranks must hold {self.num_hidden_layers} numbers, one per layer.")
        for rank, width, factors in zip(self.up_ranks, self.mlp_widths, self.factor_ranks):  # noqa: B905
            largest = 0 if "up" in factors else min(width - 1, self.hidden_size)
            if not _is_count(rank, 0, largest):
                raise ValueError(
                    f"up_ranks must be whole numbers up to hidden_size and below the layer's width, not {rank!r}; 0 "
                    "where the up weight is a product of two."
                )
        self._check_pivots()

    def _check_pivots(self) -> None:
        if not isinstance(self.layer_norm_affine, bool):
            raise ValueError(f"layer_norm_affine must be true or false, not {self.layer_norm_affine!r}.")
        if not _is_list(self.output_pivots, self.num_hidden_layers):
            raise ValueError(f"output_pivots must hold {self.num_hidden_layers} numbers, one per layer.")
        for pivots, heads, factors in zip(  # noqa: B905  (as in the modeling file)
            self.output_pivots, self.value_output_ranks, self.factor_ranks
        ):
            if not _is_count(pivots, 0, 0 if "output" in factors else min(*heads, self.hidden_size - 1)):
                raise ValueError(
                    f"output_pivots must be whole numbers up to the smallest rank of a layer's heads, not {pivots!r}; "
                    "0 where the output weight is a product of two."
                )
        largest = min(self.embedding_ranks.get("projection", 0), self.hidden_size - 1)
        if not _is_count(self.projection_pivots, 0, largest):
            raise ValueError(
                f"projection_pivots must be a whole number up to {largest}, not {self.projection_pivots!r}."
            )

    def _check_named_ranks(self, field: str, ranks: Any, names: tuple[str, ...]) -> None:
        if not isinstance(ranks, dict) or not set(ranks) <= set(names):
            raise ValueError(f"{field} must map names among {', '.join(names)} to ranks, not {ranks!r}.")
        if any(not _is_count(rank, 1, self.hidden_size) for rank in ranks.values()):
            raise ValueError(f"{field} must be whole numbers from 1 to {self.hidden_size}.")

    def _check_total(self, labels: dict[str, Any]) -> None:
        height, width = _sides(self.image_size)
        patch_height, patch_width = _sides(self.patch_size)
        tokens = self.num_prefix_tokens + (height // patch_height) * (width // patch_width)
        inner = sum(map(sum, self.query_key_ranks)) + sum(map(sum, self.value_output_ranks))
        inner += sum(self.mlp_widths) + sum(self.bypass_ranks) + self.hidden_size * sum(map(len, self.factor_ranks))
        ends = self.num_channels * patch_height * patch_width + len(labels.get("id2label") or ())
        ends += 2 * (labels.get("num_labels") or 0)
        if self.hidden_size * (tokens + ends + 2 * inner) > MOST_PARAMETERS:
            raise ValueError(f"These sizes make more than {MOST_PARAMETERS:,} parameters, which no such model has.")


def _is_list(value: Any, length: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == length


def _sides(size: Any) -> list[Any]:
    return list(size) if isinstance(size, (list, tuple)) else [size, size]


def _is_count(value: Any, smallest: int, largest: float = float("inf")) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and smallest <= value <= largest
