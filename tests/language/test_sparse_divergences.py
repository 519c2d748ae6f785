"""k kept entries and a tail: policies against the dense divergences, exact gradients, the data processing inequality, draws, temperatures, absent entries."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from limbeck.errors import InputError
from limbeck.language import divergences as dv
from limbeck.language.signals import ABSENT, DenseSignal, TakenSignal, TopKSignal, draw, top_k
from limbeck.language.sparse import log_tail
from limbeck.language.tokens import TokenRows

SETTINGS = settings(deadline=None, max_examples=25)
SEEDS = st.integers(0, 2**31)
N, V, K = 5, 11, 3
EVERY = [
    dv.ForwardKL(),
    dv.ForwardKL(temperature=2.0),
    dv.ForwardKL(temperature=1.5, teacher_temperature=0.7),
    dv.ReverseKL(),
    dv.GeneralisedJSD(beta=0.3, temperature=1.2),
    dv.GeneralisedJSD(beta=0.0),
    dv.GeneralisedJSD(beta=1.0),
    dv.SkewForwardKL(),
    dv.SkewReverseKL(alpha=0.2),
    dv.TotalVariation(),
    dv.Mixed(((0.5, dv.CrossEntropy()), (0.5, dv.ForwardKL()))),
]


def case(seed: int, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor, TokenRows]:
    """(u, z with a graph, rows) in float64."""
    generator = torch.Generator().manual_seed(seed)
    u, z = torch.randn(2, N, V, generator=generator, dtype=torch.float64) * scale
    return u, z.requires_grad_(), TokenRows(torch.arange(N), torch.randint(0, V, (N,), generator=generator), torch.ones(N))


def unbounded(divergence: dv.Divergence) -> bool:
    return divergence.name == "reverse_kl" or (isinstance(divergence, dv.GeneralisedJSD) and divergence.beta == 1)


@pytest.mark.parametrize("policy", ["tail", "renorm_teacher", "renorm_both"])
@pytest.mark.parametrize("divergence", EVERY, ids=str)
def test_the_exact_gradient_is_that_of_autograd_under_every_policy(divergence: dv.Divergence, policy: str) -> None:
    u, z, rows = case(1)
    signal = replace(top_k(DenseSignal(u), K, targets_N=rows.targets_N), policy=policy)
    if policy == "renorm_teacher" and unbounded(divergence):
        for call in (divergence.value, divergence.value_and_grad):
            with pytest.raises(InputError, match="infinite"):
                call(z, signal, rows)
        return
    for given_signal in (signal, signal.with_target(rows.targets_N)):
        ell, grad = divergence.value_and_grad(z.detach(), given_signal, rows)
        value = divergence.value(z, given_signal, rows)
        torch.testing.assert_close(ell, value.detach(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(grad, torch.autograd.grad(value.sum(), z)[0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(grad.sum(-1), torch.zeros(N, dtype=torch.float64), rtol=0, atol=1e-12)
        assert gradcheck(lambda x, s=given_signal: divergence.value(x, s, rows), (z,))


def test_the_policies_by_hand() -> None:
    u, z, rows = case(2)
    p, q = torch.softmax(u, -1), torch.softmax(z.detach(), -1)
    signal = top_k(DenseSignal(u), K)
    kept = torch.zeros(N, V, dtype=torch.bool).scatter(1, signal.ids_Nk, value=True)
    p_S, q_S = (p * kept).sum(-1, keepdim=True), (q * kept).sum(-1, keepdim=True)

    def found(policy: str) -> tuple[torch.Tensor, torch.Tensor]:
        return dv.ForwardKL().value_and_grad(z.detach(), replace(signal, policy=policy), rows)

    ell, grad = found("tail")
    inside = torch.where(kept, p * (p / q).log(), 0).sum(-1, keepdim=True)
    torch.testing.assert_close(ell, (inside + (1 - p_S) * ((1 - p_S) / (1 - q_S)).log())[:, 0])
    torch.testing.assert_close(grad, torch.where(kept, q - p, q * (1 - (1 - p_S) / (1 - q_S))))
    ell, grad = found("renorm_teacher")
    torch.testing.assert_close(ell, torch.where(kept, p / p_S * (p / p_S / q).log(), 0).sum(-1))
    torch.testing.assert_close(grad, torch.where(kept, q - p / p_S, q))
    ell, grad = found("renorm_both")
    torch.testing.assert_close(ell, torch.where(kept, p / p_S * ((p / p_S) / (q / q_S)).log(), 0).sum(-1))
    torch.testing.assert_close(grad, torch.where(kept, q / q_S - p / p_S, 0))
    ell, _ = dv.ReverseKL().value_and_grad(z.detach(), signal, rows)
    torch.testing.assert_close(ell, (torch.where(kept, q * (q / p).log(), 0).sum(-1, keepdim=True) + (1 - q_S) * ((1 - q_S) / (1 - p_S)).log())[:, 0])


@pytest.mark.parametrize("divergence", EVERY, ids=str)
def test_all_entries_kept_are_the_dense_divergence(divergence: dv.Divergence) -> None:
    u, z, rows = case(3)
    everything = top_k(DenseSignal(u), V)
    expected = divergence.value_and_grad(z.detach(), DenseSignal(u), rows)
    for policy in ("tail", "renorm_teacher", "renorm_both"):
        if not (policy == "renorm_teacher" and unbounded(divergence)):
            torch.testing.assert_close(divergence.value_and_grad(z.detach(), replace(everything, policy=policy), rows), expected)


@given(SEEDS, st.integers(1, V - 1))
@SETTINGS
def test_fewer_outcomes_never_tell_more(seed: int, k: int) -> None:
    u, z, rows = case(seed)
    for divergence in (dv.ForwardKL(), dv.ReverseKL(), dv.GeneralisedJSD(), dv.SkewForwardKL(), dv.TotalVariation()):
        full = divergence.value(z, DenseSignal(u), rows)
        less, more = (divergence.value(z, top_k(DenseSignal(u), some), rows) for some in (k, k + 1))
        assert (less <= more + 1e-9).all()
        assert (more <= full + 1e-9).all()


def test_at_equal_distributions_nothing_is_left_and_one_kept_entry_alone_says_nothing() -> None:
    _, z, rows = case(4)
    for divergence in EVERY[:1] + EVERY[3:9]:
        signal = top_k(DenseSignal(z.detach()), K)
        for policy in ("tail", "renorm_both"):
            tau = getattr(divergence, "temperature", 1.0)
            at = top_k(DenseSignal(z.detach()), K, temperature=tau, policy=policy)
            ell, grad = divergence.value_and_grad(z.detach(), at, rows)
            assert ell.abs().max() < 1e-12
            assert grad.abs().max() < 1e-12
    single = replace(top_k(DenseSignal(torch.zeros_like(z)), 1), policy="renorm_both")
    ell, grad = dv.ForwardKL().value_and_grad(z.detach(), single, rows)
    assert (ell == 0).all()
    assert (grad == 0).all()
    assert (dv.ForwardKL().value_and_grad(z.detach(), replace(signal, policy="renorm_teacher"), rows)[0] > 0).all()  # over-confident on purpose


def test_a_small_tail_of_the_student_keeps_its_gradient() -> None:
    """Where 1 − Σ_S q is lost to rounding, the slope of the tail is still −p_r in all (the sheet's clamp would lose it)."""
    z = torch.tensor([[40.0, 39.0, 0.0, -1.0]])
    signal = TopKSignal(torch.tensor([[0, 1]]), torch.tensor([[0.6, 0.3]]).log())
    rows = TokenRows(torch.arange(1), torch.zeros(1, dtype=torch.int64), torch.ones(1))
    _, grad = dv.ForwardKL().value_and_grad(z, signal, rows)
    torch.testing.assert_close(grad[:, 2:].sum(), torch.tensor(-0.1))
    torch.testing.assert_close(grad[0, 2] / grad[0, 3], torch.tensor(1.0).exp())
    value = dv.ForwardKL().value(z.requires_grad_(), signal, rows)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), z)[0], grad)


@pytest.mark.parametrize("divergence", EVERY, ids=str)
def test_all_but_one_entry_and_the_target_keep_the_tail(divergence: dv.Divergence) -> None:
    """k = V − 1 and a column for the target: V columns, but where the target was kept already one entry is the tail. Both are the dense divergence."""
    u, z, rows = case(6)
    signal = top_k(DenseSignal(u), V - 1, targets_N=rows.targets_N)
    missing = torch.tensor([next(v for v in range(V) if v not in kept) for kept in signal.ids_Nk.tolist()])
    targets = torch.cat((missing[:2], rows.targets_N[2:]))
    targets = torch.where((targets == missing) & (torch.arange(N) >= 2), (missing + 1) % V, targets)
    rows = replace(rows, targets_N=targets)
    signal = replace(signal, target_logp_N=torch.log_softmax(u, -1)[range(N), targets])
    added = signal.with_target(targets)
    assert ((added.ids_Nk == ABSENT).sum(1) > 0).tolist() == [False, False, True, True, True]
    expected = divergence.value_and_grad(z.detach(), DenseSignal(u), rows)
    torch.testing.assert_close(divergence.value_and_grad(z.detach(), added, rows), expected, rtol=1e-6, atol=1e-7)
    value = divergence.value(z, added, rows)
    torch.testing.assert_close(value.detach(), expected[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), z)[0], expected[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("policy", ["tail", "renorm_teacher"])
@pytest.mark.parametrize("divergence", EVERY[:-1], ids=str)
def test_a_row_that_keeps_nothing_says_nothing(divergence: dv.Divergence, policy: str) -> None:
    u, z, rows = case(7)
    if policy == "renorm_teacher" and unbounded(divergence):
        return
    full = replace(top_k(DenseSignal(u), K), policy=policy)
    signal = replace(full, ids_Nk=full.ids_Nk.clone(), logp_Nk=full.logp_Nk.clone())
    signal.ids_Nk[1], signal.logp_Nk[1] = ABSENT, -torch.inf
    signal.ids_Nk[2, 0], signal.logp_Nk[2, 0] = ABSENT, -torch.inf  # the first alone is absent
    ell, grad = divergence.value_and_grad(z.detach(), signal, rows)
    value = divergence.value(z, signal, rows)
    torch.testing.assert_close(ell, value.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(grad, torch.autograd.grad(value.sum(), z)[0], rtol=1e-9, atol=1e-12)
    assert ell[1].abs() < 1e-6
    assert grad[1].abs().max() < 1e-6
    shorter = TopKSignal(full.ids_Nk[2:3, 1:], full.logp_Nk[2:3, 1:], policy=policy)
    torch.testing.assert_close(ell[2:3], divergence.value_and_grad(z.detach()[2:3], shorter, rows.cut(2, 3))[0])


def test_kept_masses_beyond_one_are_scaled() -> None:
    signal = TopKSignal(torch.tensor([[0, 1]]), torch.tensor([[0.7, 0.305]]).log())
    z = torch.tensor([[0.7, 0.305, 1e-3]]).log()
    rows = TokenRows(torch.arange(1), torch.zeros(1, dtype=torch.int64), torch.ones(1))
    ell, grad = dv.ForwardKL().value_and_grad(z, signal, rows)
    assert ell >= 0
    assert grad.isfinite().all()
    torch.testing.assert_close(grad.sum(), torch.tensor(0.0), rtol=0, atol=1e-6)
    assert log_tail(torch.tensor([[0.0]])).isfinite().all()


# ---- draws ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("proposal", [1.0, 0.5])
def test_draws_estimate_the_forward_kl_without_bias(proposal: float) -> None:
    u, z, rows = case(5, scale=1.0)
    teacher = DenseSignal(u)
    exact, slope = dv.ForwardKL().value_and_grad(z.detach(), teacher, rows)
    signal = draw(teacher, 40_000, torch.Generator().manual_seed(0), proposal=proposal)
    ell, grad = dv.ForwardKL().value_and_grad(z.detach(), signal, rows)
    torch.testing.assert_close(ell, exact, rtol=0, atol=0.04)
    torch.testing.assert_close(grad, slope, rtol=0, atol=0.02)
    few = draw(teacher, 7, torch.Generator().manual_seed(1), proposal=proposal)
    value = dv.ForwardKL().value(z, few, rows)
    ell, grad = dv.ForwardKL().value_and_grad(z.detach(), few, rows)
    torch.testing.assert_close(ell, value.detach())
    torch.testing.assert_close(grad, torch.autograd.grad(value.sum(), z)[0])
    torch.testing.assert_close(grad.sum(-1), torch.zeros(N, dtype=torch.float64), rtol=0, atol=1e-12)


def test_draws_serve_the_forward_kl_alone_at_their_own_temperature() -> None:
    u, z, rows = case(6)
    signal = draw(DenseSignal(u), 4, torch.Generator().manual_seed(0))
    for divergence in (dv.ReverseKL(), dv.GeneralisedJSD(), dv.TotalVariation()):
        for call in (divergence.value, divergence.value_and_grad):
            with pytest.raises(InputError, match="draws"):
                call(z, signal, rows)
    with pytest.raises(InputError, match="draws"):
        dv.ForwardKL(temperature=2.0).value(z, signal, rows)
    assert dv.ForwardKL(temperature=2.0, teacher_temperature=1.0).value(z, signal, rows).shape == (N,)


# ---- temperatures, absent entries, single numbers --------------------------------------------------------------------------


def test_another_temperature_is_exact_on_the_kept_entries_and_takes_the_tail_for_one() -> None:
    u, z, rows = case(7)
    cold = top_k(DenseSignal(u), K)
    heat = {"temperature": 2.0, "tau_sq": False}
    hot = top_k(DenseSignal(u), K, temperature=2.0)
    for policy in ("renorm_teacher", "renorm_both"):
        at = (dv.ForwardKL(**heat).value(z, replace(signal, policy=policy), rows) for signal in (cold, hot))
        torch.testing.assert_close(*at)
    p_S = cold.logp_Nk.exp()
    atoms = torch.cat((p_S, 1 - p_S.sum(-1, keepdim=True)), 1).sqrt()
    expected = (atoms / atoms.sum(-1, keepdim=True)).log()
    q = torch.softmax(z / 2, -1).gather(1, cold.ids_Nk)
    logq = torch.cat((q, 1 - q.sum(-1, keepdim=True)), 1).log()
    torch.testing.assert_close(dv.ForwardKL(**heat).value(z, cold, rows), dv.forward_kl(expected, logq))
    strict = replace(cold, strict=True)
    with pytest.raises(InputError, match="tail"):
        dv.ForwardKL(**heat).value(z, strict, rows)
    torch.testing.assert_close(
        dv.ForwardKL(**heat).value(z, replace(strict, policy="renorm_both"), rows), dv.ForwardKL(**heat).value(z, replace(hot, policy="renorm_both"), rows)
    )
    torch.testing.assert_close(dv.ForwardKL().value(z, strict, rows), dv.ForwardKL().value(z, cold, rows))
    full = top_k(DenseSignal(u), V)
    torch.testing.assert_close(dv.ForwardKL(**heat).value(z, replace(full, strict=True), rows), dv.ForwardKL(**heat).value(z, DenseSignal(u), rows))


@pytest.mark.parametrize("policy", ["tail", "renorm_teacher", "renorm_both"])
def test_absent_entries_are_no_entries(policy: str) -> None:
    u, z, rows = case(8)
    short = replace(top_k(DenseSignal(u), K), policy=policy)
    nothing = torch.full((N, 2), ABSENT)
    padded = replace(short, ids_Nk=torch.cat((short.ids_Nk, nothing), 1), logp_Nk=torch.cat((short.logp_Nk, torch.full((N, 2), -torch.inf)), 1))
    for divergence in (dv.ForwardKL(), dv.GeneralisedJSD(), dv.TotalVariation()):
        expected = divergence.value_and_grad(z.detach(), short, rows)
        torch.testing.assert_close(divergence.value_and_grad(z.detach(), padded, rows), expected)
        value = divergence.value(z, padded, rows)
        torch.testing.assert_close(torch.autograd.grad(value.sum(), z)[0], expected[1])


def test_a_target_that_is_added_is_one_more_kept_entry() -> None:
    u, z, rows = case(9)
    signal = top_k(DenseSignal(u), K, targets_N=rows.targets_N)
    found = dv.ReverseKL().value(z, signal.with_target(rows.targets_N), rows)
    for n in range(N):
        ids = sorted({*signal.ids_Nk[n].tolist(), int(rows.targets_N[n])})
        logp = torch.log_softmax(u, -1)[n, ids]
        alone = TopKSignal(torch.tensor([ids]), logp[None])
        torch.testing.assert_close(dv.ReverseKL().value(z[n : n + 1], alone, rows.cut(n, n + 1))[0], found[n])
    with pytest.raises(InputError, match="target"):
        top_k(DenseSignal(u), K).with_target(rows.targets_N)


def test_one_number_a_position_is_the_target_and_everything_else() -> None:
    u, z, rows = case(10)
    logp = torch.log_softmax(u, -1).gather(1, rows.targets_N[:, None])[:, 0]
    p, q = logp.exp(), torch.softmax(z, -1).gather(1, rows.targets_N[:, None])[:, 0]
    expected = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    torch.testing.assert_close(dv.ReverseKL().value(z, TakenSignal(logp), rows), expected)


def test_masked_entries_of_the_student() -> None:
    u, z, rows = case(11)
    off = torch.arange(V) >= 7
    teacher = u.masked_fill(off, -torch.inf)
    masked = z.detach().masked_fill(off, -torch.inf).requires_grad_()
    signal = top_k(DenseSignal(teacher), 4)
    for divergence in (dv.ForwardKL(), dv.ReverseKL(), dv.GeneralisedJSD()):
        ell, grad = divergence.value_and_grad(masked.detach(), signal, rows)
        expected = divergence.value_and_grad(z.detach()[:, :7], top_k(DenseSignal(u[:, :7]), 4), rows)
        torch.testing.assert_close((ell, grad[:, :7]), expected)
        assert (grad[:, 7:] == 0).all()
        value = divergence.value(masked, signal, rows)
        torch.testing.assert_close(torch.autograd.grad(value.sum(), masked)[0], grad)
    all_kept = top_k(DenseSignal(teacher), 7)  # the student has no tail at all, the teacher's is eaten by rounding
    _, grad = dv.ReverseKL().value_and_grad(masked.detach(), all_kept, rows)
    assert grad.isfinite().all()
