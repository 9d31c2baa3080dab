"""The steps of the layers without a network: reorderings, units, tails, triangular maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_affine.correlations import Correlations
from pyro_affine.linear import LowerTriangularAffine, Permutation, Standardization
from pyro_affine.steps import Made, Rows, Wanted
from pyro_affine.tails import LOFT
from pyro_affine.whitening import DiagonalWhitening, Whitening


class _Whole:
    """What steps share that take rows whole and train nothing."""

    cut = None

    def tensors(self) -> list[Tensor]:
        return []


class PermutationStep(_Whole):
    """A gather each way."""

    def __init__(self, layer: Permutation) -> None:
        self.buffers: dict[str, Any] = layer._buffers

    def forward(self, x: Any, tensors: list[Tensor], *, record: bool = True) -> Made:
        return _reordered(x, self.buffers["order"], self.buffers["inverse_order"])

    def inverse(self, y: Any, tensors: list[Tensor], *, record: bool = True) -> Made:
        return _reordered(y, self.buffers["inverse_order"], self.buffers["order"])


def _reordered(rows: Tensor, order: Tensor, back: Tensor) -> Made:
    def pull(grad: Tensor, *_: Any) -> tuple[Tensor, Sequence[Tensor]]:
        return grad.index_select(-1, back), ()

    return Made(rows.index_select(-1, order), None, pull, lambda score: score.index_select(-1, order))


class StandardizationStep(_Whole):
    """y = loc + scale * x, constants."""

    def __init__(self, layer: Standardization | DiagonalWhitening) -> None:
        self.layer = layer

    def forward(self, x: Any, tensors: list[Tensor], *, record: bool = True) -> Made:
        loc, scale = self.layer.loc, self.layer.scale
        log_det = scale.log().sum().expand(len(x))
        y = torch.addcmul(loc, x, scale)
        return Made(y, log_det, lambda grad, *_: (grad * scale, ()), lambda score: score / scale)

    def inverse(self, y: Any, tensors: list[Tensor], *, record: bool = True) -> Made:
        loc, scale = self.layer.loc, self.layer.scale
        log_det = scale.log().sum().expand(len(y))
        return Made((y - loc).div_(scale), log_det, lambda grad, *_: (grad / scale, ()))


class TailStep(_Whole):
    """The soft logarithm of ``LOFT``, entry by entry."""

    def __init__(self, layer: LOFT) -> None:
        self.layer = layer

    def forward(self, x: Any, tensors: list[Tensor], *, record: bool = True) -> Made:
        inside, beyond, excess = self._parts(x)
        growth, inverse_slope = excess.log1p(), excess + 1

        def pull(grad: Any, grad_log_det: Tensor | None, wanted: Wanted) -> tuple[Rows, Sequence[Tensor]]:
            if grad_log_det is not None:
                grad = torch.addcmul(grad, grad_log_det, beyond, value=-1)
            return grad / inverse_slope, ()

        y = torch.addcmul(inside, beyond, growth)
        return Made(y, -growth, pull, lambda score: torch.addcmul(beyond, score, inverse_slope))

    def inverse(self, y: Any, tensors: list[Tensor], *, record: bool = True) -> Made:
        inside, beyond, excess = self._parts(y)
        slope = excess.exp()

        def pull(grad: Any, grad_log_det: Tensor | None, wanted: Wanted) -> tuple[Rows, Sequence[Tensor]]:
            grad = grad * slope
            return grad if grad_log_det is None else torch.addcmul(grad, grad_log_det, beyond, value=-1), ()

        return Made(torch.addcmul(inside, beyond, excess.expm1()), -excess, pull)

    def _parts(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is within the threshold, the side on which a value lies beyond it (0 within), and how far."""
        threshold = self.layer.threshold
        beyond = F.softshrink(rows, threshold)
        return rows.clamp(-threshold, threshold), beyond.sign(), beyond.abs()


class TriangularStep:
    """y = loc + (x + N x) * exp(log_scale), N strictly lower triangular."""

    cut = None

    def __init__(self, layer: LowerTriangularAffine) -> None:
        self.parameters: dict[str, Any] = layer._parameters

    def tensors(self) -> list[Tensor]:
        return [self.parameters[name] for name in ("loc", "log_scale", "below")]

    def forward(self, x: Any, tensors: list[Tensor], *, record: bool = True) -> Made:
        loc, log_scale, below = tensors
        lower, scale = below.tril(-1), log_scale.exp()
        mixed = torch.addmm(x, x, lower.T)

        def pull(grad: Any, grad_log_det: Tensor | None, wanted: Wanted) -> tuple[Rows, Sequence[Tensor]]:
            scaled = grad * scale
            of_log_scale = (scaled * mixed).sum(0)
            if grad_log_det is not None:
                of_log_scale += grad_log_det.sum()
            own = grad.sum(0), of_log_scale, (scaled.T @ x).tril_(-1)
            return torch.addmm(scaled, scaled, lower), own

        def push(score: Any) -> Rows:
            return _solved(lower, score) / scale

        return Made(torch.addcmul(loc, mixed, scale), log_scale.sum().expand(len(x)), pull, push)

    def inverse(self, y: Any, tensors: list[Tensor], *, record: bool = True) -> Made:
        loc, log_scale, below = tensors
        lower, scale = below.tril(-1), log_scale.exp()
        mixed = (y - loc) / scale
        x = _solved(lower.T, mixed, upper=True)
        known = x.clone()  # x itself, an output of the pass, would be a circle, and may be changed in place

        def pull(grad: Any, grad_log_det: Tensor | None, wanted: Wanted) -> tuple[Rows, Sequence[Tensor]]:
            of_mixed = _solved(lower, grad)
            scaled = of_mixed / scale
            of_log_scale = -(of_mixed * mixed).sum(0)
            if grad_log_det is not None:
                of_log_scale += grad_log_det.sum()
            return scaled, (-scaled.sum(0), of_log_scale, -(of_mixed.T @ known).tril_(-1))

        return Made(x, log_scale.sum().expand(len(y)), pull)


def _solved(matrix: Tensor, rows: Tensor, *, upper: bool = False) -> Tensor:
    """Rows times the inverse of I + a strictly triangular matrix."""
    solved: Tensor = torch.linalg.solve_triangular(matrix, rows, upper=upper, left=False, unitriangular=True)
    return solved


class WhiteningStep(_Whole):
    """y = loc + L x, constants."""

    def __init__(self, layer: Whitening | Correlations) -> None:
        self.layer = layer

    def forward(self, x: Any, tensors: list[Tensor], *, record: bool = True) -> Made:
        y, log_det = self.layer._forward(x)
        tril = self.layer.scale_tril
        return Made(y, log_det, lambda grad, *_: (grad @ tril, ()), lambda score: _divided(score, tril))

    def inverse(self, y: Any, tensors: list[Tensor], *, record: bool = True) -> Made:
        x, log_det = self.layer._backward(y)
        tril = self.layer.scale_tril
        return Made(x, log_det, lambda grad, *_: (_divided(grad, tril), ()))


def _divided(rows: Tensor, tril: Tensor) -> Tensor:
    divided: Tensor = torch.linalg.solve_triangular(tril, rows, upper=False, left=False)
    return divided
