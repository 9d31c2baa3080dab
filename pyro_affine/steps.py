"""What a layer looks like to a fused pass: a formula on plain tensors, with its derivative written by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

Rows = Tensor | tuple[Tensor, Tensor]
"""Rows of D entries, whole or cut in two: (B, D), or (B, first) and (B, D - first)."""


class Wanted(NamedTuple):
    """Which gradients a backward pass has use for."""

    input: bool
    tensors: bool


class Made(NamedTuple):
    """What a step makes.

    Attributes:
        value: y, or x in the inverse direction.
        log_det: log|det dy/dx|, shape (B,), or () if it is the same for all rows, or terms to be summed, shape (B, k);
            None for 0.
        pull: (grad, grad_log_det, wanted) -> (gradient of what was given, gradients of the tensors in turn), with
            grad_log_det of shape (B, 1), or None for 0. It may be called more than once.
        push: score at x -> score at y; none in the inverse direction.

    Without a record there may be neither.
    """

    value: Rows
    log_det: Tensor | None
    pull: Callable[[Any, Tensor | None, Wanted], tuple[Rows, Sequence[Tensor]]] | None = None
    push: Callable[[Any], Rows] | None = None


class Step(Protocol):
    """A layer on rows, which it gets cut at ``cut``, or whole for None. It keeps no state between its calls."""

    @property
    def cut(self) -> int | None: ...

    def tensors(self) -> list[Tensor]:
        """What gradients are wanted for, as it is now."""

    def forward(self, x: Any, tensors: list[Tensor], *, record: bool = True) -> Made:
        """From the base side to the data side; without a record, what it makes can be neither pulled nor pushed."""

    def inverse(self, y: Any, tensors: list[Tensor], *, record: bool = True) -> Made:
        """From the data side to the base side, likewise."""
