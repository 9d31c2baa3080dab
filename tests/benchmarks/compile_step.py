"""What ``compile=True`` brings a training step of ``fit_density``, and how long the compiler takes.

Run by ``python tests/benchmarks/compile_step.py``; a C++ compiler must be there. Eager and compiled steps take turns;
printed are medians of the CPU time of the thread and of the ratio in the same round, and seconds by the clock until the
compiled loss and its gradient are there. A step is the loss, its gradient and the update by AdamW of a
``NormalizingFlow(real_nvp(D))`` with its defaults but for the sizes; float32, one thread.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_affine import NormalizingFlow, real_nvp
from pyro_affine.compiled import CompiledFunction

_SIZES = [(16, 8, 64, 64), (16, 8, 128, 512), (64, 8, 256, 1024)]  # D, couplings, width of two hidden layers, rows
_ROUNDS, _WARMUP = 60, 10


def main() -> None:
    torch.set_num_threads(1)
    sizes = [tuple(map(int, size.split(","))) for size in sys.argv[1:]] or _SIZES
    print("| D, couplings, hidden, rows | eager, ms | compiled, ms | eager / compiled | compiler, s |")
    print("|---|---|---|---|---|", flush=True)
    for dim, num_layers, width, num_rows in sizes:
        torch.compiler.reset()
        eager, compiled, ratio, seconds = measure(dim, num_layers, width, num_rows)
        size = f"{dim}, {num_layers}, 2x{width}, {num_rows}"
        print(f"| {size} | {eager:.1f} | {compiled:.1f} | {ratio:.2f} | {seconds:.0f} |", flush=True)


def measure(dim: int, num_layers: int, width: int, num_rows: int) -> tuple[float, float, float, float]:
    """Milliseconds of a step, eager and compiled, their ratio, and seconds of the compiler."""
    torch.manual_seed(0)
    flow = NormalizingFlow(real_nvp(dim, num_layers=num_layers, hidden_dims=(width, width)), dim)
    data = torch.randn(8 * num_rows, dim)
    flow.fit_units(data)
    optimizer = torch.optim.AdamW(flow.parameters(), lr=1e-4, fused=True)

    def eager(rows: Tensor) -> Tensor:
        return -flow.log_prob(rows).mean()

    start = time.perf_counter()
    compiled = CompiledFunction(eager, list(flow.parameters()), True)
    compiled(data[:num_rows]).backward()
    seconds = time.perf_counter() - start

    def seconds_of(loss: Callable[[Tensor], Tensor], rows: Tensor) -> float:
        start = time.thread_time()
        optimizer.zero_grad()
        loss(rows).backward()
        optimizer.step()
        return time.thread_time() - start

    batches = [data[torch.randint(len(data), (num_rows,))] for _ in range(_ROUNDS)]
    pairs = [(seconds_of(eager, rows), seconds_of(compiled, rows)) for rows in batches][_WARMUP:]
    one, other = (1e3 * statistics.median(column) for column in zip(*pairs, strict=True))
    return one, other, statistics.median(first / second for first, second in pairs), seconds


if __name__ == "__main__":
    main()
