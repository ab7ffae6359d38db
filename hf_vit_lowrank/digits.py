"""The embedded example: scikit-learn's handwritten digits, and a small ViT trained on them in about a minute."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from PIL import Image
from transformers import PrinterCallback, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from .errors import UserError
from .pixels import load_image_processor

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
IMAGE_SIZE = 32  # pixels; the digits have 8
PATCH_SIZE = 8
TEST_IMAGES = 500  # of 1,797
SHIFT = 2  # pixels by which training images are moved at most

_PREPROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    "resample": 2,  # bilinear
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
_SETTINGS = "training.json"


@dataclass(frozen=True)
class DigitsTraining:
    """How the small ViT is built and trained. The defaults give 98 % on the test images, in a minute on two cores."""

    hidden_size: int = 96
    layers: int = 4
    heads: int = 4
    epochs: int = 40
    batch_size: int = 64
    learning_rate: float = 1e-3
    seed: int = 0


# Good enough for tests: 95 % after some 15 seconds.
SMALL = DigitsTraining(hidden_size=64, layers=3, epochs=20, batch_size=32, learning_rate=2e-3)


def digits_data() -> DatasetDict:
    """1,297 images for training and calibration ("train") and 500 others ("test"), with columns `image` and `label`.

    Always the same split. Raises UserError where scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("The digits come with scikit-learn: pip install 'hf-vit-lowrank[demo]'.") from error
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    parts = {"train": order[TEST_IMAGES:], "test": order[:TEST_IMAGES]}
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=NAMES)})

    def rows(part: np.ndarray) -> Dataset:
        columns = {
            "image": [_enlarged(digits.images[index]) for index in part],
            "label": [int(digits.target[index]) for index in part],
        }
        return Dataset.from_dict(columns, features=features)

    return DatasetDict({name: rows(part) for name, part in parts.items()})


def _enlarged(digit: np.ndarray) -> Image.Image:
    """8×8 values from 0 to 16 as an RGB image of `IMAGE_SIZE`."""
    gray = Image.fromarray((digit * (255 / 16)).round().astype(np.uint8))
    return gray.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR).convert("RGB")


def write_digits_data(folder: Path) -> tuple[Path, Path]:
    """Write the two parts as train.parquet and test.parquet into a folder, but for what is there; gives both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.parquet", folder / "test.parquet"
    missing = [path for path in paths if not path.exists()]
    parts = digits_data() if missing else {}
    for path in missing:
        temporary = path.with_suffix(".tmp")
        parts[path.stem].to_parquet(temporary)
        temporary.replace(path)
    return paths


def train_digits_model(folder: Path, training: DigitsTraining | None = None) -> Path:
    """Train a ViTForImageClassification on the digits and save it, with its image processor, as a Hugging Face folder.

    A folder that an earlier call with the same settings has made is kept as it is. Gives the folder.

    Raises:
        UserError: there is something else than such a model.
    """
    training = training or DigitsTraining()
    settings = _settings_of(folder)
    if settings == asdict(training):
        return folder
    if settings is None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"'{folder}' is no model of digits and would be lost: choose another folder, or move it away.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        new = Path(temporary, "model")
        new.mkdir()
        _train(new, training)
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    return folder


def _settings_of(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / _SETTINGS).read_text())
    except (OSError, ValueError):
        return None


def _train(folder: Path, training: DigitsTraining) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(_PREPROCESSOR, indent=2))
    images = digits_data()["train"]
    pixels = load_image_processor(str(folder))(images["image"][:], return_tensors="pt")["pixel_values"]
    examples = [{"pixel_values": image, "labels": label} for image, label in zip(pixels, images["label"], strict=True)]
    set_seed(training.seed)
    model = ViTForImageClassification(_model_config(training))
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),  # stays empty: nothing is saved on the way
        num_train_epochs=training.epochs,
        per_device_train_batch_size=training.batch_size,
        learning_rate=training.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        weight_decay=0.05,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),
        seed=training.seed,
        use_cpu=True,  # the same model on every machine, and fast enough
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=examples, data_collator=_shifted_batch)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    shutil.rmtree(folder / "trainer", ignore_errors=True)
    model.save_pretrained(folder)
    (folder / _SETTINGS).write_text(json.dumps(asdict(training), indent=2))


def _model_config(training: DigitsTraining) -> ViTConfig:
    return ViTConfig(
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_size=training.hidden_size,
        num_hidden_layers=training.layers,
        num_attention_heads=training.heads,
        intermediate_size=4 * training.hidden_size,
        id2label=dict(enumerate(NAMES)),
        label2id={name: label for label, name in enumerate(NAMES)},
    )


def _shifted_batch(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A training batch, every image moved by up to `SHIFT` pixels each way (seeded by `set_seed`)."""
    pixels = torch.stack([example["pixel_values"] for example in examples])
    padded = torch.nn.functional.pad(pixels, (SHIFT,) * 4, value=-1.0)  # -1 is black
    starts = torch.randint(0, 2 * SHIFT + 1, (len(examples), 2)).tolist()
    moved = [
        image[:, top : top + IMAGE_SIZE, left : left + IMAGE_SIZE]
        for image, (top, left) in zip(padded, starts, strict=True)
    ]
    return {
        "pixel_values": torch.stack(moved),
        "labels": torch.tensor([example["labels"] for example in examples]),
    }
