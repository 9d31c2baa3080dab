"""Checkpoint files: whole or absent, checked before they are read, and good to resume from after any death."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pyro_affine import checkpoint
from pyro_affine.checkpoint import check_same, fingerprint, previous_path, read_checkpoint, write_checkpoint
from pyro_affine.fit_density import fit_density

ROOT = Path(__file__).resolve().parent.parent
STATE = {"weights": {"a": torch.arange(1000.0)}, "step": 3, "names": ["x", "y"], "none": None, "value": float("inf")}


class Gaussian(nn.Module):
    """Diagonal Gaussian of a few entries."""

    def __init__(self, size: int = 2) -> None:
        super().__init__()
        self.loc, self.log_scale = nn.Parameter(torch.zeros(size)), nn.Parameter(torch.zeros(size))

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        return torch.distributions.Normal(self.loc, self.log_scale.exp()).log_prob(value).sum(-1)


def fit(path: Path, size: int = 2, **options: Any) -> Gaussian:
    flow = Gaussian(size)
    data = torch.randn(200, size, generator=torch.Generator().manual_seed(0)) + 3
    options = {"num_steps": 40, "seed": 0, "progress": False, "checkpoint": path, "every": 10, **options}
    fit_density(flow, data, **options)
    return flow


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert write_checkpoint(tmp_path / "a.ckpt", STATE)
    state = read_checkpoint(tmp_path / "a.ckpt")
    assert state is not None
    assert torch.equal(state.pop("weights")["a"], STATE["weights"]["a"])
    assert state == {name: value for name, value in STATE.items() if name != "weights"}
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


def test_no_file_is_no_error(tmp_path: Path) -> None:
    assert read_checkpoint(tmp_path / "a.ckpt") is None


def test_the_one_before_is_kept_and_read_when_the_newest_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    for step in range(3):
        write_checkpoint(path, {"step": step})
    assert read_checkpoint(path) == {"step": 2}
    path.unlink()
    assert read_checkpoint(path) == {"step": 1}


def flip(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut in the first line": lambda content: content[:10],
    "cut in the digest": lambda content: content[:50],
    "cut in half": lambda content: content[: len(content) // 2],
    "last byte missing": lambda content: content[:-1],
    "a byte more": lambda content: content + b"x",
    "bit flipped in a tensor": lambda content: flip(content, len(content) // 2),
    "bit flipped at the end": lambda content: flip(content, len(content) - 30),
    "bit flipped in the digest": lambda content: flip(content, 40),
    "another kind of file": lambda content: b"PK\x03\x04 something else",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_seen_and_nothing_is_changed(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    write_checkpoint(path, {**STATE, "step": 1})
    write_checkpoint(path, {**STATE, "step": 2})
    path.write_bytes(damage(path.read_bytes()))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(
        ValueError, match=r"a\.ckpt is (damaged|not a checkpoint).*a\.ckpt\.previous, is whole: rename it"
    ):
        read_checkpoint(path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    previous_path(path).replace(path)
    state = read_checkpoint(path)
    assert state is not None and state["step"] == 1


def test_damage_without_a_file_before_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="Move the file away to start from the beginning"):
        read_checkpoint(tmp_path / "a.ckpt")


def test_a_file_can_not_run_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "broken in"),)

    write_checkpoint(tmp_path / "a.ckpt", {"evil": Evil()})
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        read_checkpoint(tmp_path / "a.ckpt")
    assert not (tmp_path / "broken in").exists()


def test_differences_are_named() -> None:
    saved = fingerprint({"a": torch.zeros(2), "gone": torch.zeros(1), "b": torch.zeros(3)})
    here = fingerprint({"a": torch.zeros(2), "b": torch.zeros(3, dtype=torch.float64), "new": torch.zeros(())})
    with pytest.raises(ValueError, match="architecture must be the same") as error:
        check_same("a.ckpt", "architecture", saved, here)
    message = str(error.value)
    assert "b: float32 (3,) in the file, float64 (3,) here" in message
    assert "gone: float32 (1,) in the file, absent here" in message
    assert "new: absent in the file, float32 () here" in message
    assert " a:" not in message
    check_same("a.ckpt", "architecture", saved, dict(saved))


# ---- a disk that refuses


def no_space(path: Path, content: bytes) -> None:
    path.write_bytes(content[: len(content) // 2])
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_costs_a_warning_and_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.ckpt"
    write_checkpoint(path, {"step": 1})
    monkeypatch.setattr(checkpoint, "_write_through", no_space)
    with pytest.warns(RuntimeWarning, match=r"was not written \(.*No space left on device\); training goes on"):
        assert not write_checkpoint(path, {"step": 2})
    assert read_checkpoint(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


def test_training_goes_on_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = fit(tmp_path / "whole.ckpt")
    monkeypatch.setattr(checkpoint, "_write_through", no_space)
    with pytest.warns(RuntimeWarning, match="training goes on"):
        flow = fit(tmp_path / "full.ckpt")
    assert torch.equal(flow.loc, expected.loc)
    assert not (tmp_path / "full.ckpt").exists()


LIMITED = """
import resource, sys, warnings
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from test_checkpoint import fit, read_checkpoint
path = Path(sys.argv[1])
expected = fit(path.with_name("whole.ckpt"))
fit(path, num_steps=40)
kept = path.read_bytes()
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    flow = fit(path.with_name("limited.ckpt"))
print(len(caught), "File too large" in str(caught[0].message), bool((flow.loc == expected.loc).all()))
print(path.read_bytes() == kept, sorted(p.name for p in path.parent.iterdir()))
"""


@pytest.mark.skipif(os.name != "posix", reason="needs a file-size limit, which only POSIX systems have")
def test_a_real_limit_on_file_size_is_survived(tmp_path: Path) -> None:
    script = LIMITED.format(root=str(ROOT), tests=str(ROOT / "tests"))
    command = [sys.executable, "-c", script, str(tmp_path / "a.ckpt")]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[0] == "4 True True"
    names = ["a.ckpt", "a.ckpt.previous", "whole.ckpt", "whole.ckpt.previous"]
    assert lines[1] == f"True {names}"


# ---- resuming


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork, which this system lacks")
def test_killed_fits_resume_to_the_same_weights_bit_for_bit(tmp_path: Path) -> None:
    script = Path(__file__).with_name("killed_fits.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    run = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, env=environment)
    lines = run.stdout.splitlines()
    assert len(lines) == 5, run.stderr
    assert all(line.endswith("same weights") for line in lines), run.stdout
    assert all(" 0 kills" not in line for line in lines if "random" not in line), run.stdout


def test_a_damaged_file_stops_the_fit_before_it_begins(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    fit(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged or cut short"):
        fit(path)
    previous_path(path).replace(path)
    fit(path)


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    fit(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"loc: float32 \(2,\) in the file, float32 \(3,\) here"):
        fit(tmp_path / "a.ckpt", size=3)


def test_a_missing_folder_is_made(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(tmp_path / "new" / "folder" / "a.ckpt")
    assert (tmp_path / "new" / "folder" / "a.ckpt").exists()
