"""Checkpoint folders: whole or not there, the same bytes again, nobody's files lost; and the card on top."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification

from hf_vit_lowrank import checkpoint
from hf_vit_lowrank.checkpoint import check_target, load_checkpoint, save_checkpoint
from hf_vit_lowrank.dense import load_dense
from hf_vit_lowrank.errors import RunError, UserError
from hf_vit_lowrank.model_card import model_card
from hf_vit_lowrank.pixels import load_image_processor
from hf_vit_lowrank.recipe import CompressionRecipe
from hf_vit_lowrank.remote.configuration_lowrank_vit import LowRankViTConfig
from hf_vit_lowrank.remote.modeling_lowrank_vit import LowRankViTForImageClassification

PREPROCESSOR = (
    b'{ "image_processor_type":"ViTImageProcessor","size":{"height":16, "width":16},"image_mean":[0.1,0.2,0.3]}\n'
)
RECIPE = CompressionRecipe(reduction=0.4, samples=100)
RECORD: dict[str, Any] = {
    "source": {
        "location": "facebook/deit-x",
        "revision": "abc",
        "weights_sha256": "0",
        "parameters": 10_000,
        "card": {},
    },
    "recipe": RECIPE.to_dict(),
    "calibration": {
        "location": "some/images",
        "hub": True,
        "config": None,
        "split": "train",
        "samples": 100,
        "seed": 0,
    },
    "num_channels": 3,
    "remote_code": True,
    "plan": {
        "hidden_size": 16,
        "dense_hidden_size": 16,
        "query_key_ranks": [[3, 7]],
        "value_output_ranks": [[5, 8]],
        "mlp_widths": [9],
    },
    "parameters": 6_000,
    "flops": 7_000_000_000,
    "dense_flops": 10_000_000_000,
    "predicted_loss": 0.25,
    "versions": {"torch": "2.13.0", "transformers": "5.24.0"},
}
EVALUATION = {
    "images": 1300,
    "top1": 74.0,
    "top5": 91.5,
    "agreement": 83.25,
    "against": {"top1": 81.6, "top5": None},
    "data": {"location": "validation.parquet", "split": "train"},
    "skipped": 0,
}
FILES = {
    "README.md",
    "compression.json",
    "config.json",
    "configuration_lowrank_vit.py",
    "model.safetensors",
    "modeling_lowrank_vit.py",
    "preprocessor_config.json",
}


@pytest.fixture
def model() -> LowRankViTForImageClassification:
    torch.manual_seed(0)
    plan = {"query_key_ranks": [[3, 7]], "value_output_ranks": [[5, 8]], "mlp_widths": [9]}
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
    return LowRankViTForImageClassification(LowRankViTConfig(**sizes, image_size=16, patch_size=8, **plan)).eval()


@pytest.fixture
def image_processor(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("processor")
    (folder / "preprocessor_config.json").write_bytes(PREPROCESSOR)
    return load_image_processor(str(folder))


@pytest.fixture
def save(model, image_processor):
    def save(folder: Path, **options) -> Path:
        arguments = {"record": RECORD, "card": "A card.", "preprocessor_config": PREPROCESSOR}
        save_checkpoint(model, image_processor, folder, **{**arguments, **options})
        return folder

    return save


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --------------------------------------------------------------------------------------------------- what is written


def test_round_trip(save, model, tmp_path: Path):
    folder = save(tmp_path / "deep" / "out")
    assert {path.name for path in folder.iterdir()} == FILES
    again, image_processor, record = load_checkpoint(folder)
    pixels = torch.randn(2, 3, 16, 16)
    assert not again.training
    torch.testing.assert_close(again(pixels).logits, model(pixels).logits)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    assert record == RECORD
    assert image_processor.image_mean == pytest.approx((0.1, 0.2, 0.3))
    assert (folder / "README.md").read_text() == "A card."
    assert list((tmp_path / "deep").iterdir()) == [folder]  # nothing is left beside it


def test_hashes_code_and_auto_map(save, tmp_path: Path):
    files = content(save(tmp_path / "out"))
    hashes = json.loads(files["compression.json"])["files"]
    assert hashes == {n: hashlib.sha256(b).hexdigest() for n, b in files.items() if n != "compression.json"}
    for name in ("configuration_lowrank_vit.py", "modeling_lowrank_vit.py"):
        assert files[name] == (Path(checkpoint.__file__).parent / "remote" / name).read_bytes()
    config = json.loads(files["config.json"])
    assert config["auto_map"] == {
        "AutoConfig": "configuration_lowrank_vit.LowRankViTConfig",
        "AutoModel": "modeling_lowrank_vit.LowRankViTModel",
        "AutoModelForImageClassification": "modeling_lowrank_vit.LowRankViTForImageClassification",
    }
    assert config["architectures"] == ["LowRankViTForImageClassification"]


def test_same_bytes_again(save, tmp_path: Path):
    first = content(save(tmp_path / "first"))
    backwards = dict(reversed(RECORD.items()))
    assert content(save(tmp_path / "second", record=backwards)) == first
    model, image_processor, record = load_checkpoint(tmp_path / "first")
    preprocessor = first["preprocessor_config.json"]
    options = {"record": record, "card": "A card.", "preprocessor_config": preprocessor}
    save_checkpoint(model, image_processor, tmp_path / "third", **options)
    assert content(tmp_path / "third") == first


def test_state_of_the_model_is_kept(save, model, tmp_path: Path):
    before = model.config.to_dict()
    save(tmp_path / "out")
    assert model.config.to_dict() == before
    assert not model.training
    model.train().to(torch.bfloat16)
    save(tmp_path / "half")
    assert model.training
    assert load_checkpoint(tmp_path / "half")[0].dtype == torch.bfloat16


def test_numbers_that_json_has_not_are_refused_first(save, tmp_path: Path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        save(tmp_path / "out", record={"predicted_loss": float("nan")})
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------- image processor


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ({"image_processor_type": "ViTImageProcessor"}, True),
        ({"image_processor_type": "ViTImageProcessorFast"}, True),
        ({"feature_extractor_type": "DeiTFeatureExtractor"}, True),
        ({}, False),  # the class follows from model_type "vit", which ours is not
        ({"image_processor_type": "ViTImageProcessor", "auto_map": {"AutoImageProcessor": "code.Mine"}}, False),
    ],
    ids=str,
)
def test_preprocessor_of_the_source(values, kept, save, tmp_path: Path):
    dense = tmp_path / "dense"
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(dense)
    text = json.dumps({**values, "size": {"height": 16, "width": 16}, "image_std": [0.3, 0.2, 0.1]})
    (dense / "preprocessor_config.json").write_text(text)
    before = content(dense)
    source = load_dense(str(dense))
    folder = tmp_path / "out"
    options = {"record": RECORD, "card": "", "preprocessor_config": source.preprocessor_config}
    save_checkpoint(source.model, source.image_processor, folder, **options)
    assert ((folder / "preprocessor_config.json").read_bytes() == text.encode()) is kept
    again = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    assert again.to_dict() == {k: v for k, v in source.image_processor.to_dict().items() if k != "auto_map"}
    assert content(dense) == before


def test_image_processor_made_in_memory(save, image_processor, tmp_path: Path):
    save(tmp_path / "out", preprocessor_config=None)
    assert load_checkpoint(tmp_path / "out")[1].to_dict() == image_processor.to_dict()


# ----------------------------------------------------------------------------------------------- folders already there


def test_overwrite(save, model, tmp_path: Path):
    folder = save(tmp_path / "out")
    with pytest.raises(UserError, match=r"not empty.*--overwrite"):
        save(folder, card="New.")
    assert (folder / "README.md").read_text() == "A card."
    save(folder, card="New.", overwrite=True)
    assert (folder / "README.md").read_text() == "New."
    assert list(tmp_path.iterdir()) == [folder]


def test_empty_folder_and_link_are_filled(save, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    save(tmp_path / "link")
    assert {path.name for path in (tmp_path / "empty").iterdir()} == FILES
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("foreign", ["thesis.txt", "onnx/model.onnx", "link"])
def test_files_of_others_are_never_deleted(foreign, save, tmp_path: Path):
    folder = save(tmp_path / "out")
    (folder / foreign).parent.mkdir(exist_ok=True)
    (folder / foreign).symlink_to(tmp_path) if foreign == "link" else (folder / foreign).write_text("mine")
    before = content(folder)
    with pytest.raises(UserError, match=f"holds {foreign}"):
        save(folder, overwrite=True)
    assert content(folder) == before


def test_folders_that_are_no_checkpoints_are_left_alone(save, tmp_path: Path):
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds config\.json"):
        save(tmp_path / "dense", overwrite=True)
    with pytest.raises(UserError, match="is a file"):
        save(tmp_path / "dense" / "config.json", overwrite=True)


# ------------------------------------------------------------------------------------------------------------- faults


def test_a_folder_that_cannot_be_replaced_is_refused_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("volume", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("os.path.ismount", lambda path: str(path) == str(tmp_path / "volume"))
    for folder in (tmp_path / "volume", ".", tmp_path):
        with pytest.raises(UserError, match="name a folder in it"):
            check_target(folder, 0)
    check_target("out", 0)
    check_target(tmp_path / "volume" / "out", 0)


def test_full_disk_is_seen_before(save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 5_000_000))
    with pytest.raises(UserError, match="has 5 MB free, but the checkpoint needs 1004 MB"):
        check_target(tmp_path / "not" / "yet", 10**9)
    save(tmp_path / "small")


def _no_space(*_, **__):
    raise OSError(28, "No space left on device")


def _killed(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("where", "how", "error"),
    [
        ("save_file", _no_space, RunError),
        ("_verify", _killed, KeyboardInterrupt),
        ("_swap", _no_space, RunError),
    ],
)
def test_a_failed_save_leaves_the_old_checkpoint(where, how, error, save, tmp_path, monkeypatch):
    folder = save(tmp_path / "out")
    before = content(folder)
    monkeypatch.setattr(checkpoint, where, how)
    with pytest.raises(error):
        save(folder, card="New.", overwrite=True)
    with pytest.raises(error):
        save(tmp_path / "other")
    assert content(folder) == before
    assert list(tmp_path.iterdir()) == [folder]


def test_a_failed_second_rename_takes_back_the_first(save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = save(tmp_path / "out")
    before = content(folder)
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, to: _no_space() if self.name == "new" else rename(self, to))
    with pytest.raises(RunError, match="No space left"):
        save(folder, card="New.", overwrite=True)
    assert content(folder) == before
    assert list(tmp_path.iterdir()) == [folder]


def test_a_kill_between_the_two_renames_is_made_good(save, tmp_path: Path):
    folder = save(tmp_path / "out")
    before = content(folder)
    (tmp_path / ".out.saving" / "new").mkdir(parents=True)
    folder.rename(tmp_path / ".out.saving" / "old")
    with pytest.raises(UserError, match="not empty"):
        check_target(folder, 0)
    assert content(folder) == before
    assert list(tmp_path.iterdir()) == [folder]


def test_what_is_written_wrongly_is_noticed(save, model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def off_by_a_bit(state, path, metadata):
        save_file({**state, "classifier.bias": state["classifier.bias"] + 1e-6}, path, metadata=metadata)

    monkeypatch.setattr(checkpoint, "save_file", off_by_a_bit)
    with pytest.raises(RunError, match="other weights than the model in memory"):
        save(tmp_path / "out")
    monkeypatch.undo()
    model.vit.blocks[0].mlp.activation = torch.nn.ReLU()
    with pytest.raises(RunError, match="other logits than the model in memory"):
        save(tmp_path / "out")
    model.vit.extra = torch.nn.Linear(2, 2)
    with pytest.raises(RunError, match=r"other weights than the model in memory: \['vit.extra.weight"):
        save(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_wrong_image_processor_is_noticed(save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    other = PREPROCESSOR.replace(b"0.1", b"0.9")
    write = lambda folder, *_: (folder / "preprocessor_config.json").write_bytes(other)  # noqa: E731
    monkeypatch.setattr(checkpoint, "_write_preprocessor", write)
    with pytest.raises(RunError, match="image processor differs"):
        save(tmp_path / "out")


def _edit(name: str, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def _edit_record(change):
    def edit(folder: Path) -> None:
        record = json.loads((folder / "compression.json").read_text())
        change(record)
        (folder / "compression.json").write_text(json.dumps(record))

    return edit


ALTERATIONS = {
    "flipped bit": (_edit("model.safetensors", lambda b: b[:-1] + bytes([b[-1] ^ 1])), "safetensors of .* sha256"),
    "truncated": (_edit("model.safetensors", lambda b: b[:-9]), "safetensors of .* sha256"),
    "config": (_edit("config.json", lambda b: b.replace(b'"gelu"', b'"relu"')), "config.json of .* sha256"),
    "missing": (lambda folder: (folder / "modeling_lowrank_vit.py").unlink(), "lacks modeling_lowrank_vit.py"),
    "no record": (lambda folder: (folder / "compression.json").unlink(), "no checkpoint folder"),
    "broken record": (_edit("compression.json", lambda b: b[:-20]), "no checkpoint folder"),
    "path trick": (_edit_record(lambda r: r["files"].update({"../../etc/passwd": "0"})), "no checkpoint folder"),
}


@pytest.mark.parametrize("case", ALTERATIONS)
def test_altered_checkpoints_are_refused(case, save, tmp_path: Path):
    alter, message = ALTERATIONS[case]
    folder = save(tmp_path / "out")
    alter(folder)
    with pytest.raises(UserError, match=message):
        load_checkpoint(folder)


def test_an_edited_card_is_no_alteration(save, tmp_path: Path):
    folder = save(tmp_path / "out")
    (folder / "README.md").write_text("My own words.")
    load_checkpoint(folder)


def test_newer_format_is_a_user_error(save, tmp_path: Path):
    folder = save(tmp_path / "out")
    _edit("config.json", lambda b: b.replace(b'"format_version": 3', b'"format_version": 4'))(folder)
    digest = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    _edit_record(lambda r: r["files"].update({"config.json": digest}))(folder)
    with pytest.raises(UserError, match="format_version 4"):
        load_checkpoint(folder)


# ---------------------------------------------------------------------------------------------------------- the card


def code_blocks(card: str) -> list[str]:
    return [block.split("\n```")[0] for block in card.split("```python\n")[1:]]


def test_card_metadata():
    data = ModelCard(model_card(RECORD)).data
    assert (data.base_model, data.base_model_relation) == ("facebook/deit-x", "quantized")
    assert (data.library_name, data.pipeline_tag) == ("transformers", "image-classification")
    local = {**RECORD, "source": {**RECORD["source"], "location": "/home/me/vit", "revision": None}}
    assert ModelCard(model_card(local)).data.base_model is None  # the hub takes ids only


def test_card_numbers():
    card = model_card(RECORD)
    assert "| parameters | 0.01 M | 0.01 M | -40.0 % |" in card
    assert "| FLOPs of one image, last block for the tokens read | 10.00 G | 7.00 G | -30.0 % |" in card
    assert "top-1" not in card
    assert "- Accuracy: this checkpoint has not been evaluated" in card
    card = model_card({**RECORD, "evaluation": EVALUATION})
    assert "| top-1 | 81.60 % | 74.00 % | -7.60 points |" in card
    assert "| top-5 | not measured | 91.50 % |  |" in card
    assert "1300 images of `validation.parquet (split train)`" in card
    assert "83.25 %" in card
    assert "- Accuracy" not in card
    unlabelled = {**EVALUATION, "top1": None, "top5": None}
    assert "- Accuracy" in model_card({**RECORD, "evaluation": unlabelled})


def test_recipe_on_the_card_makes_the_same_call():
    calls: dict[str, Any] = {}

    class Result:
        save_pretrained = staticmethod(lambda folder: None)

    def compress(source, *, calibration, recipe, revision=None):
        calls.update(source=source, calibration=calibration, recipe=recipe, revision=revision)
        return Result

    def open_images(location, **options):
        return location, options

    code = "\n".join(line for line in code_blocks(model_card(RECORD))[1].splitlines() if "import" not in line)
    exec(code, {"compress": compress, "open_images": open_images, "CompressionRecipe": CompressionRecipe})
    images = ("some/images", {"split": "train", "samples": 100, "seed": 0})
    assert calls == {"source": "facebook/deit-x", "calibration": images, "recipe": RECIPE, "revision": "abc"}


def test_hostile_names_stay_text():
    name = "a`b``\n```\n<script>{{ 1 }} | '); import os"
    record = {
        **RECORD,
        "source": {**RECORD["source"], "location": name, "revision": name},
        "calibration": {"location": name, "split": name},
        "evaluation": {**EVALUATION, "data": {"location": name}},
        "versions": {"<b>": "<i>"},
    }
    card = model_card(record)
    assert ModelCard(card).data.base_model == name
    body = card.split("\n---\n", 1)[1]
    assert [line for line in body.splitlines() if line.startswith("```")] == ["```python", "```"] * 2
    for block in code_blocks(body):
        compile(block, "card", "exec")
    outside = "".join(part.split("\n```")[-1] for part in body.split("```python\n"))
    assert "<b>" not in outside
    assert "```` a`b`` ``` <script>" in outside  # a code span with a longer fence than its text


@pytest.mark.slow
def test_snippet_runs_as_it_stands(save, model, tmp_path: Path):
    card = model_card(RECORD)
    folder = save(tmp_path / "out", card=card)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", code_blocks(card)[0]]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() in model.config.id2label.values()
