"""Chains of transforms that pass value and log-determinant through in one go, ours and foreign ones mixed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from pyro.distributions import ConditionalTransformModule
from pyro.distributions.conditional import (
    ConditionalComposeTransformModule,
    ConditionalTransform,
    ConstantConditionalTransform,
)
from torch import Size, Tensor, nn
from torch.distributions import ComposeTransform, Transform, constraints
from torch.distributions.transforms import _InverseTransform
from torch.distributions.utils import _sum_rightmost

from pyro_affine.foreign import Foreign
from pyro_affine.transform import FlowTransform, _require_finite


def as_flow(part: Any) -> FlowTransform:
    """The transform itself if it is ours, else a wrapper that gives it our contract.

    Raises:
        ValueError: if ``part`` is no bijective transform.

    >>> from torch.distributions import ExpTransform
    >>> as_flow(ExpTransform()).sign
    1
    """
    if isinstance(part, FlowTransform):
        return part
    if not isinstance(part, Transform) or not part.bijective:
        raise ValueError(
            f"a part must be a bijective torch.distributions.Transform, got {type(part).__name__}; a conditional one "
            "goes into ConditionalComposeFlow, or is conditioned first: part.condition(context)"
        )
    if isinstance(part, ComposeTransform) and part.parts:
        return ComposeFlow(part.parts)
    if isinstance(part, _InverseTransform):
        return as_flow(part.inv).inv
    return Foreign(part)


class ComposeFlow(FlowTransform):
    """Chain of transforms y = t_K(...t_2(t_1(x))), one pass for value and log-determinant.

    log|det dy/dx| = sum_k log|det dt_k|, each term summed over the event of the whole chain. Parts may be
    ``FlowTransform`` layers or any bijective transform of torch or Pyro; the latter are wrapped, their parameters
    registered, their own caches never trusted across calls.

    Args:
        parts: transforms from the base side to the data side, at least one.
        cache_size: 1 (default) or 0 for no cache.
        guard: raise at the first part whose value is not finite, naming it.

    Raises:
        ValueError: for an empty chain, a part that is no bijective transform, or parts that do not fit together.

    >>> from torch.distributions import AffineTransform, ExpTransform
    >>> chain = ComposeFlow([AffineTransform(1.0, 2.0), ExpTransform()])
    >>> chain(torch.zeros(2))
    tensor([2.7183, 2.7183])
    """

    parts: Any  # an nn.ModuleList of FlowTransforms

    def __init__(self, parts: Iterable[Any], *, cache_size: int = 1, guard: bool = False) -> None:
        wrapped = [as_flow(part) for part in parts]
        if not wrapped:
            raise ValueError("ComposeFlow needs at least one part, got none; for the identity use a Permutation")
        super().__init__(_event_shape(wrapped), cache_size=cache_size)
        self.parts = nn.ModuleList(wrapped)
        self.guard = guard
        self.batch_shape = torch.broadcast_shapes(*(part.batch_shape for part in wrapped))
        chain = ComposeTransform([*wrapped])
        self._domain: constraints.Constraint = chain.domain
        self._codomain: constraints.Constraint = chain.codomain
        self._extra_dims = list(_extra_dims(wrapped, chain.domain.event_dim))
        if self.event_shape is not None:
            self.forward_shape(self.event_shape)

    @property
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        return self._domain

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        return self._codomain

    @property
    def sign(self) -> int:
        sign = 1
        for part in self.parts:
            sign = sign * part.sign
        return sign

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, log_dets = self._widen(x, self.domain), []
        for index, (part, extra_dims) in enumerate(zip(self.parts, self._extra_dims, strict=True)):
            x, log_det = part._forward(x)
            log_dets.append(_sum_rightmost(log_det, extra_dims) if extra_dims else log_det)
            if self.guard or part.guard:
                _require_finite(x, f"part {index}, {type(part).__name__},")
        return x, _total(log_dets)

    def _backward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        y, log_dets = self._widen(y, self.codomain), []
        for index in reversed(range(len(self.parts))):
            part, extra_dims = self.parts[index], self._extra_dims[index]
            y, log_det = part._backward(y)
            log_dets.append(_sum_rightmost(log_det, extra_dims) if extra_dims else log_det)
            if self.guard or part.guard:
                _require_finite(y, f"the inverse of part {index}, {type(part).__name__},")
        return y, _total(log_dets)

    def _widen(self, value: Tensor, constraint: constraints.Constraint) -> Tensor:
        """Bring in the batch of the context, which Pyro's conditioned transforms do not do themselves."""
        if not self.batch_shape:
            return value
        ones = Size([1] * constraint.event_dim)
        return value.expand(torch.broadcast_shapes(value.shape, self.batch_shape + ones))

    def forward_shape(self, shape: Size) -> Size:
        shape = super().forward_shape(shape)
        for part in self.parts:
            shape = part.forward_shape(shape)
        return shape

    def inverse_shape(self, shape: Size) -> Size:
        for part in reversed(self.parts):
            shape = part.inverse_shape(shape)
        return super().forward_shape(shape)


class ConditionalComposeFlow(ConditionalTransformModule):
    """Chain of transforms of which some depend on a context: ``condition(context)`` gives a ``ComposeFlow``.

    The conditioned chain shares all parameters with this module, and its batch shape is that of the context.

    Args:
        parts: conditional and unconditional transforms, base side first.
        cache_size, guard: as in ``ComposeFlow``.

    >>> from pyro_affine.coupling import conditional_affine_coupling
    >>> chain = ConditionalComposeFlow([conditional_affine_coupling(4, context_dim=2)])
    >>> chain.condition(torch.zeros(7, 2)).batch_shape
    torch.Size([7])
    """

    def __init__(self, parts: Iterable[Any], *, cache_size: int = 1, guard: bool = False) -> None:
        super().__init__()
        self.parts = nn.ModuleList(_as_conditional(part) for part in parts)
        self._options: dict[str, Any] = {"cache_size": cache_size, "guard": guard}

    @property
    def codomain(self) -> constraints.Constraint:
        """Where the last part ends."""
        return getattr(self.parts[-1], "codomain", constraints.real)

    def condition(self, context: Tensor) -> ComposeFlow:
        """The chain at this context. Context shape: batch + (context_dim,)."""
        chain = ComposeFlow([_at(part, context) for part in self.parts], **self._options)
        if chain.event_shape is not None:  # else nothing tells the batch from the event
            chain.batch_shape = torch.broadcast_shapes(chain.batch_shape, context.shape[:-1])
        return chain


def _as_conditional(part: Any) -> Any:
    if isinstance(part, ConditionalComposeTransformModule):
        return ConditionalComposeFlow(part.transforms)
    if isinstance(part, ConstantConditionalTransform):
        return as_flow(part.transform)
    if isinstance(part, ConditionalTransform) and not isinstance(part, nn.Module):
        raise ValueError(
            f"a conditional part must be a torch Module so that its parameters are kept, got {part!r}; derive it "
            "from pyro.distributions.ConditionalTransformModule"
        )
    return part if isinstance(part, ConditionalTransform) else as_flow(part)


def _at(part: Any, context: Tensor) -> FlowTransform:
    if isinstance(part, FlowTransform):
        return part
    transform = part.condition(context)
    if isinstance(transform, FlowTransform):
        return transform
    flow = as_flow(transform)
    flow.owner = part  # Pyro's conditioned transforms hide their parameters
    return flow


def _event_shape(parts: list[FlowTransform]) -> Size | None:
    """The first event shape that a part knows, carried back to the front of the chain."""
    for index, part in enumerate(parts):
        if part.event_shape is not None:
            shape = part.event_shape
            for before in reversed(parts[:index]):
                shape = before.inverse_shape(shape)
            return shape
    return None


def _extra_dims(parts: list[FlowTransform], event_dim: int) -> Iterator[int]:
    """How many dimensions of a part's log-determinant belong to the event of the chain."""
    for part in parts:
        yield event_dim - part.domain.event_dim
        event_dim += part.codomain.event_dim - part.domain.event_dim


def _total(log_dets: list[Tensor]) -> Tensor:
    total = log_dets[0]
    for log_det in log_dets[1:]:
        total = total + log_det
    return total
