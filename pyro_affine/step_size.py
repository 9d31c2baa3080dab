"""How large a step is: the learning-rate schedule and the clipping of gradients by their running median."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# A median of fewer norms than this says little, so the first steps are neither clipped nor skipped.
_SETTLED = 20
_MOST_SKIPPED = 3


def learning_rate_factor(step: int, into_decay: float, *, warmup: int) -> float:
    """Warm-up, constant, cosine to zero: what the learning rate is multiplied by.

    ``min(1, (step + 1) / warmup) * (1 + cos(pi * into_decay)) / 2``

    Args:
        step: number of steps done.
        into_decay: how far into the decay phase the fit is, in [0, 1].
        warmup: number of steps over which the rate rises in a line; 0 for none.

    >>> learning_rate_factor(0, 0.0, warmup=10), learning_rate_factor(500, 0.5, warmup=10)
    (0.1, 0.5)
    """
    rising = min(1.0, (step + 1) / warmup) if warmup else 1.0
    return round(rising * (1 + math.cos(math.pi * into_decay)) / 2, 12)


class MedianClip:
    """Clips a gradient at a multiple of the median norm of the last steps; skips a step that is far above it.

    After three skipped steps in a row it is not the draw but the place that is steep, and gradients are clipped
    instead. All norms enter the median, skipped ones too, so that it follows a lasting rise.

    Args:
        window: number of norms that the median is taken over.
        clip: norms above ``clip`` medians are scaled down to that.
        skip: a step with a norm above ``skip`` medians is left out.

    Source: the defaults are those of Flow Annealed Importance Sampling Bootstrap (Midgley et al., 2023).

    >>> guard = MedianClip()
    >>> [guard.factor(norm) for norm in [1.0] * 30 + [4.0, 11.0]][-3:]
    [1.0, 0.5, 0.0]
    """

    def __init__(self, window: int = 100, clip: float = 2.0, skip: float = 10.0) -> None:
        self.clip, self.skip = clip, skip
        self.norms: deque[float] = deque(maxlen=window)
        self._skipped_in_a_row = 0

    def factor(self, norm: float) -> float:
        """What to multiply a gradient of this norm by; 0 means that the step is left out."""
        median = statistics.median(self.norms) if len(self.norms) >= _SETTLED else math.inf
        self.norms.append(norm)
        if norm > self.skip * median and self._skipped_in_a_row < _MOST_SKIPPED:
            self._skipped_in_a_row += 1
            return 0.0
        self._skipped_in_a_row = 0
        return min(1.0, self.clip * median / norm) if norm > 0 else 1.0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {"norms": list(self.norms), "skipped_in_a_row": self._skipped_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.norms.extend(state["norms"])
        self._skipped_in_a_row = state["skipped_in_a_row"]


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all gradients together; a scalar on the device of the first, 0 where there are none."""
    if not gradients:
        return torch.tensor(0.0)
    norms = [torch.linalg.vector_norm(gradient).to(gradients[0]) for gradient in gradients]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total
