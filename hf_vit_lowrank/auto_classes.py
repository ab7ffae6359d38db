"""Makes transformers' Auto classes know ours: loading needs no remote code here, and saving brings the code along."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .remote.configuration_lowrank_vit import LowRankViTConfig
from .remote.modeling_lowrank_vit import LowRankViTForImageClassification, LowRankViTModel

AutoConfig.register(LowRankViTConfig.model_type, LowRankViTConfig, exist_ok=True)
AutoModel.register(LowRankViTConfig, LowRankViTModel, exist_ok=True)
AutoModelForImageClassification.register(LowRankViTConfig, LowRankViTForImageClassification, exist_ok=True)
# Whoever saves a model with `save_pretrained`, Trainer among them, saves the code with it.
LowRankViTConfig.register_for_auto_class()
LowRankViTModel.register_for_auto_class("AutoModel")
LowRankViTForImageClassification.register_for_auto_class("AutoModelForImageClassification")
