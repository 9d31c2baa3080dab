"""Fits that are killed again and again, run by ``test_checkpoint.py`` in a process of its own.

The process loads torch once and forks: each child runs the same call, and is killed by SIGKILL at a random moment, or
by itself in the middle of a checkpoint write. When one gets through, its final weights are compared with those of a fit
that was never killed. Prints one line for each way of dying.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoMultivariateNormal

import pyro_affine.checkpoint as checkpoint
from pyro_affine.fit import fit_guide
from pyro_affine.fit_density import fit_density
from pyro_affine.flows import NormalizingFlow, real_nvp

Fit = Callable[[Path | None], list[torch.Tensor]]
STEPS, EVERY = 40, 6
MOST_KILLS = 4


def model() -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", 6, subsample_size=3) as index:
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=torch.arange(6.0)[index])


def guide_weights(path: Path | None) -> list[torch.Tensor]:
    guide = AutoMultivariateNormal(model)
    fit_guide(
        model,
        guide,
        num_steps=STEPS,
        num_particles=4,
        evaluate_every=20,
        seed=0,
        progress=False,
        checkpoint=path,
        every=EVERY,
    )
    return list(guide.parameters())


def flow_weights(path: Path | None) -> list[torch.Tensor]:
    torch.manual_seed(1)
    flow = NormalizingFlow(real_nvp(2, num_layers=2, hidden_dims=(8,)), 2)
    data = torch.randn(300, 2) * 3 + 1
    fit_density(flow, data, num_steps=STEPS, batch_size=64, seed=0, progress=False, checkpoint=path, every=EVERY)
    return [*flow.parameters(), *flow.buffers()]


def loader_weights(path: Path | None) -> list[torch.Tensor]:
    torch.manual_seed(1)
    flow = NormalizingFlow(real_nvp(2, num_layers=2, hidden_dims=(8,)), 2)
    rows = torch.randn(300, 2) * 3 + 1
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows), batch_size=64, shuffle=True)
    options = {"seed": 0, "progress": False, "every": EVERY}
    fit_density(flow, loader, validation=rows[:50], num_steps=STEPS, checkpoint=path, **options)
    return [*flow.parameters(), *flow.buffers()]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_writing(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content[: len(content) // 2])
        file.flush()
        os.fsync(file.fileno())
    die()


def die_at(call: int, replaced: Callable[..., None], original: Callable[..., None]) -> Callable[..., None]:
    calls = [0]

    def counting(*args: object) -> None:
        calls[0] += 1
        (replaced if calls[0] == call else original)(*args)

    return counting


def arm(way: str, call: int) -> None:
    """Prepare this process to kill itself at the nth write."""
    if way == "while writing":
        checkpoint._write_through = die_at(call, die_writing, checkpoint._write_through)
    if way == "between the renames":  # the first write has one rename, the others have two
        os.replace = die_at(2 * call - 1, lambda *_: die(), os.replace)


def run_child(fit: Fit, path: Path, out: Path, way: str, *, call: int, seconds: float | None) -> bool:
    """Run one child, which dies on its own or after some seconds or not at all; whether it got through."""
    child = os.fork()
    if child == 0:
        arm(way, call)
        torch.save([w.detach().clone() for w in fit(path)], out)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1] == 0


def check(name: str, fit: Fit, way: str, folder: Path, *, duration: float) -> None:
    """Kill a fit a few times, let it get through, and compare."""
    path, out = folder / f"{name} {way}.ckpt", folder / f"{name} {way}.pt"
    generator = random.Random(0)
    for kills in range(MOST_KILLS + 1):
        last = kills == MOST_KILLS
        seconds = generator.uniform(0.1, 0.6) * duration if way == "at a random moment" and not last else None
        if run_child(fit, path, out, "" if last else way, call=generator.choice([2, 3]), seconds=seconds):
            break
    expected, actual = torch.load(folder / f"{name} never.pt"), torch.load(out)
    same = len(expected) == len(actual) > 0 and all(map(torch.equal, expected, actual))
    print(f"{name} killed {way}: {kills} kills, {'same' if same else 'OTHER'} weights", flush=True)


def main(folder: Path) -> None:
    """Each fit killed at random moments, one of them also in the middle of its writes."""
    torch.set_num_threads(1)
    flow_weights(None)  # torch loads parts of itself at the first step: once here, not in every child
    for name, fit in {"guide": guide_weights, "flow": flow_weights, "loader": loader_weights}.items():
        start = time.perf_counter()
        run_child(fit, folder / f"{name}.ckpt", folder / f"{name} never.pt", "", call=0, seconds=None)
        duration = time.perf_counter() - start
        writes = ("while writing", "between the renames") if name == "guide" else ()
        for way in ("at a random moment", *writes):
            check(name, fit, way, folder, duration=duration)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
