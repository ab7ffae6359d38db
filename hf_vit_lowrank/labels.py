"""The model's labels for those of a data set, found by class name."""

from __future__ import annotations

import logging
from collections.abc import Callable

from .errors import UserError

logger = logging.getLogger(__name__)


def match_labels(dataset_names: list[str], id2label: dict[int, str]) -> list[int]:
    """The model's label for each label of the data set, found by class name.

    Names match as they are, else without regard to case, white space and underscores, else by the first of several
    synonyms ("tench, Tinca tinca"), each time only if there is exactly one such name.
    Raises UserError naming the classes without a match of their own.
    """
    labels = {int(label): str(name) for label, name in id2label.items()}
    matched = _match_names(dataset_names, labels)
    open_names = [index for index in range(len(dataset_names)) if index not in matched]
    if open_names and _same_order(dataset_names, labels, matched, open_names):
        pairs = ", ".join(f"{dataset_names[index]!r} as {labels[index]!r} ({index})" for index in open_names)
        logger.warning("all other class names agree with the model's in name and order; taking %s", pairs)
        matched.update({index: index for index in open_names})
    missing = [dataset_names[index] for index in range(len(dataset_names)) if index not in matched]
    if missing:
        listed = ", ".join(map(repr, missing[:5])) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise UserError(
            f"no single class of the model answers to {listed} of the data set; the model's classes are called "
            f"{', '.join(map(repr, list(labels.values())[:3]))}, …: rename one or the other."
        )
    return [matched[index] for index in range(len(dataset_names))]


def _whole(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").split())


def _first_synonym(name: str) -> str:
    return _whole(name.split(",")[0])


def _match_names(dataset_names: list[str], labels: dict[int, str]) -> dict[int, int]:
    """Data set label -> model label, from the strictest comparison to the loosest; each is used at most once."""
    matched: dict[int, int] = {}
    for key in (str, _whole, _first_synonym):
        theirs = _by_key({index: name for index, name in enumerate(dataset_names) if index not in matched}, key)
        ours = _by_key({label: name for label, name in labels.items() if label not in matched.values()}, key)
        for name, indices in theirs.items():
            if len(indices) == 1 and len(ours.get(name, ())) == 1:
                matched[indices[0]] = ours[name][0]
    return matched


def _by_key(names: dict[int, str], key: Callable[[str], str]) -> dict[str, list[int]]:
    grouped: dict[str, list[int]] = {}
    for index, name in names.items():
        grouped.setdefault(key(name), []).append(index)
    return grouped


def _same_order(names: list[str], labels: dict[int, str], matched: dict[int, int], open_names: list[int]) -> bool:
    """Whether position can settle what names leave open: ImageNet has two classes called crane, the hub's data set
    calls the second one crane2, others call the first one crane bird."""
    return (
        len(names) == len(labels)
        and len(open_names) <= len(names) // 100
        and all(index == label for index, label in matched.items())
        and all(_alike(_whole(names[index]), _whole(labels[index])) for index in open_names)
    )


def _alike(one: str, other: str) -> bool:
    return one.startswith(other) or other.startswith(one)
