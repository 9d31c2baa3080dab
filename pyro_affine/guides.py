"""Flow guides for Pyro models."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import biject_to

from pyro_affine.compose import ComposeFlow
from pyro_affine.flows import real_nvp
from pyro_affine.gradients import PathGradientDistribution
from pyro_affine.latent_density import LatentDensity
from pyro_affine.linear import LowerTriangularAffine
from pyro_affine.low_rank import LowRankAffine
from pyro_affine.random_state import seeded
from pyro_affine.scales import ScaleMap
from pyro_affine.student import UncheckedStudentT
from pyro_affine.support_check import CheckedGuide, init_to_median
from pyro_affine.tails import LOFT
from pyro_affine.warm_start import LARGEST_DENSE, find_gaussian
from pyro_affine.whitening import DiagonalWhitening, Whitening

Size = Literal["small", "base", "large"]


class AutoRealNVP(CheckedGuide):
    """Guide that transforms a standard normal by affine couplings, then by an affine map.

    The latents, unconstrained and laid side by side in a vector of D entries, are

        y = loc + L (m + M f(x)),  x ~ N(0, I),

    f a ``real_nvp`` with a ``LOFT`` layer behind it, M lower triangular, and loc and L stored: the units of the
    posterior, if ``warm_start`` has found them, which ``fit_guide`` calls. (Above 300 latents M is diagonal plus low
    rank and L diagonal.) At the start f is the identity, m the initial values, M = init_scale * I: the guide
    is a diagonal Gaussian, after ``warm_start`` N(loc, L L^T), and it can become any Gaussian. Every latent moves. Use
    it as any autoguide of Pyro: with ``SVI`` and ``Trace_ELBO`` (also vectorised particles), ``Predictive``,
    ``NeuTraReparam``.

    Not for ``TraceMeanField_ELBO``, which drops the Jacobian of the constraints for every ``AutoContinuous``.

    Args:
        model: a Pyro model whose latents are continuous and whose structure is fixed.
        size: capacity, by number of latents; num_layers and hidden_dims override it. See ``capacity``.
        num_layers: number of couplings.
        hidden_dims: widths of the hidden layers of each conditioner.
        init_loc_fn: initial value of each site, as for Pyro's autoguides.
        init_scale: standard deviation at the start, in unconstrained space.
        scale: map from raw to log-scale; default that of ``real_nvp``.
        activation: factory of the activation Module.
        base: "normal" (default), or "student" for heavy tails: a Student t in each entry, whose degrees of freedom
            are trained from 30 and stay above 1.
        seed: seeds the fixed reorderings between couplings.
        gradient: "path" has less variance near the optimum, where it vanishes draw by draw (see ``gradients``);
            "total" is what a ``TransformedDistribution`` has, and has less far from it, when the guide is narrow.
            The value of the loss is the same. Default None: "path" once ``warm_start`` has found the units of the
            posterior, "total" until then.

    Raises:
        ValueError: if an argument is out of range; at the first call, if some latent would never move, if the support
            of a site depends on another latent, or if a latent lies in a plate that subsamples.

    >>> import pyro
    >>> guide = AutoRealNVP(lambda: pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1)))
    >>> guide()["z"].shape
    torch.Size([3])
    """

    _has_units = False  # whether warm_start has found them

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        size: Size = "base",
        num_layers: int | None = None,
        hidden_dims: Sequence[int] | None = None,
        init_loc_fn: Callable[[Any], Tensor] = init_to_median,
        init_scale: float = 0.1,
        scale: ScaleMap | None = None,
        activation: Callable[[], nn.Module] = nn.SiLU,
        base: Literal["normal", "student"] = "normal",
        seed: int = 0,
        gradient: Literal["path", "total"] | None = None,
    ) -> None:
        if not init_scale > 0:
            raise ValueError(f"init_scale must be positive, got {init_scale}; Pyro's default is 0.1")
        _require_one_of("gradient", gradient, ("path", "total", None))
        _require_one_of("base", base, ("normal", "student"))
        _require_one_of("size", size, tuple(_SIZES))
        super().__init__(model, init_loc_fn=init_loc_fn)
        self.gradient, self.base, self.size = gradient, base, size
        self.init_scale = init_scale
        self._flow_options = {
            "num_layers": num_layers,
            "hidden_dims": None if hidden_dims is None else tuple(hidden_dims),
            "scale": scale,
            "activation": activation,
            "seed": seed,
        }

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        loc, size = self._init_loc(), self.latent_dim
        options = {name: value for name, value in self._flow_options.items() if value is not None}
        flow = real_nvp(size, **{**capacity(size, self.size), **options})
        dense = size <= LARGEST_DENSE
        affine = (LowerTriangularAffine if dense else LowRankAffine)(loc, self.init_scale)
        units = (Whitening if dense else DiagonalWhitening)(size)
        self.transform = ComposeFlow([ComposeFlow([flow, LOFT((size,))]), affine, units]).to(loc)
        self.register_buffer("_zeros", torch.zeros_like(loc))
        self.register_buffer("_ones", torch.ones_like(loc))
        if self.base == "student":
            self.raw_df = nn.Parameter(torch.full_like(loc, math.log(29.0)))  # degrees of freedom 1 + exp(raw): 30

    def warm_start(
        self,
        model: Callable[..., Any],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        nesting: int | None,
        seconds: float | None = None,
        num_runs: int | None = None,
    ) -> None:
        """Set loc and L to the Gaussian that ``find_gaussian`` finds, unless the guide has been trained already.

        Args:
            model, args, kwargs: the model and its arguments; the guide has been called with the latter.
            nesting: number of batch dimensions of the model, to the left of which many draws can go at once; None
                to run it draw by draw.
            seconds, num_runs: the budget, None for no limit.
        """
        if self._is_trained():
            return
        density = LatentDensity(model, self, args, kwargs, nesting=nesting)
        found = find_gaussian(density, self._init_loc(), self.init_scale, seconds=seconds, num_runs=num_runs)
        affine, units = self.transform.parts[1:]
        self._has_units = not torch.equal(found.loc, self._init_loc().double())
        units.set(found.loc.to(self._zeros), found.scale_tril.to(self._zeros))
        with torch.no_grad():
            affine.loc.zero_()
            affine.log_scale.zero_()

    @torch.no_grad()
    def _is_trained(self) -> bool:
        flow, affine = self.transform.parts[:2]
        with seeded(0):
            x = self.get_base_dist().sample((10,))
        moved = flow(x).sort(-1).values - x.sort(-1).values  # an untrained flow reorders entries, and does no more
        changes = [moved, affine.loc - self._init_loc(), affine.log_scale - math.log(self.init_scale)]
        changes += [affine.below] if isinstance(affine, LowerTriangularAffine) else []
        return any(bool(change.abs().max() > 1e-4) for change in changes)  # a spline starts at 1 up to rounding

    def get_base_dist(self) -> dist.TorchDistribution:
        """Standard normal, or Student t, over the D base entries."""
        if self.base == "student":
            return UncheckedStudentT(1 + self.raw_df.exp(), self._zeros, self._ones).to_event(1)  # type: ignore[no-any-return]
        return dist.Normal(self._zeros, self._ones, validate_args=False).to_event(1)  # type: ignore[no-any-return]

    def get_transform(self, *args: Any, **kwargs: Any) -> ComposeFlow:
        """The flow from base entries to unconstrained latents."""
        return self.transform

    def get_posterior(self, *args: Any, **kwargs: Any) -> dist.TransformedDistribution:
        """Distribution of the unconstrained latents, one vector of D entries."""
        path = self._has_units if self.gradient is None else self.gradient == "path"
        family = PathGradientDistribution if path else dist.TransformedDistribution
        return family(self.get_base_dist(), [self.get_transform(*args, **kwargs)])

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The ``quantiles`` of probability 0.5, shape: that of the site.

        It is the median of each entry, save in a simplex, an ordered vector or a matrix: there, the image of the
        medians in unconstrained space.
        """
        return {name: value[0] for name, value in self.quantiles([0.5], *args, **kwargs).items()}

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Posterior quantiles of each latent entry, taken in unconstrained space from 10,000 draws of a fixed seed.

        Returns:
            Values by site. Shape: (number of quantiles,) + shape of the site.
        """
        with seeded(0):
            latents = self.get_transform(*args, **kwargs)(self.get_base_dist().sample((10_000,)))
        probabilities = torch.as_tensor(quantiles, dtype=latents.dtype, device=latents.device)
        sites: dict[str, list[Tensor]] = {}
        for latent in torch.quantile(latents, probabilities, dim=0):
            for site, value in self._unpack_latent(latent):
                sites.setdefault(site["name"], []).append(biject_to(site["fn"].support)(value))
        return {name: torch.stack(values) for name, values in sites.items()}


_SIZES = {"small": (4, 1), "base": (8, 2), "large": (16, 4)}  # couplings; factor of the width


def capacity(num_latents: int, size: Size = "base") -> dict[str, Any]:
    """Number of couplings and widths of their hidden layers, as ``AutoRealNVP`` chooses them.

    Widths grow with the number of latents up to 64 times a factor. Above 300 latents, where the first and last layers
    of the networks cost most, there are half the couplings and the narrowest layers.

    >>> capacity(10), capacity(3000)
    ({'num_layers': 8, 'hidden_dims': (32, 32)}, {'num_layers': 4, 'hidden_dims': (32, 32)})
    """
    num_layers, factor = _SIZES[size]
    if num_latents > LARGEST_DENSE:
        return {"num_layers": num_layers // 2, "hidden_dims": (16 * factor, 16 * factor)}
    width = factor * min(max(16, num_latents // 2), 64)
    return {"num_layers": num_layers, "hidden_dims": (width, width)}


def _require_one_of(name: str, value: object, allowed: Sequence[str | None]) -> None:
    if value not in allowed:
        words = " or ".join(repr(word) for word in allowed)
        raise ValueError(f"{name} must be {words}, got {value!r}")
