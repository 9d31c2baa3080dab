"""Sequential rounds: simulations near the data at hand, for a posterior that is sharper there and nowhere else."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyro_affine.amortised_density import AmortisedDensity
from pyro_affine.fit_result import FitResult
from pyro_affine.random_state import new_seed, seeded
from pyro_affine.simulate import NeuralPosterior, fit_posterior
from pyro_affine.simulations import Simulations, join
from pyro_affine.truncated_prior import Region, TruncatedPrior


@dataclass(frozen=True)
class Round:
    """What one round took.

    Args:
        fit: of the density.
        share: of the prior that was simulated from; 1 for all of it.
        num_new: simulations made.
        num_kept: simulations of earlier rounds that lay in this part of the prior too, and were trained on again.
        resampled: whether the part was too small a share to be found by rejection.

    >>> print(Round(FitResult("density", best=1.5), share=0.02, num_new=1000, num_kept=35, resampled=False))
    1000 simulations from 2 % of the prior, and 35 from before: held-out log-density 1.5 nats
    """

    fit: FitResult
    share: float
    num_new: int
    num_kept: int
    resampled: bool

    def __str__(self) -> str:
        """The round in one line."""
        how = " by resampling" if self.resampled else ""
        kept = f", and {self.num_kept} from before" if self.num_kept else ""
        of = f"{100 * self.share:.3g} % of the prior{how}{kept}"
        return f"{self.num_new} simulations from {of}: held-out log-density {self.fit.best:.4g} nats"


def fit_posterior_at(
    npe: NeuralPosterior,
    data: Mapping[str, Any],
    *,
    num_rounds: int = 3,
    num_simulations: int = 2000,
    epsilon: float = 1e-4,
    least_acceptance: float = 1e-4,
    at_once: bool | None = None,
    seed: int | None = None,
    progress: bool = True,
    **options: Any,
) -> list[Round]:
    """Train a ``NeuralPosterior`` for one data set, in rounds: each simulates where the last posterior says.

    Round k draws latents from the prior, restricted to M_k = {z in M_(k-1) : log q_(k-1)(z | data) >= t}, t the
    epsilon-quantile of log q_(k-1) of its own draws, and trains a new density by plain maximum likelihood on them and
    on what earlier rounds drew in M_k. Within M_k this is the prior up to a constant, so that at the data the result is
    the posterior, up to the share epsilon that is cut off in each round. The model runs as far as its last latent for
    each draw, and to its end only for those that are kept.

    **The result is for these data only**: at others it may be far off. ``sbc_ranks`` and ``expected_coverage``, which
    draw data from the whole prior, say nothing of it; with a likelihood, ``npe.condition(data).psis()`` does.

    Args:
        npe: new, or trained by ``fit_posterior``; its posterior is then where the first round simulates.
        data: value of each observed site.
        num_rounds: number of rounds.
        num_simulations: new ones in each.
        epsilon: share of the posterior that each round may cut off.
        least_acceptance: share of the prior below which draws come by resampling; see ``TruncatedPrior``.
        at_once: as in ``Simulator.draw``.
        seed: makes all rounds reproducible.
        progress: whether to show bars.
        options: further ones of ``fit_posterior``, such as ``num_steps``.

    Returns:
        What each round took; ``npe`` holds the density of the last. Ctrl-C ends the fit and the rounds with it. Where a
        round fails, ``npe`` holds the density from before it.

    Raises:
        ValueError: as ``fit_posterior`` does; for a batch of data sets; for a density that was passed in trained.

    Source: Truncated Proposals for Scalable and Hassle-Free Simulation-Based Inference (Deistler et al., 2022).

    >>> import torch, pyro, pyro.distributions as dist
    >>> def model():
    ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    ...     pyro.sample("y", dist.Normal(loc, 0.1))
    >>> npe = NeuralPosterior(model, observed=["y"], num_layers=2, hidden_dims=(16,))
    >>> rounds = fit_posterior_at(npe, {"y": 3.0}, num_rounds=2, num_simulations=200, num_steps=20, seed=0,
    ...                           progress=False)
    >>> rounds[1].share < 0.2
    True
    """
    _require_options(num_rounds, epsilon, options)
    untrained = _require_untrained(npe)
    npe.condition(data).require_one_data_set()
    with seeded(seed):
        at_once = npe.simulator.allows_many() if at_once is None else at_once
        prior = TruncatedPrior(npe.simulator, least_acceptance=least_acceptance)
        rounds: list[Round] = []
        kept: list[Simulations] = []
        for _ in range(num_rounds):
            if npe.density.standardized:  # trained: in the last round, or before the first
                prior = prior.within(Region.of(npe.condition(data), epsilon))
                kept = [pairs[prior.contains(pairs.latents)] for pairs in kept]
            new = prior.draw(num_simulations, at_once=at_once, progress=progress)
            simulations = join([*kept, new])
            before, npe.density = npe.density, copy.deepcopy(untrained)
            try:
                fit = fit_posterior(npe, simulations=simulations, seed=new_seed(), progress=progress, **options)
            except BaseException:
                npe.density = before
                raise
            rounds.append(Round(fit, prior.acceptance, len(new), len(simulations) - len(new), prior.resampled))
            kept = [simulations]
            if fit.reason == "interrupted":
                break
    return rounds


def _require_options(num_rounds: int, epsilon: float, options: dict[str, Any]) -> None:
    if num_rounds < 1 or not 0 < epsilon < 1:
        raise ValueError(
            f"num_rounds must be 1 or more and epsilon between 0 and 1, got {num_rounds} and {epsilon}; 1e-4 cuts off "
            "next to nothing"
        )
    wrong = sorted({"simulations", "path", "checkpoint"} & set(options))
    if wrong:
        raise ValueError(f"rounds make their own simulations, one after the other, got {wrong}; leave it out")


def _require_untrained(npe: NeuralPosterior) -> AmortisedDensity:
    if npe.untrained is None:
        raise ValueError(
            "each round trains a new density, but this NeuralPosterior was built with a trained one, density=; build "
            "it without"
        )
    return npe.untrained
