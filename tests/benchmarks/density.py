"""Densities of real tables: ours by its one call, the couplings of four packages, NSF and a Gaussian.

Run by ``make bench-density``; docs/benchmarks/density.md tells the protocol. Each run is a process of its own on one
thread, with a time limit, so that a crash or a hang counts as a failure and ends nothing else. Rows are appended
to a file of JSON lines; runs that are in it already are not made again.

    python tests/benchmarks/density.py --seconds 60 300 --seeds 3
    python tests/benchmarks/density.py --tables magic --methods ours "zuko NICE" --seconds 5 --seeds 1
    python tests/benchmarks/density.py --report output/benchmarks/density.jsonl
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

from density_methods import ABLATIONS, GAUSSIAN, METHODS
from density_run import OUTPUT, TABLES, Job, Row, failed, key_of, run
from density_tables import report


def main() -> None:
    """Read the command line, run what is missing, print the tables."""
    options = _parser().parse_args()
    if options.run:
        _work(options.run)
        return
    path = Path(options.report or options.output)
    if not options.report:
        _run_all(options, path)
    print(report(read_rows(path)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    tables = f"default: each .npz of the folder, {', '.join(TABLES)}"
    add("--tables", nargs="+", choices=TABLES, default=TABLES, metavar="NAME", help=tables)
    known = (*METHODS, *ABLATIONS)
    add("--methods", nargs="+", choices=known, default=METHODS, metavar="NAME", help=f"of {', '.join(known)}")
    add("--seconds", nargs="+", type=float, default=(60.0, 300.0), metavar="S", help="budgets (default 60 300)")
    add("--seeds", type=int, default=3, help="how many seeds (default 3)")
    add("--clock", choices=("wall", "cpu"), default="wall", help="cpu: seconds of the processor, for a shared machine")
    add("--grace", type=float, default=600.0, metavar="S", help="seconds beyond the budget before a run is ended")
    add("--retry", action="store_true", help="make runs again that failed")
    add("--output", default=str(OUTPUT / "density.jsonl"), metavar="FILE", help="rows are appended here")
    add("--report", metavar="FILE", help="run nothing, print the tables of this file")
    add("--run", metavar="JSON", help=argparse.SUPPRESS)
    return parser


def _work(text: str) -> None:
    """The process of one run: its row is the only thing on standard output."""
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(sys.stderr):
        row = run(Job(**json.loads(text)))
    print(json.dumps(row))


def _run_all(options: argparse.Namespace, path: Path) -> None:
    if not TABLES:
        sys.exit("The tables are read from ../shared/data/density, which is missing")
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {key_of(row) for row in read_rows(path) if row["status"] == "ok" or not options.retry}
    jobs = [job for job in _jobs(options) if job.key not in done]
    for number, job in enumerate(jobs, 1):
        row = _run_in_process(job, options.grace)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"[{number}/{len(jobs)}] {_line(row)}", file=sys.stderr, flush=True)


def _jobs(options: argparse.Namespace) -> list[Job]:
    """All runs, seed by seed, so that a benchmark cut short has few seeds rather than few tables."""
    jobs = []
    for seed, seconds, table in itertools.product(range(options.seeds), options.seconds, options.tables):
        for method in options.methods:
            if method != GAUSSIAN:
                jobs.append(Job(table, method, seconds, seed, options.clock))
            elif seed == 0:
                jobs.append(Job(table, method, 0.0, 0, options.clock))
    return list(dict.fromkeys(jobs))


def _run_in_process(job: Job, grace: float) -> Row:
    command = [sys.executable, __file__, "--run", json.dumps(asdict(job))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    limit = (job.seconds + grace) * (4 if job.clock == "cpu" else 1)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
    except subprocess.TimeoutExpired:
        return failed(job, f"over its time limit of {limit:.0f} s")
    try:
        row: Row = json.loads(done.stdout.strip().rpartition("\n")[2])
        return row
    except json.JSONDecodeError:
        last = done.stderr.strip().rpartition("\n")[2]
        return failed(job, f"exit code {done.returncode}: {last}"[:300])


def _line(row: Row) -> str:
    name = f"{row['table']} {row['method']} {row['seconds']:g} s seed {row['seed']}"
    if row["status"] != "ok":
        return f"{name}: failed, {row['reason']}"
    return f"{name}: test {row['test']:.3f} nats, {row.get('steps', 0)} steps, {row['memory_mb']:.0f} MB"


def read_rows(path: Path) -> list[Row]:
    """Rows of a file, the last of each run; none where there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.strip()]
    return list({key_of(row): row for row in rows}.values())


if __name__ == "__main__":
    main()
