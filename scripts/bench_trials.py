"""Trials of the method, judged on calibration images that nothing is fitted on: what is built in, and what is not.

A trial changes the recipe, or constants or functions of the method. All but those of BUILT_IN are without pivots and
lower ranks of up weights, see all of the drift and train in four passes on all tokens, and all but those and NARROW
leave the stream of tokens as wide as it is, whatever the size.
Writes trials.json and trials.md into OUTPUT; a finished trial is not run again.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated, Any
from unittest.mock import patch

import datasets
import torch
import transformers
import trial_folds
import trial_methods
import typer
from trial_sizes import learned_plan

from hf_vit_lowrank.budget import recipe_ranks
from hf_vit_lowrank.calibration import NOWHERE, TRAINING_SHARE, Calibrated, calibrate
from hf_vit_lowrank.candidates.block import block_candidates
from hf_vit_lowrank.compensation.steps import compensate
from hf_vit_lowrank.compress import build
from hf_vit_lowrank.divergence import held_back_agreement, held_back_divergence
from hf_vit_lowrank.embeddings import embedded_by
from hf_vit_lowrank.errors import RunError, UserError
from hf_vit_lowrank.export import densified
from hf_vit_lowrank.recipe import CompressionRecipe
from hf_vit_lowrank.remote.modeling_lowrank_vit import LowRankViTForImageClassification
from hf_vit_lowrank.statistics import collect_statistics
from hf_vit_lowrank.surgery import shrink

Constant = tuple[str, str, Any]
WHOLE_EMBEDDINGS: Constant = ("rank_plan", "largest_embedding_ranks", lambda *_: {})
WHOLE_STREAM: Constant = ("rank_plan", "STREAM_FROM", 1.0)
NO_PIVOTS: Constant = ("candidates.pivots", "TENTHS", 0)
WHOLE_UP_WEIGHTS: Constant = ("candidates.block", "UP_RANK_WEIGHT", 1e30)
ALL_PATCHES: list[Constant] = [("statistics", "ONE_PATCH_IN", 1), ("compensation.closed_form", "ONE_PATCH_IN", 1)]
ALL_DRIFT: Constant = ("compensation.drift", "DRIFT_SEEN", 1.0)
FOUR_PASSES: list[Constant] = [("compensation.gradient", "SAMPLED", 1024), ("compensation.gradient", "EPOCHS", 4)]
# Of the trials that want a GPU.
LONG = {"compensation": "distill", "distill_epochs": 180, "batch_size": 64}
NO_BYPASS: Constant = ("rank_plan", "BYPASS_ROUNDS", 0)
MUON: Constant = ("compensation.gradient", "_descend", trial_methods.descend_by_muon)
MORE_RIDGES: Constant = ("regression", "RIDGES", tuple(10.0 ** (half / 2) for half in range(-12, 9)))


def by_direction(power: float) -> list[Constant]:
    return [MORE_RIDGES, ("regression.NormalEquations", "solve", trial_methods.ridge_by_direction(power))]


# Trial: what differs in the recipe, and the constants and functions that differ.
TRIALS: dict[str, tuple[dict[str, Any], list[Constant]]] = {
    "closed form, pivots": ({}, []),
    "closed form, pivots, whole up weights": ({}, [WHOLE_UP_WEIGHTS]),
    "closed form, pivots, losses of up ranks weighed by one": ({}, [("candidates.block", "UP_RANK_WEIGHT", 1.0)]),
    # In a call of its own, since trials share the statistics of the whole stream.
    "closed form, pivots, all patches": ({}, ALL_PATCHES),
    "closed form, pivots, all of the drift seen": ({}, [ALL_DRIFT]),
    "closed form, pivots, 0.7 of the drift seen": ({}, [("compensation.drift", "DRIFT_SEEN", 0.7)]),
    "closed form": ({}, []),
    "closed form, narrower stream": ({}, []),
    "closed form, narrower stream, not learned": ({}, [("narrowing", "LEARNING_RATE", 0.0)]),
    "closed form, no bypass": ({}, [NO_BYPASS]),
    "closed form, query-key x2": ({"query_key_weight": 2.0}, []),
    "closed form, query-key x8": ({"query_key_weight": 8.0}, []),
    "closed form, value-output x1": ({}, [("candidates.block", "VALUE_OUTPUT_WEIGHT", 1.0)]),
    "closed form, value-output x3": ({}, [("candidates.block", "VALUE_OUTPUT_WEIGHT", 3.0)]),
    "closed form, last MLP as the others": ({}, [("candidates.block", "LAST_WIDTH_WEIGHT", 1.0)]),
    "closed form, last MLP by a fifth": ({}, [("candidates.block", "LAST_WIDTH_WEIGHT_WHOLE", 0.2)]),
    "closed form, sizes in multiples of 1": ({"rank_multiple": 1}, []),
    "closed form, embeddings whole": ({}, [WHOLE_EMBEDDINGS]),
    "closed form, ridge 1e-5": ({}, [("regression", "RIDGES", (1e-5,)), ("regression", "START", 0)]),
    "closed form, units removed with ridge 0.1": ({}, [("candidates.mlp_width", "RIDGE", 0.1)]),
    "closed form, sizes probed": ({"probe": True}, []),
    "closed form, fitted on 2 views as well": ({}, [("compensation.steps", "refit", trial_methods.refit_on_views(2))]),
    "closed form, fitted on 5 views as well": ({}, [("compensation.steps", "refit", trial_methods.refit_on_views(5))]),
    "closed form, ten folds": (
        {},
        [
            ("compensation.closed_form", "_refit_attention", trial_folds.refit_attention),
            ("compensation.closed_form", "_refit_mlp", trial_folds.refit_mlp),
        ],
    ),
    "closed form, ridges by variance^0.5": ({}, by_direction(0.5)),
    "closed form, ridges by variance": ({}, by_direction(1.0)),
    "gradient, pivots": ({"compensation": "gradient"}, []),
    "gradient, pivots, whole up weights": ({"compensation": "gradient"}, [WHOLE_UP_WEIGHTS]),
    "gradient, pivots, all of the drift seen": ({"compensation": "gradient"}, [ALL_DRIFT]),
    "gradient, pivots, 0.6 of the drift seen": (
        {"compensation": "gradient"},
        [("compensation.drift", "DRIFT_SEEN", 0.6)],
    ),
    "gradient, pivots, four passes on all tokens": ({"compensation": "gradient"}, FOUR_PASSES),
    "gradient": ({"compensation": "gradient"}, []),
    "gradient, sizes probed": ({"compensation": "gradient", "probe": True}, []),
    "gradient, no random views": ({"compensation": "gradient"}, [("compensation.steps", "VIEWS", 0)]),
    "gradient, last block not blended": (
        {"compensation": "gradient"},
        [("compensation.gradient", "LARGEST_SHARE", 0.0)],
    ),
    "gradient, 8 passes": ({"compensation": "gradient"}, [("compensation.gradient", "EPOCHS", 8)]),
    "gradient, embeddings whole": ({"compensation": "gradient"}, [WHOLE_EMBEDDINGS]),
    "gradient, bypasses": ({"compensation": "gradient"}, [("budget", "TRAINED", ())]),
    "gradient, 2 views and 8 passes": (
        {"compensation": "gradient"},
        [("compensation.steps", "VIEWS", 2), ("compensation.gradient", "EPOCHS", 8)],
    ),
    "gradient, 11 views and 2 passes": (
        {"compensation": "gradient"},
        [("compensation.steps", "VIEWS", 11), ("compensation.gradient", "EPOCHS", 2)],
    ),
    "gradient, crops from 15 %": ({"compensation": "gradient"}, [("augmentation", "CROP_AREA", (0.15, 1.0))]),
    "gradient, Muon": ({"compensation": "gradient"}, [MUON]),
    "gradient, Muon, crops from 60 %": (
        {"compensation": "gradient"},
        [MUON, ("augmentation", "CROP_AREA", (0.6, 1.0))],
    ),
    "gradient, mixed views": (
        {"compensation": "gradient"},
        [("augmentation.RandomViews", "batch", trial_methods.mixed_views)],
    ),
    "gradient, map before the classifier": (
        {"compensation": "gradient"},
        [("compress", "compensate", trial_methods.map_before_classifier(0.3))],
    ),
    "gradient, rate 5e-4": ({"compensation": "gradient"}, [("compensation.gradient", "LEARNING_RATE", 5e-4)]),
    "distill, 2 passes": ({"compensation": "distill", "distill_epochs": 2}, []),
    "distill, 2 passes, rate 3e-5, stream weighed 0.5": (
        {"compensation": "distill", "distill_epochs": 2, "distill_lr": 3e-5},
        [("compensation.distill", "STREAM_WEIGHT", 0.5)],
    ),
    "distill, 2 passes, rate 3e-5, stream weighed 5": (
        {"compensation": "distill", "distill_epochs": 2, "distill_lr": 3e-5},
        [("compensation.distill", "STREAM_WEIGHT", 5.0)],
    ),
    "distill, 2 passes, rate 3e-5, stream weighed 0.5, random views only": (
        {"compensation": "distill", "distill_epochs": 2, "distill_lr": 3e-5},
        [("compensation.distill", "STREAM_WEIGHT", 0.5), ("compensation.distill", "PLAIN", 0.0)],
    ),
    "distill, 4 passes": ({"compensation": "distill", "distill_epochs": 4}, []),
    "distill, 4 passes, Muon": (
        {"compensation": "distill", "distill_epochs": 4},
        [("compensation.distill._Distiller", "create_optimizer", trial_methods.distilled_by_muon)],
    ),
    "distill, 15 passes": ({"compensation": "distill", "distill_epochs": 15}, []),
    "distill, 15 passes, rate 3e-5, stream weighed 0.5": (
        {"compensation": "distill", "distill_epochs": 15, "distill_lr": 3e-5},
        [("compensation.distill", "STREAM_WEIGHT", 0.5)],
    ),
    "distill, 180 passes": (LONG, []),
    "distill, 180 passes, rate 3e-4": (LONG | {"distill_lr": 3e-4}, []),
    "distill, 180 passes, rate 3e-4, stream weighed 50": (
        LONG | {"distill_lr": 3e-4},
        [("compensation.distill", "STREAM_WEIGHT", 50.0)],
    ),
    "distill, 180 passes, rate 3e-4, varied views": (
        LONG | {"distill_lr": 3e-4},
        [("compensation.distill", "PLAIN", 0.1), ("augmentation", "CROP_AREA", (0.15, 1.0))],
    ),
}
# As the method is built in, or but for what they say.
BUILT_IN = tuple(name for name in TRIALS if ", pivots" in name)
NARROW = ("closed form, narrower stream", "closed form, narrower stream, not learned")
TWO_STEPS = "closed form, in two steps"
# How far to go from the built-in sizes to learned ones.
LEARNED = {"closed form, sizes learned": 1.0, "closed form, half way to learned sizes": 0.5}
ALL = [*TRIALS, TWO_STEPS, *LEARNED]


def main(
    source: Annotated[str, typer.Argument(help="Dense ViT or DeiT classifier: a hub id or a folder.")],
    calibration: Annotated[str, typer.Option(help="Images; the last of them are held back to measure on.")],
    output: Annotated[Path, typer.Option(help="Folder for trials.json and trials.md.")],
    reduction: Annotated[float, typer.Option(help="Share of the parameters to remove.")] = 0.6,
    trials: Annotated[
        str | None, typer.Option(help=f"Separated by semicolons, of: {'; '.join(ALL)} (default: all).")
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration images.", min=2)] = 1024,
    held_back: Annotated[float, typer.Option(help="Share of them to measure on.")] = TRAINING_SHARE,
    device: Annotated[str | None, typer.Option(help="cpu, cuda … (default: the best one here).")] = None,
) -> None:
    """Compress by variants of the method and show how far each is from the dense model on held-back images."""
    chosen = [name.strip() for name in trials.split(";")] if trials else ALL
    if unknown := [name for name in chosen if name not in ALL]:
        raise UserError(f"There is no trial '{unknown[0]}'; there are {'; '.join(ALL)}.")
    output.mkdir(parents=True, exist_ok=True)
    path = output / "trials.json"
    rows: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    recipe = CompressionRecipe(reduction=reduction, samples=samples)
    calibrated = calibrate(source, calibration, recipe, hold_back=held_back, device=device)
    for name in chosen:
        key = f"−{100 * reduction:g} %, {100 * held_back:g} % held back: {name}"
        if key not in rows:
            start = time.perf_counter()
            model, curve = _made(calibrated, recipe, name)
            rows[key] = {
                "divergence": held_back_divergence(calibrated, model),
                "agreement": 100 * held_back_agreement(calibrated, model),
                "curve": curve,
                "seconds": time.perf_counter() - start,
            }
            path.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (output / "trials.md").write_text(_table(rows), encoding="utf-8")
    print(_table(rows))


def _made(calibrated: Calibrated, recipe: CompressionRecipe, name: str) -> tuple[Any, Any]:
    """The model of a trial and, where it was distilled, the curve."""
    calibrated.narrowed.clear()  # another trial's stream
    earlier = [NO_PIVOTS, WHOLE_UP_WEIGHTS, ALL_DRIFT, *FOUR_PASSES, *([] if name in NARROW else [WHOLE_STREAM])]
    with _changed([] if name in BUILT_IN else earlier):
        return _built(calibrated, recipe, name)


def _built(calibrated: Calibrated, recipe: CompressionRecipe, name: str) -> tuple[Any, Any]:
    if name == TWO_STEPS:
        return _in_two_steps(calibrated, recipe), None
    if name in LEARNED:
        plan = learned_plan(calibrated, recipe, LEARNED[name])
        with _changed([NO_BYPASS, ("compress", "recipe_ranks", lambda *_: plan)]):
            return build(calibrated, recipe).model, None
    fields, constants = TRIALS[name]
    with _changed(constants):
        result = build(calibrated, replace(recipe, **fields))
    return result.model, result.report.get("distillation", {}).get("curve")


def _in_two_steps(calibrated: Calibrated, recipe: CompressionRecipe) -> LowRankViTForImageClassification:
    """Half of the reduction first; then statistics and error curves of that model, compensated, for the other half.

    The stream to reach stays the dense model's.
    """
    assert recipe.reduction is not None
    with _changed([("compress", "pivoted", lambda model: model)]):  # in the stream of the dense model
        half = build(calibrated, replace(recipe, reduction=recipe.reduction / 2)).model
    whole = densified(half).requires_grad_(False)
    fitting = embedded_by(half, calibrated.dense.model, calibrated.fitting)
    statistics = collect_statistics(whole, fitting, recipe.seed, torch.float32, None, calibrated.images_at_once)
    blocks: Any = zip(whole.vit.blocks, statistics, strict=True)
    candidates = [
        block_candidates(block.attention.output.weight, block.mlp.up.weight, block.mlp.down.weight, moments)
        for block, moments in blocks
    ]
    plan = recipe_ranks(calibrated.dense, candidates, calibrated.embedding, recipe)
    small = shrink(whole, candidates, calibrated.embedding, statistics, plan)
    compensate(calibrated, small, recipe, {}, NOWHERE)
    return small


@contextmanager
def _changed(constants: list[Constant]) -> Iterator[None]:
    """Constants and functions of the package, replaced."""
    with ExitStack() as stack:
        for owner, name, value in constants:
            stack.enter_context(patch.object(resolve_name(f"hf_vit_lowrank.{owner}"), name, value))
        yield


def _table(rows: dict[str, Any]) -> str:
    lines = ["| trial | KL to dense, nats | agreement % | seconds |", "|---|---:|---:|---:|"]
    for name, row in rows.items():
        lines.append(f"| {name} | {row['divergence']:.3f} | {row['agreement']:.1f} | {row['seconds']:.0f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        typer.run(main)
    except (UserError, RunError) as error:
        sys.exit(f"Error: {error}")
