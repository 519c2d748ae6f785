"""A generator's run with everything in it, from which tests take away."""

from limbeck.evaluate.statistics import Latency
from limbeck.report.summary import Arm, Curve, Outcome, Picture, RunSummary

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="


def outcome(seed, fid, calls, *, curves=(), nonfinite=0):
    measures = {
        "fid": fid,
        "mmd2": fid / 1000,
        "recall": 0.7 - fid / 1000,
        "calls": float(calls),
        "seconds_per_sample": 0.0004 * calls,
        "texture": 0.25,  # no report knows it
    }
    return Outcome(seed, measures=measures, curves=tuple(curves), nonfinite=nonfinite, training_seconds=75.0 if curves else None)


def rung(role, label, fids, calls, *, parameters=80_000, curves=()):
    outcomes = tuple(outcome(seed, fid, calls, curves=curves) for seed, fid in enumerate(fids))
    return Arm(role, label, outcomes, parameters=parameters, macs=parameters * 2, bytes=parameters * 4)


def generator_run(title="one step", students=(4.9, 5.2, 5.0), alone=(46.0, 45.1, 47.2), headline=("fid", "recall")):
    curve = Curve("student", "loss", tuple(range(0, 400, 10)), tuple(1 / (1 + i) for i in range(40)))
    arms = (
        rung("other", "teacher, 2 calls", (30.1, 29.5, 30.6), 2),
        rung("distilled", "student", students, 1, curves=[curve]),
        rung("alone", "teacher, 1 call", alone, 1),
        rung("teacher", "teacher", (3.1, 3.0, 3.2), 18),
        rung("other", "teacher, 8 calls", (6.4, 6.1, 6.2), 8),
    )
    return RunSummary(
        title,
        arms,
        method="dmd2",
        recipe=f"name: {title}\nmethod: {{name: dmd2}}\n",
        created="2026-01-02 03:04",
        environment={"python": "3.11.2"},
        facts={"critic": {"updates": 5}},
        notes=("The student covers 3 of 25 modes: it has collapsed.",),
        pictures=(
            Picture(PIXEL, "real images", "real", "Real images"),
            Picture(PIXEL, "the teacher's images", "teacher, 18 calls", "From the same noise"),
            Picture(PIXEL, "the student's images", "student, 1 call", "From the same noise"),
            Picture(PIXEL, "loose"),
        ),
        kind="generator",
        headline=headline,
    )


def timed(arm, seconds):
    """The arm with batches timed at sizes 1 and 64."""
    from dataclasses import replace

    return replace(arm, latencies=tuple(Latency.of([seconds * size**0.5 * (1 + i / 100) for i in range(-5, 6)], size) for size in (1, 64)))
