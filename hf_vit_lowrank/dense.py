"""A dense ViT or DeiT classifier, read from a folder or the hub, checked, and brought into this package's layout."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import PreTrainedModel

from .dense_layout import SHARED_FIELDS, from_transformers
from .disk import sha256
from .errors import RunError, UserError, as_user_error, reason
from .hub_errors import one_sentence
from .model_card import read_card
from .pixels import load_image_processor
from .remote.configuration_lowrank_vit import LowRankViTConfig
from .remote.modeling_lowrank_vit import LowRankViTForImageClassification

SUPPORTED = ("ViTForImageClassification", "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher")

# Patterns of what a dense checkpoint is read from.
DENSE_FILES = ("*.json", "*.safetensors", "README.md")


@dataclass(frozen=True)
class DenseSource:
    """A dense classifier at full rank in this package's layout, and where it came from.

    `parameters` counts what transformers stores for it, including the key and value biases that our layout folds away.
    `config` is that of the classifier as it was read, of which `model` may be a narrower one (see `narrowing`).
    `preprocessor_config` holds the source's preprocessor_config.json, byte for byte, where it has one; `card` what its
    card says of licence, language, tags and data (see `read_card`).
    """

    model: LowRankViTForImageClassification
    config: LowRankViTConfig
    image_processor: Any
    parameters: int
    location: str
    revision: str | None
    weights_sha256: str
    preprocessor_config: bytes | None = None
    card: dict[str, Any] = field(default_factory=dict)


def load_dense(source: str, *, revision: str | None = None, allow_pickle: bool = False) -> DenseSource:
    """Read a ViT or DeiT classifier from a folder or a hub id. Remote code of the source is never executed.

    Raises:
        UserError: not found, not one of `SUPPORTED`, already compressed or quantised, no safetensors weights (unless
            `allow_pickle`), weights missing or not finite.
        RunError: the hub cannot be reached.
    """
    folder, commit = local_folder(source, revision, (*DENSE_FILES, "*.bin") if allow_pickle else DENSE_FILES)
    architecture = _source_architecture(folder, source)
    dense = _load_transformers(folder, source, architecture, allow_pickle)
    preprocessor = folder / "preprocessor_config.json"
    model = from_transformers(dense)
    return DenseSource(
        model=model,
        config=model.config,
        image_processor=load_image_processor(str(folder)),
        parameters=sum(parameter.numel() for parameter in dense.parameters()),
        location=source,
        revision=commit,
        weights_sha256=sha256(*sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])),
        preprocessor_config=preprocessor.read_bytes() if preprocessor.is_file() else None,
        card=read_card(folder / "README.md"),
    )


def dense_parameters(source: str, *, revision: str | None = None) -> int:
    """Number of parameters of a classifier, from its configuration alone (no weights are downloaded).

    Raises:
        UserError: not found or not one of `SUPPORTED`.
        RunError: the hub cannot be reached.
    """
    folder, _ = local_folder(source, revision, ("*.json",))
    architecture = _source_architecture(folder, source)
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return _size(getattr(transformers, architecture), config)


def matched_parameters(model: str) -> int:
    """Number of parameters of a classifier to match, which may be compressed already. Raises as `dense_parameters`."""
    folder, _ = local_folder(model, None, ("*.json",))
    with as_user_error(f"'{model}' has no configuration that can be read"):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if isinstance(config, LowRankViTConfig):
        return _size(LowRankViTForImageClassification, config)
    return dense_parameters(model)


def _size(architecture: Any, config: Any) -> int:
    """Number of parameters; nothing of that size is made."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in architecture(config).parameters())


def local_folder(source: str, revision: str | None, files: Sequence[str]) -> tuple[Path, str | None]:
    """The folder that holds the checkpoint and, for a hub id, the commit it is at.

    files: patterns of those that are downloaded.

    Raises:
        UserError: there is no such folder or repository, or the hub refuses it.
        RunError: the hub cannot be reached.
    """
    path = Path(source)
    if path.is_dir():
        if revision is not None:
            raise UserError(f"'{source}' is a folder, so --revision {revision} has no meaning: leave it out.")
        return path, None
    try:
        with one_sentence(source, None):
            folder = Path(snapshot_download(source, revision=revision, allow_patterns=list(files)))
    except (UserError, RunError) as error:
        raise type(error)(f"'{source}' is no folder here; and as a repository: {error}") from error
    return folder, folder.name


def _source_architecture(folder: Path, source: str) -> str:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"'{source}' has no config.json, so it is no Hugging Face checkpoint.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"config.json of '{source}' is not valid JSON ({reason(error)}): get an intact copy."
        ) from error
    if not isinstance(config, dict):
        raise UserError(f"config.json of '{source}' is no JSON object: get an intact copy.")
    if config.get("model_type") == LowRankViTConfig.model_type:
        raise UserError(f"'{source}' is already compressed: start from the dense checkpoint it was made of.")
    if config.get("quantization_config"):
        raise UserError(f"'{source}' is quantised: compress the unquantised checkpoint, and quantise the result.")
    architecture = checked_architecture(config, source, SUPPORTED)
    _check_problem(config, source)
    return architecture


def _check_problem(config: dict[str, Any], source: str) -> None:
    """Statistics, probabilities and agreement are those of a choice among classes."""
    kind, labels = config.get("problem_type"), LowRankViTConfig(**_label_fields(config)).num_labels
    if (labels or 0) < 2 or kind not in (None, "single_label_classification"):
        raise UserError(
            f"'{source}' does not choose one of several classes ({labels} labels, problem type {kind or 'not set'}), "
            "which is what can be compressed."
        )


def checked_architecture(config: dict[str, Any], source: str, supported: Sequence[str]) -> str:
    """The class of model that a config.json names, its sizes checked.

    Raises:
        UserError: not one of `supported`, or a size that is absurd.
    """
    architectures = config.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else "nothing"
    if architecture not in supported:
        name = architecture if str(architecture).isidentifier() else repr(architecture)  # the file may hold anything
        raise UserError(f"'{source}' holds {name}; supported are {', '.join(supported)}.")
    _check_sizes(config, source)
    return architecture


def _check_sizes(config: dict[str, Any], source: str) -> None:
    """Refuse absurd sizes in a config.json before transformers makes layers, labels or weights of them."""
    fields = {name: config[name] for name in SHARED_FIELDS if name in config}
    with as_user_error(f"config.json of '{source}' cannot be used"):
        LowRankViTConfig(**fields, **_label_fields(config))


def _label_fields(config: dict[str, Any]) -> dict[str, Any]:
    return {name: config[name] for name in ("num_labels", "id2label") if name in config}


def check_weights(folder: Path, source: str, architecture: Any, config: Any) -> None:
    """Refuse, before transformers opens or makes anything, weights that it should not.

    Raises:
        UserError: an index names anything but files of its kind beside it, or the .safetensors files hold less than
            half of what a model of this configuration has (transformers would make the rest first and complain
            afterwards).
    """
    for path in [*folder.glob("*.safetensors.index.json"), *folder.glob("*.bin.index.json")]:
        kind = Path(path.name.removesuffix(".index.json")).suffix
        with as_user_error(f"{path.name} of '{source}' is no index of weights"):
            names = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        for name in sorted(map(str, names)):
            if Path(name).name != name or not name.endswith(kind):
                raise UserError(
                    f"{path.name} of '{source}' names {name}, which is no {kind} file beside it: get an intact copy."
                )
    files, stored = list(folder.glob("*.safetensors")), 0
    with as_user_error(f"The weights of '{source}' could not be read; they must be whole, and safetensors"):
        for path in files:
            with safe_open(path, "pt") as tensors:
                stored += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
        needed = _size(architecture, config)
    if files and needed > 2 * stored:  # single names that are missing are told later
        raise UserError(
            f"'{source}' lacks weights: its files hold {stored:,} values, and a model of its config.json has "
            f"{needed:,}: get a whole copy."
        )


def _load_transformers(folder: Path, source: str, architecture: str, allow_pickle: bool) -> PreTrainedModel:
    with as_user_error(f"config.json of '{source}' cannot be used"):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    check_weights(folder, source, getattr(transformers, architecture), config)
    if not allow_pickle and not list(folder.glob("*.safetensors")):
        raise UserError(
            f"'{source}' has no .safetensors weights; convert them, or pass --allow-pickle if you trust its author "
            "(reading a pickle can run code)."
        )
    with as_user_error(f"The weights of '{source}' could not be read"):
        try:
            dense, info = getattr(transformers, architecture).from_pretrained(
                folder,
                use_safetensors=None if allow_pickle else True,
                trust_remote_code=False,
                dtype=torch.float32,
                output_loading_info=True,
            )
        except pickle.UnpicklingError as error:  # torch's message advises to let the pickle run what it likes
            raise UserError(
                f"The pickled weights of '{source}' are damaged, or hold more than tensors, which is never opened: get "
                "a copy in safetensors."
            ) from error
    if info["missing_keys"]:
        raise UserError(f"'{source}' lacks weights, the first is {min(info['missing_keys'])}: get a whole copy.")
    if (name := not_finite(dense)) is not None:
        raise UserError(f"'{source}' holds NaN or infinite weights, first in {name}: get an intact copy.")
    return dense


def not_finite(model: torch.nn.Module) -> str | None:
    """Name of the first parameter that holds NaN or infinity, if one does."""
    return next((name for name, values in model.named_parameters() if not torch.isfinite(values).all()), None)
