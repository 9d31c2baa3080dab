"""What a guide is held against: figures of one group of runs, and the bars that it misses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

from methods import ABLATIONS, OURS

Row = dict[str, Any]
Group = tuple[str, str, float, str, bool]  # target, method, seconds, dtype, tuned

FULL_RANK, LOW_RANK, MEAN_FIELD = "AutoMultivariateNormal", "AutoLowRankMultivariateNormal", "AutoNormal"
MOST_ERROR_WEIGHTED, MOST_ERROR_RAW = 0.1, 0.15  # posterior standard deviations
BELOW_FULL_RANK, BELOW_BEST = 0.02, 0.03  # nats
MOST_FUNNEL_GAP = 0.05  # nats
MOST_MEAN_ERROR, MOST_SD_ERROR = 0.1, math.log(1.15)  # against a long NUTS run
GOOD_ESS = 0.95  # share of the draws above which a high k-hat does no harm


def grouped(rows: Iterable[Row]) -> dict[Group, list[Row]]:
    """Rows of one target, method, budget, dtype and tuning, which differ in the seed, in order of seed."""
    groups: dict[Group, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        key = (row["target"], row["method"], row["seconds"], row["dtype"], row["tuned"])
        groups.setdefault(key, []).append(row)
    return groups


def values(rows: Iterable[Row], name: str) -> list[float]:
    """A figure in each run that has it."""
    return [row[name] for row in rows if row.get(name) is not None]


def typical(rows: Iterable[Row], name: str) -> float:
    """Median of a figure over the runs; NaN where none has it."""
    found = values(rows, name)
    return median(found) if found else math.nan


def good_khat(row: Row) -> bool:
    """Whether k-hat is below the threshold, or nearly all draws count."""
    return bool(row["khat"] < row["threshold"] or row["ess"] > GOOD_ESS)


class Verdict(NamedTuple):
    """Bars that are missed, and bars that cannot be judged by the runs there are, in words."""

    missed: list[str]
    open: list[str]

    def __str__(self) -> str:
        if self.missed:
            return "fail: " + ", ".join(self.missed)
        return f"open: {', '.join(self.open)}" if self.open else "pass"


@dataclass(frozen=True)
class Field:
    """All groups, to compare one with the others of its target.

    Args:
        groups: from ``grouped``.
        kinds: kind of each target.
    """

    groups: dict[Group, list[Row]]
    kinds: dict[str, str]

    def best_elbo(self, target: str) -> float:
        """Highest median ELBO of any method at any budget, among those with all weights finite; NaN if none."""
        medians = [
            typical(rows, "elbo")
            for key, rows in self.groups.items()
            if key[0] == target and all(row["status"] == "ok" for row in rows)
        ]
        return max((value for value in medians if math.isfinite(value)), default=math.nan)

    def peer(self, group: Group, method: str) -> list[Row]:
        """Runs of a method on the same target with the same budget and dtype, tuned or not, whichever is better."""
        target, _, seconds, dtype, _ = group
        found = [self.groups.get((target, method, seconds, dtype, tuned), []) for tuned in (False, True)]
        return max(found, key=lambda rows: _or_lowest(typical(rows, "elbo")))

    def below_full_rank(self, group: Group) -> bool:
        """Whether the median ELBO is more than 0.02 nat below that of the full-rank Gaussian, or there is none."""
        ours, theirs = (typical(rows, "elbo") for rows in (self.groups[group], self.peer(group, FULL_RANK)))
        return not (math.isnan(theirs) or ours >= theirs - BELOW_FULL_RANK)

    def verdict(self, group: Group) -> Verdict | None:
        """How a group stands against the bars of its target; None where no bar is set for it."""
        rows = self.groups[group]
        bars = self._bars(group)
        if bars is None:
            return None
        failures = sum(row["status"] != "ok" for row in rows)
        words = [f"{failures} of {len(rows)} runs failed"] if failures else []
        ok = [row for row in rows if row["status"] == "ok"]
        words += [word for bar in bars if ok for word in bar(ok)]
        words = list(dict.fromkeys(words))
        return Verdict([w for w in words if not w.startswith("no ")], [w for w in words if w.startswith("no ")])

    def _bars(self, group: Group) -> list[Callable[[list[Row]], list[str]]] | None:
        target, kind = group[0], self.kinds.get(group[0], "")
        if kind == "posterior":
            return [_khat, _errors, lambda rows: self._elbo(group, rows)]
        if target == "funnel_10":
            return [_finite, _funnel_gap]
        if target in ("funnel_100", "horseshoe"):
            return [_finite]
        if target == "ovarian":
            return [_finite, lambda rows: self._above(group, rows, MEAN_FIELD)]
        if kind == "hierarchical":
            rivals = (FULL_RANK, LOW_RANK) if group[1] in OURS | ABLATIONS else ()
            return [_finite, _nuts_errors, *(_against(self, group, rival) for rival in rivals)]
        return None

    def _elbo(self, group: Group, rows: list[Row]) -> list[str]:
        lowest = min(values(rows, "elbo"))
        full_rank = typical(self.peer(group, FULL_RANK), "elbo")
        words = [] if math.isfinite(full_rank) else [f"no {FULL_RANK} to compare with"]
        if lowest < full_rank - BELOW_FULL_RANK:
            words.append(f"{full_rank - lowest:.3g} below full rank")
        best = self.best_elbo(group[0])
        if lowest < best - BELOW_BEST or not math.isfinite(lowest):
            words.append(f"{best - lowest:.3g} below best")
        return words

    def _above(self, group: Group, rows: list[Row], rival: str) -> list[str]:
        """Whether the ELBO is above that of a rival by more than 2 standard errors, in every seed."""
        if group[1] == rival:
            return []
        peers = [row for row in self.peer(group, rival) if row["status"] == "ok"]
        if not peers:
            return [f"no {rival} to compare with"]
        other, other_se = typical(peers, "elbo"), typical(peers, "elbo_se")
        margins = [(row["elbo"] - other, math.hypot(row["elbo_se"], other_se)) for row in rows]
        short = [margin for margin, error in margins if math.isfinite(other) and not margin > 2 * error]
        return [f"ELBO not above {rival} by 2 s.e. ({min(short):+.3g})"] if short else []


def _against(field: Field, group: Group, rival: str) -> Callable[[list[Row]], list[str]]:
    return lambda rows: field._above(group, rows, rival)


def _or_lowest(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def _khat(rows: list[Row]) -> list[str]:
    bad = [row for row in rows if not good_khat(row)]
    return [f"k-hat in {len(bad)} of {len(rows)}"] if bad else []


def _errors(rows: list[Row]) -> list[str]:
    words = []
    for label, suffix, most in (("raw", "raw", MOST_ERROR_RAW), ("PSIS", "psis", MOST_ERROR_WEIGHTED)):
        largest = max((max(row[f"mean_{suffix}"], row[f"sd_{suffix}"]) for row in rows if "mean_raw" in row), default=0)
        if largest >= most:
            words.append(f"error {label} {largest:.2g}")
    return words


def _nuts_errors(rows: list[Row]) -> list[str]:
    """Errors of the draws that the verdict recommends: weighted where k-hat is good, else as they come."""
    words = [] if all("mean_raw" in row for row in rows) else ["no reference draws"]
    for name, most in (("mean", MOST_MEAN_ERROR), ("sd", MOST_SD_ERROR)):
        found = [row[f"{name}_{'psis' if good_khat(row) else 'raw'}"] for row in rows if f"{name}_raw" in row]
        if found and max(found) >= most:
            words.append(f"{name} error {max(found):.2g}")
    return words


def _finite(rows: list[Row]) -> list[str]:
    bad = [row for row in rows if not (row["finite_weights"] and math.isfinite(row["elbo"]))]
    return [f"not finite in {len(bad)} of {len(rows)}"] if bad else []


def _funnel_gap(rows: list[Row]) -> list[str]:
    gap = -min(values(rows, "elbo"))
    return [f"ELBO gap {gap:.2g}"] if gap >= MOST_FUNNEL_GAP else []
