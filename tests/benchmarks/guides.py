"""Guides on posteriors: ours, its ablations, Pyro's own, NUTS and NeuTra-NUTS, at equal wall-clock time.

Run by ``make bench-guides``; docs/benchmarks/guides.md tells the protocol. Each run is a process of its own on one
thread, with a time limit, so that a crash or a hang counts as a failure and ends nothing else. Rows are appended
to a file of JSON lines; runs that are in it already are not made again.

    python tests/benchmarks/guides.py --seconds 10 20 60 --seeds 3 --jobs 2
    python tests/benchmarks/guides.py --targets arK banana --methods ours AutoNormal --seconds 2 --seeds 1
    python tests/benchmarks/guides.py --table output/benchmarks/guides.jsonl --pictures docs/benchmarks
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from guide_pictures import save_pictures
from guide_run import REFERENCE, Job, Row, all_targets, failed, key_of, run
from guide_tables import report
from methods import ALL_METHODS, GROUPS, PEERS, SAMPLERS, TUNED_RATES
from samplers import NUM_CHAINS
from targets import DATA, OUTPUT, Target

_DEFAULT_SECONDS, _HIERARCHICAL_SECONDS = (10.0, 20.0, 60.0), (120.0,)


def main() -> None:
    """Read the command line, run what is missing, print the table."""
    options = _parser().parse_args()
    if options.run:
        _work(options.run, options.memory)
        return
    if not options.table:
        _run_all(options)
    path = Path(options.table or options.output)
    rows = read_rows(path)
    print(report(rows))
    if options.pictures:
        for picture in save_pictures(rows, Path(options.pictures)):
            print(f"Picture: {picture}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--targets", nargs="+", metavar="NAME", help="names or beginnings of names; default: all of the tier")
    add("--hierarchical", action="store_true", help="the larger models with plates instead of the default tier")
    add("--methods", nargs="+", metavar="NAME", help=f"default: all. Groups {', '.join(GROUPS)}, or names")
    add("--seconds", nargs="+", type=float, metavar="S", help="budgets (default 10 20 60; hierarchical 120)")
    add("--seeds", type=int, default=3, help="how many seeds (default 3); NUTS is run for the first only")
    add("--jobs", type=int, default=1, help="processes at a time, each on one thread (default 1)")
    add("--dtype", choices=("float64", "float32"), default="float64", help="of the fit; scores are float64")
    add("--clock", choices=("wall", "cpu"), default="wall", help="cpu: seconds of the processor, for a shared machine")
    add("--tuned", action="store_true", help=f"peers only, each at the best rate of {TUNED_RATES} by ELBO")
    add("--draws", type=int, default=10_000, help="draws that score a guide (default 10,000)")
    add("--limit", type=float, default=1800.0, metavar="S", help="seconds for NUTS or NeuTra, or a reference chain")
    add("--grace", type=float, default=600.0, metavar="S", help="seconds beyond the budget before a run is ended")
    add("--memory", type=float, default=8.0, metavar="GB", help="of a run; one that asks for more fails (default 8)")
    add("--no-references", action="store_true", help="make no long NUTS chains where there are no exact draws")
    add("--retry", action="store_true", help="make runs again that failed")
    add("--output", default=str(OUTPUT / "guides.jsonl"), metavar="FILE", help="rows are appended here")
    add("--table", metavar="FILE", help="run nothing, print the tables of this file")
    add("--pictures", metavar="FOLDER", help="save pictures there too")
    add("--list", action="store_true", help="print targets and methods, and the runs that would be made")
    add("--run", metavar="JSON", help=argparse.SUPPRESS)
    return parser


def _work(text: str, gigabytes: float) -> None:
    """The process of one run: its row is the only thing on standard output."""
    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (int(gigabytes * 2**30),) * 2)
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(sys.stderr):
        row = run(Job(**json.loads(text)))
    print(json.dumps(row))


def _run_all(options: argparse.Namespace) -> None:
    targets, methods = _chosen_targets(options), _chosen_methods(options)
    references, jobs = _reference_jobs(options, targets), _jobs(options, targets, methods)
    if options.list:
        print("Targets: " + ", ".join(target.name for target in targets))
        print("Methods: " + ", ".join(methods))
        print(f"Runs: {len(references)} reference chains, {len(jobs)} others")
        sys.exit()
    path = Path(options.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {key_of(row) for row in read_rows(path) if row["status"] == "ok" or not options.retry}
    for phase in (references, jobs):  # errors need the references
        _run_phase([job for job in phase if job.key not in done], path, options)


def _chosen_targets(options: argparse.Namespace) -> list[Target]:
    for folder in ("posteriors", "hierarchical"):
        if not (DATA / folder).exists():
            print(f"Skipped: the targets of ../shared/data/{folder}, which is missing", file=sys.stderr)
    by_name = all_targets()
    known = list(by_name.values())
    if not options.targets:
        return [target for target in known if (target.kind == "hierarchical") == options.hierarchical]
    chosen = {
        name: [by_name[name]] if name in by_name else [t for t in known if t.name.startswith(name)]
        for name in options.targets
    }
    unknown = [name for name, found in chosen.items() if not found]
    if unknown:
        sys.exit(f"No target begins with {', '.join(unknown)}; there are {', '.join(t.name for t in known)}")
    return list(dict.fromkeys(itertools.chain(*chosen.values())))


def _chosen_methods(options: argparse.Namespace) -> list[str]:
    names = [GROUPS.get(name, (name,)) for name in options.methods or GROUPS]
    methods = list(dict.fromkeys(itertools.chain(*names)))
    unknown = [name for name in methods if name not in ALL_METHODS]
    if unknown:
        sys.exit(f"Unknown: {', '.join(unknown)}; there are {', '.join((*GROUPS, *ALL_METHODS))}")
    return [name for name in methods if name in PEERS] if options.tuned else methods


def _jobs(options: argparse.Namespace, targets: list[Target], methods: list[str]) -> list[Job]:
    """All runs, seed by seed, so that a run cut short has few seeds rather than few targets."""
    budgets = options.seconds or (_HIERARCHICAL_SECONDS if options.hierarchical else _DEFAULT_SECONDS)
    common: dict[str, Any] = {"dtype": options.dtype, "num_draws": options.draws, "limit": options.limit}
    common["clock"] = options.clock
    jobs = []
    for seed, seconds, target, method in itertools.product(range(options.seeds), budgets, targets, methods):
        if method in SAMPLERS and seconds != max(budgets):
            continue  # NUTS has no budget, and NeuTra takes the best fit
        if method == "NUTS":
            jobs += [Job(target.name, method, 0.0, seed, **common)] if seed == 0 else []
        else:
            jobs.append(Job(target.name, method, seconds, seed, tuned=options.tuned, **common))
    return jobs


def _reference_jobs(options: argparse.Namespace, targets: list[Target]) -> list[Job]:
    """The long NUTS chains that these targets are compared with."""
    if options.no_references:
        return []
    names = dict.fromkeys(target.chains_of for target in targets if target.chains_of)
    chains = itertools.product(names, range(NUM_CHAINS))
    return [Job(name, REFERENCE, 0.0, index, limit=4 * options.limit) for name, index in chains]


def _run_phase(jobs: list[Job], path: Path, options: argparse.Namespace) -> None:
    lock, start, count = threading.Lock(), time.perf_counter(), itertools.count(1)

    def work(job: Job) -> None:
        row = _run_in_process(job, options)
        with lock, path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            number = next(count)
            left = (time.perf_counter() - start) / number * (len(jobs) - number) / 60
            print(f"[{number}/{len(jobs)}, {left:.0f} min left] {_line(row)}", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(max_workers=options.jobs) as pool:
        try:
            list(pool.map(work, jobs))
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            sys.exit("Stopped; the same command goes on from here")


def _run_in_process(job: Job, options: argparse.Namespace) -> Row:
    samples = job.method in (*SAMPLERS, REFERENCE)
    rates = len(TUNED_RATES) if job.tuned else 1
    limit = (rates * job.seconds + (job.limit if samples else 0) + options.grace) * (4 if job.clock == "cpu" else 1)
    command = [sys.executable, __file__, "--run", json.dumps(asdict(job)), "--memory", str(options.memory)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
    except subprocess.TimeoutExpired:
        return failed(job, f"over its time limit of {limit:.0f} s")
    if done.returncode == -signal.SIGINT:  # Ctrl-C reaches all processes; the run did not fail
        raise KeyboardInterrupt
    try:
        row: Row = json.loads(done.stdout.strip().rpartition("\n")[2])
        return row
    except json.JSONDecodeError:
        last = done.stderr.strip().rpartition("\n")[2]
        return failed(job, f"exit code {done.returncode}: {last}"[:300])


def _line(row: Row) -> str:
    name = f"{row['target']} {row['method']} {row['seconds']:g} s seed {row['seed']}"
    if row["status"] != "ok":
        return f"{name}: failed, {row['reason']}"
    figures = {"ELBO": "elbo", "k-hat": "khat", "error": "mean_psis", "ESS": "ess_min", "seconds": "seconds_used"}
    return f"{name}: " + ", ".join(f"{word} {row[key]:.4g}" for word, key in figures.items() if key in row)


def read_rows(path: Path) -> list[Row]:
    """Rows of a file, the last of each run; none where there is no file."""
    lines: Iterable[str] = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.strip()]
    return list({key_of(row): row for row in rows}.values())


if __name__ == "__main__":
    main()
