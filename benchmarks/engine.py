"""The engine against the bare PyTorch loop and against torchdistill, side by side in one run.

ResNet-56 teacher, ResNet-20 student, CIFAR-10 images, batch 128, two threads, images that are normalised before the race and not augmented (the same
arithmetic for all): Hinton's loss at T = 4 with weight 0.9, SGD with momentum. Each contestant is a process of its own that waits for its turn;
turns are interleaved, in an order that rotates, and every figure is a median over the repetitions.

    python benchmarks/engine.py [--reps 21] [--steps 4] [--output docs/evidence/bench_engine.json] [--no-peer] [--smoke]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PEER = ROOT / ".venv-torchdistill"
PEER_VERSION = "1.1.5"
BATCH, THREADS = 128, 2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# ---- what the contestants share ------------------------------------------------------------------------------------


def images(count: int) -> tuple[Any, Any]:
    """Normalised float32 images [count, 3, 32, 32], the same for all contestants, and labels."""
    import torch

    pixels, labels = _pixels(count)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return (pixels.float() / 255 - mean) / std, labels


def _pixels(count: int) -> tuple[Any, Any]:
    """uint8 images and labels: CIFAR-10's where LIMBECK_DATA is set, else noise of the same shape."""
    import torch

    folder = os.environ.get("LIMBECK_DATA")
    if folder and (Path(folder) / "cifar10_test.parquet").exists():
        import io

        import numpy as np
        import pyarrow.parquet as pq
        from PIL import Image

        table = pq.read_table(Path(folder) / "cifar10_test.parquet")
        strips = table["strip"].to_pylist()[: -(-count // 500)]
        pixels = np.concatenate([np.asarray(Image.open(io.BytesIO(s)).convert("RGB")).reshape(-1, 32, 32, 3) for s in strips])[:count]
        labels = np.frombuffer(b"".join(table["labels"].to_pylist()), "uint8")[:count]
        return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()), torch.from_numpy(labels.astype("int64"))
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator), torch.randint(0, 10, (count,), generator=generator)


def networks() -> tuple[Any, Any]:
    """(ResNet-56 with its trained weights where they are, ResNet-20)."""
    import torch

    from limbeck.models.resnet_cifar import resnet20, resnet56

    torch.manual_seed(0)
    teacher, student = resnet56(), resnet20()
    weights = Path(os.environ.get("LIMBECK_DATA", "")) / "cifar10_resnet56.safetensors"
    if os.environ.get("LIMBECK_DATA") and weights.exists():
        from safetensors.torch import load_file

        teacher.load_state_dict(load_file(weights), strict=False)
    return teacher.eval().requires_grad_(False), student


class Gate:
    """Blocks every `steps` steps until the parent says go; answers with the seconds that the steps took."""

    def __init__(self, steps: int) -> None:
        self.steps, self.taken, self.began = steps, 0, 0.0

    def wait(self) -> None:
        if sys.stdin.readline().strip() != "go":
            print(f"peak {peak_mib():.1f}", flush=True)
            os._exit(0)
        self.began = time.perf_counter()

    def step(self) -> None:
        """One step is done."""
        self.taken += 1
        if self.taken % self.steps == 0:
            print(f"took {time.perf_counter() - self.began:.6f}", flush=True)
            self.wait()


class Gated:
    """A progress display that is a gate."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def start(self, label: str, steps: int, done: int, unit: str = "batches") -> None:
        self.gate.wait()

    def advance(self, step: int, note: str = "") -> None:
        if not note:  # the call after every batch; the other belongs to a logging step
            self.gate.step()

    def stop(self) -> None:
        pass


def peak_mib() -> float:
    """Largest resident memory of this process so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_bare(steps: int) -> None:
    """The floor: what a person would write by hand."""
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(THREADS)
    teacher, student = networks()
    inputs, labels = images(BATCH * 16)
    optimiser = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    student.train()
    gate = Gate(steps)
    gate.wait()
    while True:
        for ids in torch.randperm(len(inputs)).split(BATCH):
            x, y = inputs[ids], labels[ids]
            with torch.no_grad():
                t = teacher(x)
            s = student(x)
            soft = F.kl_div(F.log_softmax(s / 4, 1), F.log_softmax(t / 4, 1), log_target=True, reduction="batchmean") * 16
            loss = 0.9 * soft + 0.1 * F.cross_entropy(s, y)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            gate.step()


def run_limbeck(steps: int) -> None:
    """limbeck's trainer, as a run uses it."""
    import torch

    from limbeck.contract import OptimiserSpec
    from limbeck.data import ArrayData
    from limbeck.methods import KD
    from limbeck.teachers import ModuleTeacher
    from limbeck.train import TrainConfig, Trainer

    torch.set_num_threads(THREADS)
    teacher, student = networks()
    inputs, labels = images(BATCH * 16)
    data = ArrayData(inputs, labels, [str(c) for c in range(10)])
    gate = Gate(steps)

    method = KD(temperature=4.0, weight=0.9).bind(student=student, teacher=ModuleTeacher(teacher), train=data, num_classes=10)
    config = TrainConfig(steps=10**6, batch_size=BATCH, optimiser=OptimiserSpec(lr=0.05, momentum=0.9))
    Trainer(method, data, config, num_classes=10, progress=Gated(gate)).fit()


# ---- the parent -----------------------------------------------------------------------------------------------------


class Contestant:
    """A process that trains when told to."""

    def __init__(self, name: str, command: list[str]) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "PYTHONPATH": str(ROOT / "src")}
        self.name = name
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def go(self) -> float:
        """Seconds of one turn."""
        return float(self._ask("go", "took"))

    def stop(self) -> float:
        """End it; its peak memory in MiB."""
        peak = float(self._ask("stop", "peak"))
        self.process.wait(timeout=60)
        return peak

    def _ask(self, word: str, answer: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith(answer):
                return line.split()[1]
        raise SystemExit(f"{self.name} ended with code {self.process.wait()}")


def peer_python(given: str | None) -> str:
    """A Python that has torchdistill; its environment is made on first use."""
    if given:
        return given
    python = PEER / "bin" / "python"
    if not python.exists():
        print(f"installing torchdistill {PEER_VERSION} into {PEER} …", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(PEER)], check=True)
    have = subprocess.run([python, "-c", "import torchdistill"], capture_output=True, check=False)
    if have.returncode:
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, f"torchdistill=={PEER_VERSION}", "pyarrow", "pillow", "safetensors", "pydantic"], check=True)
    return str(python)


def summary(values: list[float]) -> str:
    return f"{statistics.median(values):.4f} (min {min(values):.4f}, max {max(values):.4f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reps", type=int, default=21)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "evidence" / "bench_engine.json")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--peer-python")
    parser.add_argument("--smoke", action="store_true", help="two repetitions of one step, no peer")
    parser.add_argument("--contestant", choices=["bare", "limbeck"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contestant:
        {"bare": run_bare, "limbeck": run_limbeck}[args.contestant](args.steps)
        return
    if args.smoke:
        args.reps, args.steps, args.no_peer = 2, 1, True
    own = [sys.executable, str(HERE / "engine.py"), "--steps", str(args.steps), "--contestant"]
    racers = [Contestant("bare", [*own, "bare"]), Contestant("limbeck", [*own, "limbeck"])]
    if not args.no_peer:
        racers.append(Contestant("torchdistill", [peer_python(args.peer_python), str(HERE / "peer_torchdistill.py"), str(args.steps)]))
    for racer in racers:
        racer.go()  # warm up: first steps allocate
    seconds: dict[str, list[float]] = {racer.name: [] for racer in racers}
    for repetition in range(args.reps):
        for place in range(len(racers)):
            racer = racers[(place + repetition) % len(racers)]
            seconds[racer.name].append(racer.go() / args.steps)
    peaks = {racer.name: racer.stop() for racer in racers}
    report(seconds, peaks, args.output)


def report(seconds: dict[str, list[float]], peaks: dict[str, float], output: Path) -> None:
    """Print the figures and write the evidence."""
    from limbeck import environment, files

    for name, values in seconds.items():
        print(f"{name:14} {summary(values)} s a step, peak memory {peaks[name]:.0f} MiB")
    checks = []

    def check(text: str, value: float, bound: float) -> None:
        checks.append({"text": text, "value": round(value, 4), "bound": bound, "holds": value <= bound})
        print(f"{'holds' if value <= bound else 'DOES NOT HOLD':14} {text}: {value:.4f} (bound {bound})")

    for rival, bound in (("bare", 1.03), ("torchdistill", 1.0)):
        if rival in seconds:
            ratios = [a / b for a, b in zip(seconds["limbeck"], seconds[rival], strict=True)]
            print(f"{'ratio':14} limbeck / {rival}: {summary(ratios)}")
            label = "the bare PyTorch loop" if rival == "bare" else f"torchdistill {PEER_VERSION}"
            check(f"step time against {label}, median of {len(ratios)} interleaved ratios", statistics.median(ratios), bound)
    check("peak resident memory against the bare PyTorch loop", peaks["limbeck"] / peaks["bare"], 1.05)
    if "torchdistill" in seconds:
        floor = [a / b for a, b in zip(seconds["torchdistill"], seconds["bare"], strict=True)]
        print(f"{'for reference':14} torchdistill / bare: {summary(floor)}")
    result = {
        "title": "ResNet-56 → ResNet-20, CIFAR-10, batch 128, two threads",
        "checks": checks,
        "seconds_a_step": {name: [round(v, 5) for v in values] for name, values in seconds.items()},
        "peak_mib": {name: round(v, 1) for name, v in peaks.items()},
        "commit": environment.commit(ROOT),
        "versions": environment.versions() | ({"torchdistill": PEER_VERSION} if "torchdistill" in seconds else {}),
        "machine": environment.machine(),
        "date": time.strftime("%Y-%m-%d"),
    }
    files.write_json(output, result)
    print(f"written: {output}")


if __name__ == "__main__":
    main()
