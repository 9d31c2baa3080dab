"""The training loop behind both fits: guarded steps, evaluation, checkpoints, the choice of weights at the end."""

from __future__ import annotations

import math
import warnings
from typing import Any, NoReturn

import torch
from torch import Tensor

from pyro_affine.checkpoint import check_same, fingerprint, read_checkpoint, write_checkpoint
from pyro_affine.distributed import ALONE, Processes
from pyro_affine.fit_result import FitResult, NonFiniteError
from pyro_affine.precision import casts_anew
from pyro_affine.progress import ProgressBar
from pyro_affine.random_state import random_state, set_random_state
from pyro_affine.recovery import PERSISTENT, RESCUE_FACTOR, Recovery
from pyro_affine.step_size import MedianClip, gradient_norm, learning_rate_factor
from pyro_affine.stopping import Budget, Patience, Plateau, is_better, mean_and_error
from pyro_affine.task import LoopOptions, Task, arguments_of
from pyro_affine.traces import BAD_DRAW, first_line
from pyro_affine.trained_weights import MovingAverage, Weights

_SLOW = 0.5  # the learning rate must have fallen by half before a rule ends the fit: that is when averaging pays
_MOST_CANDIDATES = 3  # weights that are scored at the end: last, average, best


class TrainingLoop:
    """Steps an optimiser through a task until its budget or its rule says stop.

    A step whose loss or gradient is not finite, or whose draw the model refuses, is skipped and counted. When
    such steps persist, the loop goes back to the last good weights with a smaller step size, and in the end
    raises ``NonFiniteError``. When the rule says that scores no longer rise, the decay phase begins from the best
    weights; when it says so in the second half of the decay phase, the loop ends.

    Args:
        task: what is trained.
        weights: the tensors that training changes.
        optimizer: over the parameters in ``weights``; its learning rates are the highest ones.
        budget: when to stop at the latest.
        rule: when to stop earlier.
        options: the rest.
    """

    def __init__(
        self,
        task: Task,
        weights: Weights,
        optimizer: torch.optim.Optimizer,
        *,
        budget: Budget,
        rule: Plateau | Patience,
        options: LoopOptions,
    ) -> None:
        self.task, self.weights, self.optimizer = task, weights, optimizer
        self.processes: Processes = getattr(task, "processes", ALONE)
        self.budget, self.rule, self.options = budget, rule, options
        self.result, self.clip = FitResult(task.kind), MedianClip()
        self.average = MovingAverage(weights.parameters)
        self.recovery = Recovery(weights, optimizer)
        arguments = arguments_of(task, optimizer, budget=budget, rule=rule, options=options)
        self._identity = {"architecture": fingerprint(weights.tensors()), "arguments": arguments}
        self._rates = [group["lr"] for group in optimizer.param_groups]
        self._best: dict[str, Any] = {"value": -math.inf}
        self._evaluated, self._restarted, self._decay_begun, self._mid_step = 0, 0, False, False
        self.bar = ProgressBar(
            task.kind,
            budget.num_steps,
            budget.seconds,
            show=options.progress and self.processes.rank == 0,
            describe=lambda loss: f"{task.loss_name} {task.describe(loss)}",
        )

    @casts_anew()
    def run(self) -> FitResult:
        """Train to the end, from the checkpoint if there is one."""
        finished = self._resume()
        try:
            self._train()
        finally:
            self.bar.close(self.budget.step, self.budget.elapsed)
        if not finished:
            self._choose_weights()
            if self.result.reason != "interrupted":
                self._save()
        return self.result

    def _train(self) -> None:
        self._mark_boundary()
        self.budget.begin()
        try:
            if not self.budget.step:
                self._evaluate()  # the start is a candidate too
            while not self.result.reason:
                self._advance()
        except BaseException as error:
            if not self._mid_step:
                self._save()
            if not isinstance(error, KeyboardInterrupt) or self.processes.size > 1:
                raise
            self.result.reason = "interrupted"

    def _advance(self) -> None:
        if not self._evaluation_is_due():  # it is due at once where an interruption cut it off
            self.step()
        if self._evaluation_is_due():
            self._evaluate()
        if self.budget.exhausted and not self.result.reason:
            self.result.reason = self.rule.name if self.budget.end < 1 else self.budget.limit
        if self.budget.step % self.options.every == 0 and not self.result.reason:
            self._save()

    def step(self) -> None:
        """One step: loss, gradient, and an update if both are sound."""
        self._set_rates()
        self.task.prepare()
        loss, norm, problem = self._differentiate()
        self._mid_step = True
        if problem is None:
            self._update(norm)
        self.budget.tick()
        self.result.record(loss, norm, self.budget.elapsed)
        self.result.num_dropped = self.task.num_dropped
        self.bar.update(self.budget.step, self.budget.elapsed, loss, norm)
        if problem is not None:
            self._skip(problem)
        self._mark_boundary()

    def _set_rates(self) -> None:
        warmup = self.budget.warmup(self.options.warmup)
        factor = learning_rate_factor(self.budget.step - self._restarted, self.budget.into_decay, warmup=warmup)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor * self.recovery.rate_scale

    def _differentiate(self) -> tuple[float, float, Exception | None]:
        self.optimizer.zero_grad(set_to_none=True)
        loss, problem = torch.tensor(math.nan), None
        try:
            loss = self.task.loss()
            loss.backward()
        except BAD_DRAW as error:
            loss, problem = torch.tensor(math.nan), error
        if self.processes.size > 1:
            loss = self.processes.average(self.weights.parameters.values(), loss.detach(), self.task.weight)
        if problem is not None:
            return math.nan, math.nan, problem
        value, norm = torch.stack([loss.detach(), gradient_norm(self.weights.gradients()).to(loss)]).tolist()
        if math.isfinite(value) and math.isfinite(norm):
            return value, norm, None
        where = "the loss" if not math.isfinite(value) else f"the gradient of {self.weights.first_bad_gradient()}"
        return value, norm, FloatingPointError(f"{where} is not finite")

    def _update(self, norm: float) -> None:
        self.recovery.saw_good(self.budget.step)
        factor = self.clip.factor(norm)
        if factor == 0:
            self.result.num_skipped += 1
            return
        if factor < 1:
            for gradient in self.weights.gradients():
                gradient.mul_(factor)
        self.optimizer.step()
        if self.budget.decaying or self.options.average:
            self.average.update()

    def _skip(self, problem: Exception) -> None:
        self.result.num_skipped += 1
        self.result.num_nonfinite += 1
        persistent = self.recovery.saw_bad()
        hopeless = self.budget.exhausted and self.result.num_nonfinite == self.result.num_steps
        if hopeless or (persistent and self.recovery.used_up):
            self._fail(problem)
        if persistent:
            self._go_back(problem)

    def _go_back(self, problem: Exception) -> None:
        self.recovery.go_back()
        self.result.num_rescues = self.recovery.rescues
        warnings.warn(
            f"{PERSISTENT} steps in a row up to step {self.budget.step} were not finite ({first_line(problem)}); "
            f"went back to the weights of step {self.recovery.step} with {RESCUE_FACTOR} times the step size",
            RuntimeWarning,
            stacklevel=7,
        )

    def _fail(self, problem: Exception) -> NoReturn:
        set_random_state(self._boundary["random_state"])
        place = self.task.locate()
        self.recovery.go_back()
        self.result.reason = "non-finite"
        counts = f"{self.result.num_nonfinite} of {self.result.num_steps} steps"
        raise NonFiniteError(
            f"step {self.budget.step}: {place or first_line(problem)}. {counts} were not finite, and going back to "
            f"good weights with smaller steps ({self.result.num_rescues} times) did not help. What was trained has the "
            f"weights of step {self.recovery.step}, the last good ones. {self.task.remedy}",
            self.result,
        ) from problem

    def _evaluation_is_due(self) -> bool:
        return self.budget.step % self.options.evaluate_every == 0 and self.budget.step != self._evaluated

    def _evaluate(self) -> None:
        start = self.budget.clock()
        with self.weights.replaced_by(self.average.values if self.options.average else {}):
            scores, scored = self.task.scores(), self.weights.copy()
        self.budget.reserve(_MOST_CANDIDATES * (self.budget.clock() - start))
        self._evaluated = self.budget.step
        if scores is None:
            return
        value, _ = mean_and_error(scores)
        self.result.validation_losses.append(-value)
        self.result.validation_steps.append(self.budget.step)
        self.bar.note = f", {self.task.score_name} {self.task.describe(-value)}"
        if value > self._best["value"]:
            self._best = {"value": value, "step": self.budget.step, "weights": scored}
        if self.budget.decaying and not self._decay_begun:
            self._begin_decay()
        if self.budget.step and self.rule.update(scores):  # a fit that has not begun cannot have stalled
            self._settle()

    def _settle(self) -> None:
        if not self.budget.decaying and self.task.grow():
            self.rule.reset()
            if self.options.average:
                self._start_again()
        elif not self.budget.decaying:
            self.budget.begin_decay()
            self.bar.shorten(self.budget.end)
            self._go_to_best()
            self._begin_decay()
        elif self.budget.into_decay >= _SLOW:
            self.result.reason = self.rule.name

    def _go_to_best(self) -> None:
        self.weights.restore(self._best.get("weights", {}))
        self.average.restart()

    def _start_again(self) -> None:
        self._go_to_best()
        self.optimizer.state.clear()  # moments from overfitting make steps too small for a higher decay
        self._restarted = self.budget.step

    def _begin_decay(self) -> None:
        self._decay_begun = True
        self.rule.reset()  # scores from before say nothing of what smaller steps bring

    def _choose_weights(self) -> None:
        candidates = {"last": self.weights.copy()}
        if self.average.count:
            candidates["average"] = {**candidates["last"], **self.average.values}
        if self._best.get("step", self.budget.step) != self.budget.step:
            candidates["best"] = self._best["weights"]
        scores = {name: self._final_scores(values) for name, values in candidates.items()}
        chosen = "last"
        for name in candidates:
            chosen = name if is_better(scores[name], scores[chosen]) else chosen
        self.weights.restore(candidates[chosen])
        self.result.chosen = chosen
        self.result.best, self.result.best_error = mean_and_error(scores[chosen])
        self.result.num_unscored = int((~torch.isfinite(scores[chosen])).sum())

    def _final_scores(self, values: dict[str, Tensor]) -> Tensor:
        self.weights.restore(values)
        return self.task.final_scores()

    def _mark_boundary(self) -> None:
        self._boundary = {"random_state": random_state(), "task": self.task.state_dict()}
        self._mid_step = False

    def _save(self) -> None:
        if self.options.checkpoint is None or self.processes.rank:
            return
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        own = {"boundary": self._boundary, "best": self._best, "evaluated": self._evaluated}
        own |= {"restarted": self._restarted, "decay_begun": self._decay_begun, "rates": self._rates}
        last = {"weights": self.weights.copy(), "finished": bool(self.result.reason)}
        state = {**self._identity, **parts, **own, **last}
        write_checkpoint(self.options.checkpoint, state)

    def _resume(self) -> bool:
        self.processes.require_same("arguments", self._identity["arguments"])
        path, is_first = self.options.checkpoint, self.processes.rank == 0
        state = self.processes.from_first(read_checkpoint(path) if path and is_first else None)
        if path is None or state is None:
            return False
        for what in self._identity:
            check_same(path, what, state[what], self._identity[what])
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.weights.restore(state["weights"])
        self._best, self._evaluated, self._restarted = state["best"], state["evaluated"], state.get("restarted", 0)
        self._decay_begun, self._rates = state["decay_begun"], state["rates"]
        self.task.load_state_dict(state["boundary"]["task"])
        set_random_state(state["boundary"]["random_state"])
        return bool(state["finished"])

    def _parts(self) -> dict[str, Any]:
        names = ("optimizer", "budget", "rule", "recovery", "clip", "average", "result")
        return {name: getattr(self, name) for name in names}
