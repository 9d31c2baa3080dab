"""Torch's random state: seeded blocks that leave it as it was, and copies for checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def _devices() -> list[int]:
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Run a block from a seed and put the random state back after it; with None, do neither.

    >>> before = torch.get_rng_state()
    >>> with seeded(0):
    ...     torch.rand(1)
    tensor([0.4963])
    >>> torch.equal(before, torch.get_rng_state())
    True
    """
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=_devices()):
        torch.manual_seed(seed)
        yield


def random_state() -> dict[str, Any]:
    """A copy of torch's random state, of the CPU and of each CUDA device in use."""
    return {"cpu": torch.get_rng_state(), "cuda": [torch.cuda.get_rng_state(i) for i in _devices()]}


def set_random_state(state: dict[str, Any]) -> None:
    """Put back a copy made by ``random_state``."""
    torch.set_rng_state(state["cpu"])
    for device, device_state in zip(_devices(), state["cuda"], strict=False):
        torch.cuda.set_rng_state(device_state, device)


def new_seed() -> int:
    """A seed drawn from torch's random state."""
    return int(torch.randint(2**62, (), device="cpu").item())
