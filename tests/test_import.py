"""Importing the package changes nothing in the process beyond what importing Pyro changes."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyro_affine

PACKAGE = Path(pyro_affine.__file__).resolve().parent


def _snapshot() -> dict[str, str]:
    """State that an import could change. Its source runs in a fresh process, so it imports all it needs."""
    import hashlib
    import os
    import pickle
    import random
    import signal
    import sys
    import warnings

    import numpy
    import pyro
    import pyro.distributions.transforms
    import pyro.infer.autoguide
    import torch

    def patchable() -> Iterator[tuple[str, str, int]]:
        transforms = (torch.distributions.transforms, pyro.distributions.transforms)
        for module in (torch.nn, torch.distributions, *transforms):
            for name, value in vars(module).items():
                if isinstance(value, type):
                    yield module.__name__, name, id(value)
                    kept = {key: id(v) for key, v in vars(value).items() if not key.startswith("__annot")}
                    yield from ((f"{module.__name__}.{name}", key, v) for key, v in kept.items())

    def digest(value: object) -> str:
        return hashlib.sha256(pickle.dumps(value)).hexdigest()

    return {
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "gradients": str(torch.is_grad_enabled()),
        "threads": str((torch.get_num_threads(), torch.get_num_interop_threads())),
        "determinism": str(torch.are_deterministic_algorithms_enabled()),
        "precision": torch.get_float32_matmul_precision(),
        "torch random state": digest(torch.get_rng_state().numpy()),
        "NumPy random state": digest(numpy.random.get_state()),
        "Python random state": digest(random.getstate()),
        "torch validation": str(torch.distributions.Distribution._validate_args),
        "Pyro settings": str(pyro.settings.get()),
        "Pyro parameters": str(list(pyro.get_param_store().keys())),
        "warning filters": str(warnings.filters),
        "torch and Pyro classes": digest(sorted(patchable())),
        "environment": digest(sorted(os.environ.items())),
        "signal handlers": str([signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]),
        "slow packages": str([name for name in ("arviz", "matplotlib", "pandas") if name in sys.modules]),
    }


def changed_by_import(package: Path) -> list[str]:
    """Parts of the state that ``import pyro_affine`` changes in a process that has imported Pyro."""
    run = "before = _snapshot(); import pyro_affine; after = _snapshot()"
    show = "import json; print(json.dumps([key for key in before if before[key] != after[key]]))"
    code = f"from __future__ import annotations\n{inspect.getsource(_snapshot)}\n{run}\n{show}\n"
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=package.parent, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return list(json.loads(done.stdout.splitlines()[-1]))


def test_import_changes_no_global_state() -> None:
    assert changed_by_import(PACKAGE) == []


RUDE_PACKAGE = """
import os, random, signal, warnings
import arviz, numpy, pyro, torch
torch.set_default_dtype(torch.float64)
torch.set_default_device("meta")
torch.set_grad_enabled(False)
torch.set_num_threads(torch.get_num_threads() + 1)
torch.use_deterministic_algorithms(True)
torch.set_float32_matmul_precision("medium")
torch.default_generator.manual_seed(7)
numpy.random.seed(0)
random.seed(0)
torch.distributions.Distribution.set_default_validate_args(False)
pyro.settings.set(cholesky_relative_jitter=7.0)
pyro.param("left_behind", lambda: torch.zeros(1))
warnings.simplefilter("ignore")
torch.distributions.Transform.sign = 1
os.environ["LEFT_BEHIND"] = "1"
signal.signal(signal.SIGTERM, lambda *_: None)
"""


def test_each_change_of_global_state_is_seen(tmp_path: Path) -> None:
    package = tmp_path / "pyro_affine"
    package.mkdir()
    (package / "__init__.py").write_text(RUDE_PACKAGE)
    parts = re.findall(r'^        "(.*?)":', inspect.getsource(_snapshot), re.MULTILINE)
    assert changed_by_import(package) == parts
