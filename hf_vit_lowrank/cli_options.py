"""The options of the command line, each defined once, and those that several commands share, in groups."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer

from .recipe import COMPENSATIONS, COSTS, OURS, PRESETS, CompressionRecipe


def option(help: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=help, **settings)


SIZE, IMAGES, RUN = ({"rich_help_panel": panel} for panel in ("How small (give exactly one)", "Images", "Run"))
FORM = {"rich_help_panel": "What to write (give exactly one)"}

Source = Annotated[str, typer.Argument(help="ViT or DeiT classifier: a hub id or a folder.", show_default=False)]
Revision = Annotated[str | None, option("Branch, tag or commit of the source on the hub.", **RUN)]
AllowPickle = Annotated[
    bool, option("Also read pickled weights (pytorch_model.bin), of authors you trust.", "--allow-pickle", **RUN)
]

Reduction = Annotated[float | None, option("Share of the parameters (see --cost) to remove: 0.6 is 60 %.", **SIZE)]
MaxParameters = Annotated[
    str | None, option("Most parameters the result may have.", metavar="NUMBER, 34.6M or 900k", **SIZE)
]
Match = Annotated[str | None, option("As small as this model (hub id or folder).", **SIZE)]
MinAgreement = Annotated[
    float | None,
    option("Smallest model that keeps this share of the dense model's predictions on held-back images.", **SIZE),
]

Calibration = Annotated[
    str,
    option(
        "Images, labels unused: a data set on the hub, a folder, a parquet file or a data set saved to disk.",
        show_default=False,
        **IMAGES,
    ),
]
Split = Annotated[str | None, option("Split of the data set.", **IMAGES)]
Config = Annotated[str | None, option("Configuration of the data set on the hub.", **IMAGES)]
ImageColumn = Annotated[str | None, option("Column with the images, where there are several.", **IMAGES)]
LabelColumn = Annotated[str | None, option("Column with the labels.", **IMAGES)]
Samples = Annotated[int, option("Calibration images to use.", min=1, **IMAGES)]
OptionalDataset = Annotated[
    str | None, option("Images with labels to measure on (default: agreement only, on held-back images).", **IMAGES)
]
DatasetSplit = Annotated[str | None, option("Split of --dataset.", **IMAGES)]
DatasetImageColumn = Annotated[str | None, option("Column with the images of --dataset.", **IMAGES)]
DatasetConfig = Annotated[str | None, option("Configuration of --dataset.", **IMAGES)]

Cost = Annotated[str, option("What the budget counts and ranks compete for.", metavar="|".join(COSTS))]
Preset = Annotated[
    str,
    option(f"The method: this package's own, or one to compare with: {', '.join(PRESETS[1:])}.", metavar="NAME"),
]
Compensation = Annotated[
    str | None,
    option(
        f"Repair by refits (closed-form; {OURS} only), then by training block by block (gradient), then by training "
        "the whole model (distill). "
        f"Default: closed-form for {OURS}, none for other presets.",
        metavar="|".join(COMPENSATIONS),
    ),
]
DistillEpochs = Annotated[int, option("Passes over the images in distillation.", min=1)]
DistillLr = Annotated[float, option("Peak learning rate of distillation.")]
Labels = Annotated[bool, option("Let distillation learn from the labels as well.", "--labels")]
Checkpointing = Annotated[
    bool, option("Let distillation compute activations twice: less memory.", "--gradient-checkpointing")
]
Smoke = Annotated[bool, option("A few steps of distillation only, to see that everything works.", "--smoke")]
Native = Annotated[
    bool,
    option(
        "One head size and one MLP width for the whole model, which transformers loads without remote code.", "--native"
    ),
]
QueryKeyWeight = Annotated[
    float, option(f"Factor on the error curves of query and key, which predict too little ({OURS}).")
]
RankMultiple = Annotated[
    int, option(f"Inner sizes of a layer are multiples of this, which matrix products want; 1: any ({OURS}).", min=1)
]
Probe = Annotated[
    bool,
    option("Measure what sizes are worth once blocks are refitted, and choose ranks again by that: slow.", "--probe"),
]

RecipeFile = Annotated[
    Path | None,
    option("Recipe in YAML (see recipe show); options given here go before what it says.", "--recipe", metavar="FILE"),
]

Seed = Annotated[int, option("Seed of the choice of images and of all that is drawn.", min=0, **RUN)]
BatchSize = Annotated[int, option("Images at once, and in a step of training.", min=1, **RUN)]
Device = Annotated[
    str | None, option("cpu, cuda, mps … (default: the best one here). Each of several processes takes its own.", **RUN)
]
Output = Annotated[Path, option("Folder to write.", show_default=False, **RUN)]
MemoryLimit = Annotated[
    str | None,
    option(
        "Memory that the run may take: where its blocks do not fit at once, they go in groups by several passes, and "
        "their moments are parked on disk; distillation takes fewer images at once.",
        metavar="16GB",
        **RUN,
    ),
]
Overwrite = Annotated[bool, option("Replace what an earlier run wrote to the folder.", "--overwrite", **RUN)]
Restart = Annotated[bool, option("Throw away what an unfinished run left and begin anew.", "--restart", **RUN)]
Json = Annotated[Path | None, option("Also write the figures to this file.", metavar="FILE", **RUN)]
Quiet = Annotated[bool, option("Print nothing but warnings and errors.", "--quiet", "-q", **RUN)]
Debug = Annotated[bool, option("Show the traceback of an error.", "--debug", **RUN)]


@dataclass(frozen=True)
class ImageOptions:
    """Of a data set, as `open_images` takes them."""

    split: Split = None
    config: Config = None
    image_column: ImageColumn = None


@dataclass(frozen=True)
class LabelledOptions(ImageOptions):
    """Of a data set to measure on."""

    label_column: LabelColumn = None
    samples: Annotated[int | None, option("Use the first images only.", min=1, **IMAGES)] = None


@dataclass(frozen=True)
class SizeOptions:
    """Fields of a recipe, of which one is given."""

    reduction: Reduction = None
    max_parameters: MaxParameters = None
    match: Match = None
    min_agreement: MinAgreement = None


@dataclass(frozen=True)
class MethodOptions:
    """Fields of a recipe that every command with one has."""

    samples: Samples = CompressionRecipe.samples
    compensation: Compensation = None
    cost: Cost = CompressionRecipe.cost
    query_key_weight: QueryKeyWeight = CompressionRecipe.query_key_weight
    rank_multiple: RankMultiple = CompressionRecipe.rank_multiple
    seed: Seed = CompressionRecipe.seed
    batch_size: BatchSize = CompressionRecipe.batch_size


@dataclass(frozen=True)
class DistillOptions:
    """Fields of a recipe."""

    distill_epochs: DistillEpochs = CompressionRecipe.distill_epochs
    distill_lr: DistillLr = CompressionRecipe.distill_lr
    labels: Labels = False
    gradient_checkpointing: Checkpointing = False


@dataclass(frozen=True)
class LoadOptions:
    """How the dense model is loaded, and where it runs."""

    device: Device = None
    revision: Revision = None
    allow_pickle: AllowPickle = False


@dataclass(frozen=True)
class ReportOptions:
    json: Json = None
    quiet: Quiet = False
    debug: Debug = False

    def give(self, figures: Any, show: Callable[[], None]) -> None:
        """Write the figures to the file named, and `show` them unless nothing is to be printed."""
        if self.json:
            self.json.write_text(dumps(figures, indent=2) + "\n")
        if not self.quiet:
            show()


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """The same for typer, which wants every option of the groups (data classes) that `command` takes on its own."""
    parameters = inspect.signature(command, eval_str=True).parameters
    groups: dict[str, Any] = {name: one.annotation for name, one in parameters.items() if is_dataclass(one.annotation)}
    single: list[inspect.Parameter] = []
    for name, parameter in parameters.items():
        group = groups.get(name)
        single += inspect.signature(group, eval_str=True).parameters.values() if group else [parameter]

    @functools.wraps(command)
    def run(**options: Any) -> None:
        made = {
            name: group(**{field.name: options.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        command(**options, **made)

    keywords = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in single]
    run.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in single}
    return run
