"""How a mask cuts an event into its kept and its moved entries, and how they are put together again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Size, Tensor, nn


class Partition(nn.Module):
    """Kept and moved entries of an event as two flat vectors, so that no network pays for what it does not use.

    A mask whose kept entries lie side by side at one end is cut by views (``split`` and ``cat``, no copy but the
    result); any other mask by one gather each way.

    Args:
        mask: boolean, True = kept, broadcastable to the event.
        event_shape: shape of one event.

    Raises:
        ValueError: for a mask that is not boolean, does not fit the event, or keeps every entry.

    >>> partition = Partition(torch.tensor([True, False, True]), torch.Size([3]))
    >>> kept, moved = partition.split(torch.tensor([1.0, 2.0, 3.0]))
    >>> kept, moved
    (tensor([1., 3.]), tensor([2.]))
    >>> partition.merge(kept, moved)
    tensor([1., 2., 3.])
    """

    mask: Tensor
    order: Tensor
    inverse_order: Tensor

    def __init__(self, mask: Tensor, event_shape: Size) -> None:
        super().__init__()
        _require_mask(mask, event_shape)
        self.event_shape = event_shape
        self.register_buffer("mask", mask.expand(event_shape).clone())
        self._plan()

    def _plan(self) -> None:
        kept = self.mask.flatten()
        self.num_kept = int(kept.sum())
        self.num_moved = kept.numel() - self.num_kept
        order = torch.cat([kept.nonzero()[:, 0], (~kept).nonzero()[:, 0]])
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("inverse_order", order.argsort(), persistent=False)
        self.kept_first = bool(kept[: self.num_kept].all())
        self.kept_last = bool(kept[self.num_moved :].all())

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Kept and moved entries. Shapes: batch + (num_kept,), batch + (num_moved,)."""
        if len(self.event_shape) > 1:
            x = x.flatten(-len(self.event_shape))
        if self.kept_last:
            moved, kept = x.split((self.num_moved, self.num_kept), -1)
            return kept, moved
        if not self.kept_first:
            x = x.index_select(-1, self.order)
        kept, moved = x.split((self.num_kept, self.num_moved), -1)
        return kept, moved

    def merge(self, kept: Tensor, moved: Tensor) -> Tensor:
        """The event again. Shape: batch + event_shape; the batch shape is that of ``moved``."""
        if kept.shape[:-1] != moved.shape[:-1]:
            kept = kept.expand(*moved.shape[:-1], -1)  # a context has widened the batch
        x = torch.cat((moved, kept) if self.kept_last else (kept, moved), -1)
        if not (self.kept_first or self.kept_last):
            x = x.index_select(-1, self.inverse_order)
        return x.unflatten(-1, self.event_shape) if len(self.event_shape) > 1 else x

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._plan()

    def extra_repr(self) -> str:
        """Sizes, for ``repr``."""
        return f"event_shape={tuple(self.event_shape)}, kept={self.num_kept}, moved={self.num_moved}"


def _require_mask(mask: Tensor, event_shape: Size) -> None:
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be boolean with True = kept, got {mask.dtype}; for a 0/1 mask use mask.bool()")
    aligned = (1,) * (len(event_shape) - mask.dim()) + tuple(mask.shape)
    if not event_shape or len(aligned) != len(event_shape):
        fits = False
    else:
        fits = all(m in (1, e) for m, e in zip(aligned, event_shape, strict=True))
    if not fits:
        raise ValueError(
            f"mask must broadcast to the event, got mask shape {tuple(mask.shape)} and event shape "
            f"{tuple(event_shape)}; give it the shape of one event, without batch dimensions"
        )
    if mask.all():
        raise ValueError(
            f"mask must leave some entry to move, got {mask.numel()} of {mask.numel()} kept (True = kept); invert "
            "it with ~mask, or for events of one entry use an elementwise transform"
        )
