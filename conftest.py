"""The same start for every test and docstring: seed 0, an empty parameter store, default dtype, validation on."""

from __future__ import annotations

import pyro
import pytest
import torch

torch.set_num_threads(1)  # small tensors gain nothing from threads, and sums keep their order


@pytest.fixture(autouse=True)
def _same_start():
    dtype = torch.get_default_dtype()
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    pyro.enable_validation(True)  # torch's compiler, which optimisers load too, switches it off
    yield
    torch.set_default_dtype(dtype)
