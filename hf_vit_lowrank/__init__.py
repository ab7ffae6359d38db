"""Smaller Vision Transformers for the Hugging Face Hub: ranks chosen by what the activations need."""

from __future__ import annotations

import sys
from pathlib import Path

__version__ = "0.1.0"

# The command line imports what a command needs: help, completion and a mistyped option need not wait for torch. While
# Python looks for the module that `python -m` is to run, "-m" stands in the place of its name.
_program = Path(sys.argv[0]).name.removesuffix(".exe") if sys.argv else ""
if _program not in ("hf-vit-lowrank", "-m"):
    from . import auto_classes  # noqa: F401
    from .compress import CompressionResult, compress
    from .recipe import CompressionRecipe
    from .remote.configuration_lowrank_vit import LowRankViTConfig
    from .remote.modeling_lowrank_vit import LowRankViTForImageClassification, LowRankViTModel

__all__ = [
    "CompressionRecipe",
    "CompressionResult",
    "LowRankViTConfig",
    "LowRankViTForImageClassification",
    "LowRankViTModel",
    "compress",
]
