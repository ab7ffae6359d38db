"""Other methods, built on the same images and budget and written to the same checkpoint format."""

from __future__ import annotations

from collections.abc import Callable

from ..plan_costs import plan_cost
from ..remote.modeling_lowrank_vit import LowRankViTForImageClassification
from . import corp, factored, flar_svd, modegpt, paper, pruning
from .inputs import PresetInputs
from .pair_form import sparse_config

# A model, in eval mode, with at most so many parameters. Raises UserError where that cannot be reached.
Preset = Callable[[PresetInputs, int], LowRankViTForImageClassification]

PRESETS: dict[str, Preset] = {
    "paper": paper.paper,
    "svd": factored.svd,
    "fwsvd": factored.fwsvd,
    "asvd": factored.asvd,
    "svd-llm": factored.svd_llm,
    "svd-llm-blockwise": factored.svd_llm_blockwise,
    "afm": factored.afm,
    "kfac-svd": factored.kfac_svd,
    "flar-svd": flar_svd.flar_svd,
    "corp": corp.corp,
    "modegpt": modegpt.modegpt,
    "magnitude": pruning.magnitude,
    "taylor": pruning.taylor,
}


def smallest_parameters(preset: str, dense: LowRankViTForImageClassification) -> int:
    """The smallest size that a preset can make of a model, by its configuration alone."""
    if preset == "paper":
        return paper.smallest_paper(dense)
    if preset in ("corp", "modegpt", "magnitude", "taylor"):
        everything = [1.0] * dense.config.num_hidden_layers
        return plan_cost(sparse_config(dense.config, everything, value_output=preset != "corp"), "parameters")
    return factored.smallest_factored(dense)
