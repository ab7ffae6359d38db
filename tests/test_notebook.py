"""The notebook runs on the digits, from a model of the (test) hub to a pushed checkpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hub_server import WRITE, serve

NOTEBOOK = Path(__file__).parents[1] / "scripts" / "notebook.ipynb"


@pytest.mark.slow
def test_the_notebook_runs(digits_model, digits_data, tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with serve() as hub:
        hub.make("org/digits").add("main", {file.name: file.read_bytes() for file in digits_model.iterdir()})
        values = {
            "HF_VIT_LOWRANK_SOURCE": "org/digits",
            "HF_VIT_LOWRANK_CALIBRATION": digits_data.calibration,
            "HF_VIT_LOWRANK_DATASET": digits_data.validation,
            "HF_VIT_LOWRANK_REPOSITORY": "org/digits-lowrank60",
            "HF_VIT_LOWRANK_OUTPUT": tmp_path / "small",
            "HF_VIT_LOWRANK_SAMPLES": 128,
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": 0,
            "HF_HUB_DISABLE_XET": 1,
            "HF_HOME": tmp_path / "cache",
            "HF_TOKEN": WRITE,
            "IPYTHONDIR": tmp_path / "ipython",
        }
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))
        nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    before, after = (int(number.replace(",", "")) for number in re.findall(r"([\d,]{5,}) (?:parameters|after)", text))
    assert after <= 0.4 * before
    assert float(re.search(r"top-1: ([\d.]+) %", text)[1]) > 80
    assert any("&lt;h2&gt;Ranks&lt;/h2&gt;" in output.get("data", {}).get("text/html", "") for output in outputs)
    pushed = hub.repositories["org/digits-lowrank60"].head()
    assert all(
        pushed[file.name] == file.read_bytes() for file in (tmp_path / "small").iterdir() if file.suffix != ".md"
    )
    assert {"model.safetensors", "README.md"} <= pushed.keys()


def test_the_notebook_is_saved_without_outputs():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
