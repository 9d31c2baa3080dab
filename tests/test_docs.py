"""The pages in docs/ hold: their code runs, prints what they show, and their links and pictures exist."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import pyro
import pytest
import torch

import pyro_affine

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
API = sorted((ROOT / "docs" / "api").glob("*.md"))
LINKED = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# A mark, the code, and a text block right below it, which is what the code prints.
_BLOCK = re.compile(r"(<!-- [\w ]+ -->\n)?```python\n(.*?)```\n(?:\n(<!-- varies -->\n)?```text\n(.*?)```)?", re.DOTALL)
_STEPS = re.compile(r"num_steps=\d+")  # what a fit prints is marked as varying
_CELL = re.compile(r"```\{code-cell\} ipython3\n(?:%[^\n]*\n)?(.*?)```", re.DOTALL)
_ENTRY = re.compile(r"^\.\. auto(?:class|function|exception):: (\w+)$", re.MULTILINE)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


class Block(NamedTuple):
    source: str
    printed: str | None  # None where it is not shown, or differs between machines
    runs: bool


def blocks(text: str) -> list[Block]:
    found = []
    for mark, source, varies, printed in _BLOCK.findall(text):
        found.append(Block(source, None if varies or not printed else printed, "not run" not in mark))
    return found


def run(block: Block, names: dict[str, object], page: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(_STEPS.sub("num_steps=10", block.source), page, "exec"), names)
    return printed.getvalue()


CODED = [page for page in PAGES if any(block.runs for block in blocks(page.read_text()))]


@pytest.mark.parametrize("page", CODED, ids=lambda page: page.name)
def test_code_of_page_runs_and_prints_what_it_shows(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pyro.clear_param_store()
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for block in blocks(page.read_text()):
        if block.runs:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                printed = run(block, names, page.name)
            if block.printed is not None:
                assert printed == block.printed, block.source


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_tutorial_has_some_cells_and_its_imports_are_there(page):  # make docs runs them
    cells = [ast.parse(cell) for cell in _CELL.findall(page.read_text())]
    imports = [node for node in cells[0].body if isinstance(node, (ast.Import, ast.ImportFrom))]
    exec(compile(ast.Module(imports, []), page.name, "exec"), {})
    assert 10 <= len(cells) <= 20


def test_every_public_name_stands_on_one_api_page():
    named = [name for page in API for name in _ENTRY.findall(page.read_text())]
    assert sorted(named) == sorted(pyro_affine.__all__)


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_of_page_exist(page):
    links = [link for link in _LINK.findall(page.read_text()) if "://" not in link and not link.startswith("#")]
    missing = [link for link in links if not (page.parent / link.split("#")[0]).exists()]
    assert not missing


def test_blocks_are_read_with_their_marks_and_output():
    page = "```python\na\n```\n\n```text\n1\n```\n\n<!-- not run -->\n```python\nb\n```\n"
    page += "\n```python\nc\n```\n\n<!-- varies -->\n```text\n2\n```\n"
    assert blocks(page) == [Block("a\n", "1\n", True), Block("b\n", None, False), Block("c\n", None, True)]
