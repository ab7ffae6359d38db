"""Pictures of a run, drawn with matplotlib and written as PNG files."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from .model_card import stream_left
from .recipe import COMPENSATIONS, OURS
from .remote.configuration_lowrank_vit import FACTORABLE

_COMPRESSED = "#1f5fbf"
_DENSE = "#444444"
_OURS_SHADES = ("#9ec5f4", "#4f8fe0", "#1f5fbf", "#0b2f6b")  # a compensation that goes farther is darker
_QUANTISED = {
    "int8": {"linestyle": "--", "markerfacecolor": "white"},
    "hqq4": {"linestyle": ":", "markerfacecolor": "white"},
}
_RIVALS = matplotlib.colormaps["tab20"]
_MARKERS = "sD^vPX<>hpd*"
# No date and no version of matplotlib in the file: the same numbers give the same bytes.
_NO_METADATA = {"Software": None}


def size_chart(rows: Sequence[dict[str, Any]], dense: dict[str, Any], path: str | Path) -> None:
    """Draw the accuracy of a sweep against the number of parameters, with the dense model as a line, into a PNG file.

    rows: one dict per compressed model, with `reduction` (a fraction), `parameters`, and `top1` and `agreement` in
        percent or None. Without labels, that is where one `top1` is None, the agreement with the dense model is drawn.
    dense: `parameters` and `top1` of the dense model.
    """
    labelled = all(row.get("top1") is not None for row in (*rows, dense))
    measure, title = ("top1", "top-1 accuracy (%)") if labelled else ("agreement", "agreement with the dense model (%)")
    rows = sorted(rows, key=lambda row: row["parameters"])
    sizes = [row["parameters"] for row in rows]
    values = [row[measure] for row in rows]
    level = dense["top1"] if labelled else 100.0

    figure = Figure(figsize=(7, 4.3), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.axhline(level, color=_DENSE, linestyle="--", linewidth=1, zorder=1)
    axes.plot(dense["parameters"], level, "D", color=_DENSE, markersize=6, label=f"dense: {level:.1f} %")
    axes.plot(
        sizes, values, "o-", color=_COMPRESSED, linewidth=2, markersize=6, label="compressed (parameters removed)"
    )
    for row, size, value in zip(rows, sizes, values, strict=True):
        text = f"{value:.1f} %\n(−{100 * row['reduction']:g} %)"
        axes.annotate(text, (size, value), xytext=(6, -4), textcoords="offset points", va="top", fontsize=8)
    lowest, highest = min([*values, level]), max([*values, level])
    room = max(highest - lowest, 1.0)
    axes.set_ylim(max(lowest - 0.25 * room, -10), min(highest + 0.08 * room, 101 + 0.04 * room))
    axes.set_xlim(0, 1.06 * max([*sizes, dense["parameters"]]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e6:g} M"))
    axes.yaxis.set_major_locator(MaxNLocator(7))
    axes.set_xlabel("parameters")
    axes.set_ylabel(title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(Path(path), format="png", metadata=_NO_METADATA)


def methods_chart(cells: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Draw top-1 accuracy against the number of parameters, a line for each method, ours in front, into a PNG file.

    cells: one dict per model, the dense one's first, with `method` ("svd", "mixed-rank/closed-form"), `quantised` (not
        None: left out), `parameters` and `top1` in percent.
    """
    figure, axes = _accuracy_axes(cells[0], "parameters")
    lines = _lines(cell for cell in cells[1:] if not cell["quantised"])
    _draw_ours(axes, lines, "parameters")
    for index, (name, line) in enumerate(lines.items()):
        if not _is_ours(line[0]):
            style = {"color": _RIVALS(index % 20), "marker": _MARKERS[index % len(_MARKERS)], "markersize": 4}
            _draw(axes, line, "parameters", label=name, linewidth=1, zorder=2, **style)
    axes.set_xlim(0, 1.06 * cells[0]["parameters"])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e6:g} M"))
    axes.set_xlabel("parameters")
    _save(figure, axes, path)


def bytes_chart(cells: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Draw top-1 accuracy against bytes on disk: the dense model and ours, each with fewer bits too, into a PNG file.

    cells: as for `methods_chart`, with `bytes`; other methods are left out.
    """
    figure, axes = _accuracy_axes(cells[0], "bytes")
    for cell, marker in zip((cell for cell in cells[1:] if cell["method"] == "dense"), "^v", strict=False):
        label = f"dense, {cell['quantised']}: {cell['top1']:.1f} %"
        axes.plot(cell["bytes"], cell["top1"], marker, color=_DENSE, markersize=8, label=label, zorder=4)
    _draw_ours(axes, _lines(cell for cell in cells[1:] if _is_ours(cell)), "bytes")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator([1e6 * 2.0**power for power in range(-10, 14)]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e6:.3g} MB"))
    axes.set_xlabel("bytes on disk (logarithmic)")
    _save(figure, axes, path)


def _is_ours(cell: dict[str, Any]) -> bool:
    return cell["method"].partition("/")[0] == OURS


def _lines(cells: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The sizes of each method, largest model first."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for cell in sorted(cells, key=lambda cell: -cell["parameters"]):
        name = cell["method"] + (f", {cell['quantised']}" if cell["quantised"] else "")
        lines.setdefault(name, []).append(cell)
    # The legend has the order of the lines at their small end, where they are farthest apart.
    return dict(sorted(lines.items(), key=lambda item: (-item[1][-1]["top1"], item[0])))


def _draw_ours(axes: Axes, lines: dict[str, list[dict[str, Any]]], measure: str) -> None:
    """Each compensation in a blue of its own, hollow where quantised; accuracies written at the best one."""
    ours = {name: line for name, line in lines.items() if _is_ours(line[0])}
    methods = sorted({line[0]["method"] for line in ours.values()}, key=_strength)
    for index, (name, line) in enumerate(ours.items()):
        shade = _OURS_SHADES[len(_OURS_SHADES) - len(methods) + methods.index(line[0]["method"])]
        style = _QUANTISED.get(line[0]["quantised"], {})
        _draw(axes, line, measure, label=f"ours: {name}", color=shade, marker="o", linewidth=2.4, zorder=5, **style)
        if index == 0:
            for cell in line:
                axes.annotate(
                    f"{cell['top1']:.1f}",
                    (cell[measure], cell["top1"]),
                    xytext=(-5, 6),
                    textcoords="offset points",
                    ha="right",
                    fontsize=8,
                    color=shade,
                    bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
                    zorder=6,
                )


def _strength(method: str) -> int:
    """How far a method of ours goes in repairing: none, closed-form, gradient, distill."""
    return COMPENSATIONS.index(method.partition("/")[2])


def _draw(axes: Axes, line: Sequence[dict[str, Any]], measure: str, **style: Any) -> None:
    axes.plot([cell[measure] for cell in line], [cell["top1"] for cell in line], **style)


def _accuracy_axes(dense: dict[str, Any], measure: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8.5, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.axhline(dense["top1"], color=_DENSE, linestyle="--", linewidth=1, zorder=1)
    label = f"dense: {dense['top1']:.1f} %"
    axes.plot(dense[measure], dense["top1"], "D", color=_DENSE, markersize=6, label=label, zorder=4)
    return figure, axes


def _save(figure: Figure, axes: Axes, path: str | Path) -> None:
    axes.yaxis.set_major_locator(MaxNLocator(9))
    axes.set_ylabel("top-1 accuracy (%)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    figure.savefig(Path(path), format="png", metadata=_NO_METADATA)


def plan_chart(plan: dict[str, Any]) -> bytes:
    """Draw a rank plan, a row for each layer, as a PNG file.

    plan: the fields of `LowRankViTConfig` that end in "_ranks" and "_widths". Ranks by head, the width of each MLP with
    its bypass, and, where weights are stored as products of two, their ranks (a whole weight's cell stays empty;
    those of the embeddings stand below).
    """
    layers = np.arange(len(plan["mlp_widths"]))
    maps = {"query–key rank": plan["query_key_ranks"], "value–output rank": plan["value_output_ranks"]}
    columns: dict[str, Sequence[str]] = {title: [str(head) for head in range(len(maps[title][0]))] for title in maps}
    factors = plan.get("factor_ranks") or []
    if any(factors):
        maps["rank of the weight"] = [[ranks.get(name, np.nan) for name in FACTORABLE] for ranks in factors]
        columns["rank of the weight"] = FACTORABLE
    figure = Figure(figsize=(3.6 * (len(maps) + 1), 1.6 + 0.28 * len(layers)), dpi=120, layout="constrained")
    *heat, bars = figure.subplots(1, len(maps) + 1)
    for axes, (title, ranks) in zip(heat, maps.items(), strict=True):
        _heat_map(axes, np.asarray(ranks, dtype=float), columns[title])
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("weight" if columns[title] is FACTORABLE else "head")
    bars.barh(layers, plan["mlp_widths"], color=_COMPRESSED)
    ranks, bypasses = (plan.get(name) or [0] * len(layers) for name in ("up_ranks", "bypass_ranks"))
    for layer, (width, rank, bypass) in enumerate(zip(plan["mlp_widths"], ranks, bypasses, strict=True)):
        text = f"{width}" + (f", rank {rank}" if rank else "") + (f" + bypass {bypass}" if bypass else "")
        bars.annotate(text, (0, layer), xytext=(4, 0), fontsize=7,
                      textcoords="offset points", va="center", color="black",
                      bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5})  # fmt: skip
    bars.set_title("MLP width", fontsize=10)
    bars.set_xlabel("hidden units")
    bars.set_ylim(len(layers) - 0.5, -0.5)
    heat[0].set_ylabel("layer")
    pieces = ", ".join(f"{name} {rank}" for name, rank in plan.get("embedding_ranks", {}).items())
    stream = stream_left(plan)
    notes = [f"ranks of the embeddings: {pieces}"] * bool(pieces) + [f"entries of the stream: {stream}"] * bool(stream)
    if notes:
        figure.supxlabel("; ".join(notes), fontsize=8)
    for axes in (*heat, bars):
        axes.set_yticks(layers)
        axes.tick_params(labelsize=7)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata=_NO_METADATA)
    return file.getvalue()


def _heat_map(axes: Axes, ranks: np.ndarray, columns: Sequence[str]) -> None:
    """ranks: (layers, columns), NaN where there is nothing to show."""
    highest = max(np.nanmax(ranks, initial=1), 1)
    axes.imshow(ranks, cmap="Blues", vmin=0, vmax=1.6 * highest, aspect="auto")
    for (layer, column), rank in np.ndenumerate(ranks):
        if np.isfinite(rank):
            axes.annotate(f"{rank:.0f}", (column, layer), ha="center", va="center", fontsize=6)
    axes.set_xticks(range(len(columns)), columns)
