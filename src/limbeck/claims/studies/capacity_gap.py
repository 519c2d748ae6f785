"""Studies of the claim of `capacity_gap` (2311.07052): students cut out of teachers of five sizes, and the law's fit on runs whose law is known."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from limbeck import seeds
from limbeck.components import Component, build
from limbeck.contract import Method, OptimiserSpec, ScheduleSpec
from limbeck.data import CATALOGUE
from limbeck.data.splits import Splits
from limbeck.evaluate.language import evaluate_language
from limbeck.language.capacity_law import CapacityLaw, fit_law
from limbeck.language.decoder import Decoder
from limbeck.language.sources import ModelSource
from limbeck.language.texts import TokenData
from limbeck.methods.language.capacity_gap import CapacityGap
from limbeck.methods.language.next_token import NextToken
from limbeck.models import build_model
from limbeck.train import TrainConfig, Trainer

HEAD_DIM = 8
"""Of all decoders here: small, so that there are heads to choose among."""


def planted_law(slope: float = 2.5, noise: float = 0.04, trials: int = 100, draws: int = 300) -> dict[str, float]:
    """`fit_law` on score = −(log T − log(slope · S))² over three sizes and seven ratios T/S, without noise and with it.

    Returns:
        For "surface" and "bins": slope_HOW, intercept_HOW, r2_HOW without noise; covered_HOW, the share of `trials` noisy fits whose 95 % interval holds the
        slope; width_HOW, the median width of these intervals.
    """
    found: dict[str, float] = {}
    S = [s for s in (0.03, 0.06, 0.12) for _ in range(7)]
    T = [s * r for s in (0.03, 0.06, 0.12) for r in (1.2, 1.6, 2.1, 2.8, 3.7, 5.0, 6.6)]
    score = torch.tensor([-((math.log(t) - math.log(slope * s)) ** 2) for s, t in zip(S, T, strict=True)], dtype=torch.float64)
    for how in ("surface", "bins"):
        exact = fit_law(S, T, score, generator=seeds.generator(0, "planted"), how=how, draws=0)
        found |= {f"slope_{how}": exact.slope, f"intercept_{how}": exact.intercept, f"r2_{how}": exact.r2}
        generator, inside = seeds.generator(1, "planted", how), 0
        widths: list[float] = []
        for trial in range(trials):
            noisy = score + noise * torch.randn(len(S), generator=generator, dtype=torch.float64)
            interval = fit_law(S, T, noisy, generator=seeds.generator(2, "planted", how, trial), how=how, draws=draws).slope_interval
            low, high = interval if interval is not None else (math.nan, math.nan)
            inside += low <= slope <= high
            widths.append(high - low)
        found |= {f"covered_{how}": inside / trials, f"width_{how}": sorted(widths)[trials // 2]}
    return found


def curve(
    seed: int,
    source: Mapping[str, Any],
    layers: int = 4,
    widths: Sequence[int] = (32, 48, 64, 96, 128),
    students: Sequence[int] = (30_000, 60_000, 120_000),
    teacher_steps: int = 400,
    student_steps: int = 200,
    teacher_rate: float = 3e-3,
    student_rate: float = 3e-3,
    test_rows: int | None = None,
) -> dict[str, float]:
    """Students of a few sizes, each cut out of every larger teacher and distilled by (7): bits a character over T for each S, and what the law makes of it.

    Args:
        source: of the text, a component of `limbeck.data`. students: sizes that are aimed at. Sizes are weights without embeddings, throughout; the rates are
            AdamW's, batches are of 32 rows. test_rows: how many rows of the test text are looked at, the first ones; None: all.

    Returns:
        teacher_T: bits a character of the teacher of T thousand weights. sS_tT: of a student of about S thousand out of it. best_S: T*(S) in thousands, off the
        surface, and inside_S, whether it is a top (1) or an end of what was tried (0). slope, slope_low, slope_high, intercept (in thousands), explained.
    """
    splits = build(Component.model_validate(dict(source)), CATALOGUE, "data source")
    found: dict[str, float] = {}
    runs: list[tuple[float, float, float]] = []
    for width in widths:
        teacher = decoder_of(width, layers, splits, seed)
        trained(NextToken(), teacher, None, splits, teacher_steps, teacher_rate, seed)
        T = teacher.shape.layer_parameters
        found[f"teacher_{T / 1e3:.0f}"] = bits(teacher, splits, test_rows)
        for wanted in students:
            if wanted < T:
                method = trained(CapacityGap(parameters=wanted, multiple=1), teacher, ModelSource([teacher]), splits, student_steps, student_rate, seed)
                student = method.student
                assert isinstance(student, Decoder)
                runs.append((student.shape.layer_parameters / 1e3, T / 1e3, bits(student, splits, test_rows)))
                found[f"s{wanted / 1e3:.0f}_t{T / 1e3:.0f}"] = runs[-1][-1]
        teacher.requires_grad_(False)
    S, T_all, lost = zip(*runs, strict=True)
    return found | of_law(fit_law(S, T_all, [-value for value in lost], generator=seeds.generator(seed, "curve")))


def of_law(law: CapacityLaw) -> dict[str, float]:
    """A law as metrics."""
    low, high = law.slope_interval or (math.nan, math.nan)
    told = {"slope": law.slope, "slope_low": low, "slope_high": high, "intercept": law.intercept, "explained": law.explained}
    for optimum in law.optima:
        told |= {f"best_{optimum.student:.0f}": optimum.teacher, f"inside_{optimum.student:.0f}": float(optimum.inside)}
    return told


def decoder_of(width: int, layers: int, splits: Splits, seed: int) -> Decoder:
    """A fresh decoder with heads of HEAD_DIM."""
    text = splits.train
    assert isinstance(text, TokenData)
    component = Component(name="decoder", args={"width": width, "layers": layers, "heads": width // HEAD_DIM})
    made = build_model(component, num_classes=text.vocabulary, input_shape=(2, text.length), seed=seed)
    assert isinstance(made, Decoder)
    return made


def trained(method: Method, student: Decoder, teacher: ModelSource | None, splits: Splits, steps: int, rate: float, seed: int) -> Method:
    """The method bound and trained: AdamW as the released code's, batches of 32 rows, a cosine."""
    optimiser = OptimiserSpec(
        name="adamw", lr=rate, betas=(0.9, 0.95), weight_decay=0.1, schedule=ScheduleSpec(name="cosine", warmup=0.05)
    )  # fmt: skip
    config = TrainConfig(steps=steps, batch_size=32, clip_norm=1.0, optimiser=optimiser)
    method.bind(student=student, teacher=teacher, train=splits.train, seed=seed)  # type: ignore[arg-type]
    Trainer(method, splits.train, config, seed=seed).fit()
    return method


def bits(model: Decoder, splits: Splits, rows: int | None = None) -> float:
    """Bits a character of the test text, or of its first rows."""
    indices = None if rows is None else torch.arange(min(rows, len(splits.test)))
    value = evaluate_language(model, splits.test, None, batch_size=64, indices=indices).bits_per_byte
    assert value is not None
    return value
