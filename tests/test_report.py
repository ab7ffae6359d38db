"""The page about a checkpoint: what it says, that text from outside stays text, and how it looks in a browser."""

from __future__ import annotations

import copy
import json
import re
import shlex
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt
from test_checkpoint import EVALUATION, RECORD

from hf_vit_lowrank import CompressionRecipe, compress
from hf_vit_lowrank.allocation import ErrorCurve, hull_corners
from hf_vit_lowrank.cli import app
from hf_vit_lowrank.errors import UserError
from hf_vit_lowrank.images import open_images
from hf_vit_lowrank.model_card import evaluation_record, model_card
from hf_vit_lowrank.report import measure, read_checkpoint, report_page
from tests.test_cli import call

EVIL = "<script>alert(1)</script>"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def checkpoint(digits_model, digits_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "small"
    recipe = CompressionRecipe(reduction=0.95, samples=128, rank_multiple=1)
    compress(str(digits_model), open_images(digits_data.calibration, samples=128), recipe).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stream(digits_data):
    return open_images(digits_data.validation, samples=200, seed=None)


@pytest.fixture(scope="module")
def evaluation(checkpoint, digits_model, stream):
    return measure(checkpoint, stream, against=str(digits_model), batch_size=50, device="cpu")


@pytest.fixture(scope="module")
def page(checkpoint, evaluation, stream):
    return report_page(*read_checkpoint(checkpoint), evaluation, stream)


def text_of(page: str) -> str:
    """What a reader sees, on one line."""
    words: list[str] = []
    parser = HTMLParser()
    parser.handle_data = words.append  # type: ignore[method-assign]
    parser.feed(page[page.index("<body>") :])
    return " ".join(" ".join(words).split())


def test_the_record_holds_each_curve_with_the_size_that_the_plan_has(checkpoint):
    record, _ = read_checkpoint(checkpoint)
    curves, plan = record["error_curves"], record["plan"]
    assert [curve["chosen"] for curve in curves["query_key"]] == list(map(sum, plan["query_key_ranks"]))
    assert [curve["chosen"] for curve in curves["value_output"]] == list(map(sum, plan["value_output_ranks"]))
    assert [curve["chosen"] for curve in curves["mlp_width"]] == plan["mlp_widths"]
    for curve in curves["mlp_width"]:
        assert curve["chosen"] in curve["sizes"]
        assert len(curve["sizes"]) == len(curve["errors"]) <= 13
        assert curve["errors"] == sorted(curve["errors"], reverse=True)
        assert curve["sizes"][-1] == 256


def test_hull_corners_leave_out_what_lies_above_a_chord():
    import numpy as np

    assert hull_corners(ErrorCurve(np.array([9.0, 8.0, 7.9, 2.0, 0.0]), 1)) == [1, 3, 4]


def test_compensation_lowers_the_drift_behind_the_last_block(checkpoint):
    drift = read_checkpoint(checkpoint)[0]["drift"]
    assert len(drift["before"]) == len(drift["after"]) == 3
    assert 0 < drift["after"][-1] < drift["before"][-1]


def test_disagreements_are_those_of_the_two_models(evaluation, checkpoint, digits_model, stream):
    import torch

    from hf_vit_lowrank.evaluation import load_classifier
    from hf_vit_lowrank.pixels import pixel_batches

    (small, processor), (dense, _) = load_classifier(str(checkpoint)), load_classifier(str(digits_model))
    pixels = torch.cat([batch.pixel_values for batch in pixel_batches(stream, processor, 50)])
    with torch.no_grad():
        ours, theirs = (model(pixel_values=pixels).logits.argmax(-1) for model in (small, dense))
    names = small.config.id2label
    different = [
        (index, names[int(theirs[index])], names[int(ours[index])]) for index in (ours != theirs).nonzero().flatten()
    ]
    found = [(each["image"], each["dense"], each["compressed"]) for each in evaluation["disagreements"]]
    assert found == [(int(index), *answers) for index, *answers in different[:24]]
    assert len(different) == round(200 * (1 - evaluation["agreement"] / 100)) > 0


def test_the_page_shows_what_was_measured(page, checkpoint, evaluation):
    text = text_of(page)
    record, _ = read_checkpoint(checkpoint)
    assert f"{evaluation['top1']:.2f} %" in text
    assert f"{evaluation['against']['top1']:.2f} %" in text
    assert f"{record['drift']['after'][0]:.3g}" in text
    assert page.count("<td") == 2 * 3 * 4
    assert page.count('class="dot"') <= 3 * 3
    assert page.count("<polyline") == 3 * 3
    assert page.count("data:image/png;base64,") == len(evaluation["disagreements"])
    assert "Not shown" not in text


def test_the_page_needs_nothing_from_outside(page):
    addresses = re.findall(r"(?:src|href|data|action)\s*=\s*[\"']?([^\"'\s>]+)|url\(([^)]+)\)|@import", page)
    assert addresses
    assert all(source.startswith("data:image/") for source, _ in addresses)
    assert "<script" not in page
    assert "default-src 'none'" in page


def test_without_measurements_the_page_says_how_to_get_them(checkpoint):
    record, config = read_checkpoint(checkpoint)
    text = text_of(report_page(record, config))
    assert "Not shown: accuracy and agreement." in text
    assert "Not shown: time for an image." in text
    assert "--against" in text
    old = {name: value for name, value in record.items() if name not in ("error_curves", "drift")}
    text = text_of(report_page(old, config))
    assert "Not shown: error curves. Compress again" in text
    assert "Not shown: loss by block. Compress again" in text


def test_accuracies_of_the_card_are_shown_without_measuring_again(checkpoint, evaluation):
    record, config = read_checkpoint(checkpoint)
    text = text_of(report_page({**record, "evaluation": evaluation_record(evaluation)}, config))
    assert f"{evaluation['top1']:.2f} %" in text
    assert "Not shown: accuracy" not in text
    assert "Not shown: time for an image." in text


def test_names_from_outside_stay_text(checkpoint, evaluation, stream):
    assert EVIL in text_of(evil_page(checkpoint, evaluation, stream))
    assert "<script" not in evil_page(checkpoint, evaluation, stream)


def evil_page(checkpoint, evaluation, stream) -> str:
    record, config = read_checkpoint(checkpoint)
    record = copy.deepcopy(record)
    record["source"]["location"] = f"org/{EVIL}"
    evaluation = copy.deepcopy(evaluation)
    for each in evaluation["disagreements"]:
        each["label"] = each["dense"] = EVIL
    return report_page(record, config, evaluation, stream)


def test_the_command_on_the_page_is_one_that_makes_the_checkpoint(checkpoint, page):
    """The command line takes it, and comes to the same recipe."""
    record, _ = read_checkpoint(checkpoint)
    command = text_of(
        re.search(r"<pre>hf-vit-lowrank compress.*?</pre>", f"<body>{page}", re.S)[0].join(["<body>", ""])
    )
    words = shlex.split(command)
    assert words[:3] == ["hf-vit-lowrank", "compress", record["source"]["location"]]
    options = dict(zip(words[3::2], words[4::2], strict=True))
    assert options["--reduction"] == "0.95"
    assert options["--samples"] == "128"
    assert options["--calibration"] == record["calibration"]["location"]
    known = {name for parameter in typer_options("compress") for name in parameter.opts}
    assert set(options) <= known


def typer_options(command: str):
    import typer

    return typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]


def test_factored_presets_show_the_ranks_of_their_weights(digits_model, digits_data, tmp_path):
    recipe = CompressionRecipe(reduction=0.4, samples=32, preset="svd")
    compress(str(digits_model), open_images(digits_data.calibration, samples=32), recipe).save_pretrained(
        tmp_path / "x"
    )
    text = text_of(report_page(*read_checkpoint(tmp_path / "x")))
    assert "Ranks of the factored weights" in text
    assert "Not shown: error curves." in text


def test_report_command_writes_the_page_and_figures(checkpoint, tmp_path):
    page, figures = tmp_path / "page.html", tmp_path / "figures.json"
    done = call("report", checkpoint, "--output", page, "--json", figures)
    assert done.returncode == 0, done.stderr
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert json.loads(figures.read_text())["evaluation"] is None
    again = call("report", checkpoint, "--output", page)
    assert again.returncode == 2
    assert "--overwrite" in again.stderr
    assert call("report", checkpoint, "--output", page, "--overwrite").returncode == 0


def test_report_refuses_what_it_cannot_use(tmp_path, digits_model):
    done = call("report", digits_model, "--output", tmp_path / "page.html")
    assert done.returncode == 2
    assert "compression.json" in done.stderr
    assert call("report", tmp_path, "--against", digits_model, "--output", tmp_path / "page.html").returncode == 2
    assert not (tmp_path / "page.html").exists()
    with pytest.raises(UserError, match="no checkpoint folder"):
        read_checkpoint(tmp_path)


# ------------------------------------------------------------------------------------------------------- in the browser


def browse(*arguments: object) -> str:
    """What Chromium prints; every host name leads nowhere."""
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ]
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_the_window_and_runs_nothing(width, checkpoint, evaluation, stream, tmp_path):
    """A frame of that width holds the page; the frame's own script reports what does not fit."""
    (tmp_path / "page.html").write_text(evil_page(checkpoint, evaluation, stream), encoding="utf-8")
    (tmp_path / "frame.html").write_text(
        f"""<iframe src="page.html" style="width:{width}px;height:900px;border:0"></iframe><pre id="out"></pre><script>
        onload = () => {{
          const page = document.querySelector("iframe").contentDocument, root = page.documentElement;
          const loaded = [...page.images].every(image => image.complete && image.naturalWidth > 0);
          const wide = [...page.querySelectorAll("body *")].filter(
            one => !one.closest("svg") && one.getBoundingClientRect().right > root.clientWidth + 1);
          document.getElementById("out").textContent = JSON.stringify({{
            scroll: root.scrollWidth, client: root.clientWidth, loaded, wide: wide.length, images: page.images.length,
            scripts: page.scripts.length, title: page.title,
            requests: page.defaultView.performance.getEntriesByType("resource")
              .map(one => one.name).filter(name => !name.startsWith("data:")) }});
        }}</script>"""
    )
    dom = browse(
        "--allow-file-access-from-files",
        f"--window-size={width + 40},1000",
        "--virtual-time-budget=5000",
        "--dump-dom",
        (tmp_path / "frame.html").as_uri(),
    )
    found = json.loads(text_of("<body>" + dom[dom.index('<pre id="out">') :].split("</pre>")[0]))
    assert found["client"] == found["scroll"] == width
    assert found["wide"] == found["scripts"] == 0
    assert found["requests"] == []
    assert found["loaded"]
    assert found["images"] == len(evaluation["disagreements"])
    assert found["title"].startswith(f"{EVIL.rsplit('/', 1)[-1]}, 85")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_light_and_dark_are_two_pictures(page, tmp_path):
    from PIL import Image, ImageStat

    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    brightness = []
    for scheme in (1, 0):
        picture = tmp_path / f"{scheme}.png"
        browse(
            f"--blink-settings=preferredColorScheme={scheme}",
            "--window-size=390,1500",
            f"--screenshot={picture}",
            (tmp_path / "page.html").as_uri(),
        )
        brightness.append(ImageStat.Stat(Image.open(picture).convert("L")).median[0])
    assert brightness[0] > 220
    assert brightness[1] < 60


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_the_card_runs_nothing_where_its_markdown_is_shown_with_html(tmp_path):
    record = {
        **RECORD,
        "source": {**RECORD["source"], "location": EVIL, "revision": EVIL},
        "calibration": {"location": EVIL, "split": EVIL},
        "evaluation": {**EVALUATION, "data": {"location": EVIL}},
        "versions": {EVIL: EVIL},
    }
    body = model_card(record).split("\n---\n", 1)[1]
    own = "<p id='ran'></p><script>document.getElementById('ran').textContent = document.scripts.length</script>"
    shown = MarkdownIt("commonmark", {"html": True}).enable("table").render(body)
    (tmp_path / "card.html").write_text(f"<!DOCTYPE html><meta charset='utf-8'>{shown}{own}", encoding="utf-8")
    dom = browse("--dump-dom", (tmp_path / "card.html").as_uri())
    assert re.search(r'<p id="ran">(\d+)</p>', dom).group(1) == "1"  # that script alone
    assert "alert(1)" in dom
