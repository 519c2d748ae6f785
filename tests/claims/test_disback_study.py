"""What the claim of DisBack reads off its curve, and that tracing changes nothing."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from limbeck.claims.studies.disback import FLOOR, TracedDisBack, log_area, passes_to
from limbeck.contract import Batch, Clock, OptimiserSpec, Update
from limbeck.data.points import gaussian_ring
from limbeck.diffusion.build import mlp_denoiser, mlp_generator
from limbeck.errors import InputError
from limbeck.evaluate.samples import mmd2
from limbeck.methods.generators.disback import DisBack
from limbeck.train import TrainConfig, Trainer


class Stopped(TracedDisBack):
    """Stops in the middle of stage 2."""

    def updates(self, batch: Batch, clock: Clock) -> Iterator[Update]:
        if (clock.phase, clock.step) == ("backtrack", 3):
            raise RuntimeError("stopped")
        yield from super().updates(batch, clock)


def trained(kind: type[DisBack], folder: Path | None = None, **knobs) -> DisBack:
    data = gaussian_ring(count=64, test=32, scale=None, labels="none")
    torch.manual_seed(0)
    teacher = mlp_denoiser((2,), 0, widths=(4,), sigma_data=2.0)
    student = mlp_generator((2,), 0, widths=(4,), offset=(6.0, 6.0))
    method = kind(start="fresh", stage1_steps=4, record_every=2, iterations_per_node=2, **knobs)
    method.bind(student=student, teacher=teacher, train=data.train, test=data.test, seed=1)
    train = TrainConfig(steps=5, batch_size=8, log_every=1, checkpoint_steps=1, optimiser=OptimiserSpec(name="adam", lr=0.05))
    Trainer(method, data.train, train, seed=1, folder=folder).fit()
    return method


def test_tracing_changes_nothing_and_counts_passes_with_stage_1(tmp_path) -> None:
    plain, traced = trained(DisBack), trained(TracedDisBack, trace_every=2, trace_samples=20)
    assert all(torch.equal(a, b) for a, b in zip(plain.student.state_dict().values(), traced.student.state_dict().values(), strict=True))
    found = traced.facts()
    assert [passes for passes, _ in found["curve"]] == [0, 4 * 3 + 2 * 7, 4 * 3 + 4 * 7]
    assert found["metrics"]["passes"] == 4 * 3 + 5 * 7 == plain.facts()["metrics"]["passes"]
    x = traced.points[-1][1]
    assert found["curve"][-1][1] == found["metrics"]["traced_last"] == pytest.approx(mmd2(traced.real, x))
    assert found["metrics"]["reached"] == 0
    assert found["metrics"]["passes_to_goal"] == 4 * 3 + 4 * 7
    with pytest.raises(RuntimeError, match="stopped"):
        trained(Stopped, tmp_path, trace_every=2, trace_samples=20)
    assert trained(TracedDisBack, tmp_path, trace_every=2, trace_samples=20).facts() == found


def test_what_is_read_off_a_curve() -> None:
    curve = [(0, 1.0), (10, 1.0), (20, 0.01)]
    assert passes_to(curve, 1.0) == 0
    assert passes_to(curve, 0.5) == 20
    assert passes_to(curve, 0.001) is None
    assert log_area(curve, 10) == 0
    assert log_area(curve, 20) == pytest.approx(-0.5)
    assert log_area(curve, 15) == pytest.approx(-0.5 * 5 / 15)
    assert log_area(curve, 40) == pytest.approx(-(10 + 2 * 20) / 40)
    assert log_area([(0, -1.0), (10, 0.0)], 10) == pytest.approx(math.log10(FLOOR))


def test_without_test_samples_it_is_refused() -> None:
    with pytest.raises(InputError, match="test samples"):
        TracedDisBack(start="fresh").bind(student=mlp_generator((2,), 0, widths=(4,)), teacher=mlp_denoiser((2,), 0, widths=(4,)))
