"""Objects as data: a tree that says what a flow is made of, and the way back from it.

As in pickle, the tree holds each object's class, by name, and its attributes; unlike a pickle it cannot say
"call this". Going back makes an empty object of each class with ``__new__`` and sets its attributes: no
constructor and no function of the tree runs, and a class must be on the list of ``known_classes``.

Why attributes, not the arguments of constructors: a fitted flow is its attributes. Constructors draw random
numbers and look at data, and would have to be recorded layer by layer; attributes need no code in any layer: a
layer that can be pickled can be saved. What a layer keeps for speed alone it leaves out in ``__getstate__``. The
price: an attribute that a later version adds needs a default on its class, for files from before.

Why not torch's own ``safe_globals``: it calls listed classes with arguments from the file, it cannot say which
attribute of which layer stands in the way, and it has no word for what Pyro's ``Spline`` keeps, a method of
itself.

The tree is made of what JSON has. A dict of one entry is a tag: ``{"tuple": [...]}``, ``{"Size": [...]}``,
``{"dict": [[key, value], ...]}``, ``{"slice": [...]}``, ``{"dtype": "torch.float32"}``, ``{"constraint": "real"}``,
``{"class": name}``, ``{"method": name}`` of the object itself, or a reference, ``{"object": index}`` and
``{"tensor": name}``: what is shared stays shared.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Size, Tensor, nn
from torch.distributions import Transform
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import _InverseTransform

from pyro_affine.known_classes import class_named, name_of

_SEQUENCES: dict[str, Any] = {"tuple": tuple, "Size": Size, "set": set, "frozenset": frozenset}
_MAPPINGS: dict[str, Any] = {"dict": dict, "OrderedDict": OrderedDict}
_CONSTRAINTS = {name: value for name, value in vars(constraints).items() if isinstance(value, Constraint)}
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_TABLES = {"_parameters": nn.Parameter, "_buffers": Tensor, "_modules": nn.Module}


class Writer:
    """Turns values into a tree; objects and tensors are collected, each once.

    Attributes:
        objects: class and attributes of each object.
        tensors: each tensor on the CPU, by the path where it was met first.
        kinds: of each tensor, whether it is a Parameter, and whether it requires a gradient.

    >>> Writer().value({"size": torch.Size([2])}, "flow")
    {'dict': [['size', {'Size': [2]}]]}
    """

    def __init__(self) -> None:
        self.objects: list[dict[str, Any]] = []
        self.tensors: dict[str, Tensor] = {}
        self.kinds: dict[str, list[bool]] = {}
        self._met: dict[int, tuple[Any, dict[str, Any]]] = {}  # the object too: so no other gets its id

    def value(self, value: Any, path: str) -> Any:
        """The tree of a value.

        Raises:
            ValueError: naming the path, for what a file cannot hold: a function, an unknown class.
        """
        if value is None or type(value) in (bool, int, str) or isinstance(value, float):
            return value
        if type(value) is list:
            return self._items(value, path)
        for tag, kind in _SEQUENCES.items():
            if type(value) is kind:
                return {tag: self._items(sorted(value, key=repr) if tag.endswith("set") else value, path)}
        for tag, kind in _MAPPINGS.items():
            if type(value) is kind:
                return {tag: [[self.value(k, path), self.value(value[k], f"{path}[{k!r}]")] for k in value]}
        return self._torch_value(value, path)

    def _items(self, values: Iterable[Any], path: str) -> list[Any]:
        return [self.value(item, f"{path}[{index}]") for index, item in enumerate(values)]

    def _torch_value(self, value: Any, path: str) -> dict[str, Any]:
        if isinstance(value, Tensor):
            return self._tensor(value, path)
        if isinstance(value, torch.dtype):
            return {"dtype": str(value)}
        if isinstance(value, type):
            return {"class": _require_known(value, path)}
        if isinstance(value, slice):
            return {"slice": self._items((value.start, value.stop, value.step), path)}
        constraint = next((name for name, public in _CONSTRAINTS.items() if public is value), None)
        return self.object(value, path) if constraint is None else {"constraint": constraint}

    def _tensor(self, tensor: Tensor, path: str) -> dict[str, Any]:
        if id(tensor) not in self._met:
            if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
                raise ValueError(
                    f"a file holds dense tensors and Parameters, got a {type(tensor).__name__} at {path}; convert "
                    "it; of a lazy layer, call it once"
                )
            name = path if path not in self.tensors else f"{path} {len(self.tensors)}"
            # cloned, since torch.save writes the whole storage, such as the data that a tensor is a row of
            self.tensors[name] = tensor.detach().cpu().clone()
            self.kinds[name] = [isinstance(tensor, nn.Parameter), tensor.requires_grad and tensor.is_leaf]
            self._met[id(tensor)] = (tensor, {"tensor": name})
        return self._met[id(tensor)][1]

    def object(self, made: Any, path: str, state: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The tree of an object; with ``state`` in place of its own attributes, if given."""
        if id(made) not in self._met:
            attributes: dict[str, Any] = {}
            entry = {"class": _require_known(type(made), path), "state": attributes}
            self._met[id(made)] = (made, {"object": len(self.objects)})
            self.objects.append(entry)
            for name, value in _kept_state(made, _state(made, path) if state is None else state, path):
                attributes[name] = self._attribute(made, name, value, path)
        return self._met[id(made)][1]

    def _attribute(self, made: Any, name: str, value: Any, path: str) -> Any:
        if _own_method(made, value) == f"{name}_stable":  # Pyro's AffineAutoregressive(stable=True)
            return {"method": f"{name}_stable"}
        if name in _TABLES:  # parameters, buffers and sub-modules are named as Python names them
            return {"dict": [[key, self.value(item, f"{path}.{key}")] for key, item in value.items()]}
        return self.value(value, f"{path}.{name}")


class Reader:
    """Makes values from a tree again.

    Args:
        objects, kinds, tensors: what the ``Writer`` collected.
        device: where the tensors go.

    Raises:
        ValueError: for a class that is not on the list, or an attribute that is not a file's to set. A tree that
            makes no sense also raises what it leads to, such as a KeyError.
    """

    def __init__(
        self,
        objects: list[Any],
        kinds: Mapping[str, tuple[bool, bool]],
        tensors: Mapping[str, Tensor],
        device: str | torch.device,
    ) -> None:
        self._objects = objects
        self._tensors = {name: _as_saved(tensors[name], *kinds[name], device) for name in kinds}
        self._made: dict[int, Any] = {}

    def value(self, tree: Any) -> Any:
        """The value of a tree."""
        if tree is None or isinstance(tree, (bool, int, float, str)):
            return tree
        if isinstance(tree, list):
            return [self.value(item) for item in tree]
        ((tag, content),) = tree.items()
        if tag in _SEQUENCES:
            return _SEQUENCES[tag](self.value(content))
        if tag in _MAPPINGS:
            return _MAPPINGS[tag]((self.value(key), self.value(item)) for key, item in content)
        if tag == "slice":
            return slice(*self.value(content))
        if tag == "class":
            return class_named(content)
        if tag == "object":
            return self._object(content)
        named: dict[str, Any] = {"dtype": _DTYPES, "constraint": _CONSTRAINTS, "tensor": self._tensors}
        return named[tag][content]

    def class_of(self, reference: dict[str, int]) -> Any:
        """The class of the object that a reference refers to; the object is not made."""
        return class_named(self._objects[reference["object"]]["class"])

    def fill(self, reference: dict[str, int], made: Any) -> None:
        """Let ``made`` be the object that a reference refers to, and set its attributes."""
        index = reference["object"]
        self._made[index] = made
        state = self._objects[index]["state"]
        _set_state(made, {name: self._attribute(made, name, item) for name, item in state.items()})

    def _attribute(self, made: Any, name: str, tree: Any) -> Any:
        stable = f"{name}_stable"
        return getattr(made, stable) if tree == {"method": stable} else self.value(tree)

    def _object(self, index: int) -> Any:
        if index not in self._made:
            cls = self.class_of({"object": index})
            self.fill({"object": index}, cls.__new__(cls))
        return self._made[index]


def _require_known(cls: type, path: str) -> str:
    name = name_of(cls)
    if name is None:
        if issubclass(cls, (FunctionType, BuiltinFunctionType, MethodType, partial)):
            remedy = "in place of a function use a Module, such as nn.Tanh() for torch.tanh"
        else:
            remedy = (
                f"for a class that you trust call register_class({cls.__name__}), and again before loading; of a "
                "conditional flow save the flow itself, not what condition(...) returns"
            )
        raise ValueError(
            "a file holds plain values, tensors, and layers of this package, torch and Pyro, got "
            f"{cls.__module__}.{cls.__qualname__} at {path}; {remedy}"
        )
    return name


def _state(made: Any, path: str) -> dict[str, Any]:
    get_state = getattr(made, "__getstate__", None)  # objects have it since Python 3.11
    state = (get_state() if get_state else vars(made)) or {}
    if not isinstance(state, dict):
        raise ValueError(f"the state of an object must be a dict, got {type(state).__name__} at {path}")
    state = dict(state)
    state.pop("_compiled_call_impl", None)  # what Module.compile() leaves, for speed alone
    if isinstance(made, Transform):
        state["_inv"] = made.inv if isinstance(made, _InverseTransform) else None
        past = [name for name in state if name.startswith("_cache") and name != "_cache_size"]
        state |= {name: (None, None) if name == "_cached_x_y" else None for name in past}
    return state


def _kept_state(made: Any, state: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    """Attributes less torch's machinery, and less methods under their own names, which Pyro's ``Spline`` keeps."""
    for name, value in state.items():
        if isinstance(made, nn.Module) and name in _machinery():
            if isinstance(value, dict) and value:
                raise ValueError(f"a file cannot hold hooks, got {name} at {path}; remove them before you save")
        elif _own_method(made, value) != name:
            yield name, value


def _machinery() -> set[str]:
    return set(vars(nn.Module())) - {"training", "_non_persistent_buffers_set", *_TABLES}


def _own_method(made: Any, value: Any) -> str | None:
    """The name of a method that an object keeps of itself."""
    is_own = isinstance(value, MethodType) and value.__self__ is made
    name: str = value.__name__ if is_own else ""
    return name if is_own and value.__func__ is getattr(type(made), name, None) else None


def _set_state(made: Any, state: dict[str, Any]) -> None:
    is_module = isinstance(made, nn.Module)
    for name, value in state.items():
        hides = callable(getattr(type(made), name, None)) and not isinstance(value, MethodType)
        if hides or name.startswith("__") or (is_module and name in _machinery()):
            raise ValueError(f"it sets {name!r} of a {type(made).__name__}, which is not a file's to set")
    if is_module:
        for table, kind in _TABLES.items():
            if any(not isinstance(item, (kind, type(None))) for item in state.get(table, {}).values()):
                raise ValueError(f"{table} of a {type(made).__name__} must hold {kind.__name__} objects")
        state = {**vars(nn.Module()), **vars(made), **state}
    set_state = getattr(made, "__setstate__", made.__dict__.update)
    set_state(state)


def _as_saved(tensor: Tensor, is_parameter: bool, needs_grad: bool, device: str | torch.device) -> Tensor:
    tensor = tensor.to(device)
    return nn.Parameter(tensor, needs_grad) if is_parameter else tensor.requires_grad_(needs_grad)
