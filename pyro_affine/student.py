"""Student's t as a base distribution."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
from torch import Size, Tensor
from torch.distributions import Chi2, Distribution
from torch.distributions.utils import broadcast_all


class UncheckedStudentT(dist.StudentT):
    """``StudentT`` that validates nothing, not even in its inner chi-squared distribution: that does not compile.

    Args:
        df, loc, scale: degrees of freedom, location and scale, which broadcast.

    >>> import torch
    >>> UncheckedStudentT(torch.tensor(3.0), torch.zeros(2), torch.ones(2)).log_prob(torch.zeros(2))
    tensor([-1.0009, -1.0009])
    """

    def __init__(self, df: Tensor, loc: Tensor, scale: Tensor) -> None:
        self.df, self.loc, self.scale = broadcast_all(df, loc, scale)
        self._chi2 = Chi2(self.df, validate_args=False)
        Distribution.__init__(self, self.df.shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> UncheckedStudentT:
        """The same distribution with more batch dimensions."""
        shape = Size(batch_shape)
        return UncheckedStudentT(self.df.expand(shape), self.loc.expand(shape), self.scale.expand(shape))
