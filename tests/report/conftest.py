"""A run with everything in it, from which tests take away."""

import random
import sys
from pathlib import Path

import pytest

from limbeck.evaluate.statistics import Bin, Latency
from limbeck.report.summary import Arm, Curve, Outcome, Picture, RunSummary

sys.path.insert(0, str(Path(__file__).parent))  # for report_pages

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="


def curve(player, metric, level):
    return Curve(player, metric, tuple(range(0, 400, 10)), tuple(level + 1 / (1 + i) for i in range(40)))


def outcome(seed, accuracy, curves=(), *, agreement=0.9, classes=3):
    noise = random.Random(seed)
    bins = (Bin(0.0, 0.5, 0, None, None), Bin(0.5, 1.0, 50, 0.8 + 0.1 * noise.random(), accuracy))
    return Outcome(
        seed=seed,
        accuracy=accuracy,
        nll=0.4,
        ece=0.04,
        brier=0.2,
        agreement=agreement,
        kl_to_teacher=None if agreement is None else 0.1,
        per_class=tuple(accuracy + 0.01 * (i - 1) for i in range(classes)),
        bins=bins,
        training_seconds=75.0,
        examples_seen=480_000,
        curves=tuple(curves),
    )


def arm(role, label, accuracies, *, parameters, seconds, curves=(), agreement=0.9):
    outcomes = tuple(outcome(seed, accuracy, curves, agreement=agreement) for seed, accuracy in enumerate(accuracies))
    latencies = tuple(Latency.of([seconds * size**0.5 * (1 + i / 100) for i in range(-5, 6)], size) for size in (1, 64))
    return Arm(role, label, outcomes, parameters=parameters, macs=parameters * 3, bytes=parameters * 4, latencies=latencies)


def full_run(title="quickstart", gain=0.03):
    alone = (0.85, 0.86, 0.84, 0.85, 0.855)
    student_curves = [curve("student", "loss", 0.4), curve("discriminator", "loss", 0.6)]
    return RunSummary(
        title=title,
        method="kd",
        created="2026-01-02 03:04",
        arms=(
            arm("teacher", "Teacher", (0.90, 0.91), parameters=1_200_000, seconds=0.004, curves=[curve("student", "loss", 0.1)], agreement=None),
            arm("alone", "Student alone", alone, parameters=50_000, seconds=0.0012, curves=[curve("student", "loss", 0.2)]),
            arm(
                "distilled", "Student distilled", [a + gain + 0.001 * i for i, a in enumerate(alone)], parameters=50_000, seconds=0.0012, curves=student_curves
            ),
        ),
        recipe=f"name: {title}\nmethod: {{name: kd, temperature: 4.0}}\ntrain:\n  epochs: 6\n",
        environment={"python": "3.11.2", "machine": {"cores": 2}, "packages": {"torch": "2.14.1"}},
        classes=("shoe", "shirt", "bag"),
        facts={"gammas": {"task 1": 0.93}, "layers": [{"name": "fc1", "bits": 4}, {"name": "fc2", "bits": 2}], "matrix": [[0.5], [0.25, 0.125]], "none": []},
        notes=("The teacher saw all labels.",),
        pictures=(Picture(PIXEL, "a red dot"),),
    )


@pytest.fixture
def run():
    return full_run()


@pytest.fixture
def make_run():
    return full_run
