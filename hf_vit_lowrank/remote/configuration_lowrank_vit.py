"""Configuration of a Vision Transformer whose layers have ranks and widths of their own."""

from __future__ import annotations

from typing import Any

from transformers.configuration_utils import PretrainedConfig

FORMAT_VERSION = 1
# The weights of a block that can be a product of two.
FACTORABLE = ("query", "key", "value", "output", "up", "down")


class LowRankViTConfig(PretrainedConfig):
    """A ViT/DeiT configuration plus the rank plan; it alone rebuilds every tensor shape.

    Args:
        query_key_ranks: per layer and head, the inner size of the query-key product (at most the dense head size).
        value_output_ranks: per layer and head, the inner size of the value-output product; a head may have none left.
        mlp_widths: per layer, the number of hidden units of the MLP.
        factor_ranks: per layer, the ranks of the weights stored as a product of two, by name (`FACTORABLE`); a weight
            that is not named is whole.
        bypass_ranks: per layer, the rank of a low-rank map beside the MLP, from its input to its output; 0 for none.
        use_distillation_token: a second prefix token, as in DeiT.
        use_distillation_head: a second classifier that reads the distillation token; the logits are averaged.
        format_version: layout of the parameters; a newer one than this code knows is refused.
        The other arguments are those of transformers' `ViTConfig`. Ranks and widths left out mean the dense ones.

    Raises:
        ValueError: the plan does not fit the dense fields, or `format_version` is newer than this code.
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
        bypass_ranks: list[int] | None = None,
        format_version: int = FORMAT_VERSION,
        **kwargs: Any,
    ):
        self.hidden_size = hidden_size
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
        dense_ranks = [[hidden_size // num_attention_heads] * num_attention_heads for _ in range(num_hidden_layers)]
        self.query_key_ranks = dense_ranks if query_key_ranks is None else query_key_ranks
        self.value_output_ranks = dense_ranks if value_output_ranks is None else value_output_ranks
        self.mlp_widths = [intermediate_size] * num_hidden_layers if mlp_widths is None else mlp_widths
        self.factor_ranks = [{} for _ in range(num_hidden_layers)] if factor_ranks is None else factor_ranks
        self.bypass_ranks = [0] * num_hidden_layers if bypass_ranks is None else bypass_ranks
        self.format_version = format_version
        self._check()
        super().__init__(**kwargs)

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens in front of the patches: the class token and, for DeiT, the distillation token."""
        return 2 if self.use_distillation_token else 1

    @property
    def num_tokens_read(self) -> int:
        """Tokens that the classifier reads: the class token, and the distillation token where it has a head."""
        return 2 if self.use_distillation_head else 1

    def _check(self) -> None:
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"This checkpoint has format_version {self.format_version}, but the code knows only up to "
                f"{FORMAT_VERSION}: load it with the .py files of its own folder, or upgrade hf-vit-lowrank."
            )
        if self.use_distillation_head and not self.use_distillation_token:
            raise ValueError("use_distillation_head needs use_distillation_token.")
        for name in ("query_key_ranks", "value_output_ranks"):
            ranks = getattr(self, name)
            if len(ranks) != self.num_hidden_layers or any(len(r) != self.num_attention_heads for r in ranks):
                raise ValueError(
                    f"{name} must hold {self.num_hidden_layers} lists (layers) of {self.num_attention_heads} ranks "
                    "(heads)."
                )
            if any(not _is_count(rank, 0, self.hidden_size) for layer in ranks for rank in layer):
                raise ValueError(f"{name} must be whole numbers from 0 to {self.hidden_size}.")
            if any(sum(layer) == 0 for layer in ranks):
                raise ValueError(f"{name} must leave at least one rank in each layer.")
        if len(self.mlp_widths) != self.num_hidden_layers:
            raise ValueError(f"mlp_widths must hold {self.num_hidden_layers} numbers, one per layer.")
        if any(not _is_count(width, 1, self.intermediate_size) for width in self.mlp_widths):
            raise ValueError(f"mlp_widths must be whole numbers from 1 to {self.intermediate_size}.")
        self._check_factors()

    def _check_factors(self) -> None:
        if len(self.factor_ranks) != self.num_hidden_layers:
            raise ValueError(f"factor_ranks must hold {self.num_hidden_layers} dictionaries, one per layer.")
        for ranks in self.factor_ranks:
            if not isinstance(ranks, dict) or not set(ranks) <= set(FACTORABLE):
                raise ValueError(f"factor_ranks must map names among {', '.join(FACTORABLE)} to ranks, not {ranks}.")
            if any(not _is_count(rank, 1, self.hidden_size) for rank in ranks.values()):
                raise ValueError(f"factor_ranks must be whole numbers from 1 to {self.hidden_size}.")
        if len(self.bypass_ranks) != self.num_hidden_layers:
            raise ValueError(f"bypass_ranks must hold {self.num_hidden_layers} numbers, one per layer.")
        if any(not _is_count(rank, 0, self.hidden_size) for rank in self.bypass_ranks):
            raise ValueError(f"bypass_ranks must be whole numbers from 0 to {self.hidden_size}.")


def _is_count(value: Any, smallest: int, largest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and smallest <= value <= largest
