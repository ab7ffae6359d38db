"""A Gradio Space in which a compressed checkpoint and its dense model answer side by side."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import SpaceCardData

from ..checkpoint import RECORD, intact_record, read_record
from ..dense import local_folder
from ..errors import UserError

GRADIO_VERSION = "6.31.0"
# As in pyproject.toml: what the two files of code in a checkpoint need.
REQUIREMENTS = ("torch>=2.6", "transformers>=4.57,!=5.0.*,!=5.1.*,!=5.2.*,!=5.3.*,!=5.4.*", "pillow>=10.1")
_APP = Path(__file__).with_name("app.py")
_DENSE_FILES = ("config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json")


def write_space(
    source: str, output: str | Path, *, dense: str | None = None, revision: str | None = None
) -> list[dict[str, str]]:
    """Write app.py, models.json, requirements.txt and README.md into a folder, ready to be pushed as a Space.

    source: a compressed checkpoint, a folder or a hub id. dense: the dense model, a folder or a hub id (None: the
    source that the checkpoint was made from). Folders are copied into the Space; of models on the hub only the name is
    written, and the commit: of the compressed one that of `revision`, since its code is run, of the dense one the
    newest.

    Returns what models.json says, the dense model first.

    Raises:
        UserError: no such checkpoint; the hub does not give it out; it was made from a folder and `dense` is None.
        RunError: the hub cannot be reached.
    """
    record, small = _compressed(source, revision)
    if dense is None and record["source"].get("revision") is None:
        raise UserError(
            f"'{source}' was made from a folder ({record['source']['location']}): name the dense model by --dense."
        )
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    large = _dense(dense, record["source"])
    models = [
        {"title": "Dense", **_placed(large, folder, "dense", _DENSE_FILES)},
        {"title": "Compressed", **_placed(small, folder, "compressed", (RECORD, *record["files"]))},
    ]
    name = Path(source).name
    shutil.copyfile(_APP, folder / "app.py")
    (folder / "models.json").write_text(json.dumps(models, indent=2) + "\n", encoding="utf-8")
    (folder / "requirements.txt").write_text("\n".join(REQUIREMENTS) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_card(name, models), encoding="utf-8")
    return models


def _compressed(source: str, revision: str | None) -> tuple[dict[str, Any], dict[str, str]]:
    """The record of the checkpoint, and where it is."""
    if Path(source).is_dir():
        return intact_record(Path(source)), {"folder": source}
    folder, commit = local_folder(source, revision, [RECORD])
    return read_record(folder), {"repository": source, "revision": str(commit)}


def _dense(dense: str | None, source: dict[str, Any]) -> dict[str, str]:
    if dense is None or (dense == source["location"] and source.get("revision")):
        return {"repository": source["location"], "revision": source["revision"]}
    if Path(dense).is_dir():
        return {"folder": dense}
    return {"repository": dense, "revision": str(local_folder(dense, None, ["config.json"])[1])}


def _placed(entry: dict[str, str], space: Path, name: str, patterns: Sequence[str]) -> dict[str, str]:
    """The entry as the app reads it; of a folder only what is loaded is copied into the Space: no pickles, nothing that
    its owner keeps there."""
    if "folder" not in entry:
        return entry
    target = space / name
    target.mkdir(exist_ok=True)
    files = sorted({file for pattern in patterns for file in Path(entry["folder"]).glob(pattern) if file.is_file()})
    if not any(file.suffix == ".safetensors" for file in files):
        raise UserError(f"'{entry['folder']}' has no safetensors weights: name a folder or a hub id that has.")
    for file in files:
        shutil.copyfile(file, target / file.name)
    return {"folder": name}


def _card(name: str, models: list[dict[str, str]]) -> str:
    metadata = SpaceCardData(
        title=f"{name} against its dense model",
        sdk="gradio",
        sdk_version=GRADIO_VERSION,
        app_file="app.py",
        models=[model["repository"] for model in models if "repository" in model] or None,
        tags=["vit", "low-rank", "compression", "hf-vit-lowrank"],
    )
    return (
        f"---\n{metadata.to_yaml().strip()}\n---\n\nUpload an image: the dense and the compressed Vision Transformer "
        "answer side by side, with their five best classes, the time of a forward pass on this machine and their size. "
        "Made by hf-vit-lowrank.\n"
    )
