"""A network whose last layer is Bayesian: flow guide, Gaussian guides and NUTS on the same posterior.

    python examples/last_layer.py            about two minutes on two cores
    python examples/last_layer.py --smoke    seconds, to see that it runs

The body of a network is trained as usual and then frozen; its last layer, a logistic regression on six features, gets a
prior and a posterior, on rows that the body has not seen, as features look too good on its own rows. Such a posterior
is cheap, and ignores the uncertainty of the features. The scale of the weights is a latent too; with the weights it
forms a funnel, which a Gaussian cannot follow.

Data: 30 measurements of cell nuclei in 569 tumours, 212 of them malignant (Street et al., 1993; with scikit-learn).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import arviz as az
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoLaplaceApproximation, AutoMultivariateNormal
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn

from pyro_affine import AutoRealNVP, fit_guide, psis

NUM_FEATURES = 6

Draws = dict[str, Tensor]


class Tumours(NamedTuple):
    """Measurements in standard deviations, (N, 30), and whether malignant, (N,)."""

    x: Tensor
    y: Tensor


def tumours() -> tuple[Tumours, Tumours, Tumours]:
    """Rows for the body of the network, for its last layer, and for the test."""
    data = load_breast_cancer()
    x, y = torch.tensor(data.data).float(), torch.tensor(1 - data.target).float()
    parts = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)).split([200, 185, 184])
    x = (x - x[parts[0]].mean(0)) / x[parts[0]].std(0)
    first, second, third = (Tumours(x[part], y[part]) for part in parts)
    return first, second, third


def train(data: Tumours, num_steps: int) -> tuple[nn.Module, nn.Module]:
    """Body and last layer of an ordinary network."""
    body = nn.Sequential(nn.Linear(30, 16), nn.Tanh(), nn.Linear(16, NUM_FEATURES), nn.Tanh())
    last = nn.Linear(NUM_FEATURES, 1)
    optimizer = torch.optim.AdamW([*body.parameters(), *last.parameters()], lr=0.01, weight_decay=0.1)
    for _ in range(num_steps):
        loss = nn.functional.binary_cross_entropy_with_logits(last(body(data.x))[:, 0], data.y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return body.requires_grad_(False), last.requires_grad_(False)


def model(features: Tensor, malignant: Tensor) -> None:
    scale = pyro.sample("scale", dist.HalfNormal(3.0))
    bias = pyro.sample("bias", dist.Normal(0.0, 5.0))
    weights = pyro.sample("weights", dist.Normal(torch.zeros(NUM_FEATURES), scale[..., None]).to_event(1))
    with pyro.plate("tumour", len(features)):
        # A product and a sum rather than `features @ weights`: then many draws can be scored at once.
        pyro.sample("malignant", dist.Bernoulli(logits=(features * weights).sum(-1) + bias), obs=malignant)


def run_nuts(features: Tensor, malignant: Tensor, num_samples: int) -> Draws:
    """Reference draws. NUTS cannot follow the funnel, so it samples weights = scale * z."""

    def non_centred() -> None:
        scale = pyro.sample("scale", dist.HalfNormal(3.0))
        bias = pyro.sample("bias", dist.Normal(0.0, 5.0))
        z = pyro.sample("z", dist.Normal(torch.zeros(NUM_FEATURES), 1.0).to_event(1))
        with pyro.plate("tumour", len(features)):
            logits = (features * z).sum(-1) * scale + bias
            pyro.sample("malignant", dist.Bernoulli(logits=logits), obs=malignant)

    pyro.set_rng_seed(0)
    kernel = NUTS(non_centred, jit_compile=True, ignore_jit_warnings=True)
    mcmc = MCMC(kernel, num_samples=num_samples, warmup_steps=num_samples // 2)
    mcmc.run()
    draws = mcmc.get_samples()
    draws["weights"] = draws["scale"][:, None] * draws.pop("z")
    return draws


def log_odds(draws: Draws, features: Tensor) -> Tensor:
    """Log-odds of malignant by each draw. Shape: (draws, rows)."""
    return draws["weights"] @ features.T + draws["bias"][:, None]


def report(name: str, draws: Draws, features: Tensor, malignant: Tensor, effective: float, seconds: float) -> None:
    """Held-out log predictive density, log mean over draws of p(y | x, draw), and what the draws say of the scale."""
    log_density = dist.Bernoulli(log_odds(draws, features).sigmoid().mean(0)).log_prob(malignant)
    mean, error = float(log_density.mean()), float(log_density.std() / len(malignant) ** 0.5)
    low, middle, high = torch.quantile(draws["scale"], torch.tensor([0.05, 0.5, 0.95])).tolist()
    print(f"{name:25s} {mean:9.4f} ± {error:.4f} {low:8.2f} {middle:6.2f} {high:6.2f} {effective:11.0f} {seconds:9.0f}")


def picture(found: dict[str, Draws], network: Tensor, features: Tensor, along: Tensor, path: Path) -> None:
    """Log-odds on a line through both kinds of tumours, and the funnel."""
    import matplotlib.pyplot as plt

    styles = {"AutoMultivariateNormal": "tab:orange", "AutoRealNVP + PSIS": "tab:blue", "NUTS": "0.2"}
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained", width_ratios=[1.5, 1])
    for name, colour in styles.items():
        low, high = torch.quantile(log_odds(found[name], features), torch.tensor([0.05, 0.95]), 0)
        left.fill_between(along, low, high, color=colour, alpha=0.15)
        left.plot(along, low, color=colour, lw=1.2)
        left.plot(along, high, color=colour, lw=1.2, label=f"{name}: 90 % of the draws")
        chosen = {site: values[:1500] for site, values in found[name].items()}
        size = chosen["weights"].square().mean(-1).sqrt().log()
        right.plot(size, chosen["scale"].log(), ".", ms=3, alpha=0.4, color=colour, label=name)
    left.plot(along, network, color="black", ls="--", label="the network as it was trained")
    for place, text in ((0.0, "mean of the\nbenign"), (1.0, "mean of the\nmalignant")):
        left.axvline(place, color="0.7", lw=0.8, ls=":")
        left.text(place, 1.02, text, ha="center", va="bottom", fontsize=9, transform=left.get_xaxis_transform())
    left.set(xlabel="place on the line", ylabel="log-odds of malignant")
    left.legend(fontsize=8, loc="upper left")
    right.set(xlabel="log size of the weights (root mean square)", ylabel="log scale", title="the funnel")
    right.legend(fontsize=8, loc="upper left", markerscale=3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--output", type=Path, default=Path("output/last_layer"), help="folder for the files")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    num_steps, num_mode_steps = (20, 300) if options.smoke else (2500, 1000)
    num_draws, num_samples = (500, 10) if options.smoke else (10_000, 400)

    # 1. An ordinary network. Its body turns 30 measurements into six features between -1 and 1.
    torch.manual_seed(0)
    first, second, test = tumours()
    body, last = train(first, 200)
    data, held_out = (body(second.x), second.y), (body(test.x), test.y)
    odds = last(held_out[0])[:, 0]
    right = ((odds > 0) == (test.y > 0.5)).float().mean()
    log_density = dist.Bernoulli(logits=odds).log_prob(test.y).mean()
    print(f"the network as it was trained: {right:.1%} of {len(test.y)} test rows right, log-density {log_density:.4f}")

    # 2. Three guides for the last layer, and how far each is from the posterior.
    found, seconds, effective = {}, {}, {}
    for make in (AutoLaplaceApproximation, AutoMultivariateNormal, AutoRealNVP):
        pyro.clear_param_store()
        start = time.perf_counter()
        guide = make(model)
        if isinstance(guide, AutoLaplaceApproximation):  # a search for the mode, then the Hessian there
            fit_guide(model, guide, data, num_steps=num_mode_steps, num_particles=1, learning_rate=0.02, seed=0)
            guide = guide.laplace_approximation(*data)
        else:
            fit_guide(model, guide, data, num_steps=num_steps, seed=0)
        result = psis(model, guide, *data, num_draws=num_draws, seed=1)
        print(f"\n{make.__name__}\n{result}")
        name = make.__name__
        found[name], seconds[name], effective[name] = result.draws, time.perf_counter() - start, result.ess
    name = "AutoRealNVP + PSIS"
    found[name], seconds[name], effective[name] = result.resample(seed=2), seconds["AutoRealNVP"], result.ess

    # 3. The same by NUTS, and the scores of held-out rows.
    start = time.perf_counter()
    found["NUTS"] = run_nuts(*data, num_samples)
    seconds["NUTS"] = time.perf_counter() - start
    effective["NUTS"] = float(az.ess(found["NUTS"]["scale"].numpy()[None], method="bulk"))
    print(f"\n{'':25s}   held-out log-density   scale: 5 %, 50 %, 95 %  effective   seconds")
    for name, draws in found.items():
        report(name, draws, *held_out, effective[name], seconds[name])

    centres = torch.stack([first.x[first.y == kind].mean(0) for kind in (0, 1)])
    along = torch.linspace(-1.5, 2.5, 200)
    line = body(centres[0] + along[:, None] * (centres[1] - centres[0]))
    picture(found, last(line)[:, 0], line, along, options.output / "last_layer.png")
    print(f"written: {(options.output / 'last_layer.png').resolve()}")


if __name__ == "__main__":
    main()
