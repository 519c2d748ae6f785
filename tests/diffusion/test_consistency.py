"""The parts of consistency training: curricula, interval law, distances, two passes with one mask, the sampler, and the exact cases of the sheet `ict`."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from limbeck.diffusion.consistency import (
    ConsistencyGenerator,
    Intervals,
    consistency_pair,
    doubling_count,
    follow,
    huber_constant,
    inverse_gap,
    lognormal_probabilities,
    pseudo_huber,
    same_randomness,
    square_root_count,
    squared_l2,
    teacher_decay,
)
from limbeck.diffusion.denoisers import Denoiser, NetworkDenoiser
from limbeck.diffusion.networks import MLPNetwork
from limbeck.diffusion.samplers import at
from limbeck.diffusion.schedules import EDM, expand
from limbeck.errors import InputError

SETTINGS = settings(deadline=None, max_examples=30)
SEEDS = st.integers(0, 2**31)
EDM_SCHEDULE = EDM()


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def student(dropout: float = 0.0, classes: int = 0, seed: int = 0, precondition: str = "consistency") -> NetworkDenoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = MLPNetwork((2,), (16, 16), num_classes=classes, dropout=dropout, zero_output=False)
    return NetworkDenoiser(network, EDM(), precondition=precondition)


class Dirac(Denoiser):
    """f_θ(x, σ) = (σ_min/σ) x + (1 − σ_min/σ) θ, the family of the sheet's one-parameter case; exact for data δ(x − θ)."""

    def __init__(self, theta: Tensor) -> None:
        super().__init__(EDM(), theta.shape)
        self.theta = nn.Parameter(theta.clone())

    def x0(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        share = expand(self.schedule.t_min / t, x_t)
        return share * x_t + (1 - share) * self.theta


class Gaussian(Denoiser):
    """The exact consistency function of N(m, s² I)."""

    def __init__(self, m: float, s: float) -> None:
        super().__init__(EDM(), (3,))
        self.m, self.s = m, s

    def x0(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        ratio = ((self.s**2 + self.schedule.t_min**2) / (self.s**2 + t**2)).sqrt()
        return self.m + (x_t - self.m) * expand(ratio, x_t)


# ---- curricula --------------------------------------------------------------------------------------------------------------


def test_the_papers_curriculum_has_eight_stages_and_the_last_begins_at_seven_eighths() -> None:
    K = 4000
    counts = [doubling_count(k, K, 10, 1280) for k in range(K + 1)]
    assert sorted(set(counts)) == [10 * 2**j + 1 for j in range(8)]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (11, 1281)
    assert counts.index(1281) == 7 * K // 8


@given(st.integers(1, 40), st.integers(0, 9), st.integers(0, 39), st.integers(1, 300))
@SETTINGS
def test_any_curriculum_starts_at_s0_ends_at_s1_and_never_falls(s0: int, doublings: int, more: int, K: int) -> None:
    s1 = s0 * 2**doublings + min(more, s0 * 2**doublings - 1)
    for count in (doubling_count, square_root_count):
        counts = [count(k, K, s0, s1) for k in range(K + 1)]
        assert counts == sorted(counts)
        assert counts[-1] == s1 + 1 or (count is doubling_count and doublings >= K)  # fewer steps than stages end before s1
        assert all(2 <= c <= s1 + 1 for c in counts)
    assert doubling_count(0, K, s0, s1) == s0 + 1
    assert square_root_count(0, K, s0, s1) == max(s0, 2)
    assert all(doubling_count(k, K, s0, s1) in {s0 * 2**j + 1 for j in range(doublings + 1)} | {s1 + 1} for k in range(K + 1))


def test_the_old_curriculum_and_its_teacher_match_values_worked_by_hand() -> None:
    assert [square_root_count(k, 1000, 2, 150) for k in (0, 500, 1000)] == [2, 107, 151]  # √(0.5·(151² − 4) + 4) = 106.8
    assert teacher_decay(2, 2, 0.9) == pytest.approx(0.9)
    assert teacher_decay(151, 2, 0.9) == pytest.approx(0.9 ** (2 / 151))
    assert teacher_decay(11, 10, 0.0) == 0.0


@pytest.mark.parametrize("count", [doubling_count, square_root_count])
@pytest.mark.parametrize(("s0", "s1"), [(10, 5), (0, 5)])
def test_impossible_curricula_are_refused(count, s0, s1) -> None:
    with pytest.raises(InputError):
        count(0, 10, s0, s1)


# ---- intervals --------------------------------------------------------------------------------------------------------------


@given(st.integers(2, 1281), st.floats(-4, 4), st.floats(0.3, 4))
@SETTINGS
def test_probabilities_are_positive_and_sum_to_one(points: int, mean: float, std: float) -> None:
    p = lognormal_probabilities(EDM_SCHEDULE.grid(points), mean, std)
    assert p.dtype == torch.float64
    assert len(p) == points - 1
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    assert bool((p > 0).all())


def test_many_intervals_give_the_truncated_lognormal() -> None:
    """The law of ln σ, of an interval's lower end, against the normal distribution function cut to the grid's ends."""
    mean, std = -1.1, 2.0
    times = EDM_SCHEDULE.grid(20_001)
    found = lognormal_probabilities(times, mean, std).cumsum(0)
    normal = torch.distributions.Normal(torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64))
    low, high = (normal.cdf(torch.tensor(math.log(t), dtype=torch.float64)) for t in (0.002, 80.0))
    expected = (normal.cdf(times[1:].log()) - low) / (high - low)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    # and for a coarse grid, by the definition with erf
    times = EDM_SCHEDULE.grid(11)
    raw = torch.erf((times.log() - mean) / (math.sqrt(2) * std)).diff()
    torch.testing.assert_close(lognormal_probabilities(times, mean, std), raw / raw.sum())


def test_intervals_far_in_a_tail_keep_their_ratio_and_impossible_laws_are_refused() -> None:
    far = lognormal_probabilities(EDM_SCHEDULE.grid(41), -12.0, 1.0)  # everything lies 6 to 16 deviations above the mean
    assert bool((far > 0).all())
    with pytest.raises(InputError, match="puts nothing"):
        lognormal_probabilities(EDM_SCHEDULE.grid(11), -200.0, 1.0)
    with pytest.raises(InputError, match="no interval"):
        Intervals.of(EDM_SCHEDULE.grid(1))


@pytest.mark.parametrize("law", ["lognormal", "uniform"])
def test_intervals_are_drawn_as_often_as_they_should_be_and_are_neighbours(law) -> None:
    times = EDM_SCHEDULE.grid(8)
    p = lognormal_probabilities(times, -1.1, 2.0) if law == "lognormal" else torch.full((7,), 1 / 7, dtype=torch.float64)
    low, high = Intervals.of(times, p if law == "lognormal" else None).draw(200_000, torch.Generator().manual_seed(0))
    index = torch.searchsorted(times, low)
    assert torch.equal(times[index], low)
    assert torch.equal(times[index + 1], high)
    shares = torch.bincount(index, minlength=7) / 200_000
    assert float((shares - p).abs().max()) < 5 * math.sqrt(0.25 / 200_000)


# ---- distances --------------------------------------------------------------------------------------------------------------


@given(SEEDS)
@SETTINGS
def test_pseudo_huber_is_zero_at_equality_has_its_limits_and_a_gradient_below_one(seed: int) -> None:
    a, b = drawn(seed, 4, 3, 2).requires_grad_(), drawn(seed + 1, 4, 3, 2)
    norm = (a - b).flatten(1).norm(dim=1)
    (gradient,) = torch.autograd.grad(pseudo_huber(a, b, 0.3).sum(), a)
    assert bool((gradient.flatten(1).norm(dim=1) < 1).all())
    torch.testing.assert_close(gradient, (a - b) / (norm**2 + 0.09).sqrt().view(-1, 1, 1))
    torch.testing.assert_close(pseudo_huber(a, b, 0.3), (norm**2 + 0.09).sqrt() - 0.3)
    torch.testing.assert_close(pseudo_huber(a, b, 1e-9), norm, atol=1e-8, rtol=0)
    near = (a + 1e-5 * (b - a)).detach()
    torch.testing.assert_close(pseudo_huber(a, near, 0.3), squared_l2(a, near) / 0.6, rtol=1e-6, atol=0)
    same = a.detach().clone().requires_grad_()
    value = pseudo_huber(same, a.detach(), 0.3)
    assert not value.any()
    assert not torch.autograd.grad(value.sum(), same)[0].any()


def test_distances_pass_gradcheck_and_look_at_whole_samples() -> None:
    a, b = drawn(1, 3, 2, 2).requires_grad_(), drawn(2, 3, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: pseudo_huber(x, y, 0.1), (a, b))
    assert torch.autograd.gradcheck(squared_l2, (a, b))
    one = torch.zeros(1, 1, 64)
    assert float(pseudo_huber(one + 1, one, 1e-6)) == pytest.approx(8.0, abs=1e-4)  # √64, not 64 entries of 1
    assert float(squared_l2(one + 1, one)) == 64
    assert huber_constant((3, 32, 32)) == pytest.approx(0.03, abs=1e-4)
    assert huber_constant((3, 64, 64)) == pytest.approx(0.06, abs=2e-4)
    assert huber_constant((2,)) == pytest.approx(0.00076, abs=1e-5)
    assert pseudo_huber(one.half(), one.half() + 1, 0.1).dtype == torch.float32
    with pytest.raises(InputError):
        pseudo_huber(a, b, 0.0)


def test_small_differences_keep_their_digits_in_float32() -> None:
    a, b = torch.zeros(1, 64), torch.full((1, 64), 1e-7)
    assert float(pseudo_huber(a, b, 0.03)) == pytest.approx(64e-14 / 0.06, rel=1e-5)  # √(s + c²) − c would be 0


# ---- the boundary, the exact cases ------------------------------------------------------------------------------------------


@given(SEEDS)
@SETTINGS
def test_f_at_sigma_min_is_its_input_for_any_weights(seed: int) -> None:
    f = student(seed=seed % 1000).double()
    x = drawn(seed, 5, 2)
    assert torch.equal(f(x, at(0.002, x)), x)
    skip, out, _ = f.coefficients(at(0.002, x))
    assert bool((skip == 1).all())
    assert not out.any()


def loss(f: Denoiser, teacher: Denoiser, x0: Tensor, noise: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Squared L2 with λ = 1/Δσ, as in the sheet's derivation."""
    a, b = consistency_pair(f, teacher, x0, noise, low, high)
    return (squared_l2(a, b) * inverse_gap(f.schedule, low, high)).mean()


@given(SEEDS, st.integers(2, 200))
@SETTINGS
def test_dirac_data_give_the_closed_gradient_with_the_current_teacher(seed: int, points: int) -> None:
    xi, f = drawn(seed, 1)[0], Dirac(drawn(seed + 1, 1))
    times = EDM_SCHEDULE.grid(points)
    for i in {0, (points - 1) // 2, points - 2}:
        low, high = times[i : i + 1], times[i + 1 : i + 2]
        (found,) = torch.autograd.grad(loss(f, f, xi.view(1, 1), drawn(seed + 2, 1, 1), low, high), f.theta)
        minimum = EDM_SCHEDULE.t_min
        expected = 2 * (1 - minimum / high) * minimum * (f.theta - xi) / (low * high)
        torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=1e-12)


def test_a_lagging_teachers_gradient_grows_as_one_over_the_gap_and_does_not_know_the_data() -> None:
    f, behind = Dirac(torch.tensor([0.3], dtype=torch.float64)), Dirac(torch.tensor([0.25], dtype=torch.float64))
    own, lagging = [], []
    for gap in (0.02, 0.01, 0.005, 0.0025):
        low = torch.tensor([0.5], dtype=torch.float64)
        for teacher, found in ((f, own), (behind, lagging)):
            (g,) = torch.autograd.grad(loss(f, teacher, torch.full((1, 1), 0.7, dtype=torch.float64), drawn(0, 1, 1), low, low + gap), f.theta)
            found.append(float(g) * (gap if teacher is behind else 1.0))
    assert own[-1] == pytest.approx(own[0], rel=0.05)  # finite, and towards the data: θ < ξ, so θ must rise
    assert max(own) < 0
    assert lagging[-1] == pytest.approx(2 * (1 - 0.002 / 0.5) ** 2 * (0.3 - 0.25), rel=2e-3)  # g·Δσ tends to a constant
    assert min(lagging) > 0  # away from the data
    assert [abs(value - lagging[-1]) for value in lagging] == sorted((abs(value - lagging[-1]) for value in lagging), reverse=True)


def test_gaussian_data_leave_an_error_of_second_order_whose_first_order_term_has_mean_zero() -> None:
    m, s, sigma = 0.4, 0.5, 0.8
    f = Gaussian(m, s)
    x0, z = m + s * drawn(0, 4000, 3), drawn(1, 4000, 3)
    low = torch.full((4000,), sigma, dtype=torch.float64)
    ratios, tilde = [], math.sqrt(s**2 + 0.002**2)
    for gap in (0.02, 0.01, 0.005):
        a, b = consistency_pair(f, f, x0, z, low, low + gap)
        ratios.append(float(squared_l2(a, b).mean()) / gap**2)
    assert ratios[2] == pytest.approx(ratios[0], rel=0.05)  # loss/λ = O(Δσ²)
    assert ratios[2] > 0.01
    a, b = consistency_pair(f, f, x0, z, low, low + 1e-6)
    first = tilde * (s**2 * z - sigma * (x0 - m)) / (s**2 + sigma**2) ** 1.5
    torch.testing.assert_close((a - b) / 1e-6, first, rtol=1e-4, atol=1e-5)
    # jointly normal with x_σ, so a zero conditional mean is a zero covariance: s² σ − σ s² = 0
    x = x0 + sigma * z
    covariance = ((first - first.mean()) * (x - x.mean())).mean()
    assert abs(float(covariance)) < 5 * float(first.std() * x.std()) / math.sqrt(12_000)


# ---- two passes -------------------------------------------------------------------------------------------------------------


def test_no_gradient_reaches_the_target_branch() -> None:
    f, behind = student(seed=1), student(seed=2)
    x0, z, low, high = drawn(3, 6, 2).float(), drawn(4, 6, 2).float(), at(0.3, torch.empty(6)), at(0.4, torch.empty(6))
    a, b = consistency_pair(f, behind, x0, z, low, high)
    assert not b.requires_grad
    assert not behind.network.head.weight.requires_grad or b.grad_fn is None
    pseudo_huber(a, b, 0.1).mean().backward()
    assert all(p.grad is None for p in behind.parameters())
    through_pair = [p.grad.clone() for p in f.parameters()]
    f.zero_grad()
    a, b = consistency_pair(f, f, x0, z, low, high)  # with θ⁻ = θ the gradient is that of a fixed b
    fixed = f(x0 + 0.3 * z, low).detach()
    torch.testing.assert_close(b, fixed)
    expected = torch.autograd.grad(pseudo_huber(f(x0 + 0.4 * z, high), fixed, 0.1).mean(), list(f.parameters()))
    torch.testing.assert_close(torch.autograd.grad(pseudo_huber(a, b, 0.1).mean(), list(f.parameters())), expected)
    assert any(g.any() for g in through_pair)


def masks(f: NetworkDenoiser, call) -> list[Tensor]:
    """Which hidden units every dropout layer passed, pass by pass."""
    found = []
    hook = f.network.dropout.register_forward_hook(lambda _m, inputs, output: found.append((output != 0) | (inputs[0] == 0)))
    call()
    hook.remove()
    return found


@pytest.mark.parametrize("lagging", [False, True])
def test_both_passes_have_the_same_dropout_masks_and_every_step_new_ones(lagging) -> None:
    f = student(dropout=0.5).train()
    teacher = copy.deepcopy(f) if lagging else f
    x0, z, low, high = drawn(3, 8, 2).float(), drawn(4, 8, 2).float(), at(0.3, torch.empty(8)), at(0.4, torch.empty(8))
    torch.manual_seed(0)
    a, _ = consistency_pair(f, teacher, x0, z, low, high)
    state = torch.default_generator.get_state()
    torch.manual_seed(0)
    assert torch.equal(a, f(x0 + 0.4 * z, high))  # the noisier pass comes first
    assert torch.equal(torch.default_generator.get_state(), state)  # and the generator stands as after one pass
    both: list[Tensor] = masks(f, lambda: consistency_pair(f, f, x0, z, low, high))
    assert torch.equal(both[0], both[2])  # two layers a pass
    assert torch.equal(both[1], both[3])
    again = masks(f, lambda: consistency_pair(f, f, x0, z, low, high))
    assert not torch.equal(both[0], again[0])
    if lagging:
        mine, its = [], []
        hooks = [m.network.dropout.register_forward_hook(lambda _m, _i, o, kept=kept: kept.append(o != 0)) for m, kept in ((f, mine), (teacher, its))]
        consistency_pair(f, teacher, x0, z, high, high)  # the same weights at one level: all that could differ is the mask
        for hook in hooks:
            hook.remove()
        assert all(torch.equal(m, t) for m, t in zip(mine, its, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_masks_are_shared_on_cuda_too() -> None:
    f = student(dropout=0.5).train().cuda()
    x0, z = drawn(3, 8, 2).float().cuda(), drawn(4, 8, 2).float().cuda()
    both = masks(f, lambda: consistency_pair(f, f, x0, z, at(0.3, x0), at(0.4, x0)))
    assert torch.equal(both[0], both[2])
    again = masks(f, lambda: consistency_pair(f, f, x0, z, at(0.3, x0), at(0.4, x0)))
    assert not torch.equal(both[0], again[0])


def test_same_randomness_gives_both_the_same_numbers() -> None:
    one, two = same_randomness(lambda: torch.rand(5), lambda: torch.rand(5), torch.device("cpu"))
    assert torch.equal(one, two)
    assert not torch.equal(one, torch.rand(5))


def test_a_teacher_follows_with_its_decay() -> None:
    f, teacher = student(seed=1), student(seed=2)
    expected = [0.9 * t + 0.1 * p for t, p in zip(teacher.parameters(), f.parameters(), strict=True)]
    follow(teacher, f, 0.9)
    torch.testing.assert_close(list(teacher.parameters()), expected)
    follow(teacher, f, 0.0)
    torch.testing.assert_close(list(teacher.parameters()), list(f.parameters()))


# ---- the sampler ------------------------------------------------------------------------------------------------------------


def test_two_steps_with_tau_at_sigma_min_are_one_step() -> None:
    f, z = student(seed=3), drawn(0, 7, 2).float()
    one = ConsistencyGenerator(f, (80.0,))
    two = ConsistencyGenerator(f, (80.0, 0.002))
    assert torch.equal(one(z), two(z, None, torch.Generator().manual_seed(1)))
    assert (one.calls, two.calls) == (1, 2)


def test_the_second_call_is_given_what_the_paper_says() -> None:
    f, z, tau = student(seed=3), drawn(0, 7, 2).float(), 0.821
    first = f(80.0 * z, at(80.0, z))
    fresh = torch.randn(7, 2, generator=torch.Generator().manual_seed(5))
    expected = f(first + math.sqrt(tau**2 - 0.002**2) * fresh, at(tau, z))
    found = ConsistencyGenerator(f, (80.0, tau))
    torch.testing.assert_close(found(z, None, torch.Generator().manual_seed(5)), expected)
    torch.testing.assert_close(found.simulate(1, z, generator=torch.Generator().manual_seed(5)), first + math.sqrt(tau**2 - 0.002**2) * fresh)
    assert torch.equal(found.simulate(0, z), 80 * z)


def test_the_ladder_serves_fewer_and_more_steps() -> None:
    both = ConsistencyGenerator(student(), (80.0, 0.8))
    assert both.with_steps(1).times == (80.0,)
    assert both.with_steps(1).with_steps(2).times == (80.0, 0.8)
    assert both.with_steps(2) is both
    assert len(both.with_steps(4).times) == 4
    assert both.sample(5, steps=1).shape == (5, 2)
    assert torch.equal(both.sample(5, seed=1), both.sample(5, seed=1))
    with pytest.raises(InputError, match="descend"):
        ConsistencyGenerator(student(), (0.8, 80.0))
    with pytest.raises(InputError):
        ConsistencyGenerator(student(), (80.0, 0.8), steps=3)
