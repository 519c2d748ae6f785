"""Denoisers: schedules map to each other, preconditioning, losses and their weights, guidance, the exact mixture; wrong input."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from limbeck.diffusion.denoisers import Denoiser, Guided, MixtureDenoiser, NetworkDenoiser, denoising_errors, denoising_loss
from limbeck.diffusion.networks import MLPNetwork
from limbeck.diffusion.schedules import EDM, KINDS, SCHEDULES, Flow, NoiseSchedule, Trig, VPCosine, expand, make_schedule
from limbeck.errors import InputError

SEEDS = st.integers(0, 2**31)
NAMES = st.sampled_from(sorted(SCHEDULES))
MEANS = torch.tensor([[1.0, 0.0], [-0.5, 0.9], [-0.5, -0.9]], dtype=torch.float64)
STDS = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)


class Recorder(nn.Module):
    """F(x, time, cond) = tanh(x w) + class shift, remembering what it was given."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.shape, self.num_classes = (2,), num_classes
        self.weight = nn.Parameter(torch.randn(2, 2, generator=draw, dtype=torch.float64))
        self.rows = nn.Parameter(torch.randn(num_classes + 1, 2, generator=draw, dtype=torch.float64))
        self.seen: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def forward(self, x: Tensor, time: Tensor, cond: Tensor | None = None) -> Tensor:
        self.seen.append((x, time, cond))
        rows = self.rows[-1].expand(len(x), -1) if cond is None else self.rows[cond]
        return torch.tanh(x @ self.weight + time.double().unsqueeze(1)) + rows


def mixture(schedule: NoiseSchedule, conditional: bool = True) -> MixtureDenoiser:
    return MixtureDenoiser(schedule, MEANS, STDS, torch.tensor([1.0, 2.0, 1.0]), torch.tensor([0, 1, 1]) if conditional else None)


def drawn(schedule: NoiseSchedule, seed: int, count: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """x0, ε [B, 2] and t [B], float64, t well within the schedule."""
    draw = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, count, 2, generator=draw, dtype=torch.float64)
    u = 0.05 + 0.9 * torch.rand(count, generator=draw, dtype=torch.float64)
    return x0, noise, schedule.time_of_level(torch.exp(-3 + 5 * u)).clamp(schedule.t_min, schedule.t_max)


# Schedules map to each other


@given(NAMES, SEEDS)
def test_any_schedule_is_ve_at_x_over_alpha(name: str, seed: int) -> None:
    schedule, ve = make_schedule(name), EDM()
    x0, noise, t = drawn(schedule, seed)
    x_t, cond = schedule.add_noise(x0, noise, t), torch.tensor([0, 1, 2, 0, 1, 2])
    found = mixture(schedule)(x_t, t, cond)
    torch.testing.assert_close(found, mixture(ve)(x_t / expand(schedule.alpha(t), x_t), schedule.level(t), cond), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("precondition", ["edm", "consistency"])
def test_a_preconditioned_network_is_also_a_function_of_x_over_alpha_and_level(precondition: Any) -> None:
    network, ve = Recorder(), None
    for name in ("vp", "cosine", "flow", "trig"):
        schedule = make_schedule(name)
        ve = NetworkDenoiser(network, EDM(t_min=float(schedule.level(torch.tensor(schedule.t_min)))), precondition=precondition)
        x0, noise, t = drawn(schedule, 1)
        x_t = schedule.add_noise(x0, noise, t)
        found = NetworkDenoiser(network, schedule, precondition=precondition)(x_t, t)
        torch.testing.assert_close(found, ve(x_t / expand(schedule.alpha(t), x_t), schedule.level(t)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("schedule", [Flow(0.001, 1.0), VPCosine(0.001, 1.0), Trig(0.001, math.pi / 2)])
def test_where_nothing_of_the_signal_is_left_denoisers_are_finite(schedule: NoiseSchedule) -> None:
    t, x = torch.full((4,), schedule.t_max, dtype=torch.float64), torch.randn(4, 2, generator=torch.Generator().manual_seed(0)).double()
    prior = mixture(schedule)(x, t)
    expected = (torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64) @ MEANS).expand(4, 2)
    torch.testing.assert_close(prior, expected, atol=1e-9, rtol=0)
    for precondition in ("edm", "consistency"):
        made = NetworkDenoiser(Recorder(), schedule, precondition=precondition)  # type: ignore[arg-type]
        seen = made.inputs(x, t)
        torch.testing.assert_close(seen[0], x)  # c_in x_t/α → x_t/σ
        assert made(x, t).isfinite().all()
        assert made(x, t, out="velocity").isfinite().all()


# Preconditioning


@given(st.floats(0.01, 70.0), st.floats(0.2, 2.0))
def test_edm_coefficients_are_those_of_the_paper(sigma: float, data: float) -> None:
    t = torch.tensor([sigma], dtype=torch.float64)
    edm, shifted = (NetworkDenoiser(Recorder(), EDM(), precondition=p, sigma_data=data) for p in ("edm", "consistency"))  # type: ignore[arg-type]
    total = sigma**2 + data**2
    expected = (data**2 / total, sigma * data / math.sqrt(total), 1 / math.sqrt(total))
    assert [float(c) for c in edm.coefficients(t)] == pytest.approx(expected)
    off = sigma - 0.002
    expected = (data**2 / (off**2 + data**2), data * off / math.sqrt(total), 1 / math.sqrt(total))
    assert [float(c) for c in shifted.coefficients(t)] == pytest.approx(expected)
    x = torch.tensor([[0.3, -2.0]], dtype=torch.float64)
    found = edm(x, t)
    seen, time, _ = edm.network.seen[-1]  # type: ignore[union-attr,index]
    c_skip, c_out, c_in = (float(c) for c in edm.coefficients(t))
    torch.testing.assert_close(seen, c_in * x)
    assert float(time) == pytest.approx(math.log(sigma) / 4)
    torch.testing.assert_close(found, c_skip * x + c_out * edm.network(c_in * x, time))


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_consistency_preconditioning_gives_back_x_at_t_min(name: str) -> None:
    schedule = make_schedule(name)
    made = NetworkDenoiser(Recorder(), schedule, precondition="consistency")
    x, t = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).double(), torch.full((5,), schedule.t_min, dtype=torch.float64)
    c_skip, c_out, _ = made.coefficients(t)
    torch.testing.assert_close(c_skip, torch.ones(5).double())
    torch.testing.assert_close(c_out, torch.zeros(5).double(), atol=1e-15, rtol=0)
    torch.testing.assert_close(made(x, t), x / expand(schedule.alpha(t), x))


def test_inputs_and_outputs_have_unit_variance_with_edm() -> None:
    made, t = NetworkDenoiser(Recorder(), EDM(), precondition="edm", sigma_data=0.7), torch.tensor([0.01, 0.7, 30.0], dtype=torch.float64)
    c_skip, c_out, c_in = made.coefficients(t)
    torch.testing.assert_close(c_in**2 * (0.7**2 + t**2), torch.ones_like(t))
    # of the target (x0 − c_skip x)/c_out: variance ((1 − c_skip)² σ_d² + c_skip² σ²)/c_out²
    torch.testing.assert_close(((1 - c_skip) ** 2 * 0.7**2 + c_skip**2 * t**2) / c_out**2, torch.ones_like(t))


# Forms of the prediction


@given(NAMES, SEEDS)
def test_whatever_the_network_predicts_all_forms_belong_together(name: str, seed: int) -> None:
    schedule = make_schedule(name)
    x0, noise, t = drawn(schedule, seed)
    x_t = schedule.add_noise(x0, noise, t)
    kinds = [kind for kind in KINDS if kind != "v" or schedule.preserves_variance]
    for prediction in kinds:
        made = NetworkDenoiser(Recorder(), schedule, prediction=prediction)
        raw = made.network(x_t, schedule.network_time(t))
        torch.testing.assert_close(made(x_t, t, out=prediction), raw, rtol=0, atol=0)
        for out in kinds:
            torch.testing.assert_close(made(x_t, t, out=out), schedule.convert(x_t, raw, t, prediction, out))
    made = NetworkDenoiser(Recorder(), schedule, precondition="edm")
    for out in kinds:
        torch.testing.assert_close(made(x_t, t, out=out), schedule.convert(x_t, made.x0(x_t, t), t, "x0", out))


# The loss


@given(NAMES, SEEDS)
def test_output_weight_times_the_error_of_x0_is_the_error_of_the_raw_output(name: str, seed: int) -> None:
    schedule = make_schedule(name)
    x0, noise, t = drawn(schedule, seed)
    x_t = schedule.add_noise(x0, noise, t)
    for prediction in KINDS:
        if prediction == "v" and not schedule.preserves_variance:
            continue
        made = NetworkDenoiser(Recorder(), schedule, prediction=prediction)
        raw_error = (made.network(x_t, schedule.network_time(t)) - schedule.target(x0, noise, t, prediction)).square().mean(1)
        x0_error = (made(x_t, t) - x0).square().mean(1)
        torch.testing.assert_close(made.output_weight(t) * x0_error, raw_error, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(denoising_errors(made, x0, t, noise), raw_error, rtol=1e-6, atol=1e-9)
    for precondition in ("edm", "consistency"):
        made = NetworkDenoiser(Recorder(), schedule, precondition=precondition)  # type: ignore[arg-type]
        c_skip, c_out, _ = (expand(c, x0) for c in made.coefficients(t))
        target = (x0 - c_skip * x_t / expand(schedule.alpha(t), x0)) / c_out
        raw_error = (made.network(*made.inputs(x_t, t)) - target).square().mean(1)
        x0_error = (made(x_t, t) - x0).square().mean(1)
        torch.testing.assert_close(made.output_weight(t) * x0_error, raw_error, rtol=1e-6, atol=1e-9)
        level = schedule.level(t)
        torch.testing.assert_close(denoising_errors(made, x0, t, noise), (1 / level**2 + 4) * x0_error, rtol=1e-6, atol=1e-9)
        if precondition == "edm":
            torch.testing.assert_close(denoising_errors(made, x0, t, noise), raw_error, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(denoising_loss(made, x0, t, noise), denoising_errors(made, x0, t, noise).mean())


def test_the_loss_of_a_consistency_network_stays_of_order_one_at_t_min() -> None:
    made = NetworkDenoiser(Recorder(), EDM(), precondition="consistency")
    x0, noise, _ = drawn(EDM(), 0, 64)
    at_the_end = denoising_loss(made, x0, torch.full((64,), 0.002, dtype=torch.float64), noise)
    assert 0.5 < float(at_the_end) < 2  # (σ ε)²/σ²


@pytest.mark.parametrize("settings", [{"precondition": "edm"}, {"prediction": "eps"}, {"prediction": "velocity"}])
def test_gradients_of_the_loss_are_those_of_finite_differences_and_reach_x0_unless_detached(settings: dict[str, Any]) -> None:
    made = NetworkDenoiser(Recorder(), EDM(), **settings)
    x0, noise, _ = drawn(EDM(), 2)
    t, weight = torch.tensor([0.1, 0.5, 1.0, 2.0, 5.0, 9.0], dtype=torch.float64), made.network.weight
    x0.requires_grad_()
    (by_weight, by_x0) = torch.autograd.grad(denoising_loss(made, x0, t, noise), (weight, x0))  # type: ignore[arg-type]
    for parameter, found in ((weight, by_weight), (x0, by_x0)):
        with torch.no_grad():
            values = []
            for h in (1e-6, -2e-6):
                parameter[0, 1] += h  # type: ignore[index,operator]
                values.append(float(denoising_loss(made, x0, t, noise)))
            parameter[0, 1] += 1e-6  # type: ignore[index,operator]
        assert float(found[0, 1]) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)
    assert not denoising_loss(made.requires_grad_(False), x0.detach(), t, noise).requires_grad


def test_the_exact_denoiser_is_what_the_loss_is_least_for() -> None:
    schedule, draw = EDM(), torch.Generator().manual_seed(0)
    exact = mixture(schedule, conditional=False)
    x0, noise = exact.sample(20_000, draw).double(), torch.randn(20_000, 2, generator=draw, dtype=torch.float64)
    for level in (0.2, 1.0):
        t = torch.full((len(x0),), level, dtype=torch.float64)
        x_t = schedule.add_noise(x0, noise, t)
        found = exact(x_t, t)
        best = (found - x0).square().mean()
        for other in (1.03 * found, found + 0.03, 0.97 * found + 0.03 * x_t):
            assert (other - x0).square().mean() > best


# Features


def test_features_and_predictions_of_one_pass_are_those_of_two() -> None:
    made = NetworkDenoiser(MLPNetwork((2,), (8, 8), zero_output=False), EDM(), precondition="edm")
    x, t = torch.randn(3, 2), torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64)
    for out in ("x0", "eps"):
        found, features = made.forward_with(x, t, None, ["hidden1"], out=out)  # type: ignore[arg-type]
        torch.testing.assert_close(found, made(x, t, out=out))
        torch.testing.assert_close(features["hidden1"], made.features(x, t, None, ["hidden1"])["hidden1"])
    assert made.taps["hidden1"] == 8
    with pytest.raises(InputError) as caught:
        made.features(x, t, None, ["hiden1"])
    assert caught.value.where == "taps"
    with pytest.raises(InputError) as caught:
        _ = NetworkDenoiser(Recorder(), EDM()).taps
    assert caught.value.where == "student.model"


# Guidance


class Counted(Denoiser):
    """The mixture, counting calls and rows."""

    def __init__(self) -> None:
        super().__init__(EDM(), (2,), 2)
        self.inner, self.rows = mixture(EDM()), [0][:0]

    def x0(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        self.rows.append(len(x_t))
        return self.inner(x_t, t, cond)


def asked() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_t, t, conditions, null conditions."""
    x0, noise, t = drawn(EDM(), 5)
    return EDM().add_noise(x0, noise, t), t, torch.tensor([0, 1, 0, 1, 0, 1]), torch.full((6,), 2)


@given(st.floats(-2, 20), st.sampled_from(["x0", "eps", "velocity", "score"]))
def test_guidance_is_linear_in_the_scale_and_the_same_in_every_form(kappa: float, out: Any) -> None:
    x, t, cond, null = asked()
    inner = mixture(EDM())
    free, conditional = inner(x, t, null, out=out), inner(x, t, cond, out=out)
    guided = Guided(inner, kappa)
    torch.testing.assert_close(guided(x, t, cond, out=out), free + kappa * (conditional - free), rtol=1e-9, atol=1e-9)
    converted = EDM().convert(x, guided(x, t, cond), t, "x0", out)
    torch.testing.assert_close(guided(x, t, cond, out=out), converted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(guided.x0(x, t, cond), guided(x, t, cond))


def test_calls_of_guidance_one_pass_for_both_and_none_too_many() -> None:
    x, t, cond, null = asked()
    inner = Counted()
    for kappa, rows, expected in ((1.0, 6, cond), (1, 6, cond), (0.0, 6, null), (3.0, 12, None)):
        inner.rows.clear()
        found = Guided(inner, kappa)(x, t, cond)
        assert inner.rows == [rows]
        if expected is not None:
            torch.testing.assert_close(found, inner.inner(x, t, expected), rtol=0, atol=0)
    inner.rows.clear()
    torch.testing.assert_close(Guided(inner)(x, t), inner.inner(x, t, None), rtol=0, atol=0)  # κ = 1 needs no conditions
    assert inner.rows == [6]


def test_a_scale_a_sample_and_a_scale_a_call() -> None:
    x, t, cond, _ = asked()
    guided, kappa = Guided(mixture(EDM()), 7.0), torch.tensor([0.0, 1.0, 2.0, 3.0, -1.0, 0.5])
    each = guided(x, t, cond, scale=kappa)
    for i, value in enumerate(kappa.tolist()):
        torch.testing.assert_close(each[i], Guided(mixture(EDM()), value)(x, t, cond)[i], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(guided(x, t, cond, scale=2.0), Guided(mixture(EDM()), 2.0)(x, t, cond))
    torch.testing.assert_close(guided(x, t, cond, scale=torch.tensor(2.0)), guided(x, t, cond, scale=2.0))


def test_negative_conditions_stand_in_for_the_null_ones() -> None:
    x, t, cond, _ = asked()
    inner = mixture(EDM())
    guided = Guided(inner, 3.0)
    negative = 1 - cond
    expected = inner(x, t, negative) + 3 * (inner(x, t, cond) - inner(x, t, negative))
    torch.testing.assert_close(guided(x, t, cond, negative=negative), expected)
    one = inner(x, t, torch.ones_like(cond))
    for shape in ((), (1,)):
        torch.testing.assert_close(guided(x, t, cond, negative=torch.ones(shape, dtype=torch.long)), one + 3 * (inner(x, t, cond) - one))
        torch.testing.assert_close(guided(x, t, cond, negative=torch.ones(shape, dtype=torch.long), scale=0.0), one)


def test_guidance_that_cannot_be() -> None:
    x, t, cond, _ = asked()
    for call, where in (
        (lambda: Guided(mixture(EDM()), 2.0)(x, t), "guidance_scale"),
        (lambda: Guided(mixture(EDM(), conditional=False), 2.0)(x, t, cond), "guidance_scale"),
        (lambda: Guided(mixture(EDM()), math.nan), "guidance_scale"),
        (lambda: Guided(mixture(EDM()), 2.0)(x, t, cond, negative=torch.zeros(5, dtype=torch.long)), "negative"),
    ):
        with pytest.raises(InputError) as caught:
            call()
        assert caught.value.where == where


def test_null_conditions_are_the_label_after_the_last() -> None:
    null = Guided(mixture(EDM())).null(3, torch.device("cpu"))
    assert null is not None
    assert null.tolist() == [2, 2, 2]
    assert mixture(EDM(), conditional=False).null(3, torch.device("cpu")) is None


# The exact mixture


def test_the_score_of_a_mixture_is_the_gradient_of_its_log_density() -> None:
    for name in SCHEDULES:
        schedule = make_schedule(name)
        x0, noise, t = drawn(schedule, 3)
        x = schedule.add_noise(x0, noise, t).requires_grad_()
        alpha, sigma = schedule.alpha(t).view(-1, 1), schedule.sigma(t).view(-1, 1)
        variance = (alpha * STDS) ** 2 + sigma**2
        distance = (x.unsqueeze(1) - alpha.unsqueeze(-1) * MEANS).square().sum(-1)
        log_density = (torch.tensor([0.25, 0.5, 0.25]).double().log() - variance.log() - distance / (2 * variance)).logsumexp(1)
        (score,) = torch.autograd.grad(log_density.sum(), x)
        torch.testing.assert_close(mixture(schedule)(x.detach(), t, out="score"), score, rtol=1e-8, atol=1e-8)


def test_conditions_take_their_components_and_null_takes_all() -> None:
    x, t, cond, null = asked()
    made = mixture(EDM())
    alone = MixtureDenoiser(EDM(), MEANS[1:], STDS[1:], torch.tensor([2.0, 1.0]))
    torch.testing.assert_close(made(x, t, torch.ones_like(cond)), alone(x, t))
    torch.testing.assert_close(made(x, t, null), made(x, t))
    only_first = made.responsibilities(x, t, torch.zeros_like(cond))
    torch.testing.assert_close(only_first, torch.tensor([[1.0, 0.0, 0.0]]).double().expand(6, 3))


def test_samples_of_a_mixture_have_its_moments_and_classes() -> None:
    made, draw = mixture(EDM()), torch.Generator().manual_seed(0)
    x = made.sample(40_000, draw).double()
    weights = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    mean = weights @ MEANS
    second = (weights[:, None] * (STDS[:, None] ** 2 + MEANS**2)).sum(0)
    torch.testing.assert_close(x.mean(0), mean, atol=0.02, rtol=0)
    torch.testing.assert_close(x.var(0), second - mean**2, atol=0.02, rtol=0)
    first = made.sample(4000, draw, torch.zeros(4000, dtype=torch.long)).double()
    torch.testing.assert_close(first.mean(0), MEANS[0], atol=0.01, rtol=0)
    torch.testing.assert_close(first.std(0), STDS[:1].expand(2), atol=0.01, rtol=0)
    assert torch.equal(made.sample(5, torch.Generator().manual_seed(1)), made.sample(5, torch.Generator().manual_seed(1)))


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"means": torch.zeros(3)}, "means"),
        ({"stds": torch.ones(2)}, "means"),
        ({"stds": -torch.ones(3)}, "means"),
        ({"stds": torch.tensor([1.0, math.nan, 1.0])}, "means"),
        ({"weights": torch.ones(2)}, "weights"),
        ({"weights": torch.tensor([1.0, 0.0, 1.0])}, "weights"),
        ({"weights": torch.tensor([1.0, math.inf, 1.0])}, "weights"),
        ({"classes": torch.tensor([0, 1])}, "classes"),
        ({"classes": torch.tensor([0, 2, 2])}, "classes"),
        ({"classes": torch.tensor([-1, 0, 1])}, "classes"),
    ],
)
def test_mixtures_that_cannot_be(changes: dict[str, Tensor], where: str) -> None:
    with pytest.raises(InputError) as caught:
        MixtureDenoiser(EDM(), **({"means": MEANS, "stds": STDS} | changes))
    assert caught.value.where == where


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"prediction": "epz"}, "prediction"),
        ({"prediction": "v"}, "prediction"),
        ({"precondition": "edn"}, "precondition"),
        ({"precondition": "edm", "prediction": "eps"}, "prediction"),
        ({"sigma_data": 0.0}, "sigma_data"),
        ({"sigma_data": math.nan}, "sigma_data"),
    ],
)
def test_network_denoisers_that_cannot_be(settings: dict[str, Any], where: str) -> None:
    with pytest.raises(InputError) as caught:
        NetworkDenoiser(Recorder(), EDM(), **settings)
    assert caught.value.where == where


def test_a_network_that_does_not_say_its_shape_is_told() -> None:
    with pytest.raises(InputError) as caught:
        NetworkDenoiser(nn.Linear(2, 2), EDM())
    assert caught.value.where == "network"
    assert NetworkDenoiser(nn.Linear(2, 2), EDM(), shape=(2,), num_classes=0).shape == (2,)
