"""Accuracy, agreement and sizes on small models whose right answers are known."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys

import datasets
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTModel,
)

from hf_vit_lowrank import calibration, evaluation
from hf_vit_lowrank.dense_layout import from_transformers
from hf_vit_lowrank.errors import RunError, UserError
from hf_vit_lowrank.evaluation import (
    TopKAccuracy,
    bytes_on_disk,
    count_flops,
    count_parameters,
    evaluate_classifier,
    load_classifier,
    pick_device,
)
from hf_vit_lowrank.images import open_images
from hf_vit_lowrank.plan_costs import plan_cost
from hf_vit_lowrank.recipe import CompressionRecipe
from hf_vit_lowrank.remote.configuration_lowrank_vit import LowRankViTConfig
from hf_vit_lowrank.remote.modeling_lowrank_vit import LowRankViTAttention, LowRankViTForImageClassification

SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
IMAGES = {"image_size": 8, "patch_size": 4}
NAMES = ("red", "green", "blue", "cyan", "pink", "gold", "gray")
PROCESSOR = ViTImageProcessorPil(size={"height": 8, "width": 8})


@pytest.fixture(autouse=True)
def brief_timing(monkeypatch):
    monkeypatch.setattr(evaluation, "TIMING_SECONDS", 0)


def random_model(names=NAMES, **options) -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(**(SIZES | IMAGES | options), id2label=dict(enumerate(names)), initializer_range=0.5)
    return ViTForImageClassification(config).eval()


def images(folder, labels, names=NAMES, **options):
    """A stream of pictures of random noise with these labels (None: no label column)."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (len(labels), 8, 8, 3), generator=generator, dtype=torch.uint8).numpy()
    columns = {"image": [Image.fromarray(picture) for picture in noise]}
    features = {"image": datasets.Image()}
    if labels[0] is not None:
        columns["label"] = labels
        features["label"] = datasets.ClassLabel(names=list(names)) if names else datasets.Value("int64")
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).save_to_disk(folder)
    return open_images(folder, seed=None, **options)


def ranking(model, stream) -> torch.Tensor:
    """Labels from best to worst for each image, without the code under test."""
    pixels = PROCESSOR(images=[item.image for item in stream], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return model(pixel_values=pixels).logits.argsort(-1, descending=True)


# -------------------------------------------------------------------------------------------------------------- metric


def test_top_k_by_hand():
    metric = TopKAccuracy(keep_in_memory=True)
    metric.add_batch(predictions=[[3, 1, 2, 0, 4], [0, 1, 2, 3, 4]], references=[3, 4])
    metric.add_batch(predictions=[[5, 6, 7, 8, 9], [1, 0, 2, 3, 5]], references=[4, 0])
    assert metric.compute() == {"top1": 25.0, "top5": 75.0}


@pytest.mark.slow
def test_metric_needs_no_network(tmp_path):
    code = (
        "import socket; socket.getaddrinfo = None\n"
        "from hf_vit_lowrank.evaluation import TopKAccuracy\n"
        "print(TopKAccuracy(keep_in_memory=True).compute(predictions=[[1, 0], [0, 1]], references=[1, 1]))"
    )
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "{'top1': 50.0, 'top5': 100.0}", done.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}


# ---------------------------------------------------------------------------------------------------------- evaluating


def test_accuracies_are_those_counted_by_hand(tmp_path):
    model = random_model()
    labels = [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3]
    stream = images(tmp_path, labels)
    ranked = ranking(model, stream)
    truth = torch.tensor(labels)[:, None]
    report = evaluate_classifier(model, PROCESSOR, stream, batch_size=4, device="cpu")
    assert report.top1 == pytest.approx(100 * (ranked[:, :1] == truth).float().mean().item())
    assert report.top5 == pytest.approx(100 * (ranked[:, :5] == truth).any(1).float().mean().item())
    assert 0 < report.top1 < report.top5 < 100
    assert (report.images, report.agreement, report.against) == (11, None, None)
    assert report.parameters == sum(tensor.numel() for tensor in model.state_dict().values())
    assert report.images_per_second > 0
    assert json.loads(report.to_json())["top1"] == report.top1


def test_labels_follow_names_not_numbers(tmp_path):
    model = random_model()
    best = ranking(model, images(tmp_path / "plain", [0] * 6))[:, 0].tolist()
    assert len(set(best)) > 1
    backwards = [name.upper() for name in reversed(NAMES)]
    stream = images(tmp_path / "named", [backwards.index(NAMES[label].upper()) for label in best], backwards)
    assert evaluate_classifier(model, PROCESSOR, stream, device="cpu").top1 == 100
    with pytest.raises(UserError, match="'mauve'"):
        evaluate_classifier(model, PROCESSOR, images(tmp_path / "other", [0], ("mauve",)), device="cpu")


def test_label_numbers_count_only_where_there_are_no_names(tmp_path, caplog):
    model = random_model()
    best = ranking(model, images(tmp_path / "plain", [0] * 6))[:, 0].tolist()
    assert evaluate_classifier(model, PROCESSOR, images(tmp_path / "numbers", best, None), device="cpu").top1 == 100
    assert "label numbers" in caplog.text
    with pytest.raises(UserError, match=r"label 7, and .* knows only 7"):
        evaluate_classifier(model, PROCESSOR, images(tmp_path / "far", [7], None), device="cpu")


def test_agreement_counts_equal_first_choices(tmp_path):
    model, dense = random_model(), random_model()
    dense.classifier.weight.data += 0.5 * torch.randn(len(NAMES), SIZES["hidden_size"])
    stream = images(tmp_path, [0, 1, 2] * 8)
    same = (ranking(model, stream)[:, 0] == ranking(dense, stream)[:, 0]).float().mean().item()
    report = evaluate_classifier(model, PROCESSOR, stream, device="cpu", against=dense)
    assert report.agreement == pytest.approx(100 * same)
    assert 0 < same < 1
    alone = evaluate_classifier(dense, PROCESSOR, stream, device="cpu").to_dict()
    assert {name: alone[name] for name in report.against if name != "images_per_second"} == {
        name: value for name, value in report.against.items() if name != "images_per_second"
    }


def test_agreement_with_another_class_order_and_processor(tmp_path):
    model = random_model()
    order = [3, 1, 0, 2, 6, 5, 4]
    shuffled = random_model([NAMES[index] for index in order])
    shuffled.classifier.load_state_dict({name: value[order] for name, value in model.classifier.state_dict().items()})
    same_pixels = ViTImageProcessorPil(size={"height": 8, "width": 8}, crop_size={"height": 8, "width": 8})
    stream = images(tmp_path / "set", [0] * 6)
    for against in (shuffled, (shuffled, same_pixels)):
        assert evaluate_classifier(model, PROCESSOR, stream, device="cpu", against=against).agreement == 100
    inverted = ViTImageProcessorPil(size={"height": 8, "width": 8}, image_std=[-0.5] * 3)
    other = evaluate_classifier(model, PROCESSOR, stream, device="cpu", against=(shuffled, inverted))
    assert other.agreement < 100


def test_without_labels_there_is_agreement_only(tmp_path):
    model = random_model()
    stream = images(tmp_path, [None] * 5)
    report = evaluate_classifier(model, PROCESSOR, stream, device="cpu", against=model)
    assert (report.top1, report.top5, report.agreement) == (None, None, 100.0)
    assert report.against["top1"] is None
    with pytest.raises(UserError, match="no label column"):
        evaluate_classifier(model, PROCESSOR, stream, device="cpu")


def test_dense_model_near_chance_is_pointed_out(tmp_path, caplog):
    model = random_model()
    worst = ranking(model, images(tmp_path / "plain", [0] * 4))[:, -1].tolist()
    with caplog.at_level(logging.WARNING):
        evaluate_classifier(model, PROCESSOR, images(tmp_path / "set", worst), device="cpu", against=model)
    assert "reaches only 0.0 % top-1" in caplog.text


def test_nan_logits_end_the_run(tmp_path):
    model = random_model()
    model.classifier.bias.data[0] = torch.nan
    with pytest.raises(RunError, match="NaN or infinite, somewhere in images 0 to 1"):
        evaluate_classifier(model, PROCESSOR, images(tmp_path, [0, 1]), device="cpu")


def test_training_mode_is_left_as_it_was(tmp_path):
    model = random_model(hidden_dropout_prob=0.5).train()
    stream = images(tmp_path, [0] * 6)
    report = evaluate_classifier(model, PROCESSOR, stream, device="cpu", against=model)
    assert report.agreement == 100  # dropout would make the two differ
    assert model.training


def test_unknown_device_is_refused():
    with pytest.raises(UserError, match="'abacus' cannot be used"):
        pick_device("abacus")
    assert pick_device("cpu") == torch.device("cpu")


def test_distillation_on_another_gpu_than_the_first_is_refused(monkeypatch):
    monkeypatch.setattr(calibration, "pick_device", torch.device)
    recipe = CompressionRecipe(reduction=0.5, compensation="distill")
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES=1"):
        calibration._device("cuda:1", recipe)
    assert calibration._device("cuda:0", recipe).index == 0
    assert calibration._device("cuda:1", CompressionRecipe(reduction=0.5)).index == 1


# --------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (12, 8)])
def test_flops_by_hand(attention, height, width):
    model = random_model(image_size=(height, width), attn_implementation=attention)
    d, hidden, layers, patch = 8, 12, 2, 4
    patches = (height // patch) * (width // patch)
    tokens = patches + 1
    per_block = 4 * tokens * d * d + 2 * tokens * tokens * d + 2 * tokens * d * hidden
    products = patches * 3 * patch**2 * d + layers * per_block + d * len(NAMES)
    assert count_flops(model) == 2 * products


def test_flops_are_those_of_unpadded_products(monkeypatch):
    ranks = [[3, 3], [5, 5]]
    config = LowRankViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, image_size=8, patch_size=4,
        num_labels=5, query_key_ranks=ranks, value_output_ranks=ranks, attn_implementation="sdpa",
    )  # fmt: skip
    monkeypatch.setattr(LowRankViTAttention, "_is_fused", lambda self, *_: self.config._attn_implementation == "sdpa")
    model = LowRankViTForImageClassification(config)
    assert count_flops(model) == plan_cost(config, "flops")
    assert model.config._attn_implementation == "sdpa"


def test_shared_parameters_count_once():
    layer = torch.nn.Linear(3, 4)
    assert count_parameters(torch.nn.Sequential(layer, layer)) == 16


# ------------------------------------------------------------------------------------------------------------- loading


def saved(model, folder):
    model.save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    return str(folder)


def distilled():
    config = DeiTConfig(**(SIZES | IMAGES), id2label=dict(enumerate(NAMES)))
    return DeiTForImageClassificationWithTeacher(config).eval()


@pytest.mark.parametrize("make", [random_model, distilled, lambda: from_transformers(random_model())])
def test_classifiers_load_whole(tmp_path, make):
    model = make()
    loaded, processor = load_classifier(saved(model, tmp_path / "model"))
    pixels = torch.rand(2, 3, 8, 8)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert torch.equal(loaded(pixels).logits, model(pixels).logits)
    assert dict(processor.size) == {"height": 8, "width": 8}
    assert bytes_on_disk(loaded) == (tmp_path / "model" / "model.safetensors").stat().st_size
    assert bytes_on_disk(model) is None


def test_what_is_no_classifier_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"'.*missing' is no folder here"):
        load_classifier(str(tmp_path / "missing"))
    encoder = saved(ViTModel(ViTConfig(**(SIZES | IMAGES))), tmp_path / "encoder")
    with pytest.raises(UserError, match="holds ViTModel; supported are LowRankViTForImageClassification, ViTFor"):
        load_classifier(encoder)


def test_bad_weights_are_refused(tmp_path):
    folder = tmp_path / "model"
    saved(random_model(), folder)
    weights = load_file(folder / "model.safetensors")
    del weights["classifier.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks weights, the first is classifier\.bias"):
        load_classifier(str(folder))
    (folder / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"The weights of '.*' could not be read"):
        load_classifier(str(folder))
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"The weights of '.*' could not be read.*safetensors"):
        load_classifier(str(folder))


def test_checkpoint_with_code_of_its_own_is_not_run(tmp_path):
    folder = tmp_path / "model"
    saved(random_model(), folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "stranger", "auto_map": {"AutoConfig": "code.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass")
    with pytest.raises(UserError, match=r"config\.json of .* cannot be used"):
        load_classifier(str(folder))
    assert not (tmp_path / "ran").exists()
