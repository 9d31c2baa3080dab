"""Targets of the guide benchmark: Pyro models, their arguments, and reference draws to compare with."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_feasible
from pyro.poutine.util import site_is_subsample
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
OUTPUT = ROOT / "output" / "benchmarks"
CHAINS = OUTPUT / "references"

Draws = dict[str, Tensor]
Kind = Literal["posterior", "synthetic", "hierarchical"]


def no_arguments() -> tuple[Any, ...]:
    """Arguments of a model that takes none."""
    return ()


@dataclass(frozen=True)
class Target:
    """A model with all that a benchmark needs to know of it.

    Args:
        name: how it is called in tables.
        kind: which bars it is held against.
        model: a Pyro model.
        character: what makes it hard, in a few words.
        load_args: gives the arguments of the model, in torch's default dtype.
        draw_exactly: gives as many independent draws as asked for, by site; None where there are none.
        chains_of: name of the target whose stored NUTS chains are the reference; "" for none.
        from_chains: maps sites of those chains to sites of this model.
        nesting: number of batch dimensions of the model (plates).
        log_evidence: log of the integral of the density, in nats, where known.
        heavy: compare medians and half the distance between the 16 % and 84 % quantiles, not means and standard
            deviations: these do not exist, or are ruled by a few draws.
    """

    name: str
    kind: Kind
    model: Callable[..., Any]
    character: str
    load_args: Callable[[], tuple[Any, ...]] = no_arguments
    draw_exactly: Callable[[int], Draws] | None = None
    chains_of: str = ""
    from_chains: Callable[[Draws], Draws] = dict
    nesting: int = 0
    log_evidence: float | None = None
    heavy: bool = False

    @property
    def samples_reference(self) -> bool:
        """Whether NUTS chains of this very model are to be stored as a reference."""
        return self.chains_of == self.name

    def reference(self) -> Draws | None:
        """Draws by site, 10,000 or the stored chains; None where there are none (yet)."""
        if self.draw_exactly is not None:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                return self.draw_exactly(10_000)
        files = sorted((CHAINS / self.chains_of).glob("chain-*.pt")) if self.chains_of else []
        if len(files) < 2:
            return None
        chains = [torch.load(file, weights_only=True)["draws"] for file in files]
        return self.from_chains({name: torch.cat([chain[name] for chain in chains]) for name in chains[0]})

    def supports(self, args: tuple[Any, ...]) -> dict[str, Any]:
        """Support of each latent site, as a constraint."""
        started = InitMessenger(init_to_feasible)(self.model)
        trace = poutine.trace(started).get_trace(*args)
        latent = [(name, site) for name, site in trace.iter_stochastic_nodes() if not site_is_subsample(site)]
        return {name: site["fn"].support for name, site in latent}


@cache
def _posterior_models() -> Any:
    """The module beside the data that holds the posteriors as Pyro models."""
    path = DATA / "posteriors" / "models.py"
    spec = importlib.util.spec_from_file_location("posterior_models", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} must be a Python file, got none")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_CHARACTERS = {
    "eight_schools-eight_schools_noncentered": "mild funnel, heavy tau",
    "arK-arK": "correlated AR(5)",
    "garch-garch11": "skewed, at the bounds",
    "gp_pois_regr-gp_pois_regr": "latent GP, funnel-like",
    "hmm_example-hmm_example": "simplexes, positive ordered",
    "nes1972-nes": "near-Gaussian, flat priors",
    "earnings-logearn_interaction": "correlation near 1, unscaled",
    "diamonds-diamonds": "badly conditioned, N = 5000",
    "low_dim_gauss_mix-low_dim_gauss_mix": "mixture, ordered means",
}


def posteriors() -> list[Target]:
    """Posteriors with reference draws, read from beside the repository; none where they are missing."""
    if not (DATA / "posteriors" / "models.py").exists():
        return []
    return [
        Target(
            name=name,
            kind="posterior",
            model=posterior.model,
            character=_CHARACTERS.get(name, ""),
            load_args=lambda posterior=posterior: (posterior.load_data(),),
            draw_exactly=lambda num_draws, posterior=posterior: _first(posterior.load_draws(), num_draws),
        )
        for name, posterior in _posterior_models().POSTERIORS.items()
    ]


def _first(draws: Draws, num_draws: int) -> Draws:
    return {name: value[:num_draws] for name, value in draws.items()}


def fresh_start(seed: int, dtype: torch.dtype) -> None:
    """One thread, an empty param store, this seed, this default dtype."""
    torch.set_num_threads(1)
    torch.set_default_dtype(dtype)
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
