"""What NUTS in the space of a guide hands back: draws, their diagnostics, and a verdict."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

__all__ = ["NeutraResult"]

_MAX_RHAT = 1.01  # Vehtari et al. (2021)
_MIN_ESS_PER_CHAIN = 100  # the same source


@dataclass(frozen=True, eq=False, repr=False)
class NeutraResult:
    """Draws of NUTS in the space of a guide, on the model's sites.

    Attributes:
        draws: values by latent site. Shape: (chains, draws, *shape of the site).
        diverging: whether the trajectory of a draw diverged. Shape: (chains, draws).
        data: ArviZ container with ``posterior`` (latent and deterministic sites), ``sample_stats`` (``lp``, the
            log joint density in nats, and ``diverging``), ``log_likelihood`` and ``observed_data``.
    """

    draws: dict[str, Tensor]
    diverging: Tensor
    data: Any

    @property
    def num_divergences(self) -> int:
        """Number of draws whose trajectory diverged."""
        return int(self.diverging.sum())

    @cached_property
    def summary(self) -> Any:
        """ArviZ's table: mean, sd, interval, Monte Carlo errors, ESS and R-hat of each entry of each site."""
        import arviz

        return arviz.summary(self.data)

    @cached_property
    def rhat(self) -> float:
        """Largest R-hat (rank-normalised, split) over all entries of the latent sites; NaN for one chain."""
        import arviz

        return max(self._over_sites(arviz.rhat)) if len(self.diverging) > 1 else math.nan

    @cached_property
    def ess(self) -> float:
        """Smallest effective number of draws over all entries of the latent sites, bulk or tail."""
        import arviz

        bulk = self._over_sites(lambda sites: arviz.ess(sites, method="bulk"), low=True)
        return min(bulk + self._over_sites(lambda sites: arviz.ess(sites, method="tail"), low=True))

    def _over_sites(self, statistic: Callable[[Any], Any], *, low: bool = False) -> list[float]:
        posterior = self.data["posterior"]
        values = statistic(getattr(posterior, "dataset", posterior)[list(self.draws)])
        return [float(values[name].min() if low else values[name].max()) for name in self.draws]

    @property
    def good(self) -> bool:
        """R-hat below 1.01, ESS of 100 for each chain, no divergence.

        Source: Rank-normalization, folding, and localization: an improved R-hat (Vehtari et al., 2021).
        """
        mixed = self.rhat < _MAX_RHAT and self.ess >= self._wanted_ess
        return bool(mixed and not self.num_divergences)

    @property
    def _wanted_ess(self) -> int:
        return _MIN_ESS_PER_CHAIN * len(self.diverging)

    @property
    def verdict(self) -> str:
        """One sentence: whether to trust the draws, why, and what to do next."""
        facts = (
            f"R-hat up to {self.rhat:.3f}, good below {_MAX_RHAT}; ESS from {self.ess:.0f}, good from "
            f"{self._wanted_ess}; {self.num_divergences} of {self.diverging.numel()} draws diverged"
        )
        if self.good:
            return f"Trust the draws ({facts})."
        if self.num_divergences:
            return f"Look closer ({facts}): fit the guide longer or with more layers, or take target_accept=0.95."
        if len(self.diverging) == 1:
            return f"Undecided ({facts}): one chain cannot show that it has converged, take num_chains=4."
        return f"Do not trust the draws yet ({facts}): take more of them, or fit the guide longer."

    def __repr__(self) -> str:
        """One line."""
        chains, draws = self.diverging.shape
        return f"NeutraResult(num_chains={chains}, num_samples={draws}, rhat={self.rhat:.3f}, ess={self.ess:.0f})"

    def __str__(self) -> str:
        """The table and the verdict."""
        return f"{self.summary}\n{self.verdict}"
