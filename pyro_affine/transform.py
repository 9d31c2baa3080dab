"""The base class of all layers: two methods in, the whole contract of ``torch.distributions.Transform`` out."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from pyro.distributions import TransformModule
from torch import Size, Tensor, nn
from torch.distributions import constraints

from pyro_affine.cache import Pair, Slot, Slots, State


class FlowTransform(TransformModule):
    """Bijection y = t(x) given by two methods that return value and log-determinant together.

    A layer implements ``_forward(x) -> (y, log_det)`` and ``_backward(y) -> (x, log_det)``, where log_det is
    log|det dy/dx| in both, summed over the event (shape: batch). This class derives from them all that torch and
    Pyro expect: ``t(x)``, hooks, ``t.inv``, ``log_abs_det_jacobian``, ``with_cache``, shapes, deepcopy, pickle.

    The cache holds one pair. It is found only through the tensor that the transform itself made, never through a
    tensor of the caller's, and only while all parameters are the same tensors with the same values: scoring a fresh
    draw costs nothing, scoring the same data after an optimiser step recomputes. As in torch, a pair that was found
    ties x to y in autograd's graph; for d log_prob / dy of a draw, score ``y.detach().requires_grad_()``.

    Args:
        event_shape: shape of one event on the x side; None where any shape of the domain's rank will do.
        cache_size: 1 (default) or 0 for no cache.

    Raises:
        ValueError: on call, for a tensor of the wrong event shape, dtype or device, or if ``guard`` is True and
            a value is not finite.

    >>> class Double(FlowTransform):
    ...     def _forward(self, x):
    ...         return 2 * x, torch.full(x.shape[:-1], 2.0).log() * x.shape[-1]
    ...
    ...     def _backward(self, y):
    ...         return y / 2, torch.full(y.shape[:-1], 2.0).log() * y.shape[-1]
    >>> Double((3,)).inv(torch.ones(3))
    tensor([0.5000, 0.5000, 0.5000])
    """

    bijective = True
    batch_shape = Size()
    guard = False

    def __init__(self, event_shape: tuple[int, ...] | None, *, cache_size: int = 1) -> None:
        super().__init__(cache_size=cache_size)
        self.event_shape = None if event_shape is None else Size(event_shape)
        if min(self.event_shape or (1,)) < 1:
            raise ValueError(f"an event needs one entry at least in each dimension, got shape {event_shape}")
        self._pair: Pair | None = None

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _backward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    __call__ = nn.Module.__call__  # Transform.__call__ comes first in the MRO and would skip the hooks
    __repr__ = nn.Module.__repr__

    @property
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        return constraints.independent(constraints.real, len(self.event_shape or ()))

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        return self.domain

    @property
    def sign(self) -> int:
        """Sign of det dy/dx."""
        return 1

    def forward(self, x: Tensor) -> Tensor:
        return self._through(x, is_forward=True)

    def _inv_call(self, y: Tensor) -> Tensor:
        return self._through(y, is_forward=False)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """log|det dy/dx| at x, where y = t(x). Shape: batch."""
        for made, given, is_forward in ((y, x, True), (x, y, False)):
            pair = self._recall(made, is_forward)
            if pair is not None and pair.given is given:
                return pair.log_det
        self._check(x, self.forward_shape)
        return self._forward(x)[1]

    @property
    def inv(self) -> FlowTransform:
        """The inverse, a Module that shares the parameters; ``t.inv.inv is t``."""
        return self.__dict__["_inv"] or _Inverse(self)

    def with_cache(self, cache_size: int = 1) -> FlowTransform:
        """The same transform, sharing all parameters, with a cache of 0 or 1 pairs."""
        if cache_size not in (0, 1):
            raise ValueError(f"cache_size must be 0 or 1, got {cache_size}")
        if cache_size == self._cache_size:
            return self
        twin = copy.copy(self)
        twin._cache_size = cache_size
        return twin

    def clear_cache(self) -> None:
        """Drop the cached pair."""
        self._pair = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_inv": None, "_pair": None, "_slots": None, "_plan": None}

    def forward_shape(self, shape: Size) -> Size:
        """Shape of y given the shape of x, the transform's batch shape broadcast in."""
        if self.event_shape is None:
            return shape
        rank = len(self.event_shape)
        if len(shape) < rank or shape[len(shape) - rank :] != self.event_shape:
            raise ValueError(
                f"{type(self).__name__} takes events of shape {tuple(self.event_shape)} in the rightmost dimensions, "
                f"got a tensor of shape {tuple(shape)}; reshape it, or build the transform for this event shape"
            )
        try:
            return torch.broadcast_shapes(shape, self.batch_shape + self.event_shape) if self.batch_shape else shape
        except RuntimeError as error:
            raise ValueError(
                f"the batch of a tensor must broadcast with that of the context, {tuple(self.batch_shape)}, got a "
                f"tensor of shape {tuple(shape)}; put further dimensions of the draws to the left of the context's"
            ) from error

    def inverse_shape(self, shape: Size) -> Size:
        """Shape of x given the shape of y, the transform's batch shape broadcast in."""
        return self.forward_shape(shape)

    def _check(self, value: Tensor, shape_rule: Callable[[Size], Size]) -> None:
        shape_rule(value.shape)
        if not value.is_floating_point():
            raise ValueError(
                f"{type(self).__name__} takes floating point tensors, got {value.dtype}; convert with .float()"
            )
        self._check_type(value)

    def _check_type(self, value: Tensor) -> None:
        own = None if torch.compiler.is_compiling() else next(filter(Tensor.is_floating_point, self._tensors()), None)
        if own is None or (value.dtype, value.device) == (own.dtype, own.device):
            return
        if value.device != own.device or not torch.is_autocast_enabled(own.device.type):
            raise ValueError(
                f"tensor and {type(self).__name__} must agree in dtype and device, got a tensor of {value.dtype} on "
                f"{value.device} and parameters of {own.dtype} on {own.device}; move one of them with .to(...)"
            )

    def _through(self, given: Tensor, *, is_forward: bool) -> Tensor:
        self._check(given, self.forward_shape if is_forward else self.inverse_shape)
        if (pair := self._recall(given, not is_forward)) is not None:
            return pair.given
        made, log_det = self._forward(given) if is_forward else self._backward(given)
        if self.guard:
            _require_finite(made, type(self).__name__)
        self._remember(made, given, log_det, is_forward)
        return made

    def _remember(self, made: Tensor, given: Tensor, log_det: Tensor, is_forward: bool) -> None:
        if self._cache_size == 0 or torch.compiler.is_compiling():
            return
        self._pair = None
        if made is given or made.is_inference() or given.is_inference():
            return  # inference tensors count no versions: a change in place would go unseen
        key = weakref.ref(made, partial(_forget, weakref.ref(self)))
        versions = (made._version, given._version, log_det._version)
        self._pair = Pair(key, given, log_det, is_forward, versions, torch.is_grad_enabled(), self._state())

    def _recall(self, made: Tensor, is_forward: bool) -> Pair | None:
        """The pair whose made tensor is this one, if nothing has changed since."""
        pair = None if torch.compiler.is_compiling() else self._pair
        if pair is None or pair.made() is not made or pair.is_forward is not is_forward:
            return None
        unchanged = (made._version, pair.given._version, pair.log_det._version) == pair.versions
        suffices = pair.with_grad or not torch.is_grad_enabled()
        return pair if unchanged and suffices and pair.state.equals(self._state()) else None

    def _tensors(self) -> Iterator[Tensor]:
        """Parameters and buffers as they are now."""
        return self._found().tensors()

    def _state(self) -> State:
        return State.of(self._found())

    def _found(self) -> Slots:
        slots: Slots | None = self.__dict__.get("_slots")
        if slots is None or not slots.hold():
            slots = self.__dict__["_slots"] = Slots(self, self._find_slots())
        return slots

    def _find_slots(self) -> Iterator[Slot]:
        for module in self.modules():
            yield from ((holder, name) for holder in (module._parameters, module._buffers) for name in holder)
            if isinstance(module, FlowTransform):
                yield from module._extra_slots()

    def _extra_slots(self) -> Iterable[Slot]:
        return ()  # tensors that are neither parameters nor buffers of a Module


def _forget(transform: weakref.ref[FlowTransform], key: object) -> None:
    """Free a pair, and its graph, as soon as nobody holds the tensor that would find it."""
    owner = transform()
    if owner is not None and owner._pair is not None and owner._pair.made is key:
        owner._pair = None


def _require_finite(value: Tensor, where: str) -> None:
    finite = value.isfinite()
    if not finite.all():
        entry = tuple((~finite).nonzero()[0].tolist())
        raise ValueError(
            f"values must stay finite, got {value[entry].item()} out of {where} at index {entry}; use a scale map "
            "with a smaller bound, a smaller learning rate, gradient clipping, or standardised data"
        )


class _Inverse(FlowTransform):
    """x = t.inv(y): the two methods swapped, the cache that of the transform."""

    def __init__(self, transform: FlowTransform) -> None:
        shape = transform.event_shape
        if shape is not None:
            shape = transform.forward_shape(shape)[-transform.codomain.event_dim :]  # without a context's batch
        super().__init__(shape, cache_size=transform._cache_size)
        self.transform = transform
        transform.__dict__["_inv"] = self  # past Module.__setattr__: an inverse is no part of its transform

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.transform.__dict__["_inv"] = self

    domain = property(lambda self: self.transform.codomain)
    codomain = property(lambda self: self.transform.domain)
    sign = property(lambda self: self.transform.sign)
    batch_shape = property(lambda self: self.transform.batch_shape)
    inv = property(lambda self: self.transform)

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, log_det = self.transform._backward(x)
        return y, -log_det

    def _backward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x, log_det = self.transform._forward(y)
        return x, -log_det

    def forward(self, x: Tensor) -> Tensor:
        return self.transform._inv_call(x)

    def _inv_call(self, y: Tensor) -> Tensor:
        return self.transform(y)  # type: ignore[no-any-return]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return -self.transform.log_abs_det_jacobian(y, x)

    def with_cache(self, cache_size: int = 1) -> FlowTransform:
        return self.transform.with_cache(cache_size).inv

    def clear_cache(self) -> None:
        self.transform.clear_cache()

    def forward_shape(self, shape: Size) -> Size:
        return self.transform.inverse_shape(shape)

    def inverse_shape(self, shape: Size) -> Size:
        return self.transform.forward_shape(shape)
