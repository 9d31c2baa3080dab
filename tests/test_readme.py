"""The README's examples run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pyro
import pytest
import torch

ROOT = Path(__file__).parent.parent
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("source", EXAMPLES, ids=["guide", "density"])
def test_example_of_readme_runs(source):
    pyro.clear_param_store()
    torch.manual_seed(0)
    names = {}
    exec(compile(source.replace("num_steps=1000", "num_steps=20"), "README.md", "exec"), names)
    if "posterior" in names:
        assert names["posterior"]["posterior"]["theta"].shape[-1] == 8
    else:
        assert names["ring"].log_prob(names["data"]).shape == (5000,)


def test_pictures_of_readme_exist():
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", (ROOT / "README.md").read_text())
    assert pictures and all((ROOT / picture).is_file() for picture in pictures)
