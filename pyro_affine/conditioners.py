"""Conditioners: networks that read the kept entries, and a context if any, and emit shift and raw scale.

A conditioner is any callable ``(kept, context=None) -> (shift, raw)``; a scale map turns ``raw`` into a
log-scale. The last layer of those below starts at zero, so that shift = 0 and raw = 0: the flow starts at
the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

__all__ = ["MLP", "ResidualMLP"]


class _VectorConditioner(nn.Module):
    """What the networks for vectors share: sizes, checks, and the split into shift and raw."""

    event_dim = 1
    """Rank of the events that the network reads."""

    network: nn.Module
    raw_network: nn.Module | None

    def __init__(self, input_dim: int, output_dim: int, context_dim: int) -> None:
        super().__init__()
        if min(input_dim, context_dim) < 0 or input_dim + context_dim < 1 or output_dim < 1:
            raise ValueError(
                "a conditioner must read something and emit something: input_dim >= 0, context_dim >= 0, not "
                f"both 0, output_dim >= 1; got input_dim={input_dim}, context_dim={context_dim}, "
                f"output_dim={output_dim}; use a mask with kept and transformed entries, or a context"
            )
        self.input_dim, self.output_dim, self.context_dim = input_dim, output_dim, context_dim

    def _build(self, make_network: Callable[[int], nn.Module], separate: bool, shift_only: bool) -> None:
        one_for_both = not (separate or shift_only)
        self.shift_only = shift_only
        self.network = make_network(2 * self.output_dim if one_for_both else self.output_dim)
        self.raw_network = make_network(self.output_dim) if separate and not shift_only else None

    def forward(self, kept: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Shift and raw scale of the entries to transform.

        Args:
            kept: entries that the coupling keeps, shape: batch + (input_dim,).
            context: what the flow is conditioned on, shape: context_batch + (context_dim,). The two batch
                shapes broadcast; a context that many draws share is read once, not once for each draw.

        Returns:
            ``shift`` and ``raw``, shape of each: broadcast batch + (output_dim,). ``raw`` is None if
            ``shift_only``.

        Raises:
            ValueError: if ``kept`` or ``context`` has the wrong shape, or a context is missing or not wanted.
        """
        if not torch.jit.is_tracing():  # type: ignore[attr-defined]
            self._check_kept(kept)
            self._check_context(kept, context)
        outputs = self.network(kept, context)
        if self.shift_only:
            return outputs, None
        if self.raw_network is not None:
            return outputs, self.raw_network(kept, context)
        shift, raw = outputs.split_with_sizes((self.output_dim, self.output_dim), -1)
        return shift, raw

    def extra_repr(self) -> str:
        """Sizes, as the constructor takes them."""
        return f"input_dim={self.input_dim}, output_dim={self.output_dim}, context_dim={self.context_dim}"

    def __repr__(self) -> str:
        """One line, with the layers of the network in turn: a stack of couplings is to fit on a screen."""
        leaves = [module for module in self.network.modules() if not any(True for _ in module.children())]
        layers = " ".join(str(m.out_features) if isinstance(m, nn.Linear) else repr(m) for m in leaves)
        twice = "twice " if self.raw_network is not None else ""
        return f"{type(self).__name__}({self.extra_repr()}, layers: {twice}{layers})"

    def _check_kept(self, kept: Tensor) -> None:
        if kept.shape[-1:] != (self.input_dim,):
            raise ValueError(
                f"{type(self).__name__} reads kept entries of shape batch + ({self.input_dim},), "
                f"got {tuple(kept.shape)}; set input_dim to the number of kept entries, mask.sum()"
            )

    def _check_context(self, kept: Tensor, context: Tensor | None) -> None:
        wanted = (self.context_dim,) if self.context_dim else None
        if (None if context is None else context.shape[-1:]) != wanted:
            rule = f"contexts of shape batch + {wanted}" if wanted else "no context"
            got = "none" if context is None else f"one of shape {tuple(context.shape)}"
            raise ValueError(
                f"{type(self).__name__} with context_dim={self.context_dim} reads {rule}, got {got}; give "
                "the flow a context of that size, or build the network with the last size of the context as "
                "context_dim, 0 for none"
            )
        if context is not None and not _can_broadcast(kept.shape[:-1], context.shape[:-1]):
            raise ValueError(
                "the batch shapes of kept entries and context must broadcast, "
                f"got shapes {tuple(kept.shape)} and {tuple(context.shape)}; let the batch of the context be "
                "the last dimensions of the batch of the draws, or insert dimensions of size 1"
            )


class MLP(_VectorConditioner):
    """Multilayer perceptron that emits the shift and raw scale of a coupling.

    hidden = activation(W kept + V context + b), then a linear layer and an activation for each further hidden
    size, then a linear layer that starts at zero.

    Args:
        input_dim: number of kept entries; 0 (with a context) for events of one entry.
        output_dim: number of entries to transform.
        hidden_dims: sizes of the hidden layers; ``()`` gives a linear conditioner.
        context_dim: size of the context, 0 for none.
        activation: class or factory of a module, called without arguments once for each hidden layer. The
            default SiLU is smooth, as Hamiltonian Monte Carlo and second derivatives want it.
        dropout: share of the hidden values, in [0, 1), that training mode sets to zero; ``eval()`` switches it off.
        separate: True builds two networks, one for each result; False one network with both.
        shift_only: True emits no raw scale, for ``AdditiveScale``; ``separate`` then changes nothing.

    Raises:
        ValueError: if a size is out of range, or ``activation`` does not make a module.

    >>> conditioner = MLP(2, 3, hidden_dims=(16,))
    >>> shift, raw = conditioner(torch.randn(5, 2))
    >>> shift.shape, raw.shape
    (torch.Size([5, 3]), torch.Size([5, 3]))
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        hidden_dims: Sequence[int] = (64, 64),
        *,
        context_dim: int = 0,
        activation: Callable[[], nn.Module] = nn.SiLU,
        dropout: float = 0.0,
        separate: bool = False,
        shift_only: bool = False,
    ) -> None:
        super().__init__(input_dim, output_dim, context_dim)
        if isinstance(hidden_dims, int) or any(size < 1 for size in hidden_dims):
            raise ValueError(
                f"each hidden size must be 1 or more, got hidden_dims={hidden_dims}; "
                "leave a layer out instead of giving it the size 0, and write (64,) for one layer"
            )

        def make_network(num_outputs: int) -> nn.Module:
            sizes = (*hidden_dims, num_outputs)
            layers: list[nn.Module] = []
            for size, next_size in pairwise(sizes):
                layers += [_make_activation(activation, dropout), nn.Linear(size, next_size)]
            return _Network(input_dim, context_dim, sizes[0], layers)

        self._build(make_network, separate, shift_only)


class ResidualMLP(_VectorConditioner):
    """Residual network of constant width that emits the shift and raw scale of a coupling.

    hidden = W kept + V context + b, then ``num_blocks`` times
    hidden + linear(activation(linear(activation(hidden)))), then an activation and a linear layer that starts
    at zero.

    Args:
        input_dim: number of kept entries; 0 (with a context) for events of one entry.
        output_dim: number of entries to transform.
        hidden_dim: width of all hidden layers.
        num_blocks: number of residual blocks, two linear layers each.
        context_dim: size of the context, 0 for none.
        activation: class or factory of a module, called without arguments twice for each block and once for
            the end. The default SiLU is smooth.
        dropout: share of the values inside each block, in [0, 1), that training mode sets to zero before the block's
            second linear layer; ``eval()`` switches it off.
        separate: True builds two networks, one for each result; False one network with both.
        shift_only: True emits no raw scale, for ``AdditiveScale``; ``separate`` then changes nothing.

    Raises:
        ValueError: if a size is out of range, or ``activation`` does not make a module.

    Source: Identity Mappings in Deep Residual Networks (He et al., 2016), without the normalisation.

    >>> conditioner = ResidualMLP(2, 3, context_dim=4)
    >>> shift, raw = conditioner(torch.randn(100, 7, 2), torch.randn(7, 4))
    >>> shift.shape, raw.shape
    (torch.Size([100, 7, 3]), torch.Size([100, 7, 3]))
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        hidden_dim: int = 64,
        num_blocks: int = 2,
        *,
        context_dim: int = 0,
        activation: Callable[[], nn.Module] = nn.SiLU,
        dropout: float = 0.0,
        separate: bool = False,
        shift_only: bool = False,
    ) -> None:
        super().__init__(input_dim, output_dim, context_dim)
        if hidden_dim < 1 or num_blocks < 1:
            raise ValueError(
                f"hidden_dim and num_blocks must be 1 or more, got hidden_dim={hidden_dim}, "
                f"num_blocks={num_blocks}; for a network without blocks use MLP"
            )

        def make_network(num_outputs: int) -> nn.Module:
            layers: list[nn.Module] = [_ResidualBlock(hidden_dim, activation, dropout) for _ in range(num_blocks)]
            layers += [_make_activation(activation), nn.Linear(hidden_dim, num_outputs)]
            return _Network(input_dim, context_dim, hidden_dim, layers)

        self._build(make_network, separate, shift_only)


class _Network(nn.Module):
    """A linear layer in kept and context together, then ``layers``; the last linear layer starts at zero."""

    from_kept: nn.Linear
    from_context: nn.Linear

    def __init__(self, input_dim: int, context_dim: int, first_dim: int, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.reads_kept, self.reads_context = input_dim > 0, context_dim > 0
        # not one linear layer of the two concatenated: so the context is projected before it is broadcast
        if self.reads_kept:
            self.from_kept = nn.Linear(input_dim, first_dim)
        if self.reads_context:
            self.from_context = nn.Linear(context_dim, first_dim, bias=not self.reads_kept)
        self.layers = nn.Sequential(*layers)
        for parameter in (layers[-1] if layers else self).parameters():
            nn.init.zeros_(parameter)

    def forward(self, kept: Tensor, context: Tensor | None) -> Tensor:
        if not self.reads_context:
            outputs: Tensor = self.layers(self.from_kept(kept))
        elif self.reads_kept:
            outputs = self.layers(self.from_kept(kept) + self.from_context(context))
        else:
            # a sum of no entries: zeros that bring in the batch shape of kept
            outputs = self.layers(self.from_context(context)) + kept.sum(-1, keepdim=True)
        return outputs


class _ResidualBlock(nn.Module):
    """hidden + linear(activation(linear(activation(hidden))))."""

    def __init__(self, hidden_dim: int, activation: Callable[[], nn.Module], dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _make_activation(activation),
            nn.Linear(hidden_dim, hidden_dim),
            _make_activation(activation, dropout),
            nn.Linear(hidden_dim, hidden_dim),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        outputs: Tensor = hidden + self.layers(hidden)
        return outputs


def _make_activation(activation: Callable[[], nn.Module], dropout: float = 0.0) -> nn.Module:
    """An activation, with dropout behind it in one Module, so that linear layers keep their places and names."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be a share in [0, 1), got {dropout}; 0 for none, 0.1 or 0.2 for short tables")
    cause = None
    try:
        module = None if isinstance(activation, nn.Module) else activation()
    except TypeError as error:  # where a function of a tensor, such as torch.relu, ends
        module, cause = None, error
    if not isinstance(module, nn.Module):
        raise ValueError(
            "activation must make a new module when called without arguments, "
            f"got {activation!r}; pass a class such as nn.SiLU (not nn.SiLU(), not F.silu), or a factory "
            "such as lambda: nn.LeakyReLU(0.1)"
        ) from cause
    return nn.Sequential(module, nn.Dropout(dropout)) if dropout else module


def _can_broadcast(shape: Sequence[int], other: Sequence[int]) -> bool:
    pairs = zip(reversed(shape), reversed(other), strict=False)
    return all(size == other_size or 1 in (size, other_size) for size, other_size in pairs)
