"""What the hub and its client raise: as one sentence of ours, and whether the same request may work in a moment."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .errors import RunError, UserError

AGAIN = "the same command again completes it"
# Those that pass where a request is sent again.
_PASSING = (409, 412, 429, 500, 502, 503, 504)
# The longest time in seconds for which the hub may ask us to wait.
_LONGEST_WAIT = 300
# The base of all errors of the HTTP client that this release of huggingface_hub uses (requests, httpx, …).
_CLIENT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]


@contextmanager
def one_sentence(repo_id: str, token: str | None) -> Iterator[None]:
    """What the hub and its client raise, as our errors; without the token, should the hub have sent it back."""
    try:
        yield
    except (_CLIENT_ERROR, OSError, ValueError, RuntimeError) as error:
        kind, sentence = _verdict(_root(error), repo_id)
        for secret in (token, get_token()):
            sentence = sentence.replace(secret.strip(), "(token)") if secret else sentence
        # No chain: a traceback, too, would show what the hub sent back.
        raise kind(sentence) from None


def _verdict(error: BaseException, repo_id: str) -> tuple[type[UserError | RunError], str]:
    status, said = _status(error), _said(error)
    if isinstance(error, HFValidationError):
        return UserError, f"'{repo_id}' is no repository of the hub: it must be of the form 'owner/name'."
    if isinstance(error, OfflineModeIsEnabled):
        return UserError, "The hub is switched off by the variable HF_HUB_OFFLINE: unset it."
    if isinstance(error, RevisionNotFoundError):
        return UserError, f"'{repo_id}' has no such revision: name a branch, tag or commit that is there."
    if isinstance(error, RepositoryNotFoundError):
        return UserError, f"'{repo_id}' is not on the hub, or this token may not see it: check the name and the token."
    if status == 401:
        return UserError, f"The hub does not take the token ({said}): log in again with `hf auth login`."
    if status == 403:
        return UserError, f"This token may not do that with '{repo_id}' ({said}): use one that may, or a pull request."
    if status in (409, 412):
        return RunError, f"Somebody else keeps changing '{repo_id}' ({said}): {AGAIN}."
    if status == 429:
        return RunError, f"The hub takes no more requests for now ({said}): later, {AGAIN}."
    if status is not None and status >= 500:
        return RunError, f"The hub failed ({said}): {AGAIN}."
    if status is not None or isinstance(error, ValueError):
        return UserError, f"The hub refuses '{repo_id}' ({said})."
    return RunError, f"The hub could not be reached, or broke off ({said}): {AGAIN}."


def _root(error: BaseException) -> BaseException:
    """What happened in one of the client's threads, or before it looked into its cache, comes wrapped up."""
    wrapped = isinstance(error, (RuntimeError, LocalEntryNotFoundError))
    return error.__cause__ if wrapped and error.__cause__ else error


def _said(error: BaseException) -> str:
    status, message = _status(error), getattr(error, "server_message", None)
    said = " ".join((message or str(error)).split()).rstrip(".") if message or status is None else ""
    said = textwrap.shorten(said, 300, placeholder=" …") or type(error).__name__
    return said if status is None else f"{status}: {said}" if message else str(status)


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None) if isinstance(error, HfHubHTTPError) else None
    return None if response is None else response.status_code


def passes(error: Exception) -> bool:
    """Whether the same request may work in a moment."""
    root = _root(error)
    status = _status(root)
    if status is not None:
        return status in _PASSING
    return isinstance(root, (_CLIENT_ERROR, OSError)) and not isinstance(root, OfflineModeIsEnabled)


def asked_wait(error: Exception) -> int:
    """Seconds that the hub asks to wait."""
    response = getattr(_root(error), "response", None)
    headers = {} if response is None else response.headers
    asked = re.search(r"^\d+$", headers.get("Retry-After", "")) or re.search(
        r"(?<=;t=)\d+", headers.get("RateLimit", "")
    )
    return min(int(asked.group()), _LONGEST_WAIT) if asked else 0
