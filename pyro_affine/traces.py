"""What can be read from a Pyro trace of one draw, or of many draws in a plate to the left of all others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import Delta, MaskedDistribution
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor

__all__ = [
    "BAD_DRAW",
    "LOG_PROB",
    "Lanes",
    "Reader",
    "Rows",
    "Site",
    "batch_depth",
    "draws_at_once",
    "first_line",
    "has_density",
    "is_data",
    "is_delta",
    "is_deterministic",
    "is_random_subsample",
    "pointwise_log_prob",
    "pointwise_reader",
    "read_log_prob",
    "require_whole_plates",
    "sample_sites",
    "value_reader",
]

Rows = dict[str, Tensor]  # the leading axis of every tensor is the draw
Site = Any  # a node of a trace: a dict of its name, distribution "fn", value, and so on

LOG_PROB = "__log_prob__"  # key of a log-density among tensors named by site
# What a draw far out makes a model raise. Other errors are for the user to see at once.
BAD_DRAW = (ValueError, ArithmeticError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]
_MAX_ENTRIES = 10_000_000  # of all sites together in one run: 80 MB in float64


def first_line(error: Exception) -> str:
    """First line of an error's message, or its name where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


@dataclass(frozen=True)
class Lanes:
    """Where the draws lie in a trace.

    Args:
        num_draws: number of draws in the trace.
        nesting: number of batch dimensions of the program itself; the draws are the next one to the left.
            None for a trace of one draw, which has no such dimension.

    >>> Lanes(5, nesting=2).place(torch.zeros(5, 3), event_dim=1).shape
    torch.Size([5, 1, 1, 3])
    """

    num_draws: int
    nesting: int | None = None

    def place(self, value: Tensor, event_dim: int) -> Tensor:
        """Value for a site, from (num_draws, *batch, *event) to (num_draws, 1, ..., 1, *batch, *event)."""
        if self.nesting is None:
            return value[0]
        gap = self.nesting - (value.dim() - 1 - event_dim)
        return value.reshape(value.shape[:1] + (1,) * gap + value.shape[1:])

    def stack(self, value: Tensor, shape: torch.Size) -> Tensor:
        """Value of a site whose shape for one draw is ``shape``, as (num_draws, *shape)."""
        if value.numel() == shape.numel():  # the same for all draws
            return value.reshape(shape).expand(self.num_draws, *shape)
        return value.reshape(self.num_draws, *shape)

    def total(self, log_prob: Tensor) -> Tensor:
        """Sum over all but the draws, in float64, shape (num_draws,)."""
        terms = log_prob.to(torch.float64)
        if self.nesting is None or terms.dim() <= self.nesting:
            return terms.sum().expand(self.num_draws)
        if terms.dim() > self.nesting + 1:
            raise RuntimeError(f"log_prob has {terms.dim()} dimensions where {self.nesting + 1} were planned")
        return (terms.flatten(1).sum(1) if terms.dim() > 1 else terms).expand(self.num_draws)


Reader = Callable[[Any, Lanes], Rows]


def sample_sites(trace: Any) -> dict[str, Site]:
    """Sample sites of a trace by name: latent, observed and deterministic ones, not the indices of plates."""
    nodes = trace.nodes.items()
    return {name: site for name, site in nodes if site["type"] == "sample" and not site_is_subsample(site)}


def is_deterministic(site: Site) -> bool:
    """Whether a site was made by ``pyro.deterministic``."""
    return bool(site["infer"].get("_deterministic"))


def is_data(site: Site) -> bool:
    """Whether a site is observed, and made neither by ``pyro.deterministic`` nor by ``pyro.factor``."""
    return bool(site["is_observed"]) and not is_deterministic(site) and not site_is_factor(site)


def is_delta(fn: Any) -> bool:
    """Whether a distribution is a point, whatever is wrapped around it."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, Delta)


def is_random_subsample(site: Site) -> bool:
    """Whether a node holds the rows of a plate that takes others in each call."""
    if site["type"] != "sample" or not site_is_subsample(site) or site["is_observed"]:
        return False
    size, full_size = site["fn"].subsample_size, site["fn"].size
    return size is not None and size < full_size


def require_whole_plates(stacks: Mapping[str, Iterable[Any]]) -> None:
    """Raise a ValueError if a site has but a part of its plate, which would be mixed up with other parts.

    Args:
        stacks: the ``cond_indep_stack`` of each site.
    """
    for name, frames in stacks.items():
        for frame in frames:
            if frame.full_size is not None and frame.size < frame.full_size:
                raise ValueError(
                    f"a site must hold all of its plate, got {frame.size} of {frame.full_size} of plate {frame.name!r} "
                    f"at site {name!r}; use the whole data, or a conditional NormalizingFlow as guide of such sites"
                )


def has_density(name: str, site: Site) -> bool:
    """Whether a site counts in the log-density."""
    return not site_is_subsample(site) and not is_deterministic(site)


def batch_depth(site: Site) -> int:
    """Number of batch dimensions of a site, whether declared by plates or not."""
    frames = [-frame.dim for frame in site["cond_indep_stack"] if frame.vectorized]
    undeclared = 0 if is_deterministic(site) else len(site["fn"].batch_shape)
    return int(max([undeclared, *frames]))


def draws_at_once(trace: Any, most: int, *, most_entries: int | None = None) -> int:
    """How many draws a run should hold, of a program whose trace for one draw is given: few where its sites are large.

    >>> import pyro, pyro.distributions as dist
    >>> trace = pyro.poutine.trace(lambda: pyro.sample("y", dist.Normal(torch.zeros(10**6), 1.0)))
    >>> draws_at_once(trace.get_trace(), most=256)
    10
    """
    entries = sum(int(site["value"].numel()) for site in sample_sites(trace).values())
    return max(1, min(most, (most_entries or _MAX_ENTRIES) // max(entries, 1)))


def read_log_prob(trace: Any, lanes: Lanes) -> Rows:
    """Log-density in nats under the key ``LOG_PROB``, with scales and masks as in ``Trace.log_prob_sum``."""
    trace.compute_log_prob(site_filter=has_density)
    sites = sample_sites(trace).values()
    terms = [lanes.total(site["log_prob"]) for site in sites if not is_deterministic(site)]
    return {LOG_PROB: torch.stack(terms).sum(0)}


def value_reader(sites: dict[str, Site]) -> Reader:
    """Reader of the values of some sites, with the shapes that they have in a trace of one draw."""
    shapes = {name: site["value"].shape for name, site in sites.items()}
    return lambda trace, lanes: {name: lanes.stack(trace.nodes[name]["value"], shape) for name, shape in shapes.items()}


def pointwise_log_prob(site: Site) -> Tensor:
    """Log-density of each observation of a site, in nats, without scale, and 0 where a mask hides it.

    Shape: that of the observations; without the event dimensions of a multivariate distribution, whose
    entries have no density of their own.

    >>> from pyro.distributions import Normal
    >>> fn = Normal(torch.zeros(3), 1.0).to_event(1)
    >>> pointwise_log_prob({"fn": fn, "value": torch.zeros(3), "mask": None}).shape
    torch.Size([3])
    """
    return _masked(_entrywise(site["fn"], site["value"]), site["mask"], site["fn"])


def pointwise_reader(sites: dict[str, Site]) -> Reader:
    """Reader of ``pointwise_log_prob`` of some sites of a trace of one draw."""
    shapes = {name: pointwise_log_prob(site).shape for name, site in sites.items()}
    return lambda trace, lanes: {
        name: lanes.stack(pointwise_log_prob(trace.nodes[name]), shape) for name, shape in shapes.items()
    }


def _entrywise(fn: Any, value: Tensor) -> Tensor:
    if isinstance(fn, MaskedDistribution):
        return _masked(_entrywise(fn.base_dist, value), fn._mask, fn)
    if isinstance(fn, torch.distributions.Independent):
        return _entrywise(fn.base_dist, value)
    log_prob: Tensor = fn.log_prob(value)
    return log_prob


def _masked(log_prob: Tensor, mask: Tensor | bool | None, fn: Any) -> Tensor:
    if mask is None:
        return log_prob
    event_dims = log_prob.dim() - len(fn.batch_shape)
    where = torch.as_tensor(mask, device=log_prob.device)
    return log_prob.masked_fill(~where.reshape(where.shape + (1,) * event_dims), 0.0)
