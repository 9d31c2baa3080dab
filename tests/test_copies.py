"""A copy, a pickle, a twin without cache and a reloaded state are the same density, to the last bit."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import torch
from cases import CASES, density, each, randomised, x_points, y_points


@each(CASES)
def test_deepcopy_and_pickle_after_use_with_gradients(make):
    t = randomised(make())
    x, y = x_points(t, (4,)), y_points(t, (4,))
    expected = density(t).log_prob(y)
    if any(True for _ in t.parameters()):
        expected.sum().backward()
    draw = t(x)  # held here, so that the cache is full
    for twin, inverse in (copy.deepcopy((t, t.inv)), pickle.loads(pickle.dumps((t, t.inv)))):
        assert torch.equal(density(twin).log_prob(y), expected)
        assert torch.equal(inverse(y), t.inv(y)) and torch.equal(twin(x), draw)
        assert inverse.inv is twin and twin.inv.inv is twin and inverse.inv.inv is inverse
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.add_(1.0)
        assert torch.equal(density(t).log_prob(y), expected)


@each(CASES)
def test_with_cache(make):
    t = randomised(make())
    off = t.with_cache(0)
    x = x_points(t, (4,))
    assert t.with_cache(1) is t and off.with_cache(0) is off
    assert torch.equal(off(x), t(x)) and torch.equal(off.with_cache(1)(x), t(x))
    assert all(a is b for a, b in zip(off.parameters(), t.parameters(), strict=True))
    assert off.inv.inv is off and off.inv._cache_size == 0


def fresh_and_scored(seed):
    """State, points and scores of every case: drawn and randomised by this seed."""
    torch.manual_seed(seed)
    flows = {name: randomised(make(), seed) for name, make in CASES.items()}
    return flows, {name: density(t).log_prob(y_points(t, (4,))).detach() for name, t in flows.items()}


def test_state_dict_into_a_fresh_process(tmp_path):
    flows, scores = fresh_and_scored(seed=0)
    torch.save(({name: t.state_dict() for name, t in flows.items()}, scores), tmp_path / "saved.pt")
    program = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parent.parent)]}
import torch
torch.set_num_threads(1)
from test_copies import CASES, density, fresh_and_scored, y_points
states, scores = torch.load({str(tmp_path / "saved.pt")!r}, weights_only=True)
flows, others = fresh_and_scored(seed=1)
for name, t in flows.items():
    t.load_state_dict(states[name])
    same = torch.equal(density(t).log_prob(y_points(t, (4,))), scores[name])
    print(name, "|", same, "|", torch.equal(others[name], scores[name]))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = [line.split(" | ") for line in run.stdout.splitlines()]
    assert [name for name, _, _ in lines] == list(CASES)
    assert [name for name, same, _ in lines if same != "True"] == []
    still = [name for name, _, before in lines if before == "True"]  # what has no state, or one order alone
    assert all("standardization" in name or "permutation" in name for name in still), still
