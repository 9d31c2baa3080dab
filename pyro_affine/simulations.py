"""Draws of latents and data from a model's prior: many at once where the model allows it, kept on disk if asked."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to

from pyro_affine.particles import first_success
from pyro_affine.random_state import new_seed, seeded
from pyro_affine.replay import Replay
from pyro_affine.support_check import _agree
from pyro_affine.traces import (
    Lanes,
    Rows,
    Site,
    is_data,
    is_delta,
    is_deterministic,
    read_log_prob,
    require_whole_plates,
    sample_sites,
    value_reader,
)

_NUM_PROBES = 5  # runs that must agree in their sites and supports
_CHUNK = 1000  # simulations in a file


@dataclass(frozen=True)
class Simulations:
    """Latents of the prior and the data that the model made of them, row by row.

    Args:
        latents: values by site. Shape of each: (N,) + shape of the site.
        data: values of the observed sites, likewise.

    >>> len(Simulations({"loc": torch.zeros(4)}, {"y": torch.zeros(4, 2)})[:3])
    3
    """

    latents: Rows
    data: Rows

    def __len__(self) -> int:
        return len(next(iter(self.latents.values())))

    def __getitem__(self, rows: slice | Tensor) -> Simulations:
        """Some of the rows."""
        return Simulations(*({name: x[rows] for name, x in part.items()} for part in (self.latents, self.data)))


class Simulator:
    """A Pyro model as a source of pairs of latents and data.

    Args:
        model: a Pyro model; data that it observes are drawn instead.
        observed: names of the sites that will be known, ``pyro.deterministic`` ones too.
        latents: names of the sites that are wanted; all continuous ones by default. The rest are averaged over.
        args, kwargs: arguments of the model.

    Attributes:
        latents, observed: names, in the order of the model.
        averaged: names of the sites that are drawn and forgotten.
        sites: every sample site of one run, by name.
        program: the model, with what it observes drawn.
        probes: traces of a few runs.

    Raises:
        ValueError: naming the site: one that the model has not, a discrete latent, one whose support depends on other
            latents, one in a plate that subsamples, one that is not in every run or changes its shape.

    >>> import pyro, pyro.distributions as dist
    >>> def model():
    ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("rows", 3):
    ...         pyro.sample("y", dist.Normal(loc, 1.0))
    >>> simulations = Simulator(model, ["y"]).draw(100, seed=0)
    >>> simulations.latents["loc"].shape, simulations.data["y"].shape
    (torch.Size([100]), torch.Size([100, 3]))
    """

    def __init__(
        self,
        model: Callable[..., Any],
        observed: Sequence[str],
        latents: Sequence[str] | None = None,
        *,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.args, self.kwargs = args, kwargs or {}
        self.program = _Draw(observed)(model)
        with seeded(0), torch.no_grad():
            self.probes = [first_success(self._trace) for _ in range(_NUM_PROBES)]
        self.sites = sample_sites(self.probes[0])
        _require_sites("observed", observed, self.sites)
        free = [name for name, site in self.sites.items() if not site["is_observed"] and name not in observed]
        _require_sites("latents", free if latents is None else latents, {name: self.sites[name] for name in free})
        self.observed = [name for name in self.sites if name in observed]
        self.latents = [name for name in free if latents is None or name in latents]
        self.averaged = [name for name in free if name not in self.latents]
        self._check_sites()

    @property
    def has_likelihood(self) -> bool:
        """Whether the model's log-density of latents and data is known: no site averaged over, no black box."""
        black_boxes = [self.sites[name] for name in self.observed if _is_black_box(self.sites[name])]
        return not (self.averaged or black_boxes)

    def draw(
        self,
        num_simulations: int,
        *,
        seed: int | None = None,
        at_once: bool | None = None,
        path: str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> Simulations:
        """Pairs of latents and data.

        Args:
            num_simulations: how many; runs at which the model raises a numerical error are left out, with a warning.
            seed: of the draws; None for torch's own random numbers.
            at_once: whether to run many in a plate to the left of the model's own. None to find out, by comparing
                log-densities and deterministic sites with those of single runs.
            path: folder of files of 1000 simulations each. What is there already is read, not simulated again.
            progress: whether to show a progress bar for work of more than two seconds.

        Raises:
            ValueError: if fewer than 1 are asked for, or the files are of other sites or another seed.
        """
        if num_simulations < 1:
            raise ValueError(f"num_simulations must be 1 or more, got {num_simulations}")
        at_once = self.allows_many() if at_once is None else at_once
        if path is None:
            with seeded(seed):
                return self.complete({}, num_simulations, at_once=at_once, progress=progress)
        folder, pieces = Path(path), []
        seed = self._recorded_seed(folder, seed)
        for index in range(-(-num_simulations // _CHUNK)):
            file = folder / f"simulations-{index:06d}.pt"
            if not file.exists():
                with seeded((seed + index) % 2**63):
                    piece = self.complete({}, _CHUNK, at_once=at_once, progress=progress)
                _save({"latents": piece.latents, "data": piece.data}, file)
            pieces.append(Simulations(**_load(file)))
        return join(pieces)[:num_simulations]

    def complete(self, values: Rows, num_simulations: int, *, at_once: bool, progress: bool) -> Simulations:
        """Simulations with these values of some sites, such as latents; see ``draw``."""
        call: dict[str, Any] = {"args": self.args, "kwargs": self.kwargs, "progress": progress}
        replay = Replay(self.program, values, num_draws=num_simulations, **call)
        wanted = {name: self.sites[name] for name in (*self.latents, *self.observed)}
        rows, failures = replay.collect(value_reader(wanted), at_once=at_once)
        if failures:
            warnings.warn(
                f"the model raised an error in {len(failures)} of {num_simulations} runs, which are left out, so the "
                f"prior is cut to where it runs; first error: {next(iter(failures.values()))}",
                stacklevel=4,
            )
        kept = torch.tensor([index not in failures for index in range(num_simulations)])
        rows = {name: value[kept.to(value.device)] for name, value in rows.items()}
        return Simulations(*({name: rows[name] for name in names} for names in (self.latents, self.observed)))

    def allows_many(self) -> bool:
        """Whether log-densities and deterministic sites of runs in a plate are those of single runs; else a warning."""
        if any(_shapes(sample_sites(trace)) != _shapes(self.sites) for trace in self.probes):
            warnings.warn(
                "the model cannot be run at many draws at once (its sites or their shapes differ from run to run); "
                "running it draw by draw",
                stacklevel=4,
            )
            return False
        drawn = [name for name, site in self.sites.items() if not is_deterministic(site)]
        values: Rows = {name: torch.stack([trace.nodes[name]["value"] for trace in self.probes]) for name in drawn}
        fixed = value_reader({name: site for name, site in self.sites.items() if is_deterministic(site)})

        def read(trace: Any, lanes: Lanes) -> Rows:
            return read_log_prob(trace, lanes) | fixed(trace, lanes)

        call: dict[str, Any] = {"args": self.args, "kwargs": self.kwargs, "progress": False}
        return Replay(self.program, values, num_draws=_NUM_PROBES, **call).allows(read)

    def _trace(self) -> Any:
        return poutine.trace(self.program).get_trace(*self.args, **self.kwargs)

    def _check_sites(self) -> None:
        for name in (*self.latents, *self.observed):
            found = [sample_sites(trace).get(name) for trace in self.probes]
            if any(site is None or site["value"].shape != self.sites[name]["value"].shape for site in found):
                raise ValueError(
                    f"each run must have the same sites of the same shapes, got site '{name}' missing or of another "
                    "shape in some run; let the model fill it up to the largest shape, with NaN where there is nothing"
                )
            require_whole_plates({name: self.sites[name]["cond_indep_stack"]})
        others = [name for name, site in self.sites.items() if site["is_observed"] and not is_deterministic(site)]
        if others:
            raise ValueError(
                f"every site that the model conditions on must be in observed, got {others} left; simulations from the "
                "prior cannot honour it: add it to observed, or move what it says into the prior"
            )
        for name in self.latents:
            _check_support(name, [trace.nodes[name] for trace in self.probes])

    def _recorded_seed(self, folder: Path, seed: int | None) -> int:
        """The seed that the files of a folder began with; the first call writes it, with the sites."""
        file = folder / "sites.pt"
        shapes = _shapes({name: self.sites[name] for name in (*self.latents, *self.observed)})
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            _save({"shapes": shapes, "seed": new_seed() if seed is None else seed}, file)
        found = _load(file)
        if found["shapes"] != shapes or seed not in (None, found["seed"]):
            raise ValueError(
                f"the files in {folder} must be of this model and seed, got sites {found['shapes']} and seed "
                f"{found['seed']} where {shapes} and {seed} are wanted; use another folder, or delete this one"
            )
        return int(found["seed"])


class _Draw(Messenger):
    """Draws some sites, also where the model observes them."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self._names = frozenset(names)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self._names and is_data(msg):
            msg["is_observed"], msg["value"], msg["done"] = False, None, False


def _require_sites(argument: str, names: Sequence[str], sites: dict[str, Site]) -> None:
    if isinstance(names, str) or not names:
        raise ValueError(f"{argument} must be a sequence of names of sites, got {names!r}; write ('y',) for one")
    unknown = [name for name in names if name not in sites]
    if unknown:
        raise ValueError(f"{argument} must name sites of the model, got {unknown}; it has {sorted(sites)}")


def _shapes(sites: dict[str, Site]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(site["value"].shape) for name, site in sites.items()}


def _is_black_box(site: Site) -> bool:
    """Whether the density of a site is not known: the output of a simulator."""
    return is_deterministic(site) or is_delta(site["fn"])


def _check_support(name: str, found: list[Site]) -> None:
    support = found[0]["fn"].support
    if support.is_discrete:
        raise ValueError(
            f"a latent must be continuous, got the discrete site '{name}'; leave it out of latents=, and it is "
            "averaged over, or make it a continuous one"
        )
    try:
        biject_to(support)
    except NotImplementedError as error:
        raise ValueError(
            f"a latent must have a support that maps to unconstrained numbers one to one, got site '{name}' on "
            f"{support}; for a covariance matrix sample scales and LKJCholesky, and multiply them"
        ) from error
    if not all(_agree(found[0], other) for other in found[1:]):
        raise ValueError(
            f"the support of a latent must not depend on other latents, got site '{name}' with another support in "
            "each run; sample it on a fixed support and transform it, such as fraction ~ Uniform(0, 1) and "
            "(1 - a) * fraction in place of Uniform(0, 1 - a)"
        )


def join(pieces: Sequence[Simulations]) -> Simulations:
    """Several sets of simulations of the same sites as one."""
    latents = {name: torch.cat([piece.latents[name] for piece in pieces]) for name in pieces[0].latents}
    return Simulations(latents, {name: torch.cat([piece.data[name] for piece in pieces]) for name in pieces[0].data})


def _save(content: dict[str, Any], file: Path) -> None:
    temporary = file.with_suffix(".writing")
    torch.save(content, temporary)
    os.replace(temporary, file)  # whole or not at all


def _load(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = torch.load(file, weights_only=True)
    except Exception as error:  # torch raises what the torn bytes lead it to
        raise ValueError(f"{file} is damaged; delete it, and it is simulated again ({error})") from error
    return content
