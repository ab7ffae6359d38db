"""The tables that the command line prints on stdout."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .model_card import flops_scope, stream_left

BYTES_PER_PARAMETER = 4  # checkpoints are written in float32


def show_compression(report: dict[str, Any], output: Path) -> None:
    """What `compress` did: sizes before and after, what it is predicted to cost, where the time went."""
    console = _console()
    console.print(_sizes(report))
    for line in _notes(report):
        console.print(line)
    console.print(f"Written to {output}", soft_wrap=True)


def show_plan(report: dict[str, Any]) -> None:
    """The ranks of every block and head, then the sizes that `compress` would come to."""
    console = _console()
    table = Table("block", "query–key ranks", "value–output ranks", "MLP width", "up rank", "bypass", title="Rank plan")
    plan = report["plan"]
    names = ("query_key_ranks", "value_output_ranks", "mlp_widths", "up_ranks", "bypass_ranks")
    rows = zip(*(plan[name] for name in names), strict=True)
    for block, (query_key, value_output, *of_mlp) in enumerate(rows):
        table.add_row(str(block), _numbers(query_key), _numbers(value_output), *(str(size) for size in of_mlp))
    console.print(table)
    for name, rank in plan["embedding_ranks"].items():
        console.print(f"The {name} of the embeddings: rank {rank}")
    if stream := stream_left(plan):
        console.print(f"The stream of tokens: {stream} entries")
    console.print(_sizes(report))
    for line in _notes(report):
        console.print(line)
    if report["recipe"]["probe"]:
        console.print("These ranks are a start: they will be chosen again by what sizes are worth once refitted.")
    console.print("Nothing was written.")


def show_sweep(rows: Sequence[dict[str, Any]], output: Path) -> None:
    console = _console()
    table = Table(title="Sweep")
    for name in ("removed", "parameters", "MB", "MFLOPs", "agreement %", "top-1 %", "top-5 %"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            "dense" if row is rows[0] else f"{100 * row['reduction']:g} %",
            f"{row['parameters']:,}",
            _megabytes(row["bytes"]),
            _millions(row["flops"]),
            _percent(row["agreement"]),
            _percent(row["top1"]),
            _percent(row["top5"]),
        )
    console.print(table)
    console.print(f"Written to {output}: sweep.json, sweep.md, sweep.png", soft_wrap=True)


def show_evaluation(report: dict[str, Any]) -> None:
    """The figures of an EvaluationReport, and those of the dense model beside them."""
    console = _console()
    dense = report["against"]
    console.print(_comparison(f"{report['images']} images", [report] if dense is None else [dense, report]))
    if report["agreement"] is not None:
        console.print(f"Same first choice as the dense model: {report['agreement']:.2f} % of the images")
    if report["skipped"]:
        console.print(f"Unreadable images left out: {len(report['skipped'])}")


def show_push(report: dict[str, Any]) -> None:
    """The files of a PushReport, and where they are now."""
    console = _console()
    waiting = "to send" if report["dry_run"] else "sent"
    table = Table("file", title=f"{report['repository']}, {report['revision']}")
    table.add_column("bytes", justify="right")
    table.add_column("")
    for file in report["files"]:
        table.add_row(file["name"], f"{file['bytes']:,}", "there" if file["there"] else waiting)
    console.print(table)
    new = [file for file in report["files"] if not file["there"]]
    console.print(f"{len(new)} of {len(report['files'])} files {waiting}, {sum(file['bytes'] for file in new):,} bytes")
    if report["dry_run"]:
        console.print("Nothing was sent.")
    else:
        console.print(f"On the hub at commit {report['commit']}, every file compared", soft_wrap=True)
    if report["pull_request"]:
        console.print(f"Pull request: {report['pull_request']}", soft_wrap=True)


def show_verification(verification: dict[str, Any]) -> None:
    console = _console()
    table = Table("check", "", "", title=Text(verification["checkpoint"]))
    for check in verification["checks"]:
        table.add_row(check["name"], "ok" if check["passed"] else "DIFFERS", Text(check["detail"]))
    console.print(table)


def _comparison(title: str, measured: Sequence[dict[str, Any]]) -> Table:
    table = Table("", title=title)
    for each in measured:
        table.add_column(str(each["model"]), justify="right", overflow="fold")
    for name, key, written in (
        ("top-1 %", "top1", _percent),
        ("top-5 %", "top5", _percent),
        ("parameters", "parameters", lambda value: f"{value:,}"),
        ("MB on disk", "bytes_on_disk", _megabytes),
        ("MFLOPs per image", "flops", _millions),
        ("images/s", "images_per_second", lambda value: f"{value:.1f}"),
    ):
        table.add_row(name, *(written(each[key]) for each in measured))
    return table


def _sizes(report: dict[str, Any]) -> Table:
    table = Table(title="Dense against compressed")
    for name in ("", "dense", "compressed", "change"):
        table.add_column(name, justify="right" if name else "left")
    sizes = [report["dense_parameters"], report["parameters"]]
    flops = [report["dense_flops"], report["flops"]]
    table.add_row("parameters", *(f"{size:,}" for size in sizes), _change(*sizes))
    table.add_row("MB in float32", *(_megabytes(BYTES_PER_PARAMETER * size) for size in sizes), _change(*sizes))
    table.add_row(f"MFLOPs per image{flops_scope(report)}", *(_millions(count) for count in flops), _change(*flops))
    return table


def _notes(report: dict[str, Any]) -> list[str]:
    notes = []
    if report["predicted_loss"] is not None:
        notes.append(f"Predicted rise of the loss before compensation: {report['predicted_loss']:.4g}")
    for stage, title in (("gradient", "training block by block"), ("distillation", "distillation")):
        if trained := report.get(stage):
            kept = "" if trained["kept"] else " (not kept)"
            after = "not a number" if trained["after"] is None else f"{trained['after']:.3f}"
            notes.append(
                f"Divergence from the dense model on held-back images, before and after {title}: "
                f"{trained['before']:.3f}, {after} nats{kept}"
            )
    if search := report.get("agreement"):
        kept = max(
            (trial for trial in search["trials"] if trial["agreement"] >= search["wanted"]), key=itemgetter("reduction")
        )
        notes.append(
            f"Agreement with the dense model: {100 * kept['agreement']:.2f} % of {search['images']} held-back images "
            f"({100 * search['wanted']:g} % wanted, {len(search['trials'])} sizes tried)"
        )
    seconds = report["seconds"]
    stages = ", ".join(f"{stage.replace('_', ' ')} {value:.1f}" for stage, value in seconds.items())
    notes.append(f"Seconds: {stages}; {sum(seconds.values()):.1f} in all")
    return notes


def _console() -> Console:
    console = Console(highlight=False, markup=False)  # names may have brackets
    if not console.is_terminal:  # a log or a file: no wrapping at 80
        console.width = max(console.width, 120)
    return console


def _change(dense: float, small: float) -> str:
    return f"{100 * (small / dense - 1):+.1f} %"


def _numbers(values: Sequence[int]) -> str:
    return " ".join(f"{value:>2}" for value in values)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _megabytes(value: float | None) -> str:
    return "–" if value is None else f"{value / 1e6:.2f}"


def _millions(value: float) -> str:
    return f"{value / 1e6:,.1f}"
