"""The verdict on a set of importance weights: k-hat and effective sample size weighed together."""

from __future__ import annotations

import math
from typing import NamedTuple

__all__ = ["Evidence", "verdict"]

_EVEN = 0.95  # share of the draws; with an ESS above, weights are so even that k-hat does not matter
_FEW = 100  # effective draws; a mean is then known to a tenth of its sd
_WANTED = 400  # effective draws to ask for: a mean known to a twentieth of its sd
_DRAWS_FOR_FULL_THRESHOLD = 2200  # from here on the threshold is 0.7
_MAX_DROPPED = 0.01  # share of the draws; below, leaving them out moves no estimate that a reader would notice


class Evidence(NamedTuple):
    """What a verdict rests on.

    Args:
        khat: shape of the tail of the weights.
        threshold: largest trustworthy k-hat for this many draws.
        ess: effective number of draws.
        num_draws: number of draws that have a weight, those of weight 0 included.
        num_zero: number of draws of weight 0.
        num_dropped: number of draws whose log-weight is NaN or +inf.
        message: an error that the model raised at some draw, or "".
    """

    khat: float
    threshold: float
    ess: float
    num_draws: int
    num_zero: int
    num_dropped: int
    message: str

    @property
    def even(self) -> bool:
        """Whether the weights are nearly equal."""
        return self.ess > _EVEN * self.num_draws

    @property
    def dropped_too_many(self) -> bool:
        """Whether more draws were left out than can be ignored."""
        return self.num_dropped > _MAX_DROPPED * (self.num_draws + self.num_dropped)

    @property
    def good(self) -> bool:
        """Whether the weighted draws can be trusted."""
        return (self.khat < self.threshold or self.even) and self.ess > 0 and not self.dropped_too_many


def verdict(evidence: Evidence) -> str:
    """One sentence: whether to trust the draws, why, and what to do next.

    >>> print(verdict(Evidence(0.2, 0.67, 820.0, 1000, 0, 0, "")))
    Trust the weighted draws (k-hat 0.20, good below 0.67; ESS 820 of 1000): use mean() and resample().
    """
    facts = (
        f"k-hat {evidence.khat:.2f}, good below {evidence.threshold:.2f}; "
        f"ESS {evidence.ess:.0f} of {evidence.num_draws}{_exceptions(evidence)}"
    )
    judgement, advice = _judge(evidence)
    return f"{judgement} ({facts}): {advice}."


def _judge(evidence: Evidence) -> tuple[str, str]:
    if evidence.ess == 0:
        advice = "check that model and guide fit together, and refit from another start"
        return "Do not use these draws, none has a positive weight", advice
    if evidence.dropped_too_many:
        advice = "make the density of the model finite where the guide draws, or constrain the sites"
        return "Do not trust these draws, the density is NaN or infinite at too many", advice
    return _judge_good(evidence) if evidence.good else _judge_bad(evidence)


def _judge_good(evidence: Evidence) -> tuple[str, str]:
    if evidence.even:
        harmless = "" if evidence.khat < evidence.threshold else ", and a high k-hat is harmless with weights this even"
        return (
            "Trust the draws as they are, the guide is close to the posterior" + harmless,
            "nothing more to do",
        )
    if evidence.ess < _FEW:
        wanted = _two_digits(evidence.num_draws * _WANTED / evidence.ess)
        advice = f"take num_draws={wanted} for about {_WANTED} effective draws, or give the guide more layers"
        return "Trust the weighted draws, but they are few", advice
    return "Trust the weighted draws", "use mean() and resample()"


def _judge_bad(evidence: Evidence) -> tuple[str, str]:
    if evidence.khat < 0.7:
        advice = f"take num_draws={_DRAWS_FOR_FULL_THRESHOLD} or more, where k-hat up to 0.70 is good"
        return "Undecided, there are too few draws for this k-hat", advice
    if evidence.khat < 1:
        advice = "fit longer or with more layers, then try a base with heavier tails (Student-t) or NeuTra"
        return "Do not trust the weighted draws, a few of them carry the estimates", advice
    advice = "fit longer, then try more layers, a base with heavier tails (Student-t), or NUTS through NeuTra"
    tail = "has no mean" if math.isfinite(evidence.khat) else "cannot be fitted"
    return f"Do not trust the weighted draws, the tail of the weights {tail}", advice


def _exceptions(evidence: Evidence) -> str:
    parts = [f"{evidence.num_zero} of weight 0"] * bool(evidence.num_zero)
    parts += [f"{evidence.num_dropped} left out as NaN or +inf"] * bool(evidence.num_dropped)
    parts += [f"the model says {evidence.message!r}"] * bool(evidence.message)
    return "".join(f", {part}" for part in parts)


def _two_digits(number: float) -> int:
    """Rounded up to two leading digits."""
    step = int(10 ** max(math.floor(math.log10(number)) - 1, 0))
    return math.ceil(number / step) * step
