"""The same start for every test and docstring; global state must be left as it was."""

from __future__ import annotations

import pyro
import pytest
import torch

torch.set_num_threads(1)  # small tensors gain nothing from threads, and sums keep their order


@pytest.fixture(autouse=True)
def _same_start():
    dtype, validate = torch.get_default_dtype(), torch.distributions.Distribution._validate_args
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    torch.set_default_dtype(dtype)
    assert torch.distributions.Distribution._validate_args == validate, "validation was left switched on or off"
