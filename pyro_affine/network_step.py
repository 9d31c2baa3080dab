"""The networks of couplings on plain tensors: what they make, and how gradients come back, written by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor, nn

from pyro_affine.bounded_input import BoundedInput
from pyro_affine.conditioners import MLP, ResidualMLP, _Network, _ResidualBlock
from pyro_affine.conv_net import ConvNet, ResidualConvNet
from pyro_affine.convolutions import ImageNetwork, Residual
from pyro_affine.linear_maps import LinearMap, map_of
from pyro_affine.scales import AtanScale
from pyro_affine.steps import Wanted

# Entry by entry, so that a derivative has the shape of the value.
_ELEMENTWISE = (nn.SiLU, nn.Tanh, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.Softplus, nn.Sigmoid, nn.Mish, nn.SELU)

# Without the wrappers in torch.nn.functional, which look for subclasses of Tensor.
silu, leaky_relu, leaky_relu_ = torch._C._nn.silu, torch._C._nn.leaky_relu, torch._C._nn.leaky_relu_

NetworkPull = Callable[..., tuple[Tensor, list[Tensor]]]
"""``(grad, onto, wanted, *, sign=1)``: gradient of the outputs -> that of what the network reads, times ``sign`` and
added to ``onto``, and those of the tensors."""


class Bend(NamedTuple):
    """An elementwise function with its derivative.

    Attributes:
        run: argument -> value, and what ``pull`` needs to know.
        pull: gradient at the value, what is known -> gradient at the argument.
        apply: argument -> value alone, in the place of the argument; None where there is no such function.
    """

    run: Callable[[Tensor], tuple[Tensor, Tensor]]
    pull: Callable[[Tensor, Tensor], Tensor]
    apply: Callable[[Tensor], Tensor] | None = None


class Link(NamedTuple):
    """A linear map, and the elementwise function in front of it if any.

    Attributes:
        bend: the elementwise function, from ``bend_of``.
        map: the linear map.
        parameters: its weight and bias.
        opens: what arrives here is also added to what a later link makes, one that ``closes``: a residual block.
        closes: see there.
    """

    bend: Bend | None
    map: LinearMap
    parameters: dict[str, Any]
    opens: bool = False
    closes: bool = False


def links_of(conditioner: nn.Module) -> list[Link] | None:
    """A conditioner as a chain of links; None for one that is not among those of the package, as it was built.

    Those for images must read whole channels, and see each pixel as a row.

    >>> [link.closes for link in links_of(ResidualMLP(2, 3, num_blocks=1)) or ()]
    [False, False, True, False]
    """
    parts: dict[str, Any] = conditioner._modules  # past the slow Module.__getattr__
    if type(conditioner) is BoundedInput:
        inner = links_of(parts["conditioner"])
        return [inner[0]._replace(bend=bend_of(conditioner)), *inner[1:]] if inner and inner[0].bend is None else None
    if type(conditioner) not in _CONDITIONERS or conditioner.shift_only or conditioner.context_dim:
        return None
    network, size, first = parts["network"], None, "from_kept"
    if parts.get("raw_network") or type(network) not in (_Network, ImageNetwork):
        return None
    if isinstance(conditioner, ConvNet | ResidualConvNet):
        if not conditioner.by_channel:
            return None
        size, first = conditioner.partition.event_shape[1:], "from_image"
    links = _chained([network._modules.get(first), *_parts_of(network._modules.get("layers"))], size)
    return links if links and all(link.bend is not None for link in links[1:]) else None


_CONDITIONERS = (MLP, ResidualMLP, ConvNet, ResidualConvNet)


def _chained(modules: Iterable[Any], size: Size | None) -> list[Link] | None:
    links: list[Link] = []
    bend: Bend | None = None
    for module in modules:
        if (linear := map_of(module, size)) is not None:
            links.append(Link(bend, linear, module._parameters))
            bend = None
        elif type(module) in _ELEMENTWISE and bend is None and not getattr(module, "inplace", False):
            bend = bend_of(module)
        elif type(module) in (_ResidualBlock, Residual) and bend is None:
            pair = _chained(_parts_of(module if type(module) is Residual else module._modules.get("layers")), size)
            if pair is None or len(pair) != 2:
                return None
            links += [pair[0]._replace(opens=True), pair[1]._replace(closes=True)]
        else:
            return None
    return links if bend is None else None


def _parts_of(layers: Any) -> list[Any]:
    return [*layers._modules.values()] if type(layers) in (nn.Sequential, Residual) else [layers]


def run_network(links: list[Link], tensors: list[Tensor], kept: Tensor, *, record: bool) -> tuple[Tensor, NetworkPull]:
    """Shift and raw side by side, and how their gradient comes back.

    Args:
        links: of the network.
        tensors: weight and bias of each link in turn.
        kept: shape (B, num_kept).
        record: without, the gradient cannot come back, and each value is freed as soon as the next is there, which
            spares a large batch a sixth of its time.
    """
    enter, leave = links[0].map.enter, links[0].map.leave
    passed: list[tuple[Link, Tensor, Tensor, Any]] = []
    hidden = skipped = enter(kept)
    given = iter(tensors)
    for link, weight, bias in zip(links, given, given, strict=True):
        skipped = hidden if link.opens else skipped
        hidden, known = _bent(link.bend, hidden, in_place=not (record or hidden is skipped))
        if record:
            passed.append((link, weight, hidden, known))
        del known
        hidden = link.map.run(hidden, weight, bias)
        hidden = hidden + skipped if link.closes else hidden

    def pull_network(grad: Tensor, onto: Tensor, wanted: Wanted, *, sign: int = 1) -> tuple[Tensor, list[Tensor]]:
        own: list[Tensor] = []
        skipped = grad = enter(grad)
        for link, weight, arrived, known in reversed(passed):
            skipped = grad if link.closes else skipped
            if wanted.tensors:
                own += link.map.pull_tensors(grad, arrived, weight)
            if link.bend is None:  # the first link of all
                break
            grad = link.bend.pull(link.map.pull(grad, arrived, weight), known)
            grad = grad + skipped if link.opens else grad
        own.reverse()
        if wanted.input and link.bend is None:
            onto = link.map.pull_onto(onto, grad, arrived, weight, sign)
        elif wanted.input:
            onto = torch.add(onto, leave(grad), alpha=sign)
        return onto, own

    return leave(hidden), pull_network


def _bent(bend: Bend | None, at: Tensor, *, in_place: bool) -> tuple[Tensor, Any]:
    if bend is None:
        return at, None
    return (bend.apply(at), None) if in_place and bend.apply is not None else bend.run(at)


def bend_of(function: Any) -> Bend:
    """An elementwise Module with its derivative.

    >>> bend = bend_of(nn.Tanh())
    >>> value, known = bend.run(torch.zeros(2))
    >>> bend.pull(torch.ones(2), known)
    tensor([1., 1.])
    """
    if type(function) in _WRITTEN:
        return _WRITTEN[type(function)]
    if type(function) is BoundedInput:
        return Bend(partial(_bounded, function), torch.ops.aten.tanh_backward.default)
    if type(function) is AtanScale:
        return Bend(partial(_arc, function), partial(_pull_arc, function))
    return Bend(lambda at: (function(at), at), partial(_pull_by_autograd, function))


def _relu(at: Tensor) -> tuple[Tensor, Tensor]:
    value = torch.relu(at)
    return value, value


_WRITTEN = {
    nn.SiLU: Bend(lambda at: (silu(at), at), torch.ops.aten.silu_backward.default, torch._C._nn.silu_),
    nn.ReLU: Bend(_relu, lambda grad, value: torch.ops.aten.threshold_backward.default(grad, value, 0), torch.relu_),
}


def _bounded(function: BoundedInput, at: Tensor) -> tuple[Tensor, Tensor]:
    """What ``BoundedInput`` hands to its conditioner."""
    bound = number(function.bound, at.dtype, at.device)
    ratio = (at / bound).tanh_()
    return ratio * bound, ratio


def _arc(function: AtanScale, raw: Tensor) -> tuple[Tensor, Tensor]:
    """``AtanScale.forward`` in the fewest operations, all but the first on rows without gaps."""
    unit, ratio = number(2 * function.upper / math.pi, raw.dtype, raw.device), function.upper / function.lower
    if ratio == 1:
        return torch.atan2(raw, unit).mul_(unit), raw
    bent = leaky_relu(raw, ratio)
    return leaky_relu_(torch.atan2(bent, unit).mul_(unit), 1 / ratio), bent


def _pull_arc(function: AtanScale, grad: Tensor, bent: Tensor) -> Tensor:
    one, gain = number(1.0, bent.dtype, bent.device), math.pi / (2 * function.upper)
    return grad / torch.addcmul(one, bent, bent, value=gain**2)


def _pull_by_autograd(function: nn.Module, grad: Tensor, at: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = at.detach().requires_grad_()
        value = function(leaf)
    return torch.autograd.grad(value, leaf, grad)[0] if value.requires_grad else torch.zeros_like(at)


@lru_cache
def number(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Without dimensions and of the same dtype, which costs half of what a Python number does."""
    with torch.inference_mode(False):  # it is kept, and what inference mode makes has no place in a later graph
        return torch.tensor(value, dtype=dtype, device=device)
