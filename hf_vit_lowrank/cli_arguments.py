"""What the commands make of their options: recipes, numbers, and paths that are refused before any work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from .errors import UserError
from .recipe import TARGETS, CompressionRecipe, read_recipe_file


def typed_recipe(
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
    return file_recipe(file, {name: value for name, value in fields.items() if _is_typed(context, name)})


def _is_typed(context: typer.Context, option: str) -> bool:
    source = context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


def file_recipe(file: Path, typed: dict[str, Any]) -> CompressionRecipe:
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


def parse_reductions(text: str, option: str = "--reductions") -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} '{text}' are not numbers with commas: write 0.2,0.4,0.6.") from None
    wrong = [value for value in values if not 0 <= value < 1]
    if wrong:
        raise UserError(f"{option} must be from 0 up to, but not, 1; {wrong[0]:g} is not.")
    return list(dict.fromkeys(values))


def refuse_source(output: Path, source: str) -> None:
    from .disk import overlap

    if Path(source).exists() and overlap(output, source):
        raise UserError(
            f"--output '{output}' is the source, holds it or lies in it, and the source is never written to."
        )


def check_folder(folder: Path, overwrite: bool, kept: Sequence[str] = ()) -> None:
    """kept: names of what an earlier run may have left there, which is not written again."""
    from .disk import require_writable

    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output '{folder}' is a file: choose a folder.")
    if folder.is_dir() and any(path.name not in kept for path in folder.iterdir()) and not overwrite:
        raise UserError(f"--output '{folder}' is not empty: choose another folder, or pass --overwrite.")
    require_writable(folder)


def check_file(file: Path | None, option: str = "--json") -> None:
    from .disk import require_writable

    if file is None:
        return
    if file.is_dir() or not file.parent.is_dir():
        raise UserError(f"{option} '{file}' cannot be written: it is a folder, or its folder does not exist.")
    require_writable(file)
