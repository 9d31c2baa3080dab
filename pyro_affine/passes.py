"""A pass through the steps of a run, as one node of autograd's graph whose backward pass is written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from pyro_affine.steps import Step, Wanted


def run_pass(
    steps: Sequence[Step], tensors: Sequence[list[Tensor]], rows: Tensor, is_forward: bool, score: Tensor | None = None
) -> Any:
    """Value and log|det dy/dx| in the graph, and the score carried along, if any.

    Args:
        steps: in the order in which they run.
        tensors: of each step.
        rows: shape (B, D).
        is_forward: from the base side to the data side.
        score: of the rows, constant in the graph.
    """
    inputs = [rows, *chain.from_iterable(tensors)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        return _Pass.apply(steps, tensors, is_forward, score, *inputs)
    return advance(steps, tensors, is_forward, rows, score, None)


def advance(
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
    sums = [log_det for log_det in log_dets if log_det.dim() < 2]
    if terms:
        sums.append((torch.cat(terms, -1) if len(terms) > 1 else terms[0]).sum(-1))
    total = sums[0] if sums else rows.new_zeros(())
    for log_det in sums[1:]:
        total = total + log_det
    return total if total.dim() else total.expand(len(rows))


class _Pass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, steps: Any, tensors: Any, is_forward: bool, score: Tensor | None, x: Tensor, *flat: Tensor
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)  # of which autograd sees that it is not changed; to save all takes longer
        ctx.flat, ctx.versions = flat, [tensor._version for tensor in flat]
        ctx.steps, ctx.is_forward, ctx.pulls = steps, is_forward, []
        ctx.counts = [*map(len, tensors)]
        y, log_det, score = advance(steps, tensors, is_forward, x, score, ctx.pulls)
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
            advance(ctx.steps, _grouped(ctx.counts, flat), ctx.is_forward, x, None, pulls := [])
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
        made = advance(ctx.steps, _grouped(ctx.counts, given[1:]), ctx.is_forward, given[0], None, None)[:2]
        pairs = [(value, w) for value, w in zip(made, weights, strict=False) if w is not None and value.requires_grad]
        if not pairs:
            return [None] * len(given)
        wanted = [tensor for tensor in given if tensor.requires_grad]
        outputs, chosen = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, chosen, create_graph=create_graph, allow_unused=True))
    return [next(found) if tensor.requires_grad else None for tensor in given]


def _grouped(counts: Sequence[int], flat: Sequence[Tensor]) -> list[list[Tensor]]:
    left = iter(flat)
    return [[*islice(left, count)] for count in counts]
