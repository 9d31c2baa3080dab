"""The steps of layers that mix and scale the channels of a pixel, or the entries of a vector."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_affine.actnorm import ActNorm
from pyro_affine.invertible_linear import InvertibleLinear, inverses, products
from pyro_affine.steps import Made, Rows, Step, Wanted


class NormStep:
    """y = x * exp(log_scale) + shift, entry by entry of a row."""

    cut = None

    def __init__(self, layer: ActNorm) -> None:
        self.parameters: dict[str, Any] = layer._parameters

    def tensors(self) -> list[Tensor]:
        return [self.parameters["shift"].flatten(), self.parameters["log_scale"].flatten()]

    def forward(self, x: Any, tensors: list[Tensor], *, record: bool = True) -> Made:
        shift, log_scale = tensors
        scale = log_scale.exp()

        def pull(grad: Any, grad_log_det: Tensor | None, wanted: Wanted) -> tuple[Rows, Sequence[Tensor]]:
            through = grad * scale
            return through, (grad.sum(0), _with_log_det((through * x).sum(0), grad_log_det))

        return Made(torch.addcmul(shift, x, scale), log_scale.sum(), pull, lambda score: score / scale)

    def inverse(self, y: Any, tensors: list[Tensor], *, record: bool = True) -> Made:
        shift, log_scale = tensors
        scale, centred = log_scale.exp(), y - shift

        def pull(grad: Any, grad_log_det: Tensor | None, wanted: Wanted) -> tuple[Rows, Sequence[Tensor]]:
            through = grad / scale
            return through, (-through.sum(0), _with_log_det(-(through * centred).sum(0), grad_log_det))

        return Made(centred / scale, log_scale.sum(), pull)


def _with_log_det(gradient: Tensor, grad_log_det: Tensor | None) -> Tensor:
    """Gradient of something that the log-determinant is the sum of."""
    return gradient if grad_log_det is None else gradient + grad_log_det.sum()


class MixingStep:
    """y = exp(log_scale) * (W x) + shift, an ``InvertibleLinear`` and the ``ActNorm`` after it, if any, as one map."""

    cut = None

    def __init__(self, mixing: InvertibleLinear, norm: NormStep | None = None) -> None:
        self.mixing, self.norm = mixing, norm

    def tensors(self) -> list[Tensor]:
        return mixed_tensors([self], True)[0]  # a run asks tensors_of, which makes those of all steps at once

    def forward(self, x: Any, tensors: list[Tensor], *, record: bool = True) -> Made:
        matrix, offset, log_det = tensors

        def pull(grad: Any, grad_log_det: Tensor | None, wanted: Wanted) -> tuple[Rows, Sequence[Any]]:
            own = (grad.t() @ x, grad.sum(0), None if grad_log_det is None else grad_log_det.sum())
            return grad @ matrix, own if wanted.tensors else ()

        def push(score: Any) -> Rows:
            return torch.linalg.solve(matrix, score, left=False)  # type: ignore[no-any-return]

        return Made(torch.addmm(offset, x, matrix.t()), log_det, pull, push)

    inverse = forward  # by the tensors of the inverse map


def mixed_tensors(steps: Sequence[MixingStep], is_forward: bool) -> list[list[Tensor]]:
    """Matrix, offset and log-determinant of each step, made at once: so small, they cost by the operator."""
    mixings: list[Any] = [step.mixing for step in steps]
    packed = torch.stack([mixing._parameters["lower_upper"] for mixing in mixings])
    signs, order = (torch.stack([mixing._buffers[name] for mixing in mixings]) for name in ("signs", "order"))
    none = packed.new_zeros([packed.shape[1], *[1] * (mixings[0].rank - 1)])
    norms = [step.norm.parameters if step.norm else {"shift": none, "log_scale": none} for step in steps]
    shift, log_scale = (torch.stack([norm[name] for norm in norms]).flatten(1) for name in ("shift", "log_scale"))
    if is_forward:
        matrices, offsets = products(packed, signs, order) * log_scale.exp()[..., None], shift
    else:
        matrices = inverses(packed, signs, order) / log_scale.exp()[:, None]
        offsets = -(matrices @ shift[..., None])[..., 0]
    log_dets = (packed.diagonal(dim1=-2, dim2=-1) + log_scale).sum(-1)
    return [*map(list, zip(matrices.unbind(), offsets.unbind(), log_dets.unbind(), strict=True))]


def tensors_of(steps: Sequence[Step], is_forward: bool) -> list[list[Tensor]]:
    """The tensors of each step, for one direction."""
    mixing = [step for step in steps if isinstance(step, MixingStep)]
    mixed = iter(mixed_tensors(mixing, is_forward) if mixing else ())
    return [next(mixed) if isinstance(step, MixingStep) else step.tensors() for step in steps]


def joined(steps: Iterable[Step]) -> list[Step]:
    """Fewer steps that do the same."""
    fewer: list[Step] = []
    for step in steps:
        last = fewer[-1] if fewer else None
        if isinstance(step, NormStep) and isinstance(last, MixingStep) and last.norm is None:
            fewer[-1] = MixingStep(last.mixing, step)
        else:
            fewer.append(step)
    return fewer
