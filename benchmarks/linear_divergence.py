"""A divergence over a head of 32,000 tokens without its logits, against the plain way that holds them, and against TRL's own loss on the same tensors.

N = 4096 positions, width 256, float32: hidden states and heads of student and teacher go in, the gradients of the student's come out (forward + backward).
Ways: limbeck (`limbeck.language.linear_divergence`); dense (both logits by one product each, log_softmax, F.kl_div, autograd, teacher without gradient);
trl (GKD's generalised JSD loss, β = 0, 1, 0.5, after the same products; its own environment, installed on first use); floor: the four products alone
(student: logits, dh, dW; teacher: logits), 512 rows at a time into rooms that are there.

1. Memory: a fresh process for each way and divergence; the highest resident memory (VmHWM) over two iterations, less the resident memory just before the
   first, with inputs in place. Code that loads late is called before, on a few rows. glibc gives every freed block of 64 KiB or more back at once.
2. Time: each way is a process of its own that waits for its turn (`engine.py`); turns of one iteration are interleaved, in an order that rotates. Medians,
   and medians of interleaved ratios; a race for each divergence. All keep freed memory, as limbeck does.
3. Gradients against dense, in float32: norm of the difference over norm, and the largest difference over the largest number.

    python benchmarks/linear_divergence.py [--reps 15] [--positions 4096] [--width 256] [--vocabulary 32000] [--threads 2] [--output FILE]
                                           [--no-peer] [--peer-python PYTHON] [--smoke]
"""

from __future__ import annotations

import argparse
import json
import math
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
PEER = engine.ROOT / ".venv-trl"
PEER_VERSION = "1.16.0"
BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}
MEMORY_BOUND, TIME_BOUND, ERROR_BOUND = 0.25, 1.0, 1e-5
FLOOR_ROWS = 512
KEEP = {"MALLOC_MMAP_THRESHOLD_": str(1 << 28), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


@dataclass(frozen=True)
class Size:
    """positions: N. width: d of student and teacher. vocabulary: V. threads: of torch."""

    positions: int = 4096
    width: int = 256
    vocabulary: int = 32_000
    threads: int = engine.THREADS

    def arguments(self) -> list[str]:
        return [word for name in ("positions", "width", "vocabulary", "threads") for word in (f"--{name}", str(getattr(self, name)))]


# ---- what the contestants share ------------------------------------------------------------------------------------


def tensors(size: Size) -> tuple[Any, Any, Any, Any]:
    """(h, W of the student, with gradients; those of the teacher): logits with a standard deviation of 2 and 3."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def normal(rows: int, scale: float) -> Any:
        return torch.randn(rows, size.width, generator=generator).mul_(scale)

    h, W = normal(size.positions, 1.0).requires_grad_(), normal(size.vocabulary, 2 / math.sqrt(size.width)).requires_grad_()
    return h, W, normal(size.positions, 1.0), normal(size.vocabulary, 3 / math.sqrt(size.width))


def plain_loss(logp: Any, logq: Any, beta: float) -> Any:
    """The divergence as a PyTorch user writes it: F.kl_div on log-probabilities, a mean over rows."""
    import torch
    import torch.nn.functional as F

    def kl(log_b: Any, log_a: Any) -> Any:
        return F.kl_div(log_b, log_a, log_target=True, reduction="batchmean")

    if beta in (0.0, 1.0):
        return kl(logq, logp) if beta == 0.0 else kl(logp, logq)
    logm = torch.logaddexp(logp + math.log(beta), logq + math.log(1 - beta))
    return beta * kl(logm, logp) + (1 - beta) * kl(logm, logq)


def dense_iteration(size: Size, name: str) -> Callable[[], Any]:
    """Forward and backward that hold [N, V]."""
    import torch
    import torch.nn.functional as F

    h, W, h_t, W_t = tensors(size)

    def iterate() -> Any:
        h.grad = W.grad = None
        with torch.no_grad():
            logp = F.log_softmax(F.linear(h_t, W_t), -1)
        loss = plain_loss(logp, F.log_softmax(F.linear(h, W), -1), BETAS[name])
        loss.backward()
        return loss.detach(), h.grad, W.grad

    return iterate


def limbeck_iteration(size: Size, name: str) -> Callable[[], Any]:
    """Forward and backward by limbeck."""
    import torch

    from limbeck.language.divergences import divergence_from
    from limbeck.language.linear_divergence import linear_divergence
    from limbeck.language.signals import Head, HeadSignal
    from limbeck.language.tokens import TokenRows

    h, W, h_t, W_t = tensors(size)
    rows = TokenRows(torch.arange(size.positions), torch.zeros(size.positions, dtype=torch.int64), torch.ones(size.positions))
    head, signal, divergence = Head(W), HeadSignal(h_t, Head(W_t)), divergence_from(name)

    def iterate() -> Any:
        h.grad = W.grad = None
        loss = linear_divergence(h, head, signal, divergence, rows).loss
        loss.backward()
        return loss.detach(), h.grad, W.grad

    return iterate


def floor_iteration(size: Size, name: str) -> Callable[[], Any]:
    """The four products alone."""
    import torch

    h, W, h_t, W_t = (x.detach() for x in tensors(size))
    n = min(FLOOR_ROWS, size.positions)
    z, u, dh, dW = torch.empty(n, size.vocabulary), torch.empty(n, size.vocabulary), torch.empty_like(h), torch.zeros_like(W)

    def iterate() -> Any:
        for start in range(0, size.positions, n):
            part = h[start : start + n]
            rows = len(part)
            torch.mm(part, W.t(), out=z[:rows])
            torch.mm(h_t[start : start + n], W_t.t(), out=u[:rows])
            torch.mm(z[:rows], W, out=dh[start : start + n])
            dW.addmm_(z[:rows].t(), part, beta=0.0 if start == 0 else 1.0)

    return iterate


WAYS: dict[str, Callable[[Size, str], Callable[[], Any]]] = {"dense": dense_iteration, "limbeck": limbeck_iteration, "floor": floor_iteration}


# ---- in a process of its own ---------------------------------------------------------------------------------------


def resident_mib(field: str) -> float:
    """VmRSS or VmHWM of this process (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def run_memory(size: Size, make: Callable[[Size, str], Callable[[], Any]], name: str) -> None:
    make(Size(8, size.width, 64, size.threads), name)()
    iterate = make(size, name)
    before = resident_mib("VmRSS")
    for _ in range(2):
        iterate()
    print(json.dumps({"before": before, "peak": resident_mib("VmHWM")}))


def run_time(size: Size, make: Callable[[Size, str], Callable[[], Any]], name: str) -> None:
    iterate = make(size, name)
    gate = engine.Gate(1)
    gate.wait()
    while True:
        iterate()
        gate.step()


def run_errors(size: Size, name: str) -> None:
    """limbeck's loss and gradients against dense."""
    found, expected = limbeck_iteration(size, name)(), dense_iteration(size, name)()
    answer = {"loss": float((found[0] - expected[0]).abs() / expected[0].abs())}
    for what, ours, theirs in zip(("hidden", "weight"), found[1:], expected[1:], strict=True):
        answer |= {f"{what}_norm": float((ours - theirs).norm() / theirs.norm()), f"{what}_largest": float((ours - theirs).abs().max() / theirs.abs().max())}
    print(json.dumps(answer))


def contest(size: Size, what: str, make: Callable[[Size, str], Callable[[], Any]] | None = None) -> None:
    """One contestant's part, "time:WAY:DIVERGENCE", say. make: the peer's way."""
    import torch

    torch.set_num_threads(size.threads)
    part, way, name = what.split(":")
    if part == "errors":
        run_errors(size, name)
        return
    {"memory": run_memory, "time": run_time}[part](size, make or WAYS[way], name)


# ---- the parent ----------------------------------------------------------------------------------------------------


def peer_python(given: str | None) -> str:
    """A Python that has TRL; its environment is made on first use."""
    if given:
        return given
    python = PEER / "bin" / "python"
    if not python.exists():
        print(f"installing trl {PEER_VERSION} into {PEER} …", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(PEER)], check=True)
    have = subprocess.run([python, "-c", "import trl"], capture_output=True, check=False)
    if have.returncode:
        import torch

        same = f"torch=={torch.__version__.partition('+')[0]}"  # the same kernels
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"trl=={PEER_VERSION}", same], check=True)
    return str(python)


def answer(command: list[str], threads: int) -> Any:
    """What a fresh process prints as JSON."""
    environment = os.environ | GIVE_BACK | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(engine.ROOT / "src")}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(size: Size, ways: list[str], peer: str | None, reps: int) -> list[dict[str, Any]]:
    """One row for each divergence and way."""
    rows = []
    for name in BETAS:

        def command(part: str, way: str, name: str = name) -> list[str]:
            script = [str(peer), str(HERE / "peer_trl.py")] if way == "trl" else [sys.executable, str(HERE / "linear_divergence.py")]
            return [*script, *size.arguments(), "--contestant", f"{part}:{way}:{name}"]

        errors = answer(command("errors", "limbeck"), size.threads)
        memory = {way: answer(command("memory", way), size.threads) for way in ways if way != "floor"}
        os.environ.update(KEEP)
        racers = [engine.Contestant(way, command("time", way)) for way in ways]
        for setting in KEEP:
            del os.environ[setting]
        seconds, _ = race(racers, reps, 1)
        for way in ways:
            row: dict[str, Any] = {"divergence": name, "way": way}
            if way in memory:
                row |= {"peak_mib": round(memory[way]["peak"] - memory[way]["before"], 1), "before_mib": round(memory[way]["before"], 1)}
            row |= {"seconds": [round(v, 5) for v in seconds[way]], "median_seconds": round(statistics.median(seconds[way]), 5)}
            for rival in ("dense", "trl", "floor"):
                if rival in seconds and rival != way:
                    row[f"against_{rival}"] = round(statistics.median(a / b for a, b in zip(seconds[way], seconds[rival], strict=True)), 4)
            if way == "limbeck":
                row["errors"] = errors
            rows.append(row)
            held = f"{row['peak_mib']:8.1f} MiB over its inputs, " if "peak_mib" in row else " " * 29
            against = ", ".join(f"{row[f'against_{rival}']:.3f} × {rival}" for rival in ("dense", "trl", "floor") if f"against_{rival}" in row)
            print(f"{name:11} {way:8} {held}{engine.summary(seconds[way])} s, {against}", flush=True)
        print(f"{name:11} gradients  against dense: " + ", ".join(f"{what} {value:.1e}" for what, value in errors.items()), flush=True)
    return rows


def report(size: Size, rows: list[dict[str, Any]], peer: str | None, output: Path) -> None:
    """Judge, print and write the evidence."""
    from limbeck import environment, files

    checks: list[dict[str, Any]] = []

    def check(text: str, value: float, bound: float) -> None:
        checks.append({"text": text, "value": float(f"{value:.4g}"), "bound": bound, "holds": value <= bound})
        print(f"{'holds' if value <= bound else 'DOES NOT HOLD':14} {text}: {value:.4g} (bound {bound})")

    found = {(row["divergence"], row["way"]): row for row in rows}
    for name in BETAS:
        own, dense = found[name, "limbeck"], found[name, "dense"]
        check(f"{name}: peak memory beyond the inputs against the dense path", own["peak_mib"] / dense["peak_mib"], MEMORY_BOUND)
        check(
            f"{name}: time of forward + backward against the dense path, median of {len(own['seconds'])} interleaved ratios", own["against_dense"], TIME_BOUND
        )
        if peer:
            check(f"{name}: the same against TRL {PEER_VERSION}", own["against_trl"], TIME_BOUND)
        check(
            f"{name}: largest error of a gradient against the dense path, norm over norm",
            max(own["errors"]["hidden_norm"], own["errors"]["weight_norm"]),
            ERROR_BOUND,
        )
    threads = "two threads" if size.threads == 2 else f"{size.threads} thread{'s' if size.threads > 1 else ''}"
    files.write_json(
        output,
        {
            "title": f"A divergence over a head: {size.positions} positions, width {size.width}, {size.vocabulary:,} tokens, float32, {threads}",
            "floor": "3 products of the student (logits, dh, dW) and 1 of the teacher (logits)",
            "products_gflop": round(4 * 2 * size.positions * size.width * size.vocabulary / 1e9, 1),
            "checks": checks,
            "ways": rows,
            "commit": environment.commit(engine.ROOT),
            "versions": environment.versions() | ({"trl": PEER_VERSION} if peer else {}),
            "machine": environment.machine(),
            "date": time.strftime("%Y-%m-%d"),
        },
    )
    print(f"written: {output}")


def sizes(parser: argparse.ArgumentParser) -> None:
    """The arguments that a contestant takes."""
    for name in ("positions", "width", "vocabulary", "threads"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Size, name))
    parser.add_argument("--contestant", help=argparse.SUPPRESS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes(parser)
    parser.add_argument("--reps", type=int, default=15)
    parser.add_argument("--output", type=Path, default=engine.ROOT / "docs" / "evidence" / "bench_linear_divergence.json")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--peer-python")
    parser.add_argument("--smoke", action="store_true", help="one repetition, few tokens, one thread, no peer")
    args = parser.parse_args()
    size = Size(args.positions, args.width, args.vocabulary, args.threads)
    if args.contestant:
        contest(size, args.contestant)
        return
    if args.smoke:
        size, args.reps, args.no_peer = Size(positions=64, width=8, vocabulary=500, threads=1), 1, True
    peer = None if args.no_peer else peer_python(args.peer_python)
    report(size, measure(size, ["dense", "limbeck", *(["trl"] if peer else []), "floor"], peer, args.reps), peer, args.output)


if __name__ == "__main__":
    main()
