"""The way back to weights that were good: copies of them, and when to use them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_affine.trained_weights import Weights

# If every second draw were bad, twenty in a row would come once in a million steps: this many have a cause.
PERSISTENT = 20
# Each rescue goes on with a fifth of the step size; what two of them do not cure is not a matter of step size.
RESCUES = 2
RESCUE_FACTOR = 0.2
# A copy of the weights and of the optimiser's state costs about as much as a step.
_STEPS_BETWEEN_COPIES = 50


class Recovery:
    """Counts bad steps in a row, keeps the last good weights, and goes back to them.

    Args:
        weights: the tensors that training changes.
        optimizer: the optimiser over them.
    """

    def __init__(self, weights: Weights, optimizer: torch.optim.Optimizer) -> None:
        self._weights, self._optimizer = weights, optimizer
        self._saved: dict[str, Any] = {}
        self.step, self.rescues, self._bad_in_a_row = 0, 0, 0

    @property
    def rate_scale(self) -> float:
        """What the learning rate is multiplied by after the rescues so far."""
        return RESCUE_FACTOR**self.rescues

    @property
    def used_up(self) -> bool:
        """Whether there is no further rescue."""
        return self.rescues >= RESCUES

    def saw_good(self, step: int) -> None:
        """The loss and gradient at the present weights are finite; called before they change."""
        self._bad_in_a_row = 0
        if not self._saved or step >= self.step + _STEPS_BETWEEN_COPIES:
            self._saved = {"weights": self._weights.copy(), "optimizer": cloned(self._optimizer.state_dict())}
            self.step = step

    def saw_bad(self) -> bool:
        """The step was bad; True when bad steps persist."""
        self._bad_in_a_row += 1
        return self._bad_in_a_row >= PERSISTENT

    def go_back(self) -> None:
        """Put the last good weights and the optimiser's state of then back, and count a rescue."""
        if self._saved:
            self._weights.restore(self._saved["weights"])
            self._optimizer.load_state_dict(cloned(self._saved["optimizer"]))
        self.rescues += 1
        self._bad_in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        counts = {"step": self.step, "rescues": self.rescues, "bad_in_a_row": self._bad_in_a_row}
        return {"saved": self._saved, **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._saved, self.step = state["saved"], state["step"]
        self.rescues, self._bad_in_a_row = state["rescues"], state["bad_in_a_row"]


def cloned(state: Any) -> Any:
    """A copy of nested dicts and lists with tensors of their own."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {key: cloned(value) for key, value in state.items()}
    return [cloned(value) for value in state] if isinstance(state, list) else state
