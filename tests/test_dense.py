"""Dense ViT and DeiT checkpoints read into this package's layout: the same function, or a clear refusal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    ViTConfig,
    ViTForImageClassification,
)

from hf_vit_lowrank.dense import dense_parameters, load_dense
from hf_vit_lowrank.dense_layout import from_transformers
from hf_vit_lowrank.errors import RunError, UserError
from hf_vit_lowrank.remote.modeling_lowrank_vit import LowRankViTForImageClassification

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
}
PREPROCESSOR = (
    b'{"image_processor_type":"ViTImageProcessor","size": {"height": 32,"width":32},"image_mean":[0.1,0.2,0.3]}'
)
CONFIGS = {
    ViTForImageClassification: ViTConfig,
    DeiTForImageClassification: DeiTConfig,
    DeiTForImageClassificationWithTeacher: DeiTConfig,
}
ALL_CLASSES = pytest.mark.parametrize("architecture", list(CONFIGS))


def make_dense(architecture=ViTForImageClassification, attention: str = "eager", **fields):
    torch.manual_seed(0)
    config = CONFIGS[architecture](**{**SMALL, **fields})
    model = architecture._from_config(config, attn_implementation=attention).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def with_attention(model, attention: str) -> LowRankViTForImageClassification:
    other = LowRankViTForImageClassification._from_config(model.config, attn_implementation=attention)
    other.load_state_dict(model.state_dict())
    return other.eval()


def pixels(config, size: tuple[int, int] | None = None) -> torch.Tensor:
    if size is None:
        size = config.image_size if not isinstance(config.image_size, int) else (config.image_size,) * 2
    return torch.randn(3, config.num_channels, *size, generator=torch.Generator().manual_seed(1))


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dense ViT as it lies on disk."""
    path = tmp_path / "dense"
    make_dense().save_pretrained(path)
    (path / "preprocessor_config.json").write_bytes(PREPROCESSOR)
    return path


def edit_config(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


# ------------------------------------------------------------------------------------------------------- same function


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"image_size": 48, "patch_size": 16},
        {"image_size": [32, 48], "patch_size": [8, 16]},
        {"num_channels": 1, "num_attention_heads": 1},
        {"num_attention_heads": 16, "hidden_act": "relu"},
        {"qkv_bias": False, "hidden_act": "gelu_new"},
        {"num_labels": 1},
        {"num_labels": 1000, "num_hidden_layers": 1},
    ],
    ids=str,
)
@ALL_CLASSES
def test_zero_reduction_equals_dense(architecture, fields):
    dense = make_dense(architecture, **fields)
    ours = from_transformers(dense)
    images = pixels(dense.config)
    with torch.no_grad():
        expected = dense(images, output_hidden_states=True, output_attentions=True)
        for attention in ("eager", "sdpa"):
            model = with_attention(ours, attention)
            assert_close(model(images).logits, expected.logits)
            full = model(images, output_hidden_states=True, output_attentions=True)
            for name in ("hidden_states", "attentions"):
                assert len(full[name]) == len(expected[name])
                for actual, wanted in zip(full[name], expected[name], strict=True):
                    assert_close(actual, wanted)
        if architecture is DeiTForImageClassificationWithTeacher:
            assert_close(full.cls_logits, expected.cls_logits)
            assert_close(full.distillation_logits, expected.distillation_logits)


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="transformers 4 ignores head_dim")
def test_native_head_and_mlp_sizes():
    dense = make_dense(head_dim=5, intermediate_size=20)
    ours = from_transformers(dense)
    assert ours.config.query_key_ranks == [[5] * 4] * 2
    assert ours.config.mlp_widths == [20, 20]
    assert_close(ours(pixels(dense.config)).logits, dense(pixels(dense.config)).logits)


@pytest.mark.parametrize("size", [(48, 40), (32, 32), (16, 24)])
@ALL_CLASSES
def test_position_embeddings_are_interpolated_alike(architecture, size):
    dense = make_dense(architecture)
    images = pixels(dense.config, size)
    expected = dense(images, interpolate_pos_encoding=True).logits
    assert_close(from_transformers(dense)(images, interpolate_pos_encoding=True).logits, expected)


@pytest.mark.parametrize(
    ("problem_type", "num_labels", "labels"),
    [
        ("single_label_classification", 5, torch.tensor([0, 4, 2])),
        (None, 5, torch.tensor([0, 4, 2])),
        ("regression", 1, torch.tensor([0.5, -1.0, 2.0])),
        (None, 1, torch.tensor([0.5, -1.0, 2.0])),
        ("regression", 5, torch.linspace(-1, 1, 15).view(3, 5)),
        ("multi_label_classification", 5, torch.eye(5)[:3]),
        (None, 5, torch.eye(5)[:3]),
    ],
)
def test_loss_equals_dense(problem_type, num_labels, labels):
    dense = make_dense(num_labels=num_labels, problem_type=problem_type)
    images = pixels(dense.config)
    ours = from_transformers(dense)
    assert_close(ours(images, labels=labels).loss, dense(images, labels=labels).loss)


def test_outputs_as_tuple():
    dense = make_dense()
    images, labels = pixels(dense.config), torch.tensor([0, 1, 2])
    options = {"output_hidden_states": True, "output_attentions": True, "return_dict": False}
    ours = from_transformers(dense)
    expected, actual = dense(images, labels=labels, **options), ours(images, labels=labels, **options)
    assert [type(part) for part in actual] == [type(part) for part in expected]
    assert_close(actual[0], expected[0])
    assert_close(actual[1], expected[1])
    encoded = ours.vit(images, return_dict=False)
    assert isinstance(encoded, tuple)
    assert encoded[0].shape == (3, 17, 32)


def test_gradient_checkpointing_gives_the_same_gradients():
    model = from_transformers(make_dense()).train()
    images, labels = pixels(model.config), torch.tensor([0, 1, 2])

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(images, labels=labels).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    runs = []
    model.vit.blocks[0].attention.register_forward_hook(lambda *_: runs.append(1))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for actual, expected in zip(gradients(), plain, strict=True):
        assert_close(actual, expected)
    assert len(runs) == 2  # computed again on the way back


def test_wrong_pixels_are_refused():
    model = from_transformers(make_dense())
    with pytest.raises(ValueError, match=r"32x32, but got 40x32.*interpolate_pos_encoding"):
        model(pixels(model.config, (40, 32)))
    with pytest.raises(ValueError, match="3 channels, but got 1"):
        model(torch.zeros(1, 1, 32, 32))


# ---------------------------------------------------------------------------------------------------------- from disk


@ALL_CLASSES
def test_load_from_folder(architecture, tmp_path: Path):
    names = dict(enumerate("abcde"))
    dense = make_dense(architecture, id2label=names, label2id={name: label for label, name in names.items()})
    dense.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_bytes(PREPROCESSOR)
    source = load_dense(str(tmp_path))
    assert_close(source.model(pixels(dense.config)).logits, dense(pixels(dense.config)).logits)
    assert source.parameters == dense_parameters(str(tmp_path)) == sum(p.numel() for p in dense.parameters())
    assert source.preprocessor_config == PREPROCESSOR
    assert source.image_processor.image_mean == pytest.approx((0.1, 0.2, 0.3))
    assert source.model.config.id2label == names
    assert source.model.config.label2id["e"] == 4
    assert source.revision is None
    assert not source.model.training


def test_old_and_new_parameter_names(folder: Path):
    dense = make_dense()
    in_file = load_file(folder / "model.safetensors")
    assert "vit.encoder.layer.0.attention.attention.query.weight" in in_file  # as transformers 4 has them in memory
    old = SimpleNamespace(state_dict=lambda: in_file, config=dense.config, base_model_prefix="vit")
    assert_close(from_transformers(old)(pixels(dense.config)).logits, dense(pixels(dense.config)).logits)


def test_unknown_parameter_names_are_refused(folder: Path):
    in_file = load_file(folder / "model.safetensors")
    state = {name.replace(".query.", ".ask."): tensor for name, tensor in in_file.items()}
    newer = SimpleNamespace(state_dict=lambda: state, config=make_dense().config, base_model_prefix="vit")
    with pytest.raises(UserError, match="Block 0 has no weight 'query'"):
        from_transformers(newer)


def test_half_precision_and_sharded_sources(tmp_path: Path):
    dense = make_dense().half()
    dense.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "preprocessor_config.json").write_bytes(PREPROCESSOR)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    source = load_dense(str(tmp_path))
    assert source.model.dtype == torch.float32
    assert_close(source.model(pixels(dense.config)).logits, dense.float()(pixels(dense.config)).logits)


def test_hash_follows_the_weights(folder: Path):
    before = load_dense(str(folder)).weights_sha256
    state = load_file(folder / "model.safetensors")
    state["classifier.bias"] += 1
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_dense(str(folder)).weights_sha256 != before


# ----------------------------------------------------------------------------------------------------------- refusals


def _pickle_only(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _weights(change):
    def break_it(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return break_it


def _missing_shard(folder: Path) -> None:
    make_dense().save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    sorted(folder.glob("*.safetensors"))[0].unlink()


REFUSALS = {
    "compressed": (lambda f: edit_config(f, model_type="lowrank_vit"), "already compressed"),
    "quantised": (lambda f: edit_config(f, quantization_config={"quant_method": "hqq"}), "is quantised"),
    "no classifier": (lambda f: edit_config(f, architectures=["ViTModel"]), "holds ViTModel; supported are ViTFor"),
    "no architecture": (lambda f: edit_config(f, architectures=None), "supported are"),
    "pickle only": (_pickle_only, "no .safetensors weights.*--allow-pickle"),
    "truncated": (_truncated, "could not be read"),
    "NaN": (_weights(lambda s: s["classifier.bias"].fill_(float("nan"))), "NaN or infinite.*classifier.bias"),
    "missing weights": (_weights(lambda s: s.pop("classifier.weight")), "lacks weights.*classifier.weight"),
    "wrong shape": (_weights(lambda s: s.update({"classifier.bias": torch.zeros(7)})), "could not be read"),
    "missing shard": (_missing_shard, "could not be read"),
    "absurd size": (lambda f: edit_config(f, hidden_size=10**9), "config.json.*hidden_size must be a whole number"),
    "more than the file holds": (lambda f: edit_config(f, hidden_size=2**14), "files hold 21,989 values"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "no processor": (lambda f: (f / "preprocessor_config.json").unlink(), "image processor"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case, folder: Path):
    break_it, message = REFUSALS[case]
    break_it(folder)
    with pytest.raises(UserError, match=message):
        load_dense(str(folder))


def test_pickle_on_request(folder: Path):
    _pickle_only(folder)
    dense = make_dense()
    model = load_dense(str(folder), allow_pickle=True).model
    assert_close(model(pixels(dense.config)).logits, dense(pixels(dense.config)).logits)


def test_names_that_lead_nowhere(folder: Path):
    with pytest.raises(UserError, match="is a folder, so --revision main has no meaning"):
        load_dense(str(folder), revision="main")
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="is no folder here; and as a repository"):
        load_dense(str(folder))
    with pytest.raises(UserError, match=r"is no folder here; .* switched off by the variable HF_HUB_OFFLINE"):
        load_dense("nobody/nothing-of-this-name")


def test_a_hub_that_fails_is_no_bad_input(monkeypatch):
    def failing(*_: object, **__: object) -> None:
        raise LocalEntryNotFoundError("no local copy") from ConnectionError("reset by peer")

    monkeypatch.setattr("hf_vit_lowrank.dense.snapshot_download", failing)
    with pytest.raises(RunError, match=r"is no folder here; .* could not be reached, or broke off \(reset by peer\)"):
        load_dense("owner/name")
