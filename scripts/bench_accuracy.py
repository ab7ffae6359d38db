"""Every method × every size on the same images and budget: tables and charts of top-1 accuracy.

A finished cell is kept in OUTPUT/cells and never measured twice, so the same command goes on after an interruption.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import datasets
import transformers
import typer

from hf_vit_lowrank.bench import DEFAULT_METHODS, Method, bench
from hf_vit_lowrank.cli_arguments import parse_reductions
from hf_vit_lowrank.errors import RunError, UserError
from hf_vit_lowrank.images import open_images
from hf_vit_lowrank.quantised import check_quantisers
from hf_vit_lowrank.recipe import CompressionRecipe

SMOKE_SAMPLES, SMOKE_IMAGES = 64, 100


def main(
    source: Annotated[str, typer.Argument(help="Dense ViT or DeiT classifier: a hub id or a folder.")],
    calibration: Annotated[str, typer.Option(help="Images to calibrate on, labels unused; may end in :split.")],
    dataset: Annotated[str, typer.Option(help="Images with labels to measure on; may end in :split.")],
    output: Annotated[Path, typer.Option(help="Folder for accuracy.json, .md and .png, bytes.png and cells/.")],
    sizes: Annotated[str, typer.Option(help="Shares of the parameters to remove.")] = "0.2,0.4,0.6",
    methods: Annotated[
        str | None,
        typer.Option(
            help="With commas: a preset, or preset/compensation. Default: all but mixed-rank/distill, which is long.",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration images.", min=1)] = 1024,
    images: Annotated[int | None, typer.Option(help="Measure on the first images only.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Images at once.", min=1)] = 32,
    distill_epochs: Annotated[int, typer.Option(help="Passes of mixed-rank/distill over the calibration images.")] = (
        CompressionRecipe.distill_epochs
    ),
    quantise: Annotated[
        bool | None,
        typer.Option(
            "--quantise/--no-quantise",
            help="Also 8 and 4 bits of the dense model and of ours. Default: if torchao and hqq are there.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda … (default: the best one here).")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Few images, one epoch: only to see that it runs.")] = False,
) -> None:
    """Compare methods on the same calibration images, budget and evaluation images."""
    if smoke:
        samples, distill_epochs = min(samples, SMOKE_SAMPLES), 1
        images = min(images or SMOKE_IMAGES, SMOKE_IMAGES)
    chosen = [Method.parse(name) for name in methods.split(",")] if methods else DEFAULT_METHODS
    bench(
        source,
        open_images(calibration, samples=samples),
        open_images(dataset, samples=images, seed=None),
        CompressionRecipe(reduction=0.0, samples=samples, batch_size=batch_size, distill_epochs=distill_epochs),
        methods=chosen,
        sizes=parse_reductions(sizes, "--sizes"),
        output=output,
        quantised=quantisers_there() if quantise is None else quantise,
        device=device,
        say=lambda line: print(line, flush=True),
    )
    print(output.joinpath("accuracy.md").read_text(encoding="utf-8"))


def quantisers_there() -> bool:
    try:
        check_quantisers()
    except UserError as error:
        print(f"No quantised models: {error}", file=sys.stderr)
        return False
    return True


if __name__ == "__main__":
    # Our own lines and progress bars are enough.
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        typer.run(main)
    except (UserError, RunError) as error:
        sys.exit(f"Error: {error}")
