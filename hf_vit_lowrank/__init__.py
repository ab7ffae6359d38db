"""Smaller Vision Transformers for the Hugging Face Hub: ranks chosen by what the activations need."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .compress import CompressionResult, compress
from .recipe import CompressionRecipe
from .remote.configuration_lowrank_vit import LowRankViTConfig
from .remote.modeling_lowrank_vit import LowRankViTForImageClassification, LowRankViTModel

__version__ = "0.1.0"

AutoConfig.register(LowRankViTConfig.model_type, LowRankViTConfig, exist_ok=True)
AutoModel.register(LowRankViTConfig, LowRankViTModel, exist_ok=True)
AutoModelForImageClassification.register(LowRankViTConfig, LowRankViTForImageClassification, exist_ok=True)
# Whoever saves a model with `save_pretrained`, Trainer among them, saves the code with it.
LowRankViTConfig.register_for_auto_class()
LowRankViTModel.register_for_auto_class("AutoModel")
LowRankViTForImageClassification.register_for_auto_class("AutoModelForImageClassification")

__all__ = [
    "CompressionRecipe",
    "CompressionResult",
    "LowRankViTConfig",
    "LowRankViTForImageClassification",
    "LowRankViTModel",
    "compress",
]
