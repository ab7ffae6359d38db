"""Finding, decoding, ordering and preparing images; matching class names; the progress line."""

from __future__ import annotations

import io
import logging
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessorPil

from hf_vit_lowrank import image_sources, progress
from hf_vit_lowrank.errors import RunError, UserError
from hf_vit_lowrank.image_decoding import decode_image
from hf_vit_lowrank.images import open_images
from hf_vit_lowrank.labels import match_labels
from hf_vit_lowrank.pixels import load_image_processor, pixel_batches

DATA = Path(os.environ.get("HF_VIT_LOWRANK_DATA", Path(__file__).parents[2] / "shared" / "data"))
RED, GREEN, BLUE = (200, 30, 40), (51, 204, 51), (10, 40, 220)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # datasets 5 waits 5 seconds after each shuffled stream
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(shade: int) -> bytes:
    return encoded(Image.new("RGB", (4, 4), (shade, 0, 0)))


def shades(stream) -> list[int]:
    """The red values, which tell the pictures apart."""
    return [item.image.getpixel((0, 0))[0] for item in stream]


def dataset(count: int = 10, names=("cat", "dog"), broken=(), column: str = "image", label: str = "label"):
    columns = {
        column: [{"bytes": b"no image" if i in broken else picture(i), "path": f"{i}.png"} for i in range(count)],
        label: [i % len(names) for i in range(count)],
    }
    features = datasets.Features({column: datasets.Image(), label: datasets.ClassLabel(names=list(names))})
    return datasets.Dataset.from_dict(columns, features=features)


def parquet(folder: Path, name: str = "images.parquet", **options) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    dataset(**options).to_parquet(folder / name)
    return str(folder / name)


def image_folder(root: Path, *names: str) -> Path:
    for shade, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(shade))
    return root


# ------------------------------------------------------------------------------------------------------------ decoding


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (40, 20), RED)
    image.paste(BLUE, (20, 0, 40, 20))  # red left, blue right
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise: red on top
    upright = decode_image(encoded(image, "JPEG", exif=exif, quality=95))
    assert upright.size == (20, 40)
    assert np.allclose(upright.getpixel((10, 5)), RED, atol=8)
    assert np.allclose(upright.getpixel((10, 35)), BLUE, atol=8)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("CMYK", "JPEG"), ("P", "PNG"), ("P", "GIF"), ("RGBA", "PNG"), ("RGB", "WEBP"), ("RGB", "BMP")],
)
def test_every_colour_mode_becomes_rgb(mode, kind):
    image = decode_image(encoded(Image.new("RGB", (16, 16), GREEN).convert(mode), kind))
    assert image.mode == "RGB"
    assert np.allclose(image.getpixel((8, 8)), GREEN, atol=12)


def test_palette_with_transparency_becomes_rgb(recwarn):
    image = Image.new("RGB", (4, 4), GREEN).convert("P")
    decoded = decode_image(encoded(image, transparency=bytes([255] * 256)))
    assert decoded.mode == "RGB"
    assert np.allclose(decoded.getpixel((0, 0)), GREEN, atol=12)
    assert not recwarn.list


@pytest.mark.parametrize(("dtype", "value"), [(np.uint8, 100), (np.uint16, 100 * 257)])
def test_grayscale_of_8_and_16_bits_keeps_its_brightness(dtype, value):
    decoded = decode_image(encoded(Image.fromarray(np.full((4, 4), value, dtype))))
    assert decoded.mode == "RGB"
    assert decoded.getpixel((1, 1)) == (100, 100, 100)


# ------------------------------------------------------------------------------------------------------------- opening


def test_parquet_file_in_order_and_capped(tmp_path):
    stream = open_images(parquet(tmp_path), seed=None, samples=4)
    assert stream.length == 4
    assert stream.label_names == ["cat", "dog"]
    assert [(item.label, item.position) for item in stream] == [(0, 0), (1, 1), (0, 2), (1, 3)]
    assert shades(stream) == [0, 1, 2, 3]


@pytest.mark.parametrize("streamed", [False, True])
def test_same_seed_gives_the_same_images_in_the_same_order(tmp_path, monkeypatch, streamed):
    if streamed:
        monkeypatch.setattr(image_sources, "CACHE_LIMIT_BYTES", 0)
    location = parquet(tmp_path, count=40)
    stream = open_images(location, seed=1)
    first = shades(stream)
    first_hash = stream.sha256
    assert sorted(first) == list(range(40)) != first
    assert shades(stream) == first
    assert shades(open_images(location, seed=1)) == first
    assert stream.sha256 == first_hash
    other = open_images(location, seed=2)
    assert shades(other) != first
    assert other.sha256 != first_hash
    assert shades(open_images(location, seed=1, samples=7)) == first[:7]


def test_reading_in_order_leaves_nothing_in_the_cache(tmp_path):
    assert len(shades(open_images(parquet(tmp_path / "data"), seed=None))) == 10
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def test_parquet_folder_and_pattern_find_splits_by_file_name(tmp_path):
    folder = tmp_path / "odd [name] *"
    parquet(folder / "data", "train-00000-of-00002.parquet", count=6)
    parquet(folder / "data", "train-00001-of-00002.parquet", count=2)
    parquet(folder / "data", "val-00000-of-00001.parquet", count=3)
    assert open_images(folder).description["split"] == "train"
    assert open_images(folder).length == len(shades(open_images(folder))) == 8
    assert open_images(folder, seed=None).description["split"] == "validation"
    assert open_images(folder, split="val").length == len(shades(open_images(f"{folder}:validation"))) == 3
    parquet(tmp_path / "plain", "a.parquet", count=2)
    parquet(tmp_path / "plain", "b.parquet", count=3)
    assert open_images(f"{tmp_path}/plain/*.parquet").length == 5
    with pytest.raises(UserError, match="no split 'extra'; there are: train, validation"):
        open_images(folder, split="extra")
    with pytest.raises(UserError, match="no file fits"):
        open_images(f"{tmp_path}/none*.parquet")


def test_lone_file_answers_to_its_name_and_to_train(tmp_path):
    location = parquet(tmp_path, "validation.parquet")
    assert [open_images(location, split=split).length for split in (None, "validation", "train")] == [10, 10, 10]
    with pytest.raises(UserError, match="no split 'test'"):
        open_images(location, split="test")


def test_sub_folders_are_labels(tmp_path):
    # "bullet train" and "test" are classes here, which `datasets` itself would take for splits
    root = image_folder(tmp_path / "set", "bullet train/a.png", "cat/b.PNG", "cat/deep/c.png", "test/d.png")
    (root / "cat" / "notes.txt").write_text("no image")
    (root / "cat" / "._b.png").write_text("left by macOS")
    stream = open_images(root, seed=None)
    assert stream.label_names == ["bullet train", "cat", "test"]
    assert [(item.image.getpixel((0, 0))[0], item.label) for item in stream] == [(0, 0), (1, 1), (2, 1), (3, 2)]
    assert sorted(shades(open_images(root, seed=3))) == [0, 1, 2, 3]


def test_folders_called_like_splits_are_splits(tmp_path):
    root = image_folder(tmp_path / "set", "train/cat/a.png", "train/dog/b.png", "val/cat/c.png", "val/dog/d.png")
    assert shades(open_images(root)) in ([0, 1], [1, 0])
    stream = open_images(root, split="validation", seed=None)
    assert stream.label_names == ["cat", "dog"]
    assert shades(stream) == [2, 3]


def test_flat_folder_has_no_labels(tmp_path):
    stream = open_images(image_folder(tmp_path / "flat", "a.png", "b.png"))
    assert stream.label_names is None
    assert [item.label for item in stream] == [None, None]


def test_saved_data_sets(tmp_path):
    dataset(5).save_to_disk(tmp_path / "one")
    datasets.DatasetDict(fit=dataset(4), test=dataset(3)).save_to_disk(tmp_path / "two")
    datasets.DatasetDict(a=dataset(4), b=dataset(3)).save_to_disk(tmp_path / "unclear")
    assert len(shades(open_images(tmp_path / "one"))) == 5
    assert open_images(tmp_path / "two", seed=None).description["split"] == "test"
    with pytest.raises(UserError, match="name one of the splits: a, b"):
        open_images(tmp_path / "unclear")


def test_hub_data_set_is_streamed_and_shuffled_by_the_buffer(tmp_path, monkeypatch):
    asked = []

    def load_dataset(name, config, *, streaming):
        asked.append((name, config, streaming))
        return datasets.IterableDatasetDict(
            train=dataset(30).to_iterable_dataset(), test=dataset(4).to_iterable_dataset()
        )

    monkeypatch.setattr(image_sources, "load_dataset", load_dataset)
    stream = open_images("owner/name:train", config="small", shuffle_buffer=5, samples=12)
    seen = shades(stream)
    assert asked == [("owner/name", "small", True)]
    assert len(set(seen)) == 12
    assert seen != sorted(seen)
    assert all(shade < place + 5 for place, shade in enumerate(seen))  # the buffer reaches no further ahead
    assert shades(stream) == seen
    assert shades(open_images("owner/name", seed=None)) == [0, 1, 2, 3]
    with pytest.raises(UserError, match="no split 'validation'; there are: train, test"):
        open_images("owner/name", split="validation")
    with pytest.raises(UserError, match="names the split train, but test"):
        open_images("owner/name:train", split="test")


def test_stream_that_breaks_off_is_a_failed_run(monkeypatch):
    def rows():
        yield {"image": {"bytes": picture(0), "path": None}, "label": 0}
        raise ConnectionError("connection reset")

    data = datasets.IterableDataset.from_generator(rows, features=dataset().features)
    monkeypatch.setattr(image_sources, "load_dataset", lambda *_, **__: datasets.IterableDatasetDict(train=data))
    with pytest.raises(RunError, match=r"owner/name.*connection reset"):
        list(open_images("owner/name", seed=None))


def test_stream_that_does_not_declare_its_columns_is_looked_into(monkeypatch):
    def rows():
        for shade in range(3):
            yield {"image": {"bytes": picture(shade), "path": "a.png"}, "label": shade}

    data = datasets.IterableDataset.from_generator(rows)
    assert data.features is None
    monkeypatch.setattr(image_sources, "load_dataset", lambda *_, **__: datasets.IterableDatasetDict(train=data))
    stream = open_images("owner/name", seed=None)
    assert [(item.image.getpixel((0, 0))[0], item.label) for item in stream] == [(0, 0), (1, 1), (2, 2)]


def test_columns_are_found_or_named(tmp_path):
    both = dataset(2, column="photo").add_column("image", ["a", "b"]).add_column("other", [3, 4])
    both.save_to_disk(tmp_path / "both")
    assert open_images(tmp_path / "both").description["image_column"] == "photo"
    assert [item.label for item in open_images(tmp_path / "both", seed=None, label_column="other")] == [3, 4]
    with pytest.raises(
        UserError, match=r"image column 'label' holds no images; the columns are: photo \(Image\), label"
    ):
        open_images(tmp_path / "both", image_column="label")
    with pytest.raises(UserError, match="label column 'image' holds neither"):
        open_images(tmp_path / "both", label_column="image")
    dataset(2).remove_columns("image").save_to_disk(tmp_path / "none")
    with pytest.raises(UserError, match=r"no image column; .*label \(ClassLabel\)"):
        open_images(tmp_path / "none")
    twice = datasets.concatenate_datasets([dataset(2, column="a"), dataset(2, column="b", label="c")], axis=1)
    twice.save_to_disk(tmp_path / "twice")
    with pytest.raises(UserError, match="several image columns"):
        open_images(tmp_path / "twice")
    assert open_images(tmp_path / "twice", image_column="b").description["label_column"] == "label"


def test_parquet_written_without_datasets(tmp_path):
    import pandas

    frame = {"photo": [{"bytes": picture(7), "path": None}], "raw": [picture(8)], "label": [1]}
    pandas.DataFrame(frame).to_parquet(tmp_path / "plain.parquet")
    for seed in (None, 0):
        stream = open_images(tmp_path / "plain.parquet", seed=seed)
        assert stream.label_names is None
        assert [(item.image.getpixel((0, 0))[0], item.label) for item in stream] == [(7, 1)]
        assert shades(open_images(tmp_path / "plain.parquet", image_column="raw", seed=seed)) == [8]


def test_minus_one_means_no_label(tmp_path):
    dataset(2).remove_columns("label").add_column("label", [-1, 1]).save_to_disk(tmp_path / "set")
    assert [item.label for item in open_images(tmp_path / "set", seed=None)] == [None, 1]


def test_what_is_not_there_is_said(tmp_path, monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach the hub")

    for missing in (tmp_path / "missing", "./missing", "missing.parquet", "a/b/c"):
        with pytest.raises(UserError, match=r"'.*(missing|a/b/c).*': there is no such file or folder"):
            open_images(missing)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty': no image, no parquet file"):
        open_images(tmp_path / "empty")
    (tmp_path / "picture.png").write_bytes(picture(0))
    with pytest.raises(UserError, match="neither a folder nor a parquet file"):
        open_images(tmp_path / "picture.png")
    with pytest.raises(UserError, match="at least 1, not 0"):
        open_images(parquet(tmp_path), samples=0)
    with pytest.raises(UserError, match="leave config 'x' out"):
        open_images(parquet(tmp_path), config="x")
    monkeypatch.setattr(image_sources, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"'owner/missing' is no file or folder here.*Couldn't reach the hub"):
        open_images("owner/missing")


@pytest.mark.parametrize("seed", [None, 0])
def test_empty_and_damaged_parquet_files_are_refused(tmp_path, seed):
    with pytest.raises(UserError, match="has no images"):
        open_images(parquet(tmp_path / "none", count=0), seed=seed)
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(UserError, match=r"damaged.parquet': the parquet files cannot be read"):
        open_images(tmp_path / "damaged.parquet", seed=seed)


# ---------------------------------------------------------------------------------------------------- unreadable images


def test_one_broken_image_is_skipped_listed_and_replaced(tmp_path, caplog):
    stream = open_images(parquet(tmp_path, broken=[2]), seed=None, samples=5)
    with caplog.at_level(logging.WARNING):
        assert shades(stream) == [0, 1, 3, 4, 5]
    assert len(stream.skipped) == 1
    assert "image 2 (2.png): cannot identify image file" in stream.skipped[0]
    assert stream.skipped[0] in caplog.text
    assert shades(stream) == [0, 1, 3, 4, 5]
    assert len(stream.skipped) == 1


def test_a_broken_image_is_named_inside_its_folder(tmp_path):
    root = image_folder(tmp_path / "set", *(f"a/{place:03}.png" for place in range(5)))
    (root / "a" / "002.png").write_bytes(b"no image")
    stream = open_images(str(root), seed=None)
    list(stream)
    assert stream.skipped == ["image 2 (a/002.png): cannot identify image file"]


def test_truncated_jpeg_and_dangling_path_are_unreadable(tmp_path):
    root = image_folder(tmp_path / "set", *(f"{i:03}.png" for i in range(200)))
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    (root / "cut.jpg").write_bytes(encoded(Image.fromarray(noise), "JPEG")[:1500])
    (root / "dangling.jpg").symlink_to(tmp_path / "gone.jpg")
    stream = open_images(root)
    assert sorted(shades(stream)) == list(range(200))
    assert len(stream.skipped) == 2
    assert any("cut.jpg" in what and "truncated" in what for what in stream.skipped)
    assert any("dangling.jpg" in what and "No such file" in what for what in stream.skipped)


def test_more_than_one_percent_broken_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"2 images cannot be read \(more than 1% of 150\).*image 7 \(7.png\)"):
        list(open_images(parquet(tmp_path, count=150, broken=[7, 70]), seed=None))
    with pytest.raises(UserError, match="no image can be read"):
        list(open_images(parquet(tmp_path / "one", count=1, broken=[0])))


# -------------------------------------------------------------------------------------------------------------- pixels


def test_processor_is_the_checkpoints_own_with_pillow(tmp_path):
    ViTImageProcessorPil(size={"height": 20, "width": 30}, image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path)
    processor = load_image_processor(str(tmp_path))
    assert (list(processor.image_mean), dict(processor.size)) == ([0.1, 0.2, 0.3], {"height": 20, "width": 30})
    assert processor.backend == "pil"
    with pytest.raises(UserError, match=r"no usable image processor.*preprocessor_config.json"):
        load_image_processor(str(tmp_path / "elsewhere"))


def test_pixel_batches_keep_order_and_the_short_last_batch(tmp_path):
    processor = ViTImageProcessorPil(size={"height": 8, "width": 6}, image_mean=[0.0] * 3, image_std=[1.0] * 3)
    batches = list(pixel_batches(open_images(parquet(tmp_path), seed=None), processor, 4))
    assert [tuple(batch.pixel_values.shape) for batch in batches] == [(4, 3, 8, 6), (4, 3, 8, 6), (2, 3, 8, 6)]
    assert [position for batch in batches for position in batch.positions] == list(range(10))
    assert [label for batch in batches for label in batch.labels] == [0, 1] * 5
    pixels = torch.cat([batch.pixel_values for batch in batches])
    assert pixels.dtype == torch.float32
    assert torch.allclose(pixels[:, 0, 0, 0], torch.arange(10) / 255)
    gray = ViTImageProcessorPil(size={"height": 8, "width": 6}, image_mean=[0.5], image_std=[0.5])
    assert next(pixel_batches(open_images(parquet(tmp_path)), gray, 4)).pixel_values.shape == (4, 1, 8, 6)


def test_bad_pixels_are_refused(tmp_path):
    stream = open_images(image_folder(tmp_path / "set", "a.png", "b.png"), seed=None)
    with pytest.raises(UserError, match=r"image 0: .*NaN or infinite"):
        list(pixel_batches(stream, ViTImageProcessorPil(image_mean=[float("nan")] * 3), 2))
    (tmp_path / "set" / "b.png").write_bytes(encoded(Image.new("RGB", (9, 9))))
    with pytest.raises(UserError, match=r"images 0 to 1: .*one size"):
        list(pixel_batches(stream, ViTImageProcessorPil(do_resize=False), 2))


# -------------------------------------------------------------------------------------------------------------- labels


def test_labels_match_by_name_in_any_order():
    model = {0: "tench, Tinca tinca", 1: "Cardigan, Cardigan Welsh corgi", 2: "cardigan", 3: "Egyptian cat"}
    assert match_labels(["cardigan", "egyptian_cat", "tench", "Cardigan, Cardigan Welsh corgi"], model) == [2, 3, 0, 1]
    assert match_labels([" EGYPTIAN  cat"], model) == [3]


@pytest.mark.parametrize(
    ("names", "model", "complaint"),
    [
        (["cat", "wolf"], {0: "cat", 1: "dog"}, "'wolf'"),
        (["crane"], {0: "crane", 1: "crane"}, "'crane'"),  # two candidates
        (["Cat", "CAT"], {0: "cat", 1: "dog"}, "'Cat', 'CAT'"),  # one candidate for two
        (["n01440764", "n01443537"], {0: "LABEL_0", 1: "LABEL_1"}, "'LABEL_0'"),
    ],
)
def test_labels_without_a_match_of_their_own_are_refused(names, model, complaint):
    with pytest.raises(UserError, match=complaint):
        match_labels(names, model)


def test_imagenets_two_cranes_are_told_apart_by_position(caplog):
    names = [f"class {index}" for index in range(300)]
    model = dict(enumerate(names)) | {134: "crane", 217: "crane"}
    hub = names.copy()
    hub[134], hub[217] = "crane", "crane2"
    assert match_labels(hub, model) == list(range(300))
    assert "'crane2' as 'crane' (217)" in caplog.text
    other_order = [*hub[:2][::-1], *hub[2:]]
    with pytest.raises(UserError, match="'crane', 'crane2'"):
        match_labels(other_order, model)


# ------------------------------------------------------------------------------------------------------------ progress


def test_progress_in_a_log_is_one_line_and_quiet_is_none(capsys):
    assert list(progress.track([2, 3], "Reading", 5, size=lambda item: item)) == [2, 3]
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Reading: 5 images in ")
    assert err.count("\n") == 1
    with progress.quiet():
        assert list(progress.track([1], "Reading", 1)) == [1]
    assert capsys.readouterr().err == ""
    assert list(progress.track([1], "Reading", 1)) == [1]
    assert capsys.readouterr().err != ""


def test_progress_in_a_terminal_is_a_bar_with_rate(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert list(progress.track(range(4), "Reading", 4)) == [0, 1, 2, 3]
    err = capsys.readouterr().err
    assert "4/4" in err
    assert "images/s" in err


# ----------------------------------------------------------------------------------------------------------- real data


@pytest.mark.skipif(not (DATA / "validation.parquet").is_file(), reason="the measuring data are not here")
def test_twenty_real_images():
    stream = open_images(DATA / "validation.parquet", seed=None, samples=20)
    batches = list(pixel_batches(stream, load_image_processor(str(DATA / "deit-tiny")), 8))
    assert [tuple(batch.pixel_values.shape) for batch in batches] == [
        (8, 3, 224, 224),
        (8, 3, 224, 224),
        (4, 3, 224, 224),
    ]
    assert stream.label_names[0] == "tench, Tinca tinca"
    assert len({label for batch in batches for label in batch.labels}) > 1
