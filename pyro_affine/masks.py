"""Boolean masks that say which entries a coupling layer keeps.

True = kept unchanged (the ``b`` of Dinh et al., 2017), False = transformed. Masks come in pairs:
``keep_first=True`` keeps the first entry, ``keep_first=False`` is its exact complement ``~mask``. Layers that
alternate between the two move every entry. Masks of shape (H, W) and (C, 1, 1) broadcast to images (C, H, W).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["alternating_mask", "channel_mask", "checkerboard_mask", "half_mask", "random_mask"]

_WAY_OUT = "for a single entry use a transform of that entry alone, such as AffineTransform or Spline"


def half_mask(num_entries: int, *, keep_first: bool = True) -> Tensor:
    """Mask that keeps one half of a vector, the split of NICE and of Pyro's ``affine_coupling``.

    The first half is ``num_entries // 2`` entries, the second half is the rest: one more if the size is odd.

    Args:
        num_entries: size of the vector, 2 or more.
        keep_first: True keeps the first half, False the second.

    Returns:
        Boolean mask, shape: (num_entries,).

    Raises:
        ValueError: if ``num_entries`` is below 2.

    Source: NICE: Non-linear Independent Components Estimation (Dinh et al., 2015).

    >>> half_mask(5)
    tensor([ True,  True, False, False, False])
    """
    _check_size(num_entries, f"num_entries={num_entries}", _WAY_OUT)
    mask = torch.arange(num_entries) < num_entries // 2
    return mask if keep_first else ~mask


def alternating_mask(num_entries: int, *, keep_first: bool = True) -> Tensor:
    """Mask that keeps every second entry of a vector.

    Args:
        num_entries: size of the vector, 2 or more.
        keep_first: True keeps the entries 0, 2, 4, ..., False the entries 1, 3, 5, ...

    Returns:
        Boolean mask, shape: (num_entries,).

    Raises:
        ValueError: if ``num_entries`` is below 2.

    >>> alternating_mask(5, keep_first=False)
    tensor([False,  True, False,  True, False])
    """
    _check_size(num_entries, f"num_entries={num_entries}", _WAY_OUT)
    mask = torch.arange(num_entries) % 2 == 0
    return mask if keep_first else ~mask


def random_mask(num_entries: int, *, num_kept: int | None = None, seed: int | torch.Generator | None = None) -> Tensor:
    """Mask that keeps ``num_kept`` entries of a vector, drawn uniformly from all such masks.

    Pair each random mask with its complement ``~mask`` in the next layer, so that every entry moves.

    Args:
        num_entries: size of the vector, 2 or more.
        num_kept: how many entries are kept, from 1 to ``num_entries - 1``. Default: ``num_entries // 2``.
        seed: a number (the same mask each time), a generator (the next mask of its sequence), or None for
            torch's global generator, which ``torch.manual_seed`` and ``pyro.set_rng_seed`` set.

    Returns:
        Boolean mask, shape: (num_entries,).

    Raises:
        ValueError: if ``num_entries`` is below 2, or the mask would keep all entries or none.

    >>> random_mask(6, num_kept=2, seed=0).sum()
    tensor(2)
    """
    _check_size(num_entries, f"num_entries={num_entries}", _WAY_OUT)
    num_kept = num_entries // 2 if num_kept is None else num_kept
    if not 0 < num_kept < num_entries:
        raise ValueError(
            "a mask must keep at least one entry and leave at least one to transform, "
            f"got num_kept={num_kept} of {num_entries} entries; choose num_kept from 1 to {num_entries - 1}"
        )
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    device = "cpu" if generator is None else generator.device
    return torch.randperm(num_entries, generator=generator, device=device) < num_kept


def checkerboard_mask(height: int, width: int, *, keep_first: bool = True) -> Tensor:
    """Mask that keeps the pixels of one colour of a checkerboard.

    Entry (i, j) is kept where i + j is even (``keep_first=True``) or odd (``keep_first=False``).

    Args:
        height: number of rows.
        width: number of columns; at least one of the two is 2 or more.
        keep_first: True keeps the pixel (0, 0), False transforms it.

    Returns:
        Boolean mask, shape: (height, width), which broadcasts to images (C, height, width).

    Raises:
        ValueError: if there are fewer than 2 pixels.

    Source: Density estimation using Real NVP (Dinh et al., 2017), figure 3.

    >>> checkerboard_mask(2, 3).int()
    tensor([[1, 0, 1],
            [0, 1, 0]], dtype=torch.int32)
    """
    num_pixels = height * width if min(height, width) > 0 else 0
    _check_size(num_pixels, f"height={height}, width={width}", "for one pixel use channel_mask")
    mask = (torch.arange(height)[:, None] + torch.arange(width)) % 2 == 0
    return mask if keep_first else ~mask


def channel_mask(num_channels: int, *, keep_first: bool = True) -> Tensor:
    """Mask that keeps one half of the channels of an image.

    The first half is ``num_channels // 2`` channels, the second half is the rest.

    Args:
        num_channels: number of channels, 2 or more.
        keep_first: True keeps the first half, False the second.

    Returns:
        Boolean mask, shape: (num_channels, 1, 1), which broadcasts to images (num_channels, H, W).

    Raises:
        ValueError: if ``num_channels`` is below 2.

    Source: Density estimation using Real NVP (Dinh et al., 2017), figure 3.

    >>> channel_mask(4).squeeze()
    tensor([ True,  True, False, False])
    """
    _check_size(num_channels, f"num_channels={num_channels}", "for one channel use checkerboard_mask")
    return half_mask(num_channels, keep_first=keep_first)[:, None, None]


def _check_size(size: int, got: str, way_out: str) -> None:
    if size < 2:
        raise ValueError(f"a mask needs at least two entries, one to keep and one to transform, got {got}; {way_out}")
