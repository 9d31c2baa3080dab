"""A monotone curve for each entry of the data, fitted to its quantiles: skewed, heavy-tailed and peaked columns."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_affine.transform import FlowTransform

_LARGEST_SCORE = 3.0  # beyond the outer knots, at the 0.1 % quantiles, the tails take over
_ROWS_OUTSIDE = 5  # data that are left for each tail of a short table
_LOG_REACH = 30.0  # before any fit: straight lines as far as float32 can tell
_LONGEST_FITTED = 5.0  # one sd beyond the last knot it is off by 9 %, which training mends; and 1e6 sd arrive as 60
_ROWS_TRIED = 20_000  # by which a curve is compared with a normal
_NARROWEST = 0.01  # bin, in standard deviations: a spike of the data gives at most 5 nats or so
_LOWEST = 0.02  # bin, in base standard deviations
_COLUMNS_AT_ONCE = 64  # are sorted and fitted: all 784 of mnist at once would take gigabytes


class Curves(FlowTransform):
    """Elementwise monotone map whose inverse sends each entry of the data to about a standard normal score.

    Between knots (x_k, y_k), x(y) is a rational quadratic spline with slopes d_k at the knots. Beyond the last one,
    x = x_K + r log(1 + d_K (y - y_K) / r), likewise below the first: a row at 1e6 standard deviations arrives at the
    layers before as a few dozen. A large reach r is a straight line. log|det dy/dx| = -sum log dx/dy.

    It starts as the identity. ``fit`` puts the knots y_k at quantiles of the data and x_k at those of the standard
    normal; x_k, d_k and r are then trained.

    Args:
        event_shape: shape of one event.
        num_knots: K, 3 at least. The default 24 resolves a quarter of a standard deviation.
        straight_tails: keep r infinite, so that a ray of far points stays a ray.

    Raises:
        ValueError: for fewer than 3 knots.

    Source: Neural Spline Flows (Durkan et al., 2019), appendix A.1, for the spline.

    >>> layer = Curves((1,))
    >>> layer.fit(torch.randn(1000, 1).exp())
    1
    >>> bool(layer.inv(torch.tensor([[1.0]])).abs() < 0.2)  # the median of exp(normal)
    True
    """

    knots: Tensor
    log_reach: Tensor  # a buffer where tails are straight

    def __init__(
        self, event_shape: Sequence[int], num_knots: int = 24, *, straight_tails: bool = False, cache_size: int = 1
    ) -> None:
        super().__init__(tuple(event_shape), cache_size=cache_size)
        if num_knots < 3:
            raise ValueError(f"a curve needs 3 knots at least, got {num_knots}; 24 is the default")
        size = math.prod(event_shape)
        even = torch.linspace(-_LARGEST_SCORE, _LARGEST_SCORE, num_knots).expand(size, -1)
        self.register_buffer("knots", even.clone())
        self.first = nn.Parameter(even[:, 0].clone())
        self.log_heights = nn.Parameter(even.diff().log())
        self.log_slopes = nn.Parameter(torch.zeros(size, num_knots))
        reach = torch.full((size, 2), _LOG_REACH)
        if straight_tails:
            self.register_buffer("log_reach", reach)
        else:
            self.log_reach = nn.Parameter(reach)

    @torch.no_grad()
    def fit(self, data: Tensor) -> int:
        """Fit each curve to the quantiles of its entry. Data shape: (N,) + event_shape, N >= 2.

        An entry whose curve, fitted to one half of the rows, scores no better on the other half than a normal does gets
        a straight line: a short table cannot tell more. So does an entry whose knots its dtype cannot tell apart, such
        as counts with 999999999 for missing ones.

        Returns:
            How many entries got a curve.
        """
        num_curved = 0
        for start, block in enumerate(data.reshape(len(data), -1).split(_COLUMNS_AT_ONCE, -1)):
            found, curved = self._fitted(block.double())
            num_curved += curved
            for tensor, values in zip(self._columns(), found, strict=True):
                own = tensor.view(len(self.knots), -1)[start * _COLUMNS_AT_ONCE :][: len(values)]
                own.copy_(values.view_as(own))
        if not self.log_reach.requires_grad:
            self.log_reach.fill_(_LOG_REACH)
        return num_curved

    @property
    def is_new(self) -> bool:
        """Whether neither ``fit`` nor training has changed it."""
        return not self.log_slopes.any()

    def _fitted(self, rows: Tensor) -> tuple[list[Tensor], int]:
        """What ``_columns`` of these entries are to be, and how many got a curve. Shape: (N, D)."""
        some, num_knots = rows[:_ROWS_TRIED], self.knots.shape[-1]
        pairs = (some[::2], some[1::2]), (some[1::2], some[::2])
        curved = sum(map(self._gain, *pairs)) > 0 if len(rows) > 9 else torch.tensor(False)
        which = torch.as_tensor(curved, device=rows.device).expand(rows.shape[-1])[:, None]
        curves, lines = _place(rows.T.sort(-1).values, num_knots), _line(rows, num_knots)
        which = which & (curves[0].to(self.knots.dtype).diff() > 0).all(-1, keepdim=True)  # each bin has a width
        return [torch.where(which, curve, line) for curve, line in zip(curves, lines, strict=True)], int(which.sum())

    def _gain(self, rows: Tensor, others: Tensor) -> Tensor:
        """Mean log-density of the curve fitted to ``rows`` minus that of a normal, on ``others``. Shape: (D,)."""
        trial = Curves((rows.shape[-1],), self.knots.shape[-1]).to(rows)
        found = []
        for columns in (_place(rows.T.sort(-1).values, self.knots.shape[-1]), _line(rows, self.knots.shape[-1])):
            for tensor, column in zip(trial._columns(), columns, strict=True):
                tensor.copy_(column.view_as(tensor))
            value, log_slope = trial._inverse(others)
            found.append((log_slope - value**2 / 2).mean(0))
        return found[0] - found[1]

    def _columns(self) -> list[Tensor]:
        return [self.knots, self.first, self.log_heights, self.log_slopes, self.log_reach]

    def _table(self) -> tuple[Tensor, Tensor]:
        """Knots x_k, shape (D, K), and what a bin needs: y_k, width, x_k, height, both slopes. Shape: (D, K - 1, 6)."""
        heights, slopes = self.log_heights.exp(), self.log_slopes.exp()
        x = torch.cat([self.first[:, None], self.first[:, None] + heights.cumsum(-1)], -1)
        y = self.knots
        return x, torch.stack([y[:, :-1], y.diff(), x[:, :-1], heights, slopes[:, :-1], slopes[:, 1:]], -1)

    def _bins(self, flat: Tensor, knots: Tensor, table: Tensor) -> tuple[Tensor, ...]:
        """The table at the bin of each value. Flat shape: (N, D)."""
        inner = knots[:, 1:-1].detach().contiguous()
        index = torch.searchsorted(inner, flat.detach().T.contiguous()).T
        index = index + torch.arange(len(knots), device=index.device) * table.shape[1]
        return F.embedding(index, table.flatten(0, 1)).unbind(-1)

    def _ends(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reach, outer knots x, and slopes of both tails. Shape of each: (2, D)."""
        slopes = self.log_slopes[:, [0, -1]].exp()
        return self.log_reach.exp().T, x[:, [0, -1]].T, slopes.T

    def _backward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        value, log_slope = self._inverse(y.reshape(-1, len(self.knots)))
        return value.reshape(y.shape), -log_slope.sum(-1).reshape(y.shape[: y.dim() - len(self.event_shape or ())])

    def _inverse(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """x and log dx/dy of each entry. Shape of each: (N, D)."""
        x, table = self._table()
        low, high = self.knots[:, 0], self.knots[:, -1]
        inside = torch.minimum(torch.maximum(flat, low), high)
        y_low, width, x_low, height, d_low, d_high = self._bins(inside, self.knots, table)
        slope, t = height / width, (inside - y_low) / width
        middle = t * (1 - t)
        below = slope + (d_low + d_high - 2 * slope) * middle
        value = x_low + height * (slope * t * t + d_low * middle) / below
        log_slope = (d_high * t * t + 2 * slope * middle + d_low * (1 - t) ** 2).log() + 2 * (slope / below).log()
        reach, _, d = self._ends(x)
        left, right = ((low - flat).relu() * d[0] / reach[0]).log1p(), ((flat - high).relu() * d[1] / reach[1]).log1p()
        return value - reach[0] * left + reach[1] * right, log_slope - left - right

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        flat = x.reshape(-1, len(self.knots))
        knots, table = self._table()
        reach, (low, high), d = self._ends(knots)
        inside = torch.minimum(torch.maximum(flat, low), high)
        y_low, width, x_low, height, d_low, d_high = self._bins(inside, knots, table)
        slope, above = height / width, inside - x_low
        bend = d_low + d_high - 2 * slope
        a, b, c = height * (slope - d_low) + above * bend, height * d_low - above * bend, -slope * above
        t = 2 * c / (-b - (b * b - 4 * a * c).clamp(min=0).sqrt())
        middle = t * (1 - t)
        log_slope = (d_high * t * t + 2 * slope * middle + d_low * (1 - t) ** 2).log()
        log_slope = log_slope + 2 * (slope / (slope + bend * middle)).log()
        left, right = (low - flat).relu() / reach[0], (flat - high).relu() / reach[1]
        value = y_low + width * t - reach[0] / d[0] * left.expm1() + reach[1] / d[1] * right.expm1()
        log_det = -(log_slope - left - right).sum(-1)
        return value.reshape(x.shape), log_det.reshape(x.shape[: x.dim() - len(self.event_shape or ())])


def _place(ordered: Tensor, num_knots: int) -> tuple[Tensor, ...]:
    """Knots y, first knot x, log heights, log slopes, log reach of curves through the quantiles. Shape: (D, N)."""
    share = 1 - _ROWS_OUTSIDE / max(ordered.shape[-1], 4 * _ROWS_OUTSIDE)
    top = min(float(torch.special.ndtri(torch.tensor(share, dtype=torch.float64))), _LARGEST_SCORE)
    wanted = torch.special.ndtr(torch.linspace(-top, top, num_knots, dtype=torch.float64)).to(ordered)
    y = _apart(_quantiles(ordered, wanted), _NARROWEST * _spread(ordered))
    x = _apart(torch.special.ndtri(_levels(ordered, y)), torch.full_like(y[:, :1], _LOWEST))
    slopes = _slopes(x.diff() / y.diff())
    return y, x[:, :1], x.diff().log(), slopes.log(), _reach(ordered, x, y, slopes).log()


def _line(rows: Tensor, num_knots: int) -> tuple[Tensor, ...]:
    """The same for straight lines: a normal of the mean and standard deviation of each column. Shape: (N, D)."""
    loc, scale = rows.mean(0)[:, None], rows.std(0)[:, None]
    x = torch.linspace(-_LARGEST_SCORE, _LARGEST_SCORE, num_knots).to(rows).expand(len(loc), -1)
    reach = torch.full_like(x[:, :2], _LONGEST_FITTED).log()
    return loc + scale * x, x[:, :1], x.diff().log(), (-scale.log()).expand_as(x), reach


def _quantiles(ordered: Tensor, levels: Tensor) -> Tensor:
    """Linear between order statistics. Shapes: (D, N), (K,) to (D, K)."""
    position = levels * (ordered.shape[-1] - 1)
    index = position.long().clamp(max=ordered.shape[-1] - 2)
    low, high = ordered[:, index], ordered[:, index + 1]
    return low + (position - index) * (high - low)


def _levels(ordered: Tensor, y: Tensor) -> Tensor:
    """Share of the data below each knot, ties counted by half, never 0 or 1. Shapes: (D, N), (D, K) to (D, K)."""
    ordered = ordered.contiguous()
    below = torch.searchsorted(ordered, y) + torch.searchsorted(ordered, y, right=True)
    return (below / 2 + 0.5) / (ordered.shape[-1] + 1)


def _spread(ordered: Tensor) -> Tensor:
    """Standard deviation by quantiles, which a few outliers do not move. Shape: (D, 1)."""
    wide = ordered.new_tensor([0.0228, 0.1587, 0.8413, 0.9772])
    q = _quantiles(ordered, wide)
    spread = torch.maximum((q[:, 2] - q[:, 1]) / 2, (q[:, 3] - q[:, 0]) / 8)
    return torch.where(spread > 0, spread, ordered.std(-1))[:, None]


def _apart(values: Tensor, least: Tensor) -> Tensor:
    """Push values that are closer than ``least`` apart, from the middle on outwards. Shapes: (D, K), (D, 1)."""
    middle = values.shape[-1] // 2
    steps = values.diff().maximum(least)
    up = values[:, middle : middle + 1] + steps[:, middle:].cumsum(-1)
    down = values[:, middle : middle + 1] - steps[:, :middle].flip(-1).cumsum(-1).flip(-1)
    return torch.cat([down, values[:, middle : middle + 1], up], -1)


def _slopes(secants: Tensor) -> Tensor:
    """Slopes at the knots, between those of the bins on both sides. Shapes: (D, K - 1) to (D, K)."""
    left, right = secants[:, :-1], secants[:, 1:]
    inner = 2 * left * right / (left + right)
    return torch.cat([secants[:, :1], inner, secants[:, -1:]], -1)


def _reach(ordered: Tensor, x: Tensor, y: Tensor, slopes: Tensor) -> Tensor:
    """The reach that sends the outermost row to the score of an outermost row. Shape: (D, 2)."""
    outermost = float(torch.special.ndtri(torch.tensor(1 - 0.5 / ordered.shape[-1], dtype=torch.float64)))
    far = torch.stack([y[:, 0] - ordered[:, 0], ordered[:, -1] - y[:, -1]], -1).relu() * slopes[:, [0, -1]]
    room = (outermost - torch.stack([-x[:, 0], x[:, -1]], -1)).clamp(min=0.1)
    low, high = torch.full_like(far, 1e-3), torch.full_like(far, _LONGEST_FITTED)
    for _ in range(60):
        middle = (low * high).sqrt()
        too_far = middle * (far / middle).log1p() > room
        low, high = torch.where(too_far, low, middle), torch.where(too_far, middle, high)
    return high
