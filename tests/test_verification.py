"""`verify`: what was altered in a checkpoint, and which check says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import random_model
from safetensors.torch import load_file, save_file
from test_checkpoint import PREPROCESSOR, RECORD
from typer.testing import CliRunner

from hf_vit_lowrank.checkpoint import load_checkpoint, rewrite_card, save_checkpoint, unedited_card
from hf_vit_lowrank.cli import app
from hf_vit_lowrank.disk import sha256
from hf_vit_lowrank.errors import RunError, UserError
from hf_vit_lowrank.pixels import load_image_processor
from hf_vit_lowrank.verification import verify_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 20, "image_size": 16}
    model = random_model(0.3, **sizes, mlp_widths=[9, 20])
    (tmp_path / "preprocessor_config.json").write_bytes(PREPROCESSOR)
    record = {**RECORD, "parameters": sum(parameter.numel() for parameter in model.parameters())}
    processor = load_image_processor(str(tmp_path))
    save_checkpoint(model, processor, tmp_path / "out", record=record, card="A card.", preprocessor_config=PREPROCESSOR)
    return tmp_path / "out"


def failed(folder: Path) -> set[str]:
    return {check.name for check in verify_checkpoint(str(folder)).checks if not check.passed}


def edit_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def forge(folder: Path) -> None:
    """Put the hashes of the files as they are into the record, as somebody who alters a checkpoint would."""
    record = json.loads((folder / "compression.json").read_text())
    record["files"] = {name: sha256(folder / name) for name in record["files"]}
    (folder / "compression.json").write_text(json.dumps(record))


def test_intact(folder: Path):
    verification = verify_checkpoint(str(folder))
    assert verification.passed
    assert [check.name for check in verification.checks] == ["files", "code", "shapes", "parameters", "logits"]


def test_edited_card_is_said_and_passes(folder: Path):
    (folder / "README.md").write_text("My own words.")
    checks = verify_checkpoint(str(folder)).checks
    assert checks[0].passed
    assert "README.md was edited" in checks[0].detail


def test_a_bit_of_the_weights(folder: Path):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert "files" in failed(folder)


def test_weights_with_a_forged_hash(folder: Path):
    edit_weights(folder, lambda weights: weights["vit.blocks.0.mlp.up.weight"][0].add_(0.01))
    forge(folder)
    assert failed(folder) == {"logits"}


def test_last_bits_of_weights_are_no_difference_of_logits(folder: Path):
    edit_weights(folder, lambda weights: [weight.mul_(1 + 1e-7) for weight in weights.values()])
    forge(folder)
    assert not failed(folder)


def test_another_shape_with_a_forged_hash(folder: Path):
    def grow(weights) -> None:
        weights["vit.blocks.0.mlp.up.weight"] = torch.zeros(10, 16)

    edit_weights(folder, grow)
    forge(folder)
    assert failed(folder) == {"shapes", "parameters", "logits"}
    detail = verify_checkpoint(str(folder)).checks[2].detail
    assert "vit.blocks.0.mlp.up.weight: [10, 16] in model.safetensors, [9, 16] by config.json" in detail


@pytest.mark.parametrize(
    ("old", "new", "checks"),
    [
        ('"gelu"', '"relu"', {"logits"}),
        ('"num_hidden_layers": 2', '"num_hidden_layers": 1', {"shapes", "logits"}),
        ('"hidden_size": 16', '"hidden_size": 1000000', {"shapes", "logits"}),  # and nothing of that size is made
        ('"hidden_size": 16', '"hidden_size": "x"', {"shapes", "logits"}),
        ("{", "", {"shapes", "logits"}),
    ],
)
def test_config_with_a_forged_hash(old, new, checks, folder: Path):
    config = folder / "config.json"
    assert old in config.read_text()
    config.write_text(config.read_text().replace(old, new, 1))
    assert failed(folder) == checks | {"files"}
    forge(folder)
    assert failed(folder) == checks


def test_code_that_is_not_of_this_release(folder: Path):
    with (folder / "modeling_lowrank_vit.py").open("a") as file:
        file.write("# changed\n")
    forge(folder)
    assert failed(folder) == {"code"}
    assert (
        "modeling_lowrank_vit.py differ from those of hf-vit-lowrank" in verify_checkpoint(str(folder)).checks[1].detail
    )


def test_code_of_the_folder_is_never_run(folder: Path, tmp_path: Path):
    for name in ("modeling_lowrank_vit.py", "configuration_lowrank_vit.py"):
        (folder / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    forge(folder)
    assert failed(folder) == {"code"}
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json", "modeling_lowrank_vit.py"])
def test_missing_files_are_differences(missing, folder: Path):
    (folder / missing).unlink()
    assert "files" in failed(folder)


def test_record_without_probe_or_count(folder: Path):
    record = json.loads((folder / "compression.json").read_text())
    del record["probe"], record["parameters"]
    (folder / "compression.json").write_text(json.dumps(record))
    assert failed(folder) == {"parameters", "logits"}


# -------------------------------------------------------------------------------------------------------- command line


def call(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "160", "NO_COLOR": "1"})
    return done.exit_code, done.stdout, done.stderr


def test_exit_codes_table_and_json(folder: Path, tmp_path: Path):
    file = tmp_path / "verify.json"
    code, out, _ = call("verify", folder, "--json", file)
    assert code == 0
    assert "DIFFERS" not in out
    assert json.loads(file.read_text())["passed"] is True
    (folder / "config.json").write_text("{}")
    code, out, _ = call("verify", folder, "--json", file)
    assert code == 1
    assert "DIFFERS" in out
    assert json.loads(file.read_text())["passed"] is False
    code, _, err = call("verify", tmp_path)
    assert code == 2
    assert "no checkpoint folder" in err


def test_a_hub_that_cannot_be_asked_is_no_difference(monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise RunError("The hub could not be reached.")

    monkeypatch.setattr("hf_vit_lowrank.dense.snapshot_download", broken)
    code, _, err = call("verify", "org/nothing")
    assert code == 3
    assert "'org/nothing' is no folder here; and as a repository: The hub could not be reached." in err


# ---------------------------------------------------------------------------------------------- a card with new figures


def test_card_is_rewritten_and_all_stays_intact(folder: Path):
    record = unedited_card(folder)
    rewrite_card(folder, {**record, "evaluation": {"top1": 1.0}}, "New.")
    assert verify_checkpoint(str(folder)).passed
    assert (folder / "README.md").read_text() == "New."
    assert load_checkpoint(folder)[2]["evaluation"] == {"top1": 1.0}
    assert {path.name for path in folder.iterdir()} == set(record["files"]) | {"compression.json"}
    unedited_card(folder)


def test_card_that_was_edited_is_not_overwritten(folder: Path):
    (folder / "README.md").write_text("My own words.")
    with pytest.raises(UserError, match=r"README\.md .* edited and would be lost"):
        unedited_card(folder)
