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
import math
import os
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


def data(pixels: Any, labels: Any) -> Any:
    """uint8 images as a run has them; a new object has no fingerprint yet."""
    from limbeck.data import ArrayData

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
    images, gate = data(*engine._pixels(size.images)), engine.Gate(steps)
    teacher = None if record is None else RecordTeacher(Record.open(str(record)), images)
    views = Views(*looks(size.views), images, teacher)

    method = Supervised() if teacher is None else KD(temperature=4.0, weight=0.9)
    method.bind(student=student, teacher=teacher, train=images, num_classes=10)
    config = TrainConfig(steps=10**6, batch_size=BATCH, drop_last=True, optimiser=OptimiserSpec(lr=0.05, momentum=0.9))
    Trainer(method, images, config, num_classes=10, progress=engine.Gated(gate), views=views, cpu=True).fit()


def run_forward(size: Size) -> None:
    """The floor of recording: the teacher's forward passes alone, freed memory kept as limbeck keeps it (without, they take 1.7 times as long)."""
    import torch

    from limbeck.data import Views
    from limbeck.train import parallel

    parallel.keep_freed_memory()
    teacher, _ = engine.networks()
    images = data(*engine._pixels(size.recorded))
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
    """A new record every turn, of data whose fingerprint is not known yet."""
    teacher, _ = engine.networks()
    pixels = engine._pixels(size.recorded)
    gate, turn = engine.Gate(1), 0
    gate.wait()
    while True:
        make_record(teacher, data(*pixels), 1, TRAINED["full"], folder / f"turn-{turn}")
        gate.step()
        turn += 1


# ---- codecs ---------------------------------------------------------------------------------------------------------


def teacher_logits(count: int) -> Any:
    """[count, 10] float32 of the ResNet-56, one plain look each."""
    import numpy as np
    import torch

    teacher, _ = engine.networks()
    images = data(*engine._pixels(count))
    with torch.no_grad():
        parts = [teacher(images.prepare(images.fetch(ids)[0])).numpy() for ids in torch.arange(count).split(TEACHER_BATCH)]
    return np.concatenate(parts)


def synthetic_logits(count: int, classes: int) -> Any:
    """[count, classes] float32: normal with sd 2, and one class a row raised by a share, uniform in [0, 1], of 20: rows from flat to nearly certain."""
    import numpy as np

    generator = np.random.default_rng(classes)
    logits = 2 * generator.standard_normal((count, classes))
    logits[np.arange(count), generator.integers(0, classes, count)] += 20 * generator.random(count)
    return logits.astype(np.float32)


def codec_rows(size: Size, reps: int, folder: Path) -> list[dict[str, Any]]:
    """One row of the table a codec and number of classes."""
    import numpy as np

    from limbeck.records import Field, Part, Record, RecordWriter, codec_from, describe, kl_error

    table = []
    for classes in size.classes:
        real = classes == 10
        logits = teacher_logits(size.rows) if real else synthetic_logits(size.rows, classes)
        specs: list[dict[str, Any]] = [{"name": name} for name in ("full", "half", "log8")]
        specs += [{"name": name, "k": k} for name in ("topk", "topk8") for k in sorted({5, min(10, classes)})]
        turns: list[tuple[dict[str, Any], Callable[[], Any], Callable[[Any, Any], Any]]] = []
        for number, spec in enumerate(specs):
            codec = codec_from(spec)
            arrays = codec.encode(logits)
            url = str(folder / f"codec-{classes}-{number}")
            fields = (Field.logits(codec, classes),)
            writer = RecordWriter(url, identity={"codec": codec.spec()}, about={}, parts={"train": Part(np.arange(size.rows), 1, fields)})
            for task in writer.pending():
                writer.write(task, {"logits": logits[task.positions][:, None]})
            writer.finish()
            part = Record.open(url).parts["train"]
            outcomes = codec.kl_outcomes(logits, arrays)
            row = {"classes": classes, "logits": "ResNet-56, CIFAR-10 test" if real and engine_has_data() else "synthetic" if not real else "untrained"}
            row |= {"codec": spec["name"], "k": spec.get("k"), **describe(codec, classes)}
            kl_mean = float(kl_error(logits, codec.decode(arrays, classes)).mean())
            row["kl_mean"] = kl_mean if math.isfinite(kl_mean) else None
            row["kl_outcomes_mean"] = None if outcomes is None else float(outcomes.mean())
            batch = {name: values[:256] for name, values in arrays.items()}
            decode = _bound(codec.decode, batch, classes)
            turns.append((row, decode, _reader(part)))
        generator = np.random.default_rng(0)
        decoded: list[list[float]] = [[] for _ in turns]
        gathered: list[list[float]] = [[] for _ in turns]
        for repetition in range(reps + 1):
            for number, (_, decode, gather) in enumerate(turns):
                ids = generator.integers(0, size.rows, 256)
                views = np.zeros_like(ids)
                times = (_seconds(decode), _seconds(lambda gather=gather, ids=ids, views=views: gather(ids, views)))
                if repetition:  # the first round warms up
                    decoded[number].append(times[0])
                    gathered[number].append(times[1])
        for number, (row, _, _) in enumerate(turns):
            row |= {"decode_us": round(statistics.median(decoded[number]) * 1e6, 1), "gather_us": round(statistics.median(gathered[number]) * 1e6, 1)}
            table.append(row)
    return table


def engine_has_data() -> bool:
    """Whether the images are CIFAR-10's and the teacher has its trained weights."""
    folder = os.environ.get("LIMBECK_DATA")
    return bool(folder) and all((Path(folder or "") / name).exists() for name in ("cifar10_test.parquet", "cifar10_resnet56.safetensors"))


def _bound(decode: Callable[..., Any], batch: Mapping[str, Any], classes: int) -> Callable[[], Any]:
    return lambda: decode(batch, classes)


def _reader(part: Any) -> Callable[[Any, Any], Any]:
    return lambda ids, views: part.read(["logits"], ids, views)


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


# ---- where the time goes --------------------------------------------------------------------------------------------


def pieces(size: Size, reps: int, records: Mapping[str, Path]) -> dict[str, float]:
    """Median microseconds a batch of what lies between a contestant and its floor, in one process."""
    import torch

    from limbeck.contract import Batch
    from limbeck.data import Views
    from limbeck.losses import cross_entropy, hinton_terms
    from limbeck.records import Record
    from limbeck.teachers.recorded import RecordTeacher

    images = data(*engine._pixels(size.images))
    ids = torch.randperm(size.images, generator=torch.Generator().manual_seed(0))[:BATCH]
    view = torch.zeros(len(ids), 1, dtype=torch.int64)
    student = torch.randn(len(ids), 10, requires_grad=True)
    spec, augment = looks(size.views)
    plain = Views(spec, augment, images)
    shown = plain.batch(ids, view)
    assert shown.targets is not None
    targets = shown.targets

    def soft(teacher: RecordTeacher, batch: Batch) -> None:
        terms = hinton_terms(student, teacher.logits(batch), targets, 4.0, "batchmean")
        (0.9 * terms[0] + 0.1 * terms[1]).backward()

    calls: dict[str, Callable[[], Any]] = {
        f"show {BATCH} views": lambda: plain.batch(ids, view),
        f"normalise {BATCH} images": lambda: images.prepare(shown.inputs),
        "cross-entropy, forward and backward": lambda: cross_entropy(student, targets, 0.0).backward(),
    }
    for name, path in records.items():
        teacher = RecordTeacher(Record.open(str(path)), images)
        batch = Views(spec, augment, images, teacher).batch(ids, view)
        calls[f"look up {BATCH} answers, {name}"] = lambda teacher=teacher: teacher.lookup(ids, view[:, 0])
        calls[f"Hinton's loss of the answers, forward and backward, {name}"] = lambda teacher=teacher, batch=batch: soft(teacher, batch)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for repetition in range(10 * reps + 1):
        for name, call in calls.items():
            seconds = _seconds(call)
            if repetition:
                taken[name].append(seconds)
    return {name: round(statistics.median(values) * 1e6, 1) for name, values in taken.items()}


# ---- the parent -----------------------------------------------------------------------------------------------------


def race(racers: list[engine.Contestant], reps: int, parts: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of every turn (divided by `parts`), and peak memory in MiB."""
    for racer in racers:
        racer.go()  # warm up: first steps allocate
    seconds: dict[str, list[float]] = {racer.name: [] for racer in racers}
    for repetition in range(reps):
        for place in range(len(racers)):
            racer = racers[(place + repetition) % len(racers)]
            seconds[racer.name].append(racer.go() / parts)
    return seconds, {racer.name: racer.stop() for racer in racers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reps", type=int, default=21)
    parser.add_argument("--steps", type=int, default=8, help="training steps of a turn")
    parser.add_argument("--output", type=Path, default=engine.ROOT / "docs" / "evidence" / "bench_records.json")
    parser.add_argument("--smoke", action="store_true", help="two repetitions of one step, few images, one thread")
    parser.add_argument("--contestant", choices=["labels", "record", "forward", "recording"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = SMOKE if args.smoke else Size()
    if args.smoke:
        args.reps, args.steps = 2, 1
    import torch

    torch.set_num_threads(size.threads)
    if args.contestant:
        {
            "labels": lambda: run_training(size, args.steps, None),
            "record": lambda: run_training(size, args.steps, args.folder),
            "forward": lambda: run_forward(size),
            "recording": lambda: run_recording(size, args.folder),
        }[args.contestant]()
        return
    with tempfile.TemporaryDirectory(prefix="limbeck-bench-") as held:
        folder = Path(held)
        own = [sys.executable, str(HERE / "records.py"), "--steps", str(args.steps), *(["--smoke"] if args.smoke else []), "--folder"]
        teacher, _ = engine.networks()
        images = data(*engine._pixels(size.images))
        for name, codec in TRAINED.items():
            print(f"recording {size.images} images, {size.views} views, codec {name} …", flush=True)
            make_record(teacher, images, size.views, codec, folder / name)
        trainers = [engine.Contestant("labels", [*own, str(folder), "--contestant", "labels"])]
        trainers += [engine.Contestant(name, [*own, str(folder / name), "--contestant", "record"]) for name in TRAINED]
        training = race(trainers, args.reps, args.steps)
        makers = [engine.Contestant(name, [*own, str(folder / "made"), "--contestant", name]) for name in ("forward", "recording")]
        recording = race(makers, args.reps, 1)
        table = codec_rows(size, args.reps, folder)
        parts = pieces(size, args.reps, {name: folder / name for name in TRAINED})
    report(size, training, recording, table, parts, args.output)


Raced = tuple[dict[str, list[float]], dict[str, float]]


def report(size: Size, training: Raced, recording: Raced, table: list[dict[str, Any]], parts: dict[str, float], output: Path) -> None:
    """Print the figures and write the evidence."""
    from limbeck import environment, files

    for (seconds, peaks), unit in ((training, "s a step"), (recording, f"s for {size.recorded} images")):
        for name, values in seconds.items():
            print(f"{name:14} {engine.summary(values)} {unit}, peak memory {peaks[name]:.0f} MiB")
    checks = []

    def check(text: str, above: list[float], below: list[float]) -> None:
        ratios = [a / b for a, b in zip(above, below, strict=True)]
        value = statistics.median(ratios)
        text = f"{text}, median of {len(ratios)} interleaved ratios"
        checks.append({"text": text, "value": round(value, 4), "bound": BOUND, "holds": value <= BOUND})
        print(f"{'holds' if value <= BOUND else 'DOES NOT HOLD':14} {text}: {engine.summary(ratios)} (bound {BOUND})")

    for name in TRAINED:
        check(f"training from a record (codec {name}) against training by labels on the same views", training[0][name], training[0]["labels"])
    check("recording (preparing images included) against the teacher's bare forward passes", recording[0]["recording"], recording[0]["forward"])
    print()
    print(
        f"{'C':>5} {'codec':8} {'k':>3} {'bytes':>6} {'raw':>6} {'raw/held':>10} {'mean KL':>10} {'outcomes':>10} {'decode µs':>10} {'gather µs':>10}  logits"
    )
    for row in table:
        mean = "infinite" if row["kl_mean"] is None else f"{row['kl_mean']:.2e}"
        outcomes = "" if row["kl_outcomes_mean"] is None else f"{row['kl_outcomes_mean']:.2e}"
        print(
            f"{row['classes']:5} {row['codec']:8} {row['k'] or '':>3} {row['bytes_per_row']:6} {row['raw_bytes_per_row']:6} {row['ratio']:10.2f} "
            f"{mean:>10} {outcomes:>10} {row['decode_us']:10.0f} {row['gather_us']:10.0f}  {row['logits']}"
        )
    print()
    for name, value in parts.items():
        print(f"{value:10.0f} µs  {name}")
    result = {
        "title": f"Records: ResNet-56 → ResNet-20, CIFAR-10, {'two threads' if size.threads == 2 else 'one thread'}",
        "checks": checks,
        "seconds_a_step": {name: [round(v, 5) for v in values] for name, values in training[0].items()},
        "seconds_a_recording": {name: [round(v, 5) for v in values] for name, values in recording[0].items()},
        "peak_mib": {name: round(v, 1) for name, v in (training[1] | recording[1]).items()},
        "codecs": table,
        "pieces_us": parts,
        "sizes": {"images": size.images, "views": size.views, "batch": BATCH, "recorded": size.recorded, "teacher_batch": TEACHER_BATCH, "rows": size.rows},
        "commit": environment.commit(engine.ROOT),
        "versions": environment.versions(),
        "machine": environment.machine(),
        "date": time.strftime("%Y-%m-%d"),
    }
    files.write_json(output, result)
    print(f"written: {output}")


if __name__ == "__main__":
    main()
