"""Fits to a file larger than the memory they are given: peak memory, rows a second, and what reading costs a step.

Run ``python tests/benchmarks/streaming.py --gigabytes 4``. It writes a .npy file of float32 rows that drift from the
first to the last, and fits a flow to it in a process whose private writable memory the kernel limits: RLIMIT_DATA,
which pages of a mapped file are not part of. Then it removes the file. Anonymous: peak of RssAnon in /proc/self/status,
read at each step. Mapped: peak of RssFile, pages of the file and of libraries, which the kernel takes back when it
needs them. What a batch costs is time of the processor, over two buffers, beside batches of the first rows in memory.
"""

from __future__ import annotations

import argparse
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

COLUMNS, BATCH = 32, 512
IN_MEMORY = 2**18  # rows of the file for the comparison, 32 MiB
SCORED = 200_000
STEPS = 2048  # two buffers of batches


def write_file(path: Path, gigabytes: float) -> int:
    """Rows with a mean that moves by one standard deviation from the first to the last."""
    random = np.random.default_rng(0)
    size = 2**17
    noise = random.normal(size=(size, COLUMNS)) @ random.normal(size=(COLUMNS, COLUMNS))
    num_chunks = max(1, round(gigabytes * 1e9 / (4 * COLUMNS * size)))
    with open(path, "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (num_chunks * size, COLUMNS)}
        np.lib.format.write_array_header_1_0(file, header)
        for chunk in range(num_chunks):
            file.write((random.permutation(noise) + chunk / num_chunks).astype("<f4").data)
    return num_chunks * size


def status(field: str) -> float:
    """MB of a line in /proc/self/status."""
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1000


class Peak:
    """Wraps ``log_prob`` of a flow, and reads memory at each call."""

    def __init__(self, flow):
        self.anonymous = self.mapped = 0.0
        self._score, flow.log_prob = flow.log_prob, self

    def __call__(self, *args):
        self.anonymous = max(self.anonymous, status("RssAnon"))
        self.mapped = max(self.mapped, status("RssFile"))
        return self._score(*args)


def make_flow():
    """Eight couplings of 64 hidden units."""
    from pyro_affine import NormalizingFlow, real_nvp

    return NormalizingFlow(real_nvp(COLUMNS, num_layers=8, hidden_dims=(64, 64)), COLUMNS)


def fit_and_report(path: str, seconds: float) -> None:
    """Fit to the file, draw and score, and print memory and speed."""
    import torch

    from pyro_affine import fit_density, write_draws, write_log_prob

    torch.manual_seed(0)
    print(f"before: {status('RssAnon'):.0f} MB anonymous, {status('RssFile'):.0f} MB mapped")
    flow = make_flow()
    peak, start = Peak(flow), time.perf_counter()
    fit = fit_density(flow, path, seconds=seconds, batch_size=BATCH, progress=False)
    took = time.perf_counter() - start
    print(f"fit of {took:.0f} s: peak {peak.anonymous:.0f} MB anonymous, {peak.mapped:.0f} MB mapped, ", end="")
    print(f"{fit.num_steps} steps of {BATCH} rows, {fit.num_steps * BATCH / took:.0f} rows/s with all that a fit does")
    compare(path)
    first = np.load(path, mmap_mode="r")[:SCORED]
    timed("draws", lambda out: write_draws(flow, out, SCORED, progress=False), path)
    timed("scores", lambda out: write_log_prob(flow, first, out, progress=False), path)


def timed(what: str, write, path: str) -> None:
    """Write to a file beside the data, print how fast, and remove it."""
    out, start = Path(f"{path}.{what}.npy"), time.perf_counter()
    write(out)
    took = time.perf_counter() - start
    print(f"{SCORED} {what} in {took:.1f} s, {SCORED / took:.0f} rows/s, {status('RssAnon'):.0f} MB anonymous after it")
    out.unlink()


def compare(path: str) -> None:
    """Time of a batch from the file, from Parquet, and from memory, beside the step that it is for."""
    import torch

    from pyro_affine import fit_density
    from pyro_affine.batches import RowBatches, RowCheck, Rows
    from pyro_affine.stored_batches import split_stored

    rows = torch.from_numpy(np.load(path, mmap_mode="r")[:IN_MEMORY].copy())
    options = {"batch_size": BATCH, "seed": 0, "order": 0, "check": RowCheck(None, torch.float32)}
    files = {"the .npy file": path, ".parquet": (copy := write_parquet(path))}
    sources = {name: split_stored(file, None, 0.0, **options)[0] for name, file in files.items()}
    sources["memory"] = RowBatches(Rows(rows), torch.arange(len(rows)), batch_size=BATCH, seed=0)
    start = time.process_time()
    fit_density(make_flow(), rows, validation=None, num_steps=STEPS // 10, batch_size=BATCH, progress=False)
    print(f"a step on rows in memory: {1e4 * (time.process_time() - start) / STEPS:.2f} ms; a batch of {BATCH} rows")
    for name, batches in sources.items():
        start = time.process_time()
        for _ in range(STEPS):
            batches.next()
        print(f"  from {name}: {1e3 * (time.process_time() - start) / STEPS:.3f} ms")
    copy.unlink()


def write_parquet(path: str) -> Path:
    """The first million rows in row groups of 1 MiB."""
    import pyarrow
    import pyarrow.parquet

    rows = np.load(path, mmap_mode="r")[: 2**20]
    table = pyarrow.table({f"x{j}": rows[:, j] for j in range(COLUMNS)})
    pyarrow.parquet.write_table(table, copy := Path(f"{path}.parquet"), row_group_size=2**20 // (4 * COLUMNS))
    return copy


def main() -> None:
    """Write the file, fit in a process of its own, and remove the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the file")
    parser.add_argument("--limit", type=float, default=1.0, help="gigabytes of private memory that the fit may have")
    parser.add_argument("--seconds", type=float, default=20.0, help="budget of the fit")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where the file is written")
    given = parser.parse_args()
    path = Path(given.folder) / "pyro_affine_streaming.npy"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (int(given.limit * 1e9),) * 2)

    try:
        start = time.perf_counter()
        num_rows = write_file(path, given.gigabytes)
        took = time.perf_counter() - start
        print(f"{path.stat().st_size / 1e9:.2f} GB, {num_rows} rows of {COLUMNS}, written in {took:.0f} s")
        sys.stdout.flush()
        arguments = f"{str(path)!r}, {given.seconds}"
        code = f"import sys; sys.path[:0] = {sys.path!r}; import streaming; streaming.fit_and_report({arguments})"
        subprocess.run([sys.executable, "-c", code], preexec_fn=limit, check=True)
        refused = f"import numpy as np; np.load({str(path)!r}).sum()"
        whole = subprocess.run([sys.executable, "-c", refused], preexec_fn=limit, capture_output=True, text=True)
        print("the same file loaded whole under the limit:", (whole.stderr.strip().splitlines() or ["fits"])[-1])
    finally:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
