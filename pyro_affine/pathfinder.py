"""Gaussians along an ascent to a mode, of which the best by ELBO is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_affine.gaussian import Gaussian, ValueAndScore

_SUFFICIENT = 1e-4  # share of the rise that the slope promises, as in every line search since Armijo (1966)
_INCREDIBLE = 1e6  # times that rise: a density that rises more is a matter of rounding
_FLAT = 1e-6  # nats that a Newton step would still gain: the end of a path
_LEAST_DAMPING = 1e-6  # share of the largest curvature that is added to each, ten times more after each failure
_LOG_ROOT_2_PI = 0.5 * math.log(2 * math.pi)
_PROBE_EVERY = 10  # iterations after which H is taken from differences again


class Path:
    """An ascent by quasi-Newton steps, with the Gaussian of highest ELBO that it has met.

    At a point z with score g and an estimate H of the inverse of the negative Hessian, the Gaussian has mean z + H g
    and covariance H. H comes from differences of the score where the path starts, and from BFGS updates then. All
    that a step wants to know, several lengths along H g and a few draws of the Gaussian, is asked for in one batch.

    Args:
        point: where it starts. Shape: (D,).
        value: log-density there, in nats; finite.
        score: gradient there. Shape: (D,).

    Attributes:
        best: the Gaussian with the highest ELBO so far, or None.
        best_elbo: that ELBO, a rough one.
        evidence: log of the integral of the density by the last Gaussian (Laplace), in nats: it does not rise on the
            way into a peak without end, as that of a hierarchical scale of 0 is, where the log-density does.
        inverse: H. Shape: (D, D).
        is_fresh: whether H is no more than a guess.
        damping: share of the largest curvature that is added to all of them when H is taken anew.
        done: whether it cannot rise any more.

    Source: Pathfinder: Parallel quasi-Newton variational inference (Zhang et al., 2022), with a dense matrix.
    """

    def __init__(self, point: Tensor, value: float, score: Tensor) -> None:
        self.point, self.value, self.score = point, value, score
        self.best: Gaussian | None = None
        self.best_elbo = self.evidence = -math.inf
        self.inverse = self._first_inverse()
        self.damping, self.is_fresh, self.done = 0.0, True, False

    def _first_inverse(self) -> Tensor:
        """So that a first step is no longer than 1."""
        length = self.score.norm().clamp(min=1.0)
        inverse: Tensor = torch.eye(len(self.point), dtype=self.point.dtype, device=self.point.device) / length
        return inverse

    def probes(self, spacing: float) -> tuple[Tensor, Tensor]:
        """Points to both sides of the present one, and how far off they are. Shapes: (2 D, D), (D,)."""
        distance = spacing * self.point.abs().clamp(min=1.0)
        return torch.cat([self.point + distance.diag(), self.point - distance.diag()]), distance

    def learn_curvature(self, scores: Tensor, distance: Tensor) -> None:
        """Take H from the scores at the probes; directions that curve the wrong way count as if they did not.

        Where that has failed to give a rise, all count as more curved, so that flat ones do not lead too far away.
        """
        above, below = scores.tensor_split(2)
        hessian = (below - above) / (2 * distance[:, None])
        if not hessian.isfinite().all():
            return
        values, vectors = torch.linalg.eigh((hessian + hessian.T) / 2)
        values = values.abs() + max(self.damping, 1e-10) * float(values.abs().max()) + 1e-300
        self.inverse = (vectors / values) @ vectors.T
        self.is_fresh = False

    def gaussian(self) -> Gaussian | None:
        """The Gaussian here; None where H is not positive definite any more, by rounding."""
        scale_tril, failed = torch.linalg.cholesky_ex(self.inverse)
        return None if failed else Gaussian(self.point + self.inverse @ self.score, scale_tril)

    def step(self, values: Tensor, scores: Tensor, points: Tensor, slopes: Tensor) -> None:
        """Move to the best of some points, if one rises enough.

        Args:
            values, scores, points: log-density, gradient and place. Shapes: (A,), (A, D), (A, D).
            slopes: rise that the gradient here promises of each. Shape: (A,).
        """
        rises = values - self.value
        allowed = scores.isfinite().all(-1) & (rises > _SUFFICIENT * slopes) & (rises < _INCREDIBLE * (1 + slopes))
        if not allowed.any():
            self.damping = max(10 * self.damping, _LEAST_DAMPING)
            self.done = self.is_fresh or self.damping > 1
            self.inverse, self.is_fresh = self._first_inverse(), True
            return
        index = int(torch.where(allowed, rises, -math.inf).argmax())
        self._update(points[index] - self.point, self.score - scores[index])
        self.point, self.value, self.score = points[index], float(values[index]), scores[index]
        self.damping *= 0.1 if self.damping > _LEAST_DAMPING else 0.0
        self.done = 0.5 * float(self.score @ self.inverse @ self.score) < _FLAT

    def _update(self, move: Tensor, change: Tensor) -> None:
        """The BFGS update: H (score here - score there) = move from now on."""
        curvature = move @ change
        if not curvature > 1e-10 * move.norm() * change.norm():
            return
        if self.is_fresh:
            self.inverse = torch.eye(len(move)).to(move) * (curvature / change.square().sum())
            self.is_fresh = False
        weighted = self.inverse @ change
        outer = torch.outer(move, weighted)
        gain = (1 + change @ weighted / curvature) / curvature
        self.inverse = self.inverse + gain * torch.outer(move, move) - (outer + outer.T) / curvature


def climb(
    starts: Tensor,
    density: ValueAndScore,
    *,
    step_sizes: Sequence[float],
    num_draws: int,
    spacing: float | None,
    may_go_on: Callable[[int, float, float], bool],
) -> list[Path]:
    """Paths from several starts, in step so that each iteration is one batch.

    Args:
        starts: shape (K, D); those without a density are left out.
        density: log-density and score.
        step_sizes: lengths to try, 1 being a Newton step.
        num_draws: draws for the ELBO of each Gaussian.
        spacing: relative distance of the differences that the first H is taken from; None to start from the
            identity, where 2 D scores a path are too many.
        may_go_on: from the number of iterations done, the highest ELBO so far and the highest evidence now to whether
            to make one more.

    Returns:
        The paths; empty if no start has a density.
    """
    values, scores = density(starts)
    usable = values.isfinite() & scores.isfinite().all(-1)
    paths = [Path(*entry) for entry in zip(starts[usable], values[usable].tolist(), scores[usable], strict=True)]
    noise = torch.randn(num_draws, starts.shape[1], dtype=starts.dtype, device=starts.device)
    sizes = torch.tensor(step_sizes, dtype=starts.dtype, device=starts.device)[:, None]
    iteration = 0
    while active := [path for path in paths if not path.done]:
        if not may_go_on(iteration, max(path.best_elbo for path in paths), max(path.evidence for path in paths)):
            break
        if spacing is not None:
            _probe([path for path in active if path.is_fresh or iteration % _PROBE_EVERY == 0], density, spacing)
        _advance(active, density, sizes, noise)
        iteration += 1
    return paths


def _probe(paths: list[Path], density: ValueAndScore, spacing: float) -> None:
    if not paths:
        return
    probes = [path.probes(spacing) for path in paths]
    _, scores = density(torch.cat([points for points, _ in probes]))
    for path, (_, distance), own in zip(paths, probes, scores.tensor_split(len(paths)), strict=True):
        path.learn_curvature(own, distance)


def _advance(paths: list[Path], density: ValueAndScore, sizes: Tensor, noise: Tensor) -> None:
    gaussians = [path.gaussian() for path in paths]
    directions = [path.inverse @ path.score for path in paths]
    points = [path.point + sizes * direction for path, direction in zip(paths, directions, strict=True)]
    draws = [noise[:0] if gaussian is None else gaussian.draws(noise) for gaussian in gaussians]
    rows = [part for pair in zip(points, draws, strict=True) for part in pair]
    values, scores = (pieces.split([len(part) for part in rows]) for pieces in density(torch.cat(rows)))
    for index, (path, gaussian) in enumerate(zip(paths, gaussians, strict=True)):
        if gaussian is not None:
            elbo = float(gaussian.log_weights(values[2 * index + 1], noise).mean())
            path.evidence = path.value + float((gaussian.scale.log() + _LOG_ROOT_2_PI).sum())
            if elbo > path.best_elbo:  # never where it is NaN
                path.best, path.best_elbo = gaussian, elbo
        slopes = sizes[:, 0] * (path.score @ directions[index])
        path.step(values[2 * index], scores[2 * index], points[index], slopes)
