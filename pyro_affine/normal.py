"""The log-density of independent normals, for passes in which each operator counts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_HALF_LOG_TAU = math.log(2 * math.pi) / 2


def normal_log_prob(x: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """log N(x; loc, diag(scale^2)) in nats, in half the operators of ``torch.distributions.Normal``.

    log p = sum -((x - loc) / scale)^2 / 2 - log scale - log(2 pi) / 2

    Args:
        x: events. Shape: batch + event_shape.
        loc, scale: of each entry. Shape: event_shape.

    Returns:
        Shape: batch.

    >>> normal_log_prob(torch.zeros(5, 2), torch.zeros(2), torch.ones(2))[0]
    tensor(-1.8379)
    """
    units = (x - loc) / scale
    at_zero = torch.rsub(scale.log(), -_HALF_LOG_TAU)
    return sum_event(torch.addcmul(at_zero, units, units, value=-0.5), loc.dim())


def sum_event(values: Tensor, event_dim: int) -> Tensor:
    """Sum over the last dimensions; of an empty batch too, which the reshape of torch's own cannot do.

    >>> sum_event(torch.ones(0, 2, 3), 2).shape
    torch.Size([0])
    """
    return values.sum(tuple(range(-event_dim, 0))) if event_dim else values
