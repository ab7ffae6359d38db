"""A run that dies goes on where it was and ends with the same bits; a run folder of other inputs is refused."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from hf_vit_lowrank import calibration, probing
from hf_vit_lowrank.calibration import calibrate
from hf_vit_lowrank.compensation import closed_form, distill, gradient
from hf_vit_lowrank.compress import build, compress
from hf_vit_lowrank.errors import RunError, UserError
from hf_vit_lowrank.recipe import CompressionRecipe
from hf_vit_lowrank.run_folder import RunFolder
from hf_vit_lowrank.sweep import sweep

RECIPE = CompressionRecipe(reduction=0.85, samples=64, compensation="distill", distill_epochs=3, rank_multiple=1)
REFITTED = replace(RECIPE, compensation="closed-form")
PROBED = replace(REFITTED, probe=True)


class KilledError(Exception):
    pass


@pytest.fixture(scope="module", autouse=True)
def short_training():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradient, "EPOCHS", 2)
        yield


@pytest.fixture(scope="module")
def calibrated(digits_model, digits_data):
    return calibrate(str(digits_model), str(digits_data.calibration), RECIPE, hold_back=0.25, device="cpu")


@pytest.fixture(scope="module")
def never_killed(calibrated):
    return cache(lambda recipe: build(calibrated, recipe))


def killing(function, calls):
    """`function`, but the call after `calls` others dies."""
    done = []

    def call(*arguments, **options):
        if len(done) == calls:
            raise KilledError
        done.append(0)
        return function(*arguments, **options)

    return call


@pytest.mark.parametrize(
    ("recipe", "place", "name", "calls"),
    [
        (PROBED, probing, "mean_divergence", 8),
        (REFITTED, closed_form, "refit_block", 1),
        (RECIPE, gradient, "_train", 2),
        (RECIPE, distill._Progress, "on_step_end", 4),
        (RECIPE, distill._Distiller, "_save_scaler", 2),  # halfway through a checkpoint of the Trainer
    ],
)
def test_a_run_that_died_goes_on_to_the_same_bits(
    recipe, place, name, calls, calibrated, never_killed, tmp_path, monkeypatch
):
    run = RunFolder(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(place, name, killing(getattr(place, name), calls))
        with pytest.raises(KilledError):
            build(calibrated, recipe, run=run)
    if place is distill._Progress:  # then nothing of the earlier stages may run again
        monkeypatch.setattr(closed_form, "refit_block", killing(None, 0))
        monkeypatch.setattr(gradient, "_train", killing(None, 0))
    resumed, expected = build(calibrated, recipe, run=run), never_killed(recipe)
    state = resumed.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in expected.model.state_dict().items())
    for result in (resumed, expected):
        result.report.pop("seconds", None)
    assert resumed.report == expected.report


def test_statistics_are_not_collected_twice(digits_model, digits_data, tmp_path, monkeypatch):
    recipe = CompressionRecipe(reduction=0.5, samples=32)
    arguments = (str(digits_model), str(digits_data.calibration), recipe)
    first = compress(*arguments, device="cpu", run_folder=tmp_path / "run")
    monkeypatch.setattr(calibration, "collect_statistics", killing(None, 0))
    again = compress(*arguments, device="cpu", run_folder=tmp_path / "run")
    state = again.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in first.model.state_dict().items())


def test_a_sweep_that_died_does_nothing_twice(digits_model, digits_data, tmp_path, monkeypatch):
    recipe = CompressionRecipe(reduction=0.5, samples=32)
    arguments = (str(digits_model), str(digits_data.calibration), [0.2, 0.5], recipe)
    run, output = tmp_path / "run", tmp_path / "output"
    expected = sweep(*arguments, output=tmp_path / "never killed", device="cpu")
    monkeypatch.setattr("hf_vit_lowrank.sweep.build", killing(build, 1))
    with pytest.raises(KilledError):
        sweep(*arguments, output=output, device="cpu", run_folder=run)
    assert not output.exists()
    monkeypatch.setattr(calibration, "collect_statistics", killing(None, 0))
    monkeypatch.setattr("hf_vit_lowrank.sweep.build", killing(build, 1))  # one of the two sizes is left
    assert sweep(*arguments, output=output, device="cpu", run_folder=run) == expected
    with pytest.raises(UserError, match=r"reductions \(\[0\.2, 0\.5\] there, \[0\.5\] here\)"):
        sweep(*arguments[:2], [0.5], recipe, output=output, device="cpu", run_folder=run)


def test_fault_07_another_run_in_the_same_folder_is_refused_by_name(digits_model, digits_data, tmp_path):
    recipe = CompressionRecipe(reduction=0.5, samples=16)
    compress(str(digits_model), str(digits_data.calibration), recipe, device="cpu", run_folder=tmp_path / "run")
    for other, difference in (
        (replace(recipe, reduction=0.4), r"recipe\.reduction \(0\.5 there, 0\.4 here\)"),
        (replace(recipe, seed=1), r"recipe\.seed \(0 there, 1 here\)"),
    ):
        with pytest.raises(UserError, match=difference):
            compress(str(digits_model), str(digits_data.calibration), other, device="cpu", run_folder=tmp_path / "run")
    with pytest.raises(UserError, match=r"images\.location .* --restart"):
        compress(str(digits_model), str(digits_data.validation), recipe, device="cpu", run_folder=tmp_path / "run")


def test_a_stage_is_there_whole_or_not_at_all(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.require(seed=0)
    assert run.stage("numbers", lambda: [1, torch.ones(2)])[0] == 1
    assert run.stage("numbers", killing(None, 0))[0] == 1
    (tmp_path / "run" / "half.pt.unfinished").write_bytes(b"PK")
    assert not run.has("half")
    (tmp_path / "run" / "broken.pt").write_bytes(b"PK")
    with pytest.raises(RunError, match=r"broken\.pt' .* --restart"):
        run.load("broken")


def test_a_stage_never_runs_code(tmp_path):
    import pickle

    class Code:
        def __reduce__(self):
            return (open, (str(tmp_path / "mark"), "w"))

    (tmp_path / "stage.pt").write_bytes(pickle.dumps(Code()))
    with pytest.raises(RunError, match="cannot be read"):
        RunFolder(tmp_path).load("stage")
    assert not (tmp_path / "mark").exists()


def test_only_a_run_folder_is_removed(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="no run folder"):
        RunFolder(tmp_path).remove()
    assert (tmp_path / "mine.txt").exists()
    run = RunFolder(tmp_path / "run")
    run.require(seed=0)
    run.remove()
    assert not (tmp_path / "run").exists()
