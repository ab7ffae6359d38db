"""Comparing methods: the cells, what is done twice and what is not, tables, charts, the scripts."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_vit_lowrank import bench as bench_module
from hf_vit_lowrank.bench import DENSE, Method, PreparedImages, accuracy_tables, bench
from hf_vit_lowrank.charts import bytes_chart, methods_chart
from hf_vit_lowrank.errors import UserError
from hf_vit_lowrank.evaluation import evaluate_classifier, load_classifier
from hf_vit_lowrank.images import open_images
from hf_vit_lowrank.pixels import pixel_batches
from hf_vit_lowrank.quantised import check_quantisers, quantise, serialised_bytes
from hf_vit_lowrank.recipe import CompressionRecipe

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
PNG = b"\x89PNG\r\n\x1a\n"
METHODS = ("svd", "mixed-rank/closed-form")
SIZE, TOO_SMALL = 0.8, 0.99  # this model is wide: methods differ only where little is left
BASE = CompressionRecipe(reduction=0.0, samples=64)


@pytest.fixture(scope="module")
def run(digits_model, digits_data):
    """Calls bench() into a folder; gives the records by method and size, and the lines it printed."""

    def call(output, methods=METHODS, sizes=(SIZE,), base=BASE, calibration=digits_data.calibration):
        lines: list[str] = []
        records = bench(
            str(digits_model),
            open_images(str(calibration), samples=base.samples),
            open_images(str(digits_data.validation), samples=200, seed=None),
            base,
            methods=[Method.parse(name) for name in methods],
            sizes=sizes,
            output=output,
            device="cpu",
            say=lines.append,
        )
        return {(record["method"], record["size"]): record for record in records}, lines

    return call


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    output = tmp_path_factory.mktemp("bench")
    return output, *run(output)


# --------------------------------------------------------------------------------------------------------------- cells


def test_every_cell_is_measured(finished, digits_model, digits_data):
    output, records, _ = finished
    assert list(records) == [(DENSE, 0.0), ("svd", SIZE), ("mixed-rank/closed-form", SIZE)]
    dense = records[DENSE, 0.0]
    model, processor = load_classifier(str(digits_model))
    images = open_images(str(digits_data.validation), samples=200, seed=None)
    alone = evaluate_classifier(model, processor, images, device="cpu")
    assert (dense["top1"], dense["parameters"], dense["images"]) == (alone.top1, alone.parameters, 200)
    for name in METHODS:
        record = records[name, SIZE]
        assert record["parameters"] <= (1 - SIZE) * dense["parameters"]
        assert 4 * record["parameters"] <= record["bytes"] < dense["bytes"]
        assert record["flops"] < dense["flops"]
        card = (output / "cards" / f"{name.replace('/', '+')}_{SIZE}.md").read_text()
        assert (
            f"| top-1 | {dense['top1']:.2f} % | {record['top1']:.2f} % | {record['top1'] - dense['top1']:+.2f}" in card
        )
    # The compressed model is what was measured: plain SVD is ruined at this size, ours is not.
    assert records["svd", SIZE]["top1"] < 85 < records["mixed-rank/closed-form", SIZE]["top1"] <= dense["top1"] + 2
    written = json.loads((output / "accuracy.json").read_text())
    assert written["cells"] == list(records.values())
    assert {"machine", "versions", "seconds"} <= set(written["cells"][1])


def test_a_finished_cell_is_never_run_again(finished, run, monkeypatch):
    output, records, lines = finished
    assert lines[0] == "0 of 3 cells are finished"
    monkeypatch.setattr(bench_module, "calibrate", lambda *_, **__: pytest.fail("calibrated again"))
    monkeypatch.setattr(bench_module, "evaluate_classifier", lambda *_, **__: pytest.fail("measured again"))
    before = {path: path.stat().st_mtime_ns for path in (output / "cells").iterdir()}
    again, lines = run(output)
    assert again == records
    assert lines == ["3 of 3 cells are finished"]
    assert {path: path.stat().st_mtime_ns for path in (output / "cells").iterdir()} == before


def test_a_run_that_was_killed_goes_on(finished, run, monkeypatch):
    output, records, _ = finished
    lost = next((output / "cells").glob("svd_*.json"))
    lost.unlink()
    built: list[str] = []
    real = bench_module.build

    def build(calibrated, recipe, **options):
        built.append(recipe.preset)
        return real(calibrated, recipe, **options)

    monkeypatch.setattr(bench_module, "build", build)
    again, _ = run(output)
    assert built == ["svd"]
    assert again["svd", SIZE]["top1"] == records["svd", SIZE]["top1"]


def test_other_images_are_other_cells(finished, run, digits_data, tmp_path):
    output, *_ = finished
    other = tmp_path / "other.parquet"
    other.write_bytes(digits_data.validation.read_bytes())
    _, lines = run(output, methods=["mixed-rank/none"], calibration=other)
    assert lines[0] == "0 of 2 cells are finished"


def test_changed_calibration_images_are_refused(finished, run, tmp_path):
    output, *_ = finished
    for path in (output / "cells").glob("*.json"):
        (tmp_path / "cells").mkdir(exist_ok=True)
        record = json.loads(path.read_text())
        (tmp_path / "cells" / path.name).write_text(json.dumps({**record, "calibration_sha256": "other"}))
    with pytest.raises(UserError, match="other images than when"):
        run(tmp_path, methods=[*METHODS, "mixed-rank/none"])


def test_what_a_method_cannot_reach_is_recorded_once(run, tmp_path):
    records, _ = run(tmp_path, methods=["svd"], sizes=[TOO_SMALL])
    assert "cannot be reached" in records["svd", TOO_SMALL]["failed"]
    table = (tmp_path / "accuracy.md").read_text()
    assert "| svd | – |" in table
    assert "- svd at −99 %: At most" in table
    assert (tmp_path / "accuracy.png").read_bytes().startswith(PNG)
    assert run(tmp_path, methods=["svd"], sizes=[TOO_SMALL])[1] == ["2 of 2 cells are finished"]


def test_what_broke_is_recorded_and_tried_again(run, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(bench_module, "build", broken)
        records, _ = run(tmp_path, methods=["svd"])
    assert records["svd", SIZE]["failed"] == "RuntimeError: out of luck."
    records, lines = run(tmp_path, methods=["svd"])
    assert lines[0] == "1 of 2 cells are finished"
    assert records["svd", SIZE]["failed"] is None


def test_only_training_holds_images_back(run, tmp_path, monkeypatch):
    shares: dict[str, float] = {}

    def build(calibrated, recipe, **_):
        shares[recipe.compensation] = len(torch.cat([torch.empty(0, 17, 64), *calibrated.held_back]))
        raise UserError("enough")

    monkeypatch.setattr(bench_module, "build", build)
    run(tmp_path, methods=["mixed-rank/gradient", "mixed-rank/closed-form"])
    assert shares == {"closed-form": 0, "gradient": 6}


def test_the_length_of_distillation_counts_for_distillation_only():
    shorter, longer = (CompressionRecipe(reduction=0.0, distill_epochs=epochs) for epochs in (3, 7))
    assert Method.parse("svd").recipe(longer, 0.5) == Method.parse("svd").recipe(shorter, 0.5)
    assert Method.parse("mixed-rank/distill").recipe(longer, 0.5).distill_epochs == 7


def test_names_of_methods():
    assert Method.parse("svd") == Method("svd", "none")
    assert Method.parse("mixed-rank").name == "mixed-rank/closed-form"
    assert Method.parse(" corp/gradient").name == "corp/gradient"
    assert Method.parse("mixed-rank/none").name == "mixed-rank/none"
    for wrong in ("sdv", "svd/closed-form"):
        with pytest.raises(UserError):
            Method.parse(wrong)


@pytest.mark.parametrize("free", [0, 1 << 40])
def test_images_are_prepared_once_where_they_fit(free, digits_model, digits_data, monkeypatch):
    stream = open_images(str(digits_data.validation), samples=40, seed=None)
    _, processor = load_classifier(str(digits_model))
    memory = type("Memory", (), {"available": free})
    monkeypatch.setattr(bench_module.psutil, "virtual_memory", lambda: memory)
    passes: list[int] = []

    def counted(*arguments):
        passes.append(1)
        return pixel_batches(*arguments)

    monkeypatch.setattr(bench_module, "pixel_batches", counted)
    batches = PreparedImages(stream, processor, 16)
    first, second = ([batch.pixel_values for batch in batches] for _ in range(2))
    assert [len(batch) for batch in first] == [16, 16, 8]
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert len(passes) == (1 if free else 2)


# ---------------------------------------------------------------------------------------------------- tables and charts


def record(method, size, top1, *, quantised=None, bytes_per=4.0, failed=None):
    parameters = round(1000 * (1 - size))
    numbers = {"parameters": parameters, "bytes": round(bytes_per * parameters), "flops": 2 * parameters}
    numbers |= {"top1": top1, "top5": top1}
    return {"method": method, "size": size, "quantised": quantised, "failed": failed, **({} if failed else numbers)}


RECORDS = [
    record(DENSE, 0.0, 80.0),
    record(DENSE, 0.0, 79.5, quantised="int8", bytes_per=1.1),
    *(record(f"rival-{number:02}", size, 70 - number) for number in range(13) for size in (0.2, 0.4)),
    *(record(f"mixed-rank/{name}", size, 75.0) for name in ("none", "closed-form", "gradient") for size in (0.2, 0.4)),
    record("mixed-rank/none", 0.2, 74.0, quantised="int8", bytes_per=1.1),
]


def test_tables_by_hand():
    records = [RECORDS[0], record("svd", 0.2, 70.126), record("svd", 0.4, 0.0, failed="No."), RECORDS[-1]]
    assert accuracy_tables(records) == (
        "| top-1 % | −20 % | −40 % |\n"
        "|---|---:|---:|\n"
        "| dense | 80.00 | 80.00 |\n"
        "| svd | 70.13 | – |\n"
        "| mixed-rank/none | – | – |\n"
        "\n"
        "|  | removed | parameters | bytes | FLOPs | top-1 % | top-5 % |\n"
        "|---|---:|---:|---:|---:|---:|---:|\n"
        "| dense | full size | 1,000 | 4,000 | 2,000 | 80.00 | 80.00 |\n"
        "| svd | −20 % | 800 | 3,200 | 1,600 | 70.13 | 70.13 |\n"
        "| svd | −40 % | – | – | – | – | – |\n"
        "| mixed-rank/none, int8 | −20 % | 800 | 880 | 1,600 | 74.00 | 74.00 |\n"
        "\n"
        "- svd at −40 %: No.\n"
    )


@pytest.mark.parametrize("chart", [methods_chart, bytes_chart])
def test_charts_are_the_same_bytes_again(chart, tmp_path):
    for name in ("a", "b"):
        chart(RECORDS, tmp_path / name)
    first = (tmp_path / "a").read_bytes()
    assert first.startswith(PNG)
    assert first == (tmp_path / "b").read_bytes()
    worse = [{**one, "top1": one["top1"] - 9} if one["method"] == "mixed-rank/none" else one for one in RECORDS]
    chart(worse, tmp_path / "c")
    assert first != (tmp_path / "c").read_bytes()


# ----------------------------------------------------------------------------------------------------------- quantised


def test_without_the_libraries_the_way_out_is_named(monkeypatch):
    monkeypatch.setattr("hf_vit_lowrank.quantised.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install torchao hqq"):
        check_quantisers()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "bits", "error"), [("int8", 8, 0.01), ("hqq4", 4, 0.15)])
def test_quantised_models_are_smaller_and_near(kind, bits, error):
    pytest.importorskip("torchao")
    pytest.importorskip("hqq")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 256)).eval()
    inputs = torch.randn(64, 256)
    small = quantise(model, kind)
    with torch.no_grad():
        dense, near = model(inputs), small(inputs)
    assert 1e-4 < ((near - dense).norm() / dense.norm()).item() < error
    # Beside the weights: biases, and a float32 scale for each output (int8), or two for each 64 weights (hqq4: 1 bit).
    weights = 2 * 256 * 512
    least = weights * (bits + (1 if kind == "hqq4" else 0)) / 8
    assert least < serialised_bytes(small) < 1.1 * least + 20_000
    assert serialised_bytes(model) > 4 * weights


@pytest.mark.slow
def test_four_bits_take_groups_that_divide_a_weight():
    pytest.importorskip("torchao")
    hqq = pytest.importorskip("hqq.core.quantize")
    model = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.Linear(12, 1)).eval()  # 96 and 12 weights
    grouped, whole = quantise(model, "hqq4")
    assert [type(one) for one in (grouped, whole)] == [hqq.HQQLinear, torch.nn.Linear]
    inputs = torch.randn(64, 8)
    assert (grouped(inputs) - model[0](inputs)).norm() < 0.15 * model[0](inputs).norm()


# ------------------------------------------------------------------------------------------------------------- scripts


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("*.py")), ids=lambda path: path.name)
def test_what_a_script_imports_is_there(path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)  # as where a script is run
    assert runpy.run_path(str(path))["__doc__"]


def test_latency_of_random_weights_is_measured(tmp_path):
    measure = runpy.run_path(str(SCRIPTS / "bench_latency.py"))["main"]
    one_case = {"precisions": "float32", "attentions": "sdpa", "batches": "1", "rounds": 1, "device": "cpu"}
    measure(tmp_path, reductions="0.5", hidden_size=64, threads=torch.get_num_threads(), **one_case)
    record = json.loads((tmp_path / "latency.json").read_text())
    (row,) = record["rows"]
    assert 0.5 <= row["removed"] < 0.55
    assert min(row["dense_ms"], row["compressed_ms"], row["ceiling"] - 1) > 0
    (load,) = record["loading"]
    assert 0.4 < load["compressed_bytes"] / load["dense_bytes"] < 0.6
    assert "| cpu float32 sdpa | 1 |" in (tmp_path / "latency.md").read_text()


def test_a_gpu_is_asked_for_no_more_calls_than_by_the_dense_model(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    runpy.run_path(str(SCRIPTS / "bench_calls.py"))["main"](tmp_path, rounds=1)
    record = json.loads((tmp_path / "calls.json").read_text())
    assert 0 < record["calls"]["compressed"] <= record["calls"]["dense"]
    assert record["calls"]["compressed"] < record["calls"]["with up weights of lower rank"]
    assert record["ratios"]["compressed"] == record["milliseconds"]["compressed"] / record["milliseconds"]["dense"] > 0


def test_help_of_imagenet_needs_nothing():
    shown = subprocess.run(
        ["bash", SCRIPTS / "imagenet.sh", "--help"], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True
    )
    assert shown.returncode == 0
    assert "--smoke" in shown.stdout


def test_imagenet_takes_options_in_either_form_and_folders_from_where_it_is_called(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\n[ "$1" = -c ] || { echo "$PWD"; printf "%s\\n" "$@"; }\n')
    python.chmod(0o755)
    options = ["--output=my out", "--models=./a b/c", "--calibration", "data/train"]
    command = ["bash", SCRIPTS / "imagenet.sh", *options]
    environment = {**os.environ, "PYTHON": str(python)}
    shown = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    for model in ("./a", "b/c"):
        output = str(tmp_path / "my out" / Path(model).name)
        expected = [f"== {model}", str(tmp_path), str(SCRIPTS / "bench_accuracy.py"), model]
        assert "\n".join(expected) in shown
        assert f"--output\n{output}\n--calibration\ndata/train\n" in shown


@pytest.mark.slow
def test_dry_run_of_imagenet(tmp_path):
    command = ["bash", SCRIPTS / "imagenet.sh", "--smoke", "--no-quantise", "--output", tmp_path]
    environment = {**os.environ, "PYTHON": sys.executable}
    first, second = (
        subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600) for _ in range(2)
    )
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "9 of 9 cells are finished" in second.stdout
    output = tmp_path / "model"
    assert {"accuracy.json", "accuracy.md", "accuracy.png", "bytes.png"} <= {path.name for path in output.iterdir()}
    cells = json.loads((output / "accuracy.json").read_text())["cells"]
    assert [cell["failed"] for cell in cells] == [None] * 9


@pytest.mark.slow
def test_sizes_that_are_no_numbers_are_refused(digits_model, digits_data, tmp_path):
    arguments = ["--calibration", digits_data.calibration, "--dataset", digits_data.validation, "--output", tmp_path]
    command = [sys.executable, SCRIPTS / "bench_accuracy.py", digits_model, *arguments, "--sizes", "0.2;0.4"]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.returncode == 1
    assert shown.stderr.strip().splitlines()[-1].startswith("Error: --sizes '0.2;0.4' are not numbers")


@pytest.mark.slow
def test_trials_change_one_thing_and_are_not_run_twice(digits_model, digits_data, tmp_path):
    closed_form = ["no bypass", "in two steps", "fitted on 2 views as well", "ten folds"]
    closed_form += ["ridges by variance", "sizes learned"]
    closed_form += ["narrower stream", "narrower stream, not learned"]
    gradient = ["Muon", "mixed views", "map before the classifier"]
    names = ["closed form", *(f"closed form, {name}" for name in closed_form)]
    names += ["gradient", *(f"gradient, {name}" for name in gradient), "distill, 4 passes, Muon"]
    names += ["closed form, sizes probed"]

    def trials():
        return subprocess.run(
            [
                *(sys.executable, str(SCRIPTS / "bench_trials.py"), str(digits_model)),
                *("--calibration", str(digits_data.calibration), "--samples", "64", "--reduction", "0.85"),
                *("--trials", "; ".join(names), "--output", str(tmp_path)),
            ],
            check=True,
        )

    trials()
    rows = json.loads((tmp_path / "trials.json").read_text())
    assert len(rows) == len(names)
    # Training that makes nothing better leaves what it began with, and probes may ask for the sizes that are there.
    changed = [row["divergence"] for name, row in rows.items() if "closed form" in name and "probed" not in name]
    assert len(set(changed)) == len(changed) == 1 + len(closed_form)
    assert all(row["curve"] for name, row in rows.items() if "distill" in name)
    trials()
    assert json.loads((tmp_path / "trials.json").read_text()) == rows


@pytest.mark.slow
def test_compression_is_measured_in_one_process_and_in_two(tmp_path):
    arguments = ["--shapes", "deit-tiny", "--images", "64", "--processes", "1,2", "--threads", "1", "--output"]
    subprocess.run([sys.executable, SCRIPTS / "bench_compression.py", *arguments, tmp_path], check=True)
    rows = json.loads((tmp_path / "compression.json").read_text())
    assert [row["processes"] for row in rows] == [1, 2]
    assert all(row["seconds"]["compensation"] > 0 < row["peak_bytes"] for row in rows)
