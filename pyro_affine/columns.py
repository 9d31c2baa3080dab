"""Densities of tables: named columns that are real, positive, bounded, circular or integer, around one flow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import (
    AffineTransform,
    ComposeTransform,
    ExpTransform,
    SigmoidTransform,
    Transform,
    constraints,
)
from torch.distributions.transforms import StackTransform

from pyro_affine.batches import RowCheck
from pyro_affine.fit_density import fit_density
from pyro_affine.fit_result import FitResult
from pyro_affine.flows import NormalizingFlow, real_nvp
from pyro_affine.random_state import seeded
from pyro_affine.stored_batches import sample_stored
from pyro_affine.stored_rows import StoredRows, is_stored, stored_rows

if TYPE_CHECKING:
    from pandas import DataFrame

Kind = str | tuple[Any, ...]

_RULE = '"real", "positive", "integer", ("bounded", low, high) or ("circular", period)'
_BINS = 36  # of the histogram whose emptiest bin a circle is cut at
_FAR = 1000.0  # standard deviations from 0: float32 would round values to 1e-4 of them


class TableDensity(nn.Module):
    """A density of the rows of a DataFrame: a transform for each column, around a flow on the whole real line.

    log p(row) = log p_flow(u) - sum_j log|dy_j/du_j|, exact, with y_j = u_j for "real", exp(u_j) for "positive",
    low + (high - low) sigmoid(u_j) for ("bounded", low, high). A ("circular", period) column takes values modulo its
    period, as if bounded between a cut, put by ``fit`` where the rows are rarest, and the same point one turn later:
    the density is exact and integrates to one over the circle, but need not be continuous across the cut. For an
    "integer" column the flow models y + noise, uniform in [0, 1), and ``log_prob`` averages over the noise. From "real"
    and "integer" columns a thousand standard deviations from 0, such as times in seconds since 1970, ``fit`` takes the
    median away before they become float32; ``sample`` gives it back in float64, the distribution for Pyro in float32.

    Args:
        columns: kind of each column by name, in the order of the columns of samples.
        flow: a ``NormalizingFlow`` on vectors with one entry for each column; default a ``real_nvp``.

    Raises:
        ValueError: for a kind that is none of these, or no column; from the methods, for a frame that lacks a
            column, or values that are not finite or not of their column's kind.

    >>> import pandas
    >>> rows = pandas.DataFrame({"height": torch.randn(200).exp().numpy(), "share": torch.rand(200).numpy()})
    >>> density = TableDensity({"height": "positive", "share": ("bounded", 0.0, 1.0)})
    >>> fit = density.fit(rows, num_steps=20, progress=False)
    >>> density.log_prob(rows).shape, list(density.sample(5).columns)
    (torch.Size([200]), ['height', 'share'])
    """

    cuts: Tensor

    def __init__(self, columns: Mapping[str, Kind], flow: NormalizingFlow | None = None) -> None:
        super().__init__()
        if not columns:
            raise ValueError('columns must name one column at least, got none; for example {"age": "positive"}')
        self.columns = {str(name): _checked(name, kind) for name, kind in columns.items()}
        size = len(self.columns)
        self.flow = NormalizingFlow(real_nvp(size), size) if flow is None else flow
        if self.flow.event_shape != (size,) or self.flow.conditional:
            raise ValueError(
                f"flow must be unconditional on vectors of {size} entries, one for each column, got events of shape "
                f"{tuple(self.flow.event_shape)}; use NormalizingFlow(real_nvp({size}), {size})"
            )
        self.register_buffer("cuts", torch.zeros(size, dtype=torch.float64))

    @property
    def transform(self) -> Transform:
        """From the flow to the columns, entry by entry; an integer column still has its noise."""
        return _ByColumn(
            [_transform(kind, cut) for kind, cut in zip(self.columns.values(), self.cuts.tolist(), strict=True)]
        )

    def forward(self) -> dist.TransformedDistribution:
        """The distribution of rows as a tensor, for ``pyro.sample``. Event shape: (number of columns,)."""
        return dist.TransformedDistribution(self.flow(), [self.transform])

    def fit(
        self, frame: DataFrame | Any, *, validation: float | DataFrame | Any | None = 0.1, **options: Any
    ) -> FitResult:
        """Fit the flow by ``fit_density``, which takes the options, to a frame or to Parquet as in ``stored_rows``.

        ``validation`` is a share of the rows, rows of their own in either form, or None. The scores in the result are
        those of u, the columns on the whole real line.
        """
        rows, seed = self._opened(frame), options.get("seed") or 0
        if not self.flow.standardized:  # what is trained holds for the cuts that it was trained with
            self._put_cuts(rows)
        if not (validation is None or isinstance(validation, float | int)):
            validation = self._for_flow(self._opened(validation), seed)
        return fit_density(self.flow, self._for_flow(rows, seed), validation=validation, **options)

    def _opened(self, data: DataFrame | Any) -> Tensor | StoredRows:
        return stored_rows(data, list(self.columns)) if is_stored(data) else self._rows(data)

    def _put_cuts(self, rows: Tensor | StoredRows) -> None:
        if isinstance(rows, StoredRows):
            rows = sample_stored(rows, None, RowCheck(None, torch.float64)).value.to(self.cuts)
        self.cuts.copy_(torch.stack([_cut(kind, rows[:, j]) for j, kind in enumerate(self.columns.values())]))

    def _for_flow(self, rows: Tensor | StoredRows, seed: int) -> Tensor | StoredRows:
        """u of the rows; the noise of integers is the same in all processes, each time and after a resume."""
        if isinstance(rows, StoredRows):
            return replace(rows, read=partial(self._read, rows))
        with seeded(seed):
            return self._unconstrained(rows, noise=True)[0]

    def _read(self, rows: StoredRows, start: int, stop: int) -> Any:
        checked = self._checked(rows.tensor(start, stop, torch.float64).to(self.cuts))
        with seeded(start):
            return self._unconstrained(checked, noise=True)[0].cpu().numpy()

    @torch.no_grad()
    def log_prob(self, frame: DataFrame, num_draws: int = 16) -> Tensor:
        """Log-density of each row, in nats; for integers log-probability. Result: (number of rows,).

        With integer columns it is log mean p(y + noise) over ``num_draws`` draws of the noise, too low in the mean by
        about half its variance over repeated calls; else it is exact.
        """
        rows = self._rows(frame)
        has_noise = "integer" in [kind[0] for kind in self.columns.values()]
        scores = [self._score(rows, noise=has_noise) for _ in range(num_draws if has_noise else 1)]
        return torch.stack(scores).logsumexp(0) - math.log(len(scores))

    @torch.no_grad()
    def sample(self, num_rows: int) -> DataFrame:
        """Random rows, under the names of the columns; integer columns as int64."""
        import pandas

        y = self.transform(self.flow.sample((num_rows,)).to(self.cuts))
        found: dict[str, Any] = {}
        for (name, kind), values in zip(self.columns.items(), y.unbind(-1), strict=True):
            values = values.floor().long() if kind[0] == "integer" else values
            found[name] = (values % kind[1] if kind[0] == "circular" else values).cpu().numpy()
        return pandas.DataFrame(found)

    def _score(self, rows: Tensor, noise: bool) -> Tensor:
        unconstrained, log_det = self._unconstrained(rows, noise=noise)
        return torch.cat([self.flow.log_prob(chunk) for chunk in unconstrained.split(4096)]) - log_det

    def _unconstrained(self, rows: Tensor, *, noise: bool) -> tuple[Tensor, Tensor]:
        """u in the dtype of the flow, and log|dy/du| summed over columns."""
        kinds = list(self.columns.values())
        columns = [_unrolled(kind, rows[:, j], self.cuts[j], noise) for j, kind in enumerate(kinds)]
        y = torch.stack(columns, -1)
        u = self.transform.inv(y)
        return u.to(self.flow.loc), self.transform.log_abs_det_jacobian(u, y)

    def _rows(self, frame: DataFrame) -> Tensor:
        missing = [name for name in self.columns if name not in getattr(frame, "columns", ())]
        if missing:
            raise ValueError(
                f"the frame must be a DataFrame with the columns {list(self.columns)}, got {type(frame).__name__} "
                f"without {missing}; name them so, or declare other columns"
            )
        texts = [name for name in self.columns if frame[name].dtype.kind not in "biuf"]
        if texts:
            raise ValueError(
                f"columns must hold numbers, got {frame[texts[0]].dtype} in {texts}; convert numbers "
                "by pandas.to_numeric, fit a density for each category, or leave these columns out"
            )
        rows = frame[list(self.columns)].to_numpy(dtype="float64", copy=True)
        return self._checked(torch.as_tensor(rows).to(self.cuts.device))

    def _checked(self, rows: Tensor) -> Tensor:
        for (name, kind), values in zip(self.columns.items(), rows.unbind(-1), strict=True):
            _check_values(name, kind, values)
        return rows


class _ByColumn(Transform):
    """A transform for each entry of a vector; torch's ``StackTransform`` leaves its log-determinants unsummed."""

    bijective = True
    domain = constraints.real_vector

    def __init__(self, parts: list[Transform]) -> None:
        super().__init__()
        self.stack = StackTransform(parts, dim=-1)

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def codomain(self) -> constraints.Constraint:
        codomain: constraints.Constraint = self.stack.codomain
        return codomain

    def _call(self, x: Tensor) -> Tensor:
        y: Tensor = self.stack(x)
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        x: Tensor = self.stack.inv(y)
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        log_det: Tensor = self.stack.log_abs_det_jacobian(x, y).sum(-1)
        return log_det


def _checked(name: str, kind: Kind) -> tuple[Any, ...]:
    given = (kind,) if isinstance(kind, str) else tuple(kind)
    lengths = {"real": 1, "positive": 1, "integer": 1, "bounded": 3, "circular": 2}
    fits = lengths.get(given[0] if given else "") == len(given)
    if not fits or (given[0] == "bounded" and not given[1] < given[2]) or (given[0] == "circular" and not given[1] > 0):
        raise ValueError(f"the kind of column {name!r} must be {_RULE} with low < high and period > 0, got {kind!r}")
    return (given[0], *map(float, given[1:]))


def _transform(kind: tuple[Any, ...], cut: float) -> Transform:
    if kind[0] == "positive":
        return ExpTransform()
    if kind[0] in ("bounded", "circular"):
        low, high = kind[1:] if kind[0] == "bounded" else (cut, cut + kind[1])
        return ComposeTransform([SigmoidTransform(), AffineTransform(low, high - low)])
    return AffineTransform(cut, 1.0)


def _cut(kind: tuple[Any, ...], values: Tensor) -> Tensor:
    """Middle of the emptiest of some bins of a circle; of numbers far from 0 for their spread, the median; else 0."""
    if kind[0] == "circular":
        counts = torch.histc(values % kind[1], _BINS, 0.0, kind[1])
        cut: Tensor = (counts.argmin() + 0.5) / _BINS * kind[1]
        return cut
    middle = values.median()
    is_far = kind[0] in ("real", "integer") and bool(middle.abs() > _FAR * values.std(correction=0))
    return middle if is_far else torch.zeros_like(middle)


def _unrolled(kind: tuple[Any, ...], values: Tensor, cut: Tensor, noise: bool) -> Tensor:
    """Circles cut open, strictly between their ends; noise on integers."""
    if kind[0] == "integer" and noise:
        noisy: Tensor = values + torch.rand_like(values)
        return noisy
    if kind[0] == "circular":
        turn: float = kind[1]
        return cut + ((values - cut) % turn).clamp(1e-12 * turn, (1 - 1e-12) * turn)
    return values


def _check_values(name: str, kind: tuple[Any, ...], values: Tensor) -> None:
    good = values.isfinite()
    if kind[0] == "positive":
        good &= values > 0
    elif kind[0] == "bounded":
        good &= (values > kind[1]) & (values < kind[2])
    elif kind[0] == "integer":
        good &= values == values.round()
    if not good.all():
        bad = values[~good]
        raise ValueError(
            f"column {name!r} is declared {kind} and must hold finite values strictly inside of that, got "
            f"{float(bad[0])} and {len(bad) - 1} more; drop these rows, widen the bounds, or declare another kind: "
            f"{_RULE}"
        )
