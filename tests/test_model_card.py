"""The card: metadata that the hub takes, what the source's card says, and nothing of the machine it was made on."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from hub_server import card_errors
from huggingface_hub import ModelCard
from PIL import Image
from test_checkpoint import EVALUATION, RECORD

from hf_vit_lowrank.charts import plan_chart
from hf_vit_lowrank.cli import app
from hf_vit_lowrank.model_card import evaluation_record, model_card, pin, pinned_revision, read_card, short_name, unpin

SOURCE_CARD = """---
license: other
license_name: their-terms
license_link: LICENSE.md
language: [en, de]
tags: [vision, vit, 2024-01-01]
datasets: imagenet-1k
widget: [{src: cat.jpg}]
---
# Theirs
"""


def bash_blocks(card: str) -> list[str]:
    return [block.split("\n```")[0] for block in card.split("```bash\n")[1:]]


# ------------------------------------------------------------------------------------------------- the source's card


def test_licence_language_tags_and_data_of_the_source_are_kept(tmp_path: Path):
    (tmp_path / "README.md").write_text(SOURCE_CARD.replace(", 2024-01-01", ""))
    kept = read_card(tmp_path / "README.md")
    assert kept == {
        "license": "other", "license_name": "their-terms", "license_link": "LICENSE.md",
        "language": ["en", "de"], "tags": ["vision", "vit"], "datasets": "imagenet-1k",
    }  # fmt: skip
    card = model_card({**RECORD, "source": {**RECORD["source"], "card": kept}})
    data = ModelCard(card).data
    assert data.license_link == "https://huggingface.co/facebook/deit-x/blob/main/LICENSE.md"
    assert (data.license, data.license_name, data.language) == ("other", "their-terms", ["en", "de"])
    assert data.tags == ["vision", "vit", "low-rank", "compression", "hf-vit-lowrank"]
    assert data.datasets == ["imagenet-1k", "some/images"]
    assert not card_errors(card)


def test_broken_or_missing_card_of_the_source_is_no_fault(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    card = tmp_path / "README.md"
    assert read_card(card) == {}
    for content in (b"---\n: [\n---\n", b"---\n- a\n---\n", b"\xff\xfe---"):
        card.write_bytes(content)
        caplog.clear()
        assert read_card(card) == {}
        assert "licence and tags are not taken over" in caplog.text
    card.write_text(SOURCE_CARD)  # what YAML makes of a date is no tag, and no JSON either
    assert "tags" not in json.loads(json.dumps(read_card(card)))
    card.write_text("No metadata.")
    assert read_card(card) == {}


def test_paths_of_this_machine_are_not_told():
    private = {"location": "/home/me/secret/x.parquet", "split": "train"}
    record = {
        **RECORD,
        "source": {**RECORD["source"], "location": "/home/me/secret/vit", "revision": None},
        "calibration": private,
        "evaluation": {**EVALUATION, "data": private},
    }
    card = model_card(record)
    assert "/home" not in card
    assert "secret" not in card
    assert "This is a model in a local folder" in card
    data = ModelCard(card).data
    assert data.base_model is data.get("base_model_relation") is data.datasets is None
    assert {(result.dataset_type, result.dataset_name) for result in data.eval_results} == {("parquet", "x.parquet")}
    assert not card_errors(card)


# -------------------------------------------------------------------------------- what was measured


def test_results_as_the_hub_reads_them():
    data = {"location": "imagenet-1k", "hub": True, "config": "default", "split": "validation"}
    card = model_card({**RECORD, "evaluation": {**EVALUATION, "data": data, "skipped": 3}})
    results = ModelCard(card).data.eval_results
    assert [(result.metric_name, result.metric_value) for result in results] == [
        ("top-1 accuracy", 0.74), ("top-5 accuracy", 0.915),
    ]  # fmt: skip
    for result in results:
        assert result.task_type == "image-classification"
        assert (result.dataset_type, result.dataset_config, result.dataset_split) == (
            "imagenet-1k",
            "default",
            "validation",
        )
        assert result.metric_type == "accuracy"
        assert result.dataset_args == {"images": 1300}
    assert ModelCard(card).data.metrics == ["accuracy"]
    assert ModelCard(card).data.datasets == ["some/images"]  # that of the evaluation taught it nothing
    assert "3 more could not be read." in card
    assert not card_errors(card)
    assert ModelCard(model_card(RECORD)).data.eval_results is None


def test_a_card_takes_accuracies_from_a_report_and_leaves_speed():
    dense = {"top1": 81.0, "top5": 95.0, "images_per_second": 3.0, "model": "/home/me"}
    report = {**EVALUATION, "against": dense, "skipped": ["a.jpg"], "model": "/home/me", "images_per_second": 2.0}
    record = evaluation_record(report)
    assert "/home" not in json.dumps(record)
    assert "per_second" not in json.dumps(record)
    assert "| top-1 | 81.00 % | 74.00 % | -7.00 points |" in model_card({**RECORD, "evaluation": record})
    assert evaluation_record({**report, "against": None})["against"] is None


# ------------------------------------------------------------------------------------------------------- make it again


def test_training_that_was_undone_is_not_claimed():
    kept, undone = {"kept": True}, {"kept": False}
    trained = {**RECORD, "recipe": {**RECORD["recipe"], "compensation": "distill"}}
    card = model_card({**trained, "gradient": kept, "distillation": undone})
    assert "trained one by one" in card
    assert "The whole was then trained" not in card
    card = model_card({**trained, "gradient": undone, "distillation": undone})
    assert "Nothing was trained, since what training was tried left it no nearer" in card
    card = model_card({**RECORD, "recipe": {**RECORD["recipe"], "preset": "paper", "compensation": "none"}})
    assert "second tensors were fitted by gradient" in card
    assert "Nothing else was trained." in card


def test_a_model_of_grayscale_images_is_shown_one():
    assert 'Image.new("RGB"' in model_card(RECORD)
    assert 'Image.new("L"' in model_card({**RECORD, "num_channels": 1})


def test_command_line_has_what_is_not_default():
    (command,) = bash_blocks(model_card(RECORD))
    assert shlex.split(command) == [
        "hf-vit-lowrank", "compress", "facebook/deit-x", "--calibration", "some/images", "--split", "train",
        "--reduction", "0.4", "--samples", "100", "--revision", "abc", "--output", "compressed",
    ]  # fmt: skip
    recipe = {**RECORD["recipe"], "preset": "svd", "compensation": "distill", "labels": True, "distill_lr": 2e-4}
    words = shlex.split(bash_blocks(model_card({**RECORD, "recipe": recipe}))[0])
    assert " ".join(words[7:-4]) == (
        "--reduction 0.4 --preset svd --compensation distill --distill-lr 0.0002 --labels --samples 100"
    )
    calibration = {**RECORD["calibration"], "label_column": "fine"}
    for labels in (True, False):
        card = model_card({**RECORD, "recipe": {**recipe, "labels": labels}, "calibration": calibration})
        assert ("--label-column fine" in bash_blocks(card)[0]) == labels


def test_the_folder_one_is_in_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "vit" / "new").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "vit" / "new")
    assert [short_name(location) for location in (".", "..", "../", "a/b/", "/")] == ["new", "vit", "vit", "b", "/"]


def test_every_option_of_the_command_line_is_one_of_compress():
    import typer

    options = {name for each in typer.main.get_command(app).commands["compress"].params for name in each.opts}
    defaults = dict.fromkeys(RECORD["recipe"], True)  # none of them at its default
    calibration = {**RECORD["calibration"], "config": "c", "image_column": "i", "label_column": "l"}
    (command,) = bash_blocks(
        model_card({**RECORD, "recipe": {**defaults, "preset": "svd"}, "calibration": calibration})
    )
    assert {word for word in shlex.split(command) if word.startswith("--")} <= options


def test_command_line_of_hostile_names():
    record = {**RECORD, "calibration": {"location": "a b/$(rm -rf ~)/'`id`", "split": "```"}}
    (command,) = bash_blocks(model_card(record))
    assert shlex.split(command)[4] == "'`id`"
    assert not bash_blocks(model_card({**RECORD, "calibration": {"location": "x\n```\n<b>"}}))


# ------------------------------------------------------------------------------------------------- snippet and picture


def test_pin():
    card = model_card(RECORD)
    commit = "0123456789abcdef" * 2 + "01234567"
    assert pinned_revision(card) is None
    pinned = pin(card, "org/name", commit)
    assert pinned_revision(pinned) == commit
    assert pin(pinned, "org/name", "main") == pin(card, "org/name", "main")
    assert unpin(pinned) == card
    assert pin("My own words.", "org/name", commit) == "My own words."
    assert pinned_revision("My own words.") is None
    different = [(a, b) for a, b in zip(card.splitlines(), pinned.splitlines(), strict=True) if a != b]
    assert len(different) == 1


PLAN = {
    "hidden_size": 16,
    "dense_hidden_size": 16,
    "query_key_ranks": [[3, 7], [8, 0]],
    "value_output_ranks": [[5, 8], [1, 2]],
    "mlp_widths": [9, 20],
    "factor_ranks": [{}, {}],
    "bypass_ranks": [0, 4],
}


@pytest.mark.parametrize("factors", [[{}, {}], [{"up": 3}, {"query_key_value": 2, "down": 9}]])
def test_picture_of_the_plan(factors, tmp_path: Path):
    plan = {**PLAN, "factor_ranks": factors}
    first = plan_chart(plan)
    (tmp_path / "plan.png").write_bytes(first)
    with Image.open(tmp_path / "plan.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 200
        assert not {"Software", "Creation Time", "date"} & image.info.keys()
    assert plan_chart(plan) == first


def test_picture_is_on_the_card_only_where_there_is_one():
    assert "rank_plan.png" not in model_card(RECORD)
    assert "](rank_plan.png)" in model_card(RECORD, picture="rank_plan.png")
