"""A checkpoint made by the newest libraries has to load, and to give the same logits, where this package is absent.

compat.py make FOLDER    trains a small digits model a little, compresses it, stores its logits on noise beside it
compat.py check FOLDER   loads it as a stranger would (torch, transformers and pillow only) and compares
"""

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

TOLERANCE = 1e-5


def make(folder: Path) -> None:
    from hf_vit_lowrank.compress import compress
    from hf_vit_lowrank.digits import SMALL, train_digits_model, write_digits_data
    from hf_vit_lowrank.images import open_images
    from hf_vit_lowrank.recipe import CompressionRecipe

    dense = train_digits_model(folder / "dense", replace(SMALL, epochs=2))  # it need not be good
    train, _ = write_digits_data(folder / "data")
    result = compress(str(dense), open_images(train, samples=256), CompressionRecipe(reduction=0.5, samples=256))
    result.save_pretrained(folder / "checkpoint", overwrite=True)
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = result.model.cpu()(pixel_values=pixels).logits
    save_file({"pixels": pixels, "logits": logits}, folder / "expected.safetensors")


def check(folder: Path) -> None:
    expected = load_file(folder / "expected.safetensors")
    checkpoint = folder / "checkpoint"
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    transformers.utils.logging.add_handler(handler)
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=True)
    AutoModel.from_pretrained(checkpoint, trust_remote_code=True)
    model = AutoModelForImageClassification.from_pretrained(checkpoint, trust_remote_code=True).eval()
    processor = AutoImageProcessor.from_pretrained(checkpoint)
    attention: Any = type(model.vit.blocks[0].attention)
    difference = 0.0
    for fused in (False, True):  # as on a CPU, as on a GPU
        attention._is_fused = lambda *_, fused=fused: fused
        with torch.no_grad():
            logits = model(pixel_values=expected["pixels"]).logits
        difference = max(difference, (logits - expected["logits"]).abs().max().item())
    print(f"transformers {transformers.__version__}: {type(model).__name__}, {type(processor).__name__}, ", end="")
    print(f"model type {config.model_type}, logits differ by {difference:.1e} at most")
    if "hf_vit_lowrank" in sys.modules:
        sys.exit("The package itself was loaded, so this says nothing about the remote code.")
    if any("newly initialized" in message for message in said):
        sys.exit("\n".join(said))
    if difference > TOLERANCE:
        sys.exit(f"The logits differ by more than {TOLERANCE}.")


if __name__ == "__main__":
    {"make": make, "check": check}[sys.argv[1]](Path(sys.argv[2]).resolve())
