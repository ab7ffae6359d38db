"""The README.md of a checkpoint, made from its record alone: the same record gives the same text."""

from __future__ import annotations

import logging
import re
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, constants
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from .recipe import OURS, TRAINED, CompressionRecipe

logger = logging.getLogger(__name__)

PICTURE = "rank_plan.png"
_TEMPLATE = Path(__file__).with_name("card_template.md.jinja")
_IMAGE_ARGUMENTS = ("config", "split", "image_column", "label_column", "samples", "seed")
# What a source's card says that is true of a smaller model, too.
_KEPT = ("license", "license_name", "license_link", "language", "tags", "datasets")
# The line of the snippet that says where the checkpoint is.
_PLACE = re.compile(r"^checkpoint, revision = .*$", re.MULTILINE)


def read_card(path: Path) -> dict[str, Any]:
    """Licence, language, tags and training data from the metadata of a card, as far as they are there; JSON-able."""
    if not path.is_file():
        return {}
    try:
        data = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except Exception as error:  # YAML's, Unicode's, the hub client's: a source is no worse for a broken card
        logger.warning("the card %s cannot be read (%s): its licence and tags are not taken over", path, error)
        return {}
    return {name: data[name] for name in _KEPT if _is_text(data.get(name))}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(each, str) for each in value))


def evaluation_record(report: dict[str, Any]) -> dict[str, Any]:
    """The part of an `EvaluationReport` that a card shows: accuracies, not the speed of the machine it was made on."""
    dense = report["against"]
    return {
        **{name: report[name] for name in ("images", "top1", "top5", "agreement")},
        "data": report["data"] and without_folders(report["data"]),
        "skipped": len(report["skipped"]),
        "against": dense and {name: dense[name] for name in ("top1", "top5")},
    }


def without_folders(place: dict[str, Any]) -> dict[str, Any]:
    """A source or data set as it may be published: of a "location" on this machine only the last part."""
    if place.get("hub") or place.get("revision") is not None:
        return place
    return {**place, "location": short_name(place["location"])}


def pin(card: str, repository: str, revision: str) -> str:
    """The card with a snippet that loads from a repository; the same card where its snippet was taken out."""
    return _PLACE.sub(lambda _: _place(repository, revision), card, count=1)


def unpin(card: str) -> str:
    """The card as it was before `pin`."""
    return _PLACE.sub(lambda _: _place(None, "main"), card, count=1)


def pinned_revision(card: str) -> str | None:
    """The commit that the snippet of a card names."""
    line = _PLACE.search(card)
    found = re.search(r"'([0-9a-f]{40})'", line.group()) if line else None
    return found.group(1) if found else None


def _place(repository: str | None, revision: str) -> str:
    if repository is None:
        return (
            'checkpoint, revision = ".", "main"  # this folder; or the repository it is in, and the commit whose code '
            "you have read"
        )
    return f"checkpoint, revision = {repository!r}, {revision!r}  # the commit whose code you have read"


def model_card(record: dict[str, Any], *, picture: str | None = None) -> str:
    """Markdown with the hub's metadata on top.

    record: of a compression (see `compression_record`), and what was done behind it; "evaluation" where there was one
        (see `evaluation_record`).
    picture: file beside the card that shows the rank plan.

    The snippet loads the folder it is run in; `pin` makes it load from a repository. Of paths on the machine where the
    model was made only the last part is shown. Text from outside (paths, ids) goes into code spans or into Python and
    shell literals, so it cannot change the page.
    """
    source, evaluation = record["source"], record.get("evaluation") or {}
    reduction, command = 1 - record["parameters"] / source["parameters"], command_line(record)
    template = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True).from_string(
        _TEMPLATE.read_text(encoding="utf-8")
    )
    return template.render(
        metadata=Markup(_metadata(record).to_yaml().strip()),
        title=Markup(f"{_code(short_name(source['location']))}, {100 * reduction:.0f} % smaller"),
        source=_code(source["location"]) if _on_hub(source) else "a model in a local folder",
        removed=f"{100 * reduction:.1f} %",
        dense={"parameters": _millions(source["parameters"])},
        small={"parameters": _millions(record["parameters"])},
        method=_method(record),
        mode="L" if record["num_channels"] == 1 else "RGB",
        place=Markup(_place(None, "main")),
        picture=picture,
        rows=_rows(record),
        evaluation=_evaluation(evaluation) if evaluation else None,
        remote_code=record["remote_code"],
        has_accuracy=evaluation.get("top1") is not None,
        call=_call(record),
        command=None if "\n" in command else Markup(command),
        versions=", ".join(f"{name} {version}" for name, version in sorted(record["versions"].items())),
    )


def _method(record: dict[str, Any]) -> list[str]:
    """What was done, in sentences."""
    recipe = record["recipe"]
    preset, compensation = recipe["preset"], recipe["compensation"]
    by_blocks, whole = (record.get(stage, {}).get("kept", False) for stage in ("gradient", "distillation"))
    undone = ", since what training was tried left it no nearer to the dense model" * (compensation in TRAINED)
    low_rank = " (and low-rank up weights, bypasses and projections of the patches where those pay),"
    sizes = ", as many everywhere," if recipe["native"] else low_rank
    made = (
        f"Every attention head keeps only the ranks, and every MLP only the hidden units{sizes} that its activations "
        "on a set of images need."
        if preset == OURS
        else Markup(f"The method is the preset {_code(preset)}, which is there to compare with.")
    )
    stream = stream_left(record["plan"])
    refits, fitted = compensation != "none" and preset == OURS, preset == "paper"
    sentences = [
        (True, made),
        (
            stream is not None,
            f"The stream of tokens has {stream} entries, in directions that were learned without labels.",
        ),
        (
            "probes" in record,
            "They were chosen again by what each size was worth once the others had been refitted, which was measured.",
        ),
        (
            refits,
            "The weights that remain were refitted in closed form, block by block, so that the tokens meet those of "
            "the dense model.",
        ),
        (fitted, "Its second tensors were fitted by gradient, each to the output error of its layer."),
        (by_blocks, "Its blocks were then trained one by one towards the dense ones."),
        (
            whole,
            f"The whole was then trained on the dense model's outputs, {'and' if recipe['labels'] else 'without'} "
            "labels.",
        ),
        (not by_blocks and not whole, f"Nothing {'else ' * (stream is not None or fitted)}was trained{undone}."),
    ]
    return [sentence for said, sentence in sentences if said]


def _metadata(record: dict[str, Any]) -> ModelCardData:
    """The hub knows four relations to a base model: adapter, finetune, merge, quantized.

    "quantized" is where its model tree lists smaller stand-ins for the same model. Left out, the hub would infer
    "finetune", which claims a training that did not happen; the tags say what was done.
    """
    source, calibration = record["source"], record["calibration"]
    kept = dict(source["card"])
    datasets = [*_list(kept.pop("datasets", [])), *([calibration["location"]] if calibration.get("hub") else [])]
    tags = [*_list(kept.pop("tags", [])), "vit", "low-rank", "compression", "hf-vit-lowrank"]
    results = _results(record)
    link = kept.get("license_link")
    if link and "://" not in link:  # a file beside the source's weights
        kept["license_link"] = (
            f"{constants.ENDPOINT}/{source['location']}/blob/main/{link}" if _on_hub(source) else None
        )
    return ModelCardData(
        **kept,
        base_model=source["location"] if _on_hub(source) else None,  # a path is no id of the hub
        base_model_relation="quantized" if _on_hub(source) else None,
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=list(dict.fromkeys(tags)),
        datasets=list(dict.fromkeys(datasets)) or None,
        metrics=["accuracy"] if results else None,
        model_name=f"{short_name(source['location'])}-lowrank" if results else None,
        eval_results=results or None,
    )


def _list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _results(record: dict[str, Any]) -> list[EvalResult]:
    """For the metadata's model-index. As in `evaluate`'s metric of that name, accuracy is a share, not in percent."""
    evaluation = record.get("evaluation") or {}
    data = evaluation.get("data") or {"location": "images"}
    location = data["location"]
    # The builders of `datasets` stand for data that have no id on the hub, as in the cards that transformers writes.
    builder = "parquet" if location.endswith(".parquet") else "imagefolder"
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=location if data.get("hub") else builder,
            dataset_name=_shown(data),
            dataset_config=data.get("config"),
            dataset_split=data.get("split"),
            dataset_args={"images": evaluation["images"]},
            metric_type="accuracy",
            metric_name=f"{name} accuracy",
            metric_value=round(evaluation[key] / 100, 6),
        )
        for name, key in (("top-1", "top1"), ("top-5", "top5"))
        if evaluation.get(key) is not None
    ]


def _on_hub(source: dict[str, Any]) -> bool:
    """A source that is a folder has no revision."""
    return source.get("revision") is not None


def _rows(record: dict[str, Any]) -> list[dict[str, str]]:
    dense_parameters, parameters = record["source"]["parameters"], record["parameters"]
    rows = [
        _row("parameters", dense_parameters, parameters, _millions),
        _row("weights in float32", 4 * dense_parameters, 4 * parameters, lambda size: f"{size / 1e6:.1f} MB"),
        _row(f"FLOPs of one image{flops_scope(record)}", record["dense_flops"], record["flops"], _billions),
    ]
    evaluation = record.get("evaluation") or {}
    for name, key in (("top-1", "top1"), ("top-5", "top5")):
        small, dense = evaluation.get(key), (evaluation.get("against") or {}).get(key)
        if small is not None:
            change = "" if dense is None else f"{small - dense:+.2f} points"
            rows.append({"name": name, "dense": _percent(dense), "small": _percent(small), "change": change})
    return rows


def flops_scope(record: dict[str, Any]) -> str:
    """To say behind FLOPs of a record. `evaluate` counts the dense model's as transformers computes it, every token in
    the last block."""
    return ", last block for the tokens read" * record["remote_code"]


def stream_left(plan: dict[str, Any]) -> str | None:
    """Of the plan in a record: "176 of 192" entries of the stream; None where it leaves all."""
    size, whole = plan["hidden_size"], plan["dense_hidden_size"]
    return None if size == whole else f"{size} of {whole}"


def _row(name: str, dense: float, small: float, written: Any) -> dict[str, str]:
    change = f"{100 * (small / dense - 1):+.1f} %"
    return {"name": name, "dense": written(dense), "small": written(small), "change": change}


def _evaluation(evaluation: dict[str, Any]) -> dict[str, Any]:
    data, agreement = evaluation["data"], evaluation["agreement"]
    split = f" (split {data['split']})" if data and data.get("split") else ""
    return {
        "images": evaluation["images"],
        "data": _code(f"{_shown(data)}{split}") if data else None,
        "agreement": None if agreement is None else _percent(agreement),
        "skipped": evaluation["skipped"],
    }


def _call(record: dict[str, Any]) -> dict[str, Markup | None]:
    source, calibration = record["source"], record["calibration"]
    options = {name: calibration[name] for name in _IMAGE_ARGUMENTS if calibration.get(name) is not None}
    recipe = {name: value for name, value in record["recipe"].items() if value is not None}
    revision = source.get("revision")
    return {
        "source": _literal(_shown(source)),
        "revision": _literal(revision) if revision else None,
        "images": Markup(", ".join([_literal(_shown(calibration)), *_keywords(options)])),
        "recipe": Markup(", ".join(_keywords(recipe))),
    }


def command_line(record: dict[str, Any]) -> str:
    """The command that makes the checkpoint again, for a POSIX shell, with the options that are not at their
    defaults."""
    source, calibration, recipe = record["source"], record["calibration"], record["recipe"]
    default = {**CompressionRecipe(reduction=0.0, preset=recipe["preset"]).to_dict(), "reduction": None, "preset": OURS}
    named = ("config", "split", "image_column", *(["label_column"] if recipe["labels"] else []))
    images = {name: calibration.get(name) for name in named}
    chosen = {name: value for name, value in recipe.items() if value != default.get(name)}
    chosen = {**images, **chosen, "revision": source["revision"], "output": "compressed"}
    words = ["hf-vit-lowrank", "compress", _shown(source), "--calibration", _shown(calibration)]
    for name, value in chosen.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return shlex.join(words)


def _shown(place: dict[str, Any]) -> str:
    """An id of the hub, or the last part of a path."""
    return without_folders(place)["location"]


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


def short_name(location: str) -> str:
    """The last part of a path or id."""
    name = location.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1]
    return Path(location).resolve().name if name in (".", "..") else name or location


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f} G"


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M"


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f} %"
