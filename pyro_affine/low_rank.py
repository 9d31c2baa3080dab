"""An affine map of many entries: diagonal plus low rank, with an exact inverse and log-determinant."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_affine.precision import product
from pyro_affine.transform import FlowTransform


class LowRankAffine(FlowTransform):
    """Affine map y = loc + exp(log_scale) * (x + U U^T x) with a narrow U.

    log|det dy/dx| = sum log_scale + log det(I + U^T U), a determinant of size rank (the determinant lemma), and
    (I + U U^T)^-1 = I - U (I + U^T U)^-1 U^T (Woodbury). For a standard normal x its Gaussians are those of a
    diagonal plus a low-rank covariance, at a cost of D * rank a draw.

    Args:
        loc: where x = 0 goes. Shape: (D,).
        scale: exp(log_scale) at the start, positive. Shape: (D,) or ().
        rank: columns of U; default about sqrt(D).
        seed: U starts in random directions of length 0.1: in them the scale is 1 per cent wider, and the gradient,
            which vanishes at U = 0, is not lost.

    Raises:
        ValueError: if ``loc`` is no vector of floats, or ``scale`` or ``rank`` is not positive.

    >>> layer = LowRankAffine(torch.zeros(400), rank=2)
    >>> layer(torch.zeros(400)).abs().sum(), layer.factor.shape
    (tensor(0., grad_fn=<SumBackward0>), torch.Size([400, 2]))
    """

    def __init__(
        self,
        loc: Tensor,
        scale: Tensor | float = 1.0,
        *,
        rank: int | None = None,
        seed: int = 0,
        cache_size: int = 1,
    ) -> None:
        if loc.dim() != 1 or not loc.is_floating_point():
            raise ValueError(f"loc must be a vector of floats, got {loc.dtype} of shape {tuple(loc.shape)}; use (D,)")
        super().__init__(loc.shape, cache_size=cache_size)
        rank = round(len(loc) ** 0.5) if rank is None else rank
        log_scale = torch.as_tensor(scale, dtype=loc.dtype, device=loc.device).expand(loc.shape).log()
        if not log_scale.isfinite().all() or rank < 1:
            raise ValueError(f"scale and rank must be positive, got scale={scale}, rank={rank}")
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(len(loc), rank, generator=generator, dtype=torch.float64, device="cpu")
        directions = directions / directions.norm(dim=0)
        self.loc = nn.Parameter(loc.detach().clone())
        self.log_scale = nn.Parameter(log_scale.clone())
        self.factor = nn.Parameter((0.1 * directions).to(loc))

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.loc + self.log_scale.exp() * (x + product(product(x, self.factor), self.factor.T))
        return y, self._log_det(y)

    def _backward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        whitened = (y - self.loc) * (-self.log_scale).exp()
        inner: Tensor = torch.cholesky_solve(self.factor.T, torch.linalg.cholesky(self._core()))
        return whitened - product(product(whitened, self.factor), inner), self._log_det(y)

    def _core(self) -> Tensor:
        rank = self.factor.shape[1]
        return torch.eye(rank, dtype=self.factor.dtype, device=self.factor.device) + product(self.factor.T, self.factor)

    def _log_det(self, y: Tensor) -> Tensor:
        diagonal: Tensor = torch.linalg.cholesky(self._core()).diagonal()
        return (self.log_scale.sum() + 2 * diagonal.log().sum()).expand(y.shape[:-1])
