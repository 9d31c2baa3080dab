"""A density of the latents given the data: an encoder of the data, and a conditional flow behind it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn

from pyro_affine.compose import ConditionalComposeFlow
from pyro_affine.conditioners import MLP
from pyro_affine.coupling import ConditionalAffineCoupling
from pyro_affine.data_encoder import DataEncoder
from pyro_affine.early_dropout import EarlyDropout, with_dropout
from pyro_affine.flows import NormalizingFlow, conditional_real_nvp
from pyro_affine.linear import LowerTriangularAffine
from pyro_affine.regression import ridge
from pyro_affine.scales import AdditiveScale

_REGRESSION_ENTRIES = 50_000_000  # of the context, in float64: 400 MB
_DEGREES_OF_FREEDOM = 200.0  # to start from: nearly normal


class AmortisedDensity(nn.Module):
    """q(latents | data) for unconstrained latents and packed data: what ``fit_posterior`` trains, and ``save`` takes.

    With the encoded data c, brought to unit scale, and f a conditional RealNVP,

        u = loc + scale * (W c + b + L f(x; c)),  x ~ t(df), independent Student's t.

    loc and scale are the stored units of the latents. W, b and L start at the linear regression of the latents on what
    is fixed in c, f at the identity, and df at 200: up to tails that are a little heavier, the start is exact for a
    linear Gaussian model. All are trained, df too.

    Args:
        size: number of unconstrained latents.
        encoder: from packed data to the context.
        latents: names and shapes of the sites that the vector holds, in its order, to be checked when it is used again.
        num_layers, hidden_dims, activation, seed: of the flow, as in ``conditional_real_nvp``.
        dropout: share of the hidden values of the flow's networks that are left out in training mode. None are left out
            once the learning rate falls.

    >>> density = AmortisedDensity(3, DataEncoder({"y": Size([4])}, {}))
    >>> density.log_prob(torch.zeros(7, 3), torch.zeros(7, 4)).shape
    torch.Size([7])
    """

    latents: dict[str, Size] | None = None  # in files from before it was known

    def __init__(
        self,
        size: int,
        encoder: DataEncoder,
        *,
        latents: Mapping[str, Size] | None = None,
        num_layers: int = 8,
        hidden_dims: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.SiLU,
        dropout: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"num_layers": num_layers, "hidden_dims": hidden_dims}
        options["activation"] = with_dropout(activation, dropout)
        self.encoder, context_dim = encoder, encoder.context_dim
        moves_all = torch.zeros(size, dtype=torch.bool)
        linear = MLP(0, size, (), context_dim=context_dim, shift_only=True)
        self.regression = ConditionalAffineCoupling(moves_all, linear, AdditiveScale())
        self.noise = LowerTriangularAffine(torch.zeros(size))
        couplings = conditional_real_nvp(size, context_dim, seed=seed, **options)
        chain = ConditionalComposeFlow([couplings, self.noise, self.regression])
        self.flow = NormalizingFlow(chain, size, tails="student")
        nn.init.constant_(self.flow.raw_df, math.log(_DEGREES_OF_FREEDOM - 1))
        self.event_shape, self.latents = Size([size]), None if latents is None else dict(latents)
        self.standardized = False

    def forward(self, packed: Tensor) -> dist.TransformedDistribution:
        """The distribution of the latents. Shape: batch + (width,)."""
        return self.flow(self.encoder(packed))

    @torch.no_grad()
    def at(self, packed: Tensor) -> dist.TransformedDistribution:
        """The distribution at these data, without gradients of the encoder, and with it in evaluation mode."""
        before = self.training
        self.eval()
        try:
            return self(packed)
        finally:
            self.train(before)

    def log_prob(self, value: Tensor, packed: Tensor) -> Tensor:
        """Log-density in nats. Shapes: batch + (size,) and batch + (width,), which broadcast; result: batch."""
        return self.flow.log_prob(value, self.encoder(packed))

    @torch.no_grad()
    def store_units(self, latents: Tensor, packed: Tensor) -> None:
        """Store the units of latents and data, once: weights that are trained hold in these units only."""
        if not self.standardized:
            self.encoder.fit(packed)
            self.flow.standardize(latents)
            rows = _REGRESSION_ENTRIES // self.encoder.context_dim
            self._regress(latents[:rows], packed[:rows])
            self.standardized = True

    def follow(self, step_size: float) -> None:
        """Take in how large steps are, as a share of the largest; training calls it before each."""
        for module in self.flow.modules():
            if isinstance(module, EarlyDropout):
                module.follow(step_size)

    def undecayed(self) -> list[Tensor]:
        """Weights that start from the data, for which zero is no better guess: no weight decay draws them there."""
        return [self._linear().weight]

    def _linear(self) -> Any:
        conditioner: Any = self.regression.coupling.conditioner
        return conditioner.network.from_context

    def _regress(self, latents: Tensor, packed: Tensor) -> None:
        standardized, _ = self.flow.chain.parts[-1]._backward(latents)
        context = torch.cat([self.encoder(rows) for rows in packed.split(self.encoder.rows_at_once)])
        context = context * self.encoder.is_fixed  # large weights on what is trained would shake it
        weight, bias, tril = ridge(context, standardized)
        self._linear().weight.copy_(weight)
        self._linear().bias.copy_(bias)
        scale = tril.diagonal()
        self.noise.log_scale.copy_(scale.log() - math.log(_DEGREES_OF_FREEDOM / (_DEGREES_OF_FREEDOM - 2)) / 2)
        self.noise.below.copy_((tril / scale[:, None]).tril(-1))
