"""Time and memory of coupling flows beside the networks that they cannot do without.

Run by ``make bench-speed``. One process, one thread; all models take turns, so that a busy machine slows all of them;
medians. The bound runs and differentiates the conditioner networks and does nothing else. ``--smoke`` takes seconds.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from speed_images import IMAGE_MODELS, ImageSize
from speed_models import BOUND, MODELS, Model, Size

SIZES = [
    Size(10, 16, (32, 32), 16),
    Size(16, 8, (64, 64), 64),
    Size(16, 8, (128, 128), 512),
    Size(64, 8, (256, 256), 1024),
    Size(256, 8, (512, 512), 256),
]
IMAGES = [ImageSize((3, 32, 32), 2, 4, 32, 16), ImageSize((3, 32, 32), 3, 4, 64, 32)]
OURS = "pyro_affine"
Row = dict[str, Any]
Action = Callable[[], Any]


def actions(model: Model, size: Size | ImageSize, data: torch.Tensor) -> dict[str, Action]:
    """What is timed, each a call without arguments."""

    def backward(loss: torch.Tensor) -> None:
        for parameter in model.parameters:
            parameter.grad = None
        loss.backward()

    def reverse_kl() -> None:
        draws, log_q = model.draw_and_score(size.batch)
        backward(log_q.sum() + draws.square().sum() / 2 if draws.dim() else draws)

    return {
        "train": lambda: backward(-model.log_prob(data).sum()),
        "reverse KL": reverse_kl,
        "score": torch.no_grad()(lambda: model.log_prob(data)),
        "draw": torch.no_grad()(lambda: model.draw(size.batch)),
        "draw + score": torch.no_grad()(lambda: model.draw_and_score(size.batch)),
    }


def compiled(size: Size) -> Model:
    """Ours, its density compiled for any batch."""
    model = MODELS[OURS](size)
    return model._replace(log_prob=torch.compile(model.log_prob, fullgraph=True, dynamic=True))


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def interleaved(calls: dict[str, Action], seconds: float, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of each call, in rounds: every call once a round, in turn, until the time is used up."""
    for call in calls.values():
        call(), call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[BOUND]) < 5:
        for name, call in calls.items():
            start = clock()
            call()
            times[name].append(clock() - start)
    return times


def peak_memory(call: Action) -> int:
    """Most bytes of tensors that one call holds at a time, above what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def measure(size: Size | ImageSize, seconds: float, clock: Callable[[], float], with_compiled: bool) -> list[Row]:
    """One row for each model and action."""
    vectors: dict[str, Any] = {**MODELS, **({f"{OURS}, compiled": compiled} if with_compiled else {})}
    makers = vectors if isinstance(size, Size) else IMAGE_MODELS
    models, data = {}, size.data()
    for name, make in makers.items():
        torch.manual_seed(0)
        try:
            models[name] = make(size)
        except ModuleNotFoundError as error:  # pip install -e '.[peers]' brings them
            print(f"Left out: {name} ({error})", file=sys.stderr)
    calls = {name: actions(model, size, data) for name, model in models.items()}
    rows: list[Row] = []
    for action in calls[BOUND]:
        who = [name for name in calls if "compiled" not in name or action in ("train", "score")]
        times = interleaved({name: calls[name][action] for name in who}, seconds, clock)
        for name in who:
            ratio = statistics.median(t / b for t, b in zip(times[name], times[BOUND], strict=True))
            row = {"size": str(size), "action": action, "model": name, "ratio": ratio, "rounds": len(times[name])}
            row["milliseconds"] = 1e3 * statistics.median(times[name])
            row["parameters"] = sum(parameter.numel() for parameter in models[name].parameters)
            row["peak_bytes"] = peak_memory(calls[name][action])
            rows.append(row)
    return rows


def table(rows: list[Row]) -> str:
    """Markdown: a line for each size and action, a column for each model: times the bound, and the bound itself."""
    names = list(dict.fromkeys(row["model"] for row in rows if row["model"] != BOUND))
    lines = [
        "| size | what | networks only, ms | " + " | ".join(names) + " |",
        "|---|---|---" + "|---" * len(names) + "|",
    ]
    cells = {(row["size"], row["action"], row["model"]): row for row in rows}
    for size, action in dict.fromkeys((row["size"], row["action"]) for row in rows):
        found = [cells.get((size, action, name)) for name in names]
        best = min(row["ratio"] for row in found if row)
        texts = [
            ("**{:.2f}**" if row["ratio"] == best else "{:.2f}").format(row["ratio"]) if row else "" for row in found
        ]
        lines.append(
            f"| {size} | {action} | {cells[size, action, BOUND]['milliseconds']:.3g} | " + " | ".join(texts) + " |"
        )
    return "\n".join(lines)


def memory_table(rows: list[Row]) -> str:
    """Markdown: megabytes of tensors at the peak of a training step."""
    names = list(dict.fromkeys(row["model"] for row in rows))
    lines = ["| size | " + " | ".join(names) + " |", "|---" + "|---" * len(names) + "|"]
    for size in dict.fromkeys(row["size"] for row in rows):
        of_size = {row["model"]: row for row in rows if row["size"] == size and row["action"] == "train"}
        peaks = [f"{of_size[name]['peak_bytes'] / 2**20:.2f}" if name in of_size else "" for name in names]
        lines.append(f"| {size} | " + " | ".join(peaks) + " |")
    return "\n".join(lines)


def other_counts(rows: list[Row]) -> list[str]:
    """Models whose number of parameters is not ours."""
    counts = {(row["size"], row["model"]): row["parameters"] for row in rows}
    return [
        f"{size}: {name} has {count} parameters, {OURS} {counts[size, OURS]}"
        for (size, name), count in counts.items()
        if count != counts[size, OURS]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=7.0, help="for each size and action, all models together")
    sizes = [*SIZES, *IMAGES]
    parser.add_argument(
        "--sizes", type=int, nargs="*", default=range(len(sizes)), help="which sizes, counted from 0, images at the end"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: time of this process alone, on a busy machine"
    )
    parser.add_argument("--compile", action="store_true", help="also ours under torch.compile; takes a C++ compiler")
    parser.add_argument("--smoke", action="store_true", help="three sizes, no figures worth keeping")
    parser.add_argument("--output", type=Path, default=Path("output/benchmarks/speed.json"))
    parser.add_argument("--picture", type=Path, help="a PNG file for the ratios")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    seconds, chosen = (0.05, [0, 1, len(SIZES)]) if args.smoke else (args.seconds, args.sizes)
    rows = [row for index in chosen for row in measure(sizes[index], seconds, CLOCKS[args.clock], args.compile)]
    print(f"torch {torch.__version__}, {platform.machine()}, {args.threads} thread(s), {args.clock} clock\n")
    print(table(rows), "\n\npeak of a training step, MiB\n", memory_table(rows), "", *other_counts(rows), sep="\n")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(rows, indent=1))
    if args.picture:
        from speed_picture import save_picture

        vectors = {str(size) for size in SIZES}  # images have other peers
        save_picture([row for row in rows if row["size"] in vectors], args.picture)


if __name__ == "__main__":
    main()
