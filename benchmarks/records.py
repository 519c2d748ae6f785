"""What a record costs: training from it, making it, and its bytes; side by side in one run.

1. training a ResNet-20 on CIFAR-10 images by limbeck's trainer (batch 128, seeded views with crop and flip) from a ResNet-56's record, codecs `full` and
   `topk` (k = 5), against training the same student on the same views by labels alone, with no teacher;
2. recording a ResNet-56 (one view with crop and flip, batches of 256, hashing, checksums and writing included) against its bare forward passes over
   the same images, augmented and normalised before the race: what prepares images is in the recording and not in the bare pass;
3. bytes a row of every codec, mean KL, and what a batch of 256 rows takes to decode and to gather.

In 1 and 2 each contestant is a process of its own that waits for its turn (`engine.py`); turns are interleaved in an order that rotates, and every
figure is a median over the repetitions. In 3 the codecs take turns in one process. Two threads.

    python benchmarks/records.py [--reps 21] [--steps 8] [--output docs/evidence/bench_records.json] [--smoke]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import engine

HERE = Path(__file__).resolve().parent
BATCH, TEACHER_BATCH = engine.BATCH, 256
BOUND = 1.05
TRAINED = {"full": {"name": "full"}, "topk": {"name": "topk", "k": 5}}
"""The codecs that part 1 trains from."""


@dataclass(frozen=True)
class Size:
    """How much is measured. images, views: of the records of part 1; recorded: images of part 2; rows: of part 3."""

    images: int = 10_000
    views: int = 2
    recorded: int = 3072
    rows: int = 10_000
    classes: tuple[int, ...] = (10, 100, 1000)
    threads: int = engine.THREADS


SMOKE = Size(images=128, views=1, recorded=64, rows=256, classes=(10, 100), threads=1)


# ---- what the contestants share ------------------------------------------------------------------------------------


def data(count: int) -> Any:
    """uint8 images and labels as a run has them (fresh, so that nothing is cached)."""
    from limbeck.data import ArrayData

    pixels, labels = engine._pixels(count)
    return ArrayData(pixels, labels, [str(c) for c in range(10)], mean=engine.MEAN, std=engine.STD)


def looks(count: int) -> tuple[Any, Any]:
    """(views, augmentation)."""
    from limbeck.data import AugmentSpec, ViewSpec

    return ViewSpec(count=count), AugmentSpec(crop=4, flip=True)


def make_record(teacher: Any, images: Any, views: int, codec: Mapping[str, Any], folder: Path) -> Any:
    """`limbeck.record`, as a person calls it."""
    import limbeck

    spec, augment = looks(views)
    settings = {"codec": codec, "batch_size": TEACHER_BATCH, "test": False}
    return limbeck.record(teacher=teacher, data=images, views=spec, augment=augment, settings=settings, output=folder)


def run_training(size: Size, steps: int, record: Path | None) -> None:
    """The trainer over views: with a record, method kd; without, method supervised."""
    from limbeck.contract import OptimiserSpec
    from limbeck.data import Views
    from limbeck.methods import KD, Supervised
    from limbeck.records import Record
    from limbeck.teachers.recorded import RecordTeacher
    from limbeck.train import TrainConfig, Trainer

    _, student = engine.networks()
    images, gate = data(size.images), engine.Gate(steps)
    teacher = None if record is None else RecordTeacher(Record.open(str(record)), images)
    views = Views(*looks(size.views), images, teacher)

    class Gated:
        """A progress display that is a gate."""

        def start(self, label: str, steps: int, done: int, unit: str = "batches") -> None:
            gate.wait()

        def advance(self, step: int, note: str = "") -> None:
            if not note:  # the call after every batch; the other belongs to a logging step
                gate.step()

        def stop(self) -> None:
            pass

    method = Supervised() if teacher is None else KD(temperature=4.0, weight=0.9)
    method.bind(student=student, teacher=teacher, train=images, num_classes=10)
    config = TrainConfig(steps=10**6, batch_size=BATCH, drop_last=True, optimiser=OptimiserSpec(lr=0.05, momentum=0.9))
    Trainer(method, images, config, num_classes=10, progress=Gated(), views=views, cpu=True).fit()


def run_forward(size: Size) -> None:
    """The floor of recording: the teacher's forward passes alone."""
    import torch

    from limbeck.data import Views

    teacher, _ = engine.networks()
    images = data(size.recorded)
    views, ids = Views(*looks(1), images), torch.arange(size.recorded)
    batches = [images.prepare(views.batch(some, torch.zeros(len(some), 1, dtype=torch.int64)).inputs) for some in ids.split(TEACHER_BATCH)]
    gate = engine.Gate(1)
    gate.wait()
    while True:
        with torch.no_grad():
            for inputs in batches:
                teacher(inputs)
        gate.step()


def run_recording(size: Size, folder: Path) -> None:
    """A new record every turn."""
    teacher, _ = engine.networks()
    gate, turn = engine.Gate(1), 0
    while True:
        images = data(size.recorded)
        if turn:
            gate.step()  # images are read outside the turn
        else:
            gate.wait()
        make_record(teacher, images, 1, TRAINED["full"], folder / f"turn-{turn}")
        turn += 1
