"""The command line: `hf-vit-lowrank COMMAND` (--help lists them)."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from . import cli_options as opt
from .cli_arguments import check_file, check_folder, file_recipe, parse_reductions, refuse_source, typed_recipe
from .cli_command import app, command, recipe_app
from .errors import RunError, UserError
from .recipe import OURS, CompressionRecipe

# What only some of the commands need is imported inside them.

# What --smoke leaves of the calibration images.
SMOKE_SAMPLES = 64


@command(
    "hf-vit-lowrank compress facebook/deit-base-patch16-224 --calibration imagenet-1k --split train --reduction 0.6 "
    "--output deit-b-lowrank60"
)
def compress(
    *,
    context: typer.Context,
    source: opt.Source,
    calibration: opt.Calibration,
    output: opt.Output,
    recipe_file: opt.RecipeFile = None,
    size: opt.SizeOptions,
    data: opt.ImageOptions,
    label_column: opt.LabelColumn = None,
    preset: opt.Preset = OURS,
    method: opt.MethodOptions,
    distillation: opt.DistillOptions,
    smoke: opt.Smoke = False,
    native: opt.Native = False,
    probe: opt.Probe = False,
    loading: opt.LoadOptions,
    overwrite: opt.Overwrite = False,
    restart: opt.Restart = False,
    memory_limit: opt.MemoryLimit = None,
    reporting: opt.ReportOptions,
) -> None:
    """Compress a checkpoint and save the result, which loads with trust_remote_code wherever transformers is.

    Finished stages are kept in a hidden folder beside the output: a run that died goes on when its command is given
    again.
    """
    from . import processes, progress, tables
    from .budget import weight_bytes
    from .checkpoint import check_target
    from .compress import compress as compress_model
    from .images import open_images
    from .memory import parse_bytes
    from .run_folder import run_beside

    fields = {**vars(size), **vars(method), **vars(distillation), "preset": preset, "native": native, "probe": probe}
    recipe = typed_recipe(context, recipe_file, **fields)
    if smoke:
        if recipe.compensation != "distill":
            raise UserError("--smoke goes with --compensation distill: without it, pass fewer --samples.")
        recipe = replace(recipe, distill_epochs=1, samples=min(recipe.samples, SMOKE_SAMPLES))
    check_file(reporting.json)
    refuse_source(output, source)
    check_target(output, weight_bytes(source, recipe, revision=loading.revision), overwrite=overwrite)
    images = open_images(calibration, **vars(data), label_column=label_column, samples=recipe.samples, seed=recipe.seed)
    processes.join()
    if not processes.is_main():
        progress.quiet()
    limit = parse_bytes(memory_limit) if memory_limit else None
    with run_beside(output, restart) as run:
        result = compress_model(source, images, recipe, **vars(loading), run_folder=run.folder, memory_limit=limit)
        result.save_pretrained(output, overwrite=overwrite)
    if processes.is_main():
        reporting.give(result.report, lambda: tables.show_compression(result.report, output))


@command("hf-vit-lowrank plan facebook/deit-base-patch16-224 --calibration imagenet-1k --split train --reduction 0.6")
def plan(
    *,
    context: typer.Context,
    source: opt.Source,
    calibration: opt.Calibration,
    recipe_file: opt.RecipeFile = None,
    size: opt.SizeOptions,
    data: opt.ImageOptions,
    method: opt.MethodOptions,
    native: opt.Native = False,
    loading: opt.LoadOptions,
    reporting: opt.ReportOptions,
) -> None:
    """Show the ranks, sizes, predicted loss and time that `compress` would come to, without compressing."""
    from . import tables
    from .compress import plan as run
    from .images import open_images

    recipe = typed_recipe(context, recipe_file, **vars(size), **vars(method), native=native)
    check_file(reporting.json)
    images = open_images(calibration, **vars(data), samples=recipe.samples, seed=recipe.seed)
    report = run(source, images, recipe, **vars(loading))
    reporting.give(report, lambda: tables.show_plan(report))


@command(
    "hf-vit-lowrank sweep facebook/deit-base-patch16-224 --calibration imagenet-1k:train --dataset "
    "imagenet-1k:validation --reductions 0.2,0.4,0.6 --output sweep"
)
def sweep(
    *,
    context: typer.Context,
    source: opt.Source,
    calibration: opt.Calibration,
    reductions: Annotated[
        str, opt.option("Reductions, with commas.", metavar="0.2,0.4,…", show_default=False, **opt.SIZE)
    ],
    output: opt.Output,
    dataset: opt.OptionalDataset = None,
    dataset_split: opt.DatasetSplit = None,
    dataset_config: opt.DatasetConfig = None,
    dataset_image_column: opt.DatasetImageColumn = None,
    label_column: opt.LabelColumn = None,
    data: opt.ImageOptions,
    preset: opt.Preset = OURS,
    method: opt.MethodOptions,
    distillation: opt.DistillOptions,
    probe: opt.Probe = False,
    loading: opt.LoadOptions,
    overwrite: opt.Overwrite = False,
    restart: opt.Restart = False,
    reporting: opt.ReportOptions,
) -> None:
    """Compress to many sizes from statistics that they share; writes a table (JSON, Markdown) and a chart.

    Goes on where it was, as `compress` does.
    """
    from . import tables
    from .images import open_images
    from .run_folder import run_beside
    from .sweep import sweep as run

    sizes = parse_reductions(reductions)
    fields = {**vars(method), **vars(distillation), "preset": preset, "probe": probe}
    recipe = typed_recipe(context, None, reduction=sizes[0], **fields)
    check_file(reporting.json)
    refuse_source(output, source)
    check_folder(output, overwrite)
    learned_from = label_column if recipe.labels else None
    images = open_images(calibration, **vars(data), label_column=learned_from, samples=recipe.samples, seed=recipe.seed)
    measured = dataset and open_images(
        dataset,
        config=dataset_config,
        split=dataset_split,
        image_column=dataset_image_column,
        label_column=label_column,
        seed=None,
    )
    with run_beside(output, restart) as unfinished:
        rows = run(
            *(source, images, sizes, recipe),
            dataset=measured or None,
            output=output,
            run_folder=unfinished.folder,
            **vars(loading),
        )
    reporting.give(rows, lambda: tables.show_sweep(rows, output))


@command(
    "hf-vit-lowrank evaluate deit-b-lowrank60 --dataset imagenet-1k --split validation --against "
    "facebook/deit-base-patch16-224"
)
def evaluate(
    *,
    model: Annotated[str, typer.Argument(help="Compressed or dense classifier: a folder or a hub id.")],
    dataset: Annotated[str, opt.option("Images with labels, in any form that --calibration takes.", **opt.IMAGES)],
    data: opt.LabelledOptions,
    against: Annotated[str | None, opt.option("Dense model to compare with.", **opt.RUN)] = None,
    batch_size: opt.BatchSize = 32,
    device: opt.Device = None,
    revision: opt.Revision = None,
    write_card: Annotated[
        bool,
        opt.option(
            "Put the accuracies into the card of MODEL, a folder that compress wrote.", "--write-card", **opt.RUN
        ),
    ] = False,
    reporting: opt.ReportOptions,
) -> None:
    """Measure accuracy, size, work and speed of a classifier; classes are matched by name."""
    from . import tables
    from .checkpoint import rewrite_card, unedited_card
    from .evaluation import evaluate_classifier, load_classifier
    from .images import open_images
    from .model_card import PICTURE, evaluation_record, model_card

    check_file(reporting.json)
    record = unedited_card(Path(model)) if write_card else None
    images = open_images(dataset, **vars(data), seed=None)
    classifier, image_processor = load_classifier(model, revision=revision)
    dense = load_classifier(against) if against else None
    report = evaluate_classifier(
        classifier, image_processor, images, batch_size=batch_size, device=device, against=dense
    ).to_dict()
    if record:
        record["evaluation"] = evaluation_record(report)
        rewrite_card(Path(model), record, model_card(record, picture=PICTURE if PICTURE in record["files"] else None))
    reporting.give(report, lambda: tables.show_evaluation(report))


@command("hf-vit-lowrank demo --output demo-output")
def demo(
    output: Annotated[Path, opt.option("Folder to write.", **opt.RUN)] = Path("demo-output"),
    reduction: Annotated[float, opt.option("Share of the parameters to remove.", **opt.SIZE)] = 0.6,
    overwrite: opt.Overwrite = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Train a small ViT on handwritten digits (a minute, once), compress it and measure both."""
    from .demo import KEPT, run_demo

    check_folder(output, overwrite, kept=KEPT)
    run_demo(output, reduction, show=not quiet)


@command("hf-vit-lowrank export deit-b-lowrank60 --onnx deit-b-lowrank60.onnx")
def export(
    folder: Annotated[Path, typer.Argument(help="Checkpoint folder; it is only read.", show_default=False)],
    onnx: Annotated[Path | None, opt.option("An ONNX file, for any batch size.", metavar="FILE", **opt.FORM)] = None,
    dense: Annotated[
        Path | None,
        opt.option("A folder with the dense architecture: factors multiplied out.", metavar="FOLDER", **opt.FORM),
    ] = None,
    native: Annotated[
        Path | None,
        opt.option("A folder without remote code at the same size, of a uniform plan.", metavar="FOLDER", **opt.FORM),
    ] = None,
    overwrite: opt.Overwrite = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Write a checkpoint in a form that needs no remote code; the logits stay the same."""
    from .export import export_dense, export_native, export_onnx

    exports = {"--onnx": (export_onnx, onnx), "--dense": (export_dense, dense), "--native": (export_native, native)}
    given = [name for name, (_, output) in exports.items() if output is not None]
    if len(given) != 1:
        raise UserError(
            f"Say what to write by exactly one of {', '.join(exports)} (given: {', '.join(given) or 'none'})."
        )
    run, output = exports[given[0]]
    assert output is not None
    run(folder, output, overwrite=overwrite)
    if not quiet:
        print(f"Written to {output}")


@command("hf-vit-lowrank push deit-b-lowrank60 org/deit-b-lowrank60 --private")
def push(
    *,
    folder: Annotated[Path, typer.Argument(help="Checkpoint folder that compress wrote.", show_default=False)],
    repository: Annotated[str, typer.Argument(help="Repository on the hub: owner/name.", show_default=False)],
    private: Annotated[bool, opt.option("Make a new repository private.", "--private", **opt.RUN)] = False,
    revision: Annotated[str | None, opt.option("Branch to push to (default: main).", **opt.RUN)] = None,
    create_pr: Annotated[bool, opt.option("Open a pull request.", "--create-pr", **opt.RUN)] = False,
    dry_run: Annotated[bool, opt.option("Only show what would be sent.", "--dry-run", **opt.RUN)] = False,
    reporting: opt.ReportOptions,
) -> None:
    """Push a checkpoint to the hub (token: `hf auth login` or HF_TOKEN); what is there is not sent again."""
    from . import tables
    from .hub import push_folder

    check_file(reporting.json)
    report = push_folder(
        folder, repository, private=private or None, revision=revision, create_pr=create_pr, dry_run=dry_run
    ).to_dict()
    reporting.give(report, lambda: tables.show_push(report))


@command("hf-vit-lowrank verify deit-b-lowrank60")
def verify(
    *,
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint of ours: a folder or a hub id.", show_default=False)],
    revision: Annotated[
        str | None, opt.option("Branch, tag or commit of the checkpoint on the hub.", **opt.RUN)
    ] = None,
    reporting: opt.ReportOptions,
) -> None:
    """Check files, code, shapes, size and logits of a checkpoint.

    Exit code 0: as saved; 1: differs; 2: none there; 3: the hub could not be asked.
    """
    from . import tables
    from .verification import verify_checkpoint

    check_file(reporting.json)
    try:
        verification = verify_checkpoint(checkpoint, revision=revision)
    except RunError as error:
        print(f"Error: {error}", file=sys.stderr)
        raise typer.Exit(3) from None
    reporting.give(verification.to_dict(), lambda: tables.show_verification(verification.to_dict()))
    if not verification.passed:
        raise typer.Exit(1)


@command("hf-vit-lowrank recipe show > recipe.yaml", recipe_app)
def show(
    source: Annotated[
        Path | None, typer.Argument(help="A recipe file, or a compressed checkpoint's folder (default: a new recipe).")
    ] = None,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Print a recipe as YAML: of a file, of a checkpoint, or one to start from."""
    from .checkpoint import read_record

    if source is None:
        recipe = CompressionRecipe(reduction=0.6)
    elif source.is_dir():
        recipe = CompressionRecipe.from_dict(read_record(source)["recipe"])
    else:
        recipe = file_recipe(source, {})
    print(recipe.to_yaml(), end="")


@command(
    "hf-vit-lowrank report deit-b-lowrank60 --dataset imagenet-1k --split validation --against "
    "facebook/deit-base-patch16-224 --output report.html"
)
def report(
    *,
    folder: Annotated[Path, typer.Argument(help="Folder of a compressed checkpoint.")],
    dataset: Annotated[
        str | None, opt.option("Images to measure on, in any form that --calibration takes.", **opt.IMAGES)
    ] = None,
    data: opt.LabelledOptions,
    against: Annotated[str | None, opt.option("Dense model to compare with on --dataset.", **opt.RUN)] = None,
    output: Annotated[Path, opt.option("Page to write.", metavar="FILE.html", **opt.RUN)] = Path("report.html"),
    overwrite: Annotated[bool, opt.option("Replace the page if it is there.", "--overwrite", **opt.RUN)] = False,
    batch_size: opt.BatchSize = 32,
    device: opt.Device = None,
    reporting: opt.ReportOptions,
) -> None:
    """Write one HTML page about a checkpoint: sizes, ranks, error curves, accuracy, disagreements, speed, recipe."""
    from .images import open_images
    from .report import measure, read_checkpoint, report_page

    if against and not dataset:
        raise UserError("--against compares on images: name them by --dataset.")
    check_file(reporting.json)
    check_file(output, "--output")
    if output.exists() and not overwrite:
        raise UserError(f"--output '{output}' is there: choose another file, or pass --overwrite.")
    record, settings = read_checkpoint(folder)
    stream = evaluation = None
    if dataset:
        stream = open_images(dataset, **vars(data), seed=None)
        evaluation = measure(folder, stream, against=against, batch_size=batch_size, device=device)
    output.write_text(report_page(record, settings, evaluation, stream), encoding="utf-8")
    reporting.give({**record, "evaluation": evaluation}, lambda: print(f"Written to {output}"))


@command("hf-vit-lowrank space org/deit-b-lowrank60 --output space")
def space(
    source: Annotated[str, typer.Argument(help="Compressed checkpoint: a folder or a hub id.", show_default=False)],
    output: opt.Output,
    dense: Annotated[
        str | None,
        opt.option("Dense model beside it: a hub id or a folder (default: the checkpoint's source).", **opt.RUN),
    ] = None,
    revision: opt.Revision = None,
    overwrite: opt.Overwrite = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Write a Gradio Space in which dense and compressed answer side by side; folders given are copied into it."""
    from .space import write_space

    for folder in filter(None, (source, dense)):
        refuse_source(output, folder)
    check_folder(output, overwrite)
    write_space(source, output, dense=dense, revision=revision)
    if not quiet:
        print(f"Written to {output}: try it by python {output / 'app.py'} (needs pip install 'hf-vit-lowrank[space]')")


def main() -> None:
    """Entry point of `hf-vit-lowrank` and of `python -m hf_vit_lowrank`."""
    app()
