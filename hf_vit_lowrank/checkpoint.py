"""A compressed model on disk: written whole or not at all, and loaded again before it counts as written."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel

from .dense import DENSE_FILES, check_weights
from .disk import require_room, require_writable, sha256
from .errors import RunError, UserError, as_user_error, reason
from .pixels import load_image_processor
from .remote.configuration_lowrank_vit import LowRankViTConfig
from .remote.modeling_lowrank_vit import LowRankViTForImageClassification, pair

RECORD = "compression.json"
CARD = "README.md"
WEIGHTS = "model.safetensors"
PREPROCESSOR = "preprocessor_config.json"
CODE = ("configuration_lowrank_vit.py", "modeling_lowrank_vit.py")
# Patterns of all files of a checkpoint.
CHECKPOINT_FILES = (*DENSE_FILES, "*.py", "*.png")
AUTO_MAP = {
    "AutoConfig": "configuration_lowrank_vit.LowRankViTConfig",
    "AutoModel": "modeling_lowrank_vit.LowRankViTModel",
    "AutoModelForImageClassification": "modeling_lowrank_vit.LowRankViTForImageClassification",
}
# Of the logits kept to see whether a checkpoint still computes what it did: that many classes, and digits.
PROBE_CLASSES = 8
PROBE_DIGITS = 6
_OTHER_FILES_BYTES = 4 << 20  # more than all files beside the weights take


def check_target(folder: str | Path, weight_bytes: int, *, overwrite: bool = False) -> None:
    """See before any work that a checkpoint of this size can be written to `folder`.

    What a save that was killed left beside it is cleared away first: an older checkpoint that it had moved aside comes
    back.

    Raises:
        UserError: it is a file or lies below one; it cannot be replaced by a new folder, being a mount point or the
            folder this runs in; nothing may be written beside it; it is not empty (without `overwrite`); it holds files
            that are no part of a checkpoint of this package (with `overwrite`: they are never deleted); the disk has
            too little room.
    """
    target = Path(folder).resolve()
    beside = next(parent for parent in target.parents if parent.exists())
    if not beside.is_dir() or (target.exists() and not target.is_dir()):
        raise UserError(f"'{folder}' is a file, or lies below one: choose another folder for the checkpoint.")
    if os.path.ismount(target) or Path.cwd().is_relative_to(target):
        raise UserError(
            f"'{folder}' is a mount point, or the folder you are in, and cannot be replaced: name a folder in it."
        )
    require_writable(beside)
    _recover(target)
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise UserError(f"'{folder}' is not empty: choose another folder, or pass --overwrite.")
        foreign = _foreign_files(target)
        if foreign:
            raise UserError(
                f"'{folder}' holds {foreign[0]}, which is no part of a checkpoint of hf-vit-lowrank and would be lost: "
                "choose another folder, or move it away."
            )
    require_room(Path(folder), weight_bytes + _OTHER_FILES_BYTES, "the checkpoint")


def save_checkpoint(
    model: PreTrainedModel,
    image_processor: Any,
    folder: str | Path,
    *,
    record: dict[str, Any],
    card: str,
    preprocessor_config: bytes | None = None,
    pictures: dict[str, bytes] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint that `AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)` loads.

    model: this package's, or one of transformers' own classes, whose checkpoint has no code and needs no trust.

    All files are written to a folder beside `folder`, loaded again and compared with the model in memory (the same
    weights, logits but for rounding), and only then renamed. With `overwrite` the old checkpoint is moved aside first
    and deleted last. The same model and record give the same bytes.

    record: JSON-able, goes into compression.json together with the sha256 of every other file, and the logits that
        `verify` expects (see `probe_logits`).
    card: the text of README.md.
    preprocessor_config: the source's preprocessor_config.json, kept byte for byte where it loads by itself.
    pictures: files that the card shows, by name.

    Raises:
        UserError: see `check_target`.
        RunError: the disk failed, or what was read back differs. `folder` is then as it was before.
    """
    json.dumps(record, allow_nan=False)  # fails here, before anything is written
    weight_bytes = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    check_target(folder, weight_bytes, overwrite=overwrite)
    target = Path(folder).resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = _staging(target)
        staging.mkdir()
        new, old = staging / "new", staging / "old"
        try:
            new.mkdir()
            for name, content in (pictures or {}).items():
                (new / name).write_bytes(content)
            _write(new, model, image_processor, record, card, preprocessor_config)
            _verify(new, model, image_processor)
            _swap(new, target, old)
        finally:
            if target.exists() or not old.exists():
                shutil.rmtree(staging, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise RunError(f"The checkpoint could not be written to '{folder}' ({reason(error)}).") from error


def load_checkpoint(folder: str | Path, **model_options: Any) -> tuple[PreTrainedModel, Any, dict[str, Any]]:
    """The model (in eval mode), the image processor and the record of a folder written by `save_checkpoint`.

    model_options: for `from_pretrained`.
    Runs this package's code, never the folder's. README.md may have been edited; any other file must be as saved.

    Raises:
        UserError: no such checkpoint, a file that is missing or differs, a format newer than this package.
    """
    folder = Path(folder)
    record = intact_record(folder)
    del record["files"]
    record.pop("probe", None)
    with as_user_error(f"The model in '{folder}' could not be loaded"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if isinstance(config, LowRankViTConfig):
            check_weights(folder, str(folder), LowRankViTForImageClassification, config)
        model = AutoModelForImageClassification.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=False, dtype="auto", **model_options
        )
    return model.eval(), load_image_processor(str(folder)), record


def read_record(folder: Path) -> dict[str, Any]:
    """compression.json, whole. Raises UserError where there is none, or none of ours."""
    record = find_record(folder)
    if record is None:
        raise UserError(f"'{folder}' is no checkpoint folder of hf-vit-lowrank: it has no valid {RECORD}.")
    return record


def intact_record(folder: Path) -> dict[str, Any]:
    """As `read_record`, and every file is as it was saved. Raises UserError that says which is not."""
    record = read_record(folder)
    for fault in changed_files(folder, record):
        raise UserError(fault)
    return record


def small_record(folder: Path) -> dict[str, Any]:
    """As `intact_record`, of a checkpoint that is small: of its dense form sizes, ranks and work say nothing.

    Raises UserError.
    """
    record = intact_record(folder)
    if record.get("exported") == "dense":
        raise UserError(f"'{folder}' is the dense form of a checkpoint: name that checkpoint, whose record it is.")
    return record


def changed_files(folder: Path, record: dict[str, Any]) -> Iterator[str]:
    """A sentence for each file that is missing or not as it was saved; README.md may have been edited."""
    for name, digest in record["files"].items():
        if not (folder / name).is_file():
            yield f"'{folder}' lacks {name}: get a whole copy."
        elif name != CARD and sha256(folder / name) != digest:
            yield f"{name} of '{folder}' is not as it was saved (its sha256 differs): get an intact copy."


def unedited_card(folder: Path) -> dict[str, Any]:
    """The record of an intact checkpoint whose README.md is as it was saved. Raises UserError for any other."""
    record = small_record(folder)
    if sha256(folder / CARD) != record["files"].get(CARD):
        raise UserError(f"{CARD} of '{folder}' has been edited and would be lost: move it away, or write it by hand.")
    return record


def rewrite_card(folder: Path, record: dict[str, Any], card: str) -> None:
    """Replace README.md and compression.json; `record` is what `unedited_card` gave, with something more in it.

    Raises RunError where the disk fails; the checkpoint is then still intact.
    """
    text = card.encode()
    record = {**record, "files": {**record["files"], CARD: hashlib.sha256(text).hexdigest()}}
    try:
        # In this order: a card that differs from the record is as good as an edited one.
        for name, content in ((CARD, text), (RECORD, _record_text(record))):
            new = folder / f".{name}.new"
            new.write_bytes(content)
            new.replace(folder / name)
    except OSError as error:
        raise RunError(f"The card of '{folder}' could not be written ({reason(error)}).") from error


def _write(
    folder: Path,
    model: PreTrainedModel,
    image_processor: Any,
    record: dict[str, Any],
    card: str,
    preprocessor_config: bytes | None,
) -> None:
    if isinstance(model, LowRankViTForImageClassification):
        _write_with_code(folder, model)
    else:
        model.save_pretrained(folder)
    _write_preprocessor(folder, image_processor, preprocessor_config)
    (folder / CARD).write_text(card, encoding="utf-8")
    files = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    (folder / RECORD).write_bytes(_record_text({**record, "probe": probe_logits(model), "files": files}))


def _write_with_code(folder: Path, model: LowRankViTForImageClassification) -> None:
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.auto_map = dict(AUTO_MAP)
    config.save_pretrained(folder)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    for name in CODE:
        shutil.copyfile(Path(__file__).parent / "remote" / name, folder / name)


def _record_text(record: dict[str, Any]) -> bytes:
    text = json.dumps(record, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def _write_preprocessor(folder: Path, image_processor: Any, source: bytes | None) -> None:
    """The source's own file, unless only the source's model type or code of the source says which class it means."""
    if source is not None:
        values = json.loads(source)
        named = str(values.get("image_processor_type") or values.get("feature_extractor_type"))
        # transformers 4 also takes the old class names under the new key, transformers 5 does not.
        by_itself = named.removesuffix("Fast").endswith("ImageProcessor") or "image_processor_type" not in values
        if by_itself and "auto_map" not in values:
            (folder / PREPROCESSOR).write_bytes(source)
            try:
                if _settings(load_image_processor(str(folder))) == _settings(image_processor):
                    return
            except UserError:
                pass
    image_processor.save_pretrained(folder)
    values = json.loads((folder / PREPROCESSOR).read_bytes())
    if values.pop("auto_map", None):
        (folder / PREPROCESSOR).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _settings(image_processor: Any) -> dict[str, Any]:
    """What decides about pixels: transformers also keeps a source's reference to code, which we never follow."""
    return {name: value for name, value in image_processor.to_dict().items() if name != "auto_map"}


def _verify(folder: Path, model: PreTrainedModel, image_processor: Any) -> None:
    try:
        again, processor_again, _ = load_checkpoint(folder, attn_implementation=model.config._attn_implementation)
    except UserError as error:
        raise RunError(f"The checkpoint was written but could not be loaded again: {error}") from error
    state, saved = model.state_dict(), again.state_dict()
    wrong = [name for name in state if name not in saved or not torch.equal(saved[name], state[name].cpu())]
    if wrong or len(saved) > len(state):
        raise RunError(f"The checkpoint was written, but holds other weights than the model in memory: {wrong[:3]}.")
    # Of the same weights, but where a tensor starts in memory can change the last bits.
    expected, probed = _probe(model), _probe(torch.nn.Module.to(again, model.device))
    if not (probed - expected).abs().max() <= _tolerance(model.dtype) * expected.abs().max():  # false for NaN as well
        raise RunError("The checkpoint was written, but gives other logits than the model in memory.")
    if _settings(processor_again) != _settings(image_processor):
        raise RunError("The checkpoint was written, but its image processor differs from the one in memory.")


def _tolerance(dtype: torch.dtype) -> float:
    """Of logits, relative to the largest: some roundings of one model's layers."""
    return 1000 * torch.finfo(dtype).eps if dtype == torch.float32 else 10 * torch.finfo(dtype).eps


@torch.no_grad()
def _probe(model: PreTrainedModel) -> torch.Tensor:
    """The logits on two images of noise, always the same ones, in eval mode."""
    shape = (2, model.config.num_channels, *pair(model.config.image_size))
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(model.device, model.dtype)
    training = model.training
    model.eval()
    try:
        return model(pixels).logits
    finally:
        model.train(training)


def _staging(target: Path) -> Path:
    """Beside the target, so that a rename moves it there; always the same, so that a later run finds what was left."""
    return target.with_name(f".{target.name}.saving")


def _recover(target: Path) -> None:
    staging = _staging(target)
    if not target.exists() and (staging / "old").is_dir():
        (staging / "old").rename(target)
    shutil.rmtree(staging, ignore_errors=True)


def probe_logits(model: PreTrainedModel) -> list[list[float]]:
    """The first logits on two images of noise, to PROBE_DIGITS digits after the point.

    In float64, where rounding differs from machine to machine only far behind those digits; takes twice the memory of
    the weights for a moment.
    """
    logits = _probe(copy.deepcopy(model).cpu().double())[:, :PROBE_CLASSES]
    return [[round(value, PROBE_DIGITS) + 0.0 for value in row] for row in logits.tolist()]


def _swap(new: Path, target: Path, old: Path) -> None:
    """Two renames, so that the target is at no time half written; a failure of the second takes back the first."""
    existed = target.exists()
    if existed:
        target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        if existed:
            old.rename(target)
        raise


def _foreign_files(folder: Path) -> list[str]:
    """Files in a folder that no checkpoint of this package has put there."""
    record = find_record(folder)
    ours = {RECORD, *record["files"]} if record else set()
    files = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())
    return [name for file in files if (name := file.relative_to(folder).as_posix()) not in ours]


def find_record(folder: Path) -> dict[str, Any] | None:
    """What compression.json of a folder says, with "files"; None where there is none that `save_checkpoint` wrote."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    files = record.get("files") if isinstance(record, dict) else None
    if not isinstance(files, dict) or any(Path(name).name != name for name in files):
        return None
    return record
