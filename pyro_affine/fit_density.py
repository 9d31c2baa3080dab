"""Density fits in one call."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.modules.dropout import _DropoutNd

from pyro_affine.batches import Batches, RowCheck
from pyro_affine.compiled import Compile
from pyro_affine.density_data import split
from pyro_affine.density_task import DensityTask, initialize_layers
from pyro_affine.distributed import joined
from pyro_affine.fit_result import FitResult
from pyro_affine.memory import innermost
from pyro_affine.random_state import seeded
from pyro_affine.stopping import Budget, Patience
from pyro_affine.stored_rows import StoredRows, is_stored
from pyro_affine.task import LoopOptions, OptimizerFactory, make_optimizer
from pyro_affine.trained_weights import Weights
from pyro_affine.training import TrainingLoop
from pyro_affine.weight_decay import decay_groups, rising_decays

Data = Tensor | np.ndarray[Any, Any] | str | os.PathLike[str] | StoredRows | Iterable[Any]

_STEPS, _EPOCHS = 10_000, 20  # by default, whichever is more; patience ends most fits earlier
_STEPS_BETWEEN_EVALUATIONS = 20  # small data have epochs of a few steps, too few to learn much in
_INITIAL_ROWS = 512  # what layers that start from data see
_STATISTICS_ROWS = 100_000  # means and standard deviations to a third of a percent


def fit_density(
    flow: nn.Module,
    data: Data,
    context: Tensor | np.ndarray[Any, Any] | None = None,
    *,
    validation: float | Data | None = 0.1,
    batch_size: int = 512,
    num_steps: int | None = None,
    num_epochs: int | None = None,
    seconds: float | None = None,
    patience: int = 5,
    learning_rate: float = 5e-3,
    weight_decay: float | None = None,
    average: bool = True,
    optimizer: OptimizerFactory = torch.optim.AdamW,
    warmup: int = 50,
    decay: float = 0.5,
    standardize: bool = True,
    compile: Compile = False,
    seed: int | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int = 500,
) -> FitResult:
    """Fit a flow to data by maximising the mean log-density of minibatches.

    Part of the rows is held out and scored, under the moving average of the weights, after each epoch (of 20 steps
    at least) or tenth of a budget in steps; with ``seconds`` alone after each epoch, however long. When ``patience``
    such scores in a row bring no new best, the fit goes back to the best weights. The first two times it goes on
    with a higher weight decay, which keeps networks from overfitting short tables; after that it lets the learning
    rate fall to zero by a cosine, as it does at the latest over the last part of its budget; when patience runs out
    again past the middle of that part, it ends. The averaged, last or best weights are kept, whichever score best
    on the held-out rows, or those from before the first step, which make a new flow the Gaussian copula of the data,
    if training improved on that by less than a standard error. Gradients are clipped at twice the running median of
    their norms; steps above ten times it, or not finite, are left out.

    Training mode, and with it dropout, is on for steps and off for scores. A flow with dropout is handed back in
    evaluation mode, any other in the mode from before.

    Before the first step the flow stores the units of the data, if it has a method ``fit_units(rows)`` or
    ``standardize(rows)``; log-densities stay those of the data as given. A flow that has units already keeps them,
    since what is trained holds in these alone: a second call, also after ``save`` and ``load``, goes on from the
    weights and units of the first. For other data make a new flow. Layers with a method ``initialize(rows)`` and a
    flag ``initialized`` that is not set get the first 512 rows as they arrive at their data side.

    Ctrl-C ends the fit and keeps what was trained. With ``checkpoint``, a fit that was stopped in any way goes on
    when the same call is made again; on a CPU, with a budget in steps, to the same weights bit for bit.

    Under ``torchrun`` the rows of each minibatch are split among its processes; see docs/many_processes.md.

    Args:
        flow: a Module with ``log_prob(value)``, or ``log_prob(value, context)``, such as ``NormalizingFlow``.
        data: rows, shape (N,) + event_shape, as a tensor or NumPy array; or on disk, as the path of a .npy or .parquet
            file, a ``numpy.memmap``, or ``stored_rows``; or a ``DataLoader`` of values, or of pairs of values and
            contexts.
        context: one row for each row of the data, for a conditional flow.
        validation: share of the rows to hold out, of those on disk up to 50,000; or rows, a pair of rows and
            contexts, or a loader; None for none.
        batch_size: rows in a minibatch; a loader brings its own.
        num_steps: the longest that the fit may take, in steps.
        num_epochs: the longest that it may take, in passes over the training rows.
        seconds: the longest that it may take, in seconds; a fit that the clock ends is not reproducible. With none
            of the three: 10,000 steps or 20 epochs, whichever is more.
        patience: number of scores without a new best to wait for.
        learning_rate: the highest.
        weight_decay: of the weights of linear and convolutional layers, as in AdamW; biases, units, curves and base do
            not decay. By default none at first, and with AdamW what ``rising_decays`` in ``weight_decay`` says, each
            time that scores stop rising.
        average: whether the moving average of the weights is scored, over about the last tenth of the steps up to the
            last thousand, or the weights themselves. Its values are a candidate at the end in any case.
        optimizer: called with (groups of parameters, lr=...); the weight decay is part of the groups.
        warmup: number of steps over which the learning rate rises; at most a tenth of ``num_steps``.
        decay: share of the fit over which it falls.
        standardize: whether the flow stores the units of the data, unless its flag ``standardized`` says it has some.
        compile: True compiles the loss of a step by ``torch.compile``, with the same weights in the end up to
            rounding; also a mode such as "max-autotune", or a dict of arguments. It takes a minute, see
            docs/compile.md; where it cannot be done, a warning says so.
        seed: makes the fit reproducible; torch's random state is put back after it.
        progress: whether to show a bar, in a terminal or a notebook.
        checkpoint: file that the fit is saved to, and resumed from if it is there.
        every: steps between checkpoints.

    Returns:
        Losses, times, the log-density reached, and why it stopped.

    Raises:
        NonFiniteError: if losses or gradients stay non-finite; it names step and layer, and the flow holds the last
            good weights.
        ValueError: if the data are not finite, not of the flow's shape or dtype, or an argument is out of range, or
            the checkpoint is damaged or of another fit.
        LostProcessError: if another process of several fails.

    >>> from pyro_affine import NormalizingFlow, real_nvp
    >>> flow = NormalizingFlow(real_nvp(2, num_layers=2), 2)
    >>> data = torch.randn(500, 2) * torch.tensor([1.0, 10.0]) + 5
    >>> fit = fit_density(flow, data, num_steps=50, seed=0, progress=False)
    >>> fit.reason
    'num_steps'
    """
    with joined() as processes, seeded(processes.seed(seed)), _in_training(flow):
        batches, held_out = split(data, context, validation, batch_size=batch_size, seed=seed, check=RowCheck.of(flow))
        steps = _num_steps(num_steps, num_epochs, seconds, per_epoch := processes.from_first(batches.per_epoch))
        budget = Budget(steps, seconds, decay=decay, clock=processes.clock if seconds else None)
        _prepare_layers(flow, batches, is_new := standardize and not getattr(flow, "standardized", False))
        arguments = {"rows": processes.from_first(_shape(data)), "batch_size": batch_size, "standardize": standardize}
        arguments |= {"seed": seed, "weight_decay": weight_decay, "average": average, "learning_rate": learning_rate}
        task = DensityTask(flow, batches, held_out, arguments=arguments, processes=processes, compile=compile)
        weights = processes.align(Weights(task.parameters(), {"": flow}))
        made = _make_optimizer(task, weights, optimizer, learning_rate, weight_decay, per_epoch)
        options = LoopOptions(warmup, _interval(per_epoch or 0, steps), checkpoint, every, progress, average)
        task.mark_start(weights, is_new=is_new)
        fit = TrainingLoop(task, weights, made, budget=budget, rule=Patience(patience), options=options).run()
        if task.keeps_start(fit, weights) and task.start["is_new"]:
            _prepare_again(flow, data)
        return _finished(fit, task, weights)


def _shape(data: Any) -> str:
    if is_stored(data):
        return "on disk"
    return str(tuple(data.shape)) if isinstance(data, Tensor | np.ndarray) else "of a loader"


def _make_optimizer(
    task: DensityTask,
    weights: Weights,
    factory: OptimizerFactory,
    learning_rate: float,
    weight_decay: float | None,
    per_epoch: int | None,
) -> torch.optim.Optimizer:
    """The optimiser; where the decay of weights is left to the fit, it rises when scores stall."""
    groups = decay_groups(task.flow, weights.parameters, weight_decay or 0.0)
    task.optimizer = made = make_optimizer(factory, groups, lr=learning_rate)
    if weight_decay is None and len(groups) == 2:
        task.decays = rising_decays(made, learning_rate, per_epoch)
    return made


def _finished(fit: FitResult, task: DensityTask, weights: Weights) -> FitResult:
    """The result, once all processes have the weights of the first."""
    task.processes.align(weights)
    fit.bits_per_dim = task.bits_per_dim(-fit.best)
    return fit


@contextmanager
def _in_training(flow: nn.Module) -> Iterator[None]:
    """Training mode for a block, then the mode from before; but evaluation mode where there is dropout."""
    before = flow.training and not any(isinstance(module, _DropoutNd) for module in flow.modules())
    flow.train()
    try:
        yield
    finally:
        flow.train(before)


def _prepare_layers(flow: nn.Module, batches: Batches, is_new: bool) -> None:
    if is_new:
        _store_units(flow, batches.first(_STATISTICS_ROWS).value)
    rows = batches.first(_INITIAL_ROWS).to(_device(flow))
    _require_support(flow, rows.value)
    initialize_layers(flow, rows)


def _require_support(flow: nn.Module, values: Tensor) -> None:
    """Where each entry has bounds of its own; other supports, such as a simplex, hold only up to rounding."""
    support = innermost(getattr(getattr(flow, "chain", None), "codomain", constraints.real))
    if support.event_dim == 0 and not support.check(values).all():
        raise ValueError(
            f"data must lie in the support of the flow, {support}, got values from {values.min():g} to "
            f"{values.max():g}; scale them (bytes of images: dequantize), or leave out the last part of the flow"
        )


def _prepare_again(flow: nn.Module, data: Any) -> None:
    """From all rows, as none need be held out where nothing was trained."""
    if isinstance(data, Tensor | np.ndarray) and not is_stored(data):
        _store_units(flow, torch.as_tensor(data))


def _store_units(flow: nn.Module, rows: Tensor) -> None:
    store: Any = getattr(flow, "fit_units", None) or getattr(flow, "standardize", None)
    if store is not None:
        store(rows.to(_device(flow)))


def _device(flow: nn.Module) -> torch.device:
    return next(iter([*flow.parameters(), *flow.buffers()])).device


def _interval(per_epoch: int, num_steps: int | None) -> int:
    """An epoch, unless that is very short, or long for the budget."""
    return min(max(per_epoch, _STEPS_BETWEEN_EVALUATIONS), max((num_steps or sys.maxsize) // 10, 1))


def _num_steps(
    num_steps: int | None, num_epochs: int | None, seconds: float | None, per_epoch: int | None
) -> int | None:
    if num_epochs is not None:
        if per_epoch is None:
            raise ValueError("num_epochs needs a loader with a length, got one without; give num_steps or seconds")
        return min(num_epochs * per_epoch, num_steps or sys.maxsize)
    if num_steps is None and seconds is None:
        return max(_STEPS, _EPOCHS * (per_epoch or 0))
    return num_steps
