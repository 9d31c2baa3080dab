"""Weighted draws with a verdict: what the importance weights of a fitted guide tell."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_affine.pareto import importance_ess, khat_threshold, pareto_khat_of_mean, pareto_smooth
from pyro_affine.random_state import seeded
from pyro_affine.verdict import Evidence, verdict
from pyro_affine.weighted import entry_labels, resampled_positions, weighted_mean

__all__ = ["PSISResult"]

_MIN_DRAWS = 25  # a fifth of them is the smallest tail that can be fitted

Draws = dict[str, Tensor]
Quantity = str | Callable[[Draws], Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class PSISResult:
    """Draws of a guide with Pareto-smoothed importance weights.

    With S draws z_s of the guide q, and raw log-weights log r_s = log p(z_s, data) - log q(z_s) smoothed to
    w_s,

        E[f] = sum_s w_s f(z_s) / sum_s w_s,   log evidence = log mean_s w_s,   ELBO = mean_s log r_s.

    Draws whose log-weight is NaN or +inf are left out and counted; those of weight 0 (-inf) stay.

    Args:
        draws: constrained draws by latent site, each of shape (S, *shape of the site).
        log_weights: raw log-weights in nats, float64. Shape: (S,).
        deterministics: values of deterministic sites, each of shape (S, *shape of the site).
        messages: errors that the model raised at draws of weight 0, by position among all draws.

    Attributes:
        smoothed_log_weights: log w_s less their logsumexp, so that the weights sum to 1. Shape: (S,).
        khat: shape of the tail of the raw weights; below ``threshold`` the weighted estimates can be trusted.
        log_evidence: estimate of log p(data), in nats.
        num_dropped: number of draws left out.

    Raises:
        ValueError: if there are fewer than 25 draws, draws and weights differ in number, or all are left out.

    Source: Pareto Smoothed Importance Sampling (Vehtari et al., 2024); Yes, but Did It Work?: Evaluating
    Variational Inference (Yao et al., 2018).

    >>> z = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    >>> result = PSISResult({"z": z}, 0.2 * z.double())  # the guide lies 0.2 to the left of the posterior
    >>> result.good, round(float(result.mean("z")), 1)
    (True, 0.2)
    """

    draws: Draws
    log_weights: Tensor
    deterministics: Draws = field(default_factory=dict)
    messages: dict[int, str] = field(default_factory=dict)
    smoothed_log_weights: Tensor = field(init=False)
    khat: float = field(init=False)
    log_evidence: float = field(init=False)
    num_dropped: int = field(init=False)

    def __post_init__(self) -> None:
        """Leave out draws without a weight, smooth the rest."""
        if self.log_weights.is_complex():
            raise ValueError(f"log_weights must be real, got {self.log_weights.dtype}")
        log_weights = self.log_weights.detach().cpu().to(torch.float64)
        _check_sizes(log_weights, self.draws | self.deterministics)
        kept = (log_weights < math.inf).nonzero().squeeze(-1)  # NaN is not below either
        _check_any(kept, log_weights)
        smoothed, khat = pareto_smooth(log_weights[kept])
        log_total = float(smoothed.logsumexp(0))
        values = {
            "draws": _take(self.draws, kept),
            "deterministics": _take(self.deterministics, kept),
            "log_weights": log_weights[kept],
            "smoothed_log_weights": smoothed - log_total if log_total > -math.inf else smoothed,
            "khat": khat,
            "log_evidence": log_total - math.log(len(kept)),
            "num_dropped": len(log_weights) - len(kept),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen

    @property
    def num_draws(self) -> int:
        """Number S of draws that have a weight."""
        return len(self.log_weights)

    @property
    def threshold(self) -> float:
        """Largest trustworthy k-hat for this many draws: min(1 - 1 / log10(S), 0.7)."""
        return khat_threshold(self.num_draws)

    @property
    def ess(self) -> float:
        """Effective number of draws, (sum w)^2 / sum w^2, from 0 to S."""
        return importance_ess(self.smoothed_log_weights)

    @property
    def log_evidence_se(self) -> float:
        """Monte Carlo standard error of the log evidence, in nats, as far as k-hat is good.

        sqrt((S / ess - 1) / S): the relative error of the mean weight.
        """
        return math.sqrt(max(self.num_draws / self.ess - 1, 0.0) / self.num_draws) if self.ess else math.nan

    @property
    def elbo(self) -> float:
        """Mean of the raw log-weights, in nats; -inf where some draw has weight 0."""
        return float(self.log_weights.mean())

    @property
    def elbo_se(self) -> float:
        """Monte Carlo standard error of the ELBO, in nats; NaN where the ELBO is -inf."""
        return float(self.log_weights.std() / math.sqrt(self.num_draws))

    @property
    def num_nonfinite(self) -> int:
        """Number of log-weights that were not finite: draws of weight 0 and draws left out."""
        return int(self.log_weights.isinf().sum()) + self.num_dropped

    @property
    def good(self) -> bool:
        """Whether the weighted draws can be trusted.

        k-hat below ``threshold``, or an ESS above 95 % of the draws: k-hat is free of scale, and the tail of
        weights that are nearly equal does no harm. Never with more than 1 % of the draws left out.
        """
        return self._evidence.good

    @property
    def verdict(self) -> str:
        """One sentence: whether to trust the draws, why, and what to do next."""
        return verdict(self._evidence)

    def mean(self, quantity: Quantity | None = None) -> Any:
        """Weighted mean E[f].

        Args:
            quantity: name of a site, or a function from the dict of draws to a tensor with the draws as its
                leading axis. None for all sites.

        Returns:
            Mean over the draws, float64, shape of one draw of f; a dict of such by site for None.
        """
        return self._for_each(quantity, self._average)

    def sd(self, quantity: Quantity | None = None) -> Any:
        """Weighted standard deviation, sqrt(E[(f - E[f])^2]); arguments and shapes as in ``mean``."""
        return self._for_each(quantity, lambda x: self._average((x - self._average(x)).square()).sqrt())

    def mcse(self, quantity: Quantity | None = None) -> Any:
        """Monte Carlo standard error of ``mean`` where k-hat is good; arguments and shapes as in ``mean``.

        sqrt(sum_s w_s^2 (f_s - E[f])^2), with weights that sum to 1.
        """
        squares = self._weights.square()
        return self._for_each(quantity, lambda x: weighted_mean(squares, (x - self._average(x)).square()).sqrt())

    def khat_of(self, quantity: Quantity | None = None) -> Any:
        """k-hat of ``mean``: the larger of those of w and of w |f|; arguments as in ``mean``.

        A quantity with at most two values has the k-hat of w; inf where f is not finite at a positive weight.

        Returns:
            k-hat for each entry, float64, shape of one draw of f; a dict of such by site for None.

        Source: Vehtari et al. (2024).
        """
        return self._for_each(quantity, lambda x: pareto_khat_of_mean(self.log_weights, x))

    def table(self) -> Any:
        """Weighted summary of every entry of every site, as a pandas DataFrame.

        Columns: mean, sd, mcse and khat of the weighted draws, and the mean and sd of the guide (no weights).
        """
        import pandas

        sites = self.draws | self.deterministics
        guide = {name: x.to(torch.float64) for name, x in sites.items()}
        columns = {"mean": self.mean(), "sd": self.sd(), "mcse": self.mcse(), "khat": self.khat_of()}
        columns["guide_mean"] = {name: x.mean(0) for name, x in guide.items()}
        columns["guide_sd"] = {name: x.std(0) for name, x in guide.items()}
        rows = [label for name, x in sites.items() for label in entry_labels(name, x.shape[1:])]
        flat = {key: torch.cat([x.cpu().flatten() for x in by_site.values()]) for key, by_site in columns.items()}
        return pandas.DataFrame({key: x.numpy() for key, x in flat.items()}, index=rows)

    def resample(self, num_draws: int | None = None, *, seed: int | None = None) -> Draws:
        """Unweighted draws, chosen by weight among these with replacement (systematic), in random order.

        Args:
            num_draws: number n of draws to return; None for as many as there are.
            seed: seed of the choice; None for torch's own random numbers.

        Returns:
            Draws by site, deterministic sites included, each of shape (n, *shape of the site).

        Raises:
            ValueError: if ``num_draws`` is below 1, or no draw has a positive weight.
        """
        return _take(self.draws | self.deterministics, self.resampled_positions(num_draws, seed=seed))

    def resampled_positions(self, num_draws: int | None = None, *, seed: int | None = None) -> Tensor:
        """Positions of the draws that ``resample`` returns with the same arguments. Shape: (n,)."""
        with seeded(seed):
            return resampled_positions(self._weights, self.num_draws if num_draws is None else num_draws)

    def __repr__(self) -> str:
        """One line."""
        numbers = f"num_draws={self.num_draws}, khat={self.khat:.2f}, ess={self.ess:.0f}, good={self.good}"
        return f"PSISResult({numbers})"

    def __str__(self) -> str:
        """Summary at a glance."""
        size, zero = self.num_draws, self.num_nonfinite - self.num_dropped
        lines = [
            f"PSIS of {size} draws",
            f"  k-hat         {self.khat:10.2f}   good below {self.threshold:.2f}",
            f"  ESS           {self.ess:10.0f}   {100 * self.ess / size:.0f} % of the draws",
            f"  ELBO          {self.elbo:10.2f} ± {self.elbo_se:.2f} nats",
            f"  log evidence  {self.log_evidence:10.2f} ± {self.log_evidence_se:.2f} nats",
        ]
        if self.num_nonfinite:
            lines.append(f"  not finite    {self.num_nonfinite:10d}   {zero} of weight 0, {self.num_dropped} left out")
        return "\n".join([*lines, self.verdict])

    @property
    def _evidence(self) -> Evidence:
        zero = self.num_nonfinite - self.num_dropped
        message = next(iter(self.messages.values()), "")
        return Evidence(self.khat, self.threshold, self.ess, self.num_draws, zero, self.num_dropped, message)

    @property
    def _weights(self) -> Tensor:
        if not self.ess:
            raise ValueError(f"some draw must have a positive weight, got none. {self.verdict}")
        return self.smoothed_log_weights.exp()

    def _average(self, values: Tensor) -> Tensor:
        return weighted_mean(self._weights, values)

    def _for_each(self, quantity: Quantity | None, estimate: Callable[[Tensor], Tensor]) -> Any:
        sites = self.draws | self.deterministics
        if quantity is None:
            return {name: estimate(self._clean(x)) for name, x in sites.items()}
        if callable(quantity):
            return estimate(self._clean(quantity(sites)))
        if quantity not in sites:
            raise ValueError(f"quantity must be a function or one of {sorted(sites)}, got {quantity!r}")
        return estimate(self._clean(sites[quantity]))

    def _clean(self, values: Tensor) -> Tensor:
        """Values in float64, 0 where the weight is 0 and they do not count."""
        if values.dim() < 1 or len(values) != self.num_draws:
            shape = tuple(values.shape)
            raise ValueError(f"a quantity must have the {self.num_draws} draws leading, got shape {shape}")
        values = values.detach().cpu().to(torch.float64)
        positive = self.log_weights > -math.inf
        return torch.where(positive.reshape(-1, *[1] * (values.dim() - 1)), values, 0.0)


def _take(draws: Draws, index: Tensor) -> Draws:
    return {name: value[index.to(value.device)] for name, value in draws.items()}


def _check_sizes(log_weights: Tensor, draws: Draws) -> None:
    shape = tuple(log_weights.shape)
    if log_weights.dim() != 1 or len(log_weights) < _MIN_DRAWS:
        raise ValueError(f"log_weights must be a vector of {_MIN_DRAWS} or more, got shape {shape}; draw more")
    for name, value in draws.items():
        if value.shape[:1] != shape:
            raise ValueError(
                f"draws must have shape {shape} + shape of the site, as many as log_weights, got "
                f"{tuple(value.shape)} at site {name!r}"
            )


def _check_any(kept: Tensor, log_weights: Tensor) -> None:
    if not len(kept):
        raise ValueError(
            f"some log-weight must be a number below +inf, got none in {len(log_weights)} draws; look at the "
            "model's density at one draw of the guide"
        )
