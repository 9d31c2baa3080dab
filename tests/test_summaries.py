"""Summary networks: blind to the order of the rows and to masked ones, not to the number of rows."""

from __future__ import annotations

import pytest
import torch

from pyro_affine import DeepSets, SetTransformer, load, save

NETWORKS = {
    "DeepSets": lambda: DeepSets(3, 5, hidden_dim=16),
    "DeepSets of one layer": lambda: DeepSets(3, 5, hidden_dim=8, num_layers=1),
    "SetTransformer": lambda: SetTransformer(3, 5, hidden_dim=16, num_heads=2),
}
networks = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)


@networks
@pytest.mark.parametrize("batch", [(), (7,), (2, 4)], ids=str)
def test_summary_has_a_vector_for_each_set_and_does_not_see_the_order(make, batch):
    network, rows = make(), torch.randn(*batch, 6, 3)
    assert network(rows).shape == (*batch, 5)
    assert torch.allclose(network(rows[..., torch.randperm(6), :]), network(rows))


@networks
@pytest.mark.parametrize("filler", [0.0, 100.0, torch.nan], ids=str)
def test_masked_rows_count_as_if_they_were_not_there(make, filler):
    network, rows = make(), torch.randn(2, 6, 3)
    mask = torch.tensor([[True] * 4 + [False] * 2, [False, True, False, False, True, False]])
    together = network(torch.where(mask[..., None], rows, filler), mask)
    for index in range(2):
        assert torch.allclose(together[index], network(rows[index][mask[index]]))


@networks
def test_number_of_rows_is_seen(make):
    network, row = make(), torch.randn(1, 3)
    assert not torch.allclose(network(row.expand(2, 3)), network(row.expand(9, 3)), atol=1e-3)


@networks
def test_rows_are_told_apart(make):
    network, rows = make(), torch.randn(6, 3)
    assert not torch.allclose(network(rows), network(rows.flip(0) + 0.1 * torch.randn(6, 3)), atol=1e-4)


@networks
def test_empty_sets_and_gradients_are_finite(make):
    network, rows = make(), torch.full((2, 4, 3), torch.nan)
    rows[1] = 1.0
    mask = torch.tensor([[False] * 4, [True] * 4])
    summary = network(rows, mask)
    summary.sum().backward()
    assert summary.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


@networks
def test_saved_summary_is_the_same(make, tmp_path):
    network, rows = make(), torch.randn(6, 3)
    save(tmp_path / "summary.pt", network)
    assert torch.equal(load(tmp_path / "summary.pt")(rows), network(rows))


BAD = {
    "no rows": (lambda: DeepSets(0, 5), "row_dim=1"),
    "heads": (lambda: SetTransformer(3, 5, hidden_dim=10, num_heads=4), "divide hidden_dim"),
    "row size": (lambda: DeepSets(3)(torch.zeros(4, 2)), r"batch \+ \(n, 3\)"),
    "a vector": (lambda: DeepSets(1)(torch.zeros(4)), r"\(n, 1\) for n numbers"),
    "0/1 mask": (lambda: DeepSets(3)(torch.zeros(4, 3), torch.ones(4)), "boolean"),
    "mask of another shape": (lambda: SetTransformer(3)(torch.zeros(4, 3), torch.ones(3) > 0), r"\(4,\)"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_with_words(call, message):
    with pytest.raises(ValueError, match=message):
        call()
