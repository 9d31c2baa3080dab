"""Three ways to get a wrong answer from an ``AutoContinuous`` guide without an error, made errors here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous, initialization
from torch import Tensor
from torch.distributions import Distribution, biject_to, register_kl, transform_to

from pyro_affine.random_state import seeded
from pyro_affine.traces import require_whole_plates

_SHIFTS = (0.5, 0.1, 0.01)  # how far the latents are moved for a second look, in unconstrained space


def init_to_median(site: Any) -> Tensor:
    """Pyro's ``init_to_median``; 0 in unconstrained space for an ``ImproperUniform``, which cannot be sampled."""
    try:
        return initialization.init_to_median(site)  # type: ignore[no-any-return]
    except NotImplementedError:
        transform = transform_to(site["fn"].support)
        value: Tensor = transform(torch.zeros(transform.inverse_shape(site["fn"].shape())))
        return value


def require_fixed_supports(guide: AutoContinuous, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Run the model at other values of its latents, and compare the supports with those that the guide keeps.

    Args:
        guide: set up.
        args, kwargs: arguments of the model.

    Raises:
        ValueError: if the support of a site is another one, as that of b in a ~ Uniform(0, 1), b ~ Uniform(0, 1 - a).
    """
    found = _second_look(guide, args, kwargs)
    for site, _ in guide._unpack_latent(guide._init_loc()):
        name = site["name"]
        if name in found and not _agree(site, found[name]):
            raise ValueError(
                f"the support of a site must not depend on other latents, got site '{name}' with another support at "
                "other values of the latents: the guide would use the support of one draw for all. Sample it on a "
                "fixed support and transform it, such as fraction ~ Uniform(0, 1) and (1 - a) * fraction in place of "
                "Uniform(0, 1 - a)"
            )


def _second_look(guide: AutoContinuous, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Sites of the model at moved latents; none if it refuses all, or does not run there."""
    loc = guide._init_loc()
    for shift in _SHIFTS:
        with seeded(0), torch.no_grad(), poutine.block():
            values = {
                site["name"]: biject_to(site["fn"].support)(value)
                for site, value in guide._unpack_latent(loc + shift * torch.randn_like(loc))
            }
            try:
                trace = poutine.trace(poutine.condition(guide.model, data=values)).get_trace(*args, **kwargs)
                return dict(trace.nodes)
            except Exception:  # whatever the model raises away from its initial values is no matter of supports
                continue
    return {}


def _agree(first: Any, second: Any) -> bool:
    """Whether two sites have one support."""
    maps = biject_to(first["fn"].support), biject_to(second["fn"].support)
    shape = maps[0].inverse_shape(first["fn"].shape())
    if maps[1].inverse_shape(second["fn"].shape()) != shape:
        return True  # a plate that subsamples, say: not for this check
    one, other = (transform(first["value"].new_full(shape, 0.3)) for transform in maps)
    return torch.allclose(one, other, rtol=1e-4, equal_nan=True)


class ConstrainedDelta(dist.Delta):
    """A ``Delta`` whose ``log_density`` is the Jacobian of a constraint."""


def constrained_sites(guide: AutoContinuous) -> tuple[str, ...]:
    """Names of the sites of a guide that is set up whose constraint has a Jacobian.

    >>> import pyro
    >>> from pyro.infer.autoguide import AutoDiagonalNormal
    >>> guide = AutoDiagonalNormal(lambda: (pyro.sample("a", dist.Normal(0, 1)), pyro.sample("b", dist.Gamma(1, 1))))
    >>> _ = guide()
    >>> constrained_sites(guide)
    ('b',)
    """
    names = []
    for site, value in guide._unpack_latent(torch.full_like(guide._init_loc(), 0.3)):
        transform = biject_to(site["fn"].support)
        if transform.log_abs_det_jacobian(value, transform(value)).ne(0).any():
            names.append(site["name"])
    return tuple(names)


class ConstraintMarker(poutine.messenger.Messenger):
    """Context in which the ``Delta`` of each of some sites becomes a ``ConstrainedDelta``.

    Args:
        names: of the sites.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self._names = names

    def _pyro_sample(self, message: Any) -> None:
        fn = message["fn"]
        if message["name"] in self._names and type(fn) is dist.Delta:
            message["fn"] = ConstrainedDelta(fn.v, fn.log_density, fn.event_dim)


class CheckedGuide(AutoContinuous):
    """A guide that refuses a model to which it would give a wrong answer: at the first call, and at each after it."""

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        require_whole_plates(self._cond_indep_stacks)
        require_fixed_supports(self, args, kwargs)
        self._constrained = constrained_sites(self)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """A draw of each latent site, as of any autoguide."""
        if self.prototype_trace is None:
            try:
                self._setup_prototype(*args, **kwargs)
            except BaseException:
                self.prototype_trace = None  # else the next call would go on with half a guide
                raise
        with ConstraintMarker(self._constrained):
            return super().forward(*args, **kwargs)  # type: ignore[no-any-return]


@register_kl(ConstrainedDelta, Distribution)  # type: ignore[untyped-decorator]
def _refuse(first: ConstrainedDelta, second: Distribution) -> Tensor:
    raise ValueError(
        "TraceMeanField_ELBO drops the Jacobian of the constraints of an AutoContinuous guide, so its loss would be "
        "wrong; use Trace_ELBO"
    )
