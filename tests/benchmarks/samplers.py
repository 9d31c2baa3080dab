"""NUTS and NeuTra-NUTS for the guide benchmark, and the stored NUTS chains that serve as references."""

from __future__ import annotations

import time
from typing import Any

import pyro
import torch
from methods import fit
from pyro.infer import MCMC, NUTS
from targets import CHAINS, Draws, Target

from pyro_affine.neutra import neutra

NUM_CHAINS = 4
_SAMPLES, _WARMUP = 1000, 1000
_REFERENCE_SAMPLES, _REFERENCE_WARMUP = 2500, 1500

Args = tuple[Any, ...]


class OverTimeError(RuntimeError):
    """A chain used up its seconds."""


def run_nuts(target: Target, args: Args, *, seed: int, limit: float) -> tuple[Draws, dict[str, Any]]:
    """Four chains of NUTS one after the other, 1000 draws of warm-up and 1000 kept in each.

    Returns:
        Draws by site, each of shape (chains, draws, *shape of the site), and what it took.
    """
    start = time.perf_counter()
    chains, divergences = [], 0
    for index in range(NUM_CHAINS):
        left = limit - (time.perf_counter() - start)
        draws, diverged = draw_chain(target, args, (_SAMPLES, _WARMUP), seed=NUM_CHAINS * seed + index, limit=left)
        chains.append(draws)
        divergences += diverged
    stacked = {name: torch.stack([chain[name] for chain in chains]) for name in chains[0]}
    return stacked, {"seconds_used": time.perf_counter() - start, "divergences": divergences} | mixing(stacked)


def run_neutra(target: Target, args: Args, *, seconds: float, seed: int) -> tuple[Draws, dict[str, Any]]:
    """``AutoRealNVP`` fitted for so many seconds, then four chains of NUTS in its space; as ``run_nuts``."""
    start = time.perf_counter()
    fitted = fit("AutoRealNVP", target, args, seconds=seconds)
    middle = time.perf_counter()
    result = neutra(target.model, fitted.guide, *args, seed=seed, log_likelihood=False, progress=False)
    notes = {"fit_seconds": middle - start, "seconds_used": time.perf_counter() - start}
    return result.draws, notes | {"divergences": result.num_divergences} | mixing(result.draws)


def store_reference_chain(target: Target, args: Args, *, index: int, limit: float) -> dict[str, Any]:
    """One long chain of NUTS, 1500 draws of warm-up and 2500 kept, written to the folder of references."""
    start = time.perf_counter()
    lengths = (_REFERENCE_SAMPLES, _REFERENCE_WARMUP)
    draws, divergences = draw_chain(target, args, lengths, seed=1000 + index, limit=limit)
    notes = {"seconds_used": time.perf_counter() - start, "divergences": divergences}
    folder = CHAINS / target.name
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"draws": draws} | notes, folder / f"chain-{index}.pt")
    return notes


def reference_mixing(target: Target) -> dict[str, Any]:
    """Seconds, R-hat, ESS and divergences of the stored chains; empty if there are none."""
    files = sorted((CHAINS / target.chains_of).glob("chain-*.pt")) if target.chains_of else []
    chains = [torch.load(file, weights_only=True) for file in files]
    if len(chains) < 2:
        return {}
    totals = {name: sum(chain[name] for chain in chains) for name in ("seconds_used", "divergences")}
    stacked = {name: torch.stack([chain["draws"][name] for chain in chains]) for name in chains[0]["draws"]}
    return totals | mixing(stacked)


def mixing(draws: Draws) -> dict[str, float]:
    """Largest R-hat and smallest ESS, bulk or tail, over all entries of all sites."""
    import arviz

    data = arviz.convert_to_dataset({name: value.detach().numpy() for name, value in draws.items()})
    tables = [arviz.ess(data, method="bulk"), arviz.ess(data, method="tail")]
    rhat = arviz.rhat(data)
    return {
        "ess_min": min(float(table[name].min()) for table in tables for name in draws),
        "rhat": max(float(rhat[name].max()) for name in draws),
    }


def draw_chain(target: Target, args: Args, lengths: tuple[int, int], *, seed: int, limit: float) -> tuple[Draws, int]:
    """One chain: draws by site and the number that diverged; compiled where torch.jit can trace the model."""
    end = time.perf_counter() + limit

    def watch(kernel: Any, samples: Any, stage: str, index: int) -> None:
        if time.perf_counter() > end:
            raise OverTimeError(f"NUTS is over its time limit, at draw {index} of a chain ({stage.lower()})")

    try:
        return _run_chain(NUTS(target.model, jit_compile=True, ignore_jit_warnings=True), args, lengths, seed, watch)
    except OverTimeError:
        raise
    except Exception:  # whatever torch.jit makes of a model that it cannot trace
        return _run_chain(NUTS(target.model), args, lengths, seed, watch)


def _run_chain(kernel: NUTS, args: Args, lengths: tuple[int, int], seed: int, watch: Any) -> tuple[Draws, int]:
    pyro.set_rng_seed(seed)
    mcmc = MCMC(kernel, *lengths, hook_fn=watch, disable_progbar=True)
    mcmc.run(*args)
    divergences = len(mcmc.diagnostics()["divergences"]["chain 0"])
    return {name: value.detach() for name, value in mcmc.get_samples().items()}, divergences
