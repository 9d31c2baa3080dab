"""A run of layers as one node of autograd's graph: value, log-determinant and score in one hand-written pass.

For small batches most of the time of a flow goes into the bookkeeping of autograd and of Modules, layer by layer.
Each step below is a layer's forward pass, with the score carried along as in ``gradients``, and its backward pass,
on plain tensors. ``push_score`` in ``gradients`` uses it where it can; it gives the same as the layers themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_affine.conditioners import MLP
from pyro_affine.coupling import AffineCoupling
from pyro_affine.linear import LowerTriangularAffine, Permutation
from pyro_affine.scales import AtanScale
from pyro_affine.tails import LOFT
from pyro_affine.transform import FlowTransform
from pyro_affine.whitening import Whitening

# Entry by entry, so that a derivative has the shape of the value.
_ELEMENTWISE = (nn.SiLU, nn.Tanh, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.Softplus, nn.Sigmoid, nn.Mish, nn.SELU)
_ELEMENTWISE_SCALES = "pyro_affine.scales"  # the file whose scale maps are all elementwise


class Step(Protocol):
    """A layer on rows of D entries. The step belongs to one pass: it keeps what its backward pass needs."""

    parameters: Sequence[Tensor]

    def forward(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """y, log|det dy/dx| (None for 0), and the score at y."""

    def backward(self, grad: Tensor, grad_log_det: Tensor | None) -> tuple[Tensor, Sequence[Tensor]]:
        """Gradient of x, and gradients of the parameters in turn."""


def step_of(layer: FlowTransform) -> Step | None:
    """The step of a layer; None for a layer that has none and must run as it is.

    >>> step_of(Permutation(torch.tensor([1, 0]))).forward(torch.ones(1, 2), torch.zeros(1, 2))[0]
    tensor([[1., 1.]])
    """
    make = _STEPS.get(type(layer))
    if make is None or layer.guard or len(layer.event_shape or ()) != 1 or _is_hooked(layer):
        return None
    step: Step | None = make(layer)
    return step


def fused_pass(steps: Sequence[Step], x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Run layers forward and carry the score along.

    Args:
        steps: of the layers, base side first, made for this pass.
        x: draws. Shape: batch + (D,).
        score: grad_x log q(x), constant in the graph. Shape of x.

    Returns:
        ``(y, log_det, score)``: y and log|det dy/dx| in the graph, and grad_y log q(y), constant in it.

    >>> swap = step_of(Permutation(torch.tensor([1, 0])))
    >>> fused_pass([swap], torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))[2]
    tensor([4., 3.])
    """
    parameters = [parameter for step in steps for parameter in step.parameters]
    rows = x.reshape(-1, x.shape[-1])
    y, log_det, score = _Pass.apply(steps, score.reshape(rows.shape), rows, *parameters)
    return y.reshape(x.shape), log_det.reshape(x.shape[:-1]), score.reshape(x.shape)


class _Pass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, steps: Sequence[Step], score: Tensor, x: Tensor, *parameters: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.steps, ctx.blank = steps, (x.shape, x.dtype, x.device)
        ctx.save_for_backward(*parameters)  # backward then refuses parameters that were changed in between
        x, total = x.view_as(x), x.new_zeros(len(x))
        for step in steps:
            x, log_det, score = step.forward(x, score)
            total = total if log_det is None else total + log_det
        ctx.mark_non_differentiable(score)
        return x, total, score

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_log_det: Tensor | None, _: Tensor | None) -> Any:
        _ = ctx.saved_tensors
        if grad is None:
            shape, dtype, device = ctx.blank
            grad = torch.zeros(shape, dtype=dtype, device=device)
        gradients: list[Sequence[Tensor]] = []
        for step in reversed(ctx.steps):
            grad, own = step.backward(grad, grad_log_det)
            gradients.append(own)
        return None, None, grad, *(gradient for own in reversed(gradients) for gradient in own)


class _CouplingStep:
    parameters: list[Tensor]  # weight and bias of each linear layer in turn

    def __init__(self, layer: AffineCoupling, linears: list[Any], activations: list[nn.Module]) -> None:
        self.partition, self.scale_map = layer.partition, layer.scale
        self.parameters = [tensor for linear in linears for tensor in linear._parameters.values()]
        self.activations = activations

    def forward(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        kept, self.moved = self.partition.split(x)
        shift, raw = self._network(kept).split(self.moved.shape[-1], -1)
        log_scale, self.raw_slope = _value_and_slope(self.scale_map, raw)
        self.scale = log_scale.exp()
        y = self.partition.merge(kept, torch.addcmul(shift, self.moved, self.scale))
        return y, log_scale.sum(-1), self._carry(score)

    def _network(self, kept: Tensor) -> Tensor:
        self.inputs, self.slopes = [kept], []
        value = F.linear(kept, *self.parameters[:2])
        for index, activation in enumerate(self.activations, 1):
            value, slope = _value_and_slope(activation, value)
            self.inputs.append(value)
            self.slopes.append(slope)
            value = F.linear(value, self.parameters[2 * index], self.parameters[2 * index + 1])
        return value

    def _carry(self, score: Tensor) -> Tensor:
        kept, moved = self.partition.split(score)
        of_shift = moved / self.scale
        of_raw = torch.addcmul(self.raw_slope, self.raw_slope, self.moved * moved)
        pulled = torch.cat((of_shift, of_raw), -1)
        for index in range(len(self.slopes), 0, -1):
            pulled = (pulled @ self.parameters[2 * index]).mul_(self.slopes[index - 1])
        return self.partition.merge(torch.addmm(kept, pulled, self.parameters[0], alpha=-1), of_shift)

    def backward(self, grad: Tensor, grad_log_det: Tensor | None) -> tuple[Tensor, Sequence[Tensor]]:
        kept, moved = self.partition.split(grad)
        through = moved * self.scale
        of_log_scale = through * self.moved
        if grad_log_det is not None:
            of_log_scale += grad_log_det[:, None]
        pulled, gradients = torch.cat((moved, of_log_scale.mul_(self.raw_slope)), -1), []
        for index in range(len(self.slopes), -1, -1):
            gradients += [pulled.sum(0), pulled.T @ self.inputs[index]]
            if index:
                pulled = (pulled @ self.parameters[2 * index]).mul_(self.slopes[index - 1])
        return self.partition.merge(torch.addmm(kept, pulled, self.parameters[0]), through), gradients[::-1]


class _PermutationStep:
    def __init__(self, layer: Permutation) -> None:
        self.order, self.inverse_order, self.parameters = layer.order, layer.inverse_order, ()

    def forward(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        return x.index_select(-1, self.order), None, score.index_select(-1, self.order)

    def backward(self, grad: Tensor, grad_log_det: Tensor | None) -> tuple[Tensor, Sequence[Tensor]]:
        return grad.index_select(-1, self.inverse_order), ()


class _TailStep:
    def __init__(self, layer: LOFT) -> None:
        self.layer, self.parameters = layer, ()

    def forward(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        excess = self.layer._excess(x)
        self.beyond = x.sign() * (excess > 0)
        self.inverse_slope = excess + 1
        y, log_det = self.layer._forward(x)
        return y, log_det, torch.addcmul(self.beyond, score, self.inverse_slope)

    def backward(self, grad: Tensor, grad_log_det: Tensor | None) -> tuple[Tensor, Sequence[Tensor]]:
        if grad_log_det is not None:
            grad = grad - grad_log_det[:, None] * self.beyond
        return grad / self.inverse_slope, ()


class _TriangularStep:
    def __init__(self, layer: LowerTriangularAffine) -> None:
        self.parameters = list(layer._parameters.values())
        self.loc, self.log_scale, self.below = layer.loc, layer.log_scale, layer.below

    def forward(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        self.x, self.lower, self.scale = x, self.below.tril(-1), self.log_scale.exp()
        self.mixed = torch.addmm(x, x, self.lower.T)
        y = torch.addcmul(self.loc, self.mixed, self.scale)
        solved = torch.linalg.solve_triangular(self.lower, score, upper=False, left=False, unitriangular=True)
        return y, self.log_scale.sum().expand(len(x)), solved / self.scale

    def backward(self, grad: Tensor, grad_log_det: Tensor | None) -> tuple[Tensor, Sequence[Tensor]]:
        scaled = grad * self.scale
        of_log_scale = (scaled * self.mixed).sum(0)
        if grad_log_det is not None:
            of_log_scale += grad_log_det.sum()
        gradients = {"loc": grad.sum(0), "log_scale": of_log_scale, "below": (scaled.T @ self.x).tril_(-1)}
        return torch.addmm(scaled, scaled, self.lower), [gradients[name] for name in ("loc", "log_scale", "below")]


class _WhiteningStep:
    def __init__(self, layer: Whitening) -> None:
        self.layer, self.parameters = layer, ()

    def forward(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        y, log_det = self.layer._forward(x)
        return y, log_det, torch.linalg.solve_triangular(self.layer.scale_tril, score, upper=False, left=False)

    def backward(self, grad: Tensor, grad_log_det: Tensor | None) -> tuple[Tensor, Sequence[Tensor]]:
        return grad @ self.layer.scale_tril, ()


def _coupling_step(layer: AffineCoupling) -> _CouplingStep | None:
    """None for a coupling whose network is not an ``MLP`` as it was built."""
    parts: dict[str, Any] = layer._modules  # past the slow Module.__getattr__
    conditioner: Any = parts["conditioner"]
    scale = parts["scale"]
    if type(parts["conditioner"]) is not MLP or type(scale).__module__ != _ELEMENTWISE_SCALES:
        return None
    if conditioner.shift_only or conditioner.context_dim or conditioner._modules.get("raw_network"):
        return None
    network = conditioner._modules["network"]
    later = list(network._modules["layers"]._modules.values())
    linears, activations = [network._modules["from_kept"], *later[1::2]], later[::2]
    elementwise = all(type(part) in _ELEMENTWISE and not getattr(part, "inplace", False) for part in activations)
    linear = all(type(part) is nn.Linear and part._parameters["bias"] is not None for part in linears)
    hooked = any(map(_is_hooked, (conditioner, network, scale, *linears, *activations)))
    return _CouplingStep(layer, linears, activations) if elementwise and linear and not hooked else None


_STEPS: dict[type, Any] = {
    AffineCoupling: _coupling_step,
    Permutation: _PermutationStep,
    LOFT: _TailStep,
    LowerTriangularAffine: _TriangularStep,
    Whitening: _WhiteningStep,
}


def _value_and_slope(function: nn.Module, at: Tensor) -> tuple[Tensor, Tensor]:
    """An elementwise function and its derivative."""
    if type(function) is nn.SiLU:
        gate = at.sigmoid()
        value = at * gate
        return value, torch.addcmul(gate, value, 1 - gate)
    if type(function) is AtanScale:
        ratio, gain = function.upper / function.lower, math.pi / (2 * function.upper)
        argument = F.leaky_relu(at * gain, ratio)
        return F.leaky_relu(argument.atan().div_(gain), 1 / ratio), argument.square().add_(1).reciprocal_()
    with torch.enable_grad():
        leaf = at.detach().requires_grad_()
        value = function(leaf)
        slope = torch.autograd.grad(value.sum(), leaf)[0] if value.requires_grad else torch.zeros_like(at)
    return value.detach(), slope


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
