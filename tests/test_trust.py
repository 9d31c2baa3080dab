"""From model to verdict on posteriors whose truth is known: long NUTS runs, or a formula.

The bars are loose and the fits short; ``make bench-trust`` measures them at full length.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_affine import AutoRealNVP, fit_guide, psis

ROOT = Path(__file__).resolve().parent.parent
RATS = ROOT.parent / "shared" / "data" / "hierarchical" / "rats_data.json"
sys.path.insert(0, str(ROOT / "examples"))
import eight_schools  # noqa: E402


def rats(data: dict[str, Tensor]) -> None:
    """Growth curve of each rat, flat priors of the scales: 65 latents."""
    flat = dist.LogNormal(0.0, 1.0).mask(False)
    means = [pyro.sample(f"mu_{name}", dist.Normal(0.0, 100.0)) for name in ("alpha", "beta")]
    scales = [pyro.sample(f"sigma_{name}", flat) for name in ("alpha", "beta", "y")]
    with pyro.plate("rat", 30):
        alpha = pyro.sample("alpha", dist.Normal(means[0], scales[0]))
        beta = pyro.sample("beta", dist.Normal(means[1], scales[1]))
    loc = alpha[..., data["rat"]] + beta[..., data["rat"]] * (data["x"] - data["xbar"])
    with pyro.plate("weighing", len(data["y"])):
        pyro.sample("y", dist.Normal(loc, scales[2]), obs=data["y"])


def rats_args() -> tuple[Any, ...]:
    if not RATS.exists():
        pytest.skip("the data of the rats are read from beside the repository, ../shared/data, which is missing")
    raw = json.loads(RATS.read_text())
    return ({name: torch.tensor(v) - 1 if name == "rat" else torch.tensor(v).double() for name, v in raw.items()},)


def funnel() -> None:
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    pyro.sample("x", dist.Normal(torch.zeros(4), (v[..., None] / 2).exp()).to_event(1))


@dataclass(frozen=True)
class Known:
    """A model and the mean and standard deviation of some of its sites."""

    model: Callable[..., Any]
    load_args: Callable[[], tuple[Any, ...]]
    num_steps: int
    truth: dict[str, tuple[float, float]]


CASES = {
    "eight schools, centred, against 8000 draws of NUTS": Known(
        eight_schools.model,
        lambda: (eight_schools.EFFECTS.double(), eight_schools.ERRORS.double()),
        600,
        {"mu": (4.45, 3.29), "tau": (3.71, 3.18)},
    ),
    "rats, 65 latents, against 10000 draws of NUTS": Known(
        rats,
        rats_args,
        500,
        {
            "mu_alpha": (242.49, 2.78),
            "mu_beta": (6.19, 0.111),
            "sigma_alpha": (14.90, 2.12),
            "sigma_beta": (0.530, 0.0945),
            "sigma_y": (6.115, 0.465),
        },
    ),
    "funnel, by its formula": Known(funnel, lambda: (), 600, {"v": (0.0, 3.0)}),
}


@pytest.fixture
def _double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("known", CASES.values(), ids=CASES)
def test_a_short_fit_comes_near_the_truth_and_says_so(known: Known) -> None:
    args = known.load_args()
    guide = AutoRealNVP(known.model)
    fit_guide(known.model, guide, args, num_steps=known.num_steps, seed=0, progress=False)
    result = psis(known.model, guide, *args, num_draws=4000, seed=1, progress=False)
    assert result.khat < 1.0 and result.ess > 0.3 * result.num_draws
    weights = result.smoothed_log_weights.exp()
    for name, (mean, sd) in known.truth.items():
        for shares in (torch.full_like(weights, 1 / len(weights)), weights):
            found = float(shares @ result.draws[name])
            spread = float((shares @ (result.draws[name] - found).square()).sqrt())
            assert abs(found - mean) < 0.2 * sd, name
            assert 0.75 < spread / sd < 1.3, name
