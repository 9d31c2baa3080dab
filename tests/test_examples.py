"""Each example runs in smoke mode, as a newcomer would start it, and writes the files that it names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(script, tmp_path):
    command = [sys.executable, str(script), "--smoke", "--output", str(tmp_path / "files")]
    environment = {**os.environ, "MPLBACKEND": "Agg"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    written = run.stdout.partition("written: ")[2].strip().split(", ")
    assert written != [""] and all(Path(path).stat().st_size > 0 for path in written)
