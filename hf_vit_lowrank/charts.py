"""Pictures of a run, drawn with matplotlib and written as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

_OURS = "#1f5fbf"
_DENSE = "#444444"


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
    axes.plot(sizes, values, "o-", color=_OURS, linewidth=2, markersize=6, label="compressed (parameters removed)")
    for row, size, value in zip(rows, sizes, values, strict=True):
        text = f"{value:.1f} %\n(−{100 * row['reduction']:.0f} %)"
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
    # No date and no version of matplotlib in the file: the same sweep gives the same bytes.
    figure.savefig(Path(path), format="png", metadata={"Software": None})


def short_number(value: float) -> str:
    """5717416 as "5.72M": three digits and a unit."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:#.3g}".rstrip(".") + unit
    return f"{value:.3g}"
