"""What an expert's step costs, one by one and several in one batched pass (torch.func.vmap), on one thread.

Three networks (a ConvNet of depth 2 and width 32 on 8×8 images in batches of 64, one of depth 3 and width 32 on 32×32×3 in batches of 128, a perceptron of
64 hidden units on 64 inputs in batches of 64) and three objectives (plain, GSAM's two passes, AST's gradient penalty). The contestants take turns in an
order that rotates; every figure is the median over the repetitions of the milliseconds that a step takes of each expert.

    python benchmarks/experts.py [--reps 9] [--groups 1 2 4 8] [--device cpu] [--output FILE.json] [--smoke]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from limbeck.models.convnet import convnet
from limbeck.models.small import mlp
from limbeck.synthetic.experts import GradientPenalty, expert_loss, gradients
from limbeck.synthetic.flat import FlatNetwork
from limbeck.synthetic.sharpness import SharpnessSpec, descent_direction

CLASSES = 10
NETWORKS = {
    "convnet2 width 32, 1x8x8, batch 64": (lambda: convnet(CLASSES, (1, 8, 8), depth=2, width=32), (1, 8, 8), 64),
    "convnet3 width 32, 3x32x32, batch 128": (lambda: convnet(CLASSES, (3, 32, 32), depth=3, width=32), (3, 32, 32), 128),
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


def measure(race: dict[int, Callable[[], None]], experts: int, reps: int) -> dict[int, float]:
    """Group size -> median milliseconds a step and expert."""
    for run in race.values():
        run()
    times: dict[int, list[float]] = {size: [] for size in race}
    order = list(race)
    for rep in range(reps):
        for size in order[rep % len(order) :] + order[: rep % len(order)]:
            began = time.perf_counter()
            race[size]()
            times[size].append((time.perf_counter() - began) / experts * 1e3)
    return {size: statistics.median(taken) for size, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reps", type=int, default=9)
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--smoke", action="store_true", help="one repetition, groups of 1 and 2")
    given = parser.parse_args()
    groups, reps = ([1, 2], 1) if given.smoke else (given.groups, given.reps)
    torch.set_num_threads(1)
    rows = []
    for name in NETWORKS:
        for objective in OBJECTIVES:
            found = measure(contestants(name, objective, max(groups), groups, given.device), max(groups), reps)
            rows.append({"network": name, "objective": objective, "milliseconds": found})
            print(f"{name:40} {objective:18}" + "".join(f"  {size}: {ms:8.2f} ms" for size, ms in found.items()), flush=True)
    if given.output:
        given.output.write_text(json.dumps({"torch": torch.__version__, "device": given.device, "repetitions": reps, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
