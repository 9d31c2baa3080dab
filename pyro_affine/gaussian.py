"""Gaussians that approximate a density: their ELBO, and their refinement by natural gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# log-density and its gradient at the rows of a matrix; NaN where there is none. Shapes: (S, D) to (S,) and (S, D).
ValueAndScore = Callable[[Tensor], tuple[Tensor, Tensor]]
MayGoOn = Callable[[list[float]], bool]
_ADAM_RATE = 0.1  # in standard deviations, at the start; it falls like one over the root of the steps
_LONGEST = 3.0  # median lengths of a residual; a longer one is cut down, lest one far-out draw decides
_WIDEST_CHANGE = 4.0  # of a variance in one step, either way: a batch that says more than that is not to be trusted


@dataclass(frozen=True)
class Gaussian:
    """A Gaussian over vectors.

    Args:
        loc: mean. Shape: (D,).
        scale_tril: lower-triangular factor of the covariance. Shape: (D, D).
    """

    loc: Tensor
    scale_tril: Tensor

    @property
    def scale(self) -> Tensor:
        """Diagonal of the factor. Shape: (D,)."""
        return self.scale_tril.diagonal()

    def draws(self, noise: Tensor) -> Tensor:
        """loc + L noise for rows of standard normal noise. Shape: (S, D)."""
        return self.loc + noise @ self.scale_tril.T

    def log_weights(self, log_density: Tensor, noise: Tensor) -> Tensor:
        """log p - log q at the draws made from the noise, in nats. Shape: (S,)."""
        log_q = -0.5 * (noise.square() + math.log(2 * math.pi)).sum(-1) - self.scale.log().sum()
        return log_density - log_q


class DiagonalGaussian(Gaussian):
    """A Gaussian over vectors whose entries are independent; ``scale_tril`` holds the diagonal alone, shape (D,)."""

    @property
    def scale(self) -> Tensor:
        """Standard deviation of each entry. Shape: (D,)."""
        return self.scale_tril

    def draws(self, noise: Tensor) -> Tensor:
        """loc + scale * noise for rows of standard normal noise. Shape: (S, D)."""
        return self.loc + noise * self.scale_tril


def elbos(gaussians: Sequence[Gaussian], density: ValueAndScore, noise: Tensor) -> list[float]:
    """ELBO of each Gaussian on common noise, in nats.

    A draw without a density counts as ten nats below the lowest of that Gaussian; if more than half have none, the
    ELBO is -inf.

    >>> standard = Gaussian(torch.zeros(1), torch.eye(1))
    >>> elbos([standard], lambda z: (-0.5 * z.square().sum(-1) - 0.9189, -z), torch.ones(3, 1))
    [...]
    """
    if not gaussians:
        return []
    values, _ = density(torch.cat([gaussian.draws(noise) for gaussian in gaussians]))
    pieces = values.reshape(len(gaussians), len(noise))
    return [_mean(gaussian.log_weights(piece, noise)) for gaussian, piece in zip(gaussians, pieces, strict=True)]


def _mean(log_weights: Tensor) -> float:
    kept = log_weights.isfinite()
    if 2 * kept.sum() < len(kept):
        return -math.inf
    return float(torch.where(kept, log_weights, log_weights[kept].min() - 10.0).mean())


def refine(start: Gaussian, density: ValueAndScore, *, num_draws: int, may_go_on: MayGoOn) -> Gaussian:
    """Raise the ELBO of a Gaussian by natural gradients, until it stalls.

    With draws z = loc + L e and r = L^T grad log p(z) + e, the path gradient in units of the Gaussian, which is zero
    draw by draw where the density is that Gaussian, one step of size s goes to

        precision' = L^-T P L^-1,  P = I - s sym E[r e^T],  loc' = loc + s L P^-1 E[r].

    Draws come in pairs e, -e; draws without a density are left out. A Gaussian density is met in one step of size 1.

    Args:
        start: the Gaussian to begin with.
        density: log-density and score.
        num_draws: draws a step, even.
        may_go_on: from the ELBOs before each step so far to whether to make one more.

    Source: Conjugate-computation variational inference (Khan and Lin, 2017) for the natural gradient; Roeder et al.
    (2017) for the path gradient.
    """
    now, best, trust = start, _Best(start), 1.0
    history: list[float] = []
    largest = num_draws / (num_draws + 2 * len(start.loc))  # few draws say little of a large matrix
    while may_go_on(history) and not _stalls(history, 10):
        half = torch.randn(num_draws // 2, len(now.loc), dtype=now.loc.dtype, device=now.loc.device)
        noise = torch.cat([half, -half])
        values, scores = density(now.draws(noise))
        kept = values.isfinite() & scores.isfinite().all(-1)
        history.append(_mean(now.log_weights(values, noise)))
        fell = best.update(now, now.log_weights(values, noise)[kept])
        if kept.sum() < num_draws // 2 and not fell:
            now = Gaussian(now.loc, 0.5 * now.scale_tril)  # to where the model can be evaluated
            continue
        size = trust * largest / math.sqrt(1 + len(history) / 10)
        after = None if fell else _step(now, noise[kept], scores[kept], size)
        now, trust = (best.gaussian, 0.3 * trust) if after is None else (after, min(1.0, 1.1 * trust))
    return now


class _Best:
    """The Gaussian of the highest ELBO so far, to go back to when a step has gone wrong."""

    def __init__(self, gaussian: Gaussian) -> None:
        self.gaussian, self.elbo, self.error = gaussian, -math.inf, 0.0

    def update(self, gaussian: Gaussian, log_weights: Tensor) -> bool:
        """Take the log-weights of another; True if its ELBO is lower beyond doubt, or there is none."""
        if len(log_weights) < 2:
            return self.elbo > -math.inf
        elbo, error = float(log_weights.mean()), float(log_weights.std()) / math.sqrt(len(log_weights))
        if not elbo > self.elbo - 1 - 4 * math.hypot(error, self.error):
            return True
        if elbo > self.elbo:
            self.gaussian, self.elbo, self.error = gaussian, elbo, error
        return False


def _stalls(history: list[float], window: int) -> bool:
    """Whether the last ELBOs, as many as the window is long, are no better than as many before."""
    if len(history) < 2 * window:
        return False
    last, before = torch.tensor(history[-2 * window :], dtype=torch.float64).reshape(2, window).flip(0)
    error = math.sqrt(float(last.var() + before.var()) / window)
    return bool(last.mean() - before.mean() < max(0.005, 0.5 * error))


def _step(now: Gaussian, noise: Tensor, scores: Tensor, size: float) -> Gaussian | None:
    """The next Gaussian; None if it has no covariance, by rounding."""
    residuals = scores @ now.scale_tril + noise
    lengths = residuals.norm(dim=-1, keepdim=True)
    residuals = residuals * (_LONGEST * lengths.median() / lengths.clamp(min=1e-300)).clamp(max=1.0)
    outer = residuals.T @ noise / len(noise)
    values, vectors = torch.linalg.eigh((outer + outer.T) / 2)
    precision = (1 - size * values).clamp(1 / _WIDEST_CHANGE, _WIDEST_CHANGE)
    covariance = (vectors / precision) @ vectors.T
    shift = size * covariance @ residuals.mean(0)
    shift = shift / max(1.0, float(shift.norm()) / math.sqrt(len(shift)))
    factor, failed = torch.linalg.cholesky_ex(covariance)
    return None if failed else Gaussian(now.loc + now.scale_tril @ shift, now.scale_tril @ factor)


def refine_diagonal(start: Gaussian, density: ValueAndScore, *, num_draws: int, may_go_on: MayGoOn) -> DiagonalGaussian:
    """Raise the ELBO of a Gaussian with independent entries, for vectors that are too long for a matrix.

    Adam in units of the present standard deviations, with the path gradient: E[r] for the mean and E[r e] for the
    log scale, r and e as in ``refine``, where correlations make natural gradients of single entries diverge.

    Args:
        start: the Gaussian to begin with; its correlations are dropped.
        density, num_draws, may_go_on: as in ``refine``.
    """
    loc, log_scale = start.loc.clone(), start.scale.log()
    means, squares = torch.zeros(2, 2, len(loc)).to(loc)
    history: list[float] = []
    while may_go_on(history) and not _stalls(history, 50):
        now = DiagonalGaussian(loc, log_scale.exp())
        noise = torch.randn(num_draws, len(loc)).to(loc)
        values, scores = density(now.draws(noise))
        kept = values.isfinite() & scores.isfinite().all(-1)
        history.append(_mean(now.log_weights(values, noise)))
        if kept.sum() < num_draws // 2:
            log_scale = log_scale - math.log(2)
            continue
        residuals = scores[kept] * now.scale + noise[kept]
        gradient = torch.stack([residuals.mean(0), (residuals * noise[kept]).mean(0)])
        means, squares = 0.9 * means + 0.1 * gradient, 0.99 * squares + 0.01 * gradient.square()
        age = len(history)
        rate = _ADAM_RATE / math.sqrt(1 + age / 20)
        step = rate * means / (1 - 0.9**age) / (squares / (1 - 0.99**age)).sqrt().clamp(min=1e-12)
        loc, log_scale = loc + now.scale * step[0], log_scale + step[1]
    return DiagonalGaussian(loc, log_scale.exp())
