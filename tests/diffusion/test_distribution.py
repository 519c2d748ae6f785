"""Score differences: closed forms, weights, broken samples, no gradient to anyone; injection; modules that are not trained for a while."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from limbeck.diffusion.denoisers import Denoiser, Guided, MixtureDenoiser, NetworkDenoiser
from limbeck.diffusion.distribution import direction_weight, guarded, inject, normal, random_labels, score_direction, untrained, without_broken
from limbeck.diffusion.networks import MLPNetwork
from limbeck.diffusion.schedules import EDM, SCHEDULES, NoiseSchedule, make_schedule
from limbeck.errors import InputError

SEEDS = st.integers(0, 2**31)


def gaussian(schedule: NoiseSchedule, mean: tuple[float, float], std: float = 0.5) -> MixtureDenoiser:
    return MixtureDenoiser(schedule, torch.tensor([mean], dtype=torch.float64), torch.tensor([std], dtype=torch.float64))


def drawn(schedule: NoiseSchedule, seed: int = 0, count: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """x, ε [B, 2] float64 and t [B]."""
    draw = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, count, 2, generator=draw, dtype=torch.float64)
    u = torch.rand(count, generator=draw, dtype=torch.float64)
    return x, noise, schedule.time_of_level(torch.exp(-2 + 4 * u)).clamp(schedule.t_min, schedule.t_max)


@given(SEEDS, st.sampled_from(["normalised", "unit", "eps"]))
def test_nothing_where_the_critic_is_the_teacher(seed: int, weight: Any) -> None:
    x, noise, t = drawn(EDM(), seed)
    found = score_direction(x, gaussian(EDM(), (1, 0)), gaussian(EDM(), (1, 0)), t, noise, weight=weight)
    assert torch.equal(found.g, torch.zeros_like(x))
    assert not found.broken.any()


@given(SEEDS, st.sampled_from(sorted(SCHEDULES)))
def test_gaussians_of_equal_width_give_the_closed_form(seed: int, name: str) -> None:
    schedule = make_schedule(name)
    x, noise, t = drawn(schedule, seed)
    teacher, critic = gaussian(schedule, (1, 0)), gaussian(schedule, (-0.5, 0.25))
    found = score_direction(x, teacher, critic, t, noise, weight="unit")
    level = schedule.level(t).unsqueeze(1)
    expected = level**2 * torch.tensor([[-1.5, 0.25]], dtype=torch.float64) / (0.25 + level**2)
    torch.testing.assert_close(found.g, expected, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(found.x_t, schedule.add_noise(x, noise, t))
    assert found.t is t
    # a step against g goes from the critic's mean to the teacher's
    assert (found.g @ torch.tensor([1.5, -0.25], dtype=torch.float64) < 0).all()
    # and it is σ²/α times the difference of the scores
    a, s = schedule.alpha(t).unsqueeze(1), schedule.sigma(t).unsqueeze(1)
    by_score = s**2 / a * (critic(found.x_t, t, out="score") - teacher(found.x_t, t, out="score"))
    torch.testing.assert_close(found.g, by_score, rtol=1e-6, atol=1e-7)


@given(SEEDS, st.sampled_from(sorted(SCHEDULES)))
def test_the_weight_eps_gives_teacher_minus_critic_in_noise(seed: int, name: str) -> None:
    schedule = make_schedule(name)
    x, noise, t = drawn(schedule, seed)
    teacher, critic = gaussian(schedule, (1, 0), 0.3), gaussian(schedule, (-0.5, 0.25), 0.8)
    found = score_direction(x, teacher, critic, t, noise, weight="eps")
    torch.testing.assert_close(found.g, teacher(found.x_t, t, out="eps") - critic(found.x_t, t, out="eps"), rtol=1e-6, atol=1e-7)


@given(SEEDS, st.floats(0.1, 50.0))
def test_normalised_directions_do_not_depend_on_the_unit_of_length(seed: int, unit: float) -> None:
    x, noise, t = drawn(EDM(), seed)
    plain = score_direction(x, gaussian(EDM(), (1, 0)), gaussian(EDM(), (-1, 0.5)), t, noise)
    wide = [gaussian(EDM(), mean, 0.5 * unit) for mean in ((unit, 0), (-unit, 0.5 * unit))]
    scaled = score_direction(unit * x, wide[0], wide[1], unit * t, noise)
    torch.testing.assert_close(scaled.g, plain.g, rtol=1e-3, atol=1e-4)  # but for the 1e-6
    real = gaussian(EDM(), (1, 0))(plain.x_t, t)
    weight = 1 / ((x - real).abs().mean(1, keepdim=True) + 1e-6)
    unweighted = score_direction(x, gaussian(EDM(), (1, 0)), gaussian(EDM(), (-1, 0.5)), t, noise, weight="unit")
    torch.testing.assert_close(plain.g, weight * unweighted.g)


def test_a_factor_multiplies_each_sample() -> None:
    x, noise, t = drawn(EDM())
    factor = torch.arange(5.0)
    pair = gaussian(EDM(), (1, 0)), gaussian(EDM(), (-1, 0))
    found = score_direction(x, *pair, t, noise, factor=factor)
    torch.testing.assert_close(found.g, factor.double().unsqueeze(1) * score_direction(x, *pair, t, noise).g)


def test_samples_with_no_numbers_are_left_out_and_marked() -> None:
    x, noise, t = drawn(EDM())
    pair = gaussian(EDM(), (1, 0)), gaussian(EDM(), (-1, 0))
    whole = score_direction(x, *pair, t, noise)
    bad = x.clone()
    bad[1, 0], bad[3, 1] = torch.nan, torch.inf
    found = score_direction(bad, *pair, t, noise)
    assert found.broken.tolist() == [False, True, False, True, False]
    assert torch.equal(found.g[[1, 3]], torch.zeros(2, 2).double())
    torch.testing.assert_close(found.g[[0, 2, 4]], whole.g[[0, 2, 4]])
    by_factor = score_direction(x, *pair, t, noise, factor=torch.tensor([1, torch.nan, 1, 1, 1]))
    assert by_factor.broken.tolist() == [False, True, False, False, False]
    images, broken = without_broken(torch.tensor([1.0, torch.nan]).view(2, 1, 1, 1).expand(2, 3, 4, 4))
    assert broken.tolist() == [False, True]
    assert torch.equal(images[0], torch.ones(3, 4, 4))
    assert torch.equal(images[1], torch.zeros(3, 4, 4))


def test_no_gradient_anywhere_and_a_guided_teacher() -> None:
    def made() -> NetworkDenoiser:
        return NetworkDenoiser(MLPNetwork((2,), (8,), num_classes=2, zero_output=False), EDM(), precondition="edm")

    teacher, critic, cond = made(), made(), torch.tensor([0, 1, 0, 1, 0])
    x, noise, t = drawn(EDM())
    x = x.float().requires_grad_()
    found = score_direction(x, Guided(teacher, 3.0), critic, t, noise.float(), cond, weight="unit")
    assert not any(tensor.requires_grad for tensor in (found.g, found.x_t, found.broken))
    loss = inject(x, found.g)
    loss.backward()
    assert all(p.grad is None for module in (teacher, critic) for p in module.parameters())
    assert x.grad is not None
    torch.testing.assert_close(found.g, critic(found.x_t, t, cond) - Guided(teacher, 3.0)(found.x_t, t, cond))


def test_following_the_direction_moves_a_distribution_onto_the_teachers() -> None:
    teacher, draw = gaussian(EDM(), (1.0, -0.5)), torch.Generator().manual_seed(0)
    mean = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    for _ in range(60):
        x = mean + 0.5 * torch.randn(64, 2, generator=draw, dtype=torch.float64)
        t, noise = torch.full((64,), 1.0, dtype=torch.float64), torch.randn(64, 2, generator=draw, dtype=torch.float64)
        critic = gaussian(EDM(), (float(mean[0]), float(mean[1])))
        mean = mean - 0.2 * score_direction(x, teacher, critic, t, noise, weight="unit").g.mean(0)
    torch.testing.assert_close(mean, torch.tensor([1.0, -0.5], dtype=torch.float64), atol=0.01, rtol=0)


def test_weights_by_hand_and_unknown_ones() -> None:
    x, teacher_x0, t = torch.zeros(2, 2), torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([0.5, 2.0], dtype=torch.float64)
    torch.testing.assert_close(direction_weight(x, teacher_x0, t, EDM(), "normalised"), torch.tensor([0.5, 1e6]))
    torch.testing.assert_close(direction_weight(x, teacher_x0, t, EDM(), "unit"), torch.ones(2))
    torch.testing.assert_close(direction_weight(x, teacher_x0, t, EDM(), "eps"), torch.tensor([2.0, 0.5]))
    with pytest.raises(InputError) as caught:
        direction_weight(x, teacher_x0, t, EDM(), "nromalised")  # type: ignore[arg-type]
    assert caught.value.where == "weight"


# Injection


@given(SEEDS)
def test_injected_gradients_and_values(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    x, g = torch.randn(2, 4, 3, 2, generator=draw, dtype=torch.float64)
    x.requires_grad_()
    g.requires_grad_()
    mean, summed = inject(x, g), inject(x, g, "sum")
    torch.testing.assert_close(mean, 0.5 * g.square().mean())
    torch.testing.assert_close(summed, (g * x).sum() / 4)
    torch.testing.assert_close(torch.autograd.grad(mean, x)[0], g / g.numel())
    torch.testing.assert_close(torch.autograd.grad(summed, x, retain_graph=True)[0], g / 4)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(summed, g)


def test_an_unknown_reduction() -> None:
    with pytest.raises(InputError) as caught:
        inject(torch.zeros(1, 1), torch.zeros(1, 1), "men")  # type: ignore[arg-type]
    assert caught.value.where == "reduction"


# Modules not trained


def test_untrained_modules_pass_gradient_but_take_none_and_come_back_as_they_were() -> None:
    first, second = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    second[1].bias.requires_grad_(False)
    flags = [p.requires_grad for p in (*first.parameters(), *second.parameters())]
    x = torch.randn(3, 2, requires_grad=True)
    with untrained(first, second, first):
        assert not any(p.requires_grad for p in (*first.parameters(), *second.parameters()))
        with untrained(first):
            pass
        assert not first.weight.requires_grad  # the inner block gives back what it took
        second(first(x)).sum().backward()
    assert flags == [p.requires_grad for p in (*first.parameters(), *second.parameters())]
    assert x.grad is not None
    assert all(p.grad is None for p in (*first.parameters(), *second.parameters()))


def test_untrained_comes_back_after_an_exception() -> None:
    module = nn.Linear(2, 2)
    with pytest.raises(ZeroDivisionError), untrained(module):
        raise ZeroDivisionError
    assert all(p.requires_grad for p in module.parameters())


# Draws


def test_labels_and_noise_come_from_the_generator() -> None:
    def draw() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    labels = random_labels(3000, 3, draw())
    assert labels is not None
    assert labels.dtype == torch.int64
    assert (torch.bincount(labels, minlength=3) - 1000).abs().max() < 110
    assert random_labels(5, 0, draw()) is None
    z = normal(4000, (2, 3), draw())
    assert z.shape == (4000, 2, 3)
    assert abs(float(z.std()) - 1) < 0.02
    assert torch.equal(z, normal(4000, (2, 3), draw()))
    assert isinstance(gaussian(EDM(), (0, 0)), Denoiser)


@pytest.mark.parametrize(
    ("name", "settings"), [("vp", {"prediction": "eps"}), ("flow", {"prediction": "velocity"}), ("edm", {"precondition": "edm"})]
)  # fmt: skip
def test_a_small_direction_arrives_in_mixed_precision(name: str, settings: dict[str, Any]) -> None:
    """x is of order 1: in bfloat16 x − g is x itself where g is 1e-3."""
    torch.manual_seed(0)
    schedule = make_schedule(name)
    found = NetworkDenoiser(MLPNetwork((2,), (8,), zero_output=False), schedule, **settings)
    x_t, _, t = drawn(schedule)
    with torch.autocast("cpu", torch.bfloat16):
        x = found(x_t.float(), t)
        g = torch.full_like(x, 1e-3)
        (gradient,) = torch.autograd.grad(inject(x, g), x)
        assert found.network(x_t.float(), t.float()).dtype == torch.bfloat16  # there was something to mend
        assert found(x_t.float(), t, out="eps").dtype == torch.float32
    assert x.dtype == torch.float32
    torch.testing.assert_close(gradient * x.numel(), g, rtol=1e-3, atol=0)


def test_samples_in_half_precision_get_their_direction_too() -> None:
    schedule = EDM()
    x = torch.full((4, 2), 1.5, dtype=torch.bfloat16, requires_grad=True)
    for reduction, numbers in (("mean", 8), ("sum", 4)):
        (gradient,) = torch.autograd.grad(inject(x, torch.full((4, 2), 1e-3), reduction), x)
        torch.testing.assert_close(gradient.float() * numbers, torch.full((4, 2), 1e-3), rtol=1e-2, atol=0)
    t = torch.full((4,), 0.5, dtype=torch.float64)
    found = score_direction(x, gaussian(schedule, (1.0, 0.0)), gaussian(schedule, (1.001, 0.0)), t, torch.randn(4, 2), weight="unit")
    torch.testing.assert_close(found.g[:, 0], torch.full((4,), 0.5e-3), rtol=1e-2, atol=0)  # σ² (μ − μ_T)/(s² + σ²)


def test_a_guard_stops_the_gradient_of_broken_samples_alone() -> None:
    x = torch.ones(3, 2, requires_grad=True)
    factor = torch.tensor([[1.0, 2.0], [float("nan"), 1.0], [3.0, float("inf")]])
    (gradient,) = torch.autograd.grad((guarded(x) * factor).sum(), x)
    assert gradient.tolist() == [[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]]
    assert guarded(x.detach()) is not None
    assert not guarded(x.detach()).requires_grad
