"""What all tests share: no network, caches of their own, the small digits model and its images."""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

# Read when the libraries are imported, so before anything else here.
_caches = tempfile.mkdtemp(prefix="hf-vit-lowrank-tests-")
os.environ["HF_HOME"] = _caches
os.environ["HF_HUB_OFFLINE"] = "1"
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))


class DigitsData(NamedTuple):
    """Two parquet files with columns `image` and `label`."""

    calibration: Path  # 1,297 images, the ones the model was trained on
    validation: Path  # 500 others


def random_model(spread: float, **sizes: int):
    """A small model at full rank whose parameters are all normal with this standard deviation; the same each time."""
    import torch

    from hf_vit_lowrank.remote.configuration_lowrank_vit import LowRankViTConfig
    from hf_vit_lowrank.remote.modeling_lowrank_vit import LowRankViTForImageClassification

    torch.manual_seed(0)
    model = LowRankViTForImageClassification(LowRankViTConfig(num_hidden_layers=2, patch_size=4, **sizes)).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, spread)
    return model.requires_grad_(False)


def statistics_of_all_patches(model, embeddings):
    """What presets are given, but of all tokens, which a test can work out by itself."""
    from hf_vit_lowrank.statistics import collect_statistics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_vit_lowrank.statistics.ONE_PATCH_IN", 1)
        return collect_statistics(model, embeddings, 0)


@pytest.fixture(scope="session", autouse=True)
def _own_caches() -> Iterator[None]:
    yield
    shutil.rmtree(_caches, ignore_errors=True)


@pytest.fixture(scope="module")
def quiet() -> Iterator[None]:
    """No progress bars."""
    from hf_vit_lowrank import progress

    with progress.quiet():
        yield


@pytest.fixture
def plain_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is built keeps the stream of the dense model, to be compared with it block by block."""
    monkeypatch.setattr(importlib.import_module("hf_vit_lowrank.compress"), "pivoted", lambda model: model)


@pytest.fixture(scope="session")
def digits_data(tmp_path_factory: pytest.TempPathFactory) -> DigitsData:
    from hf_vit_lowrank.digits import write_digits_data

    return DigitsData(*write_digits_data(tmp_path_factory.mktemp("digits-data")))


@pytest.fixture(scope="session")
def digits_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small dense ViT (3 layers, width 64) with about 95 % top-1 on the digits."""
    from hf_vit_lowrank.digits import SMALL, train_digits_model

    return train_digits_model(tmp_path_factory.mktemp("digits-model") / "dense", SMALL)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real DeiT-tiny and its images: deit-tiny/, calibration.parquet, validation.parquet."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("HF_VIT_LOWRANK_DATA", default))
    if not (folder / "deit-tiny" / "model.safetensors").is_file():
        pytest.skip(f"no DeiT-tiny in {folder} (set HF_VIT_LOWRANK_DATA)")
    return folder
