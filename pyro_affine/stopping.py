"""When to stop: the budget in steps or seconds, and the two rules that may end it early."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_PENALTY = 10.0  # nats


class Budget:
    """Steps and seconds spent on a fit, and how far along it is.

    ``progress = max(step / num_steps, elapsed / seconds) / end`` runs from 0 to 1. ``end`` is 1 until
    ``begin_decay`` is called, which moves the end of the fit so that the decay phase starts now and keeps
    its share of the whole. With ``seconds`` the progress depends on the clock, so two runs are not bit-equal.

    Args:
        num_steps: number of steps, or None for no limit in steps.
        seconds: wall-clock time from here on, set-up included, or None for no limit in time.
        decay: share of the fit, in [0, 1), over which the step size falls to zero.
        clock: gives the time in seconds; that of this process by default.

    Raises:
        ValueError: if neither limit is given, if one is not positive, or if ``decay`` is out of range.

    >>> budget = Budget(num_steps=4, decay=0.5)
    >>> for _ in range(3):
    ...     budget.tick()
    >>> budget.progress, budget.decaying, budget.exhausted
    (0.75, True, False)
    """

    def __init__(
        self,
        num_steps: int | None = None,
        seconds: float | None = None,
        *,
        decay: float = 0.5,
        clock: Callable[[], float] | None = None,
    ) -> None:
        if num_steps is None and seconds is None:
            raise ValueError("a budget needs num_steps or seconds, got neither; give at least one of them")
        for name, value in (("num_steps", num_steps), ("seconds", seconds)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}; leave it out for no limit")
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}; 0.5 decays over the second half")
        self.num_steps, self.seconds, self.decay = num_steps, seconds, decay
        self.step, self.elapsed, self.end, self._reserved = 0, 0.0, 1.0, 0.0
        self._begun = 0, 0.0  # step and progress
        self.clock = clock or time.perf_counter
        self._mark = self.clock()

    def tick(self) -> None:
        """Count one step and the time since the last one."""
        self.step += 1
        self._count_time()

    def begin(self) -> None:
        """Training begins now: what came before it, such as the search for a start, is spent."""
        if self.seconds is not None:
            self._count_time()
            self._begun = self.step, self.progress

    def _count_time(self) -> None:
        now = self.clock()
        self.elapsed += now - self._mark
        self._mark = now

    @property
    def _spent(self) -> float:
        in_steps = self.step / self.num_steps if self.num_steps else 0.0
        return max(in_steps, self.elapsed / (self.seconds - self._reserved) if self.seconds else 0.0)

    def reserve(self, seconds: float) -> None:
        """Keep some of the seconds, half of them at most, for what comes after the last step."""
        self._reserved = min(seconds, 0.5 * (self.seconds or 0.0))

    @property
    def progress(self) -> float:
        """How far along the fit is, from 0 to 1."""
        return min(self._spent / self.end, 1.0)

    def warmup(self, longest: int) -> int:
        """Steps that a warm-up may take: a tenth of those that there are, or seem to be by the time they take."""
        known = longest if self.num_steps is None else self.num_steps // 10
        steps, share = self.step - self._begun[0], self.progress - self._begun[1]
        if self.seconds is not None and share > 0:
            known = min(known, int(0.1 * steps * (1 - self._begun[1]) / share))
        return min(longest, known)

    @property
    def decaying(self) -> bool:
        """Whether the step size is on its way to zero."""
        return self.progress >= 1 - self.decay

    @property
    def into_decay(self) -> float:
        """How far into the decay phase the fit is, from 0 to 1."""
        return max(0.0, (self.progress - 1 + self.decay) / self.decay) if self.decay else 0.0

    @property
    def exhausted(self) -> bool:
        """Whether nothing is left to spend."""
        return self.progress >= 1

    @property
    def limit(self) -> str:
        """The limit that is nearest: "num_steps" or "seconds"."""
        in_steps = self.step / self.num_steps if self.num_steps else 0.0
        return "num_steps" if in_steps == self._spent else "seconds"

    def begin_decay(self) -> None:
        """Start the decay phase now; never makes the fit longer."""
        self.end = min(self.end, self._spent / (1 - self.decay))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {"step": self.step, "elapsed": self.elapsed, "end": self.end}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; the time between the runs is not counted."""
        self.step, self.elapsed, self.end = state["step"], state["elapsed"], state["end"]
        self._mark = self.clock()


class Plateau:
    """Says when scores on a fixed bank of draws no longer rise.

    With scores e_k (one per draw, the same draws each time), it says yes when neither mean(e_k - e_{k-1}) nor
    mean(e_k - e_{k-2}) reaches max(tolerance, 2 standard errors of that paired difference). As a few draws far out
    can make that error huge, the means without the most extreme twentieth of the draws must not reach it either.

    Args:
        tolerance: smallest improvement, in nats, that is worth going on for; None to never say yes.
    """

    name = "plateau"

    def __init__(self, tolerance: float | None = 0.01) -> None:
        self.limit = tolerance
        self._previous: list[Tensor] = []

    def update(self, scores: Tensor) -> bool:
        """Take the scores of one evaluation; True when they no longer rise."""
        if self.limit is None:
            return False
        differences = [scores - old for old in self._previous]
        stalled = len(differences) == 2 and not any(_rises(difference, self.limit) for difference in differences)
        self._previous = [*self._previous[-1:], scores]
        return stalled

    def reset(self) -> None:
        """Forget the evaluations so far."""
        self._previous = []

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {"previous": self._previous}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._previous = state["previous"]


class Patience:
    """Says when the mean score has not reached a new best for a number of evaluations.

    Args:
        limit: number of evaluations in a row without a new best.
    """

    name = "patience"

    def __init__(self, limit: int = 10) -> None:
        self.limit = limit
        self._best, self._waited = -math.inf, 0

    def update(self, scores: Tensor) -> bool:
        """Take the scores of one evaluation; True when patience has run out."""
        mean, _ = mean_and_error(scores)
        self._waited = 0 if mean > self._best else self._waited + 1
        self._best = max(mean, self._best)
        return self._waited >= self.limit

    def reset(self) -> None:
        """Wait anew, and for a best from here on."""
        self._best, self._waited = -math.inf, 0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {"best": self._best, "waited": self._waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._best, self._waited = state["best"], state["waited"]


def _rises(difference: Tensor, tolerance: float) -> bool:
    ordered = difference[torch.isfinite(difference)].sort().values
    cut = len(ordered) // 40
    trimmed = ordered[cut : len(ordered) - cut]
    return any(mean >= max(tolerance, 2 * error) for mean, error in map(mean_and_error, (ordered, trimmed)))


def mean_and_error(scores: Tensor) -> tuple[float, float]:
    """Mean and standard error of the finite scores; (-inf, inf) when there are fewer than two."""
    finite = scores[torch.isfinite(scores)].double()
    if finite.numel() < 2:
        return -math.inf, math.inf
    return finite.mean().item(), finite.std().item() / math.sqrt(finite.numel())


def is_better(scores: Tensor, others: Tensor) -> bool:
    """Whether scores are higher on average than others of the same draws.

    One that is not finite counts as ten nats below the lowest: a guide that a few far-out draws leave without a
    density is bad, but not as bad as one that never leaves its start.

    >>> is_better(torch.tensor([1.0, 2.0, 2.0]), torch.tensor([1.0, 1.5, math.nan]))
    True
    """
    finite = torch.isfinite(scores), torch.isfinite(others)
    known = torch.cat([scores[finite[0]], others[finite[1]]])
    if not len(known):
        return False
    lowest = known.min() - _PENALTY
    return bool((torch.where(finite[0], scores, lowest) - torch.where(finite[1], others, lowest)).mean() > 0)
