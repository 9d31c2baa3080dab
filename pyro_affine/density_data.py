"""What a density fit is given, in any form: batches to train on, and rows to score on."""

from __future__ import annotations

import math
import sys
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_affine.batches import Batches, LoaderBatches, RowBatches, RowCheck, Rows, require_rows
from pyro_affine.random_state import new_seed
from pyro_affine.stored_batches import sample_stored, split_stored
from pyro_affine.stored_rows import is_stored


def split(
    data: Any, context: Any, validation: Any, *, batch_size: int, seed: int | None, check: RowCheck
) -> tuple[Batches, Rows | None]:
    """Batches to train on, and the rows held out.

    Args:
        data, context, validation, batch_size, seed: as in ``fit_density``.
        check: what rows must be.

    Raises:
        ValueError: if rows are too few, of another shape or dtype, or not finite, or an argument is out of range.
    """
    share = validation if isinstance(validation, float | int) else 0.0
    held_out = None if validation is None or isinstance(validation, float | int) else _rows(validation, check)
    if not 0 <= share < 1:
        raise ValueError(f"validation must be a share in [0, 1), rows, or None, got {share}; 0.1 holds out a tenth")
    if held_out is not None and len(held_out.value) < 2:
        raise ValueError("validation must hold 2 rows at least, got 1; give more, a share such as 0.1, or None")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if is_stored(data):
        call: dict[str, Any] = {"batch_size": batch_size, "seed": seed or 0, "order": new_seed(), "check": check}
        batches, own = split_stored(data, context, share, **call)
        return batches, held_out if own is None else own
    if not isinstance(data, Tensor | np.ndarray):
        loader = LoaderBatches(data, check)
        _check_loader_options(context, share)
        return loader, held_out
    rows = check(data, context)
    index, num_held_out = _shuffled(len(rows.value), seed or 0), math.ceil(share * len(rows.value))
    require_rows(len(index), num_held_out)
    held_out = rows[index[:num_held_out]] if num_held_out else held_out
    return RowBatches(rows, index[num_held_out:], batch_size=batch_size, seed=new_seed()), held_out


def _check_loader_options(context: Any, share: float) -> None:
    if context is not None:
        raise ValueError("a loader must yield pairs of values and contexts; context= is for rows in memory")
    if share:
        warnings.warn(
            "a share of a loader cannot be held out, so there is no patience and no choice of the best weights; pass "
            "validation=rows or another loader, or validation=None to say that none are wanted",
            stacklevel=4,
        )


def _shuffled(num_rows: int, seed: int) -> Tensor:
    """Always the same order for a seed, so that a resumed fit holds out the same rows."""
    return torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed), device="cpu")


def _rows(validation: Any, check: RowCheck) -> Rows:
    rows, context = validation if isinstance(validation, tuple) else (validation, None)
    if is_stored(rows):
        return sample_stored(rows, context, check)
    if isinstance(validation, tuple):
        return check(*validation, name="validation")
    if isinstance(validation, Tensor | np.ndarray):
        return check(validation, name="validation")
    return LoaderBatches(validation, check).first(sys.maxsize)
