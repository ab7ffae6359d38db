"""The faults and bad inputs that users of compressors meet, one test each, by the number of the fault.

Each fault is a real one (a cut file, a full disk, a killed process), and commands run as a user runs them. An error is
one sentence that says what is wrong and where; it leaves earlier results as they were. 7 is tested in
test_run_folder.py, 15 in test_cli.py, 21 and 22 in test_hub.py.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_cli import call, run
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification, ViTImageProcessorPil, ViTModel

from hf_vit_lowrank.checkpoint import load_checkpoint
from hf_vit_lowrank.compensation import gradient
from hf_vit_lowrank.compress import compress
from hf_vit_lowrank.dense import load_dense
from hf_vit_lowrank.errors import RunError, UserError
from hf_vit_lowrank.images import open_images
from hf_vit_lowrank.linalg import eigh
from hf_vit_lowrank.out_of_memory import with_smaller_batches
from hf_vit_lowrank.pixels import load_image_processor, pixel_batches
from hf_vit_lowrank.presets import PRESETS
from hf_vit_lowrank.recipe import CompressionRecipe
from hf_vit_lowrank.statistics import collect_statistics

SIZE, WIDTH = 16, 24
NAMES = ("red", "green", "blue", "cyan", "pink")


def make_source(folder: Path, **fields) -> Path:
    """A random ViT on disk, with an image processor of its own."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": WIDTH}
    names = {"id2label": dict(enumerate(NAMES)), "label2id": {name: label for label, name in enumerate(NAMES)}}
    torch.manual_seed(0)
    config = ViTConfig(**{**sizes, "image_size": SIZE, "patch_size": 8, "initializer_range": 0.3, **names, **fields})
    ViTForImageClassification(config).save_pretrained(folder)
    size = {"height": config.image_size, "width": config.image_size}
    ViTImageProcessorPil(size=size, image_mean=[0.4, 0.5, 0.6]).save_pretrained(folder)
    return folder


def noise(seed: int, size: int = SIZE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8))


def make_pictures(folder: Path, count: int = 24) -> Path:
    folder.mkdir(parents=True)
    for index in range(count):
        noise(index).save(folder / f"{index:03}.png")
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make_source(tmp_path_factory.mktemp("faults") / "dense")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("faults") / "pictures")


@pytest.fixture(scope="module")
def compressed(source, pictures, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("faults") / "small"
    succeeded(call(*compression(source, pictures, output)))
    return output


@pytest.fixture
def copied(source, tmp_path) -> Path:
    """A source to damage."""
    return Path(shutil.copytree(source, tmp_path / "damaged"))


def compression(source: object, images: object, output: object, *options: object) -> tuple[object, ...]:
    size = () if {"--reduction", "--max-parameters", "--match"} & set(options) else ("--reduction", 0.4)
    ranks = () if "--rank-multiple" in options else ("--rank-multiple", 1)  # the model is small
    wanted = (*size, *ranks, *options)
    return ("compress", source, "--calibration", images, "--output", output, "--device", "cpu", *wanted)


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stderr


def failed(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The one sentence that a failed command ends with."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: ")
    assert last.endswith(".")
    assert done.stderr.count("Error: ") == 1
    return last


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def record_of(folder: Path) -> dict:
    return json.loads((folder / "compression.json").read_text())


# -------------------------------------------------------------------------------------------------------- calibration


def test_fault_01_rank_deficient_moments(source, tmp_path):
    pictures = make_pictures(tmp_path / "one", 1)
    for copy in range(40):
        shutil.copy(pictures / "000.png", pictures / f"again{copy}.png")
    succeeded(call(*compression(source, pictures, tmp_path / "out")))
    first, last = record_of(tmp_path / "out")["moment_ranks"]
    assert 0 < first["MLP inputs"] <= 4  # five tokens around their mean
    assert 0 < first["contexts"] <= 4
    assert last == {"contexts": 0, "MLP inputs": 0}  # the class token alone, always the same
    load_checkpoint(tmp_path / "out")


def test_fault_02_fewer_tokens_than_dimensions(source, pictures, tmp_path):
    warned = succeeded(call(*compression(source, pictures, tmp_path / "out", "--samples", 4)))
    assert "the moments of an MLP are of 12 tokens, fewer than its 24 hidden units" in warned
    load_checkpoint(tmp_path / "out")
    assert "fewer than" not in succeeded(call(*compression(source, pictures, tmp_path / "more", "--samples", 8)))


def _change_weights(folder: Path, name: str, change) -> None:
    state = load_file(folder / "model.safetensors")
    name = next(key for key in state if name in key)
    state[name] = change(state[name])
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_fault_03_nan_and_infinity_name_where_they_are(copied, pictures, tmp_path):
    wanted = compression(copied, pictures, tmp_path / "out")
    last = "layer.1.output.dense.weight"
    _change_weights(copied, last, lambda weight: weight * 1e38)
    assert "activations of block 1 are not finite" in failed(call(*wanted), 1)
    _change_weights(copied, last, lambda weight: weight * 1e38)
    assert "NaN or infinite weights, first in vit.layers.1.mlp.fc2.weight" in failed(call(*wanted), 2)
    make_source(copied)
    ViTImageProcessorPil(image_mean=[float("nan")] * 3, size={"height": SIZE, "width": SIZE}).save_pretrained(copied)
    assert "image 0: the image processor gives pixels that are NaN" in failed(call(*wanted, "--restart"), 2)
    assert not (tmp_path / "out").exists()


def test_fault_04_a_stage_that_helps_nowhere_says_so(source, pictures, monkeypatch, caplog):
    monkeypatch.setattr(gradient, "LEARNING_RATE", 1e3)
    recipe = CompressionRecipe(reduction=0.4, compensation="gradient", rank_multiple=1)
    result = compress(str(source), str(pictures), recipe, device="cpu")
    assert not any(block["kept"] for block in result.report["gradient"]["blocks"])
    assert "training made no block better" in caplog.text


def test_fault_05_no_calibration_image_was_seen(source):
    with pytest.raises(RunError, match="No calibration image was seen"):
        collect_statistics(load_dense(str(source)).model, [])


class _FailsOnce(torch.overrides.TorchFunctionMode):
    """torch.linalg.eigh on a bad day, as cuSOLVER has them."""

    calls = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.linalg.eigh:
            self.calls += 1
            if self.calls == 1:
                raise torch.linalg.LinAlgError("cusolver error: the algorithm failed to converge")
        return function(*args, **(kwargs or {}))


def test_fault_06_eigh_fails_on_the_device(caplog):
    matrix = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    with _FailsOnce() as mode:
        values, vectors = eigh(matrix)
    assert mode.calls == 2
    assert torch.allclose(values, torch.tensor([1.0, 3.0], dtype=torch.float64))
    assert torch.allclose(vectors * values @ vectors.mT, matrix)
    assert "once more on the CPU" in caplog.text
    with pytest.raises(RunError, match="Moments of the activations are not finite"):
        eigh(matrix * torch.nan)


def test_fault_07_a_run_does_not_go_on_with_another_processor_or_configuration(copied, pictures, tmp_path):
    calibration, run = open_images(str(pictures), samples=8), tmp_path / "run"
    recipe = CompressionRecipe(reduction=0.4, samples=8, rank_multiple=1)
    compress(str(copied), calibration, recipe, device="cpu", run_folder=run)
    _edit_config(copied, layer_norm_eps=0.5)
    with pytest.raises(UserError, match=r"config.layer_norm_eps \(1e-12 there, 0.5 here\)"):
        compress(str(copied), calibration, recipe, device="cpu", run_folder=run)
    _edit_config(copied, layer_norm_eps=1e-12)
    size = {"height": SIZE, "width": SIZE}
    ViTImageProcessorPil(size=size, image_mean=[0.1, 0.1, 0.1]).save_pretrained(copied)
    with pytest.raises(UserError, match=r"image_processor.image_mean"):
        compress(str(copied), calibration, recipe, device="cpu", run_folder=run)


def test_fault_12_a_processor_for_another_size_is_named(copied, pictures, tmp_path):
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(copied)
    said = failed(call(*compression(copied, pictures, tmp_path / "out")), 2)
    assert f"makes images of (channels, height, width) (3, 8, 8), and its model takes (3, {SIZE}, {SIZE})" in said
    assert not list(tmp_path.glob(".out.run"))


@pytest.mark.parametrize("preset", ["svd", "kfac-svd", "paper"])
def test_fault_08_a_factor_larger_than_the_weight_stays_dense(preset, source, pictures, tmp_path):
    options = ("--preset", preset, "--reduction", 0.02)
    succeeded(call(*compression(source, pictures, tmp_path / "out", *options)))
    model, _, _ = load_checkpoint(tmp_path / "out")
    shapes = {"query_key_value": (48, 16), "output": (16, 16), "up": (24, 16), "down": (16, 24)}
    factored = [(name, rank) for ranks in model.config.factor_ranks for name, rank in ranks.items()]
    assert factored
    assert all(rank * sum(shapes[name]) < np.prod(shapes[name]) for name, rank in factored)


# --------------------------------------------------------------------------------------------------- images and labels


def test_fault_09_truncated_image(source, tmp_path):
    pictures = make_pictures(tmp_path / "pictures", 150)
    noise(0, 64).save(pictures / "cut.jpg")
    cut(pictures / "cut.jpg")
    warned = succeeded(call(*compression(source, pictures, tmp_path / "out")))
    assert "skipped 1 unreadable" in warned
    calibration = record_of(tmp_path / "out")["calibration"]
    assert calibration["images"] == 150
    assert len(calibration["skipped"]) == 1
    assert "cut.jpg" in calibration["skipped"][0]
    before = content(tmp_path / "out")
    for name in ("000.png", "001.png"):
        cut(pictures / name)
    said = failed(call(*compression(source, pictures, tmp_path / "out", "--overwrite")), 2)
    assert "images cannot be read (more than 1% of 151)" in said
    assert "pictures" in said
    assert content(tmp_path / "out") == before


def test_fault_10_every_kind_of_image_arrives_as_rgb_upright(source, tmp_path):
    shown = Image.new("RGB", (2 * SIZE, SIZE), (51, 102, 204))
    shown.paste((204, 51, 102), (SIZE, 0, 2 * SIZE, SIZE))
    folder = tmp_path / "kinds"
    folder.mkdir()
    shown.save(folder / "0.png")
    shown.convert("CMYK").save(folder / "1.tif")
    shown.convert("P", palette=Image.Palette.ADAPTIVE).save(folder / "2.png")
    shown.convert("RGBA").save(folder / "3.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    shown.transpose(Image.Transpose.ROTATE_90).save(folder / "4.png", exif=exif)
    shown.convert("L").save(folder / "5.png")
    processor = load_image_processor(str(source))
    pixels = next(pixel_batches(open_images(folder, seed=None), processor, 6)).pixel_values
    for index in range(1, 5):
        assert torch.allclose(pixels[index], pixels[0], atol=0.05), index
    gray = processor(images=[shown.convert("L").convert("RGB")], return_tensors="pt")["pixel_values"]
    assert torch.allclose(pixels[5], gray[0], atol=0.05)


def labelled(folder: Path, source: Path, names: tuple[str, ...], shift: int = 0) -> Path:
    """Pictures labelled by the class that the model at `source` sees in them, or by the one `shift` further on."""
    model, processor = ViTForImageClassification.from_pretrained(source).eval(), load_image_processor(str(source))
    pictures = [noise(seed) for seed in range(40)]
    with torch.no_grad():
        seen = model(**processor(images=pictures, return_tensors="pt")).logits.argmax(-1).tolist()
    assert len(set(seen)) > 1
    labels = [(names.index(NAMES[label]) + shift) % len(names) for label in seen]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features).save_to_disk(folder)
    return folder


def test_fault_11_label_order_differs(source, tmp_path):
    data = labelled(tmp_path / "backwards", source, NAMES[::-1])
    succeeded(call("evaluate", source, "--dataset", data, "--json", tmp_path / "out.json"))
    assert json.loads((tmp_path / "out.json").read_text())["top1"] == 100
    saved = datasets.load_from_disk(str(data))
    foreign = saved.cast_column("label", datasets.ClassLabel(names=["one", "two", *NAMES[2:]]))
    foreign.save_to_disk(tmp_path / "foreign")
    said = failed(call("evaluate", source, "--dataset", tmp_path / "foreign"), 2)
    assert "no single class of the model answers to 'one', 'two'" in said


def test_fault_12_mean_and_size_are_the_checkpoints_own(source, compressed, tmp_path):
    folder = tmp_path / "large"
    folder.mkdir()
    noise(0, 40).save(folder / "0.png")
    processor = AutoImageProcessor.from_pretrained(source, backend="pil")
    expected = processor(images=[noise(0, 40)], return_tensors="pt")["pixel_values"]
    ours = next(pixel_batches(open_images(folder), load_dense(str(source)).image_processor, 1)).pixel_values
    assert torch.equal(ours, expected)
    assert (compressed / "preprocessor_config.json").read_bytes() == (source / "preprocessor_config.json").read_bytes()


def test_fault_13_the_dense_baseline_is_far_too_low(source, compressed, tmp_path):
    right, wrong = (labelled(tmp_path / f"shift{shift}", source, NAMES, shift) for shift in (0, 1))
    warning = "reaches only 0.0 % top-1: do labels and image processor fit?"
    assert warning in succeeded(call("evaluate", compressed, "--dataset", wrong, "--against", source))
    assert "top-1" not in succeeded(call("evaluate", compressed, "--dataset", right, "--against", source))


# ----------------------------------------------------------------------------------------------------- memory and disk


def test_fault_14_out_of_memory(caplog):
    """Allocations that no machine can serve."""

    def work(most: int):
        def allocate(size: int) -> int:
            torch.empty(1 if size <= most else 10**16)
            return size

        return allocate

    assert with_smaller_batches("Statistics", work(2), 8) == 2
    assert "Statistics ran out of memory with 8 images at once: once more with 4" in caplog.text
    assert "with 4 images at once: once more with 2" in caplog.text
    with pytest.raises(RunError, match="Statistics: not even one image at a time fits"):
        with_smaller_batches("Statistics", work(0), 8)


LIMITED = """
import resource, sys
import accelerate, datasets, evaluate, huggingface_hub, transformers
from hf_vit_lowrank import cli, compress, tables
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv.pop(1)),) * 2)
cli.main()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of the address space")
def test_fault_14_out_of_memory_in_calibration(tmp_path):
    source = make_source(tmp_path / "dense", image_size=64, patch_size=2)
    pictures = make_pictures(tmp_path / "pictures", 16)
    arguments = compression(source, pictures, tmp_path / "out", "--reduction", 0.1)
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LIMITED, "400000000", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "Statistics ran out of memory with 8 images at once: once more with 4" in succeeded(done)
    load_checkpoint(tmp_path / "out")


SAVES = """
import sys
from pathlib import Path
from hf_vit_lowrank.checkpoint import load_checkpoint, save_checkpoint
model, processor, record = load_checkpoint(sys.argv[1])
for version in range(10_000):
    save_checkpoint(model, processor, sys.argv[2], record=record, card=str(version), overwrite=True)
    print(version, flush=True)
"""


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))])
def test_fault_16_killed_while_saving(seed, compressed, tmp_path):
    """Killed at a random moment, the folder is an old or a new checkpoint; both whole."""
    folder = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", SAVES, compressed, folder]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "0\n"
        time.sleep(random.Random(seed).uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        finished = ["0", *process.stdout.read().split()]
    if not folder.exists():  # between the two renames: the old one is in the folder beside it, whole
        (folder,) = tmp_path.glob(".out.*/old")
    load_checkpoint(folder)
    assert int((folder / "README.md").read_text()) in (int(finished[-1]), int(finished[-1]) + 1)


@pytest.fixture
def small_disk(tmp_path) -> Iterator:
    """Mounts file systems of a given size."""
    mounted = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("no file system can be mounted here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_fault_17_disk_full(source, pictures, small_disk):
    disk = small_disk("size=3m")
    said = failed(call(*compression(source, "never/looked/at", disk / "out")), 2)
    assert "has 3 MB free, but the checkpoint needs 4 MB" in said
    disk = small_disk("size=64m,nr_inodes=20")  # room for the bytes, not for all files of a second checkpoint
    succeeded(call(*compression(source, pictures, disk / "out")))
    before = content(disk / "out")
    said = failed(call(*compression(source, pictures, disk / "out", "--overwrite")), 1)
    assert "could not be written" in said
    assert "No space left on device" in said
    assert content(disk / "out") == before
    assert {path.name for path in disk.iterdir()} == {"out", ".out.run"}  # where the same command goes on
    subprocess.run(["mount", "-o", "remount,size=64m,nr_inodes=40", str(disk)], check=True)
    succeeded(call(*compression(source, pictures, disk / "out", "--overwrite")))
    assert content(disk / "out") == before


def test_fault_17_the_weights_are_counted_before_the_start(tmp_path, small_disk):
    large = make_source(tmp_path / "large", hidden_size=256, intermediate_size=512, num_hidden_layers=4)
    disk = small_disk("size=7m")  # the dense model has 9 MB
    options = ("--preset", "magnitude", "--reduction")
    said = failed(call(*compression(large, "never/looked/at", disk / "out", *options, 0.1)), 2)
    assert "MB free, but the checkpoint needs 12 MB" in said


def test_fault_17_what_a_run_keeps_is_counted_before_the_start(pictures, tmp_path, small_disk):
    wide = make_source(tmp_path / "wide", hidden_size=16, intermediate_size=1000)
    disk = small_disk("size=12m")
    said = failed(call(*compression(wide, pictures, disk / "out")), 2)
    assert "MB free, but the run, until it is done, needs" in said
    assert not list(disk.iterdir())


def test_fault_17_disk_that_may_only_be_read(source, small_disk):
    disk = small_disk("ro")
    said = failed(call(*compression(source, "never/looked/at", disk / "out")), 2)
    assert f"'{disk}' may not be written to" in said


def test_fault_18_output_is_the_source_or_not_empty(source, pictures, tmp_path):
    before = {path.name: path.stat().st_mtime_ns for path in source.iterdir()}
    assert "is the source" in failed(call(*compression(source, pictures, source, "--overwrite")), 2)
    assert "holds it" in failed(call(*compression(source, pictures, source.parent, "--overwrite")), 2)
    assert "lies in it" in failed(call(*compression(source, pictures, source / "small")), 2)
    assert {path.name: path.stat().st_mtime_ns for path in source.iterdir()} == before
    (tmp_path / "mine.txt").write_text("mine")
    below = tmp_path / "mine.txt" / "out"
    assert "lies below one: choose another folder" in failed(call(*compression(source, pictures, below)), 2)
    assert "is not empty: choose another folder" in failed(call(*compression(source, pictures, tmp_path)), 2)
    assert "holds mine.txt" in failed(call(*compression(source, pictures, tmp_path, "--overwrite")), 2)
    assert content(tmp_path) == {"mine.txt": b"mine"}


# -------------------------------------------------------------------------------------------------------- checkpoints


def test_fault_19_altered_or_truncated_safetensors(compressed, source, pictures, tmp_path):
    for name, damage in {
        "flipped": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        "cut": lambda data: data[:-9],
    }.items():
        folder = Path(shutil.copytree(compressed, tmp_path / name))
        weights = folder / "model.safetensors"
        weights.write_bytes(damage(weights.read_bytes()))
        evaluating = ("evaluate", folder, "--dataset", pictures, "--against", source)
        for command in (evaluating, ("report", folder, "--output", tmp_path / "page.html")):
            said = failed(call(*command), 2)
            assert f"model.safetensors of '{folder}' is not as it was saved (its sha256 differs)" in said


def test_fault_20_reloaded_model_has_the_small_size(compressed, source):
    stored = sum(tensor.numel() for tensor in load_file(compressed / "model.safetensors").values())
    model, _, record = load_checkpoint(compressed)
    assert stored == sum(parameter.numel() for parameter in model.parameters()) == record["parameters"]
    assert stored <= 0.6 * load_dense(str(source)).parameters


def _edit_config(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_fault_23_what_cannot_be_compressed_is_refused_by_name(source, compressed, copied, pictures, tmp_path):
    output = tmp_path / "out"
    assert "is already compressed" in failed(call(*compression(compressed, pictures, output)), 2)
    ViTModel(ViTConfig.from_pretrained(source)).save_pretrained(tmp_path / "encoder")
    said = failed(call(*compression(tmp_path / "encoder", pictures, output)), 2)
    assert "holds ViTModel; supported are ViTForImageClassification, DeiTForImageClassification" in said
    _edit_config(copied, quantization_config={"quant_method": "bitsandbytes"})
    assert "is quantised: compress the unquantised" in failed(call(*compression(copied, pictures, output)), 2)
    _edit_config(copied, quantization_config=None, problem_type="multi_label_classification")
    said = failed(call(*compression(copied, pictures, output)), 2)
    assert "does not choose one of several classes" in said
    _edit_config(copied, problem_type=None, id2label={"0": "price"}, label2id={"price": 0})
    assert "(1 labels, problem type not set)" in failed(call(*compression(copied, pictures, output)), 2)
    _edit_config(copied, architectures=["SwinForImageClassification"])
    assert "holds SwinForImageClassification; supported are" in failed(call(*compression(copied, pictures, output)), 2)
    assert not output.exists()


@pytest.mark.parametrize("preset", ["mixed-rank", *PRESETS])
def test_fault_24_impossible_size_names_the_smallest_before_any_image_is_read(preset, source, pictures, tmp_path):
    folder = Path(shutil.copytree(pictures, tmp_path / "pictures"))
    for picture in folder.iterdir():
        cut(picture)  # reading one would be another error
    wanted = ("--preset", preset, "--compensation", "none")
    said = failed(call(*compression(source, folder, tmp_path / "out", *wanted, "--reduction", 0.99)), 2)
    assert "cannot be reached: with the smallest sizes of this method the model still has" in said
    smallest = int(said.split("still has ")[1].split(";")[0].replace(",", ""))
    options = (*wanted, "--max-parameters", smallest)
    succeeded(call(*compression(source, pictures, tmp_path / "out", *options, "--samples", 8)))
    assert record_of(tmp_path / "out")["parameters"] <= smallest
    options = (*wanted, "--max-parameters", smallest - 1)
    assert f"still has {smallest:,};" in failed(call(*compression(source, folder, tmp_path / "no", *options)), 2)


def test_fault_24_the_smallest_native_size_can_be_reached(source, pictures, tmp_path):
    options = ("--native", "--compensation", "none", "--samples", 8)
    said = failed(call(*compression(source, pictures, tmp_path / "out", *options, "--max-parameters", 10)), 2)
    smallest = int(said.split("still has ")[1].split(";")[0].replace(",", ""))
    succeeded(call(*compression(source, pictures, tmp_path / "out", *options, "--max-parameters", smallest)))
    assert record_of(tmp_path / "out")["parameters"] == smallest


def test_fault_24_sizes_that_are_no_sizes(source, pictures, tmp_path):
    for size in (-0.5, 1.0, "nan"):
        said = failed(call(*compression(source, pictures, tmp_path / "out", "--reduction", size)), 2)
        assert f"reduction must be in [0, 1), not {size}" in said
    for options in (("--reduction", 0.999, "--cost", "flops"), ("--max-parameters", 10)):
        assert "ask for at least that" in failed(call(*compression(source, pictures, tmp_path / "out", *options)), 2)
    said = failed(call("sweep", source, "--calibration", pictures, "--reductions", "0.2,0.99", "--output", tmp_path), 2)
    assert "cannot be reached" in said


def test_fault_25_nothing_to_read(source, pictures, tmp_path):
    (tmp_path / "empty").mkdir()
    saved = datasets.Dataset.from_dict({"text": ["a"], "label": [1]})
    saved.save_to_disk(tmp_path / "text")
    datasets.DatasetDict(first=saved, second=saved).save_to_disk(tmp_path / "splits")
    datasets.Dataset.from_dict({"text": []}).to_parquet(tmp_path / "none.parquet")
    for location, options, message in (
        ("empty", (), "no image, no parquet file"),
        ("none.parquet", (), "has no images"),
        ("text", (), "no image column; name the image column among: text (string), label (int64)"),
        ("splits", ("--split", "third"), "there is no split 'third'; there are: first, second"),
        ("gone", (), "there is no such file or folder"),
    ):
        said = failed(call(*compression(source, tmp_path / location, tmp_path / "out", *options)), 2)
        assert message in said
        assert str(tmp_path / location) in said
    assert not (tmp_path / "out").exists()


def test_fault_26_same_seed_same_bytes(source, pictures, tmp_path):
    options = ("--seed", 3, "--samples", 16)
    for name in ("a", "b"):
        succeeded(call(*compression(source, pictures, tmp_path / name, *options)))
    assert content(tmp_path / "a") == content(tmp_path / "b")
    record = record_of(tmp_path / "a")
    assert (record["recipe"]["seed"], record["calibration"]["seed"]) == (3, 3)
    assert len(record["calibration"]["sha256"]) == 64  # of the images in their order
    succeeded(call(*compression(source, pictures, tmp_path / "c", *options, "--seed", 4)))
    assert record_of(tmp_path / "c")["calibration"]["sha256"] != record["calibration"]["sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["mixed-rank", *PRESETS])
def test_fault_26_same_bytes_in_another_process(preset, source, pictures, tmp_path):
    options = ("--preset", preset, "--compensation", "gradient", "--reduction", 0.2)
    for name in ("a", "b"):
        succeeded(run(*compression(source, pictures, tmp_path / name, *options)))
    assert content(tmp_path / "a") == content(tmp_path / "b")


# ----------------------------------------------------------------------------------------------------------- untrusted


class _Bomb:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_fault_27_code_and_pickle_of_the_source_never_run(source, copied, pictures, tmp_path):
    marker = tmp_path / "ran"
    (copied / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    names = ("AutoConfig", "AutoModel", "AutoModelForImageClassification")
    _edit_config(copied, auto_map=dict.fromkeys(names, "evil.Evil"))
    path = copied / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoImageProcessor": "evil.Evil"}}))
    torch.save(_Bomb(marker), copied / "pytorch_model.bin")
    succeeded(call(*compression(copied, pictures, tmp_path / "out")))
    succeeded(call("evaluate", copied, "--dataset", pictures, "--against", copied))
    succeeded(call(*compression(source, pictures, tmp_path / "as-small", "--match", copied)))
    assert not list((tmp_path / "out").glob("evil*"))
    assert "evil" not in (tmp_path / "out" / "config.json").read_text()
    # An index that names the pickle, which transformers would open.
    state = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").rename(copied / "other.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, "pytorch_model.bin")}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    for command in (compression(copied, pictures, tmp_path / "no"), ("evaluate", copied, "--dataset", pictures)):
        assert "names pytorch_model.bin, which is no .safetensors file beside it" in failed(call(*command), 2)
    for path in copied.glob("*.safetensors*"):
        path.unlink()
    said = failed(call(*compression(copied, pictures, tmp_path / "no")), 2)
    assert "has no .safetensors weights; convert them, or pass --allow-pickle" in said
    assert failed(call("evaluate", copied, "--dataset", pictures), 2)
    said = failed(call(*compression(copied, pictures, tmp_path / "no", "--allow-pickle")), 2)
    assert "hold more than tensors, which is never opened" in said
    assert not marker.exists()


def test_fault_28_path_tricks(source, copied, compressed, pictures, tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    everything = set(tmp_path.rglob("*"))
    for name in ("../../x", "/etc/x/y/z", "a/../../b", "owner/..", "file:///etc/passwd"):
        assert name in failed(call(*compression(name, pictures, inside / "out")), 2)
        assert name in failed(call(*compression(source, pictures, inside / "out", "--match", name)), 2)
        assert name in failed(call("evaluate", name, "--dataset", pictures), 2)
        assert name in failed(call(*compression(source, name, inside / "out")), 2)
    assert set(tmp_path.rglob("*")) == everything
    # A record that claims files outside of its folder does not get them deleted.
    folder = Path(shutil.copytree(compressed, inside / "out"))
    (inside / "mine.txt").write_text("mine")
    record = record_of(folder)
    record["files"]["../mine.txt"] = "0" * 64
    (folder / "compression.json").write_text(json.dumps(record))
    assert "which is no part of a checkpoint" in failed(call(*compression(source, pictures, folder, "--overwrite")), 2)
    assert (inside / "mine.txt").read_text() == "mine"
    # Nor does an index of weights reach out of its folder.
    state = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, "../outside.safetensors")}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    said = failed(call(*compression(copied, pictures, tmp_path / "no")), 2)
    assert "names ../outside.safetensors, which is no .safetensors file beside it" in said
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, "../outside.bin")}
    (copied / "model.safetensors.index.json").rename(copied / "pytorch_model.bin.index.json")
    (copied / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    torch.save(state, tmp_path / "outside.bin")
    said = failed(call(*compression(copied, pictures, tmp_path / "no", "--allow-pickle")), 2)
    assert "names ../outside.bin, which is no .bin file beside it" in said
