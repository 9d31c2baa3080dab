"""The ELBO of a guide, as a task for the training loop."""

from __future__ import annotations

import math
import time
import warnings
from contextlib import suppress
from typing import Any

import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

from pyro_affine.compiled import Compile, agree
from pyro_affine.distributed import ALONE, Processes
from pyro_affine.latent_elbo import LatentELBO, latent_density
from pyro_affine.particles import Pair, first_success
from pyro_affine.random_state import new_seed, seeded
from pyro_affine.recorded import RecordedDensity
from pyro_affine.traces import BAD_DRAW

_PARTICLES_AT_ONCE, _PARTICLES_ONE_BY_ONE = 64, 8
_BANK_AT_ONCE, _BANK_ONE_BY_ONE = 1024, 64
_NUM_COMPARED = 4  # draws by which two ways to the loss are compared
_GROWTH = 4  # times as many draws, of the default number
_CHEAP, _NUM_TIMED = (2.0, 1.3), 3  # times the seconds of a step that each growth may take; losses timed


class GuideTask:
    """The ELBO of a guide, as a task for the training loop.

    The loss is that of ``Trace_ELBO``. Where the guide is an ``AutoContinuous`` made of one ``FlowTransform`` and the
    model has nothing to train and does not change from call to call, it is computed by ``LatentELBO``, which costs
    less and leaves single draws out that the model refuses; loss and gradient must agree on a few draws first.

    Where the number of draws is left to it, it grows once, fourfold: when the ELBO stalls, or at the start where
    that makes a step less than twice as long; there fourfold again, where that costs next to nothing.

    Args:
        pair: model and guide; the guide is set up, and has found its start.
        num_particles: draws a step; None for a default that suits how they run.
        nesting, reason: from ``Pair.find_nesting``.
        arguments: of the fit, which a checkpoint must agree in.
        processes: among which draws are split, rounded up; each has random numbers of its own.

    Attributes:
        num_dropped: number of single draws left out so far.
    """

    kind, weight = "guide", 1.0  # processes have equal shares
    loss_name, score_name = "ELBO", "fixed draws"
    remedy = (
        "Look at what the model does there for a far-out draw (a scale that overflows, the log of 0), start from a "
        "smaller init_scale, lower learning_rate, or use float64."
    )

    def __init__(
        self,
        pair: Pair,
        num_particles: int | None = None,
        *,
        nesting: int | None,
        reason: str = "",
        arguments: dict[str, Any] | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.pair, self.nesting, self.processes = pair, nesting, processes
        at_once = nesting is not None
        self.num_particles = num_particles or (_PARTICLES_AT_ONCE if at_once else _PARTICLES_ONE_BY_ONE)
        self.num_scored = _BANK_AT_ONCE if at_once else _BANK_ONE_BY_ONE
        self.arguments = {"num_particles": self.num_particles, **(arguments or {})}
        self._bank_seed = new_seed()
        if reason and self.num_particles > 1:
            _warn_of_single_draws(self.num_particles, reason)
        self._may_grow = at_once and num_particles is None
        self._direct: LatentELBO | None = None
        self._num_prepared = 0

    @property
    def num_dropped(self) -> int:
        """Number of single draws left out so far."""
        return 0 if self._direct is None else self._direct.num_dropped

    def touch_parameters(self) -> None:
        """Run guide and model at one draw, for what looks on to see their parameters."""
        first_success(lambda: self._traced_loss(1))

    def prepare(self) -> None:
        """Random numbers for the step, other ones in each process; the first goes on with its own."""
        self._num_prepared += 1
        if self.processes.rank:
            number = self._num_prepared * self.processes.size + self.processes.rank
            torch.manual_seed((self._bank_seed + number) % 2**63)  # known again where a fit is resumed

    def loss(self) -> Tensor:
        """Negative ELBO over this process's share of the particles of a step, in nats."""
        return (self._direct or self._traced_loss)(self._share(self.num_particles))

    def _share(self, num_particles: int) -> int:
        return -(-num_particles // self.processes.size)

    def _traced_loss(self, num_particles: int) -> Tensor:
        pair = self.pair
        elbo = Trace_ELBO(
            num_particles,
            max_plate_nesting=math.inf if self.nesting is None else self.nesting,
            vectorize_particles=self.nesting is not None,
        )
        loss: Tensor = elbo.differentiable_loss(pair.model, pair.guide, *pair.args, **pair.kwargs)
        return loss

    def use_direct_loss(
        self, parameters: list[Tensor], *, compile: Compile = False, compile_model: bool = False
    ) -> None:
        """Take the shorter way to the loss from here on, where there is one and it agrees.

        Args:
            parameters: what is trained.
            compile: whether to compile the guide's part of it, and how.
            compile_model: whether to record the model's part of it.
        """
        density = latent_density(self.pair, self.nesting)
        if density is not None:
            few = 1 if self.nesting is None else _NUM_COMPARED
            direct = LatentELBO(self.pair.guide, density)  # type: ignore[arg-type]  # it is an AutoContinuous
            if agree(lambda: direct(few), lambda: self._traced_loss(few), parameters):
                self._direct = direct
                direct.density = RecordedDensity(density) if compile_model else density
                direct.compile(compile)
        if self._direct is None and (compile or compile_model):
            _warn_of_no_compilation()

    def grow(self) -> bool:
        """Take more draws a step from here on; False where that has been done, or the number was given."""
        grows = self._may_grow
        self.num_particles *= _GROWTH if grows else 1
        self._may_grow = False
        return grows

    def grow_if_cheap(self, seconds: float) -> None:
        """Take more draws from the start, if a step hardly takes longer. Goes by the clock, for 1 or 2 % of it.

        Args:
            seconds: of the fit.
        """
        if not self._may_grow:
            return
        limit = seconds / 200
        now = self._seconds(self.num_particles, limit)
        for cheap in _CHEAP:
            more = self._seconds(_GROWTH * self.num_particles, limit)
            if more > cheap * now:
                return
            self.num_particles, self._may_grow, now = _GROWTH * self.num_particles, False, more

    def _seconds(self, num_particles: int, limit: float) -> float:
        """Of a loss and its gradient: the least of a few, as the clock is noisy; of one where that is over a limit."""
        loss = self._direct or self._traced_loss
        times: list[float] = []
        with seeded(0):
            while len(times) < _NUM_TIMED and sum(times) < limit:
                start = time.perf_counter()
                with suppress(*BAD_DRAW):
                    loss(self._share(num_particles)).backward()
                times.append(time.perf_counter() - start)
        return min(times)

    def scores(self) -> Tensor:
        """log p - log q of the same draws each time. Shape: (num_scored,)."""
        return self._scores(self._bank_seed)

    def final_scores(self) -> Tensor:
        """log p - log q of draws that training has not seen. Shape: (num_scored,)."""
        return self._scores(self._bank_seed + 1)

    def _scores(self, seed: int) -> Tensor:
        with seeded(seed):
            alone = self.pair.log_weights(self.num_scored, self.nesting) if self.processes.rank == 0 else torch.empty(0)
        return self.processes.from_first(alone)

    def locate(self) -> str:
        """The first site that is not finite."""
        return self.pair.first_bad_site(self.num_particles, self.nesting)

    def describe(self, loss: float) -> str:
        """The ELBO."""
        return f"{-loss:.5g}"

    def state_dict(self) -> dict[str, Any]:
        """The seed of the bank of draws, and the counts of draws."""
        counts = {"num_dropped": self.num_dropped, "num_particles": self.num_particles, "may_grow": self._may_grow}
        return {"bank_seed": self._bank_seed, "num_prepared": self._num_prepared, **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the run that is resumed."""
        self._bank_seed, self.num_particles = state["bank_seed"], state["num_particles"]
        self._may_grow, self._num_prepared = state["may_grow"], state["num_prepared"]
        if self._direct is not None:
            self._direct.num_dropped = state["num_dropped"]


def _warn_of_no_compilation() -> None:
    warnings.warn(
        "nothing is compiled, as the loss is that of Pyro's Trace_ELBO: compile and compile_model are for an "
        "AutoRealNVP, or another guide of one flow, and a model with neither parameters nor random subsamples.",
        RuntimeWarning,
        stacklevel=3,
    )


def _warn_of_single_draws(num_particles: int, reason: str) -> None:
    warnings.warn(
        f"the {num_particles} particles of a step run one by one: {reason}. To run them at once, which is faster, "
        "declare batch dimensions with pyro.plate, index from the right (x[..., i]) and do not branch on values.",
        stacklevel=3,
    )
