"""The command line as a user runs it: own processes, exit codes, one-sentence errors."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets import Dataset, Features, Image, load_dataset
from huggingface_hub import ModelCard
from safetensors import safe_open
from typer.testing import CliRunner

from hf_vit_lowrank.cli import app
from hf_vit_lowrank.errors import UserError

INSTALLED = [str(Path(sys.executable).with_name("hf-vit-lowrank"))]
AS_A_MODULE = [sys.executable, "-m", "hf_vit_lowrank"]


def run(
    *arguments: object, program: list[str] = INSTALLED, cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "160", "NO_COLOR": "1", **variables}
    return subprocess.run(
        [*program, *map(str, arguments)],
        capture_output=True, text=True, cwd=cwd, env=environment, check=False, timeout=300,
    )  # fmt: skip


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    """As `run`, but in this process: seconds cheaper, for what ends before any work."""
    done = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "160", "NO_COLOR": "1"})
    logging.getLogger("hf_vit_lowrank").handlers.clear()  # they write to a stderr that is gone
    return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def compressed(digits_model, digits_data, tmp_path_factory):
    output = tmp_path_factory.mktemp("cli") / "out"
    done = run(
        "compress", digits_model, "--calibration", digits_data.calibration, "--samples", 128, "--reduction", 0.4,
        "--compensation", "closed-form", "--output", output,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return output, done


def test_compress_writes_a_checkpoint_of_the_wanted_size(compressed, digits_model):
    output, done = compressed
    with safe_open(output / "model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    record = json.loads((output / "compression.json").read_text())
    assert stored == record["parameters"] <= 0.6 * record["dense_parameters"]
    assert f"{stored:,}" in done.stdout
    assert {path.name for path in output.iterdir()} == {
        "config.json", "model.safetensors", "configuration_lowrank_vit.py", "modeling_lowrank_vit.py",
        "preprocessor_config.json", "README.md", "compression.json", "rank_plan.png",
    }  # fmt: skip
    assert (output / "preprocessor_config.json").read_bytes() == (
        digits_model / "preprocessor_config.json"
    ).read_bytes()


def test_evaluate_writes_json_in_percent(compressed, digits_model, digits_data, tmp_path):
    file = tmp_path / "out.json"
    done = call(
        "evaluate", compressed[0], "--dataset", digits_data.validation, "--against", digits_model, "--json", file
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert 80 < report["top1"] <= 100
    assert report["top1"] <= report["top5"]
    assert report["agreement"] > 80
    assert report["parameters"] < report["against"]["parameters"]
    assert f"{report['top1']:.2f}" in done.stdout


def test_evaluate_writes_the_card(compressed, digits_model, digits_data, tmp_path):
    folder = shutil.copytree(compressed[0], tmp_path / "out")
    options = ("--dataset", digits_data.validation, "--against", digits_model, "--samples", 100, "--write-card")
    done = call("evaluate", folder, *options)
    assert done.returncode == 0, done.stderr
    card = ModelCard.load(folder / "README.md")
    top1, top5 = card.data.eval_results
    assert (top1.metric_name, top1.dataset_args) == ("top-1 accuracy", {"images": 100})
    assert 0.8 < top1.metric_value <= top5.metric_value <= 1
    assert f"| top-1 | {100 * top1.metric_value:.2f} %" in re.sub(r"top-1 \| \S+ % ", "top-1 ", card.text)
    assert "](rank_plan.png)" in card.text
    done = call("verify", folder)
    assert done.returncode == 0, done.stdout
    (folder / "README.md").write_text("My own words.")
    assert "would be lost" in sentence(call("evaluate", folder, *options))
    assert "no checkpoint" in sentence(call("evaluate", digits_model, *options))


@pytest.mark.slow
def test_the_command_of_the_card_makes_the_same_bytes(compressed, digits_model, digits_data, tmp_path):
    command = (compressed[0] / "README.md").read_text().split("```bash\n")[1].split("\n```")[0]
    for path in (digits_model, digits_data.calibration):  # the card has no paths of this machine
        command = command.replace(path.name, shlex.quote(str(path)))
    done = run(*shlex.split(command)[1:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    again = {path.name: path.read_bytes() for path in (tmp_path / "compressed").iterdir()}
    assert again == {path.name: path.read_bytes() for path in compressed[0].iterdir()}


def test_plan_prints_ranks_and_writes_nothing(digits_model, digits_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ("--calibration", digits_data.calibration, "--samples", 32, "--reduction", 0.5)
    done = call("plan", digits_model, *options)
    assert done.returncode == 0, done.stderr
    assert "Rank plan" in done.stdout
    assert "compensation, expected" in done.stdout
    assert list(tmp_path.iterdir()) == []
    done = call("plan", digits_model, *options, "--compensation", "distill", "--json", tmp_path / "plan.json")
    seconds = json.loads((tmp_path / "plan.json").read_text())["seconds"]
    assert seconds["distillation, expected"] > seconds["gradient, expected"] > seconds["statistics"]


def test_sweep_writes_three_files(digits_model, digits_data, tmp_path):
    output = tmp_path / "sweep"
    options = ("--calibration", digits_data.calibration, "--samples", 64, "--reductions", "0.3,0.6")
    done = call("sweep", digits_model, *options, "--output", output, "--json", tmp_path / "rows.json")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in output.iterdir()} == {"sweep.json", "sweep.md", "sweep.png"}
    rows = json.loads((output / "sweep.json").read_text())["rows"]
    assert [row["reduction"] for row in rows] == [0.0, 0.3, 0.6]
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    assert all(0 < row["agreement"] <= 100 for row in rows)
    assert {path.name for path in tmp_path.iterdir()} == {"sweep", "rows.json"}  # nothing of the run is left


@pytest.mark.parametrize(
    "command", ["compress", "plan", "sweep", "evaluate", "demo", "push", "verify", "recipe show", "report", "space"]
)
def test_help_has_an_example(command):
    done = call(*command.split(), "--help")
    assert done.returncode == 0
    assert f"hf-vit-lowrank {command}" in done.stdout


@pytest.fixture
def without_torch(tmp_path):
    """A folder for PYTHONPATH with which an import of torch fails."""
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    return tmp_path


def test_help_completion_and_a_mistyped_option_do_not_wait_for_torch(without_torch):
    path = {"PYTHONPATH": str(without_torch)}
    assert "torch was imported" in run("recipe", "show", "a.yaml", **path).stderr
    for program in (INSTALLED, AS_A_MODULE):
        assert "Example" in run("compress", "--help", program=program, **path).stdout
    assert "--nope" in sentence(run("plan", "model", "--nope", **path))
    completion = {"_HF_VIT_LOWRANK_COMPLETE": "complete_bash", "COMP_WORDS": "hf-vit-lowrank swe", "COMP_CWORD": "1"}
    assert run(**completion, **path).stdout.strip() == "sweep"


def test_other_packages_that_are_run_as_modules_get_all_of_this_one(without_torch):
    package = without_torch / "other"
    package.mkdir()
    (package / "__init__.py").write_text("import hf_vit_lowrank\n")
    (package / "train.py").touch()
    done = run(program=[sys.executable, "-m", "other.train"], PYTHONPATH=str(without_torch))
    assert "torch was imported" in done.stderr


def test_a_sweep_reads_the_columns_that_are_named(digits_model, digits_data, tmp_path):
    data = load_dataset("parquet", data_files=str(digits_data.validation), split="train")
    rows, label = data[:48], data.features["label"]
    columns = {"one": rows["image"], "two": rows["image"], "coarse": rows["label"], "fine": rows["label"]}
    features = Features({"one": Image(), "two": Image(), "coarse": label, "fine": label})
    Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "twice.parquet")
    start = ("sweep", digits_model, "--calibration", tmp_path / "twice.parquet", "--image-column", "one")
    start += ("--reductions", 0.3, "--output", tmp_path / "sweep")
    measured = ("--dataset", tmp_path / "twice.parquet", "--dataset-image-column", "two", "--label-column", "fine")
    done = call(*start, *measured)
    assert done.returncode == 0, done.stderr
    done = call(*start, "--overwrite", "--compensation", "distill", "--labels", "--label-column", "nowhere")
    assert "nowhere" in sentence(done)


def test_a_run_that_has_nothing_to_lose_is_no_obstacle(digits_model, digits_data, tmp_path):
    run_folder = tmp_path / ".out.run"
    run_folder.mkdir()
    (run_folder / "run.json").write_text('{"recipe": {"reduction": 0.9}}')
    options = ("--calibration", digits_data.calibration, "--samples", 16, "--compensation", "none")
    command = ("compress", digits_model, *options, "--reduction", 0.4, "--output", tmp_path / "out")
    done = call(*command)
    assert done.returncode == 0, done.stderr
    run_folder.mkdir()
    (run_folder / "run.json").write_text('{"recipe": {"reduction": 0.9}}')
    (run_folder / "statistics.pt").write_text("an hour of work")
    assert "holds an unfinished run" in sentence(call(*command, "--overwrite"))
    assert (run_folder / "statistics.pt").exists()


def test_a_demo_takes_nothing_away(tmp_path):
    files = [tmp_path / "dense" / "thesis.safetensors", tmp_path / "data" / "train.parquet"]
    for file in files:
        file.parent.mkdir()
        file.write_text("mine")
    for overwrite in ([], ["--overwrite"]):
        assert "would be lost" in sentence(call("demo", "--output", tmp_path, *overwrite))
        assert [file.read_text() for file in files] == ["mine", "mine"]


def test_what_is_typed_goes_before_the_recipe_file(digits_model, digits_data, tmp_path):
    (tmp_path / "recipe.yaml").write_text("reduction: 0.9\nsamples: 24\npreset: svd\nseed: 3\n")
    options = (
        "--calibration",
        digits_data.calibration,
        "--recipe",
        tmp_path / "recipe.yaml",
        "--json",
        tmp_path / "out.json",
    )
    typed = ("--max-parameters", "120k", "--seed", 0, "--samples", 16)
    done = call("compress", digits_model, *options, *typed, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    expected = {
        "reduction": None,
        "max_parameters": 120_000,
        "samples": 16,
        "preset": "svd",
        "seed": 0,
        "batch_size": 32,
    }
    assert expected.items() <= report["recipe"].items()
    assert report["parameters"] <= 120_000
    assert sum(report["seconds"].values()) > 0
    shown = call("recipe", "show", tmp_path / "out")
    (tmp_path / "again.yaml").write_text(shown.stdout)
    assert call("recipe", "show", tmp_path / "again.yaml").stdout == shown.stdout
    assert "max_parameters: 120000" in shown.stdout


def test_a_wrong_recipe_file_is_one_sentence(digits_model, digits_data, tmp_path):
    (tmp_path / "recipe.yaml").write_text("reduction: most\n")
    options = ("--calibration", digits_data.calibration, "--recipe", tmp_path / "recipe.yaml")
    message = sentence(call("compress", digits_model, *options, "--output", tmp_path / "out"))
    assert "recipe.yaml" in message
    assert "reduction must be a number" in message
    assert "recipe.yaml" in sentence(call("recipe", "show", tmp_path / "recipe.yaml"))
    two = call("compress", digits_model, *options, "--reduction", 0.5, "--match", "x/y", "--output", tmp_path / "out")
    assert "exactly one" in sentence(two)


def test_a_new_recipe_can_be_used_as_it_is(tmp_path):
    done = call("recipe", "show")
    assert done.returncode == 0
    assert done.stdout.startswith("reduction: 0.6\n")


def sentence(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    return " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--reduction", "1.5"), "[0, 1)"),
        (("--reduction", "0.5", "--match", "x/y"), "exactly one"),
        ((), "exactly one"),
        (("--max-parameters", "lots"), "34.6M"),
        (("--max-parameters", "10"), "ask for at least"),
        (("--reduction", "0.5", "--image-column", "photo"), "image"),
        (("--reduction", "0.5", "--label-column", "name"), "does not exist"),
        (("--reduction", "0.5", "--smoke"), "--smoke goes with --compensation distill"),
        (("--reduction", "0.5", "--distill-epochs", "5"), "--distill-epochs goes with --compensation distill"),
    ],
)
def test_bad_options_are_one_sentence(options, message, digits_model, digits_data, tmp_path):
    source = (digits_model, "--calibration", digits_data.calibration, "--samples", 16)
    done = call("compress", *source, *options, "--output", tmp_path / "out")
    assert message in sentence(done)
    assert not list(tmp_path.iterdir())


def test_what_may_not_be_written_is_refused_before_the_work(digits_model, digits_data, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    source = (digits_model, "--calibration", digits_data.calibration, "--samples", 16)
    for command in (
        ("plan", *source, "--reduction", 0.5, "--json", tmp_path / "plan.json"),
        ("sweep", *source, "--reductions", 0.5, "--output", tmp_path / "deep" / "sweep"),
        ("compress", *source, "--reduction", 0.5, "--output", tmp_path / "out"),
    ):
        assert f"'{tmp_path}' may not be written to" in sentence(call(*command))


def test_a_refusal_after_long_work_keeps_the_work(digits_model, digits_data, tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise UserError("Too late.")

    monkeypatch.setattr("hf_vit_lowrank.compensation.steps.refit", refuse)
    options = ("--calibration", digits_data.calibration, "--samples", 16, "--reduction", 0.5)
    assert "Too late." in sentence(call("compress", digits_model, *options, "--output", tmp_path / "out"))
    assert (tmp_path / ".out.run" / "statistics.pt").exists()


def test_missing_calibration_is_one_sentence(digits_model, tmp_path):
    options = ("--calibration", tmp_path / "nothing.parquet", "--reduction", 0.5, "--output", tmp_path / "out")
    assert "nothing.parquet" in sentence(call("compress", digits_model, *options))


def test_fault_15_a_killed_run_goes_on_and_is_not_mixed_with_another(digits_model, digits_data, tmp_path):
    output, run_folder = tmp_path / "out", tmp_path / ".out.run"
    command = ["compress", digits_model, "--calibration", digits_data.calibration, "--samples", 256, "--output", output]
    process = subprocess.Popen([*AS_A_MODULE, *map(str, command), "--reduction", "0.5"])
    while process.poll() is None and not (run_folder / "statistics.pt").exists():
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert (run_folder / "statistics.pt").exists()
    assert not output.exists()
    assert "recipe.reduction (0.5 there, 0.4 here)" in sentence(call(*command, "--reduction", 0.4))
    done = call(*command, "--reduction", 0.5)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_another_preset_has_the_same_format_and_budget(digits_model, digits_data, tmp_path):
    output = tmp_path / "out"
    done = run(
        "compress", digits_model, "--calibration", digits_data.calibration, "--samples", 64, "--reduction", 0.4,
        "--preset", "svd-llm", "--output", output, "--quiet",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads((output / "compression.json").read_text())
    assert record["parameters"] <= 0.6 * record["dense_parameters"]
    assert record["recipe"]["compensation"] == "none"
    assert "preset `svd-llm`" in (output / "README.md").read_text()


def test_a_preset_that_is_not_there_names_those_that_are(digits_model, digits_data, tmp_path):
    done = call(
        "compress", digits_model, "--calibration", digits_data.calibration, "--reduction", 0.4, "--preset", "pca",
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 2
    assert "svd-llm" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_distillation_by_smoke(digits_model, digits_data, tmp_path):
    output = tmp_path / "out"
    done = run(
        "compress", digits_model, "--calibration", digits_data.calibration, "--reduction", 0.8,
        "--compensation", "distill", "--labels", "--smoke", "--output", output,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads((output / "compression.json").read_text())
    assert record["recipe"]["distill_epochs"] == 1
    assert len(record["distillation"]["curve"]) > 1
    assert "before and after distillation" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing is left of the run


@pytest.mark.parametrize(
    ("words", "completed"), [("hf-vit-lowrank comp", ["compress"]), ("hf-vit-lowrank push --dry", ["--dry-run"])]
)
def test_shells_complete_commands_and_options(words, completed):
    environment = {
        "_HF_VIT_LOWRANK_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    done = CliRunner().invoke(app, [], env=environment, prog_name="hf-vit-lowrank")
    assert done.stdout.split() == completed
