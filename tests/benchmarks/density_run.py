"""One run of the density benchmark: a method on a table, with a budget and a seed, to a row of figures."""

from __future__ import annotations

import hashlib
import importlib.util
import resource
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from density_methods import fit, score
from torch import Tensor

import pyro_affine

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data" / "density"
OUTPUT = ROOT / "output" / "benchmarks"
_SMALL_FIRST = ("magic", "protein", "optdigits", "bsds300_patches", "mnist")
PUBLISHED = {"bsds300_patches": {"Real NVP (10), published": 153.28, "MAF (5), published": 155.69}}

Row = dict[str, Any]


def _tables() -> tuple[str, ...]:
    """Every table in the folder, those of the documentation first, from small to large."""
    found = sorted(path.stem for path in DATA.glob("*.npz"))
    return (*(name for name in _SMALL_FIRST if name in found), *(name for name in found if name not in _SMALL_FIRST))


TABLES = _tables()


@dataclass(frozen=True)
class Job:
    """What is to be run.

    Args:
        table, method: names.
        seconds: budget of the fit; 0 for the Gaussian, which has none.
        seed: of the fit; the data stay the same.
        clock: "wall", or "cpu" to count the seconds of the processor instead, on a machine that others use too.
    """

    table: str
    method: str
    seconds: float
    seed: int
    clock: str = "wall"

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two rows the same run."""
        return self.table, self.method, float(self.seconds), self.seed, self.clock


def key_of(row: Row) -> tuple[Any, ...]:
    """The key of the job that gave a row."""
    return tuple(row[name] for name in ("table", "method", "seconds", "seed", "clock"))


def scores_path(row: Row) -> Path:
    """Where the log-densities of the test rows of a run are kept."""
    name = hashlib.sha1(repr(key_of(row)).encode()).hexdigest()[:16]
    return OUTPUT / "density_scores" / f"{name}.pt"


def load_table(name: str) -> dict[str, Tensor]:
    """``train``, ``val`` and ``test`` rows of a table, float32."""
    spec = importlib.util.spec_from_file_location("density_load", DATA / "load.py")
    if spec is None or spec.loader is None:
        raise ValueError(f"{DATA / 'load.py'} must be a Python file, got none")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {part: torch.as_tensor(rows) for part, rows in module.load(name).items()}


def failed(job: Job, reason: str) -> Row:
    """The row of a run that came to nothing."""
    return asdict(job) | {"seconds": float(job.seconds), "status": "failed", "reason": reason}


def run(job: Job) -> Row:
    """Run a job; an error of the method is a row too."""
    if job.clock == "cpu":
        time.perf_counter = time.process_time
    torch.set_num_threads(1)
    rows = load_table(job.table)
    pyro.set_rng_seed(job.seed)
    start = time.perf_counter()
    try:
        fitted = fit(job.method, rows["train"], rows["val"], seconds=job.seconds)
    except Exception as error:  # a benchmark counts whatever goes wrong
        text = str(error).strip().partition("\n")[0]
        return failed(job, f"{type(error).__name__}: {text}"[:300])
    total = time.perf_counter() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    scores = score(fitted.log_prob, rows["test"])
    versions = {"torch": torch.__version__, "pyro": pyro.__version__, "pyro_affine": pyro_affine.__version__}
    row = asdict(job) | {"seconds": float(job.seconds), "status": "ok", "versions": versions}
    row |= {
        "test": float(scores.mean()),
        "test_se": float(scores.std() / len(scores) ** 0.5),
        "median": float(scores.median()),
        "worst": float(scores.min()),
        "nonfinite": int((~scores.isfinite()).sum()),
        "parameters": sum(p.numel() for p in fitted.parameters),
        "total_seconds": total,
        "memory_mb": memory,
    }
    path = scores_path(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(scores.float(), path)
    return row | fitted.notes
