"""Other forms of a checkpoint: the same logits and image processor, nothing lost, a reason where it cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForImageClassification
from typer.testing import CliRunner

from hf_vit_lowrank.calibration import calibrate
from hf_vit_lowrank.candidates.block import LAST_WIDTH_WEIGHT
from hf_vit_lowrank.checkpoint import load_checkpoint, save_checkpoint, unedited_card
from hf_vit_lowrank.cli import app
from hf_vit_lowrank.compress import build, compress
from hf_vit_lowrank.dense import load_dense
from hf_vit_lowrank.dense_layout import from_transformers, to_transformers
from hf_vit_lowrank.errors import UserError
from hf_vit_lowrank.evaluation import count_flops, count_parameters
from hf_vit_lowrank.export import densified, export_dense, export_native, export_onnx
from hf_vit_lowrank.pixels import load_image_processor
from hf_vit_lowrank.recipe import CompressionRecipe
from hf_vit_lowrank.remote.configuration_lowrank_vit import FACTORABLE, FACTORABLE_EMBEDDINGS, LowRankViTConfig
from hf_vit_lowrank.remote.modeling_lowrank_vit import LowRankViTForImageClassification
from hf_vit_lowrank.report import read_checkpoint

PREPROCESSOR = b'{ "image_processor_type":"ViTImageProcessor",\n "size":{"height":16, "width":16}, "resample": 3}\n'
SIZES = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20}
IMAGES = {"image_size": 16, "patch_size": 8, "num_labels": 4}
MIXED = {
    "query_key_ranks": [[3, 1, 4], [4, 4, 4]],
    "value_output_ranks": [[2, 3, 4], [1, 0, 4]],
    "mlp_widths": [6, 11],
    "factor_ranks": [{"query_key_value": 5, "up": 2}, {}],
    "up_ranks": [0, 7],
    "bypass_ranks": [3, 0],
}
UNIFORM = {"query_key_ranks": [[3] * 3] * 2, "value_output_ranks": [[3] * 3] * 2, "mlp_widths": [7, 7]}


def make_model(**fields) -> LowRankViTForImageClassification:
    torch.manual_seed(0)
    model = LowRankViTForImageClassification(LowRankViTConfig(**{**SIZES, **IMAGES, **fields})).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    return model


def make_pixels(batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def assert_same_logits(one: torch.nn.Module, other: torch.nn.Module) -> None:
    with torch.no_grad():
        torch.testing.assert_close(one(make_pixels()).logits, other(make_pixels()).logits, atol=2e-5, rtol=1e-4)


@pytest.fixture
def make_folder(tmp_path):
    def make_folder(**fields) -> Path:
        processor = tmp_path / "processor"
        processor.mkdir(exist_ok=True)
        (processor / "preprocessor_config.json").write_bytes(PREPROCESSOR)
        folder, image_processor = tmp_path / "checkpoint", load_image_processor(str(processor))
        save_checkpoint(
            make_model(**fields), image_processor, folder, record={}, card="", preprocessor_config=PREPROCESSOR
        )
        return folder

    return make_folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ----------------------------------------------------------------------------------------------------------- the maths


@st.composite
def plans(draw):
    def per_layer(one):
        return st.lists(one, min_size=2, max_size=2)

    ranks = per_layer(st.lists(st.integers(0, 6), min_size=3, max_size=3).filter(any))
    widths = draw(per_layer(st.integers(1, 20)))
    token = draw(st.booleans())
    factors = draw(per_layer(st.dictionaries(st.sampled_from(FACTORABLE), st.integers(1, 12))))
    return {
        "query_key_ranks": draw(ranks),
        "value_output_ranks": draw(ranks),
        "mlp_widths": widths,
        "factor_ranks": factors,
        "up_ranks": [
            0 if "up" in own else draw(st.integers(0, min(width - 1, 12)))
            for own, width in zip(factors, widths, strict=True)
        ],
        "bypass_ranks": [draw(st.integers(0, (20 - width) // 2)) for width in widths],
        "embedding_ranks": draw(st.dictionaries(st.sampled_from(FACTORABLE_EMBEDDINGS), st.integers(1, 12))),
        "hidden_act": draw(st.sampled_from(["gelu", "gelu_new", "relu", "silu"])),
        "qkv_bias": draw(st.booleans()),
        "use_distillation_token": token,
        "use_distillation_head": token and draw(st.booleans()),
    }


@settings(max_examples=25, deadline=None)
@given(plans())
def test_any_plan_multiplied_out_has_the_same_logits(fields):
    model = make_model(**fields)
    dense = to_transformers(densified(model))
    assert type(dense).__module__.startswith("transformers.models.")
    assert dense.config.intermediate_size == 20
    assert_same_logits(model, dense)


@pytest.mark.parametrize(
    ("fields", "architecture"),
    [
        ({}, "ViTForImageClassification"),
        ({"qkv_bias": False}, "ViTForImageClassification"),
        ({"use_distillation_token": True}, "DeiTForImageClassification"),
        (
            {"use_distillation_token": True, "use_distillation_head": True},
            "DeiTForImageClassificationWithTeacher",
        ),
    ],
)
def test_a_uniform_plan_is_a_class_of_transformers_and_comes_back(fields, architecture):
    model = make_model(**UNIFORM, **fields)
    native = to_transformers(model)
    assert type(native) is getattr(transformers, architecture)
    assert (native.config.head_dim, native.config.intermediate_size) == (3, 7)
    assert_same_logits(model, native)
    again = from_transformers(native)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"mlp_widths": [7, 8]}, "widths, from 7 to 8"),
        ({"value_output_ranks": [[3, 3, 3], [3, 2, 3]]}, "ranks, from 2 to 3"),
        ({"value_output_ranks": [[4, 4, 4], [4, 4, 4]]}, "ranks, from 3 to 4"),
        ({"factor_ranks": [{}, {"down": 2}]}, "'down' of block 1"),
        ({"bypass_ranks": [0, 1]}, "block 1 has a low-rank bypass"),
        ({"embedding_ranks": {"projection": 2}}, "the projection of its embeddings is a product of two"),
    ],
)
def test_why_a_plan_is_not_native(fields, reason, make_folder, tmp_path):
    with pytest.raises(UserError, match=reason):
        export_native(make_folder(**{**UNIFORM, **fields}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"mlp_widths": [20, 16], "bypass_ranks": [0, 3]}, "block 1 needs 6 hidden units, but beside 16 only 4 of 20"),
        ({"bypass_ranks": [2, 0], "hidden_act": "tanh"}, "activation 'tanh'"),
    ],
)
def test_why_a_bypass_cannot_be_multiplied_out(fields, reason):
    with pytest.raises(UserError, match=reason):
        densified(make_model(**fields))


# ------------------------------------------------------------------------------------------------------------ folders


@pytest.mark.parametrize(("export", "fields"), [(export_dense, MIXED), (export_native, UNIFORM)])
def test_exported_folder_loads_without_remote_code(export, fields, make_folder, tmp_path):
    folder = make_folder(**fields)
    before = content(folder)
    export(folder, tmp_path / "out")
    assert content(folder) == before
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "ViTForImageClassification"
    assert_same_logits(model, load_checkpoint(folder)[0])
    files = content(tmp_path / "out")
    assert set(files) == {
        *("config.json", "model.safetensors", "preprocessor_config.json", "README.md", "compression.json")
    }
    assert files["preprocessor_config.json"] == PREPROCESSOR
    assert b"auto_map" not in files["config.json"]
    load_checkpoint(tmp_path / "out")  # all hashes are right
    export(folder, tmp_path / "out", overwrite=True)
    assert content(tmp_path / "out") == files


def test_an_exported_folder_tells_its_own_sizes(make_folder, tmp_path):
    folder = make_folder(**UNIFORM)
    native, dense = export_native(folder, tmp_path / "native"), export_dense(folder, tmp_path / "dense")
    for model, output in ((native, tmp_path / "native"), (dense, tmp_path / "dense")):
        record = json.loads((output / "compression.json").read_text())
        assert (record["parameters"], record["flops"]) == (count_parameters(model), count_flops(model))
        assert record["dense_flops"] == count_flops(dense)
    assert count_flops(native) < count_flops(dense)
    for read in (read_checkpoint, unedited_card):
        read(tmp_path / "native")
        with pytest.raises(UserError, match="dense form of a checkpoint"):
            read(tmp_path / "dense")


def test_quantised_and_broken_checkpoints_are_refused(make_folder, tmp_path):
    config = make_folder(**MIXED) / "config.json"
    quantised = {**json.loads(config.read_text()), "quantization_config": {"quant_method": "torchao"}}
    for text, reason in ((json.dumps(quantised), "quantised"), ("{", "could not be read")):
        config.write_text(text)
        for export in (export_dense, export_native):
            with pytest.raises(UserError, match=reason):
                export(config.parent, tmp_path / "out")


def test_what_is_never_overwritten(make_folder, tmp_path):
    folder = make_folder(**UNIFORM)
    for output in (folder, tmp_path, folder / "dense"):
        with pytest.raises(UserError, match="choose another"):
            export_dense(folder, output, overwrite=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError):
            export_dense(folder, tmp_path / "full", overwrite=overwrite)
    export_native(folder, tmp_path / "native")
    with pytest.raises(UserError, match="already holds transformers' own"):
        export_dense(tmp_path / "native", tmp_path / "dense")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"


def test_command_line(make_folder, tmp_path):
    folder = make_folder(**MIXED)

    def call(*arguments):
        done = CliRunner().invoke(app, ["export", *map(str, arguments)], env={"COLUMNS": "160", "NO_COLOR": "1"})
        return done.exit_code, done.stdout + done.stderr

    (folder / "compression.json").unlink()  # as where a Trainer has saved it
    assert call(folder, "--dense", tmp_path / "out") == (0, f"Written to {tmp_path / 'out'}\n")
    code, said = call(folder, "--dense", tmp_path / "out")
    assert (code, "not empty" in said) == (2, True)
    for options in ([], ["--dense", tmp_path / "a", "--native", tmp_path / "b"]):
        code, said = call(folder, *options)
        assert (code, "exactly one of --onnx, --dense, --native" in said) == (2, True)
    code, said = call(tmp_path / "nothing", "--native", tmp_path / "c")
    assert (code, "no checkpoint folder" in said) == (2, True)


# --------------------------------------------------------------------------------------------------------------- ONNX


def test_onnx_has_the_same_logits_for_any_batch(make_folder, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    folder, file = make_folder(**MIXED), tmp_path / "model.onnx"
    before = content(folder)
    export_onnx(folder, file)
    assert content(folder) == before
    assert str(Path(torch.__file__).parent).encode() not in file.read_bytes()
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    model, _, _ = load_checkpoint(folder)
    for batch in (1, 5):
        (logits,) = session.run(["logits"], {"pixel_values": make_pixels(batch).numpy()})
        with torch.no_grad():
            expected = model(make_pixels(batch)).logits
        torch.testing.assert_close(torch.from_numpy(logits), expected, atol=1e-5, rtol=1e-4)
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata["preprocessor_config.json"].encode() == PREPROCESSOR
    assert json.loads(metadata["config.json"])["id2label"]
    with pytest.raises(UserError, match="exists"):
        export_onnx(folder, file)


def test_where_no_onnx_file_can_be(make_folder, tmp_path, monkeypatch):
    folder = make_folder(**UNIFORM)
    monkeypatch.setattr("hf_vit_lowrank.export.find_spec", lambda name: name != "onnxscript" or None)
    with pytest.raises(UserError, match=r"ONNX needs onnxscript.*hf-vit-lowrank\[ecosystem\]"):
        export_onnx(folder, tmp_path / "model.onnx")
    monkeypatch.setattr("hf_vit_lowrank.export.find_spec", lambda name: True)
    for file in (folder / "model.onnx", tmp_path / "nowhere" / "model.onnx", tmp_path):
        with pytest.raises(UserError, match="written"):
            export_onnx(folder, file)
    with pytest.raises(UserError, match=r"no config\.json"):
        export_onnx(tmp_path / "nothing", tmp_path / "model.onnx")


# --------------------------------------------------------------------------------------------------- compress --native


@pytest.fixture(scope="module")
def calibrated(digits_model, digits_data):
    recipe = CompressionRecipe(reduction=0.5, samples=256, native=True)
    return calibrate(str(digits_model), str(digits_data.calibration), recipe, hold_back=0.2, device="cpu")


@pytest.mark.parametrize("cost", ["parameters", "flops"])
@pytest.mark.parametrize("reduction", [0.0, 0.4, 0.8])
def test_native_plan_fits_the_budget_and_the_class_of_transformers(calibrated, reduction, cost):
    recipe = CompressionRecipe(reduction=reduction, cost=cost, native=True, compensation="none")
    result = build(calibrated, recipe)
    native = to_transformers(result.model)
    counted = {"parameters": count_parameters(native), "flops": count_flops(native)}
    whole = {"parameters": result.report["dense_parameters"], "flops": result.report["dense_flops"]}
    assert {name: result.report[name] for name in counted} == counted
    unit = {"parameters": 0.06, "flops": 0.06}[cost]  # one more hidden unit or head dimension everywhere
    assert 1 - reduction - unit < counted[cost] / whole[cost] <= 1 - reduction
    assert sum(result.model.config.bypass_ranks) == 0


def test_native_predicted_loss_is_the_sum_of_the_curves(calibrated):
    recipe = CompressionRecipe(reduction=0.6, native=True, compensation="none")
    result = build(calibrated, recipe)
    size, width = result.report["plan"]["query_key_ranks"][0][0], result.report["plan"]["mlp_widths"][0]
    loss = 0.0
    for block in calibrated.candidates:
        loss += 0.5 * 4.0 * float(block.query_key.even_errors[size])
        loss += float(block.value_output.elimination.errors[4 * size])
        loss += 0.5 * (1.0 if block.reads_all_tokens else LAST_WIDTH_WEIGHT) * float(block.width.errors[width])
        assert block.value_output.head_ranks(4 * size) == [size] * 4
    assert result.report["predicted_loss"] == pytest.approx(loss)


def test_compressed_natively_and_saved(digits_model, digits_data, tmp_path):
    recipe = CompressionRecipe(reduction=0.5, samples=128, native=True)
    result = compress(str(digits_model), str(digits_data.calibration), recipe, device="cpu")
    result.save_pretrained(tmp_path / "out")
    files = content(tmp_path / "out")
    assert not [name for name in files if name.endswith(".py")]
    assert "trust_remote_code" not in files["README.md"].decode()
    assert files["preprocessor_config.json"] == (digits_model / "preprocessor_config.json").read_bytes()
    model, _, record = load_checkpoint(tmp_path / "out")
    assert type(model).__name__ == "ViTForImageClassification"
    assert record["parameters"] == count_parameters(model) <= 0.5 * record["dense_parameters"]
    pixels = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(pixels).logits, result.model(pixels).logits, atol=1e-4, rtol=1e-4)
    assert load_dense(str(tmp_path / "out")).parameters == record["parameters"]  # a source like any other


def test_native_goes_with_our_method_only():
    with pytest.raises(UserError, match="native"):
        CompressionRecipe(reduction=0.5, preset="corp", native=True)
