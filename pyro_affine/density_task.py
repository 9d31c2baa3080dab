"""The mean log-density of minibatches, as a task for the training loop."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyro_affine.actnorm import initialize_actnorms
from pyro_affine.batches import Batches, Rows
from pyro_affine.compiled import Compile, CompiledFunction
from pyro_affine.distributed import ALONE, Processes
from pyro_affine.fit_result import FitResult
from pyro_affine.random_state import seeded
from pyro_affine.stopping import mean_and_error
from pyro_affine.trained_weights import Weights
from pyro_affine.weight_decay import raise_decay

_CHUNK, _CHUNK_ENTRIES = 4096, 2**20  # rows, and numbers in them, scored at once, without gradients
_SAMPLE = 10_000  # training rows that the weights to keep are chosen by where no rows are held out


class DensityTask:
    """The density of a flow, as a task for the training loop.

    Args:
        flow: a Module with ``log_prob``.
        batches: the training data.
        held_out: rows to score, or None.
        arguments: what a checkpoint must agree with.
        processes: among which the rows of each minibatch are split, if they all have the same; batches that differ are
            shares already.
        compile: whether to compile the loss of a step, and how.

    Raises:
        ValueError: if the flow does not give one log-density for each row.
    """

    kind, num_dropped = "density", 0
    loss_name, score_name = "train", "held out"
    remedy = "Look for extreme rows in the data, use a bounded scale map such as AtanScale, or lower learning_rate."

    def __init__(
        self,
        flow: nn.Module,
        batches: Batches,
        held_out: Rows | None,
        *,
        arguments: dict[str, Any],
        processes: Processes = ALONE,
        compile: Compile = False,
    ) -> None:
        self.flow, self.batches, self.held_out, self.arguments = flow, batches, held_out, arguments
        self.processes, self.weight, self._num_prepared = processes, 0.0, 0
        self.optimizer: torch.optim.Optimizer | None = None
        self.decays: list[float] = []
        self.start: dict[str, Any] = {}
        self._has_all: bool | None = None  # whether batches have the rows of all processes
        self._loss: Callable[..., Tensor] = self._mean_loss
        if compile:
            self._loss = CompiledFunction(self._mean_loss, list(self.parameters().values()), compile)
        self._device = next(iter([*flow.parameters(), *flow.buffers()])).device
        self._sample = batches.first(_SAMPLE) if held_out is None else held_out
        self._batch = self._sample[:2].to(self._device)
        self._entries = self._batch.value[0].numel()
        self._is_image = self._batch.value.dim() == 4
        shape = self._score_alone(self._batch).shape
        if shape != (len(self._batch.value),):
            raise ValueError(
                f"log_prob must give one value for each row, got shape {tuple(shape)} for {len(self._batch.value)} "
                f"rows of shape {tuple(self._batch.value.shape[1:])}; check the event shape of the flow"
            )

    def parameters(self) -> dict[str, Tensor]:
        """The parameters of the flow that require a gradient."""
        return {name: p for name, p in self.flow.named_parameters() if p.requires_grad}

    def prepare(self) -> None:
        """Fetch a minibatch, and take the share of this process."""
        follow: Any = getattr(self.flow, "follow", None)
        if self.optimizer is not None and follow is not None:  # how large the step is, as a share of the largest
            follow(self.optimizer.param_groups[0]["lr"] / self.arguments["learning_rate"])
        batch = self.batches.next()
        self._num_prepared += 1
        if self._has_all is None:
            self._has_all = self.processes.size == 1 or self.processes.agree(_digest(batch.value))
        own = batch[self.processes.share(len(batch.value))] if self._has_all else batch
        self.weight = float(len(own.value))
        self._batch = (own if len(own.value) else batch[:1]).to(self._device)

    def loss(self) -> Tensor:
        """Mean negative log-density of the minibatch, in nats."""
        with seeded(self._own_seed()):
            return self._loss(self._batch.value, self._batch.context)

    def _mean_loss(self, value: Tensor, context: Tensor | None) -> Tensor:
        return -self._log_prob(Rows(value, context)).mean()

    def _own_seed(self) -> int | None:
        """For what a flow draws, such as dropout, which must not move the order in which each process gets its data."""
        number = self._num_prepared * self.processes.size + self.processes.rank
        return None if self.processes.size == 1 else ((self.arguments.get("seed") or 0) + number) % 2**63

    def grow(self) -> bool:
        """Hold the weights of networks nearer to zero, since they overfit; False if near enough."""
        return self.optimizer is not None and raise_decay(self.optimizer, self.decays)

    def scores(self) -> Tensor | None:
        """Log-densities of the held-out rows, in nats."""
        return None if self.held_out is None else self._score(self.held_out)

    def final_scores(self) -> Tensor:
        """Log-densities of the held-out rows, or of some training rows where there are none."""
        return self._score(self._sample)

    def mark_start(self, weights: Weights, *, is_new: bool) -> None:
        """Keep the weights and scores from before the first step; a fit that is resumed gets those of its first call.

        Args:
            weights: what is trained.
            is_new: whether the flow got its units for this fit.
        """
        self.start = {"weights": weights.copy(), "scores": self.final_scores(), "is_new": is_new}

    def keeps_start(self, fit: FitResult, weights: Weights) -> bool:
        """Go back to the start, and say so, if scores are within a standard error of those of then, or below."""
        before = self.start["scores"]
        mean, error = mean_and_error(self.final_scores() - before)
        if mean > error or not before.isfinite().all():
            return False
        weights.restore(self.start["weights"])
        fit.chosen, fit.num_unscored = "start", 0
        fit.best, fit.best_error = mean_and_error(before)
        return True

    def _score(self, rows: Rows) -> Tensor:
        """Log-densities of the rows, each computed by one of the processes."""
        own = rows[self.processes.share(len(rows.value))]
        return self.processes.gathered(self._score_alone(own) if len(own.value) else torch.empty(0))

    @torch.no_grad()
    def _score_alone(self, rows: Rows) -> Tensor:
        self.flow.eval()
        size = min(_CHUNK, max(_CHUNK_ENTRIES // self._entries, 1))
        starts = range(0, len(rows.value), size)
        chunks = [self._log_prob(rows[start : start + size].to(self._device)) for start in starts]
        self.flow.train()
        return torch.cat(chunks).cpu()

    def _log_prob(self, rows: Rows) -> Tensor:
        log_prob: Any = self.flow.log_prob
        values: Tensor = log_prob(rows.value) if rows.context is None else log_prob(rows.value, rows.context)
        return values

    @torch.no_grad()
    def locate(self) -> str:
        """The first layer, from the data on, whose value or log-determinant for the minibatch is not finite."""
        y = self._batch.value
        for name, layer in reversed(layers(self.flow, self._batch.context)):
            y, log_det = layer._backward(y)
            what = "value" if not torch.isfinite(y).all() else "log-determinant"
            if what == "value" or not torch.isfinite(log_det).all():
                return f"the {what} of {name} ({type(layer).__name__}), from data to base, is not finite"
        return ""

    def bits_per_dim(self, loss: float) -> float | None:
        """The loss in bits per entry, for events of three dimensions."""
        return loss / (self._entries * math.log(2)) if self._is_image else None

    def describe(self, loss: float) -> str:
        """The loss in nats, or in bits per dimension for images."""
        bits = self.bits_per_dim(loss)
        return f"{loss:.4g} nats" if bits is None else f"{bits:.3f} bits/dim"

    def state_dict(self) -> dict[str, Any]:
        """The position in the data, and the start."""
        return {**self.batches.state_dict(), "num_prepared": self._num_prepared, "start": self.start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.batches.load_state_dict(state)
        self._num_prepared = state["num_prepared"]
        self.start = state.get("start", self.start)  # which files from before do not have


def _digest(values: Tensor) -> bytes:
    return hashlib.sha256(values.cpu().contiguous().view(torch.uint8).numpy().tobytes()).digest()


def layers(flow: nn.Module, context: Tensor | None = None) -> list[tuple[str, Any]]:
    """The layers of a flow and where they are in it, base side first; empty if it has no chain of parts.

    >>> from pyro_affine import NormalizingFlow, real_nvp
    >>> [name for name, _ in layers(NormalizingFlow(real_nvp(2, num_layers=2), 2, curves=0, whiten=False))]
    ['chain.parts[0].parts[0]', 'chain.parts[0].parts[1]', 'chain.parts[1]']
    """
    for name in ("chain", "transform"):
        part = getattr(flow, name, None)
        if part is not None:
            conditioned = part.condition(context) if hasattr(part, "condition") and context is not None else part
            leaves = _leaves(name, conditioned)
            return leaves if all(hasattr(layer, "_backward") for _, layer in leaves) else []
    return []


def _leaves(name: str, part: Any) -> list[tuple[str, Any]]:
    if not hasattr(part, "parts") or hasattr(part, "initialize"):
        return [(name, part)]
    return [leaf for index, inner in enumerate(part.parts) for leaf in _leaves(f"{name}.parts[{index}]", inner)]


@torch.no_grad()
def initialize_layers(flow: nn.Module, rows: Rows) -> None:
    """Give each layer that has ``initialize`` and is not ``initialized`` yet the rows as they arrive at it.

    Of the layers within others, such as those of a ``MultiScale``, only each ``ActNorm`` is reached.
    """
    y = rows.value
    for _, layer in reversed(layers(flow, rows.context)):
        if not hasattr(layer, "initialize"):
            y = initialize_actnorms(layer, y)
            continue
        if not layer.initialized:
            layer.initialize(y)
        y, _ = layer._backward(y)
