"""A Gaussian to start a flow guide from: candidates, the choice among them by ELBO, and its refinement."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_affine.gaussian import DiagonalGaussian, Gaussian, ValueAndScore, elbos, refine, refine_diagonal
from pyro_affine.latent_density import LatentDensity
from pyro_affine.pathfinder import Path, climb

LARGEST_DENSE = 300  # latents up to which D x D matrices are no burden
_MAX_ITERATIONS, _MAX_REFINEMENTS = 100, 300
_RADIUS = 2.0  # of random starts: uniform within two units of 0, as Stan starts its chains
_SEPARATE = 5.0  # nats by which the density dips between two modes that count as two
_MANY = 60  # iterations that most ascents end within
_CHEAP = 1.5  # times the time of one ascent that many may take
_OVERDRAFT = 2.0  # allowances that a search may take, as long as it rises by a nat in five rounds
_MANY_DRAWS = 1024  # by which a Gaussian is refined where rows cost next to nothing
_FAR = 4.0  # and as long as it rises by five: training would take longer for that way
_NUM_KEPT = 4  # ascents whose Gaussians are compared


@dataclass(frozen=True)
class Effort:
    """How thorough a search is.

    Args:
        num_random_starts: ascents besides the one from the initial values.
        steps: lengths tried in each iteration of an ascent, 1 being a Newton step.
        num_draws: draws by which the Gaussians on the way are judged.
        num_scored: draws by which candidates are compared.
        climb, trials, refine: shares of the allowance for the ascents, for trials to improve their Gaussian and the
            first one, and for improving the better one.
    """

    num_random_starts: int
    steps: tuple[float, ...]
    num_draws: int
    num_scored: int
    climb: float = 0.25
    trials: tuple[float, ...] = ()
    refine: float = 0.15


# Many rows at once cost about as much as one, unless the data are many. One by one, each counts.
_THOROUGH = Effort(7, (1.0, 0.5, 2.0, 0.2, 0.05, 0.01, 1e-3, 1e-5), 8, 256, trials=(0.25, 0.3))
_SLOW = Effort(15, (1.0, 0.5, 2.0, 0.2, 0.05, 0.01, 1e-3, 1e-5), 8, 64, climb=0.6, refine=0.35)
_SLOW_FEW = replace(_SLOW, num_random_starts=7)
_SLOW_ROWS = replace(_SLOW, num_random_starts=0)
_WIDE = Effort(0, (), 0, 64, trials=(0.4, 0.4))  # no ascents where a matrix cannot be afforded
_ONE_BY_ONE = Effort(0, (1.0, 0.2, 0.01), 4, 8, refine=0.7)


class Allowance:
    """How much of the seconds and model runs of a task is spent.

    Args:
        density: what is run.
        seconds: wall-clock time from here on, or None for no limit.
        num_runs: runs of the model from here on, or None for no limit.
    """

    def __init__(self, density: LatentDensity, seconds: float | None, num_runs: int | None) -> None:
        self._density, self._seconds, self._num_runs = density, seconds, num_runs
        self._start, self._first_run = time.perf_counter(), density.num_runs

    @property
    def spent(self) -> float:
        """Share that is spent, 1 and more when all is."""
        in_time = (time.perf_counter() - self._start) / self._seconds if self._seconds else 0.0
        in_runs = (self._density.num_runs - self._first_run) / self._num_runs if self._num_runs else 0.0
        return max(in_time, in_runs)


def find_gaussian(
    density: LatentDensity,
    init_loc: Tensor,
    init_scale: float,
    *,
    seconds: float | None = None,
    num_runs: int | None = None,
) -> Gaussian:
    """The Gaussian of highest ELBO that a small budget finds.

    One rival is N(init_loc, init_scale^2 I); the other is the best on several ascents to a mode, on the way and at
    their ends. Both are refined by natural gradients, as a mode in the neck of a funnel can be far from the best
    Gaussian, and the better one by more if it has not stalled. Each choice is by ELBO on common draws.

    For more latents than ``LARGEST_DENSE``, where a matrix cannot be afforded, there are no ascents: the second
    rival is at 0 in unconstrained space, and the Gaussian has independent entries. A density that changes from call
    to call, that of a model with randomly subsampled plates, is not searched at all: N(init_loc, init_scale^2 I) is
    returned.

    Args:
        density: of the model.
        init_loc: where the guide would start by itself. Shape: (D,).
        init_scale: its standard deviation there.
        seconds: how long it should take, up to about four times that as long as it still rises; None for no limit.
        num_runs: the same in model runs, draws at once counted as one.

    Returns:
        The Gaussian, in float64; a ``DiagonalGaussian`` for many latents.

    Warns:
        RuntimeWarning: if ascents ended in modes of similar weight with a dip between them.
    """
    loc = init_loc.detach().double()
    scale = torch.full_like(loc, init_scale)
    dense = len(loc) <= LARGEST_DENSE
    start = Gaussian(loc, scale.diag()) if dense else DiagonalGaussian(loc, scale)
    if density.is_random():
        return start

    def evaluate(latents: Tensor) -> tuple[Tensor, Tensor]:
        return density.value_and_score(latents.to(init_loc))

    allowance = Allowance(density, seconds, num_runs)
    at_once = density.nesting is not None
    effort = (_THOROUGH if at_once else _ONE_BY_ONE) if dense else _WIDE
    if seconds is not None and effort is _THOROUGH:
        effort = _effort(start, evaluate, allowance)
    num_draws = _num_refined(effort, len(loc)) if at_once else 8

    def raise_elbo(gaussian: Gaussian, share: float) -> Gaussian:
        improve, end = refine if dense else refine_diagonal, allowance.spent + share
        return improve(
            gaussian,
            evaluate,
            num_draws=num_draws,
            may_go_on=lambda elbos: len(elbos) < _MAX_REFINEMENTS and allowance.spent < _limit(elbos, end),
        )

    spacing = torch.finfo(init_loc.dtype).eps ** (1 / 3) if at_once else None  # the best for central differences
    other = _ascend(start, evaluate, allowance, effort, spacing) if dense else DiagonalGaussian(0 * loc, scale)
    rivals = [start, other]
    rivals += [raise_elbo(rival, share) for rival, share in zip(rivals[::-1], effort.trials, strict=False)]
    chosen = _best(rivals, evaluate, effort.num_scored)
    return _best([chosen, raise_elbo(chosen, effort.refine)], evaluate, effort.num_scored)


def _num_refined(effort: Effort, num_latents: int) -> int:
    """Draws in each step of a refinement, where they go at once."""
    if effort is _WIDE:
        return 64
    return _MANY_DRAWS if effort is _SLOW else min(max(64, 4 * num_latents), 256)


def _effort(start: Gaussian, evaluate: ValueAndScore, allowance: Allowance) -> Effort:
    """Whether there is time for many iterations, and for many ascents at once: by what one iteration would take."""
    spent = [allowance.spent]
    for effort in (_SLOW_ROWS, _THOROUGH):
        rows = (1 + effort.num_random_starts) * (len(effort.steps) + effort.num_draws)
        evaluate(start.draws(torch.randn(rows, len(start.loc)).to(start.loc)))
        spent.append(allowance.spent)
    one, many = spent[1] - spent[0], spent[2] - spent[1]
    if many < _THOROUGH.climb / _MANY:
        return _THOROUGH
    if many < _CHEAP * one:
        return _SLOW
    return _SLOW_FEW if many < _SLOW.climb / _MANY else _SLOW_ROWS


def _ascend(
    start: Gaussian, evaluate: ValueAndScore, allowance: Allowance, effort: Effort, spacing: float | None
) -> Gaussian:
    """The best of the start and of Gaussians on the way to modes and at them."""
    highest: list[float] = []
    evidences: list[float] = []  # as ELBOs can stand still on the way through where draws go astray

    def may_go_on(iteration: int, elbo: float, evidence: float) -> bool:
        highest.append(elbo)
        evidences.append(evidence)
        most = max(_limit(values, effort.climb) for values in (highest, evidences))
        return iteration < _MAX_ITERATIONS and allowance.spent < most

    paths = climb(
        _starts(start.loc, effort.num_random_starts),
        evaluate,
        step_sizes=effort.steps,
        num_draws=effort.num_draws,
        spacing=spacing,
        may_go_on=may_go_on,
    )
    if any(path.done for path in paths):
        _warn_of_modes(paths, evaluate)
    on_the_way = sorted(paths, key=lambda path: -path.best_elbo)[:_NUM_KEPT]
    at_the_end = sorted(paths, key=lambda path: -path.evidence)[:_NUM_KEPT]
    candidates = [start, *(path.best for path in on_the_way), *(path.gaussian() for path in at_the_end)]
    return _best([candidate for candidate in candidates if candidate is not None], evaluate, effort.num_scored)


def _limit(values: list[float], usual: float) -> float:
    """Allowances that may be spent as long as values rise as they did in the last five rounds."""
    rise = values[-1] - values[-6:][0] if values and values[-1] > -math.inf else 0.0
    return max(usual, _FAR if rise > 5 and len(values) > 5 else _OVERDRAFT if rise > 1 else 0.0)


def _starts(loc: Tensor, num_random: int) -> Tensor:
    random = (2 * torch.rand(num_random, len(loc), dtype=loc.dtype, device=loc.device) - 1) * _RADIUS
    random[:1] = 0.0  # a place of its own: where positive latents are 1, and others in the middle of their range
    return torch.cat([loc[None], random])


def _best(candidates: list[Gaussian], evaluate: ValueAndScore, num_draws: int) -> Gaussian:
    loc = candidates[0].loc
    noise = torch.randn(num_draws, len(loc), dtype=loc.dtype, device=loc.device)
    scores = elbos(candidates, evaluate, noise)
    return candidates[scores.index(max(scores))]


def _warn_of_modes(paths: list[Path], evaluate: ValueAndScore) -> None:
    """Compare the path of highest ELBO with each other one of about the same, along the line between their ends."""
    best, *others = sorted((path for path in paths if path.done), key=lambda path: -path.best_elbo)
    for path in others:
        if not best.best_elbo - path.best_elbo < _SEPARATE:
            continue
        steps = torch.linspace(0, 1, 11).to(path.point)[:, None]
        values = evaluate(torch.lerp(best.point, path.point, steps))[0].nan_to_num(-math.inf)
        if min(values[0], values[-1]) - values.min() > _SEPARATE:
            warnings.warn(
                "the posterior may have more than one mode: ascents from two starts ended "
                f"{float((path.point - best.point).norm()):.3g} apart in unconstrained space, with a dip of the "
                "density between them. A flow tends to cover one mode: compare fits from several init_loc_fn",
                RuntimeWarning,
                stacklevel=5,
            )
            return
