"""What compressing costs, in forward passes of the dense model over the same images, and its peak memory.

The models have the shapes of DeiT and ViT and random weights, the images are noise: neither changes the work. Each
shape runs in a process of its own, or in several that share the work as under `accelerate launch`. Writes
compression.json and compression.md into OUTPUT. The large ones on a small machine:

    python scripts/bench_compression.py --output OUTPUT --shapes vit-large --images 64 --memory-limit 12GB
    python scripts/bench_compression.py --output OUTPUT --shapes vit-huge --images 64 --memory-limit 20GB
"""

from __future__ import annotations

import json
import os
import resource
import socket
import statistics
import sys
import tempfile
import time
from itertools import product
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
STAGES = ("images", "stream", "statistics", "candidates", "surgery", "compensation", "pivots")
BATCH_SIZE = 32
FORWARD_BATCHES = 3
_RESULT = "measured.json"


def main(
    output: Annotated[Path, typer.Option(help="Folder for compression.json and compression.md.")],
    shapes: Annotated[str, typer.Option(help=f"Of {', '.join(SHAPES)}.")] = "deit-tiny,deit-small,deit-base",
    images: Annotated[str, typer.Option(help="Numbers of calibration images.")] = "1000",
    reduction: Annotated[float, typer.Option(help="Share of the parameters to remove.")] = 0.6,
    compensation: Annotated[str, typer.Option(help="Of the recipe.")] = "closed-form",
    device: Annotated[str | None, typer.Option(help="cpu, cuda … (default: the best one here).")] = None,
    threads: Annotated[int, typer.Option(help="Threads on a CPU.", min=1)] = 2,
    processes: Annotated[str, typer.Option(help="Numbers of processes that share the work, on a CPU.")] = "1",
    memory_limit: Annotated[str | None, typer.Option(help="Memory that a run may take.", metavar="16GB")] = None,
) -> None:
    """Compress models of several shapes and show what every stage took."""
    limit = parse_bytes(memory_limit) if memory_limit else None
    torch.set_num_threads(threads)
    rows = []
    for shape in shapes.split(","):
        if shape not in SHAPES:
            raise UserError(f"'{shape}' is none of {', '.join(SHAPES)}.")
        for samples, number in product(images.split(","), processes.split(",")):
            recipe = CompressionRecipe(
                reduction=reduction, samples=int(samples), batch_size=BATCH_SIZE, compensation=compensation
            )
            rows.append(_measured(shape, recipe, device, threads, int(number), limit))
            print(_line(rows[-1]), flush=True)
    output.mkdir(parents=True, exist_ok=True)
    (output / "compression.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    (output / "compression.md").write_text(_table(rows), encoding="utf-8")
    print(_table(rows))


def _measured(
    shape: str, recipe: CompressionRecipe, device: str | None, threads: int, processes: int, limit: int | None
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        parameters = _write_model(shape, folder / "model")
        _write_images(recipe.samples, folder / "images")
        before = _forward_seconds(shape, recipe, device)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        arguments = (processes, port, folder, recipe.to_dict(), device, threads, limit)
        torch.multiprocessing.spawn(_compress, arguments, nprocs=processes)
        forward = statistics.mean([before, _forward_seconds(shape, recipe, device)])
        measured = json.loads((folder / _RESULT).read_text(encoding="utf-8"))
    return {
        "shape": shape,
        "parameters": parameters,
        "images": recipe.samples,
        "reduction": recipe.reduction,
        "device": str(pick_device(device)),
        "threads": threads,
        "processes": processes,
        "memory_limit": limit,
        "forward_seconds": forward,
        **measured,
    }


def _compress(
    index: int,
    count: int,
    port: int,
    folder: Path,
    values: dict[str, Any],
    device: str | None,
    threads: int,
    limit: int | None,
) -> None:
    """In a process of its own, number `index` of `count`, which says itself what went wrong; the first one writes what
    it measured."""
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.set_num_threads(threads)
    if count > 1:  # what `accelerate launch --cpu` sets
        os.environ |= {"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": str(count)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    recipe = CompressionRecipe.from_dict(values)
    try:
        result = compress(
            str(folder / "model"),
            open_images(str(folder / "images"), samples=recipe.samples),
            recipe,
            device=device,
            run_folder=folder / "run" if limit else None,
            memory_limit=limit,
        )
    except (UserError, RunError) as error:
        sys.exit(f"Error: {error}")
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if index == 0:
        measured = {"seconds": result.report["seconds"], "peak_bytes": peak}
        (folder / _RESULT).write_text(json.dumps(measured), encoding="utf-8")


def _random_model(shape: str) -> ViTForImageClassification:
    hidden, layers, heads, patch = SHAPES[shape]
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, patch_size=patch,
        intermediate_size=4 * hidden, num_labels=1000,
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


def _write_model(shape: str, folder: Path) -> int:
    """Returns the number of its parameters."""
    model = _random_model(shape)
    model.save_pretrained(folder)
    ViTImageProcessor().save_pretrained(folder)
    return count_parameters(model)


def _write_images(count: int, folder: Path) -> None:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(count):
        noise = generator.integers(0, 256, (224, 224, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{index:06d}.jpg")


@torch.inference_mode()
def _forward_seconds(shape: str, recipe: CompressionRecipe, device: str | None) -> float:
    """Of one forward pass of transformers' dense model over all images, from the median of a few batches."""
    model = _random_model(shape).to(pick_device(device))
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
        f"| {row['shape']} | {row['parameters'] / 1e6:.1f} M | {row['images']} | {row['processes']} "
        f"| {row['forward_seconds']:.0f} "
        f"| {stages} | {sum(passes.values()):.2f} | {row['peak_bytes'] / 1e9:.1f} |"
    )


def _table(rows: list[dict[str, Any]]) -> str:
    head = f"| shape | parameters | images | processes | forward pass, s | {' | '.join(STAGES)} | in all | peak GB |"
    return "\n".join([head, "|---|" + "---:|" * (head.count("|") - 2), *map(_line, rows)]) + "\n"


if __name__ == "__main__":
    try:
        typer.run(main)
    except (UserError, RunError) as error:
        sys.exit(f"Error: {error}")
    except torch.multiprocessing.ProcessExitedException:
        sys.exit(1)
