"""What a check-up of a flow found, and the sentence that says what to do about it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

__all__ = ["HealthReport", "LayerHealth"]

_CROWDED = 0.1  # share of the scales near their bound; above it the map binds, not the data
_UNITS = "bring the values to size 1 first (for data: NormalizingFlow.standardize)"
_BOUND = "give the couplings a scale map with a smaller bound, such as AtanScale(lower=2.0, upper=0.1)"
_DOUBLE = "use float64 (.double() on flow and values)"
_DOMAIN = "see that what reaches the layer lies in its domain and is of moderate size"
_CLIP = "go back to the last good weights and train with a smaller step size and clipped gradients"


@dataclass(frozen=True)
class LayerHealth:
    """What one layer does to the points.

    Attributes:
        name: path of the layer inside the flow, and its type.
        scale: smallest and largest factor by which it stretches an entry, towards the data: exp(log_scale) of
            a coupling, singular values of a linear map, for others the geometric mean over the entries of an
            event, |det dy/dx|^(1 / D). NaN where no event reached it.
        near_bound: share of a coupling's log-scales within 5 % of the bound of their scale map; NaN without
            one.
        own_error: error of the layer's own round trip.
        total_error: error of the round trip from this layer to the far end of the flow and back.
        largest: largest absolute value that leaves the layer towards the data.
        lost_forward: number of events that stop being finite in it, towards the data.
        lost_backward: the same towards the base.
        finite_parameters: whether all its parameters and buffers are finite.
    """

    name: str
    scale: tuple[float, float]
    near_bound: float
    own_error: float
    total_error: float
    largest: float
    lost_forward: int
    lost_backward: int
    finite_parameters: bool

    @property
    def lost(self) -> int:
        """Number of events that stop being finite in it, either way."""
        return self.lost_forward + self.lost_backward

    @property
    def reached(self) -> bool:
        """Whether a finite event came in."""
        return self.lost > 0 or not math.isnan(self.largest)


@dataclass(frozen=True)
class HealthReport:
    """State of a flow at some points, layer by layer; ``print(report)`` gives a table and the verdict.

    Attributes:
        layers: what each layer does, base side first.
        round_trip: error of the whole flow's round trip over the events that stay finite.
        dtype: floating point type of the points.
        num_events: number of points.
        num_bad_events: number of points that were not finite to begin with.
        largest: largest absolute value of the points.

    >>> HealthReport((), 1e-7, torch.float32, 10, 0, 3.0).verdict
    'Healthy: every value is finite and the round trip is off by 1e-07 (good below 0.00035).'
    """

    layers: tuple[LayerHealth, ...]
    round_trip: float
    dtype: torch.dtype
    num_events: int
    num_bad_events: int
    largest: float

    @property
    def tolerance(self) -> float:
        """Largest good round-trip error: half of the digits of the floating point type."""
        return math.sqrt(torch.finfo(self.dtype).eps)

    @property
    def first_nonfinite_forward(self) -> str | None:
        """Name of the first layer, towards the data, in which an event stops being finite."""
        return next((layer.name for layer in self.layers if layer.lost_forward), None)

    @property
    def first_nonfinite_backward(self) -> str | None:
        """Name of the first layer, towards the base, in which an event stops being finite."""
        return next((layer.name for layer in reversed(self.layers) if layer.lost_backward), None)

    @property
    def ok(self) -> bool:
        """Whether all values and parameters are finite and the round trip is exact to ``tolerance``."""
        finite = all(layer.finite_parameters and not layer.lost for layer in self.layers)
        return finite and not self.num_bad_events and self.round_trip <= self.tolerance

    @property
    def verdict(self) -> str:
        """One sentence: how the flow is, which layer is to blame, and what to do."""
        return f"{self._fault() or self._hint()}."

    def _fault(self) -> str:
        broken = next((layer for layer in self.layers if not layer.finite_parameters), None)
        if broken is not None:
            return f"Broken: {broken.name} has parameters that are not finite: {_CLIP}"
        if self.num_bad_events:
            return (
                f"Bad input: {self.num_bad_events} of {self.num_events} points are not finite to begin with: "
                "drop or mend them; the report is about the others"
            )
        forward = [(layer.name, layer.lost_forward, "data") for layer in self.layers]
        backward = [(layer.name, layer.lost_backward, "base") for layer in reversed(self.layers)]
        for name, lost, way in forward + backward:
            if lost:
                where = f"{lost} of {self.num_events} events stop being finite in {name}, towards the {way}"
                return f"Not finite: {where}: {self._remedy(name)}, or {_CLIP}"
        return "" if self.round_trip <= self.tolerance else self._inexact()

    def _inexact(self) -> str:
        layers = [layer for layer in self.layers if layer.total_error > self.tolerance]
        culprit = min(layers, key=lambda layer: layer.total_error).name if layers else "the whole"
        gain = torch.finfo(torch.float64).eps / torch.finfo(self.dtype).eps
        cured = gain < 1 and self.round_trip * gain <= self.tolerance
        return (
            f"Inexact: the round trip is off by {self.round_trip:.2g} (good below {self.tolerance:.2g} in "
            f"{_short(self.dtype)}), too much from {culprit} on: {f'{_DOUBLE}, or ' if cured else ''}"
            f"{self._remedy(culprit)}"
        )

    def _remedy(self, name: str) -> str:
        if self.largest > 1 / self.tolerance:
            return _UNITS
        return _BOUND if "AffineCoupling" in name else _DOMAIN

    def _hint(self) -> str:
        words = (
            f"every value is finite and the round trip is off by {self.round_trip:.2g} (good below "
            f"{self.tolerance:.2g})"
        )
        if self.largest > 1 / self.tolerance:
            return f"Healthy for now: {words}, but the points are as large as {self.largest:.2g}: {_UNITS}"
        crowded = max(self.layers, key=lambda layer: _known(layer.near_bound), default=None)
        if crowded is not None and _known(crowded.near_bound) > _CROWDED:
            return (
                f"Healthy but tight: {words}, but {crowded.near_bound:.0%} of the scales of {crowded.name} are "
                "near the bound of their map: add layers, or take a larger bound and watch the round trip"
            )
        return f"Healthy: {words}"

    def __str__(self) -> str:
        """Table of the layers, base side first, and the verdict."""
        header = ("layer", "scale", "near bound", "own error", "total error", "largest", "lost")
        reached = [layer for layer in self.layers if layer.reached]
        rows = [header, *map(_row, reached)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"{self.num_events} points of size up to {self.largest:.2g}, {_short(self.dtype)}"]
        for name, *cells in rows:
            right = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
            lines.append("  ".join([name.ljust(widths[0]), *right]))
        if len(reached) < len(self.layers):
            lines.append(f"... {len(self.layers) - len(reached)} more layers that no finite event reached")
        return "\n".join([*lines, self.verdict])


def _row(layer: LayerHealth) -> tuple[str, ...]:
    low, high = layer.scale
    return (
        layer.name,
        "-" if math.isnan(low) else f"{low:.2g} to {high:.2g}",
        "-" if math.isnan(layer.near_bound) else f"{layer.near_bound:.0%}",
        *("-" if math.isnan(x) else f"{x:.1g}" for x in (layer.own_error, layer.total_error)),
        "-" if math.isnan(layer.largest) else f"{layer.largest:.2g}",
        str(layer.lost),
    )


def _known(value: float) -> float:
    return 0.0 if math.isnan(value) else value


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
