"""Methods of the guide benchmark: how each makes a guide of a model, and the one loop that trains all peers."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyro
import torch
from pyro.distributions import transforms
from pyro.infer import Trace_ELBO, autoguide
from targets import Target
from torch import nn

from pyro_affine import AutoRealNVP, fit_guide
from pyro_affine.linear import LowerTriangularAffine
from pyro_affine.low_rank import LowRankAffine
from pyro_affine.particles import first_success
from pyro_affine.tails import LOFT

NUM_PARTICLES = 64
RATE = 5e-3
TUNED_RATES = (1e-3, 3e-3, 1e-2)
_MOST_BAD_STEPS = 200  # in a row: the guide has diverged
_BAD_DRAW = (ValueError, ArithmeticError, torch.linalg.LinAlgError)

Args = tuple[Any, ...]


@dataclass
class Fitted:
    """A trained guide and what its training took."""

    guide: Any
    steps: int
    notes: dict[str, Any] = field(default_factory=dict)


class DivergedError(ValueError):
    """Training came to nothing."""


@dataclass(frozen=True)
class Peer:
    """An autoguide of Pyro, trained by ``train``.

    Args:
        make: from the model to the guide.
        num_particles: draws a step.
        finish: from the trained guide and the arguments to the guide that is scored.
    """

    make: Callable[[Any], Any]
    num_particles: int = NUM_PARTICLES
    finish: Callable[[Any, Args], Any] = lambda guide, args: guide

    def fit(self, target: Target, args: Args, *, seconds: float, rate: float = RATE) -> Fitted:
        """Train for so many seconds."""
        guide = self.make(target.model)
        steps, bad = train(target, guide, args, seconds=seconds, rate=rate, num_particles=self.num_particles)
        return Fitted(self.finish(guide, args), steps, {"bad_steps": bad, "rate": rate})


def train(
    target: Target, guide: Any, args: Args, *, seconds: float, rate: float, num_particles: int
) -> tuple[int, int]:
    """The loop of all peers: Adam on ``Trace_ELBO`` of vectorised draws, rate by one cycle over the wall clock.

    A step whose loss or gradient is not finite, or whose draw the model refuses, is left out and counted.

    Returns:
        Number of steps, and how many of them were left out.
    """
    start = time.perf_counter()
    first_success(lambda: guide(*args))  # its parameters exist from here on
    parameters = list(guide.parameters())
    optimizer = torch.optim.Adam(parameters, lr=rate)
    elbo = Trace_ELBO(num_particles, vectorize_particles=True, max_plate_nesting=target.nesting)
    steps = bad = in_a_row = 0
    while (progress := (time.perf_counter() - start) / seconds) < 1:
        optimizer.param_groups[0]["lr"] = one_cycle(progress, rate)
        taken = _step(partial(elbo.differentiable_loss, target.model, guide, *args), optimizer, parameters)
        in_a_row = 0 if taken else in_a_row + 1
        steps, bad = steps + 1, bad + (not taken)
        if in_a_row == _MOST_BAD_STEPS:
            raise DivergedError(f"diverged: {bad} of {steps} steps not finite or refused, the last {in_a_row} in a row")
    return steps, bad


def one_cycle(progress: float, peak: float) -> float:
    """Learning rate at a share of the budget: peak / 25 to peak over 30 %, then down to peak / 250,000, by cosines.

    >>> [round(one_cycle(at, 1.0), 3) for at in (0.0, 0.3, 0.65, 1.0)]
    [0.04, 1.0, 0.5, 0.0]
    """
    if progress < 0.3:
        low, share = peak / 25, 1 - progress / 0.3
    else:
        low, share = peak / 250_000, (progress - 0.3) / 0.7
    return low + (peak - low) * (1 + math.cos(math.pi * share)) / 2


def _step(loss_of: Callable[[], Any], optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> bool:
    optimizer.zero_grad()
    try:
        loss = loss_of()
        loss.backward()
    except _BAD_DRAW:
        return False
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not (torch.isfinite(loss) and all(torch.isfinite(gradient).all() for gradient in gradients)):
        return False
    optimizer.step()
    return True


def _flipped(make: Callable[[int], nn.Module], num_entries: int, repeats: int = 8) -> nn.Module:
    """Couplings with the entries reversed after each, the repair that users make by hand."""
    parts = []
    for _ in range(repeats):
        parts += [make(num_entries), transforms.Permute(torch.arange(num_entries).flip(0))]
    return transforms.ComposeTransformModule(parts)


def _iterated_coupling(num_entries: int) -> nn.Module:
    return transforms.iterated(8, transforms.affine_coupling, num_entries)


def _wide_autoregressive(num_entries: int) -> nn.Module:
    width = max(64, num_entries)  # Pyro asks for as many hidden units as entries
    return transforms.iterated(2, transforms.affine_autoregressive, num_entries, hidden_dims=[width, width])


def _flow(make: Callable[[int], nn.Module]) -> Peer:
    return Peer(partial(autoguide.AutoNormalizingFlow, init_transform_fn=make))


PEERS = {
    "AutoNormal": Peer(autoguide.AutoNormal),
    "AutoMultivariateNormal": Peer(autoguide.AutoMultivariateNormal),
    "AutoLowRankMultivariateNormal": Peer(autoguide.AutoLowRankMultivariateNormal),
    # Its guide is one point, so more draws a step are the same draw again.
    "AutoLaplaceApproximation": Peer(
        autoguide.AutoLaplaceApproximation, 1, lambda guide, args: guide.laplace_approximation(*args)
    ),
    "AutoIAFNormal": Peer(autoguide.AutoIAFNormal),
    "AutoIAFNormal-2x64": _flow(_wide_autoregressive),
    "coupling-documented": _flow(_iterated_coupling),
    "coupling-flipped": _flow(partial(_flipped, transforms.affine_coupling)),
    "spline-flipped": _flow(partial(_flipped, transforms.spline_coupling)),
}


@dataclass(frozen=True)
class Ours:
    """``AutoRealNVP`` fitted by ``fit_guide``, at its defaults but for what an ablation takes away.

    Args:
        options: of ``AutoRealNVP``.
        edit: what is done to the guide before the fit; raises where the guide has no such part.
        fit_options: of ``fit_guide``, and of the guide where that one has them.
    """

    options: dict[str, Any] = field(default_factory=dict)
    edit: tuple[Callable[[Any], None], ...] = ()

    def fit(self, target: Target, args: Args, *, seconds: float) -> Fitted:
        """Fit for so many seconds, the start included."""
        known = inspect.signature(AutoRealNVP).parameters
        missing = sorted(self.options.keys() - known.keys())
        if missing:
            raise ValueError(f"AutoRealNVP has no option {', '.join(missing)}")
        start = time.perf_counter()
        guide = AutoRealNVP(target.model, **self.options)
        if self.edit:
            first_success(lambda: guide(*args))  # its layers exist from here on
            for edit in self.edit:
                edit(guide)
        left = seconds - (time.perf_counter() - start)
        fit = fit_guide(target.model, guide, args, seconds=left, progress=False)
        notes = {"bad_steps": fit.num_nonfinite, "stopped": fit.reason, "rescues": fit.num_rescues}
        return Fitted(guide, fit.num_steps, notes)


def _start_cold(guide: Any) -> None:
    """Keep the guide where its initial values put it."""
    if not hasattr(guide, "warm_start"):
        raise ValueError("AutoRealNVP has no warm_start that could be left out")
    object.__setattr__(guide, "warm_start", lambda *args, **kwargs: None)


def _freeze_dense(guide: Any) -> None:
    """Keep the trained affine layer, dense or low-rank, at the identity."""
    for layer in _layers(guide, LowerTriangularAffine, LowRankAffine):
        layer.requires_grad_(False)


def _remove_tail_layer(guide: Any) -> None:
    """Let LOFT be the identity everywhere."""
    for layer in _layers(guide, LOFT):
        layer.threshold = math.inf


def _layers(guide: Any, *kinds: type) -> list[Any]:
    found = [module for module in guide.modules() if isinstance(module, kinds)]
    if not found:
        raise ValueError(f"AutoRealNVP has no layer of {' or '.join(kind.__name__ for kind in kinds)}")
    return found


OURS = {"AutoRealNVP": Ours()}
ABLATIONS = {
    "ours-total-gradient": Ours({"gradient": "total"}),
    "ours-cold-start": Ours(edit=(_start_cold,)),
    "ours-frozen-dense": Ours(edit=(_freeze_dense,)),
    "ours-bare": Ours(edit=(_start_cold, _freeze_dense)),
    "ours-no-loft": Ours(edit=(_remove_tail_layer,)),
    "ours-student": Ours({"base": "student"}),
}
SAMPLERS = ("NUTS", "NeuTra-NUTS")
GROUPS: dict[str, tuple[str, ...]] = {
    "ours": tuple(OURS),
    "peers": tuple(PEERS),
    "ablations": tuple(ABLATIONS),
    "samplers": SAMPLERS,
}
ALL_METHODS = tuple(name for group in GROUPS.values() for name in group)


def fit(method: str, target: Target, args: Args, *, seconds: float, rate: float | None = None) -> Fitted:
    """Fit the guide of a method; the parameter store is empty before and after, as guides share names in it."""
    pyro.clear_param_store()
    if method in PEERS:
        fitted = PEERS[method].fit(target, args, seconds=seconds, rate=RATE if rate is None else rate)
    else:
        fitted = (OURS | ABLATIONS)[method].fit(target, args, seconds=seconds)
    pyro.clear_param_store()
    return fitted
