"""What users do next with a checkpoint, each with the real library: serve, fine-tune, quantise, evaluate."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import evaluate
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments, set_seed

from hf_vit_lowrank.compress import compress
from hf_vit_lowrank.evaluation import TopKAccuracy
from hf_vit_lowrank.images import open_images
from hf_vit_lowrank.quantised import serialised_bytes
from hf_vit_lowrank.recipe import CompressionRecipe

# As a stranger who has only torch, transformers and pillow: -I leaves out the working directory and PYTHONPATH; the
# finder also hides an installed package. Whatever the libraries warn of is an error.
STRANGER = """
import importlib.abc, json, logging, sys, warnings

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_vit_lowrank":
            raise ImportError("not installed here")

sys.meta_path.insert(0, Hidden())
complaints = []

class Listening(logging.Handler):
    def emit(self, record):
        complaints.append(record.getMessage())

import transformers
transformers.utils.logging.add_handler(Listening(logging.WARNING))
from PIL import Image
from safetensors.torch import load_file
from transformers import pipeline

compressed, finetuned, pixels = sys.argv[1:]
warnings.simplefilter("error")
classify = pipeline("image-classification", model=compressed, trust_remote_code=True)
images = [Image.open(compressed + "/../%d.png" % index) for index in range(3)]
answers = [one[0]["label"] for one in classify(images, batch_size=3, top_k=1)]
model = transformers.AutoModelForImageClassification.from_pretrained(finetuned, trust_remote_code=True)
encoder = transformers.AutoModel.from_pretrained(finetuned, trust_remote_code=True)
logits = model(pixel_values=load_file(pixels)["pixels"]).logits.tolist()
model.save_pretrained(finetuned + "-again")
about = {"answers": answers, "logits": logits, "complaints": complaints, "module": type(model).__module__}
print(json.dumps({**about, "encoder": type(encoder).__name__, "hidden": "hf_vit_lowrank" not in sys.modules}))
"""


class Digits(NamedTuple):
    images: Dataset
    pixels: torch.Tensor
    labels: torch.Tensor


@pytest.fixture(scope="module")
def compressed(digits_model, digits_data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ecosystem") / "compressed"
    recipe = CompressionRecipe(reduction=0.4, samples=128)
    compress(str(digits_model), open_images(digits_data.calibration, samples=128), recipe).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def digits(digits_data, compressed) -> Digits:
    """The validation images, as the checkpoint's own image processor prepares them."""
    images = Dataset.from_parquet(str(digits_data.validation), keep_in_memory=True)
    pixels = AutoImageProcessor.from_pretrained(compressed)(images["image"][:], return_tensors="pt").pixel_values
    return Digits(images, pixels, torch.tensor(images["label"]))


@torch.no_grad()
def accuracy(model, digits: Digits) -> float:
    return (model.eval()(digits.pixels).logits.argmax(-1) == digits.labels).float().mean().item()


def load(folder: Path, **options: Any):
    return AutoModelForImageClassification.from_pretrained(folder, **options)


# ------------------------------------------------------------------------------------------------- serve and fine-tune


def finetune(folder: Path, output: Path, digits: Digits, **arguments: Any) -> Trainer:
    """A few steps towards three classes: the digit modulo three."""
    set_seed(0)
    names = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    model = load(folder, num_labels=3, ignore_mismatched_sizes=True, **names)
    examples = [
        {"pixel_values": pixels, "labels": int(label) % 3}
        for pixels, label in zip(digits.pixels[:96], digits.labels, strict=False)
    ]
    settings = TrainingArguments(
        output_dir=str(output.parent / "trainer"),
        max_steps=8,
        per_device_train_batch_size=32,
        learning_rate=3e-3,
        logging_strategy="steps",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **arguments,
    )
    trainer = Trainer(
        model=model,
        args=settings,
        train_dataset=examples,
        processing_class=AutoImageProcessor.from_pretrained(folder),
    )
    trainer.train()
    trainer.save_model(str(output))
    return trainer


def test_pipeline_and_finetuned_checkpoint_where_we_are_not_installed(compressed, digits, tmp_path):
    output = tmp_path / "finetuned"
    trainer = finetune(compressed, output, digits, gradient_checkpointing=True)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    for index in range(3):
        digits.images[index]["image"].save(compressed.parent / f"{index}.png")
    save_file({"pixels": digits.pixels[:4]}, tmp_path / "pixels")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, str(compressed), str(output), str(tmp_path / "pixels")],
        capture_output=True, text=True, check=False, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["complaints"] == []
    assert answer["hidden"]
    assert answer["encoder"] == "LowRankViTModel"
    assert answer["module"].startswith("transformers_modules")
    model = load(compressed).eval()
    with torch.no_grad():
        expected = [model.config.id2label[int(label)] for label in model(digits.pixels[:3]).logits.argmax(-1)]
        torch.testing.assert_close(
            torch.tensor(answer["logits"]), trainer.model.eval()(digits.pixels[:4]).logits, atol=1e-5, rtol=1e-4
        )
    assert answer["answers"] == expected
    code = [{path.name: path.read_bytes() for path in folder.glob("*.py")} for folder in (compressed, output)]
    assert code[0] == code[1]
    assert len(code[0]) == 2
    again = tmp_path / "finetuned-again"
    assert {path.name for path in again.glob("*.py")} == set(code[0])
    before, after = (load_file(folder / "model.safetensors") for folder in (output, again))
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    processors = [AutoImageProcessor.from_pretrained(folder).to_dict() for folder in (compressed, output)]
    assert processors[0] == processors[1]


def test_gradient_checkpointing_gives_the_same_gradients(compressed, digits):
    gradients = []
    for checkpointing in (False, True):
        model = load(compressed).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        model(digits.pixels[:8], labels=digits.labels[:8]).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_lora_is_trained_and_merged(compressed, digits, tmp_path):
    peft = pytest.importorskip("peft")
    set_seed(0)
    before = load(compressed).eval()
    parts = [name for name, module in before.vit.named_modules() if isinstance(module, torch.nn.Linear)]
    assert any("output.rest" in name for name in parts)
    assert any("up.read" in name for name in parts)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", modules_to_save=["classifier"])
    model = peft.get_peft_model(load(compressed), settings)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name or "classifier" in name for name in trained)
    assert len([name for name in trained if "lora_A" in name]) == len(parts)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(6):
        loss = model(pixel_values=digits.pixels[:64], labels=(digits.labels[:64] + 1) % 10).loss
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < losses[0]
    with torch.no_grad():
        expected = model.eval()(pixel_values=digits.pixels[:8]).logits
        assert (expected - before(digits.pixels[:8]).logits).abs().max() > 0.1
        model.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged = load(tmp_path / "merged").eval()
        torch.testing.assert_close(merged(digits.pixels[:8]).logits, expected, atol=1e-4, rtol=1e-4)
    assert merged.state_dict().keys() == before.state_dict().keys()
    assert {path.name for path in (tmp_path / "merged").glob("*.py")} == {p.name for p in compressed.glob("*.py")}


def test_attention_implementation_can_be_set_or_is_refused(compressed, digits):
    model = load(compressed).eval()
    with torch.no_grad():
        expected = model(digits.pixels[:4]).logits
        model.set_attn_implementation("eager")
        assert model.config._attn_implementation == "eager"
        torch.testing.assert_close(model(digits.pixels[:4]).logits, expected, atol=1e-5, rtol=1e-4)
    model.set_attn_implementation("sdpa")
    for other in ("flash_attention_2", "flex_attention", "magic"):
        with pytest.raises(ValueError, match="not support"):
            model.set_attn_implementation(other)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler of torch on CPU needs g++")
@torch.no_grad()
def test_compiled_as_one_graph(compressed, digits):
    model = load(compressed).eval()
    expected = model(digits.pixels[:8]).logits
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(digits.pixels[:8]).logits, expected, atol=1e-4, rtol=1e-4)


# --------------------------------------------------------------------------------------------- precisions and devices


@pytest.mark.parametrize(
    "options",
    [{"dtype": torch.bfloat16}, {"dtype": torch.float16}, {"device_map": "auto"}, {"low_cpu_mem_usage": True}],
)
def test_ways_of_loading(options, compressed, digits):
    whole, model = load(compressed), load(compressed, **options)
    assert {parameter.dtype for parameter in model.parameters()} == {options.get("dtype", torch.float32)}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert abs(accuracy(model, digits) - accuracy(whole, digits)) < 0.005
    share = serialised_bytes(model) / serialised_bytes(whole)
    assert share < (0.6 if "dtype" in options else 1.01)


def torchao_config() -> Any:
    torchao = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    return TorchAoConfig(torchao.Int8WeightOnlyConfig(set_inductor_config=False))


def quanto_config() -> Any:
    pytest.importorskip("optimum.quanto")
    from transformers import QuantoConfig

    return QuantoConfig(weights="int8")


@pytest.mark.parametrize("config", [torchao_config, quanto_config])
def test_int8_weights_on_top(config, compressed, digits_model, digits):
    """Loaded as int8, ours keeps its accuracy and is smaller than int8 of the dense model, and than its own float32."""
    whole, dense = load(compressed), load(digits_model, quantization_config=config())
    model = load(compressed, quantization_config=config())
    assert abs(accuracy(model, digits) - accuracy(whole, digits)) <= 0.01
    assert accuracy(dense, digits) - accuracy(model, digits) <= 0.03
    assert serialised_bytes(model) < 0.6 * serialised_bytes(whole)
    assert serialised_bytes(model) < 0.8 * serialised_bytes(dense)


# ----------------------------------------------------------------------------------------------------------- evaluate


def test_evaluator_with_the_metric_of_this_package(compressed, digits):
    model = load(compressed).eval()
    images = digits.images.select(range(100))
    result = evaluate.evaluator("image-classification").compute(
        model_or_pipeline=model,
        data=images,
        feature_extractor=AutoImageProcessor.from_pretrained(compressed),
        metric=TopKAccuracy(keep_in_memory=True),
        label_mapping=model.config.label2id,
    )
    few = Digits(images, digits.pixels[:100], digits.labels[:100])
    assert result["top1"] == pytest.approx(100 * accuracy(model, few))
    assert "top5" not in result
