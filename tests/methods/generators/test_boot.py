"""BOOT: the loss against one written out by hand, where gradient may go, no data, restart, guidance, and a student that beats one DDIM step."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from limbeck.components import Component
from limbeck.contract import Batch, Clock, OptimiserSpec, ScheduleSpec
from limbeck.diffusion import samplers, signal
from limbeck.diffusion.build import mixture_denoiser, mlp_denoiser
from limbeck.diffusion.denoisers import Denoiser, MixtureDenoiser, NetworkDenoiser
from limbeck.diffusion.distribution import normal, random_labels
from limbeck.errors import InputError
from limbeck.methods.generators.boot import Boot
from limbeck.train import TrainConfig, Trainer

RING = [[math.cos(2 * math.pi * k / 6), math.sin(2 * math.pi * k / 6)] for k in range(6)]


def network(seed: int = 0, *, classes: int = 3, schedule: Any = "cosine", head: bool = True, **options: Any) -> NetworkDenoiser:
    """A small network; `head` gives its last layer weights, so that it answers something."""
    torch.manual_seed(seed)
    found = mlp_denoiser((2,), classes, widths=[24, 24], schedule=schedule, **{"precondition": "none"} | options)
    if head:
        torch.nn.init.normal_(found.network.head.weight, std=0.2)
    return found


def exact(schedule: Any = "cosine") -> MixtureDenoiser:
    return mixture_denoiser(RING, 0.1, classes=[0, 1, 2, 0, 1, 2], schedule=schedule)


class Untouchable:
    """Data that may be counted, and nothing else."""

    classes = ("a", "b", "c")
    targets = None

    def __len__(self) -> int:
        return 64

    def preprocessing(self) -> dict[str, Any]:
        return {"divide_by": 1.0, "mean": [0.5, 0.5], "std": [2.0, 2.0]}

    def fetch(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("a data-free method fetched data")

    def prepare(self, raw: Tensor) -> Tensor:
        raise AssertionError("a data-free method prepared data")


def bound(teacher: Denoiser | None = None, student: NetworkDenoiser | None = None, **knobs: Any) -> Boot:
    teacher = network(7) if teacher is None else teacher
    return Boot(**knobs).bind(student=student or network(1), teacher=teacher, train=Untouchable(), num_classes=3, seed=2)  # type: ignore[arg-type]


def config(steps: int, **changes: Any) -> TrainConfig:
    adam = OptimiserSpec(name="adam", lr=3e-3, schedule=ScheduleSpec(name="cosine"))
    return TrainConfig(**{"steps": steps, "batch_size": 64, "log_every": 50, "optimiser": adam} | changes)


def step(method: Boot, count: int = 16, **clock: Any) -> Any:
    (update,) = method.updates(Batch(torch.zeros(count, 0)), Clock(**clock))
    return update


# ---- the loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["signal", "noisy"])
@pytest.mark.parametrize("weight", ["unit", "inverse_delta", "inverse_k"])
def test_the_loss_is_the_sheets_written_out_by_hand_and_so_is_its_gradient(space: str, weight: str) -> None:
    """Everything again with DDIM steps and explicit divisions; the target is a constant and the teacher gets nothing."""
    method = bound(space=space, weight=weight, boundary_weight=0.3, start="fresh")
    method.teacher.requires_grad_(True)
    update = step(method)
    schedule, g, random = method.guided.schedule, method.student, Clock().generator("noise")
    noise, cond = normal(16, (2,), random), random_labels(16, 3, random)
    t = 0.04 + 0.96 * torch.rand(16, dtype=torch.float64, generator=random)
    t[:4] = 0.04
    t, s = (schedule.t_min + (schedule.t_max - schedule.t_min) * place for place in (t, t - 0.04))
    top = torch.full((4,), schedule.t_max, dtype=torch.float64)
    with torch.no_grad():
        known = g(noise, t, cond)
        x_t = known if space == "noisy" else schedule.add_noise(known, noise, t)
        x_s = samplers.ddim_step(schedule, x_t.double(), method.teacher(x_t, t, cond).double(), t, s)
        target = (x_s if space == "noisy" else signal.signal_of(schedule, x_s, noise.double(), s)).float()
        f = method.teacher(noise[-4:], top, cond[-4:])
        f = f if space == "signal" else schedule.add_noise(f, noise[-4:], top)
    k = 1 - schedule.level(s) / schedule.level(t)
    w = {"unit": torch.ones_like(k), "inverse_delta": torch.full_like(k, 625.0), "inverse_k": k.clamp(min=0.05) ** -2}[weight].float()
    bootstrap = ((g(noise, s, cond) - target).square().mean(1) * w).mean()
    boundary = (g(noise[-4:], top, cond[-4:]) - f).square().mean()
    torch.testing.assert_close(update.metrics["bootstrap"], bootstrap, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(update.metrics["boundary"], boundary)
    torch.testing.assert_close(update.loss, bootstrap + 0.3 * boundary, rtol=1e-4, atol=1e-5)
    wanted = torch.autograd.grad(bootstrap + 0.3 * boundary, list(g.parameters()))
    update.loss.backward()
    torch.testing.assert_close([p.grad for p in g.parameters()], list(wanted), rtol=1e-3, atol=1e-4)
    assert all(p.grad is None for p in method.teacher.parameters())


@pytest.mark.parametrize("options", [{}, {"prediction": "eps"}, {"prediction": "v"}, {"prediction": "velocity", "schedule": "flow"}, {"precondition": "edm"}])
def test_a_copied_student_starts_on_the_boundary(options: dict[str, Any]) -> None:
    method = bound(network(7, **options), network(1, **options))
    assert step(method).metrics["boundary"].item() < 1e-10
    assert step(bound(network(7, **options), network(1, **options), start="fresh")).metrics["boundary"].item() > 1e-3


def test_the_teacher_is_asked_as_often_as_said() -> None:
    asked = {}
    for name, knobs in {
        "plain": {}, "heun": {"solver": "heun"}, "no boundary": {"boundary_weight": 0}, "whole boundary": {"boundary_share": 1},
        "guided": {"guidance_scale": 2}, "range": {"guidance_range": (1, 3), "guidance_scale": 2},
    }.items():  # fmt: skip
        method = bound(**knobs)
        shown = []
        method.teacher.register_forward_hook(lambda _module, inputs, _out, shown=shown: shown.append(len(inputs[0])))
        update = step(method)
        asked[name] = sum(shown)
        assert method.facts()["metrics"]["teacher_calls"] == asked[name]
        assert ("boundary" in update.metrics) == (name != "no boundary")
    assert asked == {"plain": 20, "heun": 36, "no boundary": 16, "whole boundary": 32, "guided": 40, "range": 40}


def test_delta_follows_the_clock() -> None:
    method, seen = bound(delta=0.2, final_delta=0.02), []
    draw = signal.draw_places

    def noting(count: int, delta: float, *rest: Any) -> Any:
        seen.append(delta)
        return draw(count, delta, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signal, "draw_places", noting)
        for at in (0, 50, 100):
            step(method, step=at, steps=100)
    assert seen == pytest.approx([0.2, math.sqrt(0.2 * 0.02), 0.02])


# ---- guidance -------------------------------------------------------------------------------------------------------------


def test_a_scale_of_one_is_the_conditional_teacher_and_others_are_guided_per_sample() -> None:
    method = bound(guidance_range=(0, 4))
    x, t, cond = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)), torch.full((5,), 0.5, dtype=torch.float64), torch.arange(5) % 3
    conditional, free = method.teacher(x, t, cond), method.teacher(x, t, torch.full((5,), 3))
    torch.testing.assert_close(method.predict(x, t, cond, torch.ones(5)), conditional)
    torch.testing.assert_close(method.predict(x, t, cond, torch.zeros(5)), free)
    scale = torch.linspace(0, 4, 5)
    torch.testing.assert_close(method.predict(x, t, cond, scale), free + scale[:, None] * (conditional - free))
    scales = method.draw_scale(4000, torch.Generator().manual_seed(1))
    assert scales is not None
    assert (float(scales.min()), float(scales.max()), float(scales.mean())) == pytest.approx((0, 4, 2), abs=0.1)


def test_the_boundary_is_guided_too_and_the_embedding_is_trained() -> None:
    method = bound(guidance_range=(1, 4), boundary_share=1.0)
    noise, top, cond = torch.randn(8, 2), torch.full((8,), 0.999, dtype=torch.float64), torch.arange(8) % 3
    assert torch.equal(method.g.signal(noise, top, cond), method.teacher(noise, top, cond))  # untrained, it knows κ = 1 only
    assert step(method).metrics["boundary"].item() > 1e-5
    step(method).loss.backward()
    assert method.g.guidance is not None
    assert method.g.guidance.project.weight.grad.abs().max() > 0
    assert {id(p) for p in method.players()["generator"].module.parameters()} >= {
        id(method.g.guidance.project.weight),
        *(id(p) for p in method.student.parameters()),
    }


# ---- training -------------------------------------------------------------------------------------------------------------


def paired(method: Boot, count: int = 1000) -> tuple[float, float]:
    """RMSE to 200 DDIM steps of the teacher, of the student and of one DDIM step, from the same noise."""
    random = torch.Generator().manual_seed(11)
    noise, cond, teacher = normal(count, (2,), random), random_labels(count, method.g.num_classes, random), method.guided
    with torch.no_grad():
        best, one = (samplers.ddim(teacher, noise, teacher.schedule.steps(n), cond) for n in (200, 1))
        return float((method.g(noise, cond) - best).square().mean().sqrt()), float((one - best).square().mean().sqrt())


def test_a_fresh_student_of_an_exact_teacher_beats_one_step_without_any_data() -> None:
    student = network(3, schedule="trig", head=False)
    method = bound(exact("trig"), student, start="fresh", delta=0.1)
    trained = Trainer(method, Untouchable(), config(400), seed=2).fit()  # type: ignore[arg-type]
    own, one_step = paired(method)
    assert own < 0.6 * one_step
    assert trained.notes == []
    assert 0.3 < method.expected_spread() < 1.0


def test_a_kill_changes_nothing(tmp_path: Any) -> None:
    class Stops(Boot):
        def updates(self, batch: Batch, clock: Clock) -> Any:
            if clock.step == 5 and self.stop:
                raise RuntimeError("stopped")
            return super().updates(batch, clock)

    def fit(folder: str, stop: bool) -> Stops:
        method = Stops(guidance_range=(1, 3), final_delta=0.02).bind(
            student=network(1), teacher=network(7), train=Untouchable(), num_classes=3, seed=2
        )  # type: ignore[arg-type]  # fmt: skip
        method.stop = stop
        Trainer(method, Untouchable(), config(8, checkpoint_steps=3, log_every=1, ema=0.9), seed=2, folder=tmp_path / folder).fit()  # type: ignore[arg-type]
        return method

    whole = fit("whole", stop=False)
    with pytest.raises(RuntimeError, match="stopped"):
        fit("killed", stop=True)
    again = fit("killed", stop=False)
    assert all(torch.equal(a, b) for a, b in zip(whole.g.state_dict().values(), again.g.state_dict().values(), strict=True))
    assert whole.teacher_calls == again.teacher_calls == 8 * 80 * 2
    assert (tmp_path / "whole" / "metrics.jsonl").read_bytes() == (tmp_path / "killed" / "metrics.jsonl").read_bytes()


def test_a_collapse_is_noticed_without_data() -> None:
    method = bound(exact(), network(1, head=False), start="fresh")
    assert method.notice({"generator/spread": 0.5}) == []
    (said,) = method.notice({"generator/spread": 0.001})
    assert "collapsed" in said


def test_the_artefact_is_built_around_the_student() -> None:
    method = bound(guidance_range=(1, 3), guidance_scale=2)
    torch.nn.init.normal_(method.g.guidance.project.weight)
    artefact = method.artefact()
    assert artefact.kind == "generator"
    assert artefact.around is not None
    model = Component(name="mlp_denoiser", args={"widths": [24, 24], "schedule": "cosine", "precondition": "none"})
    component = artefact.around(model)
    assert component.name == "signal_generator"
    again = signal.signal_generator(num_classes=3, input_shape=(2,), **component.args)
    again.load_state_dict(copy.deepcopy(artefact.module.state_dict()))
    assert torch.equal(again.sample(10, seed=1), method.inference().sample(10, seed=1))
    torch.testing.assert_close(again.scale(torch.zeros(1, 2)), torch.full((1, 2), 0.5))


def test_what_is_refused() -> None:
    with pytest.raises(InputError, match="trains a denoiser's network"):
        Boot().bind(student=torch.nn.Linear(2, 2), teacher=network())
    with pytest.raises(InputError, match="no denoiser"):
        Boot().bind(student=network(), teacher=torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="are not the teacher's"):
        bound(network(7, schedule="flow"))
    with pytest.raises(InputError, match="are not the teacher's"):
        bound(network(7, schedule={"name": "cosine", "t_max": 0.99}))
    with pytest.raises(InputError, match="cannot start from the teacher's weights"):
        bound(exact())
    with pytest.raises(InputError, match="guidance needs conditions, and there are no classes"):
        bound(network(7, conditional=False), network(1, conditional=False), guidance_scale=2)
    with pytest.raises(InputError, match="guidance needs a teacher with classes"):
        bound(network(7, conditional=False), network(1, conditional=False), guidance_range=(1, 3), guidance_scale=1)
    with pytest.raises(InputError, match="guidance_range"):
        Boot(guidance_range=(2, 4))
    with pytest.raises(InputError, match="guidance_range"):
        Boot(guidance_range=(1, 1))
    with pytest.raises(InputError, match="detla"):
        Boot(detla=0.1)
