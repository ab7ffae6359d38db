"""The whole job on an example that needs no download: train on digits, compress, measure, draw."""

from __future__ import annotations

from pathlib import Path

from . import tables
from .compress import compress
from .digits import train_digits_model, write_digits_data
from .evaluation import EvaluationReport, evaluate_classifier, load_classifier
from .images import open_images
from .recipe import CompressionRecipe
from .sweep import sweep

# What is made once for all runs.
KEPT = ("data", "dense")
REDUCTIONS = (0.4, 0.6, 0.8, 0.9, 0.93)


def run_demo(output: Path, reduction: float, *, show: bool = True) -> EvaluationReport:
    """Train a ViT on digits (or take the one an earlier run left), compress it, measure both on other digits.

    Writes into `output`: dense/ (the trained model), data/ (the images), compressed/ (the checkpoint), sweep.png,
    sweep.json and sweep.md (many sizes), evaluation.json. `show` prints what is done, and tables. The same call gives
    the same checkpoint.
    """
    say = print if show else _say_nothing
    recipe = CompressionRecipe(reduction=reduction, rank_multiple=1)  # the model is small

    train, test = write_digits_data(output / "data")
    say("1. Training a small ViT on 1,297 handwritten digits (a minute; one that is there is taken)", flush=True)
    dense = train_digits_model(output / "dense")

    say(
        f"2. Removing {reduction:.0%} of its parameters, from {recipe.samples} of these images without labels",
        flush=True,
    )
    calibration = open_images(train, samples=recipe.samples, seed=recipe.seed)
    result = compress(str(dense), calibration, recipe)
    result.save_pretrained(output / "compressed", overwrite=True)

    say("3. Measuring both on 500 other digits", flush=True)
    model, image_processor = load_classifier(str(output / "compressed"))
    held_out = open_images(test, seed=None)
    report = evaluate_classifier(model, image_processor, held_out, against=load_classifier(str(dense)))
    (output / "evaluation.json").write_text(report.to_json())

    say(f"4. Other sizes, for the picture: {', '.join(f'{size:.0%}' for size in REDUCTIONS)}", flush=True)
    rows = sweep(str(dense), calibration, list(REDUCTIONS), recipe, dataset=held_out, output=output)
    if show:
        tables.show_compression(result.report, output / "compressed")
        tables.show_sweep(rows, output)
        tables.show_evaluation(report.to_dict())
    return report


def _say_nothing(*args: object, **kwargs: object) -> None:
    pass
