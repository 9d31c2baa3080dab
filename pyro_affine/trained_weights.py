"""The tensors that training changes: copies to go back to, and a moving average."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# The average forgets with a rate of at most 1 - 0.999: it spans the last thousand steps of a long decay phase.
_LONGEST_MEMORY = 0.999


class Weights:
    """Parameters by name, together with the buffers of the modules that they belong to.

    Args:
        parameters: the tensors that the optimiser changes.
        modules: modules whose buffers (statistics, flags) are part of what is trained, by prefix.
    """

    def __init__(self, parameters: Mapping[str, Tensor], modules: Mapping[str, nn.Module] | None = None) -> None:
        self.parameters = dict(parameters)
        self._modules = dict(modules or {})

    def tensors(self) -> dict[str, Tensor]:
        """The live tensors, by name."""
        buffers = {
            f"{prefix}.{name}".lstrip("."): buffer
            for prefix, module in self._modules.items()
            for name, buffer in module.named_buffers()
        }
        return {**buffers, **self.parameters}

    def copy(self) -> dict[str, Tensor]:
        """A copy of the values."""
        return {name: tensor.detach().clone() for name, tensor in self.tensors().items()}

    @torch.no_grad()
    def restore(self, values: Mapping[str, Tensor]) -> None:
        """Write values made by ``copy``, or some of them, back in place."""
        tensors = self.tensors()
        for name, value in values.items():
            tensors[name].copy_(value)

    @contextmanager
    def replaced_by(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Other values, or none, for a block; then those from before."""
        before = self.copy() if values else {}
        self.restore(values)
        try:
            yield
        finally:
            self.restore(before)

    def gradients(self) -> list[Tensor]:
        """The gradients that are there."""
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    def first_bad_gradient(self) -> str | None:
        """Name of the first parameter whose gradient is not finite."""
        for name, parameter in self.parameters.items():
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
                return name
        return None


class MovingAverage:
    """Exponential moving average of parameters.

    ``average += (1 - d) * (parameter - average)`` with d = min(0.999, (1 + n) / (10 + n)) after n updates, so
    that a short phase is averaged over its last tenth and does not stay at its first value.

    Args:
        parameters: the parameters, by name.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = dict(parameters)
        self.count = 0
        self.values: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the present values."""
        if not self.values:
            self.values = {name: p.detach().clone() for name, p in self._parameters.items()}
        decay = min(_LONGEST_MEMORY, (1 + self.count) / (10 + self.count))
        for name, parameter in self._parameters.items():
            self.values[name].lerp_(parameter, 1 - decay)
        self.count += 1

    def restart(self) -> None:
        """Forget all updates."""
        self.count, self.values = 0, {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {"count": self.count, "values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.count = state["count"]
        self.values = {name: value.to(self._parameters[name].device) for name, value in state["values"].items()}
