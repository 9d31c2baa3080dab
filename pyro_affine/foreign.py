"""A transform of torch or Pyro under our contract: no stale cache, no hidden parameter, no state that gets lost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Size, Tensor, nn
from torch.distributions import Transform
from torch.distributions.transforms import _InverseTransform
from torch.distributions.utils import lazy_property

from pyro_affine.transform import FlowTransform


class Foreign(FlowTransform):
    """A transform of torch or Pyro whose tensors are registered, so that they are saved, moved and trained.

    What torch or Pyro keep as a plain attribute becomes a buffer (the order of Pyro's ``Permute``, the constants of
    torch's ``AffineTransform``) or, if it is one, a parameter. What they cache is dropped before each call.

    Args:
        transform: any bijective transform.

    >>> import torch
    >>> from torch.distributions import AffineTransform
    >>> layer = Foreign(AffineTransform(torch.zeros(2), torch.ones(2))).double()
    >>> list(layer.state_dict()), layer(torch.ones(2).double())
    (['loc_0', 'scale_0'], tensor([1., 1.], dtype=torch.float64))
    """

    def __init__(self, transform: Transform) -> None:
        super().__init__(None)
        self.transform = transform
        self._inner = _inner_transforms(transform)
        self.inside = nn.ModuleList(_hidden_modules(self._inner))
        for index, inner in enumerate(self._inner):
            for name, value in _plain_tensors(inner):
                if isinstance(value, nn.Parameter):
                    self.register_parameter(f"{name}_{index}", value)
                elif not value.requires_grad:
                    self.register_buffer(f"{name}_{index}", value)

    domain = property(lambda self: self.transform.domain)
    codomain = property(lambda self: self.transform.codomain)
    sign = property(lambda self: self.transform.sign)

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._prepare()
        y = self.transform(x)
        return y, self.transform.log_abs_det_jacobian(x, y)

    def _backward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        self._prepare()
        x = self.transform.inv(y)
        return x, self.transform.log_abs_det_jacobian(x, y)

    def forward_shape(self, shape: Size) -> Size:
        return self.transform.forward_shape(shape)  # type: ignore[no-any-return]

    def inverse_shape(self, shape: Size) -> Size:
        return self.transform.inverse_shape(shape)  # type: ignore[no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        self._prepare()
        return super().__getstate__()

    def _prepare(self) -> None:
        """Hand over the registered tensors, which may have been moved, loaded or swapped, and drop all else."""
        own = {**self._buffers, **self._parameters}
        for index, inner in enumerate(self._inner):
            inner.clear_cache()
            for name, value in list(vars(inner).items()):
                if f"{name}_{index}" in own:
                    setattr(inner, name, own[f"{name}_{index}"])
                elif _is_lazy(inner, name):
                    delattr(inner, name)
                elif _is_cache(name) and isinstance(value, Tensor):
                    setattr(inner, name, None)

    def _extra_slots(self) -> Iterator[tuple[dict[str, Any], str]]:
        for index, inner in enumerate(self._inner):
            names = (name for name, _ in _plain_tensors(inner))
            yield from ((vars(inner), name) for name in names if not hasattr(self, f"{name}_{index}"))


def _inner_transforms(transform: Transform) -> list[Any]:
    """The transform and those that it is made of, each once."""
    found: list[Transform] = []
    left: list[Any] = [transform]
    while left:
        inner = left.pop(0)
        if not isinstance(inner, Transform) or any(inner is other for other in found):
            continue
        found.append(inner)
        left += [*getattr(inner, "parts", ()), *getattr(inner, "transforms", ())]
        left += [getattr(inner, "base_transform", None), inner.inv if isinstance(inner, _InverseTransform) else None]
        left += list(inner.modules()) if isinstance(inner, nn.Module) else []
    return found


def _hidden_modules(transforms: list[Any]) -> Iterator[nn.Module]:
    """Modules under a plain transform such as ``IndependentTransform``, which registers nothing."""
    seen = set(map(id, transforms[0].modules())) if isinstance(transforms[0], nn.Module) else set()
    for inner in transforms:
        if isinstance(inner, nn.Module) and id(inner) not in seen:
            seen.update(map(id, inner.modules()))
            yield inner


def _plain_tensors(transform: Transform) -> list[tuple[str, Tensor]]:
    """Tensors that nothing registers, without those that are derived from others."""
    items = [(name, value) for name, value in vars(transform).items() if isinstance(value, Tensor)]
    return [(name, value) for name, value in items if not (_is_cache(name) or _is_lazy(transform, name))]


def _is_cache(name: str) -> bool:
    return "cache" in name  # _cached_log_scale, _cache_log_detJ, _weight_cache: no attribute of another kind has it


def _is_lazy(transform: Transform, name: str) -> bool:
    return isinstance(getattr(type(transform), name, None), lazy_property)
