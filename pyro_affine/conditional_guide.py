"""A flow guide that reads the data: one guide for the posteriors of many data sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor, nn

from pyro_affine.compose import ComposeFlow, ConditionalComposeFlow
from pyro_affine.conditioners import MLP
from pyro_affine.coupling import ConditionalAffineCoupling
from pyro_affine.flows import conditional_real_nvp
from pyro_affine.guides import AutoRealNVP
from pyro_affine.linear import LowerTriangularAffine
from pyro_affine.scales import AdditiveScale, ScaleMap
from pyro_affine.support_check import CheckedGuide


class AutoConditionalRealNVP(CheckedGuide):
    """Guide over the global latents of a model whose flow depends on ``context_fn`` of the model's arguments.

    With c = context_fn(*args, **kwargs), the unconstrained latents side by side in a vector of D entries are

        y = m + W c + L f(x; c),  x ~ N(0, I),

    f a ``conditional_real_nvp``, L lower triangular. At the start f is the identity, W = 0, m the initial values and
    L = init_scale * I. One training over many data sets, ``svi.step(data)`` with another one each step, gives a guide
    that knows the posterior of each: call it with that data. A Module as ``context_fn`` is trained with the rest.
    Bring the context to about unit scale.

    For local latents, one for each datum, no autoguide is needed: a conditional ``NormalizingFlow`` is a distribution
    with the batch shape of its context, and a plate that subsamples scales the ELBO::

        def model(data):
            with pyro.plate("row", len(data), subsample_size=64) as index:
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("y", dist.Normal(z, 0.5).to_event(1), obs=data[index])

        flow = NormalizingFlow(conditional_real_nvp(2, context_dim=2), 2)

        def guide(data):
            pyro.module("flow", flow)
            with pyro.plate("row", len(data), subsample_size=64) as index:
                pyro.sample("z", flow(data[index]))

    (Pyro lets the model take the guide's subsample. For a positive z, sample
    ``dist.TransformedDistribution(flow(data[index]), [torch.distributions.biject_to(constraints.positive)])``.)

    Args:
        model: a Pyro model whose latents are continuous and of the same shapes for all arguments.
        context_fn: called with the model's arguments, gives a vector of shape (context_dim,). A function or a Module.
        num_layers, hidden_dims, scale, activation, seed: of the flow, as in ``conditional_real_nvp``.
        init_loc_fn: initial value of each site, as for Pyro's autoguides.
        init_scale: standard deviation at the start, in unconstrained space.

    Raises:
        ValueError: if an argument is out of range; at a call, if the context is no vector or changes its size, if the
            support of a site depends on another latent, or if a latent lies in a plate that subsamples.

    Source: Amortized Inference in Probabilistic Reasoning (Gershman and Goodman, 2014).

    >>> import pyro
    >>> def model(data):
    ...     loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    ...     with pyro.plate("rows", len(data)):
    ...         pyro.sample("y", dist.Normal(loc, 1.0).to_event(1), obs=data)
    >>> guide = AutoConditionalRealNVP(model, lambda data: data.mean(0))
    >>> guide(torch.ones(5, 2))["loc"].shape
    torch.Size([2])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        context_fn: Callable[..., Tensor],
        *,
        num_layers: int = 8,
        hidden_dims: Sequence[int] = (64, 64),
        init_loc_fn: Callable[[Any], Tensor] = init_to_median,
        init_scale: float = 0.1,
        scale: ScaleMap | None = None,
        activation: Callable[[], nn.Module] = nn.SiLU,
        seed: int = 0,
    ) -> None:
        if not init_scale > 0:
            raise ValueError(f"init_scale must be positive, got {init_scale}; Pyro's default is 0.1")
        if not callable(context_fn):
            raise ValueError(
                f"context_fn must be callable with the model's arguments, got {type(context_fn).__name__}; for the "
                "first argument itself pass lambda data: data"
            )
        super().__init__(model, init_loc_fn=init_loc_fn)
        self.context_fn = context_fn
        self.init_scale = init_scale
        self._flow_options: dict[str, Any] = {
            "num_layers": num_layers,
            "hidden_dims": tuple(hidden_dims),
            "scale": scale,
            "activation": activation,
            "seed": seed,
        }

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        loc, size = self._init_loc(), self.latent_dim
        self.context_dim: int | None = None
        self.context_dim = context_dim = len(self.context(*args, **kwargs))
        couplings = conditional_real_nvp(size, context_dim, **self._flow_options)
        linear = MLP(0, size, (), context_dim=context_dim, shift_only=True)
        shift = ConditionalAffineCoupling(torch.zeros(size, dtype=torch.bool), linear, AdditiveScale())
        affine = LowerTriangularAffine(loc, self.init_scale)
        self.chain = ConditionalComposeFlow([couplings, affine, shift]).to(loc)
        self.register_buffer("_zeros", torch.zeros_like(loc))
        self.register_buffer("_ones", torch.ones_like(loc))

    def context(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the flow is conditioned on for these arguments. Shape: (context_dim,)."""
        context = self.context_fn(*args, **kwargs)
        if not isinstance(context, Tensor) or context.dim() != 1 or self.context_dim not in (None, len(context)):
            wanted = "a vector" if self.context_dim is None else f"a vector of {self.context_dim} entries"
            got = f"shape {tuple(context.shape)}" if isinstance(context, Tensor) else type(context).__name__
            raise ValueError(
                f"context_fn must give {wanted} for any arguments of the model, got {got}; summarise the data to a "
                "fixed size, such as by their mean and standard deviation"
            )
        return context

    def get_base_dist(self) -> dist.TorchDistribution:
        """Standard normal over the D base entries."""
        return dist.Normal(self._zeros, self._ones, validate_args=False).to_event(1)  # type: ignore[no-any-return]

    def get_transform(self, *args: Any, **kwargs: Any) -> ComposeFlow:
        """The flow from base entries to unconstrained latents, for these arguments."""
        return self.chain.condition(self.context(*args, **kwargs))

    median = AutoRealNVP.median
    quantiles = AutoRealNVP.quantiles
