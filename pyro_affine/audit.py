"""Which entries can a flow not move, and which pairs can it not couple?"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Size, Tensor, nn

from pyro_affine.compose import as_flow
from pyro_affine.transform import FlowTransform

_ENTRIES_AT_ONCE = 64  # rows of a Jacobian in one pass: few enough for memory, many enough for speed


@dataclass(frozen=True)
class AuditReport:
    """What a flow cannot do whatever its parameters.

    Attributes:
        unmoved: indices of entries of y that no parameter moves.
        uncoupled: pairs of entries of y that, under an independent base, stay independent given all other entries.
    """

    unmoved: list[tuple[int, ...]]
    uncoupled: list[tuple[tuple[int, ...], tuple[int, ...]]]

    @property
    def ok(self) -> bool:
        """Every entry moves and every pair interacts."""
        return not self.unmoved and not self.uncoupled

    def __str__(self) -> str:
        if self.ok:
            return "every entry moves and every pair interacts"
        return (
            f"entries that never move: {_some(self.unmoved)}; pairs that never interact: {_some(self.uncoupled)}; "
            "alternate the masks or put a Permutation between the layers"
        )


def audit(transform: nn.Module, event_shape: tuple[int, ...] | None = None) -> AuditReport:
    """Find entries that no layer transforms and pairs that never interact.

    A copy of the flow is run with random parameters: an entry moves if its value depends on them; a pair interacts
    if some entry of x = t.inv(y) depends on both. Entries that the inverse does not read, such as the last of a
    simplex, follow from the others and interact with all. The flow and the global random state stay as they are.

    Args:
        transform: the flow, invertible; a conditional one is conditioned first: ``audit(flow.condition(context))``.
        event_shape: shape of one event of y; needed only where the flow does not know it.

    Returns:
        An ``AuditReport``.

    Raises:
        ValueError: if the event shape is not known.

    >>> from pyro_affine.coupling import affine_coupling
    >>> audit(affine_coupling(4)).unmoved
    [(0,), (1,)]
    """
    flow = as_flow(transform)
    shape = _data_shape(flow, event_shape)
    unmoved = _indices(unmoved_entries(flow, shape))
    uncoupled = ~coupled_entries(_randomised(flow, seed=0), shape)
    names = _indices(torch.ones(shape, dtype=torch.bool))
    return AuditReport(unmoved, [(names[i], names[j]) for i, j in uncoupled.triu(1).nonzero().tolist()])


def unmoved_entries(flow: FlowTransform, event_shape: Size) -> Tensor:
    """Which entries of y no parameter moves. Boolean, shape: event_shape of y. Cost: two passes."""
    x = _points(flow, flow.inverse_shape(event_shape))
    with torch.no_grad():
        first, second = (_randomised(flow, seed)._forward(x)[0] for seed in (0, 1))
    return (first == second).flatten(0, first.dim() - len(event_shape) - 1).all(0)


def coupled_entries(flow: FlowTransform, event_shape: Size) -> Tensor:
    """Which pairs of entries of y meet in some entry of x. Boolean, shape: (D, D), D = number of entries of y."""
    x = _points(flow, flow.inverse_shape(event_shape))
    with torch.no_grad():
        y = flow._forward(x)[0]
    x_rank = len(event_shape) + flow.domain.event_dim - flow.codomain.event_dim
    x_size = x.shape[x.dim() - x_rank :].numel()
    coupled = torch.zeros(event_shape.numel(), event_shape.numel(), dtype=torch.bool, device=y.device)
    read = coupled.any(0)
    for entries in torch.arange(x_size, device=y.device).split(_ENTRIES_AT_ONCE):
        copies = y.repeat(len(entries), *[1] * y.dim()).requires_grad_()  # each entry of x has its own copy of y
        x = flow._backward(copies)[0].reshape(len(entries), -1, x_size)
        (grad,) = torch.autograd.grad(x[torch.arange(len(entries)), :, entries].sum(), copies)
        rows = (grad != 0).reshape(len(entries), -1, len(read)).any(1)
        read = read | rows.any(0)
        coupled |= rows.T.float() @ rows.float() > 0
        if coupled.all():  # soon, in a flow that mixes well
            break
    return coupled | ~read | ~read[:, None]


def require_all_moved(flow: FlowTransform, event_shape: Size) -> None:
    """Raise a ValueError if some entry would keep its base distribution for ever."""
    unmoved = _indices(unmoved_entries(flow, event_shape))
    if unmoved:
        raise ValueError(
            f"every entry must be moved by some layer, got {len(unmoved)} of {event_shape.numel()} that never are: "
            f"{_some(unmoved)}; use two layers at least, alternate the masks or put a Permutation between the layers"
        )


def _data_shape(flow: FlowTransform, event_shape: tuple[int, ...] | None) -> Size:
    if event_shape is not None:
        return Size(event_shape)
    if flow.event_shape is None:
        raise ValueError("the event shape must be known, got a flow without one; pass event_shape")
    full = flow.forward_shape(flow.event_shape)
    return full[len(full) - flow.codomain.event_dim :]


def _points(flow: FlowTransform, shape: Size, num_points: int = 3) -> Tensor:
    """A few points of the domain; more than one since a unit of a network may be off at a single point."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn((num_points, *shape), generator=generator, device="cpu")
    own = next((t for t in flow._tensors() if t.is_floating_point()), points)
    return points.to(own)


def _randomised(flow: FlowTransform, seed: int) -> FlowTransform:
    """A copy whose parameters are jittered, since zero-initialised layers would hide what depends on what."""
    flow = copy.deepcopy(flow).eval()  # dropout would draw from the global random state
    generator = torch.Generator().manual_seed(seed)
    for tensor in flow._tensors():
        if isinstance(tensor, nn.Parameter):
            tensor.data.add_(0.1 * torch.randn(tensor.shape, generator=generator, device="cpu").to(tensor))
    return flow


def _indices(mask: Tensor) -> list[tuple[int, ...]]:
    return [tuple(index) for index in mask.nonzero().tolist()]


def _some(items: list[tuple[int, ...]] | list[tuple[tuple[int, ...], tuple[int, ...]]], limit: int = 8) -> str:
    return ", ".join(map(str, items[:limit])) + (f" and {len(items) - limit} more" if len(items) > limit else "")
