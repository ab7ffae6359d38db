"""What to do with a checkpoint: every choice of a run, validated, and nothing else."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from .errors import UserError, as_user_error

COSTS = ("parameters", "flops")
OURS = "mixed-rank"
# Those that make two of single weights, from the moments at the weights' inputs and outputs.
FACTORED = ("paper", "svd", "fwsvd", "asvd", "svd-llm", "svd-llm-blockwise", "afm", "kfac-svd", "flar-svd")
PRESETS = (OURS, *FACTORED, "corp", "modegpt", "magnitude", "taylor")
COMPENSATIONS = ("none", "closed-form", "gradient", "distill")
TRAINED = ("gradient", "distill")
# Random views of every calibration image beside the image itself, for training block by block.
VIEWS = 5
TARGETS = ("reduction", "max_parameters", "match", "min_agreement")
_TYPE_NAMES = {float: "a number", int: "a whole number", str: "text", bool: "true or false"}
_HUB_ID = re.compile(r"\w[\w-]*(\.[\w-]+)*(/\w[\w-]*(\.[\w-]+)*)?", re.ASCII)
_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


@dataclass(frozen=True)
class CompressionRecipe:
    """Exactly one of the first four says how small the model gets.

    reduction: share of the whole model's parameters (or FLOPs, see `cost`) to remove, 0 <= reduction < 1.
    max_parameters: upper limit of stored parameters.
    match: hub id or folder of a classifier whose number of parameters is the limit.
    min_agreement: the smallest model that keeps this share of the dense model's predictions on held-back images.
    cost: what the budget counts and the ranks compete for. "flops" goes with `reduction` and `min_agreement` only.
    preset: the method: "mixed-rank" is this package's own, the others are those of `hf_vit_lowrank.presets`.
    compensation: what repairs the model after it was made smaller. "closed-form" refits output and down weights block
        by block against the dense stream; "gradient" refits and trains block by block; "distill" then trains the whole
        model (design 3.5). None means the preset's own: "closed-form"
        for "mixed-rank", "none" for the others, which bring theirs with them and cannot have "closed-form".
    distill_epochs, distill_lr: passes over the calibration images and peak learning rate of "distill". Three times the
        rate destroys more of what compensation has built than training builds up again.
    labels: let "distill" also learn from the labels of the calibration images.
    gradient_checkpointing: let "distill" compute the smaller model's activations again in the backward pass, for less
        memory and a third more time.
    samples, batch_size, seed: calibration images, how many at once, and which.
    query_key_weight: factor on the query-key error curves, which predict too little (design 3.6: 4 is the best known).
    rank_multiple: what the inner sizes of a layer are multiples of, its heads taken together; bypasses are free. Matrix
        products whose number of outputs is odd run at two thirds of the speed on a CPU with AVX-512.
    native: one head size and one MLP width for the whole model, which transformers' own classes (5.5 or newer) load
        without remote code. Of preset "mixed-rank" only; its two sizes need not be multiples of `rank_multiple`.
    probe: measure what sizes are worth once blocks are refitted, and choose ranks again by that (`probing.py`), which
        takes nine times as long as "closed-form" alone. Of preset "mixed-rank" only, not of native plans, and not
        without compensation.

    Raises:
        UserError: a value out of range, or not exactly one target.
    """

    reduction: float | None = None
    max_parameters: int | None = None
    match: str | None = None
    min_agreement: float | None = None
    cost: str = "parameters"
    preset: str = OURS
    compensation: str | None = None
    distill_epochs: int = 100
    distill_lr: float = 1e-4
    labels: bool = False
    gradient_checkpointing: bool = False
    samples: int = 1024
    batch_size: int = 32
    seed: int = 0
    query_key_weight: float = 4.0
    rank_multiple: int = 8
    native: bool = False
    probe: bool = False

    def __post_init__(self) -> None:
        self._check_types()
        self._check_target()
        if self.compensation is None:
            object.__setattr__(self, "compensation", "closed-form" if self.preset == OURS else "none")
        self._check_method()
        self._check_numbers()

    def _check_target(self) -> None:
        given = [name for name in TARGETS if getattr(self, name) is not None]
        _require(len(given) == 1, f"say how small by exactly one of {', '.join(TARGETS)} (given: {given or 'none'})")
        _require(
            self.reduction is None or 0 <= self.reduction < 1, f"reduction must be in [0, 1), not {self.reduction}"
        )
        _require(self.max_parameters is None or self.max_parameters > 0, "max_parameters must be positive")
        _require(
            self.min_agreement is None or 0 < self.min_agreement <= 1,
            f"min_agreement must be in (0, 1], not {self.min_agreement}",
        )
        _require(self.cost in COSTS, f"cost must be one of {', '.join(COSTS)}, not {self.cost!r}")
        _require(
            self.cost == "parameters" or self.max_parameters is self.match is None,
            "cost 'flops' needs reduction or min_agreement: max_parameters and match count parameters",
        )

    def _check_method(self) -> None:
        _require(self.preset in PRESETS, f"preset must be one of {', '.join(PRESETS)}, not {self.preset!r}")
        _require(
            self.compensation in COMPENSATIONS,
            f"compensation must be one of {', '.join(COMPENSATIONS)}, not {self.compensation!r}",
        )
        _require(
            self.preset == OURS or self.compensation != "closed-form",
            f"compensation 'closed-form' is of preset '{OURS}' only; with '{self.preset}' use none, gradient, distill",
        )
        _require(
            self.preset == OURS or self.cost == "parameters",
            f"preset '{self.preset}' counts parameters only: cost '{self.cost}' needs preset '{OURS}'",
        )
        _require(
            self.min_agreement is None or self.compensation in ("none", "closed-form"),
            f"min_agreement tries many sizes, and training each by '{self.compensation}' would take too long: find the "
            "size with closed-form, then train that size",
        )
        for name in ("labels", "gradient_checkpointing"):
            _require(
                not getattr(self, name) or self.compensation == "distill", f"{name} goes with compensation 'distill'"
            )
        _require(not self.native or self.preset == OURS, f"native goes with preset '{OURS}' only")
        _require(
            not self.probe or (self.preset == OURS and not self.native and self.compensation != "none"),
            f"probe goes with preset '{OURS}' and a compensation, and not with native, whose blocks all have one size",
        )

    def _check_numbers(self) -> None:
        _require(self.distill_epochs >= 1, f"distill_epochs must be at least 1, not {self.distill_epochs}")
        _require(0 < self.distill_lr < float("inf"), "distill_lr must be positive")
        _require(self.samples >= 1, f"samples must be at least 1, not {self.samples}")
        _require(self.batch_size >= 1, f"batch_size must be at least 1, not {self.batch_size}")
        _require(0 <= self.seed < 2**32, f"seed must be in [0, 2**32), not {self.seed}")
        _require(0 < self.query_key_weight < float("inf"), "query_key_weight must be positive")
        _require(self.rank_multiple >= 1, f"rank_multiple must be at least 1, not {self.rank_multiple}")

    def _check_types(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value, kinds = getattr(self, name), get_args(hint) or (hint,)
            # A Boolean is an integer to Python, and an integer is as good as a number with a fraction.
            fits = isinstance(value, (*kinds, int) if float in kinds else kinds)
            _require(
                fits and (bool in kinds or not isinstance(value, bool)),
                f"{name} must be {_TYPE_NAMES[kinds[0]]}, not {_shown(value)}",
            )

    @property
    def may_narrow(self) -> bool:
        """Whether the stream may get narrower. Training gets as much out of a whole one: see README, trials."""
        return self.preset == OURS and not self.native and self.compensation not in TRAINED

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` gives the same recipe back."""
        return asdict(self)

    def to_yaml(self) -> str:
        """A recipe file (see `read_recipe_file`) with every field that is set."""
        values = {name: value for name, value in self.to_dict().items() if value is not None}
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CompressionRecipe:
        """Raises UserError for a field that is unknown or of the wrong type."""
        hints = get_type_hints(cls)
        unknown = sorted(str(name) for name in values if name not in hints)
        _require(not unknown, f"unknown field {', '.join(unknown)} (there are {', '.join(hints)})")
        return cls(**values)

    def fingerprint(self) -> str:
        """sha256 of the canonical JSON."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


def read_recipe_file(file: str | Path) -> dict[str, Any]:
    """The fields that a YAML file gives, for `CompressionRecipe.from_dict`.

    Raises:
        UserError: it cannot be read, is no YAML mapping, or `match` is a path: a recipe from elsewhere must not choose
            which file of this machine is opened.
    """
    with as_user_error(f"The recipe file '{file}' cannot be read as YAML"):
        text = Path(file).read_text(encoding="utf-8")
        values, tree = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    if not isinstance(values, dict):
        raise UserError(f"The recipe file '{file}' must hold one field a line, such as 'reduction: 0.6'.")
    names = [key.value for key, _ in tree.value]  # PyYAML would take the last of two
    twice = sorted({str(name) for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"The recipe file '{file}' gives {', '.join(twice)} twice: leave one.")
    match = values.get("match")
    if isinstance(match, str) and not _HUB_ID.fullmatch(match):
        raise UserError(
            f"The recipe file '{file}' may name only a model of the hub in match, not '{match}': use --match."
        )
    # PyYAML takes 1e-4 for text.
    texts = {name: value for name, value in values.items() if isinstance(value, str)}
    return values | {name: float(text) for name, text in texts.items() if _EXPONENT.fullmatch(text)}


def _shown(value: Any) -> str:
    """Short whatever it is: YAML can repeat a list in a list many times over."""
    return repr(value)[:40] if isinstance(value, str | int | float | bool) else f"a {type(value).__name__}"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(f"The recipe is not valid: {message}.")
