"""Ours with one thing changed: ablations for the density benchmark, as options of the three calls that users make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from pyro_affine import ActNorm, AtanScale, ComposeFlow, InvertibleLinear, NormalizingFlow, TanhScale, real_nvp
from pyro_affine.coupling import AffineCoupling
from pyro_affine.linear import Permutation

Options = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """Options of ``real_nvp``, ``NormalizingFlow`` and ``fit_density`` that differ from the defaults.

    Args:
        flow, density, fit: the options of each call.
        change: what is done to the built flow, if anything.
    """

    flow: Options = field(default_factory=dict)
    density: Options = field(default_factory=dict)
    fit: Options = field(default_factory=dict)
    change: Callable[[ComposeFlow, int], ComposeFlow] | None = None

    def build(self, size: int) -> NormalizingFlow:
        """The flow for vectors of a size."""
        flow = real_nvp(size, **self.flow)
        return NormalizingFlow(flow if self.change is None else self.change(flow, size), size, **self.density)


def _with_actnorm(flow: ComposeFlow, size: int) -> ComposeFlow:
    parts: list[Any] = []
    for part in flow.parts:
        parts += [part, ActNorm((size,))] if isinstance(part, AffineCoupling) else [part]
    return ComposeFlow(parts)


def _with_linear_maps(flow: ComposeFlow, size: int) -> ComposeFlow:
    parts = [InvertibleLinear(size) if isinstance(part, Permutation) else part for part in flow.parts]
    return ComposeFlow(parts)


VARIANTS: dict[str, Variant] = {
    "ours": Variant(),
    "ours, no curves": Variant(density={"curves": 0}),
    "ours, no whitening": Variant(density={"whiten": False}),
    "ours, normal base": Variant(density={"tails": "normal"}),
    "ours, log tails": Variant(density={"tails": "log"}),
    "ours, ActNorm": Variant(change=_with_actnorm),
    "ours, linear maps": Variant(change=_with_linear_maps),
    "ours, MLP 96 96": Variant(flow={"hidden_dims": (96, 96)}),
    "ours, MLP 128 128": Variant(flow={"hidden_dims": (128, 128)}),
    "ours, ReLU": Variant(flow={"activation": nn.ReLU}),
    "ours, GELU": Variant(flow={"activation": nn.GELU}),
    "ours, AtanScale 4 4": Variant(flow={"scale": AtanScale(4.0, 4.0)}),
    "ours, TanhScale 2": Variant(flow={"scale": TanhScale(2.0)}),
    "ours, 4 layers": Variant(flow={"num_layers": 4}),
    "ours, 6 layers": Variant(flow={"num_layers": 6}),
    "ours, 12 layers": Variant(flow={"num_layers": 12}),
    "ours, width 64": Variant(flow={"hidden_dim": 64}),
    "ours, width 128": Variant(flow={"hidden_dim": 128}),
    "ours, 2 blocks": Variant(flow={"num_blocks": 2}),
    "ours, dropout 0.05": Variant(flow={"dropout": 0.05}),
    "ours, dropout 0.1": Variant(flow={"dropout": 0.1}),
    "ours, dropout 0.2": Variant(flow={"dropout": 0.2}),
    "ours, no weight decay": Variant(fit={"weight_decay": 0.0}),
    "ours, weight decay 0.3": Variant(fit={"weight_decay": 0.3}),
    "ours, weight decay 1": Variant(fit={"weight_decay": 1.0}),
    "ours, weight decay 12": Variant(fit={"weight_decay": 12.0}),
    "ours, no average": Variant(fit={"average": False}),
    "ours, learning rate 1e-3": Variant(fit={"learning_rate": 1e-3}),
    "ours, learning rate 2e-3": Variant(fit={"learning_rate": 2e-3}),
    "ours, learning rate 1e-2": Variant(fit={"learning_rate": 1e-2}),
    "ours, batch 256": Variant(fit={"batch_size": 256}),
    "ours, batch 1024": Variant(fit={"batch_size": 1024}),
}
