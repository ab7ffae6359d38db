"""The command line: `hf-vit-lowrank COMMAND` (--help lists them)."""

from __future__ import annotations

import functools
import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import RunError, UserError, reason, without_secrets
from .recipe import COMPENSATIONS, COSTS, OURS, PRESETS, TARGETS, CompressionRecipe, read_recipe_file

# What only some of the commands need is imported inside them.
if TYPE_CHECKING:
    from .images import ImageStream

app = typer.Typer(
    name="hf-vit-lowrank",
    help="Make a Vision Transformer of the Hugging Face Hub smaller, from images without labels.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipe_app = typer.Typer(help="Recipes as YAML files, for compress --recipe.", no_args_is_help=True)
app.add_typer(recipe_app, name="recipe")

# What --smoke leaves of the calibration images.
SMOKE_SAMPLES = 64

# ------------------------------------------------------------------------------------- the options, each defined once


def _option(help: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=help, **settings)


_SIZE, _IMAGES, _RUN = ({"rich_help_panel": panel} for panel in ("How small (give exactly one)", "Images", "Run"))
_FORM = {"rich_help_panel": "What to write (give exactly one)"}

Source = Annotated[str, typer.Argument(help="ViT or DeiT classifier: a hub id or a folder.", show_default=False)]
Revision = Annotated[str | None, _option("Branch, tag or commit of the source on the hub.", **_RUN)]
AllowPickle = Annotated[
    bool, _option("Also read pickled weights (pytorch_model.bin), of authors you trust.", "--allow-pickle", **_RUN)
]

Reduction = Annotated[float | None, _option("Share of the parameters (see --cost) to remove: 0.6 is 60 %.", **_SIZE)]
MaxParameters = Annotated[
    str | None, _option("Most parameters the result may have.", metavar="NUMBER, 34.6M or 900k", **_SIZE)
]
Match = Annotated[str | None, _option("As small as this model (hub id or folder).", **_SIZE)]
MinAgreement = Annotated[
    float | None,
    _option("Smallest model that keeps this share of the dense model's predictions on held-back images.", **_SIZE),
]

Calibration = Annotated[
    str,
    _option(
        "Images, labels unused: a data set on the hub, a folder, a parquet file or a data set saved to disk.",
        show_default=False,
        **_IMAGES,
    ),
]
Split = Annotated[str | None, _option("Split of the data set.", **_IMAGES)]
Config = Annotated[str | None, _option("Configuration of the data set on the hub.", **_IMAGES)]
ImageColumn = Annotated[str | None, _option("Column with the images, where there are several.", **_IMAGES)]
LabelColumn = Annotated[str | None, _option("Column with the labels.", **_IMAGES)]
Samples = Annotated[int, _option("Calibration images to use.", min=1, **_IMAGES)]
OptionalDataset = Annotated[
    str | None, _option("Images with labels to measure on (default: agreement only, on held-back images).", **_IMAGES)
]
DatasetSplit = Annotated[str | None, _option("Split of --dataset.", **_IMAGES)]
DatasetConfig = Annotated[str | None, _option("Configuration of --dataset.", **_IMAGES)]

Cost = Annotated[str, _option("What the budget counts and ranks compete for.", metavar="|".join(COSTS))]
Preset = Annotated[
    str,
    _option(f"The method: this package's own, or one to compare with: {', '.join(PRESETS[1:])}.", metavar="NAME"),
]
Compensation = Annotated[
    str | None,
    _option(
        "Repair by refits (closed-form), by refits and training block by block (gradient), or by refits and training "
        "the whole model (distill). "
        f"Default: closed-form for {OURS}, none for other presets.",
        metavar="|".join(COMPENSATIONS),
    ),
]
DistillEpochs = Annotated[int, _option("Passes over the images in distillation.", min=1)]
DistillLr = Annotated[float, _option("Peak learning rate of distillation.")]
Labels = Annotated[bool, _option("Let distillation learn from the labels as well.", "--labels")]
Checkpointing = Annotated[
    bool, _option("Let distillation compute activations twice: less memory.", "--gradient-checkpointing")
]
Smoke = Annotated[bool, _option("A few steps of distillation only, to see that everything works.", "--smoke")]
Native = Annotated[
    bool,
    _option(
        "One head size and one MLP width for the whole model, which transformers loads without remote code.", "--native"
    ),
]
QueryKeyWeight = Annotated[float, _option("Factor on the error curves of query and key, which predict too little.")]
RankMultiple = Annotated[
    int, _option("Inner sizes of a layer are multiples of this, which matrix products want; 1 leaves them free.", min=1)
]
Probe = Annotated[
    bool,
    _option("Measure what sizes are worth once blocks are refitted, and choose ranks again by that: slow.", "--probe"),
]

RecipeFile = Annotated[
    Path | None,
    _option("Recipe in YAML (see recipe show); options given here go before what it says.", "--recipe", metavar="FILE"),
]

Seed = Annotated[int, _option("Seed of the choice of images.", min=0, **_RUN)]
BatchSize = Annotated[int, _option("Images at once.", min=1, **_RUN)]
Device = Annotated[str | None, _option("cpu, cuda, mps … (default: the best one here).", **_RUN)]
Output = Annotated[Path, _option("Folder to write.", show_default=False, **_RUN)]
MemoryLimit = Annotated[
    str | None,
    _option(
        "Memory that the run may take: where its blocks do not fit at once, they go in groups by several passes, and "
        "their moments are parked on disk.",
        metavar="16GB",
        **_RUN,
    ),
]
Overwrite = Annotated[bool, _option("Replace what an earlier run wrote to the folder.", "--overwrite", **_RUN)]
Restart = Annotated[bool, _option("Throw away what an unfinished run left and begin anew.", "--restart", **_RUN)]
Json = Annotated[Path | None, _option("Also write the figures to this file.", metavar="FILE", **_RUN)]
Quiet = Annotated[bool, _option("Print nothing but warnings and errors.", "--quiet", "-q", **_RUN)]
Debug = Annotated[bool, _option("Show the traceback of an error.", "--debug", **_RUN)]


# ---------------------------------------------------------------------------------------------------------- the errors


def _command(example: str, group: typer.Typer = app) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command whose errors become one sentence on stderr and an exit code (2: bad input, 1: failed)."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(**options: Any) -> None:
            try:
                _set_up_output(options["quiet"])
                function(**options)
            except typer.Exit:
                raise
            except (Exception, KeyboardInterrupt) as error:
                if options["debug"]:
                    print(without_secrets(traceback.format_exc()), end="", file=sys.stderr)
                code, sentence = _verdict(error)
                print(sentence, file=sys.stderr)
                raise typer.Exit(code) from None

        group.command(epilog=f"Example: {example}")(run)
        return function

    return register


def _verdict(error: BaseException) -> tuple[int, str]:
    if isinstance(error, UserError):
        return 2, f"Error: {error}"
    if isinstance(error, RunError):
        return 1, f"Error: {error}"
    if isinstance(error, KeyboardInterrupt):
        return 130, "Interrupted: give the same command again; compress then goes on where it was."
    return 1, f"Error: {type(error).__name__}: {reason(error)}; run again with --debug for the traceback."


def _set_up_output(quiet: bool) -> None:
    import datasets
    import huggingface_hub
    import transformers

    from . import progress

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logging.getLogger(__package__).addHandler(handler)
    # Our own messages and progress bars are enough; that of a download is the hub client's.
    for library in (datasets, huggingface_hub, transformers):
        library.utils.logging.set_verbosity_error()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if quiet:
        progress.quiet()
        huggingface_hub.utils.disable_progress_bars()


# -------------------------------------------------------------------------------------------------------- the commands


@_command(
    "hf-vit-lowrank compress facebook/deit-base-patch16-224 --calibration imagenet-1k --split train --reduction 0.6 "
    "--output deit-b-lowrank60"
)
def compress(
    context: typer.Context,
    source: Source,
    calibration: Calibration,
    output: Output,
    recipe_file: RecipeFile = None,
    reduction: Reduction = None,
    max_parameters: MaxParameters = None,
    match: Match = None,
    min_agreement: MinAgreement = None,
    split: Split = None,
    config: Config = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    samples: Samples = 1024,
    cost: Cost = "parameters",
    preset: Preset = OURS,
    compensation: Compensation = None,
    distill_epochs: DistillEpochs = CompressionRecipe.distill_epochs,
    distill_lr: DistillLr = CompressionRecipe.distill_lr,
    labels: Labels = False,
    gradient_checkpointing: Checkpointing = False,
    smoke: Smoke = False,
    query_key_weight: QueryKeyWeight = 4.0,
    rank_multiple: RankMultiple = CompressionRecipe.rank_multiple,
    native: Native = False,
    probe: Probe = False,
    seed: Seed = 0,
    batch_size: BatchSize = 32,
    device: Device = None,
    revision: Revision = None,
    allow_pickle: AllowPickle = False,
    overwrite: Overwrite = False,
    restart: Restart = False,
    memory_limit: MemoryLimit = None,
    json: Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compress a checkpoint and save the result, which loads with trust_remote_code wherever transformers is.

    Finished stages are kept in a hidden folder beside the output: a run that died goes on when its command is given
    again.
    """
    from . import processes, progress, tables
    from .budget import weight_bytes
    from .checkpoint import check_target
    from .compress import compress as compress_model
    from .memory import parse_bytes
    from .run_folder import RunFolder

    recipe = _recipe(
        context,
        recipe_file,
        reduction=reduction,
        max_parameters=max_parameters,
        match=match,
        min_agreement=min_agreement,
        cost=cost,
        preset=preset,
        compensation=compensation,
        distill_epochs=distill_epochs,
        distill_lr=distill_lr,
        labels=labels,
        gradient_checkpointing=gradient_checkpointing,
        samples=samples,
        batch_size=batch_size,
        seed=seed,
        query_key_weight=query_key_weight,
        rank_multiple=rank_multiple,
        native=native,
        probe=probe,
    )
    if smoke:
        if recipe.compensation != "distill":
            raise UserError("--smoke goes with --compensation distill: without it, pass fewer --samples.")
        recipe = replace(recipe, distill_epochs=1, samples=min(recipe.samples, SMOKE_SAMPLES))
    _check_file(json)
    _refuse_source(output, source)
    check_target(output, weight_bytes(source, recipe, revision=revision), overwrite=overwrite)
    images = _calibration_images(calibration, config, split, image_column, recipe, label_column)
    folder = output.absolute().parent / f".{output.name}.run"
    run = RunFolder(folder)
    processes.join()
    if not processes.is_main():
        progress.quiet()
    if restart and processes.is_main():
        run.remove()
    try:
        result = compress_model(
            source,
            images,
            recipe,
            revision=revision,
            allow_pickle=allow_pickle,
            device=device,
            run_folder=folder,
            memory_limit=parse_bytes(memory_limit) if memory_limit else None,
        )
    except UserError:
        # What was refused before the long work must not stand in the way of its correction.
        if processes.is_main() and not run.is_begun():
            run.remove()
        raise
    result.save_pretrained(output, overwrite=overwrite)
    if not processes.is_main():
        return
    run.remove()
    if json:
        json.write_text(dumps(result.report, indent=2) + "\n")
    if not quiet:
        tables.show_compression(result.report, output)


@_command("hf-vit-lowrank plan facebook/deit-base-patch16-224 --calibration imagenet-1k --split train --reduction 0.6")
def plan(
    context: typer.Context,
    source: Source,
    calibration: Calibration,
    recipe_file: RecipeFile = None,
    reduction: Reduction = None,
    max_parameters: MaxParameters = None,
    match: Match = None,
    min_agreement: MinAgreement = None,
    split: Split = None,
    config: Config = None,
    image_column: ImageColumn = None,
    samples: Samples = 1024,
    cost: Cost = "parameters",
    compensation: Compensation = None,
    query_key_weight: QueryKeyWeight = 4.0,
    rank_multiple: RankMultiple = CompressionRecipe.rank_multiple,
    native: Native = False,
    seed: Seed = 0,
    batch_size: BatchSize = 32,
    device: Device = None,
    revision: Revision = None,
    allow_pickle: AllowPickle = False,
    json: Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show the ranks, sizes, predicted loss and time that `compress` would come to, without compressing."""
    from . import tables
    from .compress import plan as run

    recipe = _recipe(
        context,
        recipe_file,
        reduction=reduction,
        max_parameters=max_parameters,
        match=match,
        min_agreement=min_agreement,
        cost=cost,
        compensation=compensation,
        samples=samples,
        batch_size=batch_size,
        seed=seed,
        query_key_weight=query_key_weight,
        rank_multiple=rank_multiple,
        native=native,
    )
    _check_file(json)
    images = _calibration_images(calibration, config, split, image_column, recipe)
    report = run(source, images, recipe, revision=revision, allow_pickle=allow_pickle, device=device)
    if json:
        json.write_text(dumps(report, indent=2) + "\n")
    if not quiet:
        tables.show_plan(report)


@_command(
    "hf-vit-lowrank sweep facebook/deit-base-patch16-224 --calibration imagenet-1k:train --dataset "
    "imagenet-1k:validation --reductions 0.2,0.4,0.6 --output sweep"
)
def sweep(
    context: typer.Context,
    source: Source,
    calibration: Calibration,
    reductions: Annotated[str, _option("Reductions, with commas.", metavar="0.2,0.4,…", show_default=False, **_SIZE)],
    output: Output,
    dataset: OptionalDataset = None,
    dataset_split: DatasetSplit = None,
    dataset_config: DatasetConfig = None,
    label_column: LabelColumn = None,
    split: Split = None,
    config: Config = None,
    image_column: ImageColumn = None,
    samples: Samples = 1024,
    cost: Cost = "parameters",
    preset: Preset = OURS,
    compensation: Compensation = None,
    distill_epochs: DistillEpochs = CompressionRecipe.distill_epochs,
    distill_lr: DistillLr = CompressionRecipe.distill_lr,
    labels: Labels = False,
    gradient_checkpointing: Checkpointing = False,
    query_key_weight: QueryKeyWeight = 4.0,
    rank_multiple: RankMultiple = CompressionRecipe.rank_multiple,
    probe: Probe = False,
    seed: Seed = 0,
    batch_size: BatchSize = 32,
    device: Device = None,
    revision: Revision = None,
    allow_pickle: AllowPickle = False,
    overwrite: Overwrite = False,
    json: Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compress to many sizes from statistics that they share; writes a table (JSON, Markdown) and a chart."""
    from . import tables
    from .images import open_images
    from .sweep import sweep as run

    sizes = _parse_reductions(reductions)
    recipe = _recipe(
        context,
        None,
        reduction=sizes[0],
        cost=cost,
        preset=preset,
        compensation=compensation,
        distill_epochs=distill_epochs,
        distill_lr=distill_lr,
        labels=labels,
        gradient_checkpointing=gradient_checkpointing,
        samples=samples,
        batch_size=batch_size,
        seed=seed,
        query_key_weight=query_key_weight,
        rank_multiple=rank_multiple,
        probe=probe,
    )
    _check_file(json)
    _refuse_source(output, source)
    _check_folder(output, overwrite)
    images = _calibration_images(calibration, config, split, image_column, recipe)
    measured = dataset and open_images(
        dataset, config=dataset_config, split=dataset_split, label_column=label_column, seed=None
    )
    rows = run(
        source,
        images,
        sizes,
        recipe,
        dataset=measured or None,
        output=output,
        revision=revision,
        allow_pickle=allow_pickle,
        device=device,
    )
    if json:
        json.write_text(dumps(rows, indent=2) + "\n")
    if not quiet:
        tables.show_sweep(rows, output)


@_command(
    "hf-vit-lowrank evaluate deit-b-lowrank60 --dataset imagenet-1k --split validation --against "
    "facebook/deit-base-patch16-224"
)
def evaluate(
    model: Annotated[str, typer.Argument(help="Compressed or dense classifier: a folder or a hub id.")],
    dataset: Annotated[str, _option("Images with labels, in any form that --calibration takes.", **_IMAGES)],
    split: Split = None,
    config: Config = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    samples: Annotated[int | None, _option("Use the first images only.", min=1, **_IMAGES)] = None,
    against: Annotated[str | None, _option("Dense model to compare with.", **_RUN)] = None,
    batch_size: BatchSize = 32,
    device: Device = None,
    revision: Revision = None,
    json: Json = None,
    write_card: Annotated[
        bool,
        _option("Put the accuracies into the card of MODEL, a folder that compress wrote.", "--write-card", **_RUN),
    ] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure accuracy, size, work and speed of a classifier; classes are matched by name."""
    from . import tables
    from .checkpoint import rewrite_card, unedited_card
    from .evaluation import evaluate_classifier, load_classifier
    from .model_card import PICTURE, evaluation_record, model_card

    _check_file(json)
    record = unedited_card(Path(model)) if write_card else None
    images = _labelled_images(dataset, config, split, image_column, label_column, samples)
    classifier, image_processor = load_classifier(model, revision=revision)
    dense = load_classifier(against) if against else None
    report = evaluate_classifier(
        classifier, image_processor, images, batch_size=batch_size, device=device, against=dense
    )
    if json:
        json.write_text(report.to_json())
    if record:
        record["evaluation"] = evaluation_record(report.to_dict())
        rewrite_card(Path(model), record, model_card(record, picture=PICTURE if PICTURE in record["files"] else None))
    if not quiet:
        tables.show_evaluation(report.to_dict())


@_command("hf-vit-lowrank demo --output demo-output")
def demo(
    output: Annotated[Path, _option("Folder to write.", **_RUN)] = Path("demo-output"),
    reduction: Annotated[float, _option("Share of the parameters to remove.", **_SIZE)] = 0.6,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a small ViT on handwritten digits (a minute, once), compress it and measure both."""
    from .demo import KEPT, run_demo

    _check_folder(output, overwrite, kept=KEPT)
    run_demo(output, reduction, show=not quiet)


@_command("hf-vit-lowrank export deit-b-lowrank60 --onnx deit-b-lowrank60.onnx")
def export(
    folder: Annotated[Path, typer.Argument(help="Checkpoint folder; it is only read.", show_default=False)],
    onnx: Annotated[Path | None, _option("An ONNX file, for any batch size.", metavar="FILE", **_FORM)] = None,
    dense: Annotated[
        Path | None,
        _option("A folder with the dense architecture: factors multiplied out.", metavar="FOLDER", **_FORM),
    ] = None,
    native: Annotated[
        Path | None,
        _option("A folder without remote code at the same size, of a uniform plan.", metavar="FOLDER", **_FORM),
    ] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    debug: Debug = False,
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


@_command("hf-vit-lowrank push deit-b-lowrank60 org/deit-b-lowrank60 --private")
def push(
    folder: Annotated[Path, typer.Argument(help="Checkpoint folder that compress wrote.", show_default=False)],
    repository: Annotated[str, typer.Argument(help="Repository on the hub: owner/name.", show_default=False)],
    private: Annotated[bool, _option("Make a new repository private.", "--private", **_RUN)] = False,
    revision: Annotated[str | None, _option("Branch to push to (default: main).", **_RUN)] = None,
    create_pr: Annotated[bool, _option("Open a pull request.", "--create-pr", **_RUN)] = False,
    dry_run: Annotated[bool, _option("Only show what would be sent.", "--dry-run", **_RUN)] = False,
    json: Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Push a checkpoint to the hub (token: `hf auth login` or HF_TOKEN); what is there is not sent again."""
    from . import tables
    from .hub import push_folder

    _check_file(json)
    report = push_folder(
        folder, repository, private=private or None, revision=revision, create_pr=create_pr, dry_run=dry_run
    ).to_dict()
    if json:
        json.write_text(dumps(report, indent=2) + "\n")
    if not quiet:
        tables.show_push(report)


@_command("hf-vit-lowrank verify deit-b-lowrank60")
def verify(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint of ours: a folder or a hub id.", show_default=False)],
    revision: Annotated[str | None, _option("Branch, tag or commit of the checkpoint on the hub.", **_RUN)] = None,
    json: Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Check files, code, shapes, size and logits of a checkpoint.

    Exit code 0: as saved; 1: differs; 2: none there; 3: the hub could not be asked.
    """
    from . import tables
    from .verification import verify_checkpoint

    _check_file(json)
    try:
        verification = verify_checkpoint(checkpoint, revision=revision)
    except RunError as error:
        print(f"Error: {error}", file=sys.stderr)
        raise typer.Exit(3) from None
    if json:
        json.write_text(dumps(verification.to_dict(), indent=2) + "\n")
    if not quiet:
        tables.show_verification(verification.to_dict())
    if not verification.passed:
        raise typer.Exit(1)


@_command("hf-vit-lowrank recipe show > recipe.yaml", recipe_app)
def show(
    source: Annotated[
        Path | None, typer.Argument(help="A recipe file, or a compressed checkpoint's folder (default: a new recipe).")
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Print a recipe as YAML: of a file, of a checkpoint, or one to start from."""
    from .checkpoint import read_record

    if source is None:
        recipe = CompressionRecipe(reduction=0.6)
    elif source.is_dir():
        recipe = CompressionRecipe.from_dict(read_record(source)["recipe"])
    else:
        recipe = _file_recipe(source, {})
    print(recipe.to_yaml(), end="")


@_command(
    "hf-vit-lowrank report deit-b-lowrank60 --dataset imagenet-1k --split validation --against "
    "facebook/deit-base-patch16-224 --output report.html"
)
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a compressed checkpoint.")],
    dataset: Annotated[
        str | None, _option("Images to measure on, in any form that --calibration takes.", **_IMAGES)
    ] = None,
    split: Split = None,
    config: Config = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    samples: Annotated[int | None, _option("Use the first images only.", min=1, **_IMAGES)] = None,
    against: Annotated[str | None, _option("Dense model to compare with on --dataset.", **_RUN)] = None,
    output: Annotated[Path, _option("Page to write.", metavar="FILE.html", **_RUN)] = Path("report.html"),
    overwrite: Annotated[bool, _option("Replace the page if it is there.", "--overwrite", **_RUN)] = False,
    batch_size: BatchSize = 32,
    device: Device = None,
    json: Json = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write one HTML page about a checkpoint: sizes, ranks, error curves, accuracy, disagreements, speed, recipe."""
    from .report import measure, read_checkpoint, report_page

    if against and not dataset:
        raise UserError("--against compares on images: name them by --dataset.")
    _check_file(json)
    _check_file(output, "--output")
    if output.exists() and not overwrite:
        raise UserError(f"--output '{output}' is there: choose another file, or pass --overwrite.")
    record, settings = read_checkpoint(folder)
    stream = evaluation = None
    if dataset:
        stream = _labelled_images(dataset, config, split, image_column, label_column, samples)
        evaluation = measure(folder, stream, against=against, batch_size=batch_size, device=device)
    output.write_text(report_page(record, settings, evaluation, stream), encoding="utf-8")
    if json:
        json.write_text(dumps({**record, "evaluation": evaluation}, indent=2) + "\n")
    if not quiet:
        print(f"Written to {output}")


@_command("hf-vit-lowrank space org/deit-b-lowrank60 --output space")
def space(
    source: Annotated[str, typer.Argument(help="Compressed checkpoint: a folder or a hub id.", show_default=False)],
    output: Output,
    dense: Annotated[
        str | None, _option("Dense model beside it: a hub id or a folder (default: the checkpoint's source).", **_RUN)
    ] = None,
    revision: Revision = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a Gradio Space in which dense and compressed answer side by side; folders given are copied into it."""
    from .space import write_space

    for folder in filter(None, (source, dense)):
        _refuse_source(output, folder)
    _check_folder(output, overwrite)
    write_space(source, output, dense=dense, revision=revision)
    if not quiet:
        print(f"Written to {output}: try it by python {output / 'app.py'} (needs pip install 'hf-vit-lowrank[space]')")


# ---------------------------------------------------------------------------------------------------- checks of options


def _recipe(
    context: typer.Context, file: Path | None, max_parameters: str | None = None, **fields: Any
) -> CompressionRecipe:
    """From the options, and from a recipe file for those that were not typed."""
    fields["max_parameters"] = None if max_parameters is None else _parse_count(max_parameters)
    given = [f"--{name.replace('_', '-')}" for name in TARGETS if fields.get(name) is not None]
    if len(given) != 1 and (given or file is None):
        options = ", ".join(f"--{name.replace('_', '-')}" for name in TARGETS)
        raise UserError(f"Say how small by exactly one of {options} (given: {', '.join(given) or 'none'}).")
    recipe = _merged(context, file, fields)
    for name in ("distill_epochs", "distill_lr"):
        if _is_typed(context, name) and recipe.compensation != "distill":
            raise UserError(f"--{name.replace('_', '-')} goes with --compensation distill.")
    return recipe


def _merged(context: typer.Context, file: Path | None, fields: dict[str, Any]) -> CompressionRecipe:
    if file is None:
        return CompressionRecipe(**fields)
    return _file_recipe(file, {name: value for name, value in fields.items() if _is_typed(context, name)})


def _is_typed(context: typer.Context, option: str) -> bool:
    source = context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


def _file_recipe(file: Path, typed: dict[str, Any]) -> CompressionRecipe:
    """typed: fields that go before those of the file."""
    values = read_recipe_file(file)
    if not typed.keys().isdisjoint(TARGETS):
        values = {name: value for name, value in values.items() if name not in TARGETS}
    try:
        return CompressionRecipe.from_dict({**values, **typed})
    except UserError as error:
        raise UserError(f"With the recipe file '{file}': {error}") from error


def _parse_count(text: str) -> int:
    """ "34.6M" as 34600000."""
    units = {"k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}
    unit = units.get(text[-1:].lower())
    try:
        return round(float(text[:-1] if unit else text) * (unit or 1))
    except (ValueError, OverflowError):
        raise UserError(f"--max-parameters '{text}' is no number of parameters: write 34600000 or 34.6M.") from None


def _parse_reductions(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--reductions '{text}' are not numbers with commas: write 0.2,0.4,0.6.") from None
    wrong = [value for value in values if not 0 <= value < 1]
    if wrong:
        raise UserError(f"--reductions must be from 0 up to, but not, 1; {wrong[0]:g} is not.")
    return list(dict.fromkeys(values))


def _calibration_images(
    location: str,
    config: str | None,
    split: str | None,
    image_column: str | None,
    recipe: CompressionRecipe,
    label_column: str | None = None,
) -> ImageStream:
    from .images import open_images

    return open_images(
        location,
        config=config,
        split=split,
        image_column=image_column,
        label_column=label_column,
        samples=recipe.samples,
        seed=recipe.seed,
    )


def _labelled_images(
    location: str,
    config: str | None,
    split: str | None,
    image_column: str | None,
    label_column: str | None,
    samples: int | None,
) -> ImageStream:
    """To measure on, in the order of the data."""
    from .images import open_images

    return open_images(
        location,
        config=config,
        split=split,
        image_column=image_column,
        label_column=label_column,
        samples=samples,
        seed=None,
    )


def _refuse_source(output: Path, source: str) -> None:
    target, folder = output.resolve(), Path(source).resolve()
    if folder.exists() and (target == folder or target in folder.parents):
        raise UserError(f"--output '{output}' is the source or holds it, and the source is never written to.")


def _check_folder(folder: Path, overwrite: bool, kept: Sequence[str] = ()) -> None:
    """kept: names of what an earlier run may have left there, which is not written again."""
    from .disk import require_writable

    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output '{folder}' is a file: choose a folder.")
    if folder.is_dir() and any(path.name not in kept for path in folder.iterdir()) and not overwrite:
        raise UserError(f"--output '{folder}' is not empty: choose another folder, or pass --overwrite.")
    require_writable(folder)


def _check_file(file: Path | None, option: str = "--json") -> None:
    from .disk import require_writable

    if file is None:
        return
    if file.is_dir() or not file.parent.is_dir():
        raise UserError(f"{option} '{file}' cannot be written: it is a folder, or its folder does not exist.")
    require_writable(file)


def main() -> None:
    """Entry point of `hf-vit-lowrank` and of `python -m hf_vit_lowrank`."""
    app()
