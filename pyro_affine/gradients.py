"""Path gradients: the gradient of an ELBO that vanishes draw by draw where the guide equals the posterior.

With z = t(x) and q the density of z, the gradient of E[log p(z) - log q(z)] with respect to the parameters of t is
E[(dz/dparameters)^T (grad_z log p(z) - grad_z log q(z))]: the direct dependence of log q on the parameters has mean
zero and is left out (sticking the landing, Roeder et al., 2017). grad_z log q is carried through the layers beside
the draw, without an inverse pass (Vaitl et al., 2024):

    score' = J^-T (score - grad_x log|det J|),  J = dy/dx.

``PathGradientDistribution`` hands it to Pyro through ``score_parts(value).entropy_term``, which ``Trace_ELBO``,
``TraceGraph_ELBO`` and ``JitTrace_ELBO`` differentiate. ``TraceEnum_ELBO`` and ``RenyiELBO`` read ``log_prob``, and so
keep the total gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions.score_parts import ScoreParts
from torch import Size, Tensor, nn
from torch.distributions import Distribution, Independent

from pyro_affine.cache import Slot
from pyro_affine.compose import ComposeFlow, _total
from pyro_affine.coupling import AffineCoupling
from pyro_affine.fused import Run, can_fuse, open_pass, step_of
from pyro_affine.memory import holding
from pyro_affine.normal import normal_log_prob, sum_event
from pyro_affine.transform import FlowTransform

Push = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""(x, score at x) -> (y, log|det dy/dx|, score at y)."""


class PathGradientDistribution(dist.TransformedDistribution):
    """A ``TransformedDistribution`` whose entropy term has the path gradient; all values are unchanged.

    Args:
        base_distribution: distribution of x, reparameterised.
        transforms: one transform of ours, such as a ``ComposeFlow``.

    Raises:
        ValueError: on the first draw, for anything but one ``FlowTransform``.

    Source: Roeder et al. (2017), Sticking the Landing; Vaitl et al. (2024), Fast and unified path gradient
    estimators for normalizing flows, proposition 3.2.

    >>> from pyro_affine.flows import real_nvp
    >>> base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    >>> q = PathGradientDistribution(base, [real_nvp(3)])
    >>> q.score_parts(q.rsample((5,))).entropy_term.shape
    torch.Size([5])
    """

    _draw: _Draw | None = None

    @property
    def _flow(self) -> FlowTransform:
        if len(self.transforms) != 1 or not isinstance(self.transforms[0], FlowTransform):
            raise ValueError(
                f"path gradients need one FlowTransform, got {self.transforms}; put the parts into a ComposeFlow"
            )
        return self.transforms[0]

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws with gradients; the score of each is kept for ``score_parts``. Shape as of any distribution."""
        x = self.base_dist.rsample(torch.Size(sample_shape))
        if not torch.is_grad_enabled() or torch.jit.is_tracing():  # type: ignore[attr-defined]
            return self._flow(x)  # type: ignore[no-any-return]
        z, log_det, score = push_score(self._flow, x, _base_score(self.base_dist, x))
        self._flow._remember(z, x, log_det, is_forward=True)
        self._draw = _Draw(z, x, log_det, score)
        return z

    def score_parts(self, value: Tensor, *args: Any, **kwargs: Any) -> ScoreParts:
        """log_prob, no score function term, and an entropy term that equals log_prob and has the path gradient."""
        draw = self._draw
        if draw is None or draw.z is not value or not self._flow._recall(value, is_forward=True):
            return _parts(self.log_prob(value), self._log_prob_of_frozen(value))
        log_prob = self.base_dist.log_prob(draw.x) - draw.log_det
        path = sum_event(draw.score * (value - value.detach()), len(self.event_shape))
        return _parts(log_prob, log_prob.detach() + path)

    def _log_prob_of_frozen(self, value: Tensor) -> Tensor:
        """log q(value) by an inverse pass, with all parameters of q held constant."""
        with _constant(self._flow):
            x, log_det = self._flow._backward(value)
        return _frozen(self.base_dist).log_prob(x) - log_det


def _parts(log_prob: Tensor, entropy_term: Tensor) -> ScoreParts:
    no_score_function: Any = 0  # as Pyro marks a reparameterised site
    return ScoreParts(log_prob, no_score_function, entropy_term)


class _Draw(NamedTuple):
    """Draws z = t(x) with log|det dz/dx| and grad_z log q(z)."""

    z: Tensor
    x: Tensor
    log_det: Tensor
    score: Tensor


def draw_with_score(
    base: dist.TorchDistribution, flow: FlowTransform, num_draws: int, *, push: Push | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws of a flow, for a loop that asks for nothing else.

    Args:
        base: distribution of x, reparameterised, events of D entries.
        flow: z = t(x).
        num_draws: S.
        push: in place of ``push_score`` of the flow, such as a compiled one.

    Returns:
        ``(z, log_q, score)``: z and log q(z) in the graph; grad_z log q(z), constant in it. Shapes: (S, D), (S,),
        (S, D).

    >>> from pyro_affine.flows import real_nvp
    >>> z, log_q, score = draw_with_score(dist.Normal(torch.zeros(3), 1.0).to_event(1), real_nvp(3), 5)
    >>> torch.allclose(score, -z)  # a flow that is not trained yet
    True
    """
    x = base.rsample((num_draws,))
    z, log_det, score = (push or partial(push_score, flow))(x, _base_score(base, x))
    return z, _base_log_prob(base, x) - log_det, score


def push_score(layer: FlowTransform, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Run a layer forward and carry the score along.

    Args:
        layer: y = t(x).
        x: draws. Shape: batch + event_shape.
        score: grad_x log q(x), constant in the graph. Shape of x.

    Returns:
        ``(y, log_det, score)``: y and log|det dy/dx| in the graph, and grad_y log q(y), constant in it.

    >>> from pyro_affine.linear import LowerTriangularAffine
    >>> push_score(LowerTriangularAffine(torch.zeros(1), 2.0), torch.ones(1), -torch.ones(1))[2]
    tensor([-0.5000])
    """
    step = step_of(layer) if can_fuse(x) else None
    if step is not None:
        return Run([step], layer.event_shape or Size()).push(x, score)
    if isinstance(layer, ComposeFlow):
        return _push_through_chain(layer, x, score)
    if isinstance(layer, AffineCoupling):
        return _push_through_coupling(layer, x, score)
    y, log_det = layer._forward(x)
    leaf = y.detach().requires_grad_()
    score = _vjp(layer._backward(leaf), leaf, (score, -torch.ones_like(log_det)), retain_graph=False)
    return y, log_det, score


def open_push(flow: FlowTransform, x: Tensor) -> Push:
    """``push_score`` of a flow written out on plain tensors where all of its layers have steps, as compilers need it.

    Args:
        flow: z = t(x).
        x: some draws, which say what is fused. Shape: (S, D).

    >>> from pyro_affine.flows import real_nvp
    >>> open_push(real_nvp(3), torch.zeros(2, 3))(torch.zeros(1, 3), torch.ones(1, 3))[2]
    tensor([[1., 1., 1.]])
    """
    entries = flow._entries(x) if isinstance(flow, ComposeFlow) else [(0, flow, 0)]
    runs = [part.steps if isinstance(part, Run) else [step_of(part)] for _, part, _ in entries]
    steps = [step for run in runs for step in run if step is not None]
    return (
        partial(open_pass, steps)
        if x.dim() == 2 and all(None not in run for run in runs)
        else partial(push_score, flow)
    )


def _push_through_chain(chain: ComposeFlow, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Part by part, but each run of parts that have a step in one go."""
    log_dets: list[Tensor] = []
    for _, part, dims in chain._entries(x):
        push = part.push if isinstance(part, Run) else partial(push_score, part)
        x, log_det, score = push(x, score)
        log_dets.append(sum_event(log_det, dims))
    return x, _total(log_dets), score


def _push_through_coupling(layer: AffineCoupling, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The general rule with the network's activations of the forward pass: one product with its Jacobian."""
    kept, moved = layer.partition.split(x)
    if not kept.requires_grad:
        kept = kept.detach().requires_grad_()
    shift, log_scale = layer._affine(kept)
    y = layer.partition.merge(kept, moved * log_scale.exp() + shift)
    with torch.no_grad():
        score_kept, score_moved = layer.partition.split(score)
        score_shift, score_log_scale = score_moved * (-log_scale).exp(), 1 + moved * score_moved
    pulled = _vjp((shift, log_scale), kept, (score_shift, score_log_scale), retain_graph=True)
    score = layer.partition.merge(score_kept - pulled, score_shift)
    return y, log_scale.sum(-1).expand(y.shape[: y.dim() - layer.domain.event_dim]), score


def _vjp(outputs: tuple[Tensor, Tensor], at: Tensor, vectors: tuple[Tensor, Tensor], *, retain_graph: bool) -> Tensor:
    pairs = [(o, v.expand(o.shape)) for o, v in zip(outputs, vectors, strict=True) if o.requires_grad]
    if not pairs:
        return torch.zeros_like(at)
    live, weights = zip(*pairs, strict=True)
    (product,) = torch.autograd.grad(live, at, weights, retain_graph=retain_graph, allow_unused=True)
    return torch.zeros_like(at) if product is None else product


def _base_log_prob(base: Distribution, x: Tensor) -> Tensor:
    plain = base.base_dist if isinstance(base, Independent) else base
    if type(plain) is dist.Normal and not base.batch_shape:
        return normal_log_prob(x, plain.loc, plain.scale)
    return base.log_prob(x)


def _base_score(base: Distribution, x: Tensor) -> Tensor:
    plain = base.base_dist if isinstance(base, Independent) else base
    if type(plain) is dist.Normal:
        return ((plain.loc - x) / plain.scale.square()).detach()
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad(base.log_prob(leaf).sum(), leaf)[0]


def _frozen(base: Distribution) -> Distribution:
    """The same distribution with constant parameters."""
    if isinstance(base, Independent):
        return Independent(_frozen(base.base_dist), base.reinterpreted_batch_ndims)
    return type(base)(**{name: getattr(base, name).detach() for name in base.arg_constraints})


def _constant(module: nn.Module) -> AbstractContextManager[None]:
    """The parameters of a module are constants in here. ``torch.func.functional_call`` cannot be traced."""
    slots: list[Slot] = [(part._parameters, name) for part in module.modules() for name in part._parameters]
    return holding(slots, [None if holder[name] is None else holder[name].detach() for holder, name in slots])
