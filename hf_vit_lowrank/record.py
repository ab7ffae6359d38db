"""What a compression writes down about itself; it becomes compression.json and the card."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .candidates.block import BlockCandidates
from .dense import DenseSource, matched_parameters
from .evaluation import count_flops, count_parameters
from .model_card import without_folders
from .plan_costs import plan_cost
from .rank_plan import RankPlan, curve_records, stored
from .recipe import CompressionRecipe
from .remote.configuration_lowrank_vit import LowRankViTConfig
from .remote.modeling_lowrank_vit import LowRankViTForImageClassification


def compression_record(
    dense: DenseSource, calibration: dict[str, Any], recipe: CompressionRecipe, size: dict[str, Any]
) -> dict[str, Any]:
    """calibration: what `Calibrated.calibration` says. size: see `planned_size` and `built_size`."""
    return {
        "source": {**source_record(dense), "parameters": dense.parameters, "card": dense.card},
        "recipe": recipe.to_dict(),
        "calibration": calibration,
        "num_channels": dense.config.num_channels,
        "dense_parameters": dense.parameters,
        "dense_flops": plan_cost(dense.config, "flops", recipe.native),
        "remote_code": not recipe.native,
        **size,
        "reduction": 1 - size["parameters"] / dense.parameters,
        "versions": versions(),
    }


def published(record: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint tells: no times, for the same recipe must give the same bytes, no folders of this machine.

    A recipe that matches a model in a folder becomes one with its number of parameters.
    """
    kept = {name: value for name, value in record.items() if name != "seconds"}
    match = kept["recipe"]["match"]
    if match is not None and Path(match).exists():
        kept["recipe"] = {**kept["recipe"], "match": None, "max_parameters": matched_parameters(match)}
    return kept | {name: without_folders(kept[name]) for name in ("source", "calibration") if name in kept}


def json_number(value: float) -> float | None:
    """JSON has no number for what is not finite, as a divergence is where training was too fast."""
    return value if math.isfinite(value) else None


def source_record(dense: DenseSource) -> dict[str, Any]:
    """Where the dense model is from, and the hash of its weights."""
    return {"location": dense.location, "revision": dense.revision, "weights_sha256": dense.weights_sha256}


def versions() -> dict[str, str]:
    """Of what the result depends on."""
    return {name: version(name) for name in ("hf-vit-lowrank", "torch", "transformers")}


def planned_size(
    dense: DenseSource, candidates: Sequence[BlockCandidates], recipe: CompressionRecipe, ranks: RankPlan
) -> dict[str, Any]:
    """Of a plan of this package's own method, and the curves it was chosen from."""
    config = stored(ranks.apply(dense.model.config), recipe.native)
    return {
        "plan": _inner_sizes(config),
        "parameters": plan_cost(config, "parameters", recipe.native),
        "flops": plan_cost(config, "flops", recipe.native),
        "predicted_loss": ranks.predicted_loss,
        "moment_ranks": [block.moment_ranks for block in candidates],
        "error_curves": curve_records(candidates, recipe.query_key_weight, recipe.rank_multiple, ranks),
    }


def built_size(model: LowRankViTForImageClassification) -> dict[str, Any]:
    """Of a model that another method made."""
    return {
        "plan": _inner_sizes(model.config),
        "parameters": count_parameters(model),
        "flops": count_flops(model),
        "predicted_loss": None,
    }


def _inner_sizes(config: LowRankViTConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.hidden_size,
        "dense_hidden_size": config.dense_hidden_size,
        "query_key_ranks": config.query_key_ranks,
        "value_output_ranks": config.value_output_ranks,
        "mlp_widths": config.mlp_widths,
        "factor_ranks": config.factor_ranks,
        "up_ranks": config.up_ranks,
        "bypass_ranks": config.bypass_ranks,
        "embedding_ranks": config.embedding_ranks,
        "output_pivots": config.output_pivots,
        "projection_pivots": config.projection_pivots,
    }
