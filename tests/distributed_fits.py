"""Fits by two processes, run by ``test_distributed.py`` in a process of its own.

The process loads torch once and forks: two children for each case, which meet as those of ``torchrun`` do, at a store
that their parent holds on a free port. Prints one line for each property, "kept" or what came instead.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from pyro_affine import ActNorm, AutoRealNVP, NormalizingFlow, fit_density, fit_guide, real_nvp
from pyro_affine.checkpoint import read_checkpoint
from pyro_affine.compose import ComposeFlow
from pyro_affine.density_task import DensityTask
from pyro_affine.distributed import LostProcessError
from pyro_affine.guide_task import GuideTask

Case = Callable[[int, Path], Any]
ROWS = torch.randn(301, 3, generator=torch.Generator().manual_seed(0)).double() * 2 + 1


# ---- processes


def run(case: Case, folder: Path, size: int = 2) -> list[Any]:
    """What a case returns in each process, or the error that it raises; None where a process ends without a word."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    results = [folder / f"{case.__name__} {rank} of {size}.pt" for rank in range(size)]
    children = []
    for rank, result in enumerate(results):
        children.append(os.fork())
        if children[-1] == 0:
            if size > 1:
                place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
                numbers = {"RANK": rank, "WORLD_SIZE": size}
                os.environ.update({name: str(value) for name, value in {**place, **numbers}.items()})
            run_child(case, rank, folder, result)
    for child in children:
        os.waitpid(child, 0)
    return [torch.load(result, weights_only=False) if result.exists() else None for result in results]


def run_child(case: Case, rank: int, folder: Path, result: Path) -> None:
    torch.manual_seed(rank)
    try:
        outcome = case(rank, folder)
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    torch.save(outcome, result)
    os._exit(0)


def say(name: str, kept: bool, *found: object) -> None:
    print(f"{name}: {'kept' if kept else ' | '.join(map(str, found)) or 'broken'}", flush=True)


def equal(some: list[Tensor], others: list[Tensor], tolerance: float = 0.0) -> bool:
    pairs = zip(some, others, strict=True)
    return len(some) > 0 and all(torch.allclose(a, b, rtol=0, atol=tolerance, equal_nan=True) for a, b in pairs)


# ---- densities


def density(rank: int, data: Any = ROWS, **options: Any) -> list[Tensor]:
    """Histories and weights of a fit; permutations, weights and the start of the ActNorm are of the process."""
    flow = NormalizingFlow(
        ComposeFlow([ActNorm(3), real_nvp(3, num_layers=4, hidden_dims=(8,), seed=rank)]), 3
    ).double()
    options = {"num_steps": 12, "batch_size": 70, "learning_rate": 0.01, "optimizer": torch.optim.SGD, **options}
    fit = fit_density(flow, data, **{"seed": 0, "progress": False, "warmup": 0, **options})
    histories = [fit.losses, fit.gradient_norms, fit.validation_losses, [fit.best]]
    return [*map(torch.tensor, histories), *(t.detach().double() for t in flow.state_dict().values())]


def plain_rows(rank: int, folder: Path) -> list[Tensor]:
    return density(rank)


def unseeded_rows(rank: int, folder: Path) -> list[Tensor]:
    return density(rank, seed=None, num_steps=3)


def whole_loader(rank: int, folder: Path) -> list[Tensor]:
    """Its last batch has one row."""
    return density(rank, DataLoader(TensorDataset(ROWS), batch_size=50, shuffle=True), validation=ROWS[:20])


class Recorder(nn.Module):
    """A Gaussian that remembers what it was trained on, uses up random numbers, and may stumble at a call."""

    def __init__(self, stumbles: dict[int, Callable[[], float]] | None = None) -> None:
        super().__init__()
        self.event_shape = torch.Size([3])
        self.loc = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.seen: list[Tensor] = []
        self.stumbles = stumbles or {}

    def log_prob(self, value: Tensor) -> Tensor:
        log_prob = torch.distributions.Normal(self.loc, 2.0).log_prob(value).sum(-1)
        if not self.training:
            return log_prob
        self.seen.append(value)
        torch.rand(len(value))
        return log_prob + self.stumbles.get(len(self.seen), float)()


def recorded(loader: DataLoader[Any], num_steps: int) -> list[Tensor]:
    flow = Recorder()
    options = {"optimizer": torch.optim.SGD, "learning_rate": 0.1, "progress": False, "seed": 0}
    fit_density(flow, loader, validation=None, num_steps=num_steps, **options)
    return [*flow.seen, flow.loc.detach()]


def split_loader(rank: int, folder: Path) -> list[Tensor]:
    return recorded(DataLoader(TensorDataset(ROWS), batch_size=50, shuffle=True), 14)


def own_loader(rank: int, folder: Path) -> list[Tensor]:
    sampler = DistributedSampler(ROWS, num_replicas=2, rank=rank, seed=0)  # 151 rows each, one of them twice
    return recorded(DataLoader(TensorDataset(ROWS), batch_size=50, sampler=sampler), 8)


def check_density(folder: Path) -> None:
    pair, (alone,) = run(plain_rows, folder), run(plain_rows, folder, 1)
    say("losses, gradients and weights are those of one process", equal(pair[0], alone, 1e-6), pair[0], alone)
    say("processes end with the same weights bit for bit", equal(*pair), *pair)
    pair = run(unseeded_rows, folder)
    say("without a seed, processes end with the same weights too", equal(*pair), *pair)
    pair, (alone,) = run(whole_loader, folder), run(whole_loader, folder, 1)
    say("a loader's batches are split, as if one process had them", equal(pair[0], alone, 1e-6), pair[0], alone)
    for case in (split_loader, own_loader):
        pair = run(case, folder)
        half = (len(pair[0]) - 1) // 2
        epochs = [torch.cat([*pair[0][part], *pair[1][part]]) for part in (slice(half), slice(half, 2 * half))]
        sizes = [(len(epoch), len(epoch.unique(dim=0))) for epoch in epochs]
        # one row is there twice: the single row of a last batch with weight 0, or what a DistributedSampler adds
        whole = sizes == [(302, 301)] * 2 and equal(pair[0][-1:], pair[1][-1:])
        say(f"{case.__name__}: each epoch has all rows", whole, sizes)
        say(f"{case.__name__}: each epoch has another order", not torch.equal(*epochs))


# ---- guides


def normals() -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z.sum(), 1.0), obs=torch.tensor(3.0))


@contextmanager
def recorded_losses() -> Iterator[list[float]]:
    original, local = GuideTask.loss, []

    def loss(task: GuideTask) -> Tensor:
        value = original(task)
        local.append(value.item())
        return value

    GuideTask.loss = loss
    yield local
    GuideTask.loss = original


def guide(**options: Any) -> tuple[Any, list[Tensor]]:
    guide = AutoRealNVP(normals, num_layers=2, hidden_dims=(8,))
    options = {"num_steps": 12, "evaluate_every": 5, "seed": 0, "progress": False, **options}
    fit = fit_guide(normals, guide, **options)
    return fit, [p.detach() for p in guide.parameters()]


def guide_by_steps(rank: int, folder: Path) -> list[Tensor]:
    with recorded_losses() as local:
        fit, weights = guide()
    return [torch.tensor(local[-12:]), torch.tensor(fit.losses), torch.tensor([fit.best]), *weights]


def guide_by_clock(rank: int, folder: Path) -> list[Tensor]:
    readings = itertools.count()
    time.perf_counter = lambda: (0.01 + 0.04 * rank) * next(readings)  # the second clock is five times as fast
    fit, weights = guide(num_steps=None, seconds=1.0, checkpoint=folder / f"clock {rank}.ckpt")
    return [torch.tensor(fit.times), torch.tensor([fit.num_steps]), *weights]


def stopped_guide(rank: int, folder: Path) -> list[Tensor]:
    """A fit that is stopped after seven of twelve steps, and goes on."""
    path, take = folder / "guide.ckpt", GuideTask.prepare
    if rank == 1:
        GuideTask.prepare = lambda task: stop() if task._num_prepared == 7 else take(task)
    try:
        guide(checkpoint=path)
    except (LostProcessError, ZeroDivisionError):
        GuideTask.prepare = take
    return guide(checkpoint=path)[1]


def stop() -> None:
    raise ZeroDivisionError("no more")


def check_guide(folder: Path) -> None:
    pair = run(guide_by_steps, folder)
    (one, *first), (other, *second) = pair
    say("guides end alike, with the same losses", equal(first, second), first, second)
    say("each process has draws of its own", not any(a == b for a, b in zip(one, other, strict=True)), one, other)
    say("losses of guides are means over processes", equal([(one + other) / 2], first[:1], 1e-5), one, other, first[0])
    stopped = run(stopped_guide, folder)
    say("a stopped fit of a guide goes on bit for bit", equal(stopped[0], first[2:]), stopped, first)
    pair = run(guide_by_clock, folder)
    say("the clock of the first process decides", equal(*pair) and len(pair[0][0]) > 9, pair)
    written = [(folder / f"clock {rank}.ckpt").exists() for rank in range(2)]
    say("the first process alone writes checkpoints", written == [True, False], written)


# ---- failures


def stumbling(rank: int, folder: Path) -> tuple[int, int, list[Tensor]]:
    """The second process has one loss that is not finite and one refused row."""

    def refuse() -> float:
        raise ValueError("refused")

    flow = Recorder({3: lambda: float("nan"), 5: refuse} if rank else {})
    fit = fit_density(flow, ROWS, num_steps=10, seed=0, progress=False)
    return fit.num_nonfinite, fit.num_steps, [flow.loc.detach()]


def uninterrupted(rank: int, folder: Path) -> list[Tensor]:
    return density(rank, num_steps=15)


def resumed_after_error(rank: int, folder: Path) -> list[Tensor]:
    return density(rank, num_steps=15, checkpoint=folder / "error.ckpt")


def resumed_after_kill(rank: int, folder: Path) -> list[Tensor]:
    return density(rank, num_steps=15, checkpoint=folder / "kill.ckpt")


def failing(rank: int, path: Path, fail: Callable[[], None]) -> str:
    """How processes take it that the second one fails at the ninth loss, and lives on until the first has ended."""
    original = DensityTask.loss
    if rank == 1:
        DensityTask.loss = lambda task: fail() if task._num_prepared == 9 else original(task)
    try:
        density(rank, num_steps=15, checkpoint=path, every=3)
    except LostProcessError as error:
        return str(error)
    except KeyError:
        return "outlived" if comes(path.parent / "with_error 0 of 2.pt") else "kept waiting"
    return "nothing happened"


def comes(path: Path, seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.05)
    return path.exists()


def with_error(rank: int, folder: Path) -> str:
    def fail() -> None:
        raise KeyError("of the model")

    return failing(rank, folder / "error.ckpt", fail)


def with_kill(rank: int, folder: Path) -> str:
    return failing(rank, folder / "kill.ckpt", lambda: os._exit(1))


def other_architecture(rank: int, folder: Path) -> None:
    fit_density(NormalizingFlow(real_nvp(3, num_layers=2 + rank), 3), ROWS.float(), num_steps=2, progress=False)


def other_arguments(rank: int, folder: Path) -> None:
    density(rank, num_steps=2 + rank)


def check_failures(folder: Path) -> None:
    pair = run(stumbling, folder)
    say("a step that one process cannot take is skipped by all", pair[0][:2] == (2, 10), pair)
    say("weights stay the same after skipped steps", equal(pair[0][2], pair[1][2]), pair)
    (alone,) = run(uninterrupted, folder, 1)
    for failure, word, end, resumed in (
        (with_error, "process 1 of 2 ended with KeyError: 'of the model'", "outlived", resumed_after_error),
        (with_kill, "process 1 of 2 ended without a word", None, resumed_after_kill),
    ):
        first, second = run(failure, folder)
        say(f"{failure.__name__}: the other process ends and says so", word in first and second == end, first, second)
        path = folder / f"{failure.__name__.removeprefix('with_')}.ckpt"
        step = (read_checkpoint(path) or {"budget": {"step": None}})["budget"]["step"]
        say(f"{failure.__name__}: the checkpoint is of the last whole step", step == 8, step)
        size = 1 if failure is with_kill else 2
        again = run(resumed, folder, size)[0]
        say(f"{failure.__name__}: the fit goes on with {size}", equal(again, alone, 1e-6), again, alone)
    for case, word in (
        (other_architecture, "the same architecture"),
        (other_arguments, "num_steps: 3, where process 0"),
    ):
        first, second = run(case, folder)
        kept = word in str(second) and "process 1 of 2 ended with ValueError" in str(first)
        say(f"{case.__name__} are refused", kept, first, second)


# ---- groups that the user made


def own_group(rank: int, folder: Path) -> list[Tensor]:
    """Two fits and a model of the user's, in a group of theirs; warnings come from the first process alone."""
    meeting = f"file://{folder / 'meeting'}"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loader = DataLoader(TensorDataset(ROWS), batch_size=50)
        density(rank, loader, validation=0.1, num_steps=2)  # a loader has no share to hold out: a warning
    torch.manual_seed(rank)
    results = density(rank)
    flow = NormalizingFlow(real_nvp(3, num_layers=2, hidden_dims=(8,)), 3).double()
    parallel = DistributedDataParallel(flow)
    parallel().log_prob(ROWS[:300][rank::2]).mean().backward()
    gradients = [p.grad for p in flow.parameters() if p.grad is not None]
    same = NormalizingFlow(real_nvp(3, num_layers=2, hidden_dims=(8,)), 3).double()
    same.load_state_dict(flow.state_dict())
    same.log_prob(ROWS[:300]).mean().backward()
    expected = [p.grad for p in same.parameters() if p.grad is not None]
    right = len(gradients) > 5 and equal(gradients, expected, 1e-9)
    torch.distributed.destroy_process_group()
    return [torch.tensor([float(len(caught))]), torch.tensor([float(right)]), *results]


def check_groups(folder: Path) -> None:
    pair, (alone,) = run(own_group, folder), run(plain_rows, folder, 1)
    say("a fit in a group of the user's is the same", equal(pair[0][2:], alone, 1e-6), pair[0], alone)
    say("warnings come once", [int(result[0]) for result in pair] == [1, 0], pair[0][0], pair[1][0])
    say("DistributedDataParallel around a flow has the right gradient", all(bool(result[1]) for result in pair))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    density(0, num_steps=1)  # torch and Pyro load parts of themselves at a first fit: once here, not in every child
    guide(num_steps=1)
    for check in (check_density, check_guide, check_failures, check_groups):
        check(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
