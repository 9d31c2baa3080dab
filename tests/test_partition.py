"""Kept and moved entries are cut apart and put together without a copy too many."""

from __future__ import annotations

import pytest
import torch

from pyro_affine.masks import alternating_mask, channel_mask, checkerboard_mask, half_mask
from pyro_affine.partition import Partition

NONE_KEPT = torch.zeros(3, dtype=torch.bool)
CASES = {
    "first half (5,)": (half_mask(5), (5,)),
    "last half (5,)": (half_mask(5, keep_first=False), (5,)),
    "alternating (5,)": (alternating_mask(5), (5,)),
    "none kept (3,)": (NONE_KEPT, (3,)),
    "rows (3, 4)": (torch.tensor([[True], [False], [True]]), (3, 4)),
    "columns (3, 4)": (torch.tensor([True, False, False, True]), (3, 4)),
    "checkerboard (2, 4, 4)": (checkerboard_mask(4, 4), (2, 4, 4)),
    "channel (2, 4, 4)": (channel_mask(2), (2, 4, 4)),
    "other channel (2, 4, 4)": (channel_mask(2, keep_first=False), (2, 4, 4)),
}
each_case = pytest.mark.parametrize("mask, event_shape", CASES.values(), ids=CASES)


@each_case
@pytest.mark.parametrize("batch_shape", [(), (1,), (4,), (2, 3), (0,)], ids=str)
def test_split_gives_the_entries_in_order_and_merge_undoes_it(mask, event_shape, batch_shape):
    partition = Partition(mask, torch.Size(event_shape))
    x = torch.randn(*batch_shape, *event_shape)
    full = mask.expand(event_shape)
    kept, moved = partition.split(x)
    assert torch.equal(kept, x[..., full]) and torch.equal(moved, x[..., ~full])
    assert torch.equal(partition.merge(kept, moved), x)
    assert (partition.num_kept, partition.num_moved) == (int(full.sum()), int((~full).sum()))


@each_case
def test_merge_widens_the_kept_entries_to_the_batch_of_the_moved(mask, event_shape):
    partition = Partition(mask, torch.Size(event_shape))
    x = torch.randn(event_shape)
    kept, moved = partition.split(x)
    assert torch.equal(partition.merge(kept, moved.expand(7, -1)), x.expand(7, *event_shape))


@pytest.mark.parametrize("name", ["first half (5,)", "last half (5,)", "channel (2, 4, 4)", "none kept (3,)"])
def test_entries_side_by_side_are_views(name):
    mask, event_shape = CASES[name]
    x = torch.randn(6, *event_shape)
    for part in Partition(mask, torch.Size(event_shape)).split(x):
        assert part.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def test_the_mask_is_a_saved_copy():
    mask = alternating_mask(4)
    partition = Partition(mask, torch.Size([4]))
    mask.fill_(True)
    assert partition.mask.tolist() == [True, False, True, False]
    assert list(partition.state_dict()) == ["mask"]
    assert "event_shape=(4,), kept=2, moved=2" in repr(partition)


def test_a_loaded_mask_brings_its_plan():
    saved = Partition(half_mask(4, keep_first=False), torch.Size([4]))
    partition = Partition(alternating_mask(4), torch.Size([4]))
    partition.load_state_dict(saved.state_dict())
    x = torch.arange(4.0)
    assert [part.tolist() for part in partition.split(x)] == [[2, 3], [0, 1]]
    assert torch.equal(partition.merge(*partition.split(x)), x)


ONES = torch.ones(4, dtype=torch.bool)
BAD = {
    "floats": (torch.tensor([0.0, 1.0]), (2,), r"boolean with True = kept, got torch.float32; .* mask.bool\(\)"),
    "integers": (torch.tensor([0, 1]), (2,), r"boolean with True = kept, got torch.int64; .* mask.bool\(\)"),
    "size": (half_mask(4), (5,), r"broadcast to the event, got mask shape \(4,\) and event shape \(5,\); give"),
    "batch": (half_mask(4).expand(3, 4), (4,), r"got mask shape \(3, 4\) and event shape \(4,\); .* without batch"),
    "would widen": (half_mask(4), (1,), r"got mask shape \(4,\) and event shape \(1,\); give"),
    "scalar event": (torch.tensor(False), (), r"got mask shape \(\) and event shape \(\); give"),
    "all kept": (ONES, (4,), r"leave some entry to move, got 4 of 4 kept .*; invert it with ~mask"),
    "all kept, broadcast": (ONES[:1], (3, 4), r"leave some entry to move, got .* kept .*; invert it with ~mask"),
}


@pytest.mark.parametrize("mask, event_shape, words", BAD.values(), ids=BAD)
def test_bad_masks_are_refused_with_rule_and_remedy(mask, event_shape, words):
    with pytest.raises(ValueError, match=words):
        Partition(mask, torch.Size(event_shape))
