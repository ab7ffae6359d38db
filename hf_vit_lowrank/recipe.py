"""What to do with a checkpoint: every choice of a run, validated, and nothing else."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from .errors import UserError

COSTS = ("parameters", "flops")
OURS = "mixed-rank"
PRESETS = (
    *(OURS, "paper", "svd", "fwsvd", "asvd", "svd-llm", "svd-llm-blockwise", "afm", "kfac-svd", "flar-svd"),
    *("corp", "modegpt", "magnitude", "taylor"),
)
COMPENSATIONS = ("none", "closed-form", "gradient", "distill")
_KINDS: dict[str, tuple[type, ...]] = {"float": (int, float), "int": (int,), "str": (str,), "bool": (bool,)}
_TARGETS = ("reduction", "max_parameters", "match", "min_agreement")


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
    distill_epochs, distill_lr: passes over the calibration images and peak learning rate of "distill".
    labels: let "distill" also learn from the labels of the calibration images.
    samples, batch_size, seed: calibration images, how many at once, and which.
    query_key_weight: factor on the query-key error curves, which predict too little (design 3.6: 4 is the best known).
    rank_multiple: what the inner sizes of a layer are multiples of, its heads taken together; bypasses are free. Matrix
        products whose number of outputs is odd run at two thirds of the speed on a CPU with AVX-512.
    native: one head size and one MLP width for the whole model, which transformers' own classes (5.5 or newer) load
        without remote code. Of preset "mixed-rank" only.

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
    distill_lr: float = 3e-4
    labels: bool = False
    samples: int = 1024
    batch_size: int = 32
    seed: int = 0
    query_key_weight: float = 4.0
    rank_multiple: int = 8
    native: bool = False

    def __post_init__(self) -> None:
        self._check_kinds()
        given = [name for name in _TARGETS if getattr(self, name) is not None]
        _require(len(given) == 1, f"say how small by exactly one of {', '.join(_TARGETS)} (given: {given or 'none'})")
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
        _require(self.preset in PRESETS, f"preset must be one of {', '.join(PRESETS)}, not {self.preset!r}")
        if self.compensation is None:
            object.__setattr__(self, "compensation", "closed-form" if self.preset == OURS else "none")
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
        _require(self.distill_epochs >= 1, f"distill_epochs must be at least 1, not {self.distill_epochs}")
        _require(0 < self.distill_lr < float("inf"), "distill_lr must be positive")
        _require(
            self.min_agreement is None or self.compensation in ("none", "closed-form"),
            f"min_agreement tries many sizes, and training each by '{self.compensation}' would take too long: find the "
            "size with closed-form, then train that size",
        )
        _require(not self.labels or self.compensation == "distill", "labels need compensation 'distill'")
        _require(self.samples >= 1, f"samples must be at least 1, not {self.samples}")
        _require(self.batch_size >= 1, f"batch_size must be at least 1, not {self.batch_size}")
        _require(0 <= self.seed < 2**32, f"seed must be in [0, 2**32), not {self.seed}")
        _require(0 < self.query_key_weight < float("inf"), "query_key_weight must be positive")
        _require(self.rank_multiple >= 1, f"rank_multiple must be at least 1, not {self.rank_multiple}")
        _require(not self.native or self.preset == OURS, f"native goes with preset '{OURS}' only")

    def _check_kinds(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), str(field.type).removesuffix(" | None")
            if value is None and field.type != kind:
                continue
            right = isinstance(value, _KINDS[kind]) and isinstance(value, bool) == (kind == "bool")
            _require(right, f"{field.name} must be of type {kind}, not {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` gives the same recipe back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CompressionRecipe:
        """Raises UserError for a field that is unknown."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        _require(not unknown, f"unknown field {', '.join(unknown)}")
        return cls(**values)

    def fingerprint(self) -> str:
        """sha256 of the canonical JSON."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(f"The recipe is not valid: {message}.")
