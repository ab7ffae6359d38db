"""Several processes of `accelerate launch`: nothing is seen twice or lost, and the result is that of one process."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from datasets import Dataset, load_dataset
from safetensors.torch import load_file

from hf_vit_lowrank import CompressionRecipe, compress
from hf_vit_lowrank.dense import load_dense
from hf_vit_lowrank.image_sources import ImageSource
from hf_vit_lowrank.images import Share, open_images
from hf_vit_lowrank.memory import memory_plan

COMMAND = ("compress", "{source}", "--calibration", "{images}", "--samples", "150", "--reduction", "0.6", "--quiet")
RECIPE = CompressionRecipe(reduction=0.6, samples=150)  # the command's
LIMIT = "1020000000"  # bytes
# One thread each. Open MPI refuses to be started by root, as containers do, unless it is told twice.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
# Also without a GPU: of `--cpu` accelerate makes one process, unless there is an MPI to start more.
MULTI_GPU = ("--multi_gpu", "--main_process_port", "0")
DEBUG_LAUNCHER = """
import sys
from accelerate import debug_launcher
from hf_vit_lowrank import CompressionRecipe, compress

def work(source, images, output):
    compress(source, images, CompressionRecipe(reduction=0.6, samples=150)).save_pretrained(output)

debug_launcher(work, tuple(sys.argv[1:]), num_processes=2)
"""


def launch(source, images, output, *options: object, launcher: Sequence[str] = MULTI_GPU) -> None:
    start = ["-m", "accelerate.commands.launch", *launcher, "--num_processes", "2", "--num_machines", "1"]
    start += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
    arguments = [part.format(source=source, images=images) for part in COMMAND] + ["--output", str(output)]
    run([*start, "-m", "hf_vit_lowrank", *arguments, *map(str, options)])


def run(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=500, env={**os.environ, **ENVIRONMENT}
    )
    assert done.returncode == 0, done.stderr


def outcome(folder):
    record = json.loads((folder / "compression.json").read_text())
    return record, load_file(folder / "model.safetensors")


def assert_the_same(one, other):
    """One plan, and weights to 1e-6."""
    assert one[0]["plan"] == other[0]["plan"]
    for name, tensor in other[1].items():
        assert torch.allclose(one[1][name], tensor, rtol=1e-6, atol=1e-6 * tensor.abs().max().item()), name


@pytest.fixture(scope="module")
def alone(digits_model, digits_data, tmp_path_factory):
    """Made by one process, this one."""
    output = tmp_path_factory.mktemp("alone") / "out"
    compress(str(digits_model), str(digits_data.calibration), RECIPE, device="cpu").save_pretrained(output)
    return outcome(output)


def test_two_processes_make_what_one_makes(alone, digits_model, digits_data, tmp_path):
    launch(digits_model, digits_data.calibration, tmp_path / "out")
    record, weights = outcome(tmp_path / "out")
    assert record["calibration"]["images"] == 150
    assert record["calibration"]["processes"] == 2
    assert_the_same((record, weights), alone)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_two_processes_without_a_gpu_by_mpi(alone, digits_model, digits_data, tmp_path):
    if shutil.which("mpirun") is None:
        pytest.skip("no mpirun, without which accelerate launch --cpu starts one process")
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ("--cpu", "--mpirun_hostfile", str(tmp_path / "hosts"), "--main_process_port", str(port))
    launch(digits_model, digits_data.calibration, tmp_path / "out", launcher=launcher)
    record, weights = outcome(tmp_path / "out")
    assert record["calibration"]["processes"] == 2
    assert_the_same((record, weights), alone)


@pytest.mark.slow
def test_two_processes_of_a_python_program(alone, digits_model, digits_data, tmp_path):
    run(["-c", DEBUG_LAUNCHER, str(digits_model), str(digits_data.calibration), str(tmp_path / "out")])
    record, weights = outcome(tmp_path / "out")
    assert record["calibration"]["processes"] == 2
    assert_the_same((record, weights), alone)


@pytest.mark.slow
def test_two_processes_distil_a_model_together(digits_model, digits_data, tmp_path):
    launch(
        *(digits_model, digits_data.calibration, tmp_path / "out"),
        *("--compensation", "distill", "--distill-epochs", 3),
    )
    record, _ = outcome(tmp_path / "out")
    images = [seen for seen, _ in record["distillation"]["curve"]]
    assert images[1] % (2 * record["recipe"]["batch_size"]) == 0  # a step takes a batch of each process
    for step in (record["gradient"], record["distillation"]):
        assert step["kept"] == (step["after"] < step["before"])


def test_the_shares_of_indexed_data_are_whole_batches(digits_data):
    whole = [image.image.tobytes() for image in open_images(str(digits_data.calibration), samples=100, seed=0)]
    shares = [
        [
            image.image.tobytes()
            for image in open_images(str(digits_data.calibration), samples=100, seed=0).shared(share)
        ]
        for share in (Share(index, 3, 16) for index in range(3))
    ]
    batches = [whole[start : start + 16] for start in range(0, 100, 16)]
    for index, own in enumerate(shares):
        assert own == [image for batch in batches[index::3] for image in batch]


def test_a_share_may_hold_no_image(digits_data):
    few = open_images(str(digits_data.calibration), samples=10, seed=0)
    assert [len(list(few.shared(Share(index, 2, 16)))) for index in range(2)] == [10, 0]


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("samples", [None, 37])
def test_every_image_of_a_stream_is_read_once(shards, samples, digits_data, monkeypatch):
    """A hub data set is streamed; here a local one takes its place."""
    from hf_vit_lowrank import images

    data: Dataset = load_dataset("parquet", data_files=str(digits_data.validation), split="train").select(range(60))
    stream = data.to_iterable_dataset(num_shards=shards)
    source = ImageSource(["train"], lambda _: stream, lambda *_: 60)
    monkeypatch.setattr(images, "open_source", lambda *_, **__: source)
    opened = open_images("org/digits", samples=samples, seed=0, shuffle_buffer=10)
    seen: Counter[bytes] = Counter()
    sizes = []
    for index in range(2):
        own = [image.image.tobytes() for image in opened.shared(Share(index, 2, 8))]
        seen.update(own)
        sizes.append(len(own))
    everything = Counter(image.image.tobytes() for image in open_images("org/digits", seed=None))
    assert sum(sizes) == (samples or 60)
    assert max(sizes) - min(sizes) <= 1
    assert not seen - everything
    if samples is None:
        assert seen == everything


@pytest.mark.parametrize("samples", [None, 37])
def test_shares_of_a_stream_in_order_are_whole_batches(samples, digits_data, monkeypatch):
    """Or held-back images would be among those that training sees."""
    from hf_vit_lowrank import images

    data: Dataset = load_dataset("parquet", data_files=str(digits_data.validation), split="train").select(range(60))
    source = ImageSource(["train"], lambda _: data.to_iterable_dataset(num_shards=4), lambda *_: 60)
    monkeypatch.setattr(images, "open_source", lambda *_, **__: source)
    opened = open_images("org/digits", samples=samples, seed=0, shuffle_buffer=10)
    whole = [image.image.tobytes() for image in opened]
    batches = [whole[start : start + 8] for start in range(0, len(whole), 8)]
    for index in range(2):
        own = [image.image.tobytes() for image in opened.shared(Share(index, 2, 8, in_order=True))]
        assert own == [image for batch in batches[index::2] for image in batch]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [("--preset", "svd-llm"), ("--preset", "modegpt"), ("--memory-limit", LIMIT)],
    ids=["svd-llm", "modegpt", "memory-limit"],
)
def test_two_processes_make_what_one_makes_with(options, digits_model, digits_data, tmp_path):
    arguments = [part.format(source=digits_model, images=digits_data.calibration) for part in COMMAND]
    run(["-m", "hf_vit_lowrank", *arguments, *options, "--output", str(tmp_path / "alone")])
    launch(digits_model, digits_data.calibration, tmp_path / "out", *options)
    assert_the_same(outcome(tmp_path / "out"), outcome(tmp_path / "alone"))


def test_that_limit_is_one(digits_model):
    config = load_dense(str(digits_model)).model.config
    assert memory_plan(config, RECIPE, RECIPE.batch_size, int(LIMIT)).batch_size < RECIPE.batch_size
