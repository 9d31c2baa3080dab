"""Summary networks for i.i.d. data: the order of the rows does not matter, and their number may vary.

Both take rows of shape batch + (n, row_dim) and a mask of shape batch + (n,), True = kept, and give a vector for
each set. The number of rows goes in too, as log(1 + n): a mean alone cannot tell how precise it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class _SetNetwork(nn.Module):
    """What both share: sizes and checks."""

    takes_mask = True
    """Tells ``NeuralPosterior`` that rows may be missing."""

    def __init__(self, row_dim: int, output_dim: int, hidden_dim: int) -> None:
        super().__init__()
        if min(row_dim, output_dim, hidden_dim) < 1:
            raise ValueError(
                f"row_dim, output_dim and hidden_dim must be 1 or more, got {row_dim}, {output_dim} and {hidden_dim}; "
                "rows that are single numbers have row_dim=1"
            )
        self.row_dim, self.output_dim, self.hidden_dim = row_dim, output_dim, hidden_dim

    def _mask(self, rows: Tensor, mask: Tensor | None) -> Tensor:
        if rows.dim() < 2 or rows.shape[-1] != self.row_dim:
            raise ValueError(
                f"rows must have shape batch + (n, {self.row_dim}), got {tuple(rows.shape)}; one row for each "
                "observation, so (n, 1) for n numbers"
            )
        if mask is None:
            return torch.ones(rows.shape[:-1], dtype=torch.bool, device=rows.device)
        if mask.dtype != torch.bool or mask.shape != rows.shape[:-1]:
            raise ValueError(
                f"mask must be boolean with True = kept and have shape {tuple(rows.shape[:-1])}, got {mask.dtype} of "
                f"shape {tuple(mask.shape)}"
            )
        return mask

    def extra_repr(self) -> str:
        """Sizes, as the constructor takes them."""
        return f"row_dim={self.row_dim}, output_dim={self.output_dim}, hidden_dim={self.hidden_dim}"


class DeepSets(_SetNetwork):
    """Summary of a set of rows: a network of each row, the mean over the kept rows, a network of that.

    s = outer([mean_i inner(row_i), log(1 + n)])

    Args:
        row_dim: number of entries of a row.
        output_dim: size of the summary; a few for each latent.
        hidden_dim: width of both networks, and number of means.
        num_layers: hidden layers of each network.
        activation: factory of the activation Module.

    Raises:
        ValueError: if a size is below 1; on call, for rows or a mask of the wrong shape.

    Source: Deep Sets (Zaheer et al., 2017).

    >>> summary = DeepSets(2, 5)
    >>> rows = torch.randn(7, 10, 2)
    >>> summary(rows).shape, torch.allclose(summary(rows), summary(rows.flip(-2)), atol=1e-5)
    (torch.Size([7, 5]), True)
    """

    def __init__(
        self,
        row_dim: int,
        output_dim: int = 16,
        *,
        hidden_dim: int = 64,
        num_layers: int = 2,
        activation: Callable[[], nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__(row_dim, output_dim, hidden_dim)
        hidden = [hidden_dim] * num_layers
        self.inner = _perceptron([row_dim, *hidden, hidden_dim], activation)
        self.outer = _perceptron([hidden_dim + 1, *hidden, output_dim], activation)

    def forward(self, rows: Tensor, mask: Tensor | None = None) -> Tensor:
        """Summaries. Shapes: batch + (n, row_dim), and batch + (n,) of the mask; result: batch + (output_dim,)."""
        kept = self._mask(rows, mask)[..., None]
        number = kept.sum(-2).to(rows)
        inner = self.inner(torch.where(kept, rows, 0.0))  # what is masked may be NaN
        mean = (inner * kept).sum(-2) / number.clamp(min=1)
        return self.outer(torch.cat([mean, number.log1p()], -1))  # type: ignore[no-any-return]


class SetTransformer(_SetNetwork):
    """Summary of a set of rows that lets the rows look at one another: attention blocks, then attention pooling.

    Each block is hidden + attention(norm(hidden)), then hidden + network(norm(hidden)); a trained query that attends
    to all rows pools them. A trained row that is always kept stands beside the data.

    Args:
        row_dim: number of entries of a row.
        output_dim: size of the summary.
        hidden_dim: width, a multiple of ``num_heads``.
        num_blocks: attention blocks before pooling.
        num_heads: heads of each attention.

    Raises:
        ValueError: if a size is below 1 or does not divide; on call, for rows or a mask of the wrong shape.

    Source: Set Transformer (Lee et al., 2019), with the norms before the blocks.

    >>> SetTransformer(2, 5)(torch.randn(7, 10, 2)).shape
    torch.Size([7, 5])
    """

    def __init__(
        self,
        row_dim: int,
        output_dim: int = 16,
        *,
        hidden_dim: int = 64,
        num_blocks: int = 2,
        num_heads: int = 4,
    ) -> None:
        super().__init__(row_dim, output_dim, hidden_dim)
        if num_heads < 1 or hidden_dim % num_heads:
            raise ValueError(f"num_heads must divide hidden_dim, got {num_heads} and {hidden_dim}")
        self.embed = nn.Linear(row_dim, hidden_dim)
        self.extra_row = nn.Parameter(0.1 * torch.randn(1, hidden_dim))
        self.query = nn.Parameter(0.1 * torch.randn(1, hidden_dim))
        self.blocks = nn.ModuleList(_AttentionBlock(hidden_dim, num_heads) for _ in range(num_blocks))
        self.pool = _AttentionBlock(hidden_dim, num_heads)
        self.head = nn.Linear(hidden_dim + 1, output_dim)

    def forward(self, rows: Tensor, mask: Tensor | None = None) -> Tensor:
        """Summaries. Shapes: batch + (n, row_dim), and batch + (n,) of the mask; result: batch + (output_dim,)."""
        batch, kept = rows.shape[:-2], self._mask(rows, mask)
        rows = torch.where(kept[..., None], rows, 0.0)  # what is masked may be NaN
        hidden = torch.cat([self.embed(rows), self.extra_row.expand(*batch, 1, -1)], -2)
        visible = torch.cat([kept, kept.new_ones(*batch, 1)], -1)
        for block in self.blocks:
            hidden = block(hidden, hidden, visible)
        pooled = self.pool(self.query.expand(*batch, 1, -1), hidden, visible).squeeze(-2)
        number = kept.sum(-1, keepdim=True).to(rows)
        return self.head(torch.cat([pooled, number.log1p()], -1))  # type: ignore[no-any-return]


class _AttentionBlock(nn.Module):
    """Attention of queries to visible rows, then a network of each, both added to what came in."""

    def __init__(self, hidden_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_queries, self.norm_rows, self.norm_network = (nn.LayerNorm(hidden_dim) for _ in range(3))
        self.to_query, self.to_key, self.to_value, self.merge = (nn.Linear(hidden_dim, hidden_dim) for _ in range(4))
        self.network = _perceptron([hidden_dim, 2 * hidden_dim, hidden_dim], nn.SiLU)

    def forward(self, queries: Tensor, rows: Tensor, visible: Tensor) -> Tensor:
        rows = self.norm_rows(rows)
        heads = [self.to_query(self.norm_queries(queries)), self.to_key(rows), self.to_value(rows)]
        query, key, value = (x.unflatten(-1, (self.num_heads, -1)).transpose(-2, -3) for x in heads)
        found = scaled_dot_product_attention(query, key, value, attn_mask=visible[..., None, None, :])
        hidden: Tensor = queries + self.merge(found.transpose(-2, -3).flatten(-2))
        return hidden + self.network(self.norm_network(hidden))  # type: ignore[no-any-return]


def _perceptron(sizes: Sequence[int], activation: Callable[[], nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size, next_size in pairwise(sizes):
        layers += [nn.Linear(size, next_size), activation()]
    return nn.Sequential(*layers[:-1])
