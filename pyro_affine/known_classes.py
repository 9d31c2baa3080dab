"""Classes that a saved file may name: an explicit list, and the way for a user to add to it.

A class is safe to name when making an empty object of it and setting its attributes runs nothing, and its
methods do no more than compute on tensors. So the list holds the layers, networks and guides of this package,
the transforms and constraints of torch and Pyro, and those layers of ``torch.nn`` that are plain functions of
their attributes; not "any class of torch". Names are looked up among modules that are imported already: a file
cannot import anything.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any, TypeVar

import pyro.nn
import torch
from pyro.distributions import conditional, constraints, transforms
from pyro.distributions.conditional import ConditionalTransform
from pyro.distributions.transforms.block_autoregressive import MaskedBlockLinear
from torch import nn
from torch.distributions import Transform
from torch.distributions.constraints import Constraint

_PACKAGE = __name__.partition(".")[0]

_CONTAINERS = "Sequential ModuleList ModuleDict ParameterList ParameterDict Identity"
_LAYERS = """
    Linear Bilinear Embedding Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d
    Flatten Unflatten PixelShuffle PixelUnshuffle ChannelShuffle Upsample UpsamplingNearest2d
    LayerNorm RMSNorm GroupNorm LocalResponseNorm BatchNorm1d BatchNorm2d BatchNorm3d
    InstanceNorm1d InstanceNorm2d InstanceNorm3d Dropout Dropout1d Dropout2d Dropout3d AlphaDropout
    AvgPool1d AvgPool2d AvgPool3d MaxPool1d MaxPool2d MaxPool3d AdaptiveAvgPool1d AdaptiveAvgPool2d
    AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d ZeroPad1d ZeroPad2d ZeroPad3d
    ConstantPad1d ConstantPad2d ConstantPad3d ReflectionPad1d ReflectionPad2d ReflectionPad3d
    ReplicationPad1d ReplicationPad2d ReplicationPad3d CircularPad1d CircularPad2d CircularPad3d
"""
_ACTIVATIONS = """
    ReLU ReLU6 RReLU LeakyReLU PReLU ELU CELU SELU GELU GLU SiLU Mish Sigmoid LogSigmoid Hardsigmoid Hardswish
    Tanh Hardtanh Softplus Softsign Tanhshrink Hardshrink Softshrink Threshold Softmax Softmax2d Softmin
    LogSoftmax
"""
_PYRO_NETWORKS = "DenseNN ConditionalDenseNN AutoRegressiveNN ConditionalAutoRegressiveNN MaskedLinear"
_PYRO_INNER = (
    MaskedBlockLinear,
    conditional.ConstantConditionalTransform,
    conditional.ConditionalComposeTransformModule,
    conditional._ConditionalInverseTransformModule,
)

_registered: dict[str, type] = {}
_Class = TypeVar("_Class", bound=type)


def register_class(cls: _Class, name: str | None = None) -> _Class:
    """Let files name a class of yours: before ``save``, and again in the process that loads. A decorator.

    Loading makes an empty object of the class, without its constructor, and sets its attributes to those in the
    file (through ``__setstate__`` where the class has one): register only classes for which this is harmless.

    Args:
        cls: the class, such as a conditioner or a layer of your own.
        name: its name in files; default: module and name. Give one to a class of a script, whose module is
            called ``__main__`` when the script runs and otherwise when it is imported.

    Returns:
        The class itself.

    Raises:
        ValueError: if ``cls`` is no class, or the name is that of a class on the list.

    >>> @register_class
    ... class ShiftByKept(nn.Module):
    ...     def forward(self, kept, context=None):
    ...         return kept, None
    """
    if not isinstance(cls, type):
        raise ValueError(f"register_class takes a class, got {cls!r}; for an object pass type(the_object)")
    name = _full_name(cls) if name is None else name
    if name in _listed() or _own(name):
        raise ValueError(f"name must be free, got {name!r}, a class on the list; pass another name")
    _registered[name] = cls  # the last one counts: a notebook cell that runs again defines its class again
    return cls


def name_of(cls: type) -> str | None:
    """The name of a class in files; None if files may not name it."""
    if _own(_full_name(cls)) is cls:
        return _full_name(cls)
    return next((name for name, known in (_registered | _listed()).items() if known is cls), None)


def class_named(name: str) -> type:
    """The class of a name in a file.

    Raises:
        ValueError: if files may not name it.

    >>> class_named("torch.nn.SiLU")
    <class 'torch.nn.modules.activation.SiLU'>
    """
    found = _listed().get(name) or _registered.get(name) or _own(name)
    if found is None:
        raise ValueError(
            f"it names {name!r}, which is not on the list of classes that files may hold, and nothing of it was "
            f"run; if that class is yours and you trust it, call register_class(the_class, {name!r}) first"
        )
    return found


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _own(name: str) -> type | None:
    """A Module that this package defines."""
    module, _, attribute = name.rpartition(".")
    if not module.startswith(f"{_PACKAGE}."):  # asking a module of others for an attribute may import things
        return None
    found: Any = getattr(sys.modules.get(module), attribute, None)
    is_own = isinstance(found, type) and found.__module__.startswith(f"{_PACKAGE}.")
    return found if is_own and issubclass(found, nn.Module) else None


@cache
def _listed() -> dict[str, type]:
    listed = {f"torch.nn.{name}": getattr(nn, name) for name in f"{_CONTAINERS} {_LAYERS} {_ACTIVATIONS}".split()}
    listed |= {f"pyro.nn.{name}": getattr(pyro.nn, name) for name in _PYRO_NETWORKS.split()}
    listed |= {_full_name(cls): cls for cls in _PYRO_INNER}
    for module in (torch.distributions.transforms, torch.distributions.constraints, constraints, transforms):
        found = {cls for cls in vars(module).values() if isinstance(cls, type) and _is_math(cls)}
        new = sorted(found - set(listed.values()), key=_full_name)
        listed |= {f"{module.__name__}.{cls.__name__}": cls for cls in new}
    return listed


def _is_math(cls: type) -> bool:
    is_kind = issubclass(cls, (Transform, ConditionalTransform, Constraint))
    return is_kind and not issubclass(cls, property)  # torch's dependent_property holds a function
