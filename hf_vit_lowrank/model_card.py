"""The README.md of a checkpoint, made from its record alone: the same record gives the same text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from .recipe import OURS

_TEMPLATE = Path(__file__).with_name("card_template.md.jinja")
_IMAGE_ARGUMENTS = ("config", "split", "image_column", "label_column", "samples", "seed")


def model_card(record: dict[str, Any]) -> str:
    """Markdown with the hub's metadata on top.

    record: "source" (location, revision, parameters), "recipe", "calibration", "parameters"; where they are there also
        "flops", "dense_flops", "versions", "evaluation" (an `EvaluationReport`'s dictionary) and "repository" (id and
        revision on the hub, for the snippet; without it the snippet loads the folder it is run in).

    Text from outside (paths, ids) goes into code spans or Python literals, so it cannot change the page.
    """
    source, evaluation = record["source"], record.get("evaluation") or {}
    repository = record.get("repository") or {}
    reduction = 1 - record["parameters"] / source["parameters"]
    template = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True).from_string(
        _TEMPLATE.read_text(encoding="utf-8")
    )
    return template.render(
        metadata=Markup(_metadata(record).to_yaml().strip()),
        title=Markup(f"{_code(_short_name(source['location']))}, {100 * reduction:.0f} % smaller"),
        source=_code(source["location"]),
        removed=f"{100 * reduction:.1f} %",
        dense={"parameters": _millions(source["parameters"])},
        small={"parameters": _millions(record["parameters"])},
        method=_method(record.get("recipe", {})),
        repository=_literal(repository["id"]) if repository else None,
        revision=_literal(repository.get("revision") or "main"),
        rows=_rows(record),
        evaluation=_evaluation(evaluation) if evaluation else None,
        remote_code=record.get("remote_code", True),
        has_accuracy=evaluation.get("top1") is not None,
        call=_call(record),
        versions=", ".join(f"{name} {version}" for name, version in sorted(record.get("versions", {}).items())),
    )


def _method(recipe: dict[str, Any]) -> list[str]:
    """What was done, in sentences."""
    preset, compensation = recipe.get("preset", OURS), recipe.get("compensation")
    sizes = ", as many everywhere," if recipe.get("native") else " (and a low-rank bypass where that pays),"
    made = (
        f"Every attention head keeps only the ranks, and every MLP only the hidden units{sizes} that its activations "
        "on a set of images need."
        if preset == OURS
        else Markup(f"The method is the preset {_code(preset)}, which is there to compare with.")
    )
    refits = compensation != "none" and preset == OURS
    sentences = [
        (True, made),
        (
            refits,
            "The weights that remain were refitted in closed form, block by block, so that the tokens meet those of "
            "the dense model.",
        ),
        (compensation in ("gradient", "distill"), "Its blocks were then trained one by one towards the dense ones."),
        (
            compensation == "distill",
            f"The whole was then trained on the dense model's outputs, {'and' if recipe.get('labels') else 'without'} "
            "labels.",
        ),
        (compensation in ("none", "closed-form"), "Nothing was trained."),
    ]
    return [sentence for said, sentence in sentences if said]


def _metadata(record: dict[str, Any]) -> ModelCardData:
    """The hub knows four relations to a base model: adapter, finetune, merge, quantized.

    "quantized" is where its model tree lists smaller stand-ins for the same model. Left out, the hub would infer
    "finetune", which claims a training that did not happen; the tags say what was done.
    """
    source = record["source"]
    on_hub = source.get("revision") is not None  # folders have none, and base_model must be a hub id
    return ModelCardData(
        base_model=source["location"] if on_hub else None,
        base_model_relation="quantized" if on_hub else None,
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["vit", "low-rank", "compression", "hf-vit-lowrank"],
    )


def _rows(record: dict[str, Any]) -> list[dict[str, str]]:
    dense_parameters, parameters = record["source"]["parameters"], record["parameters"]
    rows = [
        _row("parameters", dense_parameters, parameters, _millions),
        _row("weights in float32", 4 * dense_parameters, 4 * parameters, lambda size: f"{size / 1e6:.1f} MB"),
    ]
    if record.get("flops") and record.get("dense_flops"):
        flops = _row("FLOPs of one image", record["dense_flops"], record["flops"], lambda count: f"{count / 1e9:.2f} G")
        rows.append(flops)
    evaluation = record.get("evaluation") or {}
    for name, key in (("top-1", "top1"), ("top-5", "top5")):
        small, dense = evaluation.get(key), (evaluation.get("against") or {}).get(key)
        if small is not None:
            change = "" if dense is None else f"{small - dense:+.2f} points"
            rows.append({"name": name, "dense": _percent(dense), "small": _percent(small), "change": change})
    return rows


def _row(name: str, dense: float, small: float, written: Any) -> dict[str, str]:
    change = f"{100 * (small / dense - 1):+.1f} %"
    return {"name": name, "dense": written(dense), "small": written(small), "change": change}


def _evaluation(evaluation: dict[str, Any]) -> dict[str, Any]:
    data, agreement = evaluation.get("data") or {}, evaluation.get("agreement")
    location = data.get("location")
    split = f" (split {data['split']})" if data.get("split") else ""
    return {
        "images": evaluation.get("images", "an unknown number of"),
        "data": _code(f"{location}{split}") if location else None,
        "agreement": None if agreement is None else _percent(agreement),
    }


def _call(record: dict[str, Any]) -> dict[str, Markup | None]:
    source, calibration = record["source"], record.get("calibration", {})
    options = {name: calibration[name] for name in _IMAGE_ARGUMENTS if calibration.get(name) is not None}
    recipe = {name: value for name, value in record.get("recipe", {}).items() if value is not None}
    revision = source.get("revision")
    return {
        "source": _literal(source["location"]),
        "revision": _literal(revision) if revision else None,
        "images": Markup(", ".join([_literal(calibration.get("location", "IMAGES")), *_keywords(options)])),
        "recipe": Markup(", ".join(_keywords(recipe))),
    }


def _keywords(values: dict[str, Any]) -> list[Markup]:
    return [Markup(f"{name}={value!r}") for name, value in values.items()]


def _literal(value: Any) -> Markup:
    """A Python literal: one line, so it cannot close the code block it stands in."""
    return Markup(repr(value))


def _code(text: str) -> Markup:
    """A Markdown code span on one line, with a fence longer than any run of backticks in the text."""
    text = " ".join(text.split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    padding = " " if "`" in text else ""
    return Markup(f"{fence}{padding}{text}{padding}{fence}")


def _short_name(location: str) -> str:
    return location.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1] or location


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M"


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f} %"
