"""One HTML page about a checkpoint: no script, no file beside it, no request."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from PIL import Image

from .checkpoint import small_record
from .errors import as_user_error
from .evaluation import evaluate_classifier, load_classifier
from .images import ImageStream
from .model_card import command_line, flops_scope, stream_left, without_folders
from .recipe import CompressionRecipe

_TEMPLATE = Path(__file__).with_name("report_template.html.jinja")
_HEADS = {"query_key_ranks": "query–key ranks", "value_output_ranks": "value–output ranks"}
_CURVES = {"query_key": "Query–key, all heads", "value_output": "Value–output, all heads", "mlp_width": "MLP width"}
_THUMBNAIL = 192  # pixels, the longer side
_SMALL = 64  # images up to this many pixels are kept as they are
_FLOOR = 1e-8  # an error curve is drawn down to this share of the largest error at most
_DECADES = 6  # at most this many lines across a chart


def read_checkpoint(folder: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """compression.json and config.json of a checkpoint folder. Raises UserError where it is none, was altered or is the
    dense form of another."""
    record = small_record(Path(folder))
    with as_user_error(f"The config.json of '{folder}' cannot be read"):
        return record, json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))


def measure(
    folder: str | Path, stream: ImageStream, *, against: str | None, batch_size: int, device: str | None
) -> dict[str, Any]:
    """The evaluation of a checkpoint folder for its page, `against` being the dense model (folder or hub id)."""
    model, image_processor = load_classifier(str(folder))
    dense = load_classifier(against) if against else None
    return evaluate_classifier(
        model, image_processor, stream, batch_size=batch_size, device=device, against=dense
    ).to_dict()


def report_page(
    record: dict[str, Any],
    config: dict[str, Any],
    evaluation: dict[str, Any] | None = None,
    stream: ImageStream | None = None,
) -> str:
    """The page, as the text of one HTML file; text from outside (paths, class names) is escaped.

    record: compression.json. config: config.json. evaluation: an `EvaluationReport`'s dictionary (None: the accuracies
    in the record, if there are some); what it lacks (the dense model, labels) the page goes without. stream: the images
    of that evaluation, for those on which both models disagree.
    """
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    plan, recipe = record["plan"], CompressionRecipe.from_dict(record["recipe"])
    accuracies = evaluation or record.get("evaluation")
    return template.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        name=Path(record["source"]["location"]).name,
        source=record["source"]["location"],
        revision=record["source"].get("revision"),
        removed=f"{100 * (1 - record['parameters'] / record['dense_parameters']):.0f} %",
        recipe=recipe,
        tiles=_tiles(record, accuracies),
        evaluation=accuracies,
        place=without_folders(accuracies["data"]) if accuracies and accuracies["data"] else None,
        heat_maps=_heat_maps(plan, config),
        embedding_ranks=plan.get("embedding_ranks", {}),
        stream_left=stream_left(plan),
        blocks=_block_bars(plan, _dense_width(record, config)),
        curves=_charts(record["error_curves"]) if record.get("error_curves") else None,
        drifts=_drift_bars(record["drift"]) if record.get("drift") else None,
        disagreements=_disagreements(evaluation, stream) if evaluation and stream else None,
        speeds=_speed_bars(evaluation) if evaluation else None,
        recipe_text=recipe.to_yaml(),
        command=command_line(record),
        calibration=record["calibration"],
        versions=record.get("versions", {}),
    )


# ----------------------------------------------------------------------------------------------------------- headlines


def _tiles(record: dict[str, Any], evaluation: dict[str, Any] | None) -> list[dict[str, str | None]]:
    """Name, value, the dense model's value and the change, of each headline number."""
    tiles = [
        _ratio("parameters", record["dense_parameters"], record["parameters"], _short),
        _ratio("float32 weights", record["dense_parameters"], record["parameters"], lambda n: f"{_short(4 * n)}B"),
        _ratio(f"FLOPs of one image{flops_scope(record)}", record["dense_flops"], record["flops"], _short),
    ]
    if evaluation is None:
        return tiles
    dense = evaluation["against"] or {}
    for name, key in (("top-1", "top1"), ("top-5", "top5")):
        value, whole = evaluation[key], dense.get(key)
        if value is not None:
            tile = {"name": name, "value": f"{value:.2f} %", "dense": None, "change": None}
            if whole is not None:
                tile |= {"dense": f"{whole:.2f} %", "change": _signed(f"{value - whole:+.2f} points")}
            tiles.append(tile)
    if evaluation["agreement"] is not None:
        same = {"name": "same first choice", "value": f"{evaluation['agreement']:.2f} %", "dense": None, "change": None}
        tiles.append(same)
    if "images_per_second" in dense:
        rates = (dense["images_per_second"], evaluation["images_per_second"])
        tiles.append(_ratio("images per second", *rates, lambda rate: f"{rate:,.0f}"))
    return tiles


def _ratio(name: str, dense: float, small: float, written: Any) -> dict[str, str | None]:
    change = _signed(f"{100 * (small / dense - 1):+.1f} %")
    return {"name": name, "value": written(small), "dense": written(dense), "change": change}


def _short(count: float) -> str:
    """ "1.15 G" for 1,154,000,000."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            digits = 3 if count < 100 * size else 4
            return f"{count / size:.{digits}g} {unit}"
    return f"{count:g} "


def _signed(text: str) -> str:
    return text.replace("-", "−")


# --------------------------------------------------------------------------------------------------------------- ranks


def _heat_maps(plan: dict[str, Any], config: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each block, a column for each head or factored weight; `share` says how dark a cell is, 0 to 1."""
    heads, width = config["num_attention_heads"], plan.get("dense_hidden_size", config["hidden_size"])
    if any(plan["factor_ranks"]):
        names = list(dict.fromkeys(name for block in plan["factor_ranks"] for name in block))
        rows = [[block.get(name) for name in names] for block in plan["factor_ranks"]]
        return [_heat_map("ranks of the factored weights", names, rows, width)]
    columns = [str(head) for head in range(heads)]
    return [_heat_map(title, columns, plan[name], width // heads) for name, title in _HEADS.items()]


def _heat_map(title: str, columns: list[str], rows: Sequence[Sequence[int | None]], largest: int) -> dict[str, Any]:
    cells = [[{"rank": rank, "share": round((rank or 0) / largest, 3)} for rank in row] for row in rows]
    return {"title": title, "columns": columns, "rows": cells, "largest": largest}


def _dense_width(record: dict[str, Any], config: dict[str, Any]) -> int:
    """Of the MLP; transformers' own classes know only the width that is left."""
    curves = record.get("error_curves")
    return curves["mlp_width"][0]["sizes"][-1] if curves else config["intermediate_size"]


def _block_bars(plan: dict[str, Any], largest: int) -> dict[str, Any]:
    """MLP width, rank of the up weight where that is lower, and bypass rank of each block."""
    ranks = plan.get("up_ranks") or [0] * len(plan["mlp_widths"])
    sizes = zip(plan["mlp_widths"], ranks, plan["bypass_ranks"], strict=True)
    rows = [
        {
            "label": str(block),
            "bars": [_bar(width, largest, "small", f"{width}, rank {rank}" if rank else str(width))],
            "bypass": bypass,
        }
        for block, (width, rank, bypass) in enumerate(sizes)
    ]
    return {"rows": rows, "largest": largest, "bypasses": any(plan["bypass_ranks"])}


# --------------------------------------------------------------------------------------------------------------- bars


def _bar(value: float, largest: float, kind: str, text: str) -> dict[str, Any]:
    return {"percent": round(100 * value / largest, 2) if largest else 0.0, "kind": kind, "text": text}


def _drift_bars(drift: dict[str, list[float]]) -> list[dict[str, Any]]:
    largest = max(drift["before"] + drift["after"])
    return [
        {
            "label": str(block),
            "bars": [
                _bar(before, largest, "dense", f"{before:.3g}"),
                _bar(after, largest, "small", f"{after:.3g}"),
            ],
        }
        for block, (before, after) in enumerate(zip(drift["before"], drift["after"], strict=True))
    ]


def _speed_bars(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Milliseconds for an image."""
    measured = [("compressed", "small", evaluation)]
    if evaluation["against"]:
        measured.insert(0, ("dense", "dense", evaluation["against"]))
    times = [1000 / each["images_per_second"] for _, _, each in measured]
    return [
        {"label": label, "bars": [_bar(time, max(times), kind, f"{time:.3g} ms")]}
        for (label, kind, _), time in zip(measured, times, strict=True)
    ]


# -------------------------------------------------------------------------------------------------------- error curves


def _charts(records: dict[str, list[Any]]) -> dict[str, Any]:
    """Lines in a box of 100 by 100 (y downwards): share of the size kept, and the error on a logarithmic scale that all
    charts share, so that heights compare."""
    layers = len(records["mlp_width"])
    lowest, highest = _error_range([curve for curves in records.values() for curve in curves])
    charts = [
        {
            "title": _CURVES[kind],
            "lines": [
                {
                    "name": f"block {layer}",
                    "depth": round(layer / max(layers - 1, 1), 3),
                    **_line(curve, lowest, highest),
                }
                for layer, curve in enumerate(records[kind])
            ],
        }
        for kind in _CURVES
    ]
    return {"charts": charts, "ticks": list(_ticks(lowest, highest)), "layers": layers}


def _error_range(curves: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Common logarithms of the least and the largest error drawn: a decade below the least chosen one."""
    highest = max(curve["errors"][0] for curve in curves) or 1.0
    chosen = [curve["errors"][curve["sizes"].index(curve["chosen"])] for curve in curves]
    least = min((error for error in chosen if error > 0), default=highest / 10)
    lowest = math.floor(math.log10(max(least / 10, highest * _FLOOR)))
    return lowest, max(math.ceil(math.log10(highest)), lowest + 1)


def _line(curve: dict[str, Any], lowest: float, highest: float) -> dict[str, Any]:
    sizes, largest = curve["sizes"], curve["sizes"][-1]

    def point(size: int, error: float) -> tuple[float, float]:
        # An error of zero has no logarithm: it is drawn well below the box, which cuts the line off.
        power = math.log10(error) if error > 0 else 2 * lowest - highest
        return round(100 * size / largest, 2), round(100 * (highest - power) / (highest - lowest), 2)

    points = [point(*pair) for pair in zip(sizes, curve["errors"], strict=True)]
    x, y = points[sizes.index(curve["chosen"])]
    text = f"{curve['chosen']} of {largest}"
    # Where nothing was cut off there is no error to mark.
    return {"points": points, "chosen": None if y > 100 else {"x": x, "y": y}, "text": text}


def _ticks(lowest: float, highest: float) -> Iterator[dict[str, Any]]:
    step = math.ceil((highest - lowest) / _DECADES)
    for power in range(int(highest), int(lowest) - 1, -step):
        yield {"y": round(100 * (highest - power) / (highest - lowest), 2), "power": _signed(str(power))}


# ------------------------------------------------------------------------------------------------------- disagreements


def _disagreements(evaluation: dict[str, Any], stream: ImageStream) -> dict[str, Any] | None:
    """The images on which both models disagree, inlined; None where there was no dense model to compare with."""
    if evaluation["against"] is None:
        return None
    wanted = {each["image"]: each for each in evaluation["disagreements"]}
    shown = [{**wanted[position], "picture": picture} for position, picture in _pictures(stream, set(wanted))]
    count = round(evaluation["images"] * (1 - evaluation["agreement"] / 100))
    return {"count": count, "images": evaluation["images"], "shown": shown}


def _pictures(stream: ImageStream, positions: set[int]) -> Iterator[tuple[int, str]]:
    """Position and data URI of the images wanted."""
    left = len(positions)
    if not left:
        return
    for image, _, position in stream:
        if position in positions:
            yield position, _data_uri(image)
            left -= 1
            if not left:
                return


def _data_uri(image: Image.Image) -> str:
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    kind = "png" if max(image.size) <= _SMALL else "jpeg"
    file = io.BytesIO()
    image.save(file, format=kind, **({"quality": 80} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
