"""The README's examples run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pyro
import pytest
import torch

ROOT = Path(__file__).parent.parent
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("source", EXAMPLES, ids=["guide", "density", "simulations"])
def test_example_of_readme_runs(source):
    pyro.clear_param_store()
    torch.manual_seed(0)
    names = {}
    shorter = re.sub(r"num_steps=\d+", "num_steps=20", source.replace("=10_000", "=200, num_steps=20"))
    exec(compile(shorter, "README.md", "exec"), names)
    if "posterior" in names:
        assert names["posterior"]["posterior"]["theta"].shape[-1] == 8
    elif "ring" in names:
        assert names["ring"].log_prob(names["data"]).shape == (5000,)
    else:
        assert names["draws"].shape == (1000, 2)


def test_pictures_of_readme_exist():
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", (ROOT / "README.md").read_text())
    assert pictures and all((ROOT / picture).is_file() for picture in pictures)
