"""The progress bar of a fit."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Any

# The loss is smoothed over about fifty steps; the text changes five times a second.
_SMOOTHING = 0.02
_REFRESH_SECONDS = 0.2


class ProgressBar:
    """Smoothed loss and gradient norm next to a bar in steps, or in seconds.

    Shown in a terminal and in a notebook; silent where the output is a file or a pipe.

    Args:
        description: word in front of the bar.
        num_steps: length of the bar in steps; None for a bar in seconds.
        seconds: length of the bar in seconds.
        show: False for no bar at all.
        describe: words for a loss, such as "ELBO -3.21".
    """

    def __init__(
        self,
        description: str,
        num_steps: int | None,
        seconds: float | None,
        *,
        show: bool,
        describe: Callable[[float], str],
    ) -> None:
        self._describe, self._in_steps = describe, num_steps is not None
        self._smoothed, self._norm, self._shown_at, self.note = math.nan, math.nan, 0.0, ""
        self._full = num_steps or seconds or 1
        self._bar = _make_bar(description, num_steps, seconds) if show and _is_watched() else None

    def update(self, step: int, elapsed: float, loss: float, norm: float) -> None:
        """Move the bar after a step."""
        if math.isfinite(loss):
            old = self._smoothed
            self._smoothed = old + _SMOOTHING * (loss - old) if math.isfinite(old) else loss
        self._norm = norm
        now = time.perf_counter()
        if self._bar is None or now - self._shown_at < _REFRESH_SECONDS:
            return
        self._shown_at = now
        self._bar.n = step if self._in_steps else min(round(elapsed, 1), self._bar.total)
        self._bar.set_postfix_str(self._text(), refresh=True)

    def _text(self) -> str:
        return f"{self._describe(self._smoothed)}{self.note}, |gradient| {self._norm:.2g}"

    def shorten(self, end: float) -> None:
        """Show that the fit will end at this share of its budget."""
        if self._bar is not None and end < 1:
            self._bar.total = max(1, round(self._full * end))

    def close(self, step: int, elapsed: float) -> None:
        """Show where the fit ended, and end the line."""
        if self._bar is not None:
            self._bar.n = step if self._in_steps else min(round(elapsed, 1), self._bar.total)
            self._bar.set_postfix_str(self._text(), refresh=True)
            self._bar.close()


def _is_watched() -> bool:
    return "ipykernel" in sys.modules or bool(getattr(sys.stderr, "isatty", lambda: False)())


def _make_bar(description: str, num_steps: int | None, seconds: float | None) -> Any:
    from tqdm.auto import tqdm

    if num_steps is not None:
        return tqdm(desc=description, total=num_steps, dynamic_ncols=True)
    layout = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s{postfix}"
    return tqdm(desc=description, total=seconds, bar_format=layout, dynamic_ncols=True)
