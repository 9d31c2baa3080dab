"""A run of layers as one node of autograd's graph: value, log-determinant and score in one hand-written pass.

For small batches most of the time of a flow goes into the bookkeeping of autograd and of Modules, layer by layer. A run
takes the steps of its layers, formulas on plain tensors, and carries the two halves of the rows apart as long as the
layers cut them alike. It gives the same as the layers themselves, which are asked where a pass cannot know the answer:
for second derivatives. Chains use it, and ``push_score`` in ``gradients``. An image is one row for each of its pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from operator import attrgetter
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.autograd import forward_ad
from torch.utils.hooks import RemovableHandle

from pyro_affine.actnorm import ActNorm
from pyro_affine.correlations import Correlations
from pyro_affine.coupling import AffineCoupling
from pyro_affine.coupling_step import coupling_step
from pyro_affine.invertible_linear import InvertibleLinear
from pyro_affine.layer_steps import PermutationStep, StandardizationStep, TailStep, TriangularStep, WhiteningStep
from pyro_affine.linear import LowerTriangularAffine, Permutation, Standardization
from pyro_affine.mixing_step import MixingStep, NormStep, joined, tensors_of
from pyro_affine.passes import advance, run_pass
from pyro_affine.steps import Step
from pyro_affine.tails import LOFT
from pyro_affine.transform import FlowTransform
from pyro_affine.whitening import DiagonalWhitening, Whitening

_STEPS: dict[type, Callable[[Any], Any]] = {
    AffineCoupling: coupling_step,
    ActNorm: NormStep,
    InvertibleLinear: MixingStep,
    Permutation: PermutationStep,
    LOFT: TailStep,
    LowerTriangularAffine: TriangularStep,
    Standardization: StandardizationStep,
    DiagonalWhitening: StandardizationStep,
    Whitening: WhiteningStep,
    Correlations: WhiteningStep,
}
_OF_PIXELS = (AffineCoupling, ActNorm, InvertibleLinear)  # layers of images that do alike to each pixel


def step_of(layer: FlowTransform) -> Step | None:
    """The step of a layer; None for a layer that has none and must run as it is.

    >>> step_of(Permutation(torch.tensor([1, 0]))).forward(torch.tensor([[1.0, 2.0]]), []).value
    tensor([[2., 1.]])
    """
    rank, known = len(layer.event_shape or ()), layer.__dict__
    if type(layer) not in _STEPS or layer.guard or not (rank == 1 or (rank == 3 and type(layer) in _OF_PIXELS)):
        return None
    if known.get("context") is not None or known.get("_awaits_data") or any(_hooks([*layer.modules()])):
        return None
    step: Step | None = _STEPS[type(layer)](layer)
    return step


def can_fuse(x: Tensor) -> bool:
    """Whether a hand-written pass may run: on plain tensors, with nothing that must see each operation."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter) or x.is_meta:
        return False
    watched = (
        torch.jit.is_tracing()  # type: ignore[attr-defined]
        or torch._C._are_functorch_transforms_active()
        or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None  # of checkpoints, for one
        or nn.modules.module._has_any_global_hook()
    )
    return not (watched or forward_ad._current_level >= 0 or torch.is_autocast_enabled(x.device.type))


class Sketch:
    """What modules there are below one, to notice one that was exchanged, parametrised or given a hook."""

    def __init__(self, root: nn.Module) -> None:
        _, *modules = root.modules()  # to hold the root itself would be a circle
        self.owners = [module for module in modules if module._parameters]  # to parametrise one changes its type
        self.types = [*map(type, self.owners)]
        self.tables = [module._modules for module in (root, *modules) if module._modules]
        self.children = [*map(dict, self.tables)]
        self.hooks = _hooks(modules)
        self.hooked, self._num_handles = [*map(bool, self.hooks)], -1
        self.flows = [module for module in modules if isinstance(module, FlowTransform)]
        self.chains: list[Any] = [flow for flow in self.flows if hasattr(flow, "memory")]
        self.norms = [flow for flow in self.flows if type(flow) is ActNorm]
        self.options = self._options()

    def holds(self) -> bool:
        """Whether all is as it was."""
        if self._num_handles != RemovableHandle.next_id:  # else no hook came, and there was none that may be gone
            if [*map(bool, self.hooks)] != self.hooked:
                return False
            self._num_handles = -1 if any(self.hooked) else RemovableHandle.next_id
        is_same = self.tables == self.children and [*map(type, self.owners)] == self.types
        return is_same and self._options() == self.options

    def _options(self) -> list[Any]:
        guards, memories = map(attrgetter("guard"), self.flows), map(attrgetter("memory"), self.chains)
        return [*guards, *memories, *map(attrgetter("_awaits_data"), self.norms)]


def _hooks(modules: Iterable[nn.Module]) -> list[Any]:
    """The tables of hooks of modules, which only a call of them would run."""
    names = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    return [getattr(module, name) for module in modules for name in names]


def open_pass(steps: Sequence[Step], x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``Run.push`` as operations on tensors that autograd and compilers see one by one. x shape: (B, D)."""
    y, log_det, score = advance(steps, tensors_of(steps, True), True, x, score, None)
    return y, log_det, score.detach()


Entry = tuple[int, Any, int]
"""Which part of the chain, what runs in its place, dimensions of its log-determinant that belong to the event."""


class Plan:
    """What a chain runs, its layers in runs where they can be, as long as nothing is exchanged.

    Args:
        owner: the chain; all of its modules are watched.
        entries: its layers, base side first.
    """

    def __init__(self, owner: nn.Module, entries: Sequence[Entry]) -> None:
        self.entries: list[Entry] = []
        pairs = [(step_of(entry[1]), entry) for entry in entries]
        for shape, group in groupby(pairs, lambda pair: pair[0] and pair[1][1].event_shape):
            steps, parts = zip(*group, strict=True)
            if shape is not None and any(isinstance(part, AffineCoupling) for _, part, _ in parts):
                parts = ((parts[0][0], Run(joined(steps), shape), parts[0][2]),)
            self.entries += parts
        self.sketch = Sketch(owner)

    def holds(self) -> bool:
        """Whether it still is right."""
        return self.sketch.holds()


class Run:
    """Consecutive layers that have steps, with the two methods of a layer.

    Args:
        steps: of the layers, base side first.
        event_shape: (D,), or (C, H, W) of layers that do alike to each pixel.

    >>> swap = step_of(Permutation(torch.tensor([1, 0])))
    >>> Run([swap], Size([2]))._forward(torch.tensor([1.0, 2.0]))
    (tensor([2., 1.]), tensor(0.))
    """

    guard = False

    def __init__(self, steps: Sequence[Step], event_shape: Size) -> None:
        self.steps, self.event_shape = steps, event_shape

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, log_det, _ = run_pass(self.steps, tensors_of(self.steps, True), self._rows(x), True)
        return self._events(y, x), self._sum(log_det, x)

    def _backward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        steps = self.steps[::-1]
        x, log_det, _ = run_pass(steps, tensors_of(steps, False), self._rows(y), False)
        return self._events(x, y), self._sum(log_det, y)

    def push(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``_forward``, and the score carried along.

        Args:
            x: draws. Shape: batch + event_shape.
            score: grad_x log q(x), constant in the graph. Shape of x.

        Returns:
            ``(y, log_det, score)``: y and log|det dy/dx| in the graph, and grad_y log q(y), constant in it.

        >>> swap = step_of(Permutation(torch.tensor([1, 0])))
        >>> Run([swap], Size([2])).push(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))[2]
        tensor([4., 3.])
        """
        y, log_det, score = run_pass(self.steps, tensors_of(self.steps, True), self._rows(x), True, self._rows(score))
        return self._events(y, x), self._sum(log_det, x), self._events(score, x)

    def _rows(self, events: Tensor) -> Tensor:
        channels_last = events if len(self.event_shape) == 1 else events.movedim(-3, -1)
        return channels_last.reshape(-1, self.event_shape[0])

    def _events(self, rows: Tensor, like: Tensor) -> Tensor:
        if len(self.event_shape) == 1:
            return rows.reshape(like.shape)
        return rows.reshape(like.movedim(-3, -1).shape).movedim(-1, -3)

    def _sum(self, log_det: Tensor, events: Tensor) -> Tensor:
        rank = len(self.event_shape)
        by_pixel = log_det.reshape(events.shape[: events.dim() - rank] + self.event_shape[1:])
        return by_pixel if rank == 1 else by_pixel.sum((-2, -1))
