"""What the sizes of every piece of a model cost, in parameters or FLOPs."""

from __future__ import annotations

from .candidates.block import UnitCosts
from .remote.configuration_lowrank_vit import LowRankViTConfig
from .remote.modeling_lowrank_vit import pair


def model_costs(config: LowRankViTConfig, cost: str, native: bool = False) -> tuple[list[UnitCosts], int]:
    """Cost of a unit of size in each block, and of everything else but for the two pieces in `embedding_costs`.

    In this package's layout or, with `native`, in that of transformers.
    """
    return _parameter_costs(config, native) if cost == "parameters" else _flop_costs(config, native)


def plan_cost(config: LowRankViTConfig, cost: str, native: bool = False) -> int:
    """Parameters or FLOPs of a model with the sizes of `config`; FLOPs are those of matrix products, unpadded."""
    costs, fixed = model_costs(config, cost, native)
    for name, (unit, whole) in embedding_costs(config, cost).items():
        fixed += unit * config.embedding_ranks[name] if name in config.embedding_ranks else whole
    fixed -= costs[0].pivot * config.projection_pivots * config.embedding_ranks.get("projection", 0)
    return fixed + sum(
        unit.query_key * sum(query_key)
        + (unit.value_output - unit.pivot * pivots) * sum(value_output)
        + unit.width * width
        - unit.saved_by_rank(width, up_rank, config.hidden_size)
        + unit.bypass * rank
        for unit, query_key, value_output, pivots, width, up_rank, rank in zip(
            costs,
            config.query_key_ranks,
            config.value_output_ranks,
            config.output_pivots,
            config.mlp_widths,
            config.up_ranks,
            config.bypass_ranks,
            strict=True,
        )
    )


def _parameter_costs(config: LowRankViTConfig, native: bool) -> tuple[list[UnitCosts], int]:
    hidden, layers = config.hidden_size, config.num_hidden_layers
    bias, folded = int(config.qkv_bias), int(config.qkv_bias and native)  # transformers' keys and values have biases
    unit = UnitCosts(
        2 * hidden + bias + folded, 2 * hidden + folded, 2 * hidden + 1, 2 * hidden, pivot=1, entry=int(not native)
    )
    embeddings = hidden * (config.num_prefix_tokens + 1)
    heads = config.num_tokens_read * (config.num_labels or 0) * (hidden + 1)
    biases, norms = layers * 2 * hidden, (2 * layers + 1) * 2 * hidden * config.layer_norm_affine
    return [unit] * layers, embeddings + heads + biases + norms


def _flop_costs(config: LowRankViTConfig, native: bool) -> tuple[list[UnitCosts], int]:
    hidden, tokens = config.hidden_size, num_tokens(config)

    def unit(queries: int) -> UnitCosts:
        pair = 2 * hidden * (queries + tokens) + 2 * queries * tokens
        entry = 0 if native else 2 * queries
        return UnitCosts(pair, pair, 4 * hidden * queries, 4 * hidden * queries, entry=entry)

    # Our last block computes only the tokens that the classifier reads.
    last = unit(tokens if native else config.num_tokens_read)
    units = [unit(tokens)] * (config.num_hidden_layers - 1) + [last]
    return units, 2 * hidden * config.num_tokens_read * (config.num_labels or 0)


def embedding_costs(config: LowRankViTConfig, cost: str) -> dict[str, tuple[int, int]]:
    """By name of a piece of the embeddings, what a rank of its two factors costs and what the whole piece does."""
    hidden, tokens, values = config.hidden_size, num_tokens(config), _patch_values(config)
    if cost == "parameters":
        return {"projection": (values + hidden, values * hidden), "positions": (tokens + hidden, tokens * hidden)}
    patches = tokens - config.num_prefix_tokens
    return {
        "projection": (2 * patches * (values + hidden), 2 * patches * values * hidden),
        "positions": (2 * tokens * hidden, 0),
    }


def largest_embedding_ranks(config: LowRankViTConfig, cost: str, multiple: int) -> dict[str, int]:
    """By name of a piece of the embeddings, the largest rank at which two factors cost less than the whole piece.

    Only where a multiple does, and for positions only where they have more dimensions than that (prefix tokens, which
    make the whole dearer, are no part of their factors); and not before a single block, which has no gradient of patch
    tokens to go by.
    """
    largest = {name: (whole - 1) // unit for name, (unit, whole) in embedding_costs(config, cost).items()}
    dimensions = {"positions": num_tokens(config) - config.num_prefix_tokens}
    return {
        name: rank
        for name, rank in largest.items()
        if multiple <= rank <= dimensions.get(name, rank) and config.num_hidden_layers > 1
    }


def num_tokens(config: LowRankViTConfig) -> int:
    """Patches and prefix tokens of one image."""
    height, width = pair(config.image_size)
    patch_height, patch_width = pair(config.patch_size)
    return (height // patch_height) * (width // patch_width) + config.num_prefix_tokens


def _patch_values(config: LowRankViTConfig) -> int:
    height, width = pair(config.patch_size)
    return config.num_channels * height * width
