"""What a saved guide keeps of its model: not the code, but enough to know the model again.

A file holds the latents in the order in which they lie in the guide's vector: name, shape, support, and the value
where the guide was set up. From a model, and these, a guide is set up again and refused if a latent differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any

from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor, nn
from torch.distributions import Transform
from torch.distributions.constraints import Constraint

from pyro_affine.known_classes import register_class
from pyro_affine.random_state import seeded

# What Pyro's guides know of the model and of where they stand; made anew from the model given at loading.
_FROM_MODEL = (
    *("_model", "create_plates", "prototype_trace", "_prototype_frames", "_unconstrained_shapes", "plates"),
    *("_cond_indep_stacks", "master", "_pyro_name", "_pyro_context", "_pyro_samples"),
)


@register_class
class NotSaved:
    """Stands in a loaded guide for a function among its options, which a file cannot hold.

    Args:
        path: where it stood.
        function: its name.
    """

    def __init__(self, path: str, function: str) -> None:
        self.path, self.function = path, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raise a ValueError."""
        raise ValueError(
            f"{self.path} was the function {self.function} when the guide was saved, and files hold no functions; "
            "set it again"
        )

    def __repr__(self) -> str:
        return f"NotSaved({self.function})"


def guide_state(guide: AutoContinuous) -> dict[str, Any]:
    """Attributes of a guide less those that come from the model; functions among them become ``NotSaved``.

    Raises:
        ValueError: if the guide has not been set up.
    """
    if guide.prototype_trace is None:
        raise ValueError("save takes a guide that has been set up, got a new one; call guide(*args) once, or fit it")
    return {k: _without_functions(v, f"guide.{k}") for k, v in vars(guide).items() if k not in _FROM_MODEL}


def guide_sites(guide: AutoContinuous) -> list[dict[str, Any]]:
    """The latents of a guide that has been set up, in the order of its vector."""
    trace: Any = guide.prototype_trace
    return [
        {
            "name": name,
            "shape": tuple(site["value"].shape),
            "unconstrained shape": tuple(guide._unconstrained_shapes[name]),
            "support": _described(site["fn"].support),
            "start": site["value"].detach(),
        }
        for name, site in trace.iter_stochastic_nodes()
    ]


def guide_from_model(
    cls: Any,
    model: Callable[..., Any],
    sites: Sequence[Mapping[str, Any]],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> AutoContinuous:
    """A guide of a class that knows the model and nothing else, for the state of a file to be set.

    The model is run once, with its latents at the values that the file gives; the random state stays as it was.

    Raises:
        ValueError: naming the latent in which the model is not that of ``sites``.
    """
    guide: AutoContinuous = cls.__new__(cls)
    starts = {site["name"]: site["start"] for site in sites}
    AutoContinuous.__init__(guide, model, init_loc_fn=partial(_start, starts))
    with seeded(0):
        AutoContinuous._setup_prototype(guide, *args, **kwargs)
    _require_same(sites, guide_sites(guide))
    return guide


def _start(starts: Mapping[str, Tensor], site: Mapping[str, Any]) -> Tensor:
    start = starts.get(site["name"])
    if start is not None and start.shape == site["fn"].shape():
        return start
    value: Tensor = init_to_median(site)
    return value


def _require_same(saved: Sequence[Mapping[str, Any]], given: Sequence[Mapping[str, Any]]) -> None:
    for index, (old, new) in enumerate(zip_longest(saved, given, fillvalue={"name": None})):
        for what in ("name", "shape", "unconstrained shape", "support"):
            if old[what] != new[what]:
                latent = f"latent {index}" if what == "name" else f"site {old['name']!r}"
                raise ValueError(
                    f"the model must be the one that the guide was fitted to, but the {what} of {latent} is "
                    f"{old[what]} in the file and {new[what]} in the model; pass that model and its arguments"
                )


def _described(support: Any) -> str:
    """Name and bounds of a support; of many bounds the least and the greatest, to six digits."""
    if isinstance(support, Tensor) and support.numel() > 1:
        return f"{support.min().item():.6g} to {support.max().item():.6g}"
    if isinstance(support, Tensor):
        return ", ".join(f"{bound:.6g}" for bound in support.flatten().tolist())
    if isinstance(support, Constraint):
        return f"{type(support).__name__.strip('_')}({', '.join(map(_described, vars(support).values()))})"
    return f"{support:.6g}" if isinstance(support, float) else str(support)


def _without_functions(value: Any, path: str) -> Any:
    if type(value) in (list, tuple):
        return type(value)(_without_functions(item, f"{path}[{index}]") for index, item in enumerate(value))
    if type(value) is dict:
        return {key: _without_functions(item, f"{path}[{key!r}]") for key, item in value.items()}
    if not callable(value) or isinstance(value, (type, nn.Module, Transform, Constraint, NotSaved)):
        return value
    return NotSaved(path, getattr(value, "__qualname__", type(value).__name__))
