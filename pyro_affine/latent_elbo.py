"""The ELBO of a flow guide, without a Pyro trace of the guide: for loops in which the time of a step counts."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor

from pyro_affine.compiled import Compile, CompiledFunction
from pyro_affine.gradients import PathGradientDistribution, draw_with_score, open_push, push_score
from pyro_affine.latent_density import LatentDensity
from pyro_affine.particles import Pair
from pyro_affine.recorded import RecordedDensity
from pyro_affine.transform import FlowTransform


class LatentELBO:
    """E_q[log p(data, z) - log q(z)] over draws of a guide, negative, as a loss; value and gradient of ``Trace_ELBO``.

    Draws for which the model raises a numerical error, or gives a log-density or gradient that is not finite, are
    left out and counted. A loss over less than half of the draws is NaN.

    Args:
        guide: set up; an ``AutoRealNVP``.
        density: of the model, which must have nothing to train and change in nothing from call to call.

    Attributes:
        num_dropped: number of draws left out so far.

    >>> import pyro, pyro.distributions as dist
    >>> from pyro_affine.guides import AutoRealNVP
    >>> model = lambda: pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    >>> guide = AutoRealNVP(model, init_scale=1.0)
    >>> _ = guide()
    >>> loss = LatentELBO(guide, LatentDensity(model, guide, nesting=0))
    >>> bool(loss(8) > -10)
    True
    """

    def __init__(self, guide: AutoContinuous, density: LatentDensity) -> None:
        self.guide, self.num_dropped = guide, 0
        self.density: LatentDensity | RecordedDensity = density
        self._compiled: CompiledFunction | None = None
        self._has_path = isinstance(guide.get_posterior(), PathGradientDistribution)

    def __call__(self, num_draws: int) -> Tensor:
        """The loss over so many fresh draws, in nats, with a graph to the guide's parameters."""
        z, log_q, score_q = self._draw(num_draws)
        values, score_p = self.density.value_and_score(z)
        values = values - log_q.detach()
        kept = (values + score_p.sum(-1)).isfinite()  # a sum of which any term is not finite, is not
        num_kept = int(kept.sum())
        self.num_dropped += num_draws - num_kept
        if 2 * num_kept < num_draws:
            return z.sum() * math.nan
        force = -score_p.to(z) if score_q is None else score_q - score_p.to(z)
        if num_kept < num_draws:
            values, force = values[kept], force.masked_fill(~kept[:, None], 0.0)
        weights = kept.to(z) if score_q is None else None
        return _Loss.apply(-values.mean().to(z), num_kept, z, force, log_q, weights)  # type: ignore[no-any-return]

    def compile(self, compile: Compile) -> None:
        """Compile the way of draws through the flow, which must be the same Module from call to call."""
        flow = self.guide.get_transform()
        parameters = list(flow.parameters())
        if compile and self._has_path:
            source = open_push(flow, self.guide._init_loc()[None])
            self._compiled = CompiledFunction(partial(push_score, flow), parameters, compile, source=source)
        elif compile:
            self._compiled = CompiledFunction(flow._forward, parameters, compile)

    def _draw(self, num_draws: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Draws, log q, and for the path gradient the score of q, by which the draws are all that has a gradient."""
        base, flow = self.guide.get_base_dist(), self.guide.get_transform()
        if self._has_path:
            return draw_with_score(base, flow, num_draws, push=self._compiled)
        x = base.rsample((num_draws,))
        z, log_det = (self._compiled or flow._forward)(x)
        return z, base.log_prob(x) - log_det, None


class _Loss(torch.autograd.Function):
    """A value whose gradients are known: no graph through the model, of which the guide needs no more than these."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, num_draws: int, z: Tensor, force: Tensor, log_q: Tensor, weights: Tensor | None
    ) -> Tensor:
        ctx.num_draws, ctx.force, ctx.weights = num_draws, force, weights
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        share = grad / ctx.num_draws
        return None, None, ctx.force * share, None, None if ctx.weights is None else ctx.weights * share, None


def latent_density(pair: Pair, nesting: int | None) -> LatentDensity | None:
    """The density of the model, if ``LatentELBO`` can train this guide on it.

    Args:
        pair: model and guide, the guide set up.
        nesting: from ``Pair.find_nesting``.
    """
    guide = pair.guide
    if not isinstance(guide, AutoContinuous) or not _is_one_flow(guide):
        return None
    density = LatentDensity(pair.model, guide, pair.args, pair.kwargs, nesting=nesting)
    return None if density.is_random() else density


def _is_one_flow(guide: AutoContinuous) -> bool:
    try:
        return isinstance(guide.get_transform(), FlowTransform)
    except Exception:  # a guide without a transform, or one that depends on the arguments, as its context_fn does
        return False
