"""What compressing costs, in forward passes of the dense model over the same images, and its peak memory.

The models have the shapes of DeiT and ViT and random weights, the images are noise: neither changes the work. Each
shape runs in a process of its own. Writes compression.json and compression.md into OUTPUT. The large ones on a small
machine:

    python scripts/bench_compression.py --output OUTPUT --shapes vit-large --images 64 --memory-limit 12GB
    python scripts/bench_compression.py --output OUTPUT --shapes vit-huge --images 64 --memory-limit 20GB
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import datasets
import numpy as np
import torch
import transformers
import typer
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from hf_vit_lowrank.compress import compress
from hf_vit_lowrank.errors import RunError, UserError
from hf_vit_lowrank.evaluation import count_parameters, pick_device
from hf_vit_lowrank.images import open_images
from hf_vit_lowrank.memory import parse_bytes
from hf_vit_lowrank.recipe import CompressionRecipe

# Hidden size, layers, heads, patch size.
SHAPES = {
    "deit-tiny": (192, 12, 3, 16),
    "deit-small": (384, 12, 6, 16),
    "deit-base": (768, 12, 12, 16),
    "vit-large": (1024, 24, 16, 16),
    "vit-huge": (1280, 32, 16, 14),
}
STAGES = ("images", "statistics", "candidates", "surgery", "compensation")
BATCH_SIZE = 32
FORWARD_BATCHES = 3


def main(
    output: Annotated[Path, typer.Option(help="Folder for compression.json and compression.md.")],
    shapes: Annotated[str, typer.Option(help=f"Of {', '.join(SHAPES)}.")] = "deit-tiny,deit-small,deit-base",
    images: Annotated[str, typer.Option(help="Numbers of calibration images.")] = "1000",
    reduction: Annotated[float, typer.Option(help="Share of the parameters to remove.")] = 0.6,
    compensation: Annotated[str, typer.Option(help="Of the recipe.")] = "closed-form",
    device: Annotated[str | None, typer.Option(help="cpu, cuda … (default: the best one here).")] = None,
    threads: Annotated[int, typer.Option(help="Threads on a CPU.", min=1)] = 2,
    memory_limit: Annotated[str | None, typer.Option(help="Memory that a run may take.", metavar="16GB")] = None,
) -> None:
    """Compress models of several shapes and show what every stage took."""
    limit = parse_bytes(memory_limit) if memory_limit else None
    rows = []
    for shape in shapes.split(","):
        if shape not in SHAPES:
            raise UserError(f"'{shape}' is none of {', '.join(SHAPES)}.")
        for count in images.split(","):
            recipe = CompressionRecipe(
                reduction=reduction, samples=int(count), batch_size=BATCH_SIZE, compensation=compensation
            )
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                rows.append(pool.submit(_measured, shape, recipe.to_dict(), device, threads, limit).result())
            print(_line(rows[-1]), flush=True)
    output.mkdir(parents=True, exist_ok=True)
    (output / "compression.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    (output / "compression.md").write_text(_table(rows), encoding="utf-8")
    print(_table(rows))


def _measured(
    shape: str, values: dict[str, Any], device: str | None, threads: int, limit: int | None
) -> dict[str, Any]:
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.set_num_threads(threads)
    recipe = CompressionRecipe.from_dict(values)
    with tempfile.TemporaryDirectory() as temporary:
        model = _write_model(shape, Path(temporary) / "model")
        images = _write_images(recipe.samples, Path(temporary) / "images")
        before = _forward_seconds(model, recipe, device)
        parameters = count_parameters(model)
        del model
        result = compress(
            str(Path(temporary) / "model"),
            open_images(str(images), samples=recipe.samples),
            recipe,
            device=device,
            run_folder=Path(temporary) / "run" if limit else None,
            memory_limit=limit,
        )
        forward = statistics.mean([before, _forward_seconds(_random_model(shape), recipe, device)])
    return {
        "shape": shape,
        "parameters": parameters,
        "images": recipe.samples,
        "reduction": recipe.reduction,
        "device": str(pick_device(device)),
        "threads": threads,
        "memory_limit": limit,
        "forward_seconds": forward,
        "seconds": result.report["seconds"],
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def _random_model(shape: str) -> ViTForImageClassification:
    hidden, layers, heads, patch = SHAPES[shape]
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, patch_size=patch,
        intermediate_size=4 * hidden, num_labels=1000,
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


def _write_model(shape: str, folder: Path) -> ViTForImageClassification:
    model = _random_model(shape)
    model.save_pretrained(folder)
    ViTImageProcessor().save_pretrained(folder)
    return model


def _write_images(count: int, folder: Path) -> Path:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(count):
        noise = generator.integers(0, 256, (224, 224, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{index:06d}.jpg")
    return folder


@torch.inference_mode()
def _forward_seconds(model: ViTForImageClassification, recipe: CompressionRecipe, device: str | None) -> float:
    """Of one forward pass of transformers' dense model over all images, from the median of a few batches."""
    model = model.to(pick_device(device))
    pixels = torch.randn(min(recipe.batch_size, recipe.samples), 3, 224, 224, device=model.device)
    times = []
    for _ in range(1 + FORWARD_BATCHES):
        start = time.perf_counter()
        model(pixels).logits.cpu()  # the copy waits for the device
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) * recipe.samples / len(pixels)


def _line(row: dict[str, Any]) -> str:
    passes = {stage: seconds / row["forward_seconds"] for stage, seconds in row["seconds"].items()}
    stages = " | ".join(f"{passes.get(stage, 0.0):.2f}" for stage in STAGES)
    return (
        f"| {row['shape']} | {row['parameters'] / 1e6:.1f} M | {row['images']} | {row['forward_seconds']:.0f} "
        f"| {stages} | {sum(passes.values()):.2f} | {row['peak_bytes'] / 1e9:.1f} |"
    )


def _table(rows: list[dict[str, Any]]) -> str:
    head = f"| shape | parameters | images | forward pass, s | {' | '.join(STAGES)} | in all | peak GB |"
    return "\n".join([head, "|---|" + "---:|" * (head.count("|") - 2), *map(_line, rows)]) + "\n"


if __name__ == "__main__":
    try:
        typer.run(main)
    except (UserError, RunError) as error:
        sys.exit(f"Error: {error}")
