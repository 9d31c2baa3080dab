"""Fits by several processes: their shares, how they find each other, and that two give what one gives."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyro_affine.distributed as distributed
from pyro_affine.distributed import ALONE, Processes, joined
from pyro_affine.stopping import Budget
from pyro_affine.trained_weights import Weights

ROOT = Path(__file__).parent.parent
NUM_PROPERTIES = 27  # that distributed_fits.py prints


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork, which this system lacks")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs a torch with torch.distributed")
def test_two_processes_fit_what_one_fits(tmp_path: Path) -> None:
    script = Path(__file__).with_name("distributed_fits.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, env=environment)
    lines = run.stdout.splitlines()
    assert [line for line in lines if not line.endswith(": kept")] == []
    assert len(lines) == NUM_PROPERTIES, run.stderr


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("number", [0, 1, 5, 64])
def test_shares_are_even_and_cover_all(size: int, number: int) -> None:
    shares = [list(range(number))[Processes(rank, size).share(number)] for rank in range(size)]
    assert list(itertools.chain(*shares)) == list(range(number))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


LAUNCHED = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("environment", "many"),
    [
        ({}, False),
        (LAUNCHED, True),
        ({**LAUNCHED, "WORLD_SIZE": "1"}, False),
        ({"WORLD_SIZE": "2"}, False),  # as other launchers set it
    ],
    ids=["plain", "torchrun", "torchrun with one process", "a size alone"],
)
def test_processes_are_found_by_what_torchrun_sets(
    environment: dict[str, str], many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    met = Processes(0, 2)
    monkeypatch.setattr(distributed, "_meet", lambda: met)
    monkeypatch.setattr(met, "clock", lambda: 0.0)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    with joined() as processes:
        assert processes is (met if many else ALONE)


def test_one_process_gives_back_what_it_gets() -> None:
    parameter = torch.ones(2, requires_grad=True)
    state = torch.get_rng_state()
    ALONE.align(Weights({"w": parameter}))
    value = torch.ones(2)
    assert ALONE.from_first(value) is value and ALONE.gathered(value) is value
    assert ALONE.seed(None) is None and ALONE.agree(object())
    assert torch.equal(state, torch.get_rng_state())


def test_a_budget_goes_by_the_clock_that_it_is_given() -> None:
    clock = iter([10.0, 12.0, 20.0])
    budget = Budget(seconds=10.0, clock=lambda: next(clock))
    budget.tick()
    assert budget.elapsed == 2.0
    budget.tick()
    assert budget.exhausted
