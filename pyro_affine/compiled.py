"""Faster ways to a loss, taken where they agree with the plain one: among them ``torch.compile``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_affine.random_state import new_seed, seeded
from pyro_affine.traces import BAD_DRAW, first_line

Compile = bool | str | dict[str, Any]
"""Whether to compile: True, a mode of ``torch.compile``, or a dict of its arguments."""

_TRIES = 10  # seeds; a guide of sensible width draws ten refused starts in a row only if the model refuses all


class CompiledFunction:
    """A function of tensors, compiled at its first call, or as it is where that cannot be done.

    The first call compares both: a random sum of what they return, and its gradient. Where they differ, or the
    compiler raises an error then or later, such as for want of a C++ compiler, the function runs as it is from there
    on, with a warning.

    Args:
        function: of tensors; returns a tensor or a tuple of tensors. Random numbers must be those of eager code.
        parameters: what it has gradients for, apart from its arguments; they stay where they are.
        compile: True, a mode, or arguments of ``torch.compile``. One graph, without breaks.
        source: what is compiled in its place, for a function that a compiler cannot read.

    >>> double = CompiledFunction(lambda x: 2 * x, [], {"backend": "eager"})
    >>> double(torch.ones(2))
    tensor([2., 2.])
    """

    def __init__(
        self,
        function: Callable[..., Any],
        parameters: list[Tensor],
        compile: Compile,
        *,
        source: Callable[..., Any] | None = None,
    ) -> None:
        self._plain, self._parameters = function, parameters
        options = {"fullgraph": True, **_options(compile)}
        self._compiled: Callable[..., Any] | None = torch.compile(source or function, **options)
        self._is_checked = False

    def __call__(self, *arguments: Tensor | None) -> Any:
        if self._compiled is not None and not self._is_checked:
            self._check(arguments)
        if self._compiled is not None:
            try:
                return self._compiled(*arguments)
            except BAD_DRAW:
                raise
            except Exception as error:  # compilers raise errors of many kinds, for new shapes too
                self._refuse(error)
        return self._plain(*arguments)

    def _check(self, arguments: tuple[Tensor | None, ...]) -> None:
        self._is_checked = True
        given = [tensor for tensor in arguments if tensor is not None and tensor.requires_grad]
        compiled, plain = (self._total(call, arguments) for call in (self._compiled, self._plain))
        try:
            with seeded(0), warnings.catch_warnings():  # random numbers go on as if there were no check
                warnings.filterwarnings("ignore", module=r"torch\.")  # a compiler's words on its own code
                if not agree(compiled, plain, [*self._parameters, *given]):
                    raise _DiffersError("its values or gradients differ from those without")
        except Exception as error:
            self._refuse(error)

    @staticmethod
    def _total(function: Any, arguments: tuple[Tensor | None, ...]) -> Callable[[], Tensor]:
        def total() -> Tensor:
            found = function(*arguments)
            parts = found if isinstance(found, tuple) else (found,)
            return torch.stack([(part * torch.randn_like(part)).sum() for part in parts]).sum()

        return total

    def _refuse(self, reason: Exception) -> None:
        self._compiled = None
        warnings.warn(
            f"the fit goes on without torch.compile, {type(reason).__name__}: {first_line(reason)}. What can be "
            "compiled is in docs/compile.md.",
            RuntimeWarning,
            stacklevel=2,
        )


def _options(compile: Compile) -> dict[str, Any]:
    if isinstance(compile, str):
        return {"mode": compile}
    return compile if isinstance(compile, dict) else {"options": {"fallback_random": True}}  # dropout as in eager code


class _DiffersError(Exception):
    """The compiled function is another one."""


def agree(loss: Callable[[], Tensor], other: Callable[[], Tensor], parameters: list[Tensor]) -> bool:
    """Whether two losses have the same value and gradient at a draw that both accept.

    Args:
        loss, other: called with the same random state.
        parameters: of the gradient; one that only one of the losses trains is a difference.
    """
    for _ in range(_TRIES):
        seed = new_seed()
        try:
            found, expected = (_with_gradient(call, parameters, seed) for call in (loss, other))
        except BAD_DRAW:
            continue
        if expected.isfinite().all():
            tolerance = torch.finfo(expected.dtype).eps ** 0.5
            return bool((found - expected).norm() <= tolerance * (1 + expected.norm()))
    return False


def _with_gradient(loss: Callable[[], Tensor], parameters: list[Tensor], seed: int) -> Tensor:
    """The loss and all entries of its gradient, one after the other."""
    with seeded(seed):
        value = loss()
    gradients: Sequence[Tensor] = ()
    if parameters:
        gradients = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([value.detach().reshape(1), *(gradient.flatten().to(value) for gradient in gradients)])
