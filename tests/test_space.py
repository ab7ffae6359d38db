"""A Space is a folder that runs with gradio, torch and transformers, without this package."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets import load_dataset
from huggingface_hub import RepoCard
from packaging.requirements import Requirement
from packaging.version import Version

from hf_vit_lowrank import CompressionRecipe, compress
from hf_vit_lowrank.checkpoint import RECORD
from hf_vit_lowrank.errors import UserError
from hf_vit_lowrank.images import open_images
from hf_vit_lowrank.space import GRADIO_VERSION, REQUIREMENTS, write_space
from tests.test_cli import call

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
# No other host is reached from the page, which asks for fonts.
NOWHERE_ELSE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"


@pytest.fixture(scope="module")
def checkpoint(digits_model, digits_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("space") / "small"
    recipe = CompressionRecipe(reduction=0.5, samples=64)
    compress(str(digits_model), open_images(digits_data.calibration, samples=64), recipe).save_pretrained(folder)
    return folder


def test_a_space_of_two_folders_is_whole(checkpoint, digits_model, tmp_path):
    output, folder = tmp_path / "space", tmp_path / "small"
    shutil.copytree(checkpoint, folder)
    (folder / ".env").write_text("HF_TOKEN=mine")
    done = call("space", folder, "--dense", digits_model, "--output", output)
    assert done.returncode == 0, done.stderr
    names = {path.name for path in output.iterdir()}
    assert names == {"app.py", "models.json", "requirements.txt", "README.md", "dense", "compressed"}
    assert json.loads((output / "models.json").read_text()) == [
        {"title": "Dense", "folder": "dense"},
        {"title": "Compressed", "folder": "compressed"},
    ]
    assert {path.name for path in (output / "compressed").iterdir()} == {path.name for path in checkpoint.iterdir()}
    assert {path.name for path in (output / "dense").iterdir()} == {
        "config.json", "preprocessor_config.json", "model.safetensors",
    }  # fmt: skip
    card = RepoCard.load(output / "README.md", ignore_metadata_errors=False).data
    assert (card.sdk, card.sdk_version, card.app_file) == ("gradio", GRADIO_VERSION, "app.py")
    assert "hf_vit_lowrank" not in (output / "app.py").read_text()


def test_a_model_of_the_hub_is_named_with_its_commit(checkpoint, tmp_path, monkeypatch):
    record = json.loads((checkpoint / RECORD).read_text())
    record["source"] |= {
        "location": "google/vit-base-patch16-224",
        "revision": "3f49326eb077187dfe1c2a2bb15fbd74e6ab91e3",
    }
    (tmp_path / "small").mkdir()
    for file in checkpoint.iterdir():
        (tmp_path / "small" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "small" / RECORD).write_text(json.dumps(record))
    dense, _ = write_space(str(tmp_path / "small"), tmp_path / "space")
    assert dense == {
        "title": "Dense",
        "repository": "google/vit-base-patch16-224",
        "revision": "3f49326eb077187dfe1c2a2bb15fbd74e6ab91e3",
    }
    card = RepoCard.load(tmp_path / "space" / "README.md").data
    assert card.models == ["google/vit-base-patch16-224"]
    monkeypatch.setattr("hf_vit_lowrank.space.local_folder", lambda *_: (tmp_path, "newest"))
    dense, _ = write_space(str(checkpoint), tmp_path / "space", dense="org/dense")
    assert dense == {"title": "Dense", "repository": "org/dense", "revision": "newest"}


def test_bad_sources_are_one_sentence(checkpoint, digits_model, tmp_path):
    with pytest.raises(UserError, match="--dense"):
        write_space(str(checkpoint), tmp_path / "space")
    with pytest.raises(UserError, match="no checkpoint folder"):
        write_space(str(digits_model), tmp_path / "space")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        write_space("nobody/nothing", tmp_path / "space")
    with pytest.raises(UserError, match="'nobody/nothing' is no folder here"):
        write_space(str(checkpoint), tmp_path / "space", dense="nobody/nothing")
    with pytest.raises(UserError, match="no safetensors"):
        write_space(str(checkpoint), tmp_path / "space", dense=str(tmp_path))
    done = call("space", checkpoint, "--dense", digits_model, "--output", checkpoint, "--overwrite")
    assert done.returncode == 2
    assert "never written to" in done.stderr


def test_requirements_are_those_of_the_package():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert set(REQUIREMENTS) <= set(project["dependencies"])
    (gradio,) = map(Requirement, project["optional-dependencies"]["space"])
    assert gradio.specifier.contains(Version(GRADIO_VERSION))


@pytest.fixture(scope="module")
def address(checkpoint, digits_model, tmp_path_factory):
    """Of a Space that runs."""
    pytest.importorskip("gradio")
    folder = tmp_path_factory.mktemp("running")
    write_space(str(checkpoint), folder / "space", dense=str(digits_model))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False"}
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "app.py"], cwd=folder / "space", env=environment, stdout=log, stderr=log
        )
    try:
        wait_for(port, server, folder / "log")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture
def digit(digits_data, tmp_path):
    """A picture's file and its class."""
    row = load_dataset("parquet", data_files=str(digits_data.validation), split="train")[0]
    row["image"].save(tmp_path / "digit.png")
    return str(tmp_path / "digit.png"), DIGITS[row["label"]]


@pytest.mark.slow
def test_the_space_answers(address, digit):
    from gradio_client import Client, handle_file

    dense, dense_line, small, small_line = Client(address, verbose=False).predict(
        handle_file(digit[0]), api_name="/classify"
    )
    assert dense["label"] == small["label"] == digit[1]
    assert len(dense["confidences"]) == len(small["confidences"]) == 5
    assert [parameters_in(line) for line in (dense_line, small_line)] == [0.16, 0.08]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None or CHROMEDRIVER is None, reason="no chromium and chromedriver")
def test_both_answers_are_on_the_page(address, digit, tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless", "--no-sandbox", f"--user-data-dir={tmp_path / 'profile'}", NOWHERE_ELSE):
        options.add_argument(argument)
    page = webdriver.Chrome(options, webdriver.ChromeService(CHROMEDRIVER))
    try:
        wait = WebDriverWait(page, 60)
        page.get(address)
        wait.until(lambda _: page.find_elements("css selector", "input[type=file]"))[0].send_keys(digit[0])
        wait.until(lambda _: page.find_elements("css selector", "img[src*='/file=']"))
        page.find_element("xpath", "//button[normalize-space()='Classify']").click()
        body = page.find_element("tag name", "body")
        wait.until(lambda _: body.text.count(" ms · ") == 2)
        lines = body.text.splitlines()
    finally:
        page.quit()
    for title, parameters in (("Dense", 0.16), ("Compressed", 0.08)):
        answer = lines[lines.index(title) + 1 :]
        assert answer[0] == answer[1] == digit[1]  # the headline, then the first of five names, each with its share
        assert len({*answer[1:11:2]} & {*DIGITS}) == 5
        assert all(share.endswith("%") for share in answer[2:11:2])
        assert parameters_in(answer[11]) == parameters


def parameters_in(line: str) -> float:
    """Millions, in "3 ms · 0.16 M parameters · 0.64 MB"."""
    milliseconds, parameters, size = line.split(" · ")
    assert milliseconds.endswith(" ms")
    assert size.endswith(" MB")
    return float(parameters.removesuffix(" M parameters"))


def wait_for(port: int, server: subprocess.Popen, log: Path) -> None:
    for _ in range(180):
        assert server.poll() is None, log.read_text()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(1)
    raise AssertionError(log.read_text())
