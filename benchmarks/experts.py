"""What an expert's step costs, one by one and several in one batched pass (torch.func.vmap), on one thread.

Three networks (a ConvNet of depth 2 and width 32 on 8×8 images in batches of 64, one of depth 3 and width 32 on 32×32×3 in batches of 64, a perceptron of
64 hidden units on 64 inputs in batches of 64) and three objectives (plain, GSAM's two passes, AST's gradient penalty). The contestants take turns in an
order that rotates; every figure is the median over the repetitions of the milliseconds that a step takes of each expert. Judged is the default on a CPU,
one by one, for convolutions: against the fastest group, medians of the ratios within a turn.

    python benchmarks/experts.py [--reps 5] [--groups 1 2 4] [--device cpu] [--output FILE] [--smoke]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import engine
from limbeck import environment, files
from limbeck.models.convnet import convnet
from limbeck.models.small import mlp
from limbeck.synthetic.experts import GradientPenalty, expert_loss, gradients
from limbeck.synthetic.flat import FlatNetwork
from limbeck.synthetic.sharpness import SharpnessSpec, descent_direction

CLASSES = 10
BOUND = 1.15
"""How much slower than the fastest group the default may be."""
NETWORKS = {
    "convnet2 width 32, 1x8x8, batch 64": (lambda: convnet(CLASSES, (1, 8, 8), depth=2, width=32), (1, 8, 8), 64),
    "convnet3 width 32, 3x32x32, batch 64": (lambda: convnet(CLASSES, (3, 32, 32), depth=3, width=32), (3, 32, 32), 64),
    "mlp 64, 1x8x8, batch 64": (lambda: mlp([64], CLASSES, (1, 8, 8)), (1, 8, 8), 64),
}
OBJECTIVES: dict[str, tuple[SharpnessSpec | None, GradientPenalty | None]] = {
    "plain": (None, None),
    "gsam": (SharpnessSpec(), None),
    "gradient penalty": (None, GradientPenalty()),
}


def contestants(name: str, objective: str, experts: int, groups: list[int], device: str) -> dict[int, Callable[[], None]]:
    """Group size -> a step of `experts` experts in groups of that size."""
    build, shape, batch = NETWORKS[name]
    net, (sharpness, penalty) = FlatNetwork(build().to(device)), OBJECTIVES[objective]
    draw = torch.Generator().manual_seed(0)
    theta_GP = (net.vector().cpu() + 0.01 * torch.randn(experts, net.size, generator=draw)).to(device)
    x_GB = torch.randn(experts, batch, *shape, generator=draw).to(device)
    y_GB = torch.randint(CLASSES, (experts, batch), generator=draw).to(device)
    loss = partial(expert_loss, net, penalty=penalty)

    def step(size: int) -> None:
        for rows in torch.arange(experts, device=device).split(size):
            gradient: Callable[[Tensor], tuple[Tensor, Tensor]] = partial(gradients, loss, augmented_GB=x_GB[rows], clean_GB=x_GB[rows], labels_GB=y_GB[rows])
            descent_direction(sharpness, gradient, theta_GP[rows])
        if device != "cpu":
            torch.cuda.synchronize()

    return {size: partial(step, size) for size in groups}


def measure(race: dict[int, Callable[[], None]], experts: int, reps: int) -> dict[int, list[float]]:
    """Group size -> milliseconds a step and expert, a turn each."""
    for run in race.values():
        run()
    times: dict[int, list[float]] = {size: [] for size in race}
    order = list(race)
    for rep in range(reps):
        for size in order[rep % len(order) :] + order[: rep % len(order)]:
            began = time.perf_counter()
            race[size]()
            times[size].append((time.perf_counter() - began) / experts * 1e3)
    return times


def report(rows: list[dict[str, Any]], groups: list[int], device: str, output: Path) -> None:
    """Judge, print and write the evidence."""
    checks: list[dict[str, Any]] = []
    for row in rows:
        print(f"{row['network']:40} {row['objective']:18}" + "".join(f"  {size}: {ms:8.2f} ms" for size, ms in row["median_milliseconds"].items()))
        if device == "cpu" and "convnet" in row["network"]:
            one = row["milliseconds"][str(groups[0])]
            value = max(statistics.median(a / b for a, b in zip(one, row["milliseconds"][str(size)], strict=True)) for size in groups[1:])
            text = f"{row['network']}, {row['objective']}: one by one against the fastest of {', '.join(map(str, groups[1:]))} in one pass"
            checks.append({"text": text, "value": round(value, 4), "bound": BOUND, "holds": value <= BOUND})
            print(f"{'holds' if value <= BOUND else 'DOES NOT HOLD':14} {text}: {value:.4g} (bound {BOUND})", flush=True)
    files.write_json(
        output,
        {
            "title": f"A step of an expert, one by one and several in one batched pass: {device}, one thread",
            "checks": checks,
            "steps": rows,
            "commit": environment.commit(engine.ROOT),
            "versions": environment.versions(),
            "machine": environment.machine(),
            "date": time.strftime("%Y-%m-%d"),
        },
    )
    print(f"written: {output}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 2, 4], help="experts in one pass; one by one is always among them")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=engine.ROOT / "docs" / "evidence" / "bench_experts.json")
    parser.add_argument("--smoke", action="store_true", help="one repetition, one by one and two in one pass, the smallest ConvNet alone")
    given = parser.parse_args()
    groups, reps, names = sorted({1, *given.groups}), given.reps, list(NETWORKS)
    if given.smoke:
        groups, reps, names = [1, 2], 1, names[:1]
    if len(groups) < 2:
        parser.error("--groups needs a number above 1 to compare with.")
    torch.set_num_threads(1)
    rows = []
    for name in names:
        for objective in OBJECTIVES:
            found = measure(contestants(name, objective, max(groups), groups, given.device), max(groups), reps)
            rows.append(
                {
                    "network": name,
                    "objective": objective,
                    "milliseconds": {str(size): [round(ms, 4) for ms in taken] for size, taken in found.items()},
                    "median_milliseconds": {str(size): round(statistics.median(taken), 4) for size, taken in found.items()},
                }
            )
    report(rows, groups, given.device, given.output)


if __name__ == "__main__":
    main()
