"""Is a checkpoint what was saved, and does it compute what it did? Runs this package's code, never the folder's."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForImageClassification

from .checkpoint import CARD, CHECKPOINT_FILES, CODE, WEIGHTS, changed_files, probe_logits, read_record
from .dense import local_folder
from .disk import sha256
from .errors import as_user_error, reason
from .model_card import unpin

# Part of the largest stored logit, or of 1, by which a logit may differ. The probe runs in float64, so that machines
# differ far less; a change of the weights that is below this changes no prediction.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Check:
    """One line of what `verify` says."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Verification:
    """All checks of a checkpoint. folder: where it was read, the hub's cache for a repository."""

    checkpoint: str
    folder: str
    checks: list[Check]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def verify_checkpoint(checkpoint: str, *, revision: str | None = None) -> Verification:
    """Check a checkpoint folder or repository: files, code, shapes, number of parameters and logits.

    Raises UserError where there is no checkpoint of this package, RunError where the hub failed.
    """
    folder, _ = local_folder(checkpoint, revision, CHECKPOINT_FILES)
    record = read_record(folder)
    steps: dict[str, Callable[[Path, dict[str, Any]], tuple[bool, str]]] = {
        "files": _files,
        "code": _code,
        "shapes": _shapes,
        "parameters": _parameters,
        "logits": _logits,
    }
    checks = []
    for name, step in steps.items():
        try:
            checks.append(Check(name, *step(folder, record)))
        except Exception as error:  # of whatever class a broken file brings about: it is a difference
            checks.append(Check(name, False, f"could not be checked: {reason(error)}"))
    return Verification(checkpoint, str(folder), checks)


def _files(folder: Path, record: dict[str, Any]) -> tuple[bool, str]:
    changed = list(changed_files(folder, record))
    if changed:
        return False, " ".join(changed)
    card = unpin((folder / CARD).read_text(encoding="utf-8")).encode()
    edited = hashlib.sha256(card).hexdigest() != record["files"].get(CARD)
    return True, f"{len(record['files'])} files are as they were saved" + (f", {CARD} was edited since" * edited)


def _code(folder: Path, record: dict[str, Any]) -> tuple[bool, str]:
    if not record.get("remote_code", True):
        found = sorted(path.name for path in folder.glob("*.py"))
        return not found, f"it needs no code of its own, and has {', '.join(found) or 'none'}"
    ours = Path(__file__).parent / "remote"
    installed = version("hf-vit-lowrank")
    different = [name for name in CODE if sha256(folder / name) != sha256(ours / name)]
    if different:
        made = record.get("versions", {}).get("hf-vit-lowrank")
        way_out = f": the checkpoint was made by {made}, which can check it" if made not in (None, installed) else ""
        return False, f"{' and '.join(different)} differ from those of hf-vit-lowrank {installed}{way_out}"
    return True, f"the code is that of hf-vit-lowrank {installed}"


def _shapes(folder: Path, record: dict[str, Any]) -> tuple[bool, str]:
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model = AutoModelForImageClassification.from_config(config, trust_remote_code=False)
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    stored = _stored_shapes(folder)
    if not record.get("remote_code", True):  # transformers renames its own tensors when it saves and loads
        fits = sorted(wanted.values()) == sorted(stored.values())
        return fits, f"{len(stored)} tensors {'fit' if fits else 'do not fit'} config.json"
    different = sorted(name for name in wanted.keys() | stored if wanted.get(name) != stored.get(name))
    if different:
        name = different[0]
        return False, (
            f"{len(different)} tensors differ, first {name}: {stored.get(name, 'none')} in {WEIGHTS}, "
            f"{wanted.get(name, 'none')} by config.json"
        )
    return True, f"{len(stored)} tensors fit config.json"


def _parameters(folder: Path, record: dict[str, Any]) -> tuple[bool, str]:
    stored = sum(torch.Size(shape).numel() for shape in _stored_shapes(folder).values())
    return stored == record["parameters"], f"{stored:,} in {WEIGHTS}, {record['parameters']:,} in the record"


def _logits(folder: Path, record: dict[str, Any]) -> tuple[bool, str]:
    if not _shapes(folder, record)[0]:
        return False, "not computed, since the shapes differ"
    with as_user_error("the model could not be loaded"):
        model = AutoModelForImageClassification.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=False, dtype="auto"
        )
    stored, computed = torch.tensor(record["probe"]), torch.tensor(probe_logits(model.eval()))
    if stored.shape != computed.shape:
        return False, f"{tuple(computed.shape)} logits where {tuple(stored.shape)} are stored"
    difference = (stored - computed).abs().max().item()
    within = difference <= TOLERANCE * max(1.0, stored.abs().max().item())
    return within, f"on noise they differ by at most {difference:.1e} from those stored"


def _stored_shapes(folder: Path) -> dict[str, list[int]]:
    with safe_open(folder / WEIGHTS, "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
