"""The two errors this package raises on purpose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Bad input. One sentence: what is wrong, where, and the way out. The command line prints it and exits with 2."""


class RunError(Exception):
    """A run that failed although its input was right (network, disk, memory). The command line exits with 1."""


def reason(error: BaseException) -> str:
    """The first line of the message of an error, or of its cause where it has one."""
    error = error.__cause__ or error
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


@contextmanager
def as_user_error(what: str) -> Iterator[None]:
    """Turn any error inside into a UserError that says `what` and the reason.

    For calls into libraries whose errors are of many classes (Hugging Face's, pyarrow's, the HTTP client's).
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} ({reason(error)}).") from error
