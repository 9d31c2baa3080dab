"""A run of layers as one node of autograd's graph: value, log-determinant and score in one hand-written pass.

For small batches most of the time of a flow goes into the bookkeeping of autograd and of Modules, layer by layer. A run
takes the steps of its layers, formulas on plain tensors, and carries the two halves of the rows apart as long as the
layers cut them alike. It gives the same as the layers themselves, which are asked where a pass cannot know the answer:
for second derivatives. Chains use it, and ``push_score`` in ``gradients``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain, groupby
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.hooks import RemovableHandle

from pyro_affine.correlations import Correlations
from pyro_affine.coupling import AffineCoupling
from pyro_affine.coupling_step import coupling_step
from pyro_affine.layer_steps import PermutationStep, StandardizationStep, TailStep, TriangularStep, WhiteningStep
from pyro_affine.linear import LowerTriangularAffine, Permutation, Standardization
from pyro_affine.steps import Step, Wanted
from pyro_affine.tails import LOFT
from pyro_affine.transform import FlowTransform
from pyro_affine.whitening import DiagonalWhitening, Whitening

_STEPS: dict[type, Callable[[Any], Any]] = {
    AffineCoupling: coupling_step,
    Permutation: PermutationStep,
    LOFT: TailStep,
    LowerTriangularAffine: TriangularStep,
    Standardization: StandardizationStep,
    DiagonalWhitening: StandardizationStep,
    Whitening: WhiteningStep,
    Correlations: WhiteningStep,
}


def step_of(layer: FlowTransform) -> Step | None:
    """The step of a layer; None for a layer that has none and must run as it is.

    >>> step_of(Permutation(torch.tensor([1, 0]))).forward(torch.tensor([[1.0, 2.0]]), []).value
    tensor([[2., 1.]])
    """
    if type(layer) not in _STEPS or layer.guard or len(layer.event_shape or ()) != 1:
        return None
    if layer.__dict__.get("context") is not None or any(_hooks([*layer.modules()])):
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
        return [*map(attrgetter("guard"), self.flows), *map(attrgetter("memory"), self.chains)]


def _hooks(modules: Iterable[nn.Module]) -> list[Any]:
    """The tables of hooks of modules, which only a call of them would run."""
    names = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    return [getattr(module, name) for module in modules for name in names]


def fused_pass(steps: Sequence[Step], x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Run layers forward and carry the score along.

    Args:
        steps: of the layers, base side first.
        x: draws. Shape: batch + (D,).
        score: grad_x log q(x), constant in the graph. Shape of x.

    Returns:
        ``(y, log_det, score)``: y and log|det dy/dx| in the graph, and grad_y log q(y), constant in it.

    >>> swap = step_of(Permutation(torch.tensor([1, 0])))
    >>> fused_pass([swap], torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))[2]
    tensor([4., 3.])
    """
    rows = x.reshape(-1, x.shape[-1])
    y, log_det, score = _apply(steps, rows, True, score.reshape(rows.shape))
    return y.reshape(x.shape), log_det.reshape(x.shape[:-1]), score.reshape(x.shape)


def open_pass(steps: Sequence[Step], x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``fused_pass`` as operations on tensors that autograd and compilers see one by one. x shape: (B, D)."""
    y, log_det, score = _advance(steps, [step.tensors() for step in steps], True, x, score, None)
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
        for has_step, group in groupby(entries, lambda entry: step_of(entry[1]) is not None):
            parts = list(group)
            if has_step and any(isinstance(part, AffineCoupling) for _, part, _ in parts):
                parts = [(parts[0][0], Run([part for _, part, _ in parts]), parts[0][2])]
            self.entries += parts
        self.sketch = Sketch(owner)

    def holds(self) -> bool:
        """Whether it still is right."""
        return self.sketch.holds()


class Run:
    """Consecutive layers that have steps, with the two methods of a layer.

    >>> swap = Permutation(torch.tensor([1, 0]))
    >>> Run([swap])._forward(torch.tensor([1.0, 2.0]))
    (tensor([2., 1.]), tensor(0.))
    """

    guard = False

    def __init__(self, layers: Sequence[FlowTransform]) -> None:
        steps = [step_of(layer) for layer in layers]
        self.steps = [step for step in steps if step is not None]

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, log_det, _ = _apply(self.steps, x.reshape(-1, x.shape[-1]), True)
        return y.reshape(x.shape), log_det.reshape(x.shape[:-1])

    def _backward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x, log_det, _ = _apply(self.steps[::-1], y.reshape(-1, y.shape[-1]), False)
        return x.reshape(y.shape), log_det.reshape(y.shape[:-1])


def _apply(steps: Sequence[Step], rows: Tensor, is_forward: bool, score: Tensor | None = None) -> Any:
    tensors = [step.tensors() for step in steps]
    inputs = [rows, *chain.from_iterable(tensors)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        return _Pass.apply(steps, tensors, is_forward, score, *inputs)
    return _advance(steps, tensors, is_forward, rows, score, None)


def _advance(
    steps: Sequence[Step], tensors: Sequence[list[Tensor]], is_forward: bool, rows: Any, score: Any, pulls: Any
) -> tuple[Tensor, Tensor, Any]:
    """Through all steps; how gradients come back is added to ``pulls``, if that is a list."""
    blank, at, log_dets = rows, None, []
    record = not (score is None and pulls is None)
    for step, own in zip(steps, tensors, strict=True):
        if (cut := step.cut) != at:
            rows, score, at = _cut(rows, cut), None if score is None else _cut(score, cut), cut
        rows, log_det, pull, push = (step.forward if is_forward else step.inverse)(rows, own, record=record)
        if log_det is not None:
            log_dets.append(log_det)
        if score is not None and push is not None:
            score = push(score)
        if pulls is not None:
            pulls.append((cut, pull, len(own)))
    return _cut(rows, None), _sum_of(log_dets, blank), None if score is None else _cut(score, None)


def _cut(rows: Any, at: int | None) -> Any:
    """The same rows cut elsewhere, or made whole."""
    whole = torch.cat(rows, -1) if type(rows) is tuple else rows
    return whole if at is None else whole.split_with_sizes((at, whole.shape[-1] - at), -1)


def _sum_of(log_dets: list[Tensor], rows: Tensor) -> Tensor:
    terms = [log_det for log_det in log_dets if log_det.dim() == 2]
    sums = [log_det for log_det in log_dets if log_det.dim() == 1]
    if terms:
        sums.append((torch.cat(terms, -1) if len(terms) > 1 else terms[0]).sum(-1))
    total = sums[0] if sums else rows.new_zeros(len(rows))
    for log_det in sums[1:]:
        total = total + log_det
    return total


class _Pass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, steps: Any, tensors: Any, is_forward: bool, score: Tensor | None, x: Tensor, *flat: Tensor
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)  # of which autograd sees that it is not changed; to save all takes longer
        ctx.flat, ctx.versions = flat, [tensor._version for tensor in flat]
        ctx.steps, ctx.is_forward, ctx.pulls = steps, is_forward, []
        y, log_det, score = _advance(steps, tensors, is_forward, x, score, ctx.pulls)
        if score is not None:
            ctx.mark_non_differentiable(score)
        return y, log_det, score

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_log_det: Tensor | None, _: Tensor | None) -> Any:
        (x,), flat = ctx.saved_tensors, ctx.flat
        if [tensor._version for tensor in flat] != ctx.versions:
            raise RuntimeError(_CHANGED)
        if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            return None, None, None, None, *_differentiated(ctx, x, flat, (grad, grad_log_det))
        pulls, ctx.pulls = ctx.pulls, None  # free as soon as used, as autograd does; a second pass computes them again
        if pulls is None:
            _advance(ctx.steps, _grouped(ctx.steps, flat), ctx.is_forward, x, None, pulls := [])
        rows: Any = torch.zeros_like(x) if grad is None else grad
        column = None if grad_log_det is None else grad_log_det[:, None]
        at, found = None, list[Sequence[Tensor | None]]()
        has_input, is_trained = ctx.needs_input_grad[4], any(ctx.needs_input_grad[5:])
        inner, last = Wanted(True, is_trained), Wanted(has_input, is_trained)
        end = 0 if has_input else next(i for i, (_, _, num_tensors) in enumerate(pulls) if num_tensors)
        while len(pulls) > end:
            cut, pull, num_tensors = pulls.pop()
            rows, at = rows if cut == at else _cut(rows, cut), cut
            rows, own = pull(rows, column, inner if len(pulls) > end else last)
            found.append(own or (None,) * num_tensors)
        grad = _cut(rows, None) if has_input else None
        return None, None, None, None, grad, *chain.from_iterable(reversed(found))


_CHANGED = (
    "a weight of a fused pass has been modified by an inplace operation since the pass, so that its gradient cannot be "
    "computed; call backward before the step of an optimiser, or make the graph anew"
)


def _differentiated(
    ctx: Any, x: Tensor, flat: Sequence[Tensor], weights: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients by autograd, through the steps run anew: these can be differentiated again, and mapped over."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        given = [tensor.view_as(tensor) for tensor in (x, *flat)]  # one each, also of a tensor that two layers share
        made = _advance(ctx.steps, _grouped(ctx.steps, given[1:]), ctx.is_forward, given[0], None, None)[:2]
        pairs = [(value, w) for value, w in zip(made, weights, strict=False) if w is not None and value.requires_grad]
        if not pairs:
            return [None] * len(given)
        wanted = [tensor for tensor in given if tensor.requires_grad]
        outputs, chosen = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, chosen, create_graph=create_graph, allow_unused=True))
    return [next(found) if tensor.requires_grad else None for tensor in given]


def _grouped(steps: Sequence[Step], flat: Sequence[Tensor]) -> list[list[Tensor]]:
    left = iter(flat)
    return [[next(left) for _ in step.tensors()] for step in steps]
