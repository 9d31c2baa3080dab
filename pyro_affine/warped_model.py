"""A model in the coordinates of its guide's base, for samplers: one vector takes the place of all latent sites."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.initialization import init_to_sample
from pyro.infer.mcmc.util import initialize_model
from pyro.infer.reparam import NeuTraReparam
from pyro.ops.integrator import potential_grad
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

__all__ = ["Potential", "WarpedModel"]

_NUM_PROBES = 5  # draws at which a fast way must agree with the plain one
_SPREAD = 2.0  # of the probes of a compiled density, in sds of the base

Potential = Callable[[dict[str, Tensor]], Tensor]


class WarpedModel:
    """The density of x under z = t(x), z the unconstrained latents of the model and t the transform of a guide.

    log p(x) = log p(z, data) + log|det dz/dx|, with the Jacobians of the constraints; near a standard normal where
    the guide is near the posterior.

    Args:
        model: a Pyro model.
        guide: a guide of it that has been called or loaded.
        args, kwargs: arguments of the model.

    Attributes:
        name: name of the site that holds x.
        latent: a draw of the base. Shape: (D,).

    Raises:
        ValueError: if the guide has no transform that is free of the arguments, or lacks a latent site of the model.

    Source: NeuTra-lizing Bad Geometry in Hamiltonian Monte Carlo Using Neural Transport (Hoffman et al., 2019).
    """

    def __init__(
        self, model: Callable[..., Any], guide: AutoContinuous, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> None:
        self._guide, self._args, self._kwargs = guide, args, kwargs
        if not hasattr(guide, "plates"):  # Pyro makes them in the first call, which a loaded guide has not had
            guide._create_plates(*args, **kwargs)
        self._warped = NeuTraReparam(guide).reparam(model)
        trace = poutine.trace(self._warped).get_trace(*args, **kwargs)
        (self.name,) = (name for name in trace.stochastic_nodes if name.endswith("_shared_latent"))
        self.latent: Tensor = trace.nodes[self.name]["value"].detach()
        missing = [n for n in trace.stochastic_nodes if n != self.name and not site_is_subsample(trace.nodes[n])]
        if missing:
            raise ValueError(
                f"every latent site of the model must be in the guide, got none for {missing}; pass the data, and sum "
                "discrete sites out"
            )

    def potential(self, *, jit: bool = False) -> Potential:
        """The function {name: x} -> -log p(x), in nats; with ``jit`` compiled at its first call."""
        nesting = max((-plate.dim for plate in self._guide.plates.values()), default=0)
        function: Potential = initialize_model(
            self._warped,
            self._args,
            self._kwargs,
            initial_params={self.name: self.latent},
            init_strategy=init_to_sample,
            max_plate_nesting=nesting,
            jit_compile=jit,
            skip_jit_warnings=True,
        )[1]
        return function

    def compiled(self) -> Potential | None:
        """The compiled potential; None where torch.jit cannot make it or it has other values or gradients."""
        function = self.potential(jit=True)
        probes = _SPREAD * torch.randn_like(self.latent.expand(_NUM_PROBES, -1))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # newer torch would have Pyro leave torch.jit
                return function if self.agrees(function, probes) else None
        except Exception:  # whatever torch.jit makes of a model that it cannot trace
            return None

    def agrees(self, function: Potential, latents: Tensor) -> bool:
        """Whether a potential has the values and gradients of the plain one. Latents shape: (n, D)."""
        plain = self.potential()
        return all(self._same(plain, function, latent) for latent in latents)

    def _same(self, plain: Potential, function: Potential, latent: Tensor) -> bool:
        (grads, value), (others, other) = (potential_grad(f, {self.name: latent.clone()}) for f in (plain, function))
        rtol = torch.finfo(value.dtype).eps ** 0.5
        pairs = ((value, other), (grads[self.name], others[self.name]))
        return all(
            torch.allclose(a, b, rtol=rtol, atol=rtol * float(a.detach().abs().max()), equal_nan=True) for a, b in pairs
        )

    @torch.no_grad()
    def sites(self, latents: Tensor) -> dict[str, Tensor]:
        """Values of the latent sites, as the model itself sees them.

        Args:
            latents: draws of x. Shape: (S, D).

        Returns:
            Values by site, each of shape (S, *shape of the site).
        """
        values = self._sites_at_once(latents)
        for index in range(0, len(latents), max(1, len(latents) // _NUM_PROBES)):
            single = self._sites_of(latents[index])
            if not all(torch.allclose(single[name], values[name][index], rtol=1e-3, atol=1e-6) for name in values):
                rows = [self._sites_of(latent) for latent in latents]  # a support depends on the draw
                return {name: torch.stack([row[name] for row in rows]) for name in values}
        return values

    def _sites_of(self, latent: Tensor) -> dict[str, Any]:
        fixed = poutine.condition(self._warped, data={self.name: latent})
        trace = poutine.trace(fixed).get_trace(*self._args, **self._kwargs)
        prototype: Any = self._guide.prototype_trace
        return {name: trace.nodes[name]["value"] for name, _ in prototype.iter_stochastic_nodes()}

    def _sites_at_once(self, latents: Tensor) -> dict[str, Tensor]:
        """All draws at once, with the supports that the sites had when the guide was built."""
        unconstrained = self._guide.get_transform()(latents)
        depth = max(len(shape) for shape in self._guide._unconstrained_shapes.values())
        spread = unconstrained.reshape((len(latents),) + (1,) * depth + unconstrained.shape[-1:])
        return {
            site["name"]: biject_to(site["fn"].support)(value).reshape((len(latents), *site["value"].shape))
            for site, value in self._guide._unpack_latent(spread)
        }
