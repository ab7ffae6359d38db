"""What all commands share: the application, errors as one sentence, output as quiet as asked."""

from __future__ import annotations

import functools
import logging
import sys
import traceback
from collections.abc import Callable
from typing import Any

import typer

from . import cli_options as opt
from .errors import RunError, UserError, reason, without_secrets

app = typer.Typer(
    name="hf-vit-lowrank",
    help="Make a Vision Transformer of the Hugging Face Hub smaller, from images without labels.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipe_app = typer.Typer(help="Recipes as YAML files, for compress --recipe.", no_args_is_help=True)
app.add_typer(recipe_app, name="recipe")


def command(example: str, group: typer.Typer = app) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command whose errors become one sentence on stderr and an exit code (2: bad input, 1: failed)."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        grouped = opt.with_groups(function)

        @functools.wraps(grouped)
        def run(**options: Any) -> None:
            try:
                _set_up_output(options["quiet"])
                grouped(**options)
            except typer.Exit:
                raise
            except (Exception, KeyboardInterrupt) as error:
                if options["debug"]:
                    print(without_secrets(traceback.format_exc()), end="", file=sys.stderr)
                code, sentence = _verdict(error)
                print(sentence, file=sys.stderr)
                raise typer.Exit(code) from None

        group.command(epilog=f"Example: {example}")(run)
        return function

    return register


def _verdict(error: BaseException) -> tuple[int, str]:
    if isinstance(error, UserError):
        return 2, f"Error: {error}"
    if isinstance(error, RunError):
        return 1, f"Error: {error}"
    if isinstance(error, KeyboardInterrupt):
        return 130, "Interrupted: give the same command again; compress and sweep then go on where they were."
    return 1, f"Error: {type(error).__name__}: {reason(error)}; run again with --debug for the traceback."


def _set_up_output(quiet: bool) -> None:
    import datasets
    import huggingface_hub
    import transformers

    from . import auto_classes, progress  # noqa: F401

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logging.getLogger(__package__).addHandler(handler)
    # Our own messages and progress bars are enough; that of a download is the hub client's.
    for library in (datasets, huggingface_hub, transformers):
        library.utils.logging.set_verbosity_error()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if quiet:
        progress.quiet()
        huggingface_hub.utils.disable_progress_bars()
