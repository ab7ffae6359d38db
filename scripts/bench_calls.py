"""What a forward pass costs besides arithmetic where attention goes through a fused kernel, as on a GPU.

At small batches a GPU waits for its host, which has to make one call after the other. Here the models are so small (12
blocks of 12 heads, four patches an image) that calls are all that takes time, and run on the processor. Dense is
transformers' own class; all take turns, and medians of processor time are compared. Writes calls.json into OUTPUT.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import transformers
import typer
from bench_latency import uneven_config
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DeiTConfig, DeiTForImageClassification

from hf_vit_lowrank.dense_layout import from_transformers
from hf_vit_lowrank.evaluation import count_parameters
from hf_vit_lowrank.remote.modeling_lowrank_vit import LowRankViTAttention, LowRankViTForImageClassification

SHAPE = {"hidden_size": 192, "num_attention_heads": 12, "intermediate_size": 384, "image_size": 32}
PASSES = 20
LOW_UP_RANKS = "with up weights of lower rank"


class _CountCalls(TorchDispatchMode):
    """How many operations PyTorch dispatches."""

    calls = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return function(*args, **(kwargs or {}))


def main(
    output: Annotated[Path, typer.Option(help="Folder for calls.json.")],
    reduction: Annotated[float, typer.Option(help="Share of the parameters removed.")] = 0.6,
    rounds: Annotated[int, typer.Option(help=f"Measured rounds of {PASSES} forward passes.", min=1)] = 15,
) -> None:
    """Count the calls of a forward pass, and what they take."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dense = DeiTForImageClassification(DeiTConfig(num_labels=10, **SHAPE)).eval()
    whole, limit = from_transformers(dense).config, int((1 - reduction) * count_parameters(dense))
    models = {"dense": dense}
    for name, up_rank in {"compressed": 1.0, LOW_UP_RANKS: 0.85}.items():
        models[name] = LowRankViTForImageClassification(uneven_config(whole, limit, up_rank)).eval()
    pixels = torch.randn(1, 3, SHAPE["image_size"], SHAPE["image_size"])
    for model in models.values():
        model.config._attn_implementation = "sdpa"
    with torch.no_grad(), patch.object(LowRankViTAttention, "_is_fused", return_value=True):
        calls = {name: _calls(model, pixels) for name, model in models.items()}
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(1 + rounds):
            for name, model in models.items():
                times[name].append(_seconds(model, pixels))
    milliseconds = {name: 1e3 * statistics.median(own[1:]) for name, own in times.items()}  # the first is a warm-up
    ratios = {name: own / milliseconds["dense"] for name, own in milliseconds.items()}
    record = {"calls": calls, "milliseconds": milliseconds, "ratios": ratios}
    output.mkdir(parents=True, exist_ok=True)
    (output / "calls.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print("| model | calls | ms | of dense |\n|---|---:|---:|---:|")
    for name in models:
        print(f"| {name} | {calls[name]} | {milliseconds[name]:.2f} | {ratios[name]:.2f} |")


def _calls(model: torch.nn.Module, pixels: torch.Tensor) -> int:
    with _CountCalls() as counter:
        model(pixels)
    return counter.calls


def _seconds(model: torch.nn.Module, pixels: torch.Tensor) -> float:
    start = time.process_time()
    for _ in range(PASSES):
        model(pixels)
    return (time.process_time() - start) / PASSES


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    typer.run(main)
