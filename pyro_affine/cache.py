"""What a transform remembers of a call, and how it is seen that this no longer is right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Slot = tuple[dict[str, Any], str]
"""Where a tensor stands: a table of a Module, and its name there."""


class Slots:
    """Where all tensors of a Module stand; walking its modules each time would cost more than a layer.

    Args:
        module: the Module; all Modules below it are watched.
        slots: where its tensors stand.

    >>> linear = nn.Linear(2, 3)
    >>> slots = Slots(linear, [(linear._parameters, "bias")])
    >>> [tensor.shape for tensor in slots.tensors()], slots.hold()
    ([torch.Size([3])], True)
    """

    def __init__(self, module: nn.Module, slots: Iterable[Slot]) -> None:
        self._slots = list(slots)
        self._tables = [part._modules for part in module.modules() if part._modules]
        self.modules = [*map(dict, self._tables)]

    def hold(self) -> bool:
        """Whether these are still all: no Module was exchanged, no name is gone."""
        return self._tables == self.modules and all(name in holder for holder, name in self._slots)

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that stand there now."""
        return (holder[name] for holder, name in self._slots if holder[name] is not None)


class State(NamedTuple):
    """All Modules and tensors, whether each is trained, and a copy of what they hold (none in a trace)."""

    modules: list[dict[str, nn.Module | None]]
    tensors: list[Tensor]
    trained: list[bool]
    values: Tensor | None

    @classmethod
    def of(cls, slots: Slots) -> State:
        """As it is now."""
        tensors = list(slots.tensors())
        empty = not tensors or torch.jit.is_tracing()  # type: ignore[attr-defined]  # which freezes values
        with torch.no_grad():
            values = None if empty else torch.cat([tensor.reshape(-1) for tensor in tensors])
        return cls(slots.modules, tensors, [tensor.requires_grad for tensor in tensors], values)

    def equals(self, other: State) -> bool:
        """Whether Modules and tensors are the same, trained as before, and with the same values."""
        if self.modules != other.modules or self.trained != other.trained:
            return False
        if any(a is not b for a, b in zip(self.tensors, other.tensors, strict=True)):
            return False
        try:
            return self.values is other.values or torch.equal(self.values, other.values)  # type: ignore[arg-type]
        except (RuntimeError, TypeError):  # values that vmap hides; a pair from outside the trace
            return False


class Pair(NamedTuple):
    """What was made of what, with log|det dy/dx|."""

    made: Callable[[], Tensor | None]
    given: Tensor
    log_det: Tensor
    is_forward: bool
    versions: tuple[int, int, int]
    with_grad: bool
    state: State
