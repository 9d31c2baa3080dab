"""A check-up of a flow, layer by layer: scales, rounding errors, and where values stop being finite."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from pyro.distributions.conditional import ConditionalTransform
from pyro.infer.autoguide import AutoContinuous
from torch import Size, Tensor, nn

from pyro_affine.compose import ComposeFlow, as_flow
from pyro_affine.coupling import AffineCoupling
from pyro_affine.flows import NormalizingFlow
from pyro_affine.foreign import Foreign
from pyro_affine.health_report import HealthReport, LayerHealth
from pyro_affine.linear import Standardization
from pyro_affine.random_state import seeded
from pyro_affine.transform import FlowTransform, _Inverse

_NUM_POINTS = 1000  # draws of the base where no points are given
_NEAR = 0.95  # share of the bound of a log-scale; there a tanh has a tenth of its slope left


def health(subject: Any, points: Tensor | None = None, *, context: Tensor | None = None) -> HealthReport:
    """Run points through a flow and back, and report what each layer does to them.

    Errors are max |x' - x| / max(1, |x|) over the entries, x' what comes back. An event that turns
    non-finite is counted at the layer where it does and left out from there on; nothing is raised for it.
    Parameters, training mode, caches and the global random state stay as they are.

    Args:
        subject: a transform (ours, of torch or of Pyro; conditioned, if it is conditional), a
            ``NormalizingFlow``, or an ``AutoContinuous`` guide that has been called once.
        points: for a transform or a guide, points of the base side, which go forward and back; for a
            ``NormalizingFlow``, data, which go backward and forth. For data through a transform use
            ``health(transform.inv, data)``. Shape: batch + event_shape. Default: 1000 draws of the base (of a
            standard normal, for a transform) from a fixed seed.
        context: context of a conditional ``NormalizingFlow``. Shape: batch + (context_dim,).

    Returns:
        A ``HealthReport``; print it.

    Raises:
        ValueError: for anything that is no bijective transform, a flow that needs a context, points of the
            wrong shape or dtype, or no points for a transform that does not know its event shape.

    >>> from pyro_affine.flows import real_nvp
    >>> report = health(real_nvp(4))
    >>> report.ok, report.layers[0].name, report.layers[0].scale
    (True, 'parts.0 AffineCoupling', (1.0, 1.0))
    """
    flow, points, from_data = _plan(subject, points, context)
    leaves = list(_leaves(flow))
    layers = [layer for _, layer in leaves]
    inverses = [layer.inv for layer in layers[::-1]]
    with torch.no_grad(), _undisturbed(flow):
        start = _cloud(points, (flow.codomain if from_data else flow.domain).event_dim)
        out = _walk(inverses if from_data else layers, start)
        home = _walk(layers if from_data else inverses, out[-1])
        first, second = (out[::-1], home) if from_data else (out, home[::-1])  # base side first
        passages = zip(leaves, pairwise(first), pairwise(second), strict=True)
        rows = tuple(_examine(*leaf, there, back, from_data) for leaf, there, back in passages)
    num_events = start.alive.numel()
    num_bad = num_events - start.num_alive
    return HealthReport(rows, home[-1].error_to(start), points.dtype, num_events, num_bad, start.largest)


class _Cloud(NamedTuple):
    """Events of which some are no longer finite; those hold a copy of a finite one and do not count."""

    values: Tensor
    alive: Tensor

    @property
    def num_alive(self) -> int:
        return int(self.alive.sum())

    @property
    def largest(self) -> float:
        return float(self.values[self.alive].abs().max()) if self.num_alive else math.nan

    def error_to(self, other: _Cloud) -> float:
        """Largest distance to the events of the same place, relative where they are large."""
        both = self.alive & other.alive
        if not both.any():
            return math.nan
        true = other.values[both]
        return float(((self.values[both] - true).abs() / true.abs().clamp(min=1)).max())


def _cloud(values: Tensor, event_dim: int, alive: Tensor | bool = True) -> _Cloud:
    finite = values.isfinite().flatten(values.dim() - event_dim).all(-1) if event_dim else values.isfinite()
    alive = finite & alive
    if alive.any() and not alive.all():
        values = torch.where(alive.reshape(alive.shape + (1,) * event_dim), values, values[alive][0])
    return _Cloud(values, alive)


def _walk(layers: list[FlowTransform], start: _Cloud) -> list[_Cloud]:
    """The events before the first layer and after each."""
    clouds = [start]
    for layer in layers:
        clouds.append(_step(layer, clouds[-1]) if clouds[-1].num_alive else clouds[-1])
    return clouds


def _step(layer: FlowTransform, before: _Cloud) -> _Cloud:
    event_dim = before.values.dim() - before.alive.dim() + layer.codomain.event_dim - layer.domain.event_dim
    try:
        values, log_det = layer._forward(before.values)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # a singular matrix
        return before._replace(alive=torch.zeros_like(before.alive))
    finite = _per_event(log_det, layer, before).isfinite()
    return _cloud(values, event_dim, before.alive & finite.flatten(before.alive.dim()).all(-1))


def _per_event(log_det: Tensor, layer: FlowTransform, before: _Cloud) -> Tensor:
    """Log-determinant of each event of the layer, with a last dimension. Shape: batch of the flow + (-1,)."""
    batch = before.values.shape[: before.values.dim() - layer.domain.event_dim]
    return log_det.expand(batch).reshape((*before.alive.shape, -1))


def _examine(
    name: str,
    layer: FlowTransform,
    there: tuple[_Cloud, _Cloud],
    back: tuple[_Cloud, _Cloud],
    from_data: bool,
) -> LayerHealth:
    """One layer, from the events on its base and data side on the way there and on the way back."""
    x, y = there
    entered, left, returned = (y, x, back[1]) if from_data else (x, y, back[0])
    again = _walk([layer if from_data else layer.inv], left)[-1]
    lost = [abs(data.num_alive - base.num_alive) for base, data in (there, back)]
    log_scales, near_bound = _log_scales(layer, x._replace(alive=x.alive & y.alive))
    return LayerHealth(
        name=name,
        scale=_range(log_scales.exp()),
        near_bound=near_bound,
        own_error=again.error_to(entered),
        total_error=returned.error_to(entered),
        largest=y.largest,
        lost_forward=lost[1] if from_data else lost[0],
        lost_backward=lost[0] if from_data else lost[1],
        finite_parameters=all(bool(t.isfinite().all()) for t in layer._tensors() if t.is_floating_point()),
    )


def _log_scales(layer: FlowTransform, x: _Cloud) -> tuple[Tensor, float]:
    """Logarithms of the factors by which a layer stretches entries, and the share of them near a bound."""
    if isinstance(layer, _Inverse):
        log_scales, near_bound = _log_scales(layer.transform, _walk([layer], x)[-1])
        return -log_scales, near_bound
    if not x.num_alive:
        return torch.zeros(0), math.nan
    if isinstance(layer, AffineCoupling):
        log_scale = layer._affine(layer.partition.split(x.values)[0])[1]
        batch = x.values.shape[: x.values.dim() - layer.domain.event_dim]
        log_scale = log_scale.expand(batch + log_scale.shape[-1:])[x.alive]
        return log_scale, _share_near(log_scale, layer.scale.range)
    matrix = getattr(layer, "scale_tril", None)
    if matrix is not None and matrix.isfinite().all():
        return torch.linalg.svdvals(matrix).log(), math.nan
    if isinstance(layer, Standardization):
        return layer.scale.log(), math.nan
    log_det = _per_event(layer._forward(x.values)[1], layer, x)[x.alive]
    return log_det * (log_det[0].numel() / x.values[x.alive][0].numel()), math.nan


def _share_near(log_scale: Tensor, bounds: tuple[float, float]) -> float:
    lower, upper = (math.log(bound) if bound > 0 else -math.inf for bound in bounds)
    if lower == upper or (lower == -math.inf and upper == math.inf):
        return math.nan
    return float(((log_scale > _NEAR * upper) | (log_scale < _NEAR * lower)).double().mean())


def _range(values: Tensor) -> tuple[float, float]:
    return (float(values.min()), float(values.max())) if values.numel() else (math.nan, math.nan)


def _leaves(flow: FlowTransform, path: str = "") -> Iterator[tuple[str, FlowTransform]]:
    """Layers of nested chains, base side first, each with its path and type."""
    if isinstance(flow, ComposeFlow):
        for index, part in enumerate(flow.parts):
            yield from _leaves(as_flow(part), f"{path}parts.{index}.")
    elif isinstance(flow, _Inverse):
        for name, layer in reversed(list(_leaves(flow.transform, f"{path}transform."))):
            yield f"{name} inverted", layer.inv
    else:
        kind = type(flow.transform if isinstance(flow, Foreign) else flow).__name__
        yield f"{path[:-1]} {kind}".strip(), flow


def _plan(subject: Any, points: Tensor | None, context: Tensor | None) -> tuple[FlowTransform, Tensor, bool]:
    """The flow, points that match its batch, and whether they lie on its data side."""
    flow: FlowTransform
    base, from_data = None, False
    if isinstance(subject, NormalizingFlow):
        flow, base, from_data = subject._chain(context), subject._base(), points is not None
    elif isinstance(subject, AutoContinuous):
        _require_no_data(subject)
        flow, base = as_flow(subject.get_transform()), subject.get_base_dist()
    elif isinstance(subject, ConditionalTransform):
        raise ValueError(
            f"health needs a flow at one context, got {type(subject).__name__}; pass flow.condition(context)"
        )
    else:
        flow = as_flow(subject)
    points = _base_draws(flow, base) if points is None else points
    flow._check(points, flow.inverse_shape if from_data else flow.forward_shape)
    if not points.numel():
        raise ValueError(f"health needs a point at least, got a tensor of shape {tuple(points.shape)}")
    ones = Size([1] * (flow.codomain if from_data else flow.domain).event_dim)
    return flow, points.expand(torch.broadcast_shapes(points.shape, flow.batch_shape + ones)), from_data


def _require_no_data(guide: AutoContinuous) -> None:
    if hasattr(guide, "context_fn"):
        raise ValueError(
            f"health needs a flow at one context, got {type(guide).__name__}, whose flow depends on the data; pass "
            "guide.get_transform(data)"
        )


def _base_draws(flow: FlowTransform, base: Any) -> Tensor:
    shape = Size([_NUM_POINTS]) + flow.batch_shape
    with seeded(0):
        if base is not None:
            return base.sample(shape)  # type: ignore[no-any-return]
        if flow.event_shape is None:
            raise ValueError(f"the event shape must be known, got a {type(flow).__name__} without one; pass points")
        own = next((t for t in flow._tensors() if t.is_floating_point()), torch.zeros(()))
        return torch.randn(shape + flow.event_shape).to(own)


@contextmanager
def _undisturbed(flow: FlowTransform) -> Iterator[None]:
    """Evaluation mode and no guards inside; both as they were afterwards."""
    training = [module for module in flow.modules() if module.training]
    guarded = [module for module in flow.modules() if isinstance(module, FlowTransform) and module.guard]
    try:
        _set(training, "training", False)
        _set(guarded, "guard", False)
        yield
    finally:
        _set(training, "training", True)
        _set(guarded, "guard", True)


def _set(modules: Sequence[nn.Module], name: str, value: bool) -> None:
    for module in modules:
        setattr(module, name, value)
