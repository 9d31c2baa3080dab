"""Tables of the guide benchmark in markdown: a summary, then each target with all its rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

from guide_bars import Field, Group, good_khat, grouped, typical, values
from guide_run import REFERENCE, all_targets
from methods import ALL_METHODS, SAMPLERS
from samplers import reference_mixing
from scoring import floor
from targets import Target, fresh_start

Row = dict[str, Any]

_HEAD = (
    "method",
    "budget (s)",
    "ELBO ± s.e.",
    "k-hat",
    "ESS %",
    "mean, raw / PSIS",
    "log sd, raw / PSIS",
    "steps",
    "seconds (NUTS)",
    "failed",
    "bars",
)
_SAMPLER_HEAD = (
    "sampler",
    "seconds",
    "smallest ESS",
    "ESS / s",
    "R-hat",
    "divergences",
    "mean",
    "log sd",
    "failed",
)


def report(rows: list[Row]) -> str:
    """All tables of these rows."""
    import torch

    if not rows:
        return "No rows."
    fresh_start(0, torch.float64)
    targets = all_targets()
    field = Field(grouped(rows), {name: target.kind for name, target in targets.items()})
    names = [name for name in targets if any(key[0] == name for key in field.groups)]
    names += sorted({key[0] for key in field.groups} - targets.keys())
    sections = [_versions(rows), "## Summary", _summary(field)]
    for name in names:
        sections += [f"## {name}", _facts(targets.get(name), field, name), _guides(field, name), _samplers(field, name)]
    return "\n\n".join(section for section in sections if section)


def _versions(rows: list[Row]) -> str:
    found = sorted({", ".join(f"{k} {v}" for k, v in row["versions"].items()) for row in rows if "versions" in row})
    return f"{len(rows)} runs; {'; '.join(found)}."


def _summary(field: Field) -> str:
    """One row for each method and budget, over all targets."""
    found: dict[tuple[str, float, str, bool], list[Group]] = {}
    for group in field.groups:
        if group[1] not in (*SAMPLERS, REFERENCE):
            found.setdefault(group[1:], []).append(group)
    head = (
        "method",
        "budget (s)",
        "targets that meet all bars",
        "k-hat good, runs",
        "within 0.05 nat of the best, targets",
        "more than 0.02 nat below full rank, targets",
        "median of the largest errors, PSIS",
        "failed runs",
    )
    return _table(head, [_summary_row(field, key, found[key]) for key in sorted(found, key=_order)])


def _summary_row(field: Field, key: tuple[str, float, str, bool], groups: list[Group]) -> list[str]:
    runs = [row for group in groups for row in field.groups[group]]
    ok = [row for row in runs if row["status"] == "ok"]
    verdicts = [verdict for group in groups if (verdict := field.verdict(group)) is not None]
    below = [field.below_full_rank(group) for group in groups]
    near = [typical(field.groups[g], "elbo") >= field.best_elbo(g[0]) - 0.05 for g in groups]
    largest = [max(row["mean_psis"], row["sd_psis"]) for row in ok if "mean_psis" in row]
    return [
        _name(*key),
        f"{key[1]:g}",
        f"{sum(str(verdict) == 'pass' for verdict in verdicts)} of {len(verdicts)}",
        f"{sum(map(good_khat, ok))} of {len(runs)}",
        f"{sum(near)} of {len(groups)}",
        f"{sum(below)} of {len(groups)}",
        f"{median(largest):.2g}" if largest else "-",
        f"{len(runs) - len(ok)} of {len(runs)}",
    ]


def _facts(target: Target | None, field: Field, name: str) -> str:
    """Where the reference comes from, and how far exact draws would be from it."""
    words = [target.character] if target is not None and target.character else []
    latents = [n for key, rows in field.groups.items() if key[0] == name for n in values(rows, "latents")]
    words += [f"{int(latents[0])} latents"] if latents and "latents" not in "".join(words) else []
    reference = target.reference() if target is not None else None
    if target is None or reference is None:
        return "; ".join([*words, "no reference draws"]) + "."
    errors = floor(reference, target.supports(target.load_args()), heavy=target.heavy)
    words.append(f"errors of exact draws {errors['mean']:.2g} (mean), {errors['sd']:.2g} (log sd)")
    if target.heavy:
        words.append("medians and central 68 % in place of means and sds")
    if mixing := reference_mixing(target):
        words.append(
            f"reference: NUTS on {target.chains_of}, {mixing['seconds_used']:.0f} s, R-hat {mixing['rhat']:.3f}, "
            f"ESS {mixing['ess_min']:.0f}, {mixing['divergences']} divergences"
        )
    return "; ".join(words) + "."


def _guides(field: Field, name: str) -> str:
    keys = [key for key in field.groups if key[0] == name and key[1] not in (*SAMPLERS, REFERENCE)]
    if not keys:
        return ""
    return _table(_HEAD, [_guide_row(field, key) for key in sorted(keys, key=lambda key: _order(key[1:]))])


def _guide_row(field: Field, key: Group) -> list[str]:
    rows = field.groups[key]
    ok = [row for row in rows if row["status"] == "ok"]
    cells = [_name(*key[1:]), f"{key[2]:g}"]
    if ok:
        good = sum(map(good_khat, ok))
        cells += [
            f"{_spread(ok, 'elbo', '.2f')} ± {typical(ok, 'elbo_se'):.2g}",
            f"{_spread(ok, 'khat', '.2f')} {'pass' if good == len(ok) else f'fail {len(ok) - good} of {len(ok)}'}",
            _spread([{"ess": 100 * row["ess"]} for row in ok], "ess", ".0f"),
            _both(ok, "mean"),
            _both(ok, "sd"),
            f"{typical(ok, 'steps'):.0f}" + _if_any(ok, "bad_steps", " ({:.0f} bad)"),
            f"{typical(ok, 'seconds_used'):.1f}" + _times_nuts(field, key[0], typical(ok, "seconds_used")),
        ]
    else:
        cells += ["-"] * 7
    return [*cells, _failures(rows), str(field.verdict(key) or "-")]


def _times_nuts(field: Field, name: str, seconds: float) -> str:
    """How many times as long four chains of NUTS take, if they were run: 1000 draws after 1000 of warm-up."""
    runs = field.groups.get((name, "NUTS", 0.0, "float64", False), [])
    nuts = typical(runs, "seconds_used")
    return "" if math.isnan(nuts) else f" ({nuts / seconds:.3g}x)"


def _samplers(field: Field, name: str) -> str:
    keys = [key for key in field.groups if key[0] == name and key[1] in SAMPLERS]
    return _table(_SAMPLER_HEAD, [_sampler_row(key, field.groups[key]) for key in sorted(keys)]) if keys else ""


def _sampler_row(key: Group, rows: list[Row]) -> list[str]:
    ok = [row for row in rows if row["status"] == "ok"]
    name = key[1] + (f" after {key[2]:g} s" if key[2] else "") + ("" if key[3] == "float64" else f", {key[3]}")
    if not ok:
        return [name, *["-"] * 7, _failures(rows)]
    rates = [{"rate": row["ess_min"] / row["seconds_used"]} for row in ok]
    cells = [("seconds_used", ".0f"), ("ess_min", ".0f")]
    later = [("rhat", ".3f"), ("divergences", ".0f"), ("mean_raw", ".2g"), ("sd_raw", ".2g")]
    return [
        name,
        *(_spread(ok, *cell) for cell in cells),
        _spread(rates, "rate", ".3g"),
        *(_spread(ok, *cell) for cell in later),
        _failures(rows),
    ]


def _name(method: str, seconds: float, dtype: str, tuned: bool) -> str:
    return method + ("" if dtype == "float64" else f", {dtype}") + (", tuned" if tuned else "")


def _order(key: tuple[str, float, str, bool]) -> tuple[Any, ...]:
    method, seconds, dtype, tuned = key
    return seconds, ALL_METHODS.index(method) if method in ALL_METHODS else 99, method, dtype, tuned


def _spread(rows: Iterable[Row], name: str, form: str) -> str:
    """Median, and least to greatest where they differ in print."""
    found = values(rows, name)
    if not found:
        return "-"
    low, middle, high = (_number(value, form) for value in (min(found), median(found), max(found)))
    return middle if low == high else f"{middle} ({low} to {high})"


def _number(value: float, form: str) -> str:
    return format(value, form if abs(value) < 1e6 else ".2g")


def _both(rows: list[Row], name: str) -> str:
    return f"{_spread(rows, f'{name}_raw', '.2g')} / {_spread(rows, f'{name}_psis', '.2g')}"


def _if_any(rows: list[Row], name: str, form: str) -> str:
    most = max(values(rows, name), default=0)
    return form.format(most) if most else ""


def _failures(rows: list[Row]) -> str:
    reasons = dict.fromkeys(row["reason"] for row in rows if row["status"] != "ok")
    count = sum(row["status"] != "ok" for row in rows)
    return f"{count} of {len(rows)}: {'; '.join(_short(reason) for reason in reasons)}" if count else "0"


def _short(reason: str, length: int = 90) -> str:
    plain = reason.replace("|", "/")
    return plain if len(plain) <= length else plain[: length - 3] + "..."


def _table(head: tuple[str, ...], rows: list[list[str]]) -> str:
    line: Callable[[Iterable[str]], str] = lambda cells: "| " + " | ".join(cells) + " |"  # noqa: E731
    return "\n".join([line(head), line("---" for _ in head), *map(line, rows)])
