"""What autocast must not do: round the products of the layers themselves, or go on with weights of before a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def product(rows: Tensor, matrix: Tensor) -> Tensor:
    """``rows @ matrix`` in the precision of the matrix, under autocast too.

    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     product(torch.ones(1, 2), torch.eye(2)).dtype
    torch.float32
    """
    if not torch.is_autocast_enabled(rows.device.type):
        return rows @ matrix
    with torch.autocast(rows.device.type, enabled=False):
        return rows.to(matrix.dtype) @ matrix


@contextmanager
def casts_anew() -> Iterator[None]:
    """Within it autocast rounds weights each time they are read, as they change. By itself it does so once a context.

    >>> with torch.autocast("cpu", torch.bfloat16), casts_anew():
    ...     torch.is_autocast_cache_enabled()
    False
    """
    was_enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(was_enabled)
        torch.clear_autocast_cache()  # of casts made before
