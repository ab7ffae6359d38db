"""The two errors that reach a user, and texts without secrets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

_SECRETS = (
    (re.compile(r"(?<![A-Za-z0-9])hf_(?:oauth_|jwt_)?[A-Za-z0-9]{30,}"), "(token)"),  # tokens of the hub
    (re.compile(r"(?i)(bearer )\S+"), r"\1…"),
    (re.compile(r"(://)[^/@\s]+@"), r"\1…@"),  # user and password of an address
    (re.compile(r"(://[^\s?'\"]+\?)[^\s'\"]+"), r"\1…"),  # what signs an address
)


def without_secrets(text: str) -> str:
    """The text with tokens, passwords and the queries of web addresses left out."""
    for pattern, shown in _SECRETS:
        text = pattern.sub(shown, text)
    return text


class _SentenceError(Exception):
    def __init__(self, sentence: str) -> None:
        super().__init__(without_secrets(sentence))


class UserError(_SentenceError):
    """Bad input. One sentence: what is wrong, where, and the way out. The command line prints it and exits with 2."""


class RunError(_SentenceError):
    """A run that failed although its input was right (network, disk, memory). The command line exits with 1."""


def reason(error: BaseException) -> str:
    """The first line of the message of an error, or of its cause where it has one."""
    error = error.__cause__ or error
    return without_secrets((str(error).strip().splitlines() or [type(error).__name__])[0].rstrip("."))


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
