"""Matching a trajectory: the gradient through T inner steps, had in four ways, side by side (`limbeck.synthetic.hypergradient`).

ConvNet-3 of width 64, 20 images of 32×32, all of them in every inner step, cross-entropy, no momentum; T of 5, 20 and 50. Ways: unroll (the graph of
all steps at once, as the released codes do), checkpoint (every step of it taken again in the backward pass), adjoint (limbeck's default), tesla (approximate).

1. Memory: a fresh process for each T and way; the highest resident memory (VmHWM) over two outer iterations, less the resident memory just before the
   first. Code that loads late is called before, on one image. glibc is told to give every freed block of 64 KiB or more back at once
   (MALLOC_MMAP_THRESHOLD_=65536, MALLOC_ARENA_MAX=1), so that what is counted is what is held, not what the allocator keeps.
   The adjoint's θ_0 .. θ_{T-1}, T·P·4 bytes, are in its peak; the first line judged takes them off.
2. Time: each way is a process of its own that waits for its turn (`engine.py`); turns of one outer iteration are interleaved, in an order that rotates.
   Medians. All four keep freed memory, as limbeck does. For each T a race of its own, and a median of ratios of its own.
3. Error of the image gradient against unroll in the same precision, norm over norm, in float32 and in float64, where rounding plays no part.

    python benchmarks/trajectories.py [--steps 5 20 50] [--reps 7] [--modes unroll checkpoint adjoint tesla]
                                      [--width 64] [--batch 20] [--side 32] [--threads 2] [--output FILE] [--smoke]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import engine
from records import race

HERE = Path(__file__).resolve().parent
MODES = ("unroll", "checkpoint", "adjoint", "tesla")
CLASSES, RATE = 10, 0.01
MEMORY_BOUND, TIME_BOUND, SINGLE_BOUND, DOUBLE_BOUND = 1.05, 1.5, 1e-3, 1e-10


@dataclass(frozen=True)
class Size:
    """width: of the network. batch, side: images [batch, 3, side, side]. threads: of torch."""

    width: int = 64
    batch: int = 20
    side: int = 32
    threads: int = engine.THREADS

    def arguments(self) -> list[str]:
        return [word for name in ("width", "batch", "side", "threads") for word in (f"--{name}", str(getattr(self, name)))]


# ---- in a process of its own ---------------------------------------------------------------------------------------


def problem(size: Size, double: bool = False, batch: int | None = None) -> tuple[Callable[[int, str], Any], int]:
    """((T, mode) -> one outer iteration, P)."""
    import torch
    import torch.nn.functional as F

    from limbeck.models.small import convnet3
    from limbeck.synthetic.flat import FlatNetwork
    from limbeck.synthetic.hypergradient import Target, trajectory_gradient

    torch.manual_seed(0)
    dtype = torch.float64 if double else torch.float32
    net = FlatNetwork(convnet3(CLASSES, (3, size.side, size.side), width=size.width))
    theta = net.vector()
    goal = theta + 0.02 * torch.randn(net.size)
    images = torch.randn(size.batch, 3, size.side, size.side)[:batch]
    net.module.to(dtype)
    theta, goal, images, eta = theta.to(dtype), goal.to(dtype), images.to(dtype), torch.tensor(RATE, dtype=dtype)
    labels = torch.arange(len(images)) % CLASSES

    def loss(theta_P: Any, variables: Any, t: int) -> Any:
        return F.cross_entropy(net(theta_P, variables[0]), labels)

    return lambda steps, mode: trajectory_gradient(loss, [images], eta, theta, [Target(steps, goal)], steps, mode=mode), net.size


def resident_mib(field: str) -> float:
    """VmRSS or VmHWM of this process (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def run_memory(size: Size, steps: int, mode: str) -> None:
    problem(size, batch=1)[0](2, mode)
    iterate, _ = problem(size)
    before = resident_mib("VmRSS")
    for _ in range(2):
        iterate(steps, mode)
    print(json.dumps({"before": before, "peak": resident_mib("VmHWM")}))


def run_time(size: Size, steps: int, mode: str) -> None:
    from limbeck.train import parallel

    parallel.keep_freed_memory()
    iterate, _ = problem(size)
    gate = engine.Gate(1)
    gate.wait()
    while True:
        iterate(steps, mode)
        gate.step()


def run_errors(size: Size, steps: int, modes: list[str]) -> None:
    answers = {}
    for name, double in (("float32", False), ("float64", True)):
        iterate, parameters = problem(size, double)
        exact = iterate(steps, "unroll").variables[0]
        answers[name] = {mode: float((iterate(steps, mode).variables[0] - exact).norm() / exact.norm()) for mode in modes if mode != "unroll"}
    print(json.dumps(answers | {"parameters": parameters}))


# ---- the parent ----------------------------------------------------------------------------------------------------


def answer(words: list[str], threads: int) -> Any:
    """What a fresh process of this file prints as JSON."""
    kept = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(engine.ROOT / "src")}
    done = subprocess.run([sys.executable, str(HERE / "trajectories.py"), *words], env=os.environ | kept, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} ended with code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(size: Size, lengths: list[int], modes: list[str], reps: int) -> list[dict[str, Any]]:
    """One row for each T and way."""
    rows = []
    for steps in lengths:
        own = [*size.arguments(), "--steps", str(steps), "--modes", *modes, "--contestant"]
        found = answer([*own, "errors"], size.threads)
        stored = steps * found["parameters"] * 4 / 2**20
        memory = {mode: answer([*own, f"memory:{mode}"], size.threads) for mode in modes}
        racers = [engine.Contestant(mode, [sys.executable, str(HERE / "trajectories.py"), *own, f"time:{mode}"]) for mode in modes]
        seconds, _ = race(racers, reps, 1)
        for mode in modes:
            ratios = [a / b for a, b in zip(seconds[mode], seconds["unroll"], strict=True)]
            row = {
                "steps": steps,
                "mode": mode,
                "peak_mib": round(memory[mode]["peak"] - memory[mode]["before"], 1),
                "stored_weights_mib": round(stored, 2) if mode in ("adjoint", "tesla") else 0.0,
                "before_mib": round(memory[mode]["before"], 1),
                "seconds": [round(v, 5) for v in seconds[mode]],
                "median_seconds": round(statistics.median(seconds[mode]), 5),
                "against_unroll": round(statistics.median(ratios), 4),
                "error_float32": found["float32"].get(mode, 0.0),
                "error_float64": found["float64"].get(mode, 0.0),
            }
            rows.append(row)
            print(
                f"T = {steps:3} {mode:11} {row['peak_mib']:8.1f} MiB over the baseline ({row['stored_weights_mib']:.1f} of it stored weights), "
                f"{engine.summary(seconds[mode])} s, {row['against_unroll']:.2f} × unroll, error {row['error_float32']:.1e} and {row['error_float64']:.1e}",
                flush=True,
            )
    return rows


def report(size: Size, rows: list[dict[str, Any]], output: Path) -> None:
    """Judge, print and write the evidence."""
    from limbeck import environment, files

    checks: list[dict[str, Any]] = []

    def check(text: str, value: float, bound: float) -> None:
        checks.append({"text": text, "value": round(value, 4) if value > bound / 100 else float(f"{value:.3g}"), "bound": bound, "holds": value <= bound})
        print(f"{'holds' if value <= bound else 'DOES NOT HOLD':14} {text}: {value:.4g} (bound {bound})")

    own = [row for row in rows if row["mode"] == "adjoint"]
    beyond = [row["peak_mib"] - row["stored_weights_mib"] for row in own]
    least, most = own[0]["steps"], own[-1]["steps"]
    check(f"adjoint: peak memory beyond the stored weights, T = {most} against T = {least}", beyond[-1] / beyond[0], MEMORY_BOUND)
    reps = len(rows[0]["seconds"])
    for row in own:
        check(f"adjoint: time of an outer iteration against unroll, T = {row['steps']}, median of {reps} interleaved ratios", row["against_unroll"], TIME_BOUND)
    for name, bound in (("float32", SINGLE_BOUND), ("float64", DOUBLE_BOUND)):
        check(f"adjoint: error of the image gradient against unroll, {name}, the largest", max(row[f"error_{name}"] for row in own), bound)
    threads = "two threads" if size.threads == 2 else f"{size.threads} thread{'s' if size.threads > 1 else ''}"
    files.write_json(
        output,
        {
            "title": f"Gradients through T inner steps: ConvNet-3 of width {size.width}, {size.batch} images of {size.side}×{size.side}, {threads}",
            "checks": checks,
            "ways": rows,
            "commit": environment.commit(engine.ROOT),
            "versions": environment.versions(),
            "machine": environment.machine(),
            "date": time.strftime("%Y-%m-%d"),
        },
    )
    print(f"written: {output}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 20, 50], help="inner steps T")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="ways; unroll and adjoint must be among them")
    parser.add_argument("--reps", type=int, default=7)
    parser.add_argument("--width", type=int, default=Size.width)
    parser.add_argument("--batch", type=int, default=Size.batch)
    parser.add_argument("--side", type=int, default=Size.side)
    parser.add_argument("--threads", type=int, default=Size.threads)
    parser.add_argument("--output", type=Path, default=engine.ROOT / "docs" / "evidence" / "bench_trajectories.json")
    parser.add_argument("--smoke", action="store_true", help="one repetition, T = 2, a narrow network, one thread, unroll and adjoint alone")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = Size(args.width, args.batch, args.side, args.threads)
    if args.contestant:
        import torch

        torch.set_num_threads(size.threads)
        part, _, mode = args.contestant.partition(":")
        steps = args.steps[0]
        {
            "memory": lambda: run_memory(size, steps, mode),
            "time": lambda: run_time(size, steps, mode),
            "errors": lambda: run_errors(size, steps, args.modes),
        }[part]()
        return
    if args.smoke:
        size, args.steps, args.modes, args.reps = Size(width=4, batch=2, side=8, threads=1), [2], ["unroll", "adjoint"], 1
    report(size, measure(size, sorted(set(args.steps)), args.modes, args.reps), args.output)


if __name__ == "__main__":
    main()
