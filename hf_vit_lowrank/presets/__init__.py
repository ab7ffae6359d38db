"""Other methods, built on the same images and budget and written to the same checkpoint format."""

from __future__ import annotations

from collections.abc import Callable

from ..remote.modeling_lowrank_vit import LowRankViTForImageClassification
from . import corp, factored, flar_svd, modegpt, paper, pruning
from .inputs import PresetInputs

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
