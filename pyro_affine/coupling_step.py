"""The step of an affine coupling whose conditioner is an ``MLP``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_affine.conditioners import MLP
from pyro_affine.coupling import AffineCoupling
from pyro_affine.scales import AtanScale
from pyro_affine.steps import Made, Rows, Wanted

# Entry by entry, so that a derivative has the shape of the value.
_ELEMENTWISE = (nn.SiLU, nn.Tanh, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.Softplus, nn.Sigmoid, nn.Mish, nn.SELU)
_ELEMENTWISE_SCALES = "pyro_affine.scales"  # the file whose scale maps are all elementwise

_ONE = torch.tensor(1.0, dtype=torch.float64)  # without dimensions, it goes with rows of any floating dtype
_INPUT_ALONE = Wanted(input=True, tensors=False)

_Pull = Callable[[Tensor], Tensor]  # gradient of an elementwise function: at its value -> at its argument


def coupling_step(layer: AffineCoupling) -> CouplingStep | None:
    """None for a coupling whose network is not an ``MLP`` as it was built."""
    parts: dict[str, Any] = layer._modules  # past the slow Module.__getattr__
    conditioner, scale = parts.get("conditioner"), parts["scale"]
    if type(conditioner) is not MLP or type(scale).__module__ != _ELEMENTWISE_SCALES:
        return None
    if conditioner.shift_only or conditioner.context_dim or conditioner._modules.get("raw_network"):
        return None
    network: Any = conditioner._modules["network"]
    later = list(network._modules["layers"]._modules.values())
    linears, activations = [network._modules["from_kept"], *later[1::2]], later[::2]
    elementwise = all(type(part) in _ELEMENTWISE and not getattr(part, "inplace", False) for part in activations)
    linear = all(type(part) is nn.Linear and part._parameters["bias"] is not None for part in linears)
    return CouplingStep(layer, linears, activations) if elementwise and linear else None


class CouplingStep:
    """y_kept = x_kept, y_moved = x_moved * exp(log_scale) + shift, as ``AffineCoupling``."""

    def __init__(self, layer: AffineCoupling, linears: list[Any], activations: list[nn.Module]) -> None:
        self.partition, self.scale_map, self.activations = layer.partition, layer.scale, activations
        self.holders: list[dict[str, Any]] = [linear._parameters for linear in linears]

    @property
    def cut(self) -> int | None:
        partition = self.partition
        return partition.num_moved if partition.kept_last else partition.num_kept if partition.kept_first else None

    def tensors(self) -> list[Tensor]:
        return [holder[name] for holder in self.holders for name in ("weight", "bias")]

    def forward(self, x: Any, tensors: list[Tensor]) -> Made:
        kept, moved = self._split(x)
        network = _NetworkPass(self.activations, tensors, kept)
        shift, raw = network.outputs.split_with_sizes((moved.shape[-1],) * 2, -1)
        log_scale, bend = _bent(self.scale_map, raw)
        scale = log_scale.exp()

        def pull(grad: Any, grad_log_det: Tensor | None, wanted: Wanted) -> tuple[Rows, Sequence[Tensor]]:
            grad_kept, grad = self._split(grad)
            through = grad * scale
            of_scale = through * moved if grad_log_det is None else torch.addcmul(grad_log_det, through, moved)
            grad_kept, own = network.pull(torch.cat((grad, bend(of_scale)), -1), grad_kept, wanted)
            return self._merge(grad_kept, through), own

        def push(score: Any) -> Rows:
            score_kept, score = self._split(score)
            of_shift = score / scale
            of_raw = bend(torch.addcmul(_ONE, moved, score))
            score_kept, _ = network.pull(torch.cat((of_shift, of_raw), -1), score_kept, _INPUT_ALONE, sign=-1)
            return self._merge(score_kept, of_shift)

        return Made(self._merge(kept, torch.addcmul(shift, moved, scale)), log_scale, pull, push)

    def inverse(self, y: Any, tensors: list[Tensor]) -> Made:
        kept, moved = self._split(y)
        network = _NetworkPass(self.activations, tensors, kept)
        shift, raw = network.outputs.split_with_sizes((moved.shape[-1],) * 2, -1)
        log_scale, bend = _bent(self.scale_map, raw)
        scale = log_scale.exp()
        moved = torch.sub(moved, shift).div_(scale)

        def pull(grad: Any, grad_log_det: Tensor | None, wanted: Wanted) -> tuple[Rows, Sequence[Tensor]]:
            grad_kept, grad = self._split(grad)
            through = grad / scale
            of_scale = -grad * moved if grad_log_det is None else torch.addcmul(grad_log_det, grad, moved, value=-1)
            grad_kept, own = network.pull(torch.cat((-through, bend(of_scale)), -1), grad_kept, wanted)
            return self._merge(grad_kept, through), own

        return Made(self._merge(kept, moved), log_scale, pull)

    def _split(self, rows: Any) -> Any:
        """Kept and moved entries."""
        if isinstance(rows, Tensor):
            return self.partition.split(rows)
        return rows[::-1] if self.partition.kept_last else rows

    def _merge(self, kept: Tensor, moved: Tensor) -> Rows:
        if self.cut is None:
            return self.partition.merge(kept, moved)
        return (moved, kept) if self.partition.kept_last else (kept, moved)


class _NetworkPass:
    """Linear layers with activations between them, run on the kept entries; weight and bias of each in turn."""

    def __init__(self, activations: list[nn.Module], tensors: list[Tensor], kept: Tensor) -> None:
        self.tensors, self.inputs, self.bends = tensors, [kept], list[_Pull]()
        pairs = iter(tensors)
        for activation in activations:
            kept, bend = _bent(activation, F.linear(kept, next(pairs), next(pairs)))
            self.inputs.append(kept)
            self.bends.append(bend)
        self.outputs = F.linear(kept, next(pairs), next(pairs))

    def pull(self, pulled: Tensor, onto: Tensor, wanted: Wanted, *, sign: int = 1) -> tuple[Tensor, list[Tensor]]:
        """Gradient of the kept entries, added to ``onto``, and those of the tensors."""
        own: list[Tensor] = []
        for index in range(len(self.bends), -1, -1):
            if wanted.tensors:
                own += [pulled.sum(0), torch.mm(pulled.t(), self.inputs[index])]
            if index:
                pulled = self.bends[index - 1](torch.mm(pulled, self.tensors[2 * index]))
        return torch.addmm(onto, pulled, self.tensors[0], alpha=sign) if wanted.input else onto, own[::-1]


def _bent(function: nn.Module, at: Tensor) -> tuple[Tensor, _Pull]:
    """Value of an elementwise function, and how a gradient comes back through it."""
    if type(function) is nn.SiLU:
        return F.silu(at), lambda grad: _silu_backward(grad, at)
    if type(function) is AtanScale:
        return _bent_arc(function, at)

    def pull(grad: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = at.detach().requires_grad_()
            value = function(leaf)
        return torch.autograd.grad(value, leaf, grad)[0] if value.requires_grad else torch.zeros_like(at)

    return function(at), pull


_silu_backward = torch.ops.aten.silu_backward.default


def _bent_arc(function: AtanScale, raw: Tensor) -> tuple[Tensor, _Pull]:
    """``AtanScale.forward`` in the fewest operations, all but the first on rows without gaps."""
    right, ratio = 2 * function.upper / math.pi, function.upper / function.lower
    unit = _number(right, raw.dtype, raw.device)
    bent = F.leaky_relu(raw, ratio)

    def pull(grad: Tensor) -> Tensor:
        return grad / torch.addcmul(_ONE, bent, bent, value=right**-2)

    return F.leaky_relu(torch.atan2(bent, unit) * unit, 1 / ratio), pull


@lru_cache
def _number(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Without dimensions and of the same dtype, which costs half of what a Python number does."""
    return torch.tensor(value, dtype=dtype, device=device)
