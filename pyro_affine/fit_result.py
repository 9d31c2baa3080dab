"""What a fit hands back, and the error that carries it."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_REASONS = {
    "": "is still running",
    "num_steps": "took all its steps",
    "seconds": "used up its seconds",
    "plateau": "stopped on a plateau: the ELBO on fixed draws no longer rose",
    "patience": "ran out of patience: the validation score no longer rose",
    "interrupted": "was interrupted",
    "non-finite": "failed: losses or gradients stayed non-finite",
}
_CHOICES = {
    "last": "last weights",
    "average": "averaged weights",
    "best": "best weights on the way",
    "start": "weights from before the first step, as training brought no better ones",
}
_HISTORIES = ("losses", "gradient_norms", "times", "validation_losses", "validation_steps")


@dataclass
class FitResult:
    """How a fit went. The trained weights are in the guide or flow itself.

    Attributes:
        kind: "guide" or "density".
        losses: negative ELBO of each step's particles, or mean negative log-density of each minibatch, in nats;
            NaN where a step had none.
        gradient_norms: norm of the gradient at each step, before clipping.
        times: seconds since the start of the fit at the end of each step.
        validation_losses: negative ELBO on the fixed bank of draws, or mean negative log-density of the
            validation rows, in nats.
        validation_steps: the number of steps done at each of these.
        reason: why it stopped: "num_steps", "seconds", "plateau", "patience", "interrupted" or "non-finite".
        num_steps: number of steps taken, skipped ones included.
        num_skipped: number of steps that changed no weights: non-finite, or a gradient far above the median.
        num_nonfinite: how many of these had a non-finite loss or gradient, or a draw that the model refused.
        num_dropped: number of single draws left out of losses, as the model refused them or gave no finite value.
        num_rescues: how often training went back to the last good weights with a smaller step size.
        best: ELBO, or mean log-density of the validation rows (training rows where there are none), in nats,
            of the weights kept; for a guide on draws not used before.
        best_error: its standard error over draws or rows.
        num_unscored: number of draws or rows left out of ``best``, as their score was not finite.
        chosen: the weights kept: "last", "average" or "best"; "start" if training improved on none.
        bits_per_dim: for events of three dimensions (images), ``-best / (number of entries * log 2)``, of the
            data as given: for bytes scaled to [0, 1], add 8.

    >>> FitResult(kind="density", num_steps=10, times=[1.5], reason="num_steps", best=-1.2, best_error=0.1)
    FitResult(density: -1.2 nats, 10 steps, num_steps)
    """

    kind: str
    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    validation_losses: list[float] = field(default_factory=list)
    validation_steps: list[int] = field(default_factory=list)
    reason: str = ""
    num_steps: int = 0
    num_skipped: int = 0
    num_nonfinite: int = 0
    num_dropped: int = 0
    num_rescues: int = 0
    best: float = math.nan
    best_error: float = math.nan
    num_unscored: int = 0
    chosen: str = "last"
    bits_per_dim: float | None = None

    def record(self, loss: float, gradient_norm: float, elapsed: float) -> None:
        """Add one step."""
        self.num_steps += 1
        self.losses.append(loss)
        self.gradient_norms.append(gradient_norm)
        self.times.append(elapsed)

    @property
    def seconds(self) -> float:
        """Seconds up to the end of the last step."""
        return self.times[-1] if self.times else 0.0

    @property
    def measure(self) -> str:
        """What ``best`` is: "ELBO" or "log-density"."""
        return "ELBO" if self.kind == "guide" else "log-density"

    def __repr__(self) -> str:
        return f"FitResult({self.kind}: {self.best:.6g} nats, {self.num_steps} steps, {self.reason or 'running'})"

    def __str__(self) -> str:
        """The fit in one paragraph."""
        words = [f"The {self.kind} fit {_REASONS[self.reason]} (step {self.num_steps}, {self.seconds:.1f} s)."]
        if math.isfinite(self.best):
            bits = "" if self.bits_per_dim is None else f" = {self.bits_per_dim:.4g} bits per dim"
            error = f" +- {self.best_error:.2g}" if math.isfinite(self.best_error) else ""
            words.append(f"{self.measure} {self.best:.6g}{error} nats{bits}, {_CHOICES[self.chosen]}.")
        if self.num_unscored:
            words.append(f"{self.num_unscored} draws or rows are left out of that, as their scores are not finite.")
        if self.num_skipped:
            words.append(f"{self.num_skipped} steps were skipped, {self.num_nonfinite} of them as non-finite.")
        if self.num_dropped:
            words.append(f"{self.num_dropped} single draws were left out of losses, as they were not finite.")
        if self.num_rescues:
            words.append(f"Training went back to its last good weights {self.num_rescues} time(s).")
        return " ".join(words)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Picture of the loss over the steps, with the gradient norm below.

        The losses are drawn faintly with their running median on top; the vertical axis spans what came after
        the first steps, so that a steep start does not flatten the rest.

        Args:
            path: file to save the picture to, such as "fit.png"; None to save nothing.

        Returns:
            The matplotlib figure.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 5), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        self._plot_losses(upper)
        self._plot_norms(lower)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def _plot_losses(self, axes: Axes) -> None:
        steps = range(1, self.num_steps + 1)
        axes.plot(steps, self.losses, color="tab:blue", alpha=0.25, linewidth=0.8, label="each step")
        axes.plot(steps, _running_median(self.losses), color="tab:blue", label="running median")
        if self.validation_steps:
            label = "fixed draws" if self.kind == "guide" else "validation"
            axes.plot(
                self.validation_steps, self.validation_losses, "o-", color="tab:orange", markersize=3, label=label
            )
        if math.isfinite(self.best):
            axes.axhline(-self.best, color="black", linewidth=0.8, linestyle=":", label=_CHOICES[self.chosen])
        axes.set(ylabel=f"negative {self.measure} (nats)", ylim=_readable_limits(self.losses, self.validation_losses))
        axes.set_title(f"{self.measure} {self.best:.6g} nats after {self.num_steps} steps, {self.seconds:.1f} s")
        axes.legend(loc="upper right", frameon=False)

    def _plot_norms(self, axes: Axes) -> None:
        axes.plot(range(1, self.num_steps + 1), self.gradient_norms, color="tab:gray", linewidth=0.8)
        if any(norm > 0 for norm in self.gradient_norms):
            axes.set_yscale("log")
        axes.set(xlabel="step", ylabel="gradient norm")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs: the histories as tensors, all else as it is."""
        state = dict(vars(self))
        return {**state, **{name: torch.tensor(state[name], dtype=torch.float64) for name in _HISTORIES}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""
        vars(self).update({**state, **{name: state[name].tolist() for name in _HISTORIES}})
        self.validation_steps = [int(step) for step in self.validation_steps]


class NonFiniteError(ValueError):
    """Losses or gradients stayed non-finite; the module holds the last good weights.

    Attributes:
        result: the ``FitResult`` up to then.
    """

    def __init__(self, message: str, result: FitResult) -> None:
        super().__init__(message)
        self.result = result

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.result)


def _running_median(losses: list[float]) -> torch.Tensor:
    window = max(1, len(losses) // 50)
    padded = torch.tensor(losses[:1] * (window - 1) + losses)
    return padded.unfold(0, window, 1).nanmedian(-1).values if losses else padded


def _readable_limits(losses: list[float], validation: list[float]) -> tuple[float, float] | None:
    later = torch.tensor(losses[len(losses) // 10 :] + validation)
    later = later[torch.isfinite(later)]
    if later.numel() < 2:
        return None
    low, high = torch.quantile(later[:: max(1, later.numel() // 100_000)], torch.tensor([0.005, 0.98])).tolist()
    margin = 0.1 * (high - low) + 1e-9 * abs(high) + 1e-12
    return low - margin, high + margin
