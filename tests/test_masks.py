"""Properties of the masks: shape, pairs that are complements, reproducible draws, refusals."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from pyro_affine.masks import alternating_mask, channel_mask, checkerboard_mask, half_mask, random_mask

# name: (a function of keep_first, shape)
PAIRS = {
    **{f"half {n}": (partial(half_mask, n), (n,)) for n in (2, 3, 4, 9)},
    **{f"alternating {n}": (partial(alternating_mask, n), (n,)) for n in (2, 3, 4, 9)},
    **{
        f"checkerboard {shape}": (partial(checkerboard_mask, *shape), shape)
        for shape in ((2, 2), (3, 5), (1, 4), (4, 1), (6, 2))
    },
    **{f"channel {n}": (partial(channel_mask, n), (n, 1, 1)) for n in (2, 3, 4, 9)},
}
all_pairs = pytest.mark.parametrize("make, shape", PAIRS.values(), ids=PAIRS)


@all_pairs
@pytest.mark.parametrize("keep_first", [True, False])
def test_shape_dtype_and_both_kinds_of_entries(make, shape, keep_first):
    mask = make(keep_first=keep_first)
    assert mask.shape == shape
    assert mask.dtype == torch.bool
    assert mask.any() and not mask.all()


@all_pairs
def test_keep_first_keeps_the_first_entry_and_the_other_is_its_complement(make, shape):
    assert make(keep_first=True).flatten()[0]
    assert torch.equal(make(keep_first=False), ~make())


@pytest.mark.parametrize("size", range(2, 10))
def test_half_keeps_a_contiguous_half(size):
    first = size // 2
    assert half_mask(size).tolist() == [True] * first + [False] * (size - first)
    assert torch.equal(channel_mask(size).flatten(), half_mask(size))


@pytest.mark.parametrize("size", range(2, 10))
def test_alternating_neighbours_differ(size):
    mask = alternating_mask(size)
    assert (mask[1:] != mask[:-1]).all()


@pytest.mark.parametrize("height, width", [(2, 2), (3, 5), (4, 6)])
def test_checkerboard_neighbours_differ_and_broadcast_over_channels(height, width):
    mask = checkerboard_mask(height, width)
    assert (mask[1:] != mask[:-1]).all()
    assert (mask[:, 1:] != mask[:, :-1]).all()
    image = torch.where(mask, 1.0, torch.zeros(3, height, width))
    assert torch.equal(image, mask.float().expand(3, -1, -1))


def test_channel_mask_broadcasts_over_pixels():
    image = torch.where(channel_mask(4), 1.0, torch.zeros(4, 2, 5))
    assert torch.equal(image[:2], torch.ones(2, 2, 5)) and torch.equal(image[2:], torch.zeros(2, 2, 5))


@pytest.mark.parametrize("num_entries", [2, 3, 8, 101])
@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_random_mask_keeps_as_many_as_asked(num_entries, seed):
    assert random_mask(num_entries, seed=seed).sum() == num_entries // 2
    for num_kept in {1, num_entries // 2, num_entries - 1}:
        mask = random_mask(num_entries, num_kept=num_kept, seed=seed)
        assert mask.shape == (num_entries,) and mask.dtype == torch.bool
        assert mask.sum() == num_kept


def test_random_mask_by_number_repeats_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    masks = [random_mask(50, seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("source", ["generator", "global"])
def test_random_mask_from_a_generator_goes_on_and_can_be_replayed(source):
    def draw_two():
        if source == "generator":
            generator = torch.Generator().manual_seed(5)
        else:
            torch.manual_seed(5)
            generator = None
        return random_mask(50, seed=generator), random_mask(50, seed=generator)

    first, second = draw_two()
    assert not torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(draw_two(), (first, second), strict=True))


def test_random_mask_is_uniform():
    masks = torch.stack([random_mask(6, num_kept=2, seed=seed) for seed in range(3000)]).double()
    # 15 pairs, each with probability 1/15: standard deviation of a frequency 0.0046
    pairs = torch.einsum("si,sj->ij", masks, masks) / len(masks)
    off_diagonal = pairs[~torch.eye(6, dtype=torch.bool)]
    assert (off_diagonal - 1 / 15).abs().max() < 0.025


REFUSED = {
    "half 1": (lambda: half_mask(1), "at least two entries.*num_entries=1;.*AffineTransform"),
    "half 0": (lambda: half_mask(0), "num_entries=0"),
    "half negative": (lambda: half_mask(-3), "num_entries=-3"),
    "alternating 1": (lambda: alternating_mask(1), "at least two entries.*num_entries=1;.*Spline"),
    "random 1": (lambda: random_mask(1, seed=0), "at least two entries.*num_entries=1;"),
    "random none kept": (lambda: random_mask(4, num_kept=0), "num_kept=0 of 4.*choose num_kept from 1 to 3"),
    "random all kept": (lambda: random_mask(4, num_kept=4), "num_kept=4 of 4 entries"),
    "checkerboard 1x1": (lambda: checkerboard_mask(1, 1), "height=1, width=1;.*channel_mask"),
    "checkerboard 0x4": (lambda: checkerboard_mask(0, 4), "height=0, width=4"),
    "checkerboard negative": (lambda: checkerboard_mask(-2, -2), "height=-2, width=-2"),
    "channel 1": (lambda: channel_mask(1), "num_channels=1;.*checkerboard_mask"),
}


@pytest.mark.parametrize("make, message", REFUSED.values(), ids=REFUSED)
def test_refuses_what_would_keep_all_or_none(make, message):
    with pytest.raises(ValueError, match=message):
        make()
