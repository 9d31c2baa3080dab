"""Chains that keep no activations for the backward pass and compute them again, from the input or by inversion."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint
from torch.utils.checkpoint import checkpoint

from pyro_affine.cache import Slot
from pyro_affine.normal import sum_event
from pyro_affine.transform import FlowTransform, _require_finite

Memory = Literal["full", "checkpoint", "invertible"]


class Step(NamedTuple):
    """One part of a chain in one direction.

    Attributes:
        part: the layer.
        extra_dims: dimensions of its log-determinant that belong to the event of the chain.
        is_forward: whether it is run from base to data.
        guard: what to call it in an error if its value is not finite; empty for no check.
    """

    part: FlowTransform
    extra_dims: int
    is_forward: bool
    guard: str

    def run(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Value and log-determinant of the part, the latter summed over the event of the chain."""
        value, log_det = self.part._forward(value) if self.is_forward else self.part._backward(value)
        if self.guard:
            _require_finite(value, self.guard)
        return value, sum_event(log_det, self.extra_dims)

    @property
    def is_between_reals(self) -> bool:
        """Whether neither side has ends, near which an inverse loses digits."""
        return all(is_real(side) for side in (self.part.domain, self.part.codomain))

    def undo(self, value: Tensor) -> Tensor:
        """What the part was given, from what it made."""
        return (self.part._backward if self.is_forward else self.part._forward)(value)[0]


def require_memory(memory: str) -> None:
    """Raise a ValueError for a word that is none of ``Memory``."""
    words = get_args(Memory)
    if memory not in words:
        raise ValueError(
            f"memory must be one of {', '.join(map(repr, words))}, got {memory!r}; 'full' is the fastest, 'invertible' "
            "needs the least memory"
        )


def saves_memory(memory: Memory) -> bool:
    """Whether there is something to save: a graph is being built, by plain eager code."""
    if memory == "full" or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    transformed = torch._C._are_functorch_transforms_active()  # vmap, jacrev: their graphs are not autograd's
    return not transformed and not torch.jit.is_tracing()  # type: ignore[attr-defined]


def run_steps(steps: Sequence[Step], value: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
    """Value and log-determinant of a chain, computed without keeping the activations.

    ``"checkpoint"`` keeps what goes into each part. ``"invertible"`` keeps what goes into the first part and comes out
    of the last; the backward pass goes through the parts in reverse, computes what went into each by its inverse, runs
    it again and differentiates. So memory does not grow with the number of parts; a step costs two runs of each
    part more. Parts that leave the reals, such as a last sigmoid, keep what went into them: their inverses lose digits.
    What is kept is compared with what the inverses lead back to: gradients of a chain that does not come back are an
    error, not a number.

    Args:
        steps: the parts in the order in which they run.
        value: what goes into the first.
        memory: ``"checkpoint"`` or ``"invertible"``.

    Raises:
        ValueError: in the backward pass of ``"invertible"``, if the inverses do not lead back, a part uses tensors that
            are neither parameters nor buffers nor its context, or second derivatives are asked for.

    Source: The Reversible Residual Network: Backpropagation Without Storing Activations (Gomez et al., 2017).
    """
    plan = [(step, _trained_slots(step.part)) for step in steps]
    if memory == "invertible":
        tensors = [holder[name] for _, slots in plan for holder, name in slots]
        return _Invertible.apply(plan, value, *tensors)  # type: ignore[no-any-return]
    log_dets = []
    for step, slots in plan:
        frozen = partial(_run_with, step, slots, [holder[name] for holder, name in slots])
        value, log_det = checkpoint(frozen, value, use_reentrant=False)
        log_dets.append(log_det)
    return value, sum(log_dets[1:], start=log_dets[0])


class _Invertible(torch.autograd.Function):
    """The chain as one node of the graph: its inputs are the value and all trained tensors of its parts."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, value: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        ctx.plan, ctx.precision = plan, _precision_as_now(value.device.type)
        made, log_dets, kept = value, [], []
        with ctx.precision():
            for step, _ in plan:
                kept.append(None if step.is_between_reals else made)
                made, log_det = step.run(made)
                log_dets.append(log_det)
        ctx.save_for_backward(value, made, *kept, *tensors)
        return made, sum(log_dets[1:], start=log_dets[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise ValueError(
                "memory='invertible' gives first derivatives only, got create_graph=True; set memory='full' on the flow"
            )
        first, made, *saved = ctx.saved_tensors
        kept, tensors = saved[: len(ctx.plan)], saved[len(ctx.plan) :]
        (grad, grad_log_det), found = grads, []
        with ctx.precision():
            for (step, slots), anchor in zip(reversed(ctx.plan), reversed(kept), strict=True):
                own, tensors = tensors[len(tensors) - len(slots) :], tensors[: len(tensors) - len(slots)]
                with holding(slots, own):
                    if anchor is not None:
                        _require_recovered(step.run(anchor)[0], made, ctx.plan)
                    made = step.undo(made) if anchor is None else anchor
                grad, *own_grads = _differentiate(step, slots, own, made, (grad, grad_log_det))
                found.append(own_grads)
            _require_recovered(first, made, ctx.plan)
        return (None, grad, *(g for own_grads in found[::-1] for g in own_grads))


_Slots = list[Slot]
_Plan = list[tuple[Step, _Slots]]


def _differentiate(
    step: Step, slots: _Slots, tensors: list[Tensor], given: Tensor, grads: tuple[Tensor, Tensor]
) -> tuple[Tensor, ...]:
    """The gradients with respect to what the step was given and to its tensors."""
    given, *leaves = (tensor.detach().requires_grad_() for tensor in (given, *tensors))  # tensors may have hooks
    with holding(slots, leaves), torch.enable_grad():
        value, log_det = step.run(given)
    pairs = [(value, grads[0]), (log_det, grads[1].sum_to_size(log_det.shape))]
    outputs, weights = zip(*[pair for pair in pairs if pair[0].requires_grad], strict=True)
    _require_all_known(step, outputs, [given, *leaves])
    found = torch.autograd.grad(outputs, [given, *leaves], weights, allow_unused=True)
    return (torch.zeros_like(given) if found[0] is None else found[0], *found[1:])


def is_real(constraint: Constraint) -> bool:
    """Whether all reals are allowed, entry by entry."""
    return isinstance(innermost(constraint), type(constraints.real))


def innermost(constraint: Constraint) -> Constraint:
    """The constraint without the dimensions that ``independent`` adds."""
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint


def _run_with(step: Step, slots: _Slots, tensors: list[Tensor], value: Tensor) -> tuple[Tensor, Tensor]:
    with holding(slots, tensors):
        return step.run(value)


def _trained_slots(part: FlowTransform) -> _Slots:
    """Where the tensors stand that a part needs gradients for."""
    slots = ((holder, name, holder[name]) for holder, name in part._find_slots())
    return [(holder, name) for holder, name, held in slots if isinstance(held, Tensor) and held.requires_grad]


@contextmanager
def holding(slots: _Slots, tensors: Sequence[Tensor | None]) -> Iterator[None]:
    """Put tensors in place, such as those of the forward pass: ``functional_call`` may have taken them away since."""
    before = [holder[name] for holder, name in slots]
    try:
        for (holder, name), tensor in zip(slots, tensors, strict=True):
            holder[name] = tensor
        yield
    finally:
        for (holder, name), tensor in zip(slots, before, strict=True):
            holder[name] = tensor


def _precision_as_now(device_type: str) -> Callable[[], AbstractContextManager[Any]]:
    """Autocast as it is now, without its cache of cast weights, which would keep those made without gradients."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext
    dtype, enabled = torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type)
    return partial(torch.autocast, device_type, dtype=dtype, enabled=enabled, cache_enabled=False)


def _require_recovered(given: Tensor, recovered: Tensor, plan: _Plan) -> None:
    """The largest relative error of the recomputed activations passes on to the gradients as it is."""
    if not given.numel():
        return
    lowest = torch.get_autocast_dtype(given.device.type) if torch.is_autocast_enabled(given.device.type) else None
    eps = max(torch.finfo(dtype).eps for dtype in (given.dtype, lowest or given.dtype))
    error = float(((recovered - given).abs() / (1 + given.abs())).max())
    if not error <= eps ** (1 / 3):  # float32: half a per cent; also catches nan
        names = sorted({type(step.part).__name__ for step, _ in plan})
        raise ValueError(
            f"memory='invertible' needs parts that their inverses undo, got a relative error of {error:.2g} after "
            f"{len(plan)} parts ({', '.join(names)}); use memory='checkpoint' where networks draw random numbers "
            "(dropout) or keep running statistics (batch norm), a smaller scale bound, or float64"
        )


def _require_all_known(step: Step, outputs: Sequence[Tensor], known: list[Tensor]) -> None:
    """Raise if a tensor that needs a gradient is in use and is not among those that it is computed for."""
    left, seen, ids = [output.grad_fn for output in outputs], set(), set(map(id, known))
    while left:
        node: Any = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        left += [before for before, _ in node.next_functions]
        if type(node).__name__ == "AccumulateGrad" and id(node.variable) not in ids:
            raise ValueError(
                f"memory='invertible' needs all trained tensors of a part as parameters of a Module, got one of shape "
                f"{tuple(node.variable.shape)} that {type(step.part).__name__} uses and no Module holds; make the "
                "conditioner a Module, or use memory='checkpoint'"
            )
