"""Tables of the density benchmark in markdown: each table of data with all its rows, beside ours."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import mean, median, stdev

import torch
from density_methods import ABLATIONS, GAUSSIAN, METHODS, OURS
from density_run import PUBLISHED, TABLES, Row, scores_path
from torch import Tensor

_HEAD = (
    "method", "budget (s)", "test, nats", "seeds", "ours minus it ± s.e.", "worst row", "not finite", "steps",
    "parameters", "seconds", "peak MB", "failed",
)  # fmt: skip


def report(rows: Sequence[Row]) -> str:
    """All tables of these rows."""
    if not rows:
        return "No rows."
    found = sorted({", ".join(f"{k} {v}" for k, v in row["versions"].items()) for row in rows if "versions" in row})
    clocks = ", ".join(sorted({row["clock"] for row in rows}))
    sections = [f"{len(rows)} runs; {'; '.join(found)}; clock: {clocks}."]
    for table in dict.fromkeys((*TABLES, *(row["table"] for row in rows))):
        of_table = [row for row in rows if row["table"] == table]
        if of_table:
            sections += [f"## {table}", _lines(table, of_table)]
    return "\n\n".join(sections)


def _lines(table: str, rows: list[Row]) -> str:
    groups: dict[tuple[float, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["seconds"], row["method"]), []).append(row)
    lines, order = [], (OURS, *ABLATIONS, *METHODS[1:])
    for key in sorted(groups, key=lambda key: (key[1] == GAUSSIAN, key[0], order.index(key[1]))):
        lines.append(_cells(key, groups[key], groups.get((key[0], OURS), [])))
    for name, value in PUBLISHED.get(table, {}).items():
        lines.append([name, "-", f"{value:.2f}", *["-"] * (len(_HEAD) - 3)])
    line = [list(_HEAD), ["---"] * len(_HEAD), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in line)


def _cells(key: tuple[float, str], rows: list[Row], ours: list[Row]) -> list[str]:
    seconds, method = key
    ok = [row for row in rows if row["status"] == "ok"]
    reasons = dict.fromkeys(row["reason"][:80].replace("|", "/") for row in rows if row["status"] != "ok")
    failures = f"{len(rows) - len(ok)} of {len(rows)}: {'; '.join(reasons)}" if reasons else "0"
    name = [method, f"{seconds:g}" if seconds else "-"]
    if not ok:
        return [*name, *["-"] * (len(_HEAD) - 3), failures]
    return [
        *name,
        _spread([row["test"] for row in ok]),
        str(len(ok)),
        _difference(ours, ok) if method != OURS else "-",
        f"{min(row['worst'] for row in ok):.4g}",
        str(sum(row["nonfinite"] for row in ok)),
        f"{median(row.get('steps', 0) for row in ok):.0f}",
        f"{ok[0]['parameters']}",
        f"{median(row.get('total_seconds', 0) for row in ok):.1f}",
        f"{max(row['memory_mb'] for row in ok):.0f}",
        failures,
    ]


def _spread(values: Sequence[float]) -> str:
    """Mean over seeds, with the standard deviation where there are several."""
    return f"{mean(values):.3f}" + (f" (sd {stdev(values):.3f})" if len(values) > 1 else "")


def _difference(ours: Iterable[Row], others: list[Row]) -> str:
    """Mean over seeds and test rows of our log-density minus theirs, row by row.

    The squared standard error is the variance over rows of the differences averaged over seeds, by the number of
    rows, plus the variance over seeds of their means, by the number of seeds.
    """
    pairs = {row["seed"]: row for row in others}
    kept = [(row, pairs[row["seed"]]) for row in ours if row["status"] == "ok" and row["seed"] in pairs]
    kept = [pair for pair in kept if all(scores_path(row).exists() for row in pair)]
    if not kept:
        return "-"
    found: Tensor = torch.stack([_scores(one) - _scores(other) for one, other in kept])
    by_row, by_seed = found.mean(0), found.mean(1)
    variance = float(by_row.var()) / len(by_row) + (float(by_seed.var()) / len(by_seed) if len(by_seed) > 1 else 0.0)
    return f"{float(by_row.mean()):+.3f} ± {math.sqrt(variance):.3f}"


def _scores(row: Row) -> Tensor:
    scores: Tensor = torch.load(scores_path(row), weights_only=True)
    return scores.double()
