"""One run of the guide benchmark: a method on a target, with a budget and a seed, from model to a row of figures."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from hierarchical import hierarchical
from methods import PEERS, TUNED_RATES, Args, Fitted, fit
from pyro.infer.autoguide import AutoNormal
from samplers import run_neutra, run_nuts, store_reference_chain
from scoring import errors
from synthetic import synthetic
from targets import Draws, Target, fresh_start, posteriors

import pyro_affine
from pyro_affine import fit_guide, psis

REFERENCE = "reference-chain"
_EVALUATION_SEED = 2**31 - 1  # of the draws that score a guide: the same for all, met in no fit
_TUNING_SEED = _EVALUATION_SEED - 1

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What is to be run.

    Args:
        target, method: names.
        seconds: budget of the fit; 0 for NUTS, which has none.
        seed: of the fit, or which of the reference chains.
        dtype: in which the guide is fitted; it is scored in float64.
        tuned: whether the learning rate of a peer is chosen by ELBO, in time that does not count.
        num_draws: with which a guide is scored.
        limit: seconds after which a sampler is given up.
        clock: "wall", or "cpu" to count the seconds of the processor instead, on a machine that others use too.
    """

    target: str
    method: str
    seconds: float
    seed: int
    dtype: str = "float64"
    tuned: bool = False
    num_draws: int = 10_000
    limit: float = 1800.0
    clock: str = "wall"

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two rows the same run."""
        return self.target, self.method, float(self.seconds), self.seed, self.dtype, self.tuned, self.clock


def key_of(row: Row) -> tuple[Any, ...]:
    """The key of the job that gave a row."""
    names = ("target", "method", "seconds", "seed", "dtype", "tuned")
    return *(row[name] for name in names), row.get("clock", "wall")


def all_targets() -> dict[str, Target]:
    """Targets by name, as far as their data are there."""
    return {target.name: target for target in (*posteriors(), *synthetic(), *hierarchical())}


def failed(job: Job, reason: str) -> Row:
    """The row of a run that came to nothing."""
    return asdict(job) | {"seconds": float(job.seconds), "status": "failed", "reason": reason}


def run(job: Job) -> Row:
    """Run a job; an error of the method is a row too."""
    if job.clock == "cpu":
        time.perf_counter = time.process_time
    fresh_start(job.seed, getattr(torch, job.dtype))
    target = all_targets()[job.target]
    try:
        figures = _figures(job, target)
    except Exception as error:  # a benchmark counts whatever goes wrong
        text = str(error).strip().partition("\n")[0]
        return failed(job, f"{type(error).__name__}: {text}"[:300])
    versions = {"torch": torch.__version__, "pyro": pyro.__version__, "pyro_affine": pyro_affine.__version__}
    return asdict(job) | {"seconds": float(job.seconds), "status": "ok", "versions": versions} | figures


def _figures(job: Job, target: Target) -> Row:
    args = target.load_args()
    if job.method == REFERENCE:
        return store_reference_chain(target, args, index=job.seed, limit=job.limit)
    if job.method == "NUTS":
        draws, notes = run_nuts(target, args, seed=job.seed, limit=job.limit)
        return notes | _sampler_errors(target, draws)
    _warm_up()
    if job.method == "NeuTra-NUTS":
        draws, notes = run_neutra(target, args, seconds=job.seconds, seed=job.seed)
        return notes | _sampler_errors(target, draws)
    fitted, seconds_used = _fit(job, target, args)
    return fitted.notes | {"steps": fitted.steps, "seconds_used": seconds_used} | _scores(job, target, fitted.guide)


def _warm_up() -> None:
    """Let torch and Pyro load what they load at first use, so that no method pays for it."""

    def model() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    fit_guide(model, AutoNormal(model), num_steps=5, progress=False)
    pyro.clear_param_store()


def _fit(job: Job, target: Target, args: Args) -> tuple[Fitted, float]:
    """The guide and the seconds that its own fit took, tuning left out."""
    candidates = []
    for rate in TUNED_RATES if job.tuned and job.method in PEERS else (None,):
        pyro.set_rng_seed(job.seed)
        start = time.perf_counter()
        try:
            fitted = fit(job.method, target, args, seconds=job.seconds, rate=rate)
            candidates.append((_elbo(job, target, args, fitted), fitted, time.perf_counter() - start))
        except Exception as error:  # one rate may fail; all rates is a failure
            reason = error
    if not candidates:
        raise reason
    _, fitted, seconds_used = max(candidates, key=lambda candidate: candidate[0])
    return fitted, seconds_used


def _elbo(job: Job, target: Target, args: Args, fitted: Fitted) -> float:
    """What tuning goes by; of no use for a single candidate."""
    if not job.tuned:
        return 0.0
    result = psis(target.model, fitted.guide, *args, num_draws=1000, seed=_TUNING_SEED, progress=False)
    return -math.inf if math.isnan(result.elbo) else result.elbo


def _scores(job: Job, target: Target, guide: Any) -> Row:
    """ELBO, k-hat, ESS and errors of a guide, all in float64."""
    start = time.perf_counter()
    fresh_start(_EVALUATION_SEED, torch.float64)
    args = target.load_args()
    result = psis(target.model, guide.double(), *args, num_draws=job.num_draws, seed=_EVALUATION_SEED, progress=False)
    row: Row = {
        "elbo": result.elbo,
        "elbo_se": result.elbo_se,
        "log_evidence": result.log_evidence,
        "khat": result.khat,
        "threshold": result.threshold,
        "ess": result.ess / job.num_draws,
        "nonfinite_draws": result.num_nonfinite,
        "finite_weights": all(bool(p.isfinite().all()) for p in guide.parameters()),
        "latents": guide.latent_dim if hasattr(guide, "latent_dim") else None,
    }
    reference = target.reference()
    if reference is not None:
        supports = target.supports(args)
        even = torch.full((result.num_draws,), 1 / result.num_draws, dtype=torch.float64)
        raw = errors(result.draws, even, reference, supports, heavy=target.heavy)
        weighted = errors(result.draws, result.smoothed_log_weights.exp(), reference, supports, heavy=target.heavy)
        row |= {f"{name}_raw": value for name, value in raw.items()}
        row |= {f"{name}_psis": value for name, value in weighted.items()}
    return row | {"scoring_seconds": time.perf_counter() - start}


def _sampler_errors(target: Target, draws: Draws) -> Row:
    reference = target.reference()
    if reference is None:
        return {}
    flat = {name: value.flatten(0, 1).double() for name, value in draws.items()}
    size = len(next(iter(flat.values())))
    even = torch.full((size,), 1 / size, dtype=torch.float64)
    torch.set_default_dtype(torch.float64)
    found = errors(flat, even, reference, target.supports(target.load_args()), heavy=target.heavy)
    return {f"{name}_raw": value for name, value in found.items()}
