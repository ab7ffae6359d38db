"""Smaller Vision Transformers for the Hugging Face Hub: ranks chosen by what the activations need."""

from __future__ import annotations

import sys
from pathlib import Path

__version__ = "0.1.0"


def _is_command_line() -> bool:
    """Whether it is being started, as `hf-vit-lowrank` or as `python -m hf_vit_lowrank`.

    While Python looks for the module that -m is to run, which imports packages, "-m" stands in the place of its name.
    """
    program = Path(sys.argv[0]).name.removesuffix(".exe") if sys.argv else ""
    if program == "-m":
        return ("-m", __name__) in zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
    return program == "hf-vit-lowrank"


# The command line imports what a command needs: help, completion and a mistyped option need not wait for torch.
if not _is_command_line():
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
