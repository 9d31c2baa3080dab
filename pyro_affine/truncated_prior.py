"""The prior of a simulator, cut to where posteriors at the observed data have their mass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_affine.amortised_posterior import AmortisedPosterior
from pyro_affine.replay import Replay
from pyro_affine.simulations import Simulations, Simulator
from pyro_affine.traces import LOG_PROB, Rows, Site, is_deterministic, read_log_prob, sample_sites, value_reader

_ROWS = 10_000  # drawn or scored at once
_MOST_DRAWS = 1_000_000  # for a threshold
_LEAST_KEPT = 10  # so many are expected where a share is estimated
_CANDIDATES = 20  # for each draw that is resampled


@dataclass(frozen=True)
class Region:
    """Where a posterior has its highest density: {z : log q(z | data) >= threshold}.

    Args:
        posterior: at one data set.
        epsilon: share of its draws that lie outside.
        threshold: in nats.
    """

    posterior: AmortisedPosterior
    epsilon: float
    threshold: float

    @classmethod
    def of(cls, posterior: AmortisedPosterior, epsilon: float) -> Region:
        """The region that holds all but a share ``epsilon`` of the posterior's draws."""
        num_draws = min(max(_ROWS, round(_LEAST_KEPT / epsilon)), _MOST_DRAWS)
        log_prob = posterior.log_prob(posterior.sample(num_draws)).double()
        finite = log_prob[log_prob.isfinite()]  # rounding takes draws of large simplexes out of their support
        return cls(posterior, epsilon, float(finite.quantile(epsilon)))

    def contains(self, values: Rows) -> Tensor:
        """Whether latents lie in it. Shape: (N,)."""
        return self.posterior.log_prob(values) >= self.threshold


class TruncatedPrior:
    """Prior of a simulator's latents, restricted to the intersection of regions: p(z) / P(M) for z in M, else 0.

    Draws come by rejection: the model is run as far as its last latent, and goes on only from what lies in M. Where
    less than ``least_acceptance`` of the prior does, they come by resampling: of wide draws of the last posterior in M,
    with weights p(z) / their density, as many as are wanted are taken. This is exact only for many candidates.

    Args:
        simulator: source of simulations.
        regions: none for the prior itself.
        least_acceptance: share of the prior's draws below which they are resampled.

    Attributes:
        acceptance: prior probability of M, as the last draws tell it.
        resampled: whether they came by resampling.

    Raises:
        ValueError: if the sites up to the last latent are not the same in each run; on ``draw``, if resampling is
            needed where the latents' prior is not known, or finds too few candidates.

    Source: Truncated Proposals for Scalable and Hassle-Free Simulation-Based Inference (Deistler et al., 2022).
    """

    def __init__(self, simulator: Simulator, regions: Sequence[Region] = (), *, least_acceptance: float = 1e-4) -> None:
        self.simulator, self.regions, self.least_acceptance = simulator, tuple(regions), least_acceptance
        self.acceptance, self.resampled = 1.0, False
        self._sites = _sites_up_to_latents(simulator)
        self._program = _StopAfter(simulator.latents)(simulator.program)

    def within(self, region: Region) -> TruncatedPrior:
        """This prior, restricted to one more region."""
        return TruncatedPrior(self.simulator, [*self.regions, region], least_acceptance=self.least_acceptance)

    def contains(self, values: Rows) -> Tensor:
        """Whether latents lie in every region. Shape: (N,)."""
        first = next(iter(values.values()))
        inside = torch.ones(len(first), dtype=torch.bool, device=first.device)
        for region in self.regions:
            if inside.any():
                inside[inside.clone()] = region.contains({name: x[inside] for name, x in values.items()})
        return inside

    def draw(self, num_simulations: int, *, at_once: bool, progress: bool = True) -> Simulations:
        """Simulations from it. Arguments as of ``Simulator.draw``."""
        values = self._rejection(num_simulations, at_once, progress)
        self.resampled = values is None
        if values is None:
            values = self._resampling(num_simulations, at_once)
        return self.simulator.complete(values, num_simulations, at_once=at_once, progress=progress)

    def _rejection(self, num_wanted: int, at_once: bool, progress: bool) -> Rows | None:
        """Sites up to the last latent, where they lie in M; None where too few do."""
        kept: list[Rows] = []
        num_kept = num_drawn = 0
        with _bar(num_wanted, progress) as bar:
            while num_kept < num_wanted:
                rate = max(num_kept, 1) / max(num_drawn, 1)
                size = min(_ROWS, round(1.2 * (num_wanted - num_kept) / rate) + 10)
                rows, _ = self._replay({}, size).collect(value_reader(self._sites), at_once=at_once)
                inside = self.contains({name: rows[name] for name in self.simulator.latents})
                kept.append({name: x[inside] for name, x in rows.items()})
                num_drawn, num_kept = num_drawn + size, num_kept + int(inside.sum())
                bar.update(int(inside.sum()))
                expected = num_drawn * self.least_acceptance
                if num_kept < expected and expected >= _LEAST_KEPT:
                    return None
        self.acceptance = num_kept / num_drawn
        return {name: torch.cat([rows[name] for rows in kept])[:num_wanted] for name in self._sites}

    def _resampling(self, num_wanted: int, at_once: bool) -> Rows:
        self._require_known_prior()
        sizes = [_ROWS] * -(-_CANDIDATES * num_wanted // _ROWS)
        pieces, log_weights = zip(*(self._candidates(size, at_once) for size in sizes), strict=True)
        log_weight = torch.cat(log_weights)
        self.acceptance = float(log_weight.exp().mean())
        weights = log_weight.softmax(0).nan_to_num()  # NaN where none lies in M
        ess = float(1 / weights.square().sum()) if weights.any() else 0.0
        if ess < num_wanted:
            raise ValueError(
                f"{num_wanted} draws of the prior near these data are wanted, got candidates worth {ess:.0f}; simulate "
                "fewer in a round, or take fewer rounds"
            )
        chosen = torch.multinomial(weights, num_wanted)
        return {name: torch.cat([values[name] for values in pieces])[chosen] for name in self._sites}

    def _candidates(self, size: int, at_once: bool) -> tuple[Rows, Tensor]:
        """Draws about M, and their log-weights: log p(z) - log q(z) within, -inf outside."""
        last = self.regions[-1]
        values, log_q = last.posterior.wide_draws(size, last.epsilon)
        found, _ = self._replay(values, size).collect(read_log_prob, at_once=at_once)
        log_weight = found[LOG_PROB] - log_q
        return values, torch.where(self.contains(values) & ~log_weight.isnan(), log_weight, -torch.inf)

    def _replay(self, values: Rows, num_draws: int) -> Replay:
        call: dict[str, Any] = {"args": self.simulator.args, "kwargs": self.simulator.kwargs, "progress": False}
        return Replay(self._program, values, num_draws=num_draws, **call)

    def _require_known_prior(self) -> None:
        others = [name for name in self._sites if name not in self.simulator.latents]
        if others:
            raise ValueError(
                f"less than {self.least_acceptance:g} of the prior lies near these data, and to resample it the model "
                f"must draw no other site before its latents, got {others}; draw them later, add them to latents, or "
                "take fewer rounds"
            )


class _AllDrawn(Exception):
    pass


class _StopAfter(Messenger):
    """Ends a run when the last of some sites has been drawn: what comes after may take long."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self._names = frozenset(names)

    def __enter__(self) -> Any:
        self._left = set(self._names)
        return super().__enter__()

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> Any:
        super().__exit__(kind, error, traceback)
        return kind is _AllDrawn

    def _pyro_post_sample(self, msg: Any) -> None:
        self._left.discard(msg["name"])
        if not self._left:
            raise _AllDrawn


def _sites_up_to_latents(simulator: Simulator) -> dict[str, Site]:
    found = []
    for trace in simulator.probes:
        sites = sample_sites(trace)
        last = max(list(sites).index(name) for name in simulator.latents)
        found.append({name: site for name, site in list(sites.items())[: last + 1] if not is_deterministic(site)})
    shapes = [{name: site["value"].shape for name, site in sites.items()} for sites in found]
    if any(other != shapes[0] for other in shapes):
        raise ValueError(
            f"up to its last latent each run must draw the same sites of the same shapes, got {sorted(shapes[0])} in "
            "one run and others in another; draw after the latents what is not in every run"
        )
    return found[0]


def _bar(total: int, progress: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, desc="draws of the truncated prior", delay=2.0, leave=False, disable=not progress)
