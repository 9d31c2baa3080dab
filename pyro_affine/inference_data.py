"""From NumPy arrays to the container of the ArviZ that is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["inference_data"]


def inference_data(
    groups: Mapping[str, Mapping[str, np.ndarray]],
    *,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    attrs: Mapping[str, Mapping[str, Any]] | None = None,
) -> Any:
    """ArviZ container of some groups: ``InferenceData`` from ArviZ 0.x, ``xarray.DataTree`` from ArviZ 1.x.

    Args:
        groups: arrays by group, such as "posterior", and variable. Shape: (chain, draw, *shape of the
            variable), for data groups the shape of the variable alone. Groups without a variable are left
            out.
        coords: labels by dimension.
        dims: names of the dimensions of a variable, without chain and draw.
        attrs: attributes by group, numbers or text.

    Returns:
        The container.

    >>> groups = {"posterior": {"mu": np.zeros((1, 10, 3))}, "prior": {}}
    >>> inference_data(groups, dims={"mu": ["school"]})["posterior"]["mu"].dims
    ('chain', 'draw', 'school')
    """
    import arviz

    filled = {name: dict(variables) for name, variables in groups.items() if variables}
    known = {name: dict(group) for name, group in (attrs or {}).items() if name in filled}
    labels = {
        "coords": dict(coords or {}),
        "dims": {name: list(names) for name, names in (dims or {}).items()},
    }
    from_dict: Any = arviz.from_dict  # its arguments differ between the versions
    if int(arviz.__version__.split(".")[0]) >= 1:
        return from_dict(filled, attrs=known, **labels)
    return from_dict(**filled, **labels, **{f"{name}_attrs": group for name, group in known.items()})
