"""Bounds on mutual information: the special cases of MI-α, extremes of α, Gaussians with the optimal critic, invariances, the nets."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from limbeck import seeds
from limbeck.errors import InputError
from limbeck.language.mutual_information import Baseline, Critic, bound, infonce, jsd, leave_one_out, mi_alpha, nwj, redraw, tuba

SETTINGS = settings(deadline=None, max_examples=25)
SEEDS = st.integers(0, 2**31)
ALPHAS = (0.0, 0.1, 0.5, 0.9, 1.0)


def draw(seed: int, B: int = 6, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Scores [B, B] and a log-baseline [B], float64."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(B + 1, B, generator=generator, dtype=torch.float64) * scale
    return found[:B], found[B]


def by_definition(s: Tensor, a: Tensor, alpha: float) -> Tensor:
    """(10) as it is written, in plain space."""
    B = len(s)
    m = torch.empty_like(s)
    for i in range(B):
        for j in range(B):
            m[i, j] = sum(s[i, k].exp() for k in range(B) if k != j) / (B - 1)
    b = (alpha * m + (1 - alpha) * a.exp()[:, None]).log()
    pairs = [(i, j) for i in range(B) for j in range(B) if i != j]
    return 1 + sum(s[i, i] - b[i, j] - (s[i, j] - b[i, i]).exp() for i, j in pairs) / len(pairs)


@given(SEEDS, st.sampled_from(ALPHAS), st.integers(3, 6))
@SETTINGS
def test_the_bound_is_its_definition(seed: int, alpha: float, B: int) -> None:
    s, a = draw(seed, B, 2.0)
    torch.testing.assert_close(mi_alpha(s, a, alpha), by_definition(s, a, alpha))


@given(SEEDS)
@SETTINGS
def test_alpha_1_is_infonce_with_one_sample_fewer_and_its_marginal_term_is_1(seed: int) -> None:
    s, a = draw(seed)
    B = len(s)
    terms = [s[i, i] - (torch.cat((s[i, :j], s[i, j + 1 :])).logsumexp(0) - math.log(B - 1)) for i in range(B) for j in range(B) if i != j]
    torch.testing.assert_close(mi_alpha(s, a, 1.0), torch.stack(terms).mean())
    assert mi_alpha(50 * s, a, 1.0) <= math.log(B - 1) + 1e-12
    m = leave_one_out(s)
    held_out = ~torch.eye(B, dtype=torch.bool)
    torch.testing.assert_close((s - m.diagonal()[:, None]).exp()[held_out].mean(), torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(mi_alpha(s, a, 1.0), mi_alpha(s, None, 1.0))


@given(SEEDS)
@SETTINGS
def test_alpha_0_is_tuba_and_with_a_baseline_of_1_nwj(seed: int) -> None:
    s, a = draw(seed)
    held_out = ~torch.eye(len(s), dtype=torch.bool)
    expected = 1 + (s.diagonal() - a).mean() - (s - a[:, None]).exp()[held_out].mean()
    torch.testing.assert_close(mi_alpha(s, a, 0.0), expected)
    torch.testing.assert_close(tuba(s, a), expected)
    torch.testing.assert_close(nwj(s), s.diagonal().mean() - s.exp()[held_out].mean() / math.e)
    torch.testing.assert_close(nwj(s), mi_alpha(s, torch.ones_like(a), 0.0))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_constant_scores_at_their_baseline_give_nothing_and_no_gradient_to_their_size(alpha: float) -> None:
    s = torch.full((5, 5), 1.7, dtype=torch.float64, requires_grad=True)
    found = mi_alpha(s, torch.full((5,), 1.7, dtype=torch.float64), alpha)
    assert found.abs() < 1e-12
    (slope,) = torch.autograd.grad(found, s)
    assert slope.sum().abs() < 1e-12


@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_critic_that_cannot_tell_pairs_apart_gets_no_gradient(alpha: float) -> None:
    critic = Critic(3, 4, (8,), 5).double()
    x, y = (torch.ones(6, width, dtype=torch.float64) for width in (3, 4))
    scores = critic(x, y)
    slopes = torch.autograd.grad(mi_alpha(scores, scores[0].detach(), alpha), list(critic.parameters()))
    assert all(slope.abs().max() < 1e-12 for slope in slopes)


@given(SEEDS, st.sampled_from(ALPHAS))
@SETTINGS
def test_row_constants_move_nothing_at_alpha_1_and_nothing_anywhere_where_the_baseline_moves_too(seed: int, alpha: float) -> None:
    s, a = draw(seed)
    shift = torch.linspace(-2, 3, len(s), dtype=torch.float64)
    torch.testing.assert_close(mi_alpha(s + shift[:, None], a + shift, alpha), mi_alpha(s, a, alpha))
    moved = mi_alpha(s + shift[:, None], a, alpha)
    if alpha == 1:
        torch.testing.assert_close(moved, mi_alpha(s, a, alpha))
    else:
        assert (moved - mi_alpha(s, a, alpha)).abs() > 1e-9


@given(SEEDS, st.sampled_from(ALPHAS))
@SETTINGS
def test_the_order_of_the_batch_does_not_count(seed: int, alpha: float) -> None:
    s, a = draw(seed)
    order = torch.randperm(len(s), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(mi_alpha(s[order][:, order], a[order], alpha), mi_alpha(s, a, alpha))
    torch.testing.assert_close(infonce(s[order][:, order]), infonce(s))
    torch.testing.assert_close(jsd(s[order][:, order]), jsd(s))


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_finite_at_the_extremes(alpha: float, dtype: torch.dtype) -> None:
    s, a = (x.to(dtype).requires_grad_() for x in draw(0, 8, 30.0))
    huge = torch.zeros_like(s).fill_diagonal_(300.0).detach().requires_grad_()  # one entry a row is all there is
    small = a.detach().clamp(-10, 10).requires_grad_()
    for scores, baseline in ((s, (s.detach().amax(1) + 1).requires_grad_()), (huge, small)):
        found = mi_alpha(scores, baseline, alpha)
        assert found.isfinite()
        grads = torch.autograd.grad(found, (scores, baseline), allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in grads)
        assert (grads[1] is None) == (alpha == 1)


@given(SEEDS, st.floats(0.1, 200.0))
@SETTINGS
def test_the_leave_one_out_mean_is_exact_for_scores_of_any_size(seed: int, scale: float) -> None:
    s, _ = draw(seed, 5, scale)
    s[1] = s[1, 0]  # ties
    expected = torch.stack([torch.cat((s[:, :j], s[:, j + 1 :]), 1).logsumexp(1) - math.log(4) for j in range(5)], 1)
    torch.testing.assert_close(leave_one_out(s), expected, rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_finite_differences() -> None:
    s, a = (x.requires_grad_() for x in draw(3, 4, 1.5))
    for alpha in ALPHAS:
        assert gradcheck(lambda s, a, alpha=alpha: mi_alpha(s, a, alpha), (s, a))
    assert gradcheck(infonce, (s,))
    assert gradcheck(jsd, (s,))


def test_infonce_and_jsd_have_their_ceilings() -> None:
    s = 1e3 * torch.eye(7, dtype=torch.float64) - 5e2
    torch.testing.assert_close(infonce(s), torch.tensor(math.log(7), dtype=torch.float64))
    assert -1e-9 < jsd(s) <= 0
    torch.testing.assert_close(infonce(torch.zeros(7, 7, dtype=torch.float64)), torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(jsd(torch.zeros(7, 7, dtype=torch.float64)), torch.tensor(-2 * math.log(2), dtype=torch.float64))


# ---- Gaussians --------------------------------------------------------------------------------------------------------


RHO, D, B, REPEATS = 0.6, 2, 8, 3000
TRUE = -0.5 * D * math.log(1 - RHO**2)


def gaussian_scores(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """R batches of optimal scores s_ij = log p(y_j | x_i)/p(y_j), [R, B, B]; x and y, [R, B, D]: standard normal with correlation ρ in every coordinate."""
    generator = seeds.generator(seed, "gaussians")
    x, noise = torch.randn(2, REPEATS, B, D, generator=generator, dtype=torch.float64)
    y = RHO * x + math.sqrt(1 - RHO**2) * noise
    residual = y[:, None] - RHO * x[:, :, None]
    s = (-0.5 * residual.square() / (1 - RHO**2) + 0.5 * y[:, None].square() - 0.5 * math.log(1 - RHO**2)).sum(-1)
    return s, x, y


def mean_of(values: list[Tensor]) -> tuple[float, float]:
    """Mean and standard error over batches."""
    stacked = torch.stack(values)
    return float(stacked.mean()), float(stacked.std() / len(stacked) ** 0.5)


def test_the_optimal_critic_without_a_baseline_gives_the_mutual_information_of_gaussians() -> None:
    s, _, _ = gaussian_scores(0)
    mean, error = mean_of([mi_alpha(one, None, 0.0) for one in s])
    assert abs(mean - TRUE) < 4 * error
    assert error < 0.02


@pytest.mark.parametrize("rows", ["teacher", "student"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9, 1.0])
def test_both_readings_of_the_rows_are_valid_bounds(rows: str, alpha: float) -> None:
    """a = log Z is 0 for the optimal critic; a wrong baseline, a function of the teacher's y, may only loosen the bound."""
    s, _, y = gaussian_scores(1)
    for baseline_RB in (torch.zeros(REPEATS, B, dtype=torch.float64), 0.5 * y[..., 0], 0.4 * y.square().sum(-1) - 0.5):
        mean, error = mean_of([bound("mi", one, a, alpha, rows) for one, a in zip(s[:1500], baseline_RB, strict=False)])
        assert mean < TRUE + 4 * error
        if alpha in (0.0, 1.0) and baseline_RB[0, 0] == 0:
            assert mean > 0.5 * TRUE


def test_learned_nets_come_near_the_gaussians_information_from_below() -> None:
    """A critic and baseline trained on fresh batches; then measured on others."""
    generator = seeds.generator(0, "learned")
    critic, baseline = Critic(D, D, (32,), 8), Baseline(D, (32,))
    redraw([critic, baseline], generator)
    optimiser = torch.optim.Adam([*critic.parameters(), *baseline.parameters()], lr=5e-3)

    def batch() -> tuple[Tensor, Tensor]:
        x, noise = torch.randn(2, 64, D, generator=generator)
        return x, RHO * x + math.sqrt(1 - RHO**2) * noise

    for _ in range(400):
        x, y = batch()
        optimiser.zero_grad()
        (-bound("mi", critic(x, y), baseline(y), 0.5)).backward()
        optimiser.step()
    with torch.no_grad():
        found, error = mean_of([bound("mi", critic(x, y), baseline(y), 0.5) for x, y in (batch() for _ in range(200))])
    assert 0.6 * TRUE < found < TRUE + 4 * error


# ---- the nets and the door ---------------------------------------------------------------------------------------------


def test_names_and_rows_lead_to_the_functions() -> None:
    s, a = draw(5)
    torch.testing.assert_close(bound("mi", s, a, 0.3, "student"), mi_alpha(s, a, 0.3))
    torch.testing.assert_close(bound("mi", s, a, 0.3, "teacher"), mi_alpha(s.T, a, 0.3))
    torch.testing.assert_close(bound("tuba", s, a, 0.3), tuba(s.T, a))
    torch.testing.assert_close(bound("nwj", s), nwj(s))
    torch.testing.assert_close(bound("infonce", s, rows="student"), infonce(s))
    torch.testing.assert_close(bound("jsd", s, rows="student"), bound("jsd", s, rows="teacher"))


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: mi_alpha(torch.zeros(2, 2), None, 0.5), "at least 3"),
        (lambda: mi_alpha(torch.zeros(4, 3), None, 0.5), "square"),
        (lambda: mi_alpha(torch.zeros(4, 4), None, 1.5), "alpha"),
        (lambda: infonce(torch.zeros(1, 1)), "at least 2"),
        (lambda: bound("dv", torch.zeros(4, 4)), "no bound"),
    ],
)
def test_what_cannot_be_a_bound_is_refused(call, told: str) -> None:
    with pytest.raises(InputError, match=told):
        call()


def test_nets_have_the_papers_sizes_and_depend_on_their_generator_alone() -> None:
    critic, baseline = Critic(8, 12), Baseline(12)
    assert [tuple(p.shape) for p in critic.of_x.parameters()] == [(128, 8), (128,), (128, 128), (128,), (64, 128), (64,)]
    assert [tuple(p.shape) for p in baseline.parameters()] == [(128, 12), (128,), (128, 128), (128,), (1, 128), (1,)]
    x, y = torch.randn(5, 8), torch.randn(5, 12)
    torch.manual_seed(1)
    redraw([critic], seeds.generator(0, "nets"))
    first = critic(x, y)
    torch.manual_seed(2)
    redraw([critic], seeds.generator(0, "nets"))
    torch.testing.assert_close(critic(x, y), first, rtol=0, atol=0)
    assert first.shape == (5, 5)
    assert baseline(y).shape == (5,)
    torch.testing.assert_close(first[2, 3], critic.of_x(x)[2] @ critic.of_y(y)[3])
