"""The networks of couplings on plain tensors: what they make, and how gradients come back, written by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_affine.bounded_input import BoundedInput
from pyro_affine.conditioners import MLP, ResidualMLP, _Network, _ResidualBlock
from pyro_affine.scales import AtanScale
from pyro_affine.steps import Wanted

# Entry by entry, so that a derivative has the shape of the value.
_ELEMENTWISE = (nn.SiLU, nn.Tanh, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.Softplus, nn.Sigmoid, nn.Mish, nn.SELU)

ONE = torch.tensor(1.0, dtype=torch.float64)  # without dimensions, it goes with rows of any floating dtype

Pull = Callable[[Tensor], Tensor]
"""Gradient of an elementwise function: at its value -> at its argument."""

Bend = Callable[[Tensor], tuple[Tensor, Pull]]
"""An elementwise function: argument -> value, and how a gradient comes back."""

NetworkPull = Callable[..., tuple[Tensor, list[Tensor]]]
"""``(grad, onto, wanted, *, sign=1)``: gradient of the outputs -> that of what the network reads, times ``sign`` and
added to ``onto``, and those of the tensors."""


class Link(NamedTuple):
    """A linear map, and the elementwise function in front of it if any.

    Attributes:
        bend: the elementwise function, from ``bend_of``.
        parameters: weight and bias of the linear map.
        opens: what arrives here is also added to what a later link makes, one that ``closes``: a residual block.
        closes: see there.
    """

    bend: Bend | None
    parameters: dict[str, Any]
    opens: bool = False
    closes: bool = False


def links_of(conditioner: nn.Module) -> list[Link] | None:
    """A conditioner as a chain of links; None for one that is no ``MLP`` or ``ResidualMLP`` as it was built.

    >>> [link.closes for link in links_of(ResidualMLP(2, 3, num_blocks=1)) or ()]
    [False, False, True, False]
    """
    parts: dict[str, Any] = conditioner._modules  # past the slow Module.__getattr__
    if type(conditioner) is BoundedInput:
        inner = links_of(parts["conditioner"])
        return [inner[0]._replace(bend=bend_of(conditioner)), *inner[1:]] if inner and inner[0].bend is None else None
    if type(conditioner) not in (MLP, ResidualMLP) or conditioner.shift_only or conditioner.context_dim:
        return None
    network = parts["network"]
    if parts.get("raw_network") or type(network) is not _Network:
        return None
    links = _chained([network._modules.get("from_kept"), *_parts_of(network._modules.get("layers"))])
    return links if links and all(link.bend is not None for link in links[1:]) else None


def _chained(modules: Iterable[Any]) -> list[Link] | None:
    links: list[Link] = []
    bend: Bend | None = None
    for module in modules:
        if type(module) is nn.Linear and module._parameters["bias"] is not None:
            links.append(Link(bend, module._parameters))
            bend = None
        elif type(module) in _ELEMENTWISE and bend is None and not getattr(module, "inplace", False):
            bend = bend_of(module)
        elif type(module) is _ResidualBlock and bend is None:
            pair = _chained(_parts_of(module._modules.get("layers")))
            if pair is None or len(pair) != 2:
                return None
            links += [pair[0]._replace(opens=True), pair[1]._replace(closes=True)]
        else:
            return None
    return links if bend is None else None


def _parts_of(layers: Any) -> list[Any]:
    return [*layers._modules.values()] if type(layers) is nn.Sequential else [layers]


def run_network(links: list[Link], tensors: list[Tensor], kept: Tensor, *, record: bool) -> tuple[Tensor, NetworkPull]:
    """Shift and raw side by side, and how their gradient comes back.

    Args:
        links: of the network.
        tensors: weight and bias of each link in turn.
        kept: shape (B, num_kept).
        record: without, the gradient can not come back, and each value is freed as soon as the next is there, which
            spares a large batch a sixth of its time.
    """
    passed: list[tuple[bool, bool, Tensor, Tensor, Pull | None]] = []
    hidden = skipped = kept
    for (bend, _, opens, closes), weight, bias in zip(links, tensors[::2], tensors[1::2], strict=True):
        skipped = hidden if opens else skipped
        hidden, pull = (hidden, None) if bend is None else bend(hidden)
        if record:
            passed.append((opens, closes, weight, hidden, pull))
        del pull
        hidden = F.linear(hidden, weight, bias)
        hidden = hidden + skipped if closes else hidden

    def pull_network(grad: Tensor, onto: Tensor, wanted: Wanted, *, sign: int = 1) -> tuple[Tensor, list[Tensor]]:
        own: list[Tensor] = []
        skipped = grad
        for opens, closes, weight, arrived, pull in reversed(passed):
            skipped = grad if closes else skipped
            if wanted.tensors:
                own += (grad.sum(0), torch.mm(grad.t(), arrived))
            if pull is None:  # the first link of all
                break
            grad = pull(torch.mm(grad, weight))
            grad = grad + skipped if opens else grad
        own.reverse()
        if wanted.input:
            onto = torch.add(onto, grad, alpha=sign) if pull else torch.addmm(onto, grad, weight, alpha=sign)
        return onto, own

    return hidden, pull_network


def bend_of(function: Any) -> Bend:
    """An elementwise Module as a function that also tells how a gradient comes back."""
    if type(function) is nn.SiLU:
        return _silu
    return partial(_BY_HAND.get(type(function), _by_autograd), function)


def _silu(at: Tensor) -> tuple[Tensor, Pull]:
    return F.silu(at), lambda grad: _silu_backward(grad, at)


def _bounded(function: BoundedInput, at: Tensor) -> tuple[Tensor, Pull]:
    """What ``BoundedInput`` hands to its conditioner."""
    bound = _number(function.bound, at.dtype, at.device)
    ratio = (at / bound).tanh_()
    return ratio * bound, lambda grad: _tanh_backward(grad, ratio)


_silu_backward, _tanh_backward = torch.ops.aten.silu_backward.default, torch.ops.aten.tanh_backward.default


def _arc(function: AtanScale, raw: Tensor) -> tuple[Tensor, Pull]:
    """``AtanScale.forward`` in the fewest operations, all but the first on rows without gaps."""
    right, ratio = 2 * function.upper / math.pi, function.upper / function.lower
    unit = _number(right, raw.dtype, raw.device)
    bent = F.leaky_relu(raw, ratio)

    def pull(grad: Tensor) -> Tensor:
        return grad / torch.addcmul(ONE, bent, bent, value=right**-2)

    return F.leaky_relu(torch.atan2(bent, unit).mul_(unit), 1 / ratio), pull


def _by_autograd(function: nn.Module, at: Tensor) -> tuple[Tensor, Pull]:
    def pull(grad: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = at.detach().requires_grad_()
            value = function(leaf)
        return torch.autograd.grad(value, leaf, grad)[0] if value.requires_grad else torch.zeros_like(at)

    return function(at), pull


_BY_HAND: dict[type, Callable[[Any, Tensor], tuple[Tensor, Pull]]] = {AtanScale: _arc, BoundedInput: _bounded}


@lru_cache
def _number(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Without dimensions and of the same dtype, which costs half of what a Python number does."""
    with torch.inference_mode(False):  # it is kept, and what inference mode makes has no place in a later graph
        return torch.tensor(value, dtype=dtype, device=device)
