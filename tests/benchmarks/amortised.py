"""Amortised posteriors beside exact draws: classifier two-sample test, time, and the bar on a conjugate model.

    python tests/benchmarks/amortised.py                                  # everything: an hour on one core
    python tests/benchmarks/amortised.py --budgets 1000 --tasks "two moons"
    python tests/benchmarks/amortised.py --conjugate                      # the conjugate model alone
    python tests/benchmarks/amortised.py --rounds                         # rounds near the data beside one for all

A row: task, method, simulations, C2ST over the data sets (median, least to greatest; 0.5 is perfect, 1 is told apart
always), seconds of training. ``sbi`` takes part if it is installed. "MAF" has its published defaults (five masked
autoregressive transforms of 50 hidden units, Adam at 5e-4, batches of 200, an end after 20 epochs without a better
held-out score) on flows of zuko, and stands in where it is not.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import math
import statistics
import time
import warnings
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from amortised_tasks import TASKS, Task
from torch import Tensor

from pyro_affine import DeepSets, NeuralPosterior, Simulations, fit_posterior, fit_posterior_at

Sampler = Callable[[int, Tensor], Tensor]


def ours(task: Task, npe: NeuralPosterior, simulations: Simulations, seed: int) -> Sampler:
    """``fit_posterior`` at its defaults."""
    fit_posterior(npe, simulations=simulations, seed=seed, progress=False)

    def sample(n: int, y: Tensor) -> Tensor:
        return _theta(task, npe.condition({"y": y}).sample(n, seed=seed))

    return sample


def maf(task: Task, npe: NeuralPosterior, simulations: Simulations, seed: int) -> Sampler:
    """Masked autoregressive flow on z-scored latents and data; draws outside the prior are drawn again."""
    import zuko

    torch.manual_seed(seed)
    theta, y = _theta(task, simulations.latents), simulations.data["y"].flatten(1)
    units = [(x.mean(0), x.std(0).clamp(min=1e-6)) for x in (theta, y)]
    z, c = ((x - loc) / scale for x, (loc, scale) in zip((theta, y), units, strict=True))
    flow = zuko.flows.MAF(z.shape[1], c.shape[1], transforms=5, hidden_features=(50, 50))
    _train_with_patience(flow, z, c)

    @torch.no_grad()
    def sample(n: int, y: Tensor) -> Tensor:
        context = (y.flatten() - units[1][0]) / units[1][1]
        draws = flow(context).sample((20 * n,)) * units[0][1] + units[0][0]
        return draws[task.prior.support.check(draws)][:n]

    return sample


def _train_with_patience(flow: torch.nn.Module, z: Tensor, c: Tensor) -> None:
    held_out = max(len(z) // 10, 1)
    optimizer = torch.optim.Adam(flow.parameters(), lr=5e-4)
    best, waited, kept = math.inf, 0, copy.deepcopy(flow.state_dict())
    while waited < 20:
        for index in (held_out + torch.randperm(len(z) - held_out)).split(200):
            optimizer.zero_grad()
            loss = -flow(c[index]).log_prob(z[index]).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
            optimizer.step()
        with torch.no_grad():
            score = float(-flow(c[:held_out]).log_prob(z[:held_out]).mean())
        best, waited, kept = (score, 0, copy.deepcopy(flow.state_dict())) if score < best else (best, waited + 1, kept)
    flow.load_state_dict(kept)


def sbi_npe(task: Task, npe: NeuralPosterior, simulations: Simulations, seed: int) -> Sampler:
    """NPE of sbi at its defaults."""
    from sbi.inference import NPE

    torch.manual_seed(seed)
    trainer = NPE(prior=task.prior, show_progress_bars=False)
    trainer.append_simulations(_theta(task, simulations.latents), simulations.data["y"].flatten(1)).train()
    posterior = trainer.build_posterior()
    return lambda n, y: posterior.sample((n,), x=y.flatten(), show_progress_bars=False)


METHODS = {"ours": ours, "MAF": maf, "sbi": sbi_npe}


def c2st(first: Tensor, second: Tensor, seed: int = 0) -> float:
    """Accuracy of a network of two hidden layers that tells draws apart, over five folds."""
    from sklearn.model_selection import cross_val_score
    from sklearn.neural_network import MLPClassifier

    width = 10 * first.shape[1]
    both = torch.cat([(first - second.mean(0)) / second.std(0), (second - second.mean(0)) / second.std(0)])
    labels = torch.arange(2).repeat_interleave(torch.tensor([len(first), len(second)]))
    network = MLPClassifier((width, width), max_iter=300, early_stopping=True, n_iter_no_change=20, random_state=seed)
    order = torch.randperm(len(both), generator=torch.Generator().manual_seed(seed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = cross_val_score(network, both[order].double().numpy(), labels[order].numpy(), cv=5)
    return float(scores.mean())


def run(name: str, method: str, *, budget: int, num_datasets: int, num_draws: int, seed: int) -> None:
    """Train one method on one task, and print a row."""
    task = TASKS[name]
    torch.manual_seed(seed)
    npe = NeuralPosterior(task.model, ["y"], latents=task.latents)
    simulations = npe.simulate(budget, seed=seed)
    data = npe.simulate(num_datasets, seed=1000).data["y"]  # the same for all methods and budgets
    start = time.process_time()
    sample = METHODS[method](task, npe, simulations, seed)
    seconds = time.process_time() - start
    torch.manual_seed(seed + 1)
    scores = [c2st(sample(num_draws, y), task.reference(num_draws, y)) for y in data]
    numbers = f"{statistics.median(scores):.3f} ({min(scores):.3f} to {max(scores):.3f})"
    print(f"| {name} | {method} | {budget} | {numbers} | {seconds:.0f} |", flush=True)


def conjugate(budget: int, *, sets: bool, num_steps: int | None, seed: int) -> None:
    """Errors of mean and standard deviation over 200 data sets of a Gaussian model, in exact standard deviations."""
    budgeted = {} if num_steps is None else {"num_steps": num_steps}

    def model() -> None:
        loc = pyro.sample("loc", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("rows", 5):
            pyro.sample("y", dist.Normal(loc, 1.0).to_event(1))

    torch.manual_seed(seed)
    npe = NeuralPosterior(model, ["y"], summary=DeepSets(3) if sets else None)
    start = time.process_time()
    fit = fit_posterior(npe, num_simulations=budget, seed=seed, progress=False, **budgeted)
    seconds = time.process_time() - start
    y = npe.simulate(200, seed=1000).data["y"]
    posterior = npe.density.at(npe.density.encoder.pack({"y": y}))
    # Base draws with mean 0 and covariance I to the last digit: for an affine flow the moments are then exact.
    x = torch.randn(2000, 3)
    x = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov()), (x - x.mean(0)).T, upper=False).T
    with torch.no_grad():
        x = x * posterior.base_dist.variance[0].sqrt()  # of Student's t, whose covariance is not I
        z = (posterior.transforms[0](x[:, None].expand(-1, len(y), 3)) - y.sum(1) / 6) * math.sqrt(6)
    mean, sd = z.mean(0).abs(), (z.std(0) - 1).abs()
    cells = [f"{x.square().mean().sqrt():.3f} | {x.max():.3f}" for x in (mean, sd)]
    summary = "DeepSets" if sets else "none"
    print(f"| {budget} | {summary} | {' | '.join(cells)} | {fit.chosen} | {seconds:.0f} |", flush=True)


def winding() -> None:
    """A wide prior, and data that wind around what they are conjugate in."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 5.0).to_event(1))
    t = pyro.sample("t", dist.Normal(z, 0.2).to_event(1))
    pyro.deterministic("y", t + 0.9 * t.sin(), event_dim=1)


def rounds(num_simulations: int, *, num_rounds: int, seed: int) -> None:
    """Errors of three posteriors: with several rounds a training for each, with one the same training for all."""
    precision, errors, start = 1 / 0.2**2 + 1 / 5.0**2, [], time.process_time()
    data = torch.tensor([[2.0, -7.0], [0.5, 3.0], [-4.0, 6.0]])
    npe = None
    for t in data:
        y = {"y": t + 0.9 * t.sin()}
        if num_rounds > 1 or npe is None:
            torch.manual_seed(seed)
            npe = NeuralPosterior(winding, ["y"], latents=["z"])
            call = {"num_rounds": num_rounds, "num_simulations": num_simulations, "seed": seed, "progress": False}
            fit_posterior_at(npe, y, **call)
        z = (npe.condition(y).sample(20_000, seed=1)["z"] - t / 0.2**2 / precision) * precision**0.5
        errors.append(torch.stack([z.mean(0).abs(), z.std(0).log().abs()]))
    mean, sd = torch.cat(errors, 1)
    cells = [f"{x.square().mean().sqrt():.2f} | {x.max():.2f}" for x in (mean, sd)]
    print(f"| {num_rounds} x {num_simulations} | {' | '.join(cells)} | {time.process_time() - start:.0f} |", flush=True)


def _theta(task: Task, values: dict[str, Tensor]) -> Tensor:
    columns = [values[name] for name in task.latents]
    return torch.cat([x if x.dim() > 1 else x[:, None] for x in columns], -1)


def main() -> None:
    """Print the tables that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--budgets", nargs="+", type=int, default=[1000, 10_000])
    parser.add_argument("--datasets", type=int, default=10)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="of the fits of --conjugate; default: as many as they take")
    parser.add_argument("--conjugate", action="store_true")
    parser.add_argument("--rounds", action="store_true")
    options = parser.parse_args()
    if options.rounds:
        print("| rounds x simulations | mean: rms | mean: largest | log sd: rms | log sd: largest | seconds |")
        print("|---|---|---|---|---|---|")
        for num_rounds, num_simulations in ((3, 300), (1, 900), (1, 9000)):
            rounds(num_simulations, num_rounds=num_rounds, seed=options.seed)
        return
    if options.conjugate:
        print("| simulations | summary | mean: rms | mean: largest | sd: rms | sd: largest | weights kept | seconds |")
        print("|---|---|---|---|---|---|---|---|")
        for budget in options.budgets:
            for sets in (False, True):
                conjugate(budget, sets=sets, num_steps=options.steps, seed=options.seed)
        return
    missing = [m for m, module in {"sbi": "sbi", "MAF": "zuko"}.items() if importlib.util.find_spec(module) is None]
    for method in missing:
        print(f"{method} is left out: the package is not installed")
    print("| task | method | simulations | C2ST | seconds |")
    print("|---|---|---|---|---|")
    for task in options.tasks:
        for budget in options.budgets:
            for method in (m for m in options.methods if m not in missing):
                sizes = {"num_datasets": options.datasets, "num_draws": options.draws}
                run(task, method, budget=budget, seed=options.seed, **sizes)


if __name__ == "__main__":
    main()
