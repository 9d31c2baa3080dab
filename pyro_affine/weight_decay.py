"""Which parameters decay at each step, and by how much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

# A weight is about an average of its last updates: over so many epochs, at the first and the second plateau.
_EPOCHS_REMEMBERED = (30.0, 3.0)
_FEWEST_STEPS = 10.0  # that are remembered where epochs are a few steps long


def decay_groups(flow: nn.Module, parameters: Mapping[str, Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Groups of parameters for an optimiser: first those that decay, if any, then the others.

    The weights of linear and convolutional layers decay. Zero is no better guess than another for a bias, for the
    units, curves and base of a density, or for what the flow's method ``undecayed``, if it has one, gives.

    Args:
        flow: the Module whose layers are looked through.
        parameters: what is trained, by name.
        weight_decay: of the first group.

    Raises:
        ValueError: if ``weight_decay`` is negative, or positive for a flow without such layers.
    """
    layers = (module for module in flow.modules() if isinstance(module, nn.Linear | _ConvNd))
    weights = {id(layer._parameters.get("weight")) for layer in layers}
    weights -= {id(weight) for weight in getattr(flow, "undecayed", list)()}
    decayed = [p for p in parameters.values() if id(p) in weights]
    others = [p for p in parameters.values() if id(p) not in weights]
    if weight_decay < 0 or (weight_decay and not decayed):
        raise ValueError(
            "weight_decay must be 0 or more, and is for weights of linear and convolutional layers, got "
            f"{weight_decay} for a flow with {len(decayed)} of them; set it to 0"
        )
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def rising_decays(optimizer: torch.optim.Optimizer, learning_rate: float, steps_per_epoch: int | None) -> list[float]:
    """The weight decays for when held-out scores stop rising, lowest first; none where they would mean nothing.

    With decay w and rate r a weight forgets its updates within 1 / (r w) steps: with r w small, these are its average.
    Short tables have short epochs, and so a stronger decay.

    Source: How to set AdamW's weight decay as you scale model and dataset size (Wang and Aitchison, 2024).

    >>> layer = nn.Linear(2, 1)
    >>> rising_decays(torch.optim.AdamW(layer.parameters()), 0.01, 10)
    [0.333, 3.33]
    """
    if type(optimizer) is not torch.optim.AdamW or not steps_per_epoch:
        return []
    steps = [max(steps_per_epoch * epochs, _FEWEST_STEPS) for epochs in _EPOCHS_REMEMBERED]
    return [float(f"{1 / (learning_rate * number):.3g}") for number in steps]


def raise_decay(optimizer: torch.optim.Optimizer, decays: Sequence[float]) -> bool:
    """Give the first group of parameters the next higher decay; False if there is none."""
    group = optimizer.param_groups[0]
    higher = [decay for decay in decays if decay > group["weight_decay"]]
    if higher:
        group["weight_decay"] = higher[0]
    return bool(higher)
