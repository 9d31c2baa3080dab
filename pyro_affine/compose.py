"""Chains of transforms that pass value and log-determinant through in one go, ours and foreign ones mixed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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

from pyro_affine.foreign import Foreign
from pyro_affine.fused import Entry, Plan, can_fuse
from pyro_affine.memory import Memory, Step, require_memory, run_steps, saves_memory
from pyro_affine.normal import sum_event
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
        memory: what is kept for the backward pass, with the same gradients. ``"full"``: all activations.
            ``"checkpoint"``: the input of each part, which then runs twice. ``"invertible"``: only what goes in and
            comes out, and the rest is computed by inversion; first derivatives only, see ``run_steps`` in ``memory``.
            It holds for chains within the chain too, and can be set later: ``flow.memory = "invertible"``.

    Raises:
        ValueError: for an empty chain, a part that is no bijective transform, or parts that do not fit together.

    >>> from torch.distributions import AffineTransform, ExpTransform
    >>> chain = ComposeFlow([AffineTransform(1.0, 2.0), ExpTransform()])
    >>> chain(torch.zeros(2))
    tensor([2.7183, 2.7183])
    """

    parts: Any  # an nn.ModuleList of FlowTransforms
    memory: Memory = "full"
    _keeps_shape = False  # whether all parts take and make events of the shape of the chain's

    def __init__(
        self, parts: Iterable[Any], *, cache_size: int = 1, guard: bool = False, memory: Memory = "full"
    ) -> None:
        wrapped = [as_flow(part) for part in parts]
        if not wrapped:
            raise ValueError("ComposeFlow needs at least one part, got none; for the identity use a Permutation")
        super().__init__(_event_shape(wrapped), cache_size=cache_size)
        self.parts = nn.ModuleList(wrapped)
        require_memory(memory)
        self.guard, self.memory = guard, memory
        self.batch_shape = torch.broadcast_shapes(*(part.batch_shape for part in wrapped))
        chain = ComposeTransform([*wrapped])
        self._domain: constraints.Constraint = chain.domain
        self._codomain: constraints.Constraint = chain.codomain
        self._extra_dims = list(_extra_dims(wrapped, chain.domain.event_dim))
        if self.event_shape is not None:
            self.forward_shape(self.event_shape)
            self._keeps_shape = all(_keeps(part, self.event_shape) for part in wrapped)

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
        if saves_memory(self.memory):
            return run_steps(list(self._steps(is_forward=True)), x, self.memory)
        for index, part, extra_dims in self._entries(x):
            x, log_det = part._forward(x)
            log_dets.append(sum_event(log_det, extra_dims))
            if self.guard or part.guard:
                _require_finite(x, f"part {index}, {type(part).__name__},")
        return x, _total(log_dets)

    def _backward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        y, log_dets = self._widen(y, self.codomain), []
        if saves_memory(self.memory):
            return run_steps(list(self._steps(is_forward=False))[::-1], y, self.memory)
        for index, part, extra_dims in reversed(self._entries(y)):
            y, log_det = part._backward(y)
            log_dets.append(sum_event(log_det, extra_dims))
            if self.guard or part.guard:
                _require_finite(y, f"the inverse of part {index}, {type(part).__name__},")
        return y, _total(log_dets)

    def _entries(self, value: Tensor) -> Sequence[Entry]:
        """What runs in turn: the parts, or fewer pieces, in which the layers of nested chains are fused."""
        if self.guard or not can_fuse(value):
            return [
                (index, part, dims) for index, (part, dims) in enumerate(zip(self.parts, self._extra_dims, strict=True))
            ]
        plan: Plan | None = self.__dict__.get("_plan")
        if plan is None or not plan.holds():
            plan = self.__dict__["_plan"] = Plan(self, list(self._leaves(0)))
        return plan.entries

    def _leaves(self, dims: int) -> Iterator[Entry]:
        for index, (part, extra) in enumerate(zip(self.parts, self._extra_dims, strict=True)):
            inside = list(part._leaves(dims + extra)) if type(part) is ComposeFlow and part.memory == "full" else []
            if inside and not (part.guard or any(leaf.guard for _, leaf, _ in inside)):
                yield from inside
            else:
                yield index, part, dims + extra

    def _steps(self, dims: int = 0, *, is_forward: bool, guard: bool = False) -> Iterator[Step]:
        """The layers of this and nested chains, base side first, with the names that guards give them."""
        guard, which = guard or self.guard, "part" if is_forward else "the inverse of part"
        for index, (part, extra) in enumerate(zip(self.parts, self._extra_dims, strict=True)):
            if type(part) is ComposeFlow:
                yield from part._steps(dims + extra, is_forward=is_forward, guard=guard)
            else:
                name = f"{which} {index}, {type(part).__name__},"
                yield Step(part, dims + extra, is_forward, name if guard or part.guard else "")

    def _widen(self, value: Tensor, constraint: constraints.Constraint) -> Tensor:
        """Bring in the batch of the context, which Pyro's conditioned transforms do not do themselves."""
        if not self.batch_shape:
            return value
        ones = Size([1] * constraint.event_dim)
        return value.expand(torch.broadcast_shapes(value.shape, self.batch_shape + ones))

    def forward_shape(self, shape: Size) -> Size:
        shape = super().forward_shape(shape)
        for part in () if self._keeps_shape else self.parts:
            shape = part.forward_shape(shape)
        return shape

    def inverse_shape(self, shape: Size) -> Size:
        for part in () if self._keeps_shape else reversed(self.parts):
            shape = part.inverse_shape(shape)
        return super().forward_shape(shape)


class ConditionalComposeFlow(ConditionalTransformModule):
    """Chain of transforms of which some depend on a context: ``condition(context)`` gives a ``ComposeFlow``.

    The conditioned chain shares all parameters with this module, and its batch shape is that of the context.

    Args:
        parts: conditional and unconditional transforms, base side first.
        cache_size, guard, memory: as in ``ComposeFlow``.

    >>> from pyro_affine.coupling import conditional_affine_coupling
    >>> chain = ConditionalComposeFlow([conditional_affine_coupling(4, context_dim=2)])
    >>> chain.condition(torch.zeros(7, 2)).batch_shape
    torch.Size([7])
    """

    def __init__(
        self, parts: Iterable[Any], *, cache_size: int = 1, guard: bool = False, memory: Memory = "full"
    ) -> None:
        super().__init__()
        require_memory(memory)
        self.parts = nn.ModuleList(_as_conditional(part) for part in parts)
        self._options: dict[str, Any] = {"cache_size": cache_size, "guard": guard, "memory": memory}

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


def _keeps(part: FlowTransform, event_shape: Size) -> bool:
    kept = part.forward_shape(event_shape)
    return part.event_shape == event_shape and kept[len(kept) - len(event_shape) :] == event_shape


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
