"""What the training loop asks of a fit, and the options that both fits share."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from pyro.optim import PyroOptim
from torch import Tensor

OptimizerFactory = Callable[..., torch.optim.Optimizer]


class Task(Protocol):
    """What is trained: a guide, or a density."""

    kind: str
    loss_name: str
    score_name: str
    remedy: str
    arguments: dict[str, Any]
    weight: float  # number of rows or draws that the loss is a mean of; asked for only where there are ``processes``

    @property
    def num_dropped(self) -> int:
        """Number of single draws or rows left out of losses so far."""

    def prepare(self) -> None:
        """Fetch the data of the next step; errors in here are raised as they are."""

    def loss(self) -> Tensor:
        """Loss of the step, with a graph."""

    def scores(self) -> Tensor | None:
        """Scores on the same draws or rows each time, higher = better; None where there are none to score on."""

    def final_scores(self) -> Tensor:
        """Scores by which the weights to keep are chosen."""

    def grow(self) -> bool:
        """From here on average losses over more draws, or hold weights nearer to zero; False if there is no more."""

    def locate(self) -> str:
        """The first site or layer at which the loss of the step is not finite; empty if there is none."""

    def describe(self, loss: float) -> str:
        """A loss for the progress bar, which puts ``loss_name`` or ``score_name`` in front."""

    def state_dict(self) -> dict[str, Any]:
        """Position in the data and the like; cheap."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""


@dataclass
class LoopOptions:
    """How the loop goes, apart from its budget.

    Args:
        warmup: number of steps over which the learning rate rises; at most a tenth of the budget in steps.
        evaluate_every: number of steps between evaluations.
        checkpoint: file that the fit is saved to and resumed from; missing folders are made.
        every: number of steps between checkpoints.
        progress: whether to show a bar.
        average: score the moving average of the weights instead of themselves, and go back to it where it was best
            whenever scores stall. Without it, the average is one more candidate at the end.

    Raises:
        ValueError: if a number of steps is too small, or ``checkpoint`` is a folder.
    """

    warmup: int = 50
    evaluate_every: int = 250
    checkpoint: str | os.PathLike[str] | None = None
    every: int = 500
    progress: bool = True
    average: bool = False

    def __post_init__(self) -> None:
        for name, least in (("warmup", 0), ("evaluate_every", 1), ("every", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least} steps, got {getattr(self, name)}")
        if self.checkpoint is not None:
            path = Path(self.checkpoint)
            if path.is_dir():
                raise ValueError(
                    f"checkpoint must be a file, got the folder {path}; give a name such as fit.ckpt in it"
                )
            path.parent.mkdir(parents=True, exist_ok=True)


def arguments_of(
    task: Task, optimizer: torch.optim.Optimizer, *, budget: Any, rule: Any, options: LoopOptions
) -> dict[str, str]:
    """What a fit and a checkpoint of it must agree in; the learning rate as given is among the task's arguments."""
    settings = {name: value for name, value in optimizer.defaults.items() if name != "lr"}  # which may go by the clock
    arguments = {
        "fit": task.kind,
        "num_steps": budget.num_steps,
        "seconds": budget.seconds,
        "decay": budget.decay,
        "warmup": options.warmup,
        "evaluate_every": options.evaluate_every,
        rule.name: rule.limit,
        "optimizer": f"{type(optimizer).__name__} {settings}",
        **task.arguments,
    }
    return {name: str(value) for name, value in arguments.items()}


def check_optimizer(factory: OptimizerFactory, learning_rate: float | None) -> None:
    """Raise a ValueError if an optimiser is already made, or one of Pyro's, or the learning rate is not positive."""
    kinds = PyroOptim | torch.optim.Optimizer
    if isinstance(factory, kinds) or factory is torch.optim.LBFGS or not callable(factory):
        raise ValueError(
            f"optimizer must be a factory called with (parameters, lr=...) whose steps need no closure, got "
            f"{factory!r}; pass torch.optim.Adam, or functools.partial(torch.optim.Adam, betas=(0.9, 0.99))"
        )
    if learning_rate is not None and not learning_rate > 0:
        raise ValueError(f"learning_rate must be positive, got {learning_rate}")


def make_optimizer(factory: OptimizerFactory, parameters: list[Any], **options: Any) -> torch.optim.Optimizer:
    """An optimiser over the parameters.

    Args:
        factory: a class such as ``torch.optim.Adam``, or a ``functools.partial`` of one.
        parameters: what it trains, or groups of it.
        options: keyword arguments, ``lr`` among them.

    Raises:
        ValueError: if there is nothing to train, or as in ``check_optimizer``.
    """
    check_optimizer(factory, options["lr"])
    if not parameters:
        raise ValueError("there must be something to train, got no parameter that requires a gradient")
    if factory in (torch.optim.Adam, torch.optim.AdamW):
        options["fused"] = True  # one operator instead of eight for each of many small parameters
    return factory(parameters, **options)
