"""Observed sites as a context: packed in one row, brought to unit scale, summarised by networks if any."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Size, Tensor, nn

_LIMIT = 5.0  # standard deviations within which the data pass unchanged
_LEAST_DEVIATION = 1e-5  # of the context: below is rounding of what is constant
_STATISTICS_ROWS = 20_000  # quantiles to a percent of a standard deviation
_ENTRIES_AT_ONCE = 2**20  # of packed data, through a summary network, which holds a few dozen numbers for each


class DataEncoder(nn.Module):
    """From the values of observed sites to a context vector.

    ``pack`` puts the sites side by side in one row, with a mask for each set of rows that may be incomplete. The
    Module brings each entry to z = (x - median) / half the width of the central 68 %, beyond 5 by 5 + log(z - 4), so
    that an outlier does not drown the rest; then it applies the summary network of each site, or none, and brings what
    comes out to the mean 0 and standard deviation 1 that it had when ``fit`` was called.

    Args:
        shapes: shape of each observed site.
        summaries: a Module for some of the sites, from batch + shape to batch + (any size,). One with the attribute
            ``takes_mask``, such as ``DeepSets``, gets rows, (n, entries of a row), and a mask; its site may have
            fewer than n rows, or rows with NaN, which are left out. Beside its summary the context then holds
            mean and mean square of the rows, and log(1 + n).

    Attributes:
        is_fixed: which entries of the context no network changes in training. Shape: (context_dim,).
        width: size of a packed row.
        context_dim: size of the context.

    Raises:
        ValueError: if a summary is for no observed site, or does not give a vector.

    >>> encoder = DataEncoder({"y": torch.Size([3]), "n": torch.Size([])}, {})
    >>> encoder(encoder.pack({"y": torch.zeros(5, 3), "n": torch.ones(5)})).shape
    torch.Size([5, 4])
    """

    loc: Tensor
    scale: Tensor
    context_loc: Tensor
    context_scale: Tensor
    is_fixed: Tensor

    def __init__(self, shapes: Mapping[str, Size], summaries: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.shapes = {name: Size(shape) for name, shape in shapes.items()}
        unknown = sorted(set(summaries) - set(self.shapes))
        if unknown:
            raise ValueError(f"a summary must be for an observed site, got {unknown}; observed are {list(self.shapes)}")
        self.positions = {name: str(index) for index, name in enumerate(self.shapes)}  # a site's name may hold dots
        self.summaries = nn.ModuleDict({self.positions[name]: network for name, network in summaries.items()})
        self.width = sum(map(self._width, self.shapes))
        self.register_buffer("loc", torch.zeros(self.width))
        self.register_buffer("scale", torch.ones(self.width))
        no_rows = [name for name, shape in self.shapes.items() if self.is_set(name) and not shape]
        if no_rows:
            raise ValueError(f"a summary of rows needs a site with rows, got shape () at {no_rows}; leave it out")
        self.eval()  # a look at shapes alone feeds no batch norm
        with torch.no_grad():
            contexts = self._contexts(torch.zeros(2, self.width))
        self.train()
        _require_vectors({name: made for name, (_, made) in zip(self.shapes, contexts, strict=True)})
        self.context_dim = sum(fixed.shape[-1] + trained.shape[-1] for fixed, trained in contexts)
        flags = [torch.tensor([True] * f.shape[-1] + [False] * t.shape[-1]) for f, t in contexts]
        self.register_buffer("is_fixed", torch.cat(flags))
        self.register_buffer("context_loc", torch.zeros(self.context_dim))
        self.register_buffer("context_scale", torch.ones(self.context_dim))

    @property
    def rows_at_once(self) -> int:
        """How many data sets go through the summaries together where there are many, so that memory stays small."""
        return max(1, _ENTRIES_AT_ONCE // self.width)

    def is_set(self, name: str) -> bool:
        """Whether rows of a site may be missing."""
        return bool(getattr(self._summary(name), "takes_mask", False))

    def pack(self, data: Mapping[str, Tensor]) -> Tensor:
        """One row for each data set. Shapes: batch + shape of the site, for each; result: batch + (width,).

        Raises:
            ValueError: naming the site that is missing, not known or of another shape.
        """
        unknown = sorted(set(data) - set(self.shapes))
        if unknown:
            raise ValueError(f"data must be of the observed sites {list(self.shapes)}, got {unknown}; drop them")
        pieces = [self._pack(name, data) for name in self.shapes]
        batch = torch.broadcast_shapes(*(piece.shape[:-1] for piece in pieces))
        return torch.cat([piece.expand(*batch, -1) for piece in pieces], -1)

    def forward(self, packed: Tensor) -> Tensor:
        """The context. Shape: batch + (width,) to batch + (context_dim,)."""
        return (self._raw_context(packed) - self.context_loc) / self.context_scale

    def _raw_context(self, packed: Tensor) -> Tensor:
        pieces = [piece for pair in self._contexts(packed.reshape(-1, self.width)) for piece in pair]
        return torch.cat(pieces, -1).reshape(*packed.shape[:-1], -1)

    @torch.no_grad()
    def fit(self, packed: Tensor) -> None:
        """Store the units of the data, over all rows of a set alike, then those of the context. Shape: (N, width)."""
        start = 0
        for name, shape in self.shapes.items():
            size = shape.numel()
            values = packed[:_STATISTICS_ROWS, start : start + size].double()
            if self.is_set(name):
                kept = packed[:_STATISTICS_ROWS, start + size : start + self._width(name)] > 0
                rows = values.reshape(*kept.shape, -1)[kept][:_STATISTICS_ROWS]
                loc, scale = (statistic.repeat(shape[0]) for statistic in _centre_and_width(rows))
            else:
                loc, scale = _centre_and_width(values)
            self.loc[start : start + size] = loc.to(self.loc)
            self.scale[start : start + size] = scale.to(self.scale)
            start += self._width(name)
        some = packed[:_STATISTICS_ROWS].split(self.rows_at_once)
        context = torch.cat([self._raw_context(rows) for rows in some])
        deviation = context.std(0)
        self.context_loc.copy_(context.mean(0))
        self.context_scale.copy_(torch.where(deviation > _LEAST_DEVIATION, deviation, 1.0))

    def _pack(self, name: str, data: Mapping[str, Tensor]) -> Tensor:
        if name not in data:
            raise ValueError(
                f"data must hold each observed site, got none for '{name}'; pass it, or build the NeuralPosterior "
                "without it: its draws would then be averaged over"
            )
        value, shape = torch.as_tensor(data[name], device=self.loc.device).to(self.loc.dtype), self.shapes[name]
        is_set = self.is_set(name)
        short = value.dim() - len(shape)
        fits = value.shape[short:] == shape if not is_set else self._has_rows(value, shape)
        if short < 0 or not fits:
            few = "batch + " if not is_set else f"at most {shape[0]} rows of "
            raise ValueError(
                f"the data of site '{name}' must have shape {few}{tuple(shape if not is_set else shape[1:])}, as the "
                f"model simulates it, got {tuple(value.shape)}"
            )
        return _pack_rows(value, shape) if is_set else value.reshape(*value.shape[:short], -1)

    def _has_rows(self, value: Tensor, shape: Size) -> bool:
        place = value.dim() - len(shape)
        return place >= 0 and value.shape[place] <= shape[0] and value.shape[place + 1 :] == shape[1:]

    def _width(self, name: str) -> int:
        return self.shapes[name].numel() + (self.shapes[name][0] if self.is_set(name) else 0)

    def _summary(self, name: str) -> nn.Module | None:
        position = self.positions[name]
        found: dict[str, nn.Module] = dict(self.summaries.items())
        return found.get(position)

    def _contexts(self, packed: Tensor) -> list[tuple[Tensor, Tensor]]:
        """For each site what is fixed, and what its network makes. Shape: (N, width) to (N, any size)."""
        z = (packed - self.loc) / self.scale
        far = z.abs().clamp(min=_LIMIT)
        z = torch.where(z.abs() <= _LIMIT, z, z.sign() * (_LIMIT + (far - _LIMIT).log1p()))
        parts = z.split([self._width(name) for name in self.shapes], -1)
        return [self._context_of(name, part) for name, part in zip(self.shapes, parts, strict=True)]

    def _context_of(self, name: str, part: Tensor) -> tuple[Tensor, Tensor]:
        summary, shape = self._summary(name), self.shapes[name]
        if summary is None:
            return part, part[:, :0]
        if not self.is_set(name):
            return part[:, :0], summary(part.reshape(-1, *shape))
        kept = part[:, shape.numel() :, None] > 0
        rows = torch.where(kept, part[:, : shape.numel()].reshape(len(part), shape[0], -1), 0.0)
        number = kept.sum(-2).to(rows)
        moments = [x.sum(-2) / number.clamp(min=1) for x in (rows, rows.square())]
        return torch.cat([*moments, number.log1p()], -1), summary(rows, kept.squeeze(-1))


def _require_vectors(summaries: Mapping[str, Tensor]) -> None:
    """Refuse what a summary makes of two data sets, unless it is a vector for each."""
    for name, made in summaries.items():
        if not isinstance(made, Tensor) or made.dim() != 2 or len(made) != 2:
            got = f"shape {tuple(made.shape)}" if isinstance(made, Tensor) else type(made).__name__
            raise ValueError(
                f"a summary must give a vector for each data set, got {got} for two data sets at site '{name}'; end it "
                "with nn.Flatten(), or with a mean over rows"
            )


def _pack_rows(value: Tensor, shape: Size) -> Tensor:
    """Rows, filled up to the full number, and the mask of those that are there."""
    batch = value.shape[: value.dim() - len(shape)]
    rows = value.reshape(*batch, value.shape[len(batch)], -1)
    missing = rows.new_full((*batch, shape[0] - rows.shape[-2], rows.shape[-1]), torch.nan)
    rows = torch.cat([rows, missing], -2)
    mask = ~rows.isnan().any(-1)
    return torch.cat([torch.where(mask[..., None], rows, 0.0).flatten(-2), mask.to(rows)], -1)


def _centre_and_width(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Median, and half the width of the central 68 %; where that is 0 the standard deviation, or 1."""
    lower, centre, upper = rows.quantile(rows.new_tensor([0.16, 0.5, 0.84]), dim=0)
    width, deviation = (upper - lower) / 2, rows.std(0)
    width = torch.where(width > 0, width, deviation)
    return centre, torch.where(width > 0, width, 1.0)
