"""The training loop on tasks of one parameter, where each of its decisions can be seen."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_affine.checkpoint import read_checkpoint
from pyro_affine.fit_result import FitResult, NonFiniteError
from pyro_affine.progress import ProgressBar
from pyro_affine.random_state import random_state, seeded, set_random_state
from pyro_affine.recovery import Recovery, cloned
from pyro_affine.step_size import MedianClip, learning_rate_factor
from pyro_affine.stopping import Budget, Patience, Plateau, mean_and_error
from pyro_affine.task import LoopOptions, make_optimizer
from pyro_affine.trained_weights import MovingAverage, Weights
from pyro_affine.training import TrainingLoop


class Bowl:
    """Minimise (w - 3)^2 / 2 with noise in the gradient; ``disturb(call)`` may return another loss or raise."""

    kind, loss_name, score_name, remedy, arguments = "density", "train", "held out", "Move the bowl.", {}
    num_dropped, growths = 0, 0

    def __init__(self, noise: float = 0.0, disturb: Callable[[int, Tensor], Tensor | None] | None = None) -> None:
        self.w = torch.zeros(1, requires_grad=True)
        self.noise, self.disturb, self.calls = noise, disturb, 0
        self.rows = torch.randn(200, generator=torch.Generator().manual_seed(0))

    def prepare(self) -> None: ...

    def loss(self) -> Tensor:
        self.calls += 1
        other = self.disturb(self.calls, self.w) if self.disturb else None
        return (self.w - 3 - self.noise * torch.randn(1)).square().sum() / 2 if other is None else other

    def scores(self) -> Tensor | None:
        return -(self.w.detach() - 3 - self.rows).square() / 2

    def final_scores(self) -> Tensor:
        return -(self.w.detach() - 3 - self.rows + self.rows.mean()).square() / 2

    def grow(self) -> bool:
        self.growths -= 1
        return self.growths >= 0

    def locate(self) -> str:
        return "the bowl leaks"

    def describe(self, loss: float) -> str:
        return f"{loss}"

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"]


def make_loop(task: Bowl, num_steps: int = 300, rate: float = 0.1, rule: Any = None, **options: Any) -> TrainingLoop:
    options = {"warmup": 0, "evaluate_every": 1000, "progress": False, **options}
    decay = options.pop("decay", 0.5)
    optimizer = options.pop("optimizer", torch.optim.Adam)
    return TrainingLoop(
        task,
        Weights({"w": task.w}),
        make_optimizer(optimizer, [task.w], lr=rate),
        budget=Budget(num_steps, decay=decay),
        rule=rule or Plateau(),
        options=LoopOptions(**options),
    )


def nan_from(first: int, last: float = math.inf) -> Callable[[int, Tensor], Tensor | None]:
    return lambda call, w: w.sum() * math.nan if first <= call <= last else None


def raise_at(call: int, error: BaseException) -> Callable[[int, Tensor], Tensor | None]:
    def disturb(now: int, w: Tensor) -> None:
        if now == call:
            raise error

    return disturb


# ---- schedule, clipping, budget


def test_a_warmup_takes_no_more_than_a_tenth_of_what_is_left_when_training_begins() -> None:
    now = [0.0]
    budget = Budget(seconds=10.0, clock=lambda: now[0])
    now[0] = 6.0  # a search for a start
    budget.begin()
    assert budget.progress == pytest.approx(0.6) and budget.warmup(50) == 50  # what a step takes is not known yet
    now[0] = 6.19
    budget.tick()
    assert budget.warmup(50) == 2  # of 21 steps
    assert Budget(num_steps=100).warmup(50) == 10 and Budget(num_steps=1000).warmup(50) == 50


@pytest.mark.parametrize(
    ("step", "into_decay", "factor"),
    [(0, 0.0, 0.02), (24, 0.0, 0.5), (49, 0.0, 1.0), (900, 0.0, 1.0), (900, 0.5, 0.5), (999, 1.0, 0.0)],
)
def test_learning_rate_rises_stays_and_falls(step: int, into_decay: float, factor: float) -> None:
    assert learning_rate_factor(step, into_decay, warmup=50) == pytest.approx(factor, abs=1e-9)


@pytest.mark.parametrize(
    ("decay", "expected"),
    [(0.5, [0, 0, 0, 0.5, 1]), (0.25, [0, 0, 0, 0, 1]), (0.0, [0, 0, 0, 0, 0])],
    ids=str,
)
def test_budget_tells_how_far_into_the_decay_it_is(decay: float, expected: list[float]) -> None:
    budget, seen = Budget(num_steps=4, decay=decay), []
    for _ in range(5):
        seen.append(budget.into_decay)
        budget.tick()
    assert seen == expected


def test_loop_sets_the_rate_of_the_schedule() -> None:
    loop = make_loop(Bowl(), num_steps=20, warmup=2, decay=0.2, optimizer=torch.optim.SGD)
    rates = []
    loop._mark_boundary()
    for _ in range(20):
        loop.step()
        rates.append(loop.optimizer.param_groups[0]["lr"])
    halves = [(1 + math.cos(math.pi * u)) / 2 for u in (0, 0.25, 0.5, 0.75)]
    assert rates == pytest.approx([0.05, *[0.1] * 15, *(0.1 * half for half in halves)])


def test_clip_leaves_the_first_norms_alone_then_follows_the_median() -> None:
    guard = MedianClip()
    assert [guard.factor(norm) for norm in (1.0, 100.0) * 10] == [1.0] * 20
    guard = MedianClip()
    assert [guard.factor(1.0) for _ in range(50)] == [1.0] * 50
    assert guard.factor(2.0) == 1.0
    assert guard.factor(8.0) == 0.25
    assert guard.factor(10.5) == 0.0


def test_clip_does_not_skip_for_ever() -> None:
    guard = MedianClip()
    factors = [guard.factor(1.0) for _ in range(100)] + [guard.factor(100.0) for _ in range(60)]
    assert factors[100:108] == [0, 0, 0, 0.02, 0, 0, 0, 0.02]
    assert factors[-1] == 1.0


def test_gradients_are_clipped_and_far_ones_left_out() -> None:
    def disturb(call: int, w: Tensor) -> Tensor:
        return w.sum() * {41: 4.0, 42: 20.0}.get(call, 1.0)

    task = Bowl(disturb=disturb)
    loop = make_loop(task, optimizer=torch.optim.SGD, rate=1.0, decay=0.0)
    loop._mark_boundary()
    steps = []
    for _ in range(43):
        before = task.w.item()
        loop.step()
        steps.append(before - task.w.item())
    assert steps[39:] == [1.0, 2.0, 0.0, 1.0]
    assert loop.result.gradient_norms[39:] == [1.0, 4.0, 20.0, 1.0]
    assert (loop.result.num_skipped, loop.result.num_nonfinite) == (1, 0)


def test_budget_in_seconds_follows_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 101.0, 103.0, 110.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    budget = Budget(seconds=10.0)
    progress = []
    for _ in range(3):
        budget.tick()
        progress.append(budget.progress)
    assert progress == [0.1, 0.3, 1.0]
    assert budget.exhausted and budget.limit == "seconds"


def test_budget_ends_with_whichever_limit_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.perf_counter", lambda: 0.0)
    budget = Budget(num_steps=2, seconds=1000.0)
    budget.tick()
    assert (budget.progress, budget.exhausted) == (0.5, False)
    budget.tick()
    assert budget.exhausted and budget.limit == "num_steps"


def test_early_decay_keeps_its_share_and_never_lengthens() -> None:
    budget = Budget(num_steps=100, decay=0.5)
    for _ in range(20):
        budget.tick()
    budget.begin_decay()
    assert budget.decaying and not budget.exhausted and budget.progress == 0.5
    for _ in range(20):
        budget.tick()
    assert budget.exhausted
    budget.begin_decay()
    assert budget.exhausted


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "needs num_steps or seconds"),
        ({"num_steps": 0}, "num_steps must be positive, got 0"),
        ({"seconds": -1.0}, "seconds must be positive, got -1"),
        ({"seconds": math.nan}, "seconds must be positive, got nan"),
        ({"num_steps": 1, "decay": 1.0}, "decay must be in"),
    ],
    ids=str,
)
def test_budget_refuses(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Budget(**arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"warmup": -1}, "warmup must be at least 0"),
        ({"evaluate_every": 0}, "evaluate_every must be at least 1"),
        ({"every": 0}, "every must be at least 1"),
        ({"checkpoint": Path(__file__).parent}, "must be a file, got the folder"),
    ],
    ids=str,
)
def test_options_refuse(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LoopOptions(**arguments)


# ---- rules


def test_plateau_compares_with_both_evaluations_before() -> None:
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    rule = Plateau(tolerance=0.01)
    levels = [0.0, 1.0, 1.005, 1.008, 1.5, 1.5, 1.5]
    assert [rule.update(noise + level) for level in levels] == [False, False, False, True, False, False, True]


def test_plateau_does_not_take_noise_for_a_rise() -> None:
    rule = Plateau(tolerance=0.0)
    generator = torch.Generator().manual_seed(0)
    updates = [rule.update(torch.randn(400, generator=generator) + 0.02 * k) for k in range(3)]
    assert updates == [False, False, True]


def test_plateau_is_not_called_early_for_a_few_wild_draws() -> None:
    rule = Plateau()
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    wild = [torch.cat([noise, torch.randn(3, generator=torch.Generator().manual_seed(k)) * 1e4]) for k in range(5)]
    assert not any(rule.update(wild[k] + 0.2 * k) for k in range(5))


def test_plateau_without_a_tolerance_never_comes() -> None:
    rule = Plateau(tolerance=None)
    assert not any(rule.update(torch.zeros(10)) for _ in range(6))


def test_patience_counts_since_the_best() -> None:
    rule = Patience(limit=2)
    scores = [1.0, 2.0, 1.5, 2.5, 2.4, 2.5, 2.6]
    assert [rule.update(torch.full((5,), s)) for s in scores] == [False, False, False, False, False, True, False]


def test_scores_that_are_not_finite_are_left_out_of_the_mean() -> None:
    assert mean_and_error(torch.tensor([1.0, 3.0, math.nan, -math.inf])) == (2.0, 1.0)
    assert mean_and_error(torch.tensor([math.nan, 1.0])) == (-math.inf, math.inf)


def test_plateau_brings_the_decay_forward_then_stops() -> None:
    task = Bowl()
    fit = make_loop(task, num_steps=10_000, evaluate_every=20).run()
    assert fit.reason == "plateau"
    assert fit.num_steps < 1000
    assert task.w.item() == pytest.approx(3.0, abs=0.02)


class Scripted:
    """A rule that says yes at some evaluations, and counts its resets."""

    name, limit = "plateau", None

    def __init__(self, *yes: int) -> None:
        self.yes, self.updates, self.resets = yes, 0, 0

    def update(self, scores: Tensor) -> bool:
        self.updates += 1
        return self.updates in self.yes

    def reset(self) -> None:
        self.resets += 1


@pytest.mark.parametrize(
    ("yes", "num_steps", "resets"),
    [((), 100, 1), ((2,), 40, 1), ((5,), 100, 1), ((6,), 100, 1), ((8,), 80, 1)],
    ids=str,
)
def test_a_rule_ends_the_fit_only_once_the_rate_has_fallen(yes: tuple[int, ...], num_steps: int, resets: int) -> None:
    rule = Scripted(*yes)
    fit = make_loop(Bowl(), num_steps=100, evaluate_every=10, rule=rule).run()
    assert (fit.num_steps, rule.resets) == (num_steps, resets)


def test_early_decay_starts_from_the_best_weights() -> None:
    task = Bowl(disturb=lambda call, w: None if call <= 60 else w.sum())  # after 60 steps it walks away
    loop = make_loop(task, num_steps=10_000, rule=Patience(2), evaluate_every=20, rate=0.2)
    settle, seen = loop._settle, []
    loop._settle = lambda: (seen.append(task.w.item()), settle(), seen.append(task.w.item()))  # type: ignore[method-assign]
    fit = loop.run()
    assert abs(seen[0] - 3) > 1 and abs(seen[1] - 3) < 0.1
    assert fit.reason == "patience"
    assert task.w.item() == pytest.approx(3.0, abs=0.1)
    assert fit.best == pytest.approx(-0.5, abs=0.06)
    assert fit.chosen == "best"


# ---- average and choice


def test_average_is_between_and_follows() -> None:
    p = torch.zeros(1, requires_grad=True)
    average = MovingAverage({"p": p})
    for value in (0.0, *[1.0] * 200):
        with torch.no_grad():
            p.fill_(value)
        average.update()
    assert 0.999 < average.values["p"].item() <= 1.0


def test_average_is_kept_when_it_scores_better() -> None:
    task = Bowl(noise=3.0, disturb=raise_at(201, KeyboardInterrupt()))  # the rate is still high, the last step noisy
    loop = make_loop(task, num_steps=1000, decay=0.99, optimizer=torch.optim.SGD, rate=0.5)
    last = []
    choose = loop._choose_weights
    loop._choose_weights = lambda: (last.append(task.w.item()), choose())[-1]  # type: ignore[method-assign]
    with seeded(0):
        fit = loop.run()
    assert fit.chosen == "average"
    assert abs(task.w.item() - 3) < abs(last[0] - 3)


@pytest.mark.parametrize("worse", ["last", "average", "best"])
def test_the_worst_candidate_is_never_kept(worse: str) -> None:
    loop = make_loop(task := Bowl(), num_steps=1)
    values = {"last": 2.9, "average": 3.0, "best": 3.05, worse: 9.0}
    with torch.no_grad():
        task.w.fill_(values["last"])
    loop.average.count, loop.average.values = 1, {"w": torch.tensor([values["average"]])}
    loop._best = {"value": 0.0, "step": 7, "weights": {"w": torch.tensor([values["best"]])}}
    loop._choose_weights()
    kept = min((name for name in values if name != worse), key=lambda name: abs(values[name] - 3))
    assert loop.result.chosen == kept
    assert task.w.item() == pytest.approx(values[kept])


def test_candidate_with_more_finite_scores_is_kept() -> None:
    class Cliff(Bowl):
        def final_scores(self) -> Tensor:
            scores = super().final_scores()
            return torch.where((self.w.detach() > 3) & (self.rows > 0), math.nan, scores)

    loop = make_loop(task := Cliff(), num_steps=1)
    loop.average.count, loop.average.values = 1, {"w": torch.tensor([3.01])}
    loop._choose_weights()
    assert loop.result.chosen == "last" and loop.result.num_unscored == 0
    with torch.no_grad():
        task.w.fill_(3.01)
    loop._choose_weights()
    assert loop.result.num_unscored == int((task.rows > 0).sum())
    assert "left out of that" in str(loop.result)
    with torch.no_grad():
        task.w.fill_(0.0)
    assert task.w.item() == 0.0


# ---- steps that are not finite


@pytest.mark.parametrize(
    "disturb",
    [
        nan_from(50, 55),
        lambda call, w: (w * 0).sqrt().sum() if 50 <= call <= 55 else None,  # a finite loss with an infinite gradient
        raise_at(50, ValueError("scale must be positive")),
        raise_at(50, torch.linalg.LinAlgError("not positive definite")),
        raise_at(50, OverflowError("math range error")),
    ],
    ids=["nan loss", "infinite gradient", "ValueError", "LinAlgError", "OverflowError"],
)
def test_a_few_bad_steps_are_skipped_and_counted(disturb: Any) -> None:
    task = Bowl(disturb=disturb)
    fit = make_loop(task).run()
    bad = sum(not (math.isfinite(a) and math.isfinite(b)) for a, b in zip(fit.losses, fit.gradient_norms, strict=True))
    assert 1 <= bad == fit.num_nonfinite == fit.num_skipped <= 6
    assert (fit.num_steps, fit.num_rescues) == (300, 0)
    assert task.w.item() == pytest.approx(3.0, abs=0.01)


def test_other_errors_are_raised_at_once() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        make_loop(Bowl(disturb=raise_at(5, RuntimeError("shapes do not match")))).run()


def test_bad_steps_that_persist_bring_back_good_weights_and_smaller_steps() -> None:
    task = Bowl(disturb=nan_from(101, 125))
    loop = make_loop(task, num_steps=200, optimizer=torch.optim.SGD)
    with pytest.warns(RuntimeWarning, match=r"20 steps in a row up to step 120 .* weights of step 50 with 0\.2 times"):
        fit = loop.run()
    assert fit.num_rescues == 1
    assert (fit.num_nonfinite, fit.reason) == (25, "num_steps")
    factor = learning_rate_factor(199, 0.99, warmup=0)
    assert loop.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.2 * factor)


def test_rescue_undoes_what_spoilt_the_weights() -> None:
    class Spoiling(torch.optim.SGD):
        steps = 0

        def step(self, closure: Any = None) -> None:
            super().step(closure)
            self.steps += 1
            if self.steps == 80:
                self.param_groups[0]["params"][0].data.fill_(math.nan)

    task = Bowl()
    with pytest.warns(RuntimeWarning, match="weights of step 50"):
        fit = make_loop(task, num_steps=300, optimizer=Spoiling).run()
    assert (fit.num_rescues, fit.num_nonfinite) == (1, 20)
    assert task.w.item() == pytest.approx(3.0, abs=0.1)


def test_going_back_restores_weights_and_optimizer() -> None:
    w = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.Adam([w], lr=0.1)
    recovery = Recovery(Weights({"w": w}), optimizer)

    def step() -> None:
        w.grad = torch.ones(2)
        optimizer.step()

    step()
    recovery.saw_good(0)
    kept, moments = w.detach().clone(), cloned(optimizer.state_dict()["state"][0])
    for _ in range(2):
        step()
        recovery.go_back()
        assert torch.equal(w, kept)
        assert all(torch.equal(value, moments[name]) for name, value in optimizer.state_dict()["state"][0].items())
    assert recovery.rate_scale == pytest.approx(0.04) and recovery.used_up


@pytest.mark.filterwarnings("ignore:20 steps in a row:RuntimeWarning")
def test_the_error_names_step_place_and_remedy_and_nothing_is_lost() -> None:
    task = Bowl(disturb=nan_from(101))
    with pytest.raises(
        NonFiniteError, match=r"step 160: the bowl leaks\. .* step 50, the last good ones\. Move the bowl\."
    ) as error:
        make_loop(task).run()
    fit = pickle.loads(pickle.dumps(error.value)).result
    assert (fit.reason, fit.num_steps, fit.num_nonfinite, fit.num_rescues) == ("non-finite", 160, 60, 2)
    assert len(fit.losses) == len(fit.times) == len(fit.gradient_norms) == 160
    reference = Bowl()
    loop = make_loop(reference)
    loop._mark_boundary()
    for _ in range(50):
        loop.step()
    assert torch.equal(task.w, reference.w)


def test_a_short_fit_without_one_good_step_is_an_error() -> None:
    with pytest.raises(NonFiniteError, match=r"step 9: the bowl leaks\. 9 of 9 steps were not finite"):
        make_loop(Bowl(disturb=nan_from(1)), num_steps=9).run()


def test_weights_that_never_were_good_stay_as_they_are() -> None:
    task = Bowl(disturb=nan_from(1))
    with pytest.warns(RuntimeWarning), pytest.raises(NonFiniteError, match="weights of step 0"):
        make_loop(task).run()
    assert task.w.item() == 0.0


# ---- interruption, resumption, random state, progress


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b or (a != a and b != b)  # NaN is not its own equal


def test_a_resumed_loop_is_in_the_same_state(tmp_path: Path) -> None:
    def make(path: Path) -> TrainingLoop:
        return make_loop(Bowl(noise=1.0), num_steps=200, checkpoint=path, every=150, evaluate_every=20)

    loop = make(path := tmp_path / "a.ckpt")
    loop._mark_boundary()
    for _ in range(150):
        loop._advance()
    state = read_checkpoint(path)
    assert (
        state is not None and state["average"]["count"] > 0 and state["rule"]["previous"] and state["best"]["weights"]
    )
    assert len(state["clip"]["norms"]) == 100 and state["recovery"]["saved"]
    again = make(path)
    assert again._resume() is False
    again.options.checkpoint = tmp_path / "b.ckpt"
    again._mark_boundary()
    again._save()
    resaved = read_checkpoint(tmp_path / "b.ckpt")
    assert resaved is not None and [name for name in state if not equal(state[name], resaved[name])] == []


def test_a_resumed_loop_keeps_its_learning_rate(tmp_path: Path) -> None:
    task = Bowl(disturb=raise_at(51, KeyboardInterrupt()))
    make_loop(task, rate=0.1, checkpoint=tmp_path / "a.ckpt").run()
    again = make_loop(Bowl(), rate=0.2, checkpoint=tmp_path / "a.ckpt")
    again._resume()
    assert again._rates == [0.1]


def test_interruption_saves_the_last_whole_step(tmp_path: Path) -> None:
    task = Bowl(disturb=raise_at(101, KeyboardInterrupt()))
    make_loop(task, checkpoint=tmp_path / "a.ckpt", every=1000).run()
    state = read_checkpoint(tmp_path / "a.ckpt")
    assert state is not None and state["budget"]["step"] == 100 and state["finished"] is False
    assert state["boundary"]["task"] == {"calls": 100}


def test_an_evaluation_that_was_cut_off_is_made_up_for(tmp_path: Path) -> None:
    class Interrupted(Bowl):
        def scores(self) -> Tensor | None:
            if self.calls == 40:
                raise KeyboardInterrupt
            return super().scores()

    options = {"evaluate_every": 20, "num_steps": 100}
    whole = make_loop(Bowl(), **options).run()
    broken = make_loop(Interrupted(), checkpoint=tmp_path / "a.ckpt", **options).run()
    assert (broken.num_steps, broken.validation_steps) == (40, [0, 20])
    resumed = make_loop(Bowl(), checkpoint=tmp_path / "a.ckpt", **options).run()
    assert resumed.validation_steps == whole.validation_steps == [0, 20, 40, 60, 80, 100]
    assert resumed.validation_losses == whole.validation_losses


def test_any_other_error_saves_the_last_whole_step_too(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        make_loop(Bowl(disturb=raise_at(101, RuntimeError("out of memory"))), checkpoint=tmp_path / "a.ckpt").run()
    state = read_checkpoint(tmp_path / "a.ckpt")
    assert state is not None and state["budget"]["step"] == 100


def test_a_step_cut_in_half_is_not_saved(tmp_path: Path) -> None:
    class Interrupting(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise KeyboardInterrupt

    fit = make_loop(Bowl(), checkpoint=tmp_path / "a.ckpt", optimizer=Interrupting).run()
    assert fit.reason == "interrupted"
    assert not (tmp_path / "a.ckpt").exists()


def test_interruption_returns_what_was_trained() -> None:
    task = Bowl(disturb=raise_at(101, KeyboardInterrupt()))
    fit = make_loop(task).run()
    assert (fit.reason, fit.num_steps) == ("interrupted", 100)
    assert "was interrupted" in str(fit)
    assert 2.0 < task.w.item() < 4.0


def test_seeded_block_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    with seeded(3):
        first = torch.rand(3)
    with pytest.raises(RuntimeError), seeded(3):
        assert torch.equal(torch.rand(3), first)
        raise RuntimeError
    assert torch.equal(torch.get_rng_state(), state)
    with seeded(None):
        torch.rand(1)
    assert not torch.equal(torch.get_rng_state(), state)


def test_random_state_can_be_put_back() -> None:
    state = random_state()
    first = torch.rand(3)
    set_random_state(state)
    assert torch.equal(torch.rand(3), first)


def test_bar_is_silent_in_a_file_and_shows_loss_and_norm_in_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_loop(Bowl(), num_steps=30, progress=True).run()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("pyro_affine.progress._is_watched", lambda: True)
    make_loop(Bowl(), num_steps=30, progress=True).run()
    shown = capsys.readouterr().err
    assert "density" in shown and "30/30" in shown and "|gradient|" in shown
    make_loop(Bowl(), num_steps=30, progress=False).run()
    assert capsys.readouterr().err == ""


def test_bar_in_seconds(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyro_affine.progress._is_watched", lambda: True)
    bar = ProgressBar("guide", None, 60.0, show=True, describe=lambda loss: f"ELBO {-loss:.2f}")
    bar.update(10, 30.0, 1.25, 3.0)
    bar.close(20, 60.0)
    shown = capsys.readouterr().err
    assert "30/60 s" in shown and "ELBO -1.25" in shown and "100%" in shown


@pytest.mark.parametrize(
    ("factory", "rate", "words"),
    [
        (torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1), 0.1, "must be a factory"),
        ("Adam", 0.1, "must be a factory"),
        (torch.optim.LBFGS, 0.1, "whose steps need no closure"),
        (torch.optim.Adam, 0.0, "learning_rate must be positive"),
    ],
    ids=["made", "string", "LBFGS", "rate 0"],
)
def test_optimizer_factory_is_checked(factory: Any, rate: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_optimizer(factory, [torch.zeros(1, requires_grad=True)], lr=rate)


def test_pyro_optimizers_are_refused_with_the_way_out() -> None:
    from pyro.optim import ClippedAdam

    with pytest.raises(ValueError, match=r"pass torch\.optim\.Adam"):
        make_optimizer(ClippedAdam({"lr": 0.1}), [torch.zeros(1, requires_grad=True)], lr=0.1)


# ---- result


def test_plot_is_saved_by_name(tmp_path: Path) -> None:
    fit = make_loop(Bowl(noise=1.0, disturb=nan_from(50, 55)), evaluate_every=50).run()
    figure = fit.plot(tmp_path / "fit.png")
    assert (tmp_path / "fit.png").stat().st_size > 5000
    upper, lower = figure.axes
    assert upper.get_title().startswith("log-density")
    low, high = upper.get_ylim()
    assert low < -fit.best < high
    assert lower.get_yscale() == "log"


def test_plot_of_an_empty_fit_does_not_fail() -> None:
    assert FitResult("guide").plot() is not None


@pytest.mark.parametrize("reason", ["num_steps", "seconds", "plateau", "patience", "interrupted", "non-finite", ""])
def test_summary_is_one_paragraph(reason: str) -> None:
    fit = FitResult("guide", reason=reason, best=-3.21, best_error=0.01, num_steps=7, times=[1.0], num_skipped=2)
    text = str(fit)
    assert "\n" not in text and "step 7" in text and "ELBO -3.21" in text and "2 steps were skipped" in text


def test_a_plateau_first_asks_for_more_draws() -> None:
    plain, growing = Bowl(), Bowl()
    growing.growths = 1
    steps = [make_loop(task, num_steps=10_000, evaluate_every=20).run().num_steps for task in (plain, growing)]
    assert steps[1] > steps[0] and growing.growths < 0


def test_the_start_is_kept_where_training_makes_it_worse() -> None:
    task = Bowl()
    task.w.data.fill_(3.0)
    task.rows = task.rows - task.rows.mean()
    task.disturb = lambda call, w: w.sum()
    fit = make_loop(task, num_steps=30, rate=1.0).run()
    assert fit.chosen == "best" and task.w.item() == 3.0


# ---- the moving average in place of the weights


class Seen(Bowl):
    """Keeps the weights that are scored."""

    def __init__(self, noise: float = 1.0) -> None:
        super().__init__(noise)
        self.seen: list[float] = []

    def scores(self) -> Tensor | None:
        self.seen.append(self.w.item())
        return super().scores()


@pytest.mark.parametrize("average", [False, True])
def test_scored_is_the_average_or_the_weights(average: bool) -> None:
    torch.manual_seed(0)
    task = Seen()
    loop = make_loop(task, num_steps=100, rule=Patience(1000), evaluate_every=10, average=average)
    for _ in range(30):
        loop._advance()
    assert len(task.seen) == 3
    assert (task.seen[-1] == loop.average.values["w"].item()) if average else (task.seen[-1] == task.w.item())
    assert not average or task.w.item() != task.seen[-1]


def test_training_goes_on_from_the_weights_themselves() -> None:
    losses = []
    for average in (False, True):
        torch.manual_seed(0)
        options = {"rule": Patience(1000), "evaluate_every": 10, "average": average}
        losses.append(make_loop(Seen(), num_steps=100, **options).run().losses)
    assert losses[0] == losses[1]


def test_a_plateau_goes_back_to_the_best_average() -> None:
    torch.manual_seed(0)
    task = Seen()
    task.growths = 1
    loop = make_loop(task, num_steps=400, rule=Patience(2), evaluate_every=10, average=True)
    returned = []
    loop.weights.restore = lambda values, restore=loop.weights.restore: (  # type: ignore[method-assign]
        restore(values),
        returned.append(loop.weights.copy()["w"].item()),
    )
    loop.run()
    assert task.growths < 0
    assert any(value == min(task.seen, key=lambda w: abs(w - 3 - float(task.rows.mean()))) for value in returned)


def test_a_plateau_warms_up_a_new_optimiser_and_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    def make(name: str, growths: int) -> TrainingLoop:
        torch.manual_seed(0)
        task = Seen()
        task.growths = growths
        options = {"rule": Patience(1), "evaluate_every": 10, "warmup": 20, "average": True}
        return make_loop(task, num_steps=200, checkpoint=tmp_path / name, every=1000, **options)

    whole = make("a", 1).run()
    part = make("b", 1)
    part._mark_boundary()
    part._evaluate()
    while not part._restarted:
        part._advance()
    assert not part.optimizer.state
    part.step()
    assert part.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 20)
    part._save()
    assert make("b", 0).run().losses == whole.losses
