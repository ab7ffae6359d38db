"""The notebook runs from its first cell to its last, on the digits."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "scripts" / "notebook.ipynb"


@pytest.mark.slow
def test_the_notebook_runs(digits_model, digits_data, tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    values = {
        "SOURCE": digits_model,
        "CALIBRATION": digits_data.calibration,
        "DATASET": digits_data.validation,
        "OUTPUT": tmp_path / "small",
        "SAMPLES": 128,
    }
    for name, value in values.items():
        monkeypatch.setenv(f"HF_VIT_LOWRANK_{name}", str(value))
    monkeypatch.delenv("HF_VIT_LOWRANK_REPOSITORY", raising=False)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    before, after = (int(number.replace(",", "")) for number in re.findall(r"([\d,]{5,}) (?:parameters|after)", text))
    assert after <= 0.4 * before
    assert float(re.search(r"top-1: ([\d.]+) %", text)[1]) > 80
    assert "Nothing was pushed" in text
    assert any("&lt;h2&gt;Ranks&lt;/h2&gt;" in output.get("data", {}).get("text/html", "") for output in outputs)
    assert (tmp_path / "small" / "model.safetensors").is_file()


def test_the_notebook_is_saved_without_outputs():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
