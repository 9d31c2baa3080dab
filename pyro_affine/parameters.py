"""The parameters that a model and a guide meet, as Pyro finds them, with the traps of its param store avoided."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pyro
from pyro import poutine
from torch import Tensor, nn


class ParameterFinder:
    """Finds the parameters of Pyro programs; made before the programs first run.

    Pyro keeps parameters by name, and two guides of a class have the same names. A second guide then either takes
    over the parameters of the first (a warning says so), or runs on its own while Pyro trains those of the first:
    such left-over entries of the store give way to the guide's own.

    Args:
        programs: model and guide, by the name that their parameters get in messages and checkpoints.
    """

    def __init__(self, programs: Mapping[str, Callable[..., Any]]) -> None:
        self.modules = {name: p for name, p in programs.items() if isinstance(p, nn.Module)}
        self._in_store = {id(value) for _, value in pyro.get_param_store().named_parameters()}
        own = [p for module in self.modules.values() for p in module.parameters()]
        self._own_before = {id(p) for p in own}
        self._frozen = [p for p in own if not p.requires_grad]

    def find(self, run: Callable[[], Any]) -> dict[str, Tensor]:
        """The unconstrained parameters that a run meets and that require a gradient, by name."""
        met = _met(run)
        own = self._own_by_store_name()
        left_over = [name for name in met if own.get(_plain(name), met[name]) is not met[name]]
        if left_over:
            for name in left_over:
                del pyro.get_param_store()[name]
            met = _met(run)
        for parameter in self._frozen:  # Pyro's store has set it to require a gradient
            parameter.requires_grad_(False)
        self._warn_of_taken_over(met)
        names = self._own_names()
        return {names.get(id(value), name): value for name, value in met.items() if value.requires_grad}

    def _own_names(self) -> dict[int, str]:
        modules = self.modules.items()
        return {
            id(value): f"{prefix}.{name}" for prefix, module in modules for name, value in module.named_parameters()
        }

    def _own_by_store_name(self) -> dict[str, Tensor]:
        """Parameters of the modules under the names that Pyro's store has for them."""
        return {
            f"{module._pyro_name}.{name.removesuffix('_unconstrained')}": value
            for module in self.modules.values()
            if isinstance(module, pyro.nn.PyroModule)
            for name, value in module.named_parameters()
        }

    def _warn_of_taken_over(self, met: dict[str, Tensor]) -> None:
        own = self._own_names()
        old = self._in_store - self._own_before
        taken_over = [name for name, value in met.items() if id(value) in old and id(value) in own]
        if taken_over:
            warnings.warn(
                f"the guide took over {len(taken_over)} parameters from Pyro's param store, {taken_over[0]} the first: "
                "it starts from them, and an earlier guide of the same class now shares them. For a fresh start call "
                "pyro.clear_param_store() before making a guide; guides fitted before keep their weights.",
                stacklevel=4,
            )


def _met(run: Callable[[], Any]) -> dict[str, Tensor]:
    with poutine.trace(param_only=True) as capture:
        run()
    sites = capture.trace.nodes.items()
    values: dict[str, Any] = {name: site["value"] for name, site in sites if site["type"] == "param"}
    return {name: value.unconstrained() for name, value in values.items()}


def _plain(name: str) -> str:
    """A name in the store without Pyro's mark of where a module begins."""
    return name.replace("$$$", ".")
