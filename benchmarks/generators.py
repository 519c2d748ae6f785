"""One DMD2 iteration (generator and critic) against the same forward and backward passes written bare, side by side in one run.

The small U-Net of `recipes/fashion_dmd2.yaml` at batch 64 (14×14, width 32, ten classes), with the adversarial term on the critic's trunk, ratio 1, so
that every batch has both updates. Generator: its own pass with a graph, teacher and critic without one, the trunk's features of the noised sample with a
graph to the sample alone, one backward to the generator's weights, Adam. Critic: its pass on the noised sample, the trunk's features of generated and
real samples together, one backward to critic and heads, Adam. Each contestant is a process of its own that waits for its turn (`engine.py`); turns are
interleaved, in an order that rotates, and every figure is a median over the repetitions. Both keep freed memory, as limbeck does.

    python benchmarks/generators.py [--reps 15] [--steps 2] [--output docs/evidence/bench_generators.json] [--smoke]
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import engine
from records import race

HERE = Path(__file__).resolve().parent
SHAPE, CLASSES, BATCH, BOUND = (1, 14, 14), 10, 64, 1.05
SIGMA_DATA, LEAST, MOST, RHO, LEVELS = 0.5, 0.002, 80.0, 7.0, 1000
GAN_WEIGHT, DISCRIMINATOR_WEIGHT, RATE = 3e-3, 1e-2, 1e-5


def networks(width: int) -> tuple[Any, Any]:
    """(teacher, student), denoisers with weights that are not zero anywhere."""
    import torch

    from limbeck.diffusion.build import unet_denoiser

    torch.manual_seed(0)
    made = [unet_denoiser(SHAPE, CLASSES, width=width) for _ in range(2)]
    for network in made:
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    return made[0].eval().requires_grad_(False), made[1]


def real(count: int) -> tuple[Any, Any]:
    """Images [count, 1, 14, 14] float32 and labels: noise, the arithmetic is the same."""
    import torch

    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, *SHAPE, generator=generator) / 2, torch.randint(0, CLASSES, (count,), generator=generator)


def run_limbeck(steps: int, width: int) -> None:
    """limbeck's trainer and method, as a run uses them."""
    from limbeck.contract import OptimiserSpec
    from limbeck.data import ArrayData
    from limbeck.methods import DMD2
    from limbeck.train import TrainConfig, Trainer

    teacher, student = networks(width)
    data = ArrayData(*real(BATCH * 16), [str(c) for c in range(CLASSES)])
    gate = engine.Gate(steps)
    method = DMD2(ratio=1, start="fresh", gan={"weight": GAN_WEIGHT, "discriminator_weight": DISCRIMINATOR_WEIGHT})
    method.bind(student=student, teacher=teacher, train=data, num_classes=CLASSES)
    config = TrainConfig(steps=10**6, batch_size=BATCH, optimiser=OptimiserSpec(name="adam", lr=RATE))
    Trainer(method, data, config, num_classes=CLASSES, progress=engine.Gated(gate), cpu=True).fit()


def run_bare(steps: int, width: int) -> None:
    """The floor: what a person would write by hand, with the same networks."""
    import copy

    import torch
    import torch.nn.functional as F

    from limbeck.diffusion.discriminator import Heads
    from limbeck.diffusion.noised_discriminator import feature_shapes
    from limbeck.train import parallel

    parallel.keep_freed_memory()
    teacher, student = networks(width)
    heads = Heads(feature_shapes(teacher, ("bottleneck",)))
    teacher_net, student_net, critic_net = teacher.network, student.network, copy.deepcopy(teacher.network).requires_grad_(True)
    inputs, labels = real(BATCH * 16)
    trained, trunk = list(student_net.parameters()), [*critic_net.parameters(), *heads.parameters()]
    generator_optimiser, critic_optimiser = torch.optim.Adam(trained, lr=RATE), torch.optim.Adam(trunk, lr=RATE)
    low, high = LEAST ** (1 / RHO), MOST ** (1 / RHO)
    grid = (torch.linspace(low, high, LEVELS, dtype=torch.float64) ** RHO).float()

    def denoise(network: Any, x: Any, sigma: Any, cond: Any) -> Any:
        total = (sigma**2 + SIGMA_DATA**2).view(-1, 1, 1, 1)
        wide = sigma.view(-1, 1, 1, 1)
        raw = network(x * total.rsqrt(), sigma.log() / 4, cond)
        return SIGMA_DATA**2 / total * x + wide * SIGMA_DATA * total.rsqrt() * raw

    def features(x: Any, sigma: Any, cond: Any) -> Any:
        scale = (sigma**2 + SIGMA_DATA**2).rsqrt().view(-1, 1, 1, 1)
        return heads(critic_net.features(x * scale, sigma.log() / 4, cond, ("bottleneck",)))

    def noised(x: Any, first: int = 0, last: int = LEVELS) -> tuple[Any, Any]:
        sigma = grid[torch.randint(first, last, (len(x),))]
        return x + sigma.view(-1, 1, 1, 1) * torch.randn_like(x), sigma

    gate = engine.Gate(steps)
    gate.wait()
    while True:
        for ids in torch.randperm(len(inputs)).split(BATCH):
            real_x, real_cond = inputs[ids], labels[ids]
            cond = torch.randint(0, CLASSES, (BATCH,))
            x = denoise(student_net, MOST * torch.randn(BATCH, *SHAPE), torch.full((BATCH,), MOST), cond)
            with torch.no_grad():
                x_t, sigma = noised(x, round(0.02 * LEVELS), round(0.98 * LEVELS))
                from_teacher, from_critic = denoise(teacher_net, x_t, sigma, cond), denoise(critic_net, x_t, sigma, cond)
                g = (from_critic - from_teacher) / ((x - from_teacher).abs().flatten(1).mean(1).view(-1, 1, 1, 1) + 1e-6)
            for parameter in trunk:
                parameter.requires_grad_(False)
            loss = 0.5 * (x - (x - g).detach()).square().mean() + GAN_WEIGHT * F.softplus(-features(*noised(x), cond)).mean()
            for parameter in trunk:
                parameter.requires_grad_(True)
            loss.backward()
            generator_optimiser.step()
            generator_optimiser.zero_grad(set_to_none=True)

            x = x.detach()
            x_t, sigma = noised(x)
            error = (denoise(critic_net, x_t, sigma, cond) - x).square().flatten(1).mean(1)
            both, both_sigma = noised(torch.cat([x, real_x]))
            fake_logits, real_logits = features(both, both_sigma, torch.cat([cond, real_cond])).chunk(2)
            judged = F.softplus(fake_logits).mean() + F.softplus(-real_logits).mean()
            loss = (error * (1 / sigma**2 + 1 / SIGMA_DATA**2)).mean() + DISCRIMINATOR_WEIGHT * judged
            loss.backward()
            critic_optimiser.step()
            critic_optimiser.zero_grad(set_to_none=True)
            gate.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reps", type=int, default=15)
    parser.add_argument("--steps", type=int, default=2, help="iterations of a turn")
    parser.add_argument("--output", type=Path, default=engine.ROOT / "docs" / "evidence" / "bench_generators.json")
    parser.add_argument("--smoke", action="store_true", help="two repetitions of one iteration, a narrow network, one thread")
    parser.add_argument("--contestant", choices=["bare", "limbeck"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    threads, width = (1, 8) if args.smoke else (engine.THREADS, 32)
    if args.smoke:
        args.reps, args.steps = 2, 1
    import torch

    torch.set_num_threads(threads)
    if args.contestant:
        {"bare": run_bare, "limbeck": run_limbeck}[args.contestant](args.steps, width)
        return
    own = [sys.executable, str(HERE / "generators.py"), "--steps", str(args.steps), *(["--smoke"] if args.smoke else []), "--contestant"]
    seconds, peaks = race([engine.Contestant(name, [*own, name]) for name in ("bare", "limbeck")], args.reps, args.steps)
    report(seconds, peaks, threads, args.output)


def report(seconds: dict[str, list[float]], peaks: dict[str, float], threads: int, output: Path) -> None:
    """Print the figures and write the evidence."""
    from limbeck import environment, files

    for name, values in seconds.items():
        print(f"{name:14} {engine.summary(values)} s an iteration, peak memory {peaks[name]:.0f} MiB")
    ratios = [a / b for a, b in zip(seconds["limbeck"], seconds["bare"], strict=True)]
    value = statistics.median(ratios)
    print(f"{'holds' if value <= BOUND else 'DOES NOT HOLD':14} limbeck / bare: {engine.summary(ratios)} (bound {BOUND})")
    text = f"one dmd2 iteration (generator and critic) against the same passes written bare, median of {len(ratios)} interleaved ratios"
    files.write_json(
        output,
        {
            "title": f"DMD2, U-Net {math.prod(SHAPE[1:])} pixels, width 32, batch {BATCH}, {'two threads' if threads == 2 else 'one thread'}",
            "checks": [{"text": text, "value": round(value, 4), "bound": BOUND, "holds": value <= BOUND}],
            "seconds_an_iteration": {name: [round(v, 5) for v in values] for name, values in seconds.items()},
            "peak_mib": {name: round(v, 1) for name, v in peaks.items()},
            "commit": environment.commit(engine.ROOT),
            "versions": environment.versions(),
            "machine": environment.machine(),
            "date": time.strftime("%Y-%m-%d"),
        },
    )
    print(f"written: {output}")


if __name__ == "__main__":
    main()
