"""The notebooks in examples/ hold: they are valid, store no output, install the package first, and their code runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyro
import pytest
import torch

FOLDER = Path(__file__).parent.parent / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

# So that they run in seconds: fewer steps and draws.
_SMALLER = {
    r"num_steps=\d+": "num_steps=10",
    r"num_samples=\d+": "num_samples=5",
    r"warmup_steps=\d+": "warmup_steps=5",
}

_KEYS = {
    "code": {"cell_type", "id", "metadata", "source", "execution_count", "outputs"},
    "markdown": {"cell_type", "id", "metadata", "source"},
}


def code_cells(path: Path) -> list[str]:
    cells = json.loads(path.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def smaller(source: str) -> str:
    """Without magics, and with smaller numbers."""
    lines = [line for line in source.splitlines() if not line.startswith("%")]
    source = "\n".join(lines)
    for pattern, replacement in _SMALLER.items():
        source = re.sub(pattern, replacement, source)
    return source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_valid_and_stores_no_output(path):
    notebook = json.loads(path.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[\w-]{1,64}", name) for name in ids)
    for cell in notebook["cells"]:
        assert set(cell) == _KEYS[cell["cell_type"]]
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_installs_the_package_first(path):
    assert re.fullmatch(r'%pip install -q "\.\./\.\.\[[\w,]+\]"', code_cells(path)[0].strip())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_code_of_notebook_runs(path, tmp_path, monkeypatch):
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    pyro.clear_param_store()
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "__main__"}
    for number, source in enumerate(code_cells(path)):
        exec(compile(smaller(source), f"{path.name}, code cell {number}", "exec"), names)
    assert list(tmp_path.glob("*.pt"))


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} >= {"eight_schools", "density"}
