"""``python -m pyro_affine doctor``: versions, devices, and a test of the installation in a few seconds."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
import time
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch

import pyro_affine
from pyro_affine import AutoRealNVP, NormalizingFlow, fit_guide, real_nvp

_PACKAGES = ("torch", "pyro-ppl", "numpy", "arviz", "tqdm", "matplotlib", "pandas", "pyarrow")


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m pyro_affine", description=__doc__)
    parser.add_argument("command", choices=["doctor"], help="print versions and devices, test the installation")
    parser.parse_args(arguments)
    print(f"pyro_affine {pyro_affine.__version__}, Python {platform.python_version()}, {platform.machine()}")
    for name in _PACKAGES:
        print(f"  {name:12} {_version(name)}")
    print(f"  threads      {torch.get_num_threads()}")
    for device in _devices():
        print(f"  device       {device}")
    checks = {"a flow inverts itself": _inverts, "its log-determinant is exact": _is_exact, "a guide fits": _fits}
    results = {name: _passes(name, check) for name, check in checks.items()}
    return 0 if all(results.values()) else 1


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    gpus = [f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in range(torch.cuda.device_count())]
    return ["cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])]


def _passes(name: str, check: Callable[[], bool]) -> bool:
    start = time.perf_counter()
    try:
        good, words = check(), ""
    except Exception as error:  # whatever is wrong with an installation
        good, words = False, f": {type(error).__name__}: {error}"
    print(f"  {'passed' if good else 'FAILED'}       {name} ({time.perf_counter() - start:.1f} s){words}")
    return good


def _flow() -> NormalizingFlow:
    flow = NormalizingFlow(real_nvp(3, num_layers=4, hidden_dims=(8,)), 3).double()
    for parameter in flow.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return flow


def _inverts() -> bool:
    chain, x = _flow().chain, torch.randn(5, 3, dtype=torch.float64)
    return bool(torch.allclose(chain.inv(chain(x)), x, atol=1e-8))


def _is_exact() -> bool:
    chain, x = _flow().chain, torch.randn(3, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(chain, x)
    return bool(torch.allclose(chain.log_abs_det_jacobian(x, chain(x)), torch.linalg.slogdet(jacobian)[1]))


def _fits() -> bool:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(3.0))

    fit = fit_guide(model, AutoRealNVP(model, num_layers=2), num_steps=100, seed=0, progress=False)
    evidence = dist.Normal(0.0, 3.0**0.5).log_prob(torch.tensor(3.0))
    return abs(fit.best - float(evidence)) < 0.05


if __name__ == "__main__":
    sys.exit(main())
