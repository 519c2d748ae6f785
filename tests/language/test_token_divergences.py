"""Divergences over a vocabulary: values from definitions in float64, exact gradients, bounds, limits, masked entries, refusals."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from limbeck.errors import InputError
from limbeck.language import divergences as dv
from limbeck.language.signals import DenseSignal, FeatureSignal, MixedSignal, TopKSignal
from limbeck.language.tokens import TokenRows
from limbeck.losses import jensen_shannon, kl_divergence, reverse_kl

SETTINGS = settings(deadline=None, max_examples=25)
SEEDS = st.integers(0, 2**31)
N, V = 6, 9

ALL = [
    dv.ForwardKL(),
    dv.ForwardKL(temperature=2.0),
    dv.ForwardKL(temperature=0.5, teacher_temperature=3.0),
    dv.ReverseKL(temperature=1.7, tau_sq=False),
    dv.GeneralisedJSD(),
    dv.GeneralisedJSD(beta=0.2, temperature=1.5),
    dv.GeneralisedJSD(beta=0.9, normalise_beta=True),
    dv.GeneralisedJSD(beta=0.0),
    dv.GeneralisedJSD(beta=1.0),
    dv.SkewForwardKL(),
    dv.SkewForwardKL(alpha=0.0),
    dv.SkewReverseKL(alpha=0.3, temperature=2.0),
    dv.SkewReverseKL(alpha=0.0),
    dv.TotalVariation(temperature=1.3),
    dv.LogitMSE(),
    dv.LogitMSE(centred=True),
    dv.CrossEntropy(),
    dv.CrossEntropy(temperature=1.4),
    dv.Mixed(((0.5, dv.CrossEntropy()), (0.5, dv.ForwardKL()))),
    dv.Mixed(((0.3, dv.ReverseKL(temperature=2.0)), (0.0, dv.LogitMSE()), (2.0, dv.Mixed(((0.5, dv.CrossEntropy()), (1.5, dv.SkewForwardKL())))))),
]
OF_PROBABILITIES = [d for d in ALL if isinstance(d, dv.Tempered)]
IDS = [f"{i}-{d.name}" for i, d in enumerate(ALL)]


def case(seed: int, scale: float = 2.0, n: int = N, vocabulary: int = V) -> tuple[torch.Tensor, torch.Tensor, TokenRows]:
    """(u, z with a graph, rows) in float64."""
    generator = torch.Generator().manual_seed(seed)
    u, z = torch.randn(2, n, vocabulary, generator=generator, dtype=torch.float64) * scale
    targets = torch.randint(0, vocabulary, (n,), generator=generator)
    return u, z.requires_grad_(), TokenRows(torch.arange(n), targets, torch.ones(n))


def pair(seed: int, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    u, z, _ = case(seed, scale)
    return torch.log_softmax(u, -1), torch.log_softmax(z.detach(), -1)


# ---- gradients -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", ALL, ids=IDS)
def test_the_exact_gradient_is_that_of_autograd_and_of_finite_differences(divergence: dv.Divergence) -> None:
    for seed in range(5):
        u, z, rows = case(seed)
        signal = DenseSignal(u)
        ell, grad = divergence.value_and_grad(z.detach(), signal, rows)
        value = divergence.value(z, signal, rows)
        torch.testing.assert_close(ell, value.detach(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(grad, torch.autograd.grad(value.sum(), z)[0], rtol=1e-9, atol=1e-12)
    assert gradcheck(lambda x: divergence.value(x, signal, rows), (z,))
    step = 1e-6 * torch.randn(z.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    up, _ = divergence.value_and_grad(z.detach() + step, signal, rows)
    down, _ = divergence.value_and_grad(z.detach() - step, signal, rows)
    torch.testing.assert_close((up - down) / 2, (grad * step).sum(-1), rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("divergence", [d for d in ALL if not (isinstance(d, dv.LogitMSE) and not d.centred)], ids=str)
def test_rows_of_the_gradient_sum_to_zero(divergence: dv.Divergence) -> None:
    u, z, rows = case(3, scale=5)
    _, grad = divergence.value_and_grad(z.detach(), DenseSignal(u), rows)
    torch.testing.assert_close(grad.sum(-1), torch.zeros(N, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("divergence", [d for d in ALL if d.uses_teacher and not isinstance(d, dv.Mixed)], ids=str)
def test_at_equal_distributions_value_and_gradient_are_zero(divergence: dv.Divergence) -> None:
    _, z, rows = case(4, scale=6)
    tau_p, tau_q = getattr(divergence, "tau_p", 1.0), getattr(divergence, "temperature", 1.0)
    shift = 0.0 if divergence == dv.LogitMSE() or divergence.name == "total_variation" else 7.0  # sgn(q − p) sees the last bit
    u = z.detach() * (tau_p / tau_q) + shift
    ell, grad = divergence.value_and_grad(z.detach(), DenseSignal(u), rows)
    assert ell.abs().max() < 1e-12
    assert grad.abs().max() < 1e-12
    assert torch.autograd.grad(divergence.value(z, DenseSignal(u), rows).sum(), z)[0].abs().max() < 1e-12


def test_the_table_of_the_sheet_by_hand() -> None:
    u, z, rows = case(5)
    z = z.detach()
    p, q = torch.softmax(u / 2, -1), torch.softmax(z / 2, -1)

    def found(divergence: dv.Divergence) -> torch.Tensor:
        return divergence.value_and_grad(z, DenseSignal(u), rows)[1]

    heat = {"temperature": 2.0, "tau_sq": False}
    torch.testing.assert_close(found(dv.ForwardKL(**heat)), (q - p) / 2)
    kl = (q * (q / p).log()).sum(-1, keepdim=True)
    torch.testing.assert_close(found(dv.ReverseKL(**heat)), q * ((q / p).log() - kl) / 2)
    m = 0.3 * p + 0.7 * q
    b = (q / m).log()
    torch.testing.assert_close(found(dv.GeneralisedJSD(beta=0.3, **heat)), 0.7 / 2 * q * (b - (q * b).sum(-1, keepdim=True)))
    torch.testing.assert_close(found(dv.SkewForwardKL(alpha=0.3, **heat)), -0.7 / 2 * q * (p / m - (q * p / m).sum(-1, keepdim=True)))
    m = 0.7 * p + 0.3 * q
    r = (q / m).log() - 0.3 * q / m
    torch.testing.assert_close(found(dv.SkewReverseKL(alpha=0.3, **heat)), q / 2 * (r - (q * r).sum(-1, keepdim=True)))
    sign = (q - p).sign()
    torch.testing.assert_close(found(dv.TotalVariation(**heat)), q / 4 * (sign - (q * sign).sum(-1, keepdim=True)))
    torch.testing.assert_close(found(dv.LogitMSE()), 2 * (z - u) / V)
    torch.testing.assert_close(found(dv.CrossEntropy(2.0)), (q - torch.nn.functional.one_hot(rows.targets_N, V)) / 2)


# ---- values --------------------------------------------------------------------------------------------------------------


@given(SEEDS, st.floats(0.05, 0.95))
@SETTINGS
def test_bounds_and_symmetries(seed: int, share: float) -> None:
    logp, logq = pair(seed, scale=6)
    jsd = dv.generalised_jsd(logp, logq, share)
    torch.testing.assert_close(jsd, dv.generalised_jsd(logq, logp, 1 - share))
    half = dv.generalised_jsd(logp, logq, 0.5)
    tvd, fkl = dv.total_variation(logp, logq), dv.forward_kl(logp, logq)
    assert ((half >= -1e-12) & (half <= math.log(2) + 1e-12)).all()
    assert ((tvd >= 0) & (tvd <= 1 + 1e-12)).all()
    torch.testing.assert_close(tvd, dv.total_variation(logq, logp))
    assert (tvd <= (fkl / 2).sqrt() + 1e-9).all()
    assert (dv.skew_forward_kl(logp, logq, share) <= math.log(1 / share) + 1e-12).all()
    assert (dv.skew_reverse_kl(logp, logq, share) <= math.log(1 / share) + 1e-12).all()
    torch.testing.assert_close(dv.skew_forward_kl(logp, logq, share), dv.skew_reverse_kl(logq, logp, share))
    for value in (jsd, fkl, dv.reverse_kl(logp, logq), dv.skew_forward_kl(logp, logq, share)):
        assert (value >= -1e-12).all()


@given(SEEDS, st.floats(0.5, 10))
@SETTINGS
def test_they_agree_with_the_divergences_of_classifiers(seed: int, temperature: float) -> None:
    u, z, rows = case(seed)
    heat = {"temperature": temperature, "tau_sq": False}
    for ours, theirs in ((dv.ForwardKL(**heat), kl_divergence), (dv.ReverseKL(**heat), reverse_kl), (dv.GeneralisedJSD(**heat), jensen_shannon)):
        expected = theirs(u, z, temperature, "none")
        torch.testing.assert_close(ours.value(z, DenseSignal(u), rows), expected)
        slope = torch.autograd.grad(expected.sum(), z)[0]
        torch.testing.assert_close(ours.value_and_grad(z.detach(), DenseSignal(u), rows)[1], slope, rtol=1e-8, atol=1e-12)


def test_beta_zero_and_one_are_forward_and_reverse_kl_and_the_loss_jumps_unless_it_is_normalised() -> None:
    logp, logq = pair(1)
    fkl, rkl = dv.forward_kl(logp, logq), dv.reverse_kl(logp, logq)
    torch.testing.assert_close(dv.generalised_jsd(logp, logq, 0.0), fkl)
    torch.testing.assert_close(dv.generalised_jsd(logp, logq, 1.0), rkl)
    assert (dv.generalised_jsd(logp, logq, 1e-6) < 1e-4 * fkl).all()
    assert (dv.generalised_jsd(logp, logq, 1 - 1e-6) < 1e-4 * rkl).all()
    torch.testing.assert_close(dv.generalised_jsd(logp, logq, 1e-6, normalise=True), fkl, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(dv.generalised_jsd(logp, logq, 1 - 1e-6, normalise=True), rkl, rtol=1e-3, atol=1e-6)


def test_distillms_lambda_is_one_minus_beta() -> None:
    logp, logq = pair(2)
    lam, p, q = 0.1, logp.exp(), logq.exp()
    m = ((1 - lam) * p + lam * q).log()
    expected = lam * (q * (logq - m)).sum(-1) + (1 - lam) * (p * (logp - m)).sum(-1)
    torch.testing.assert_close(dv.GeneralisedJSD.from_lambda(lam).between(logp, logq), expected)


def test_tau_squared_only_where_both_temperatures_are_the_same() -> None:
    u, z, rows = case(6)

    def value(**fields: float | bool) -> torch.Tensor:
        return dv.ForwardKL(**fields).value(z, DenseSignal(u), rows)

    torch.testing.assert_close(value(temperature=3.0), 9 * value(temperature=3.0, tau_sq=False))
    torch.testing.assert_close(value(temperature=3.0, teacher_temperature=3.0), value(temperature=3.0))
    torch.testing.assert_close(value(temperature=3.0, teacher_temperature=2.0), value(temperature=3.0, teacher_temperature=2.0, tau_sq=False))


def test_centred_mse_does_not_see_a_constant_a_row() -> None:
    u, z, rows = case(7)
    shifted = DenseSignal(u + 5 * torch.arange(N, dtype=torch.float64)[:, None])
    torch.testing.assert_close(dv.LogitMSE(centred=True).value(z, shifted, rows), dv.LogitMSE(centred=True).value(z, DenseSignal(u), rows))
    assert (dv.LogitMSE().value(z, shifted, rows)[1:] > dv.LogitMSE().value(z, DenseSignal(u), rows)[1:]).all()


def test_several_teachers_are_the_mean_of_their_probabilities() -> None:
    u, z, rows = case(8)
    v = u.flip(1)
    mean = (0.25 * torch.softmax(u, -1) + 0.75 * torch.softmax(v, -1)).log()
    mixed = MixedSignal((DenseSignal(u), DenseSignal(v)), (0.25, 0.75))
    for temperature in (1.0, 2.0):
        one = dv.ReverseKL(temperature=temperature)
        torch.testing.assert_close(one.value(z, mixed, rows), one.value(z, DenseSignal(mean), rows))
        torch.testing.assert_close(one.value_and_grad(z.detach(), mixed, rows)[1], one.value_and_grad(z.detach(), DenseSignal(mean), rows)[1])


# ---- masked entries, extremes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", [d for d in ALL if d.uses_teacher], ids=str)
def test_entries_masked_on_both_sides_might_as_well_not_be_there(divergence: dv.Divergence) -> None:
    u, z, rows = case(9)
    rows = TokenRows(rows.where_N, rows.targets_N % 6, rows.weight_N)
    u6, z6 = u[:, :6], z.detach()[:, :6]
    ell6, grad6 = divergence.value_and_grad(z6, DenseSignal(u6), rows)
    scale = torch.tensor([6 / V if part.name == "logit_mse" else 1.0 for _, part in divergence.parts], dtype=torch.float64)[0]  # its 1/V counts all
    masked_u = u.masked_fill(torch.arange(V) >= 6, -torch.inf)
    masked_z = z.detach().masked_fill(torch.arange(V) >= 6, -torch.inf).requires_grad_()
    ell, grad = divergence.value_and_grad(masked_z.detach(), DenseSignal(masked_u), rows)
    torch.testing.assert_close(ell, ell6 * scale)
    torch.testing.assert_close(grad[:, :6], grad6 * scale)
    assert (grad[:, 6:] == 0).all()
    value = divergence.value(masked_z, DenseSignal(masked_u), rows)
    torch.testing.assert_close(value.detach(), ell)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), masked_z)[0], grad)


def test_entries_masked_on_one_side_are_finite_where_the_mathematics_is() -> None:
    u, z, rows = case(10)
    off = torch.arange(V) >= 6
    teacher, student = DenseSignal(u.masked_fill(off, -torch.inf)), z.detach().masked_fill(off, -torch.inf)
    bounded = [dv.GeneralisedJSD(), dv.SkewForwardKL(), dv.SkewReverseKL(), dv.TotalVariation()]
    for divergence in [*bounded, dv.ForwardKL()]:
        ell, grad = divergence.value_and_grad(z.detach(), teacher, rows)  # p = 0 < q
        value = divergence.value(z, teacher, rows)
        assert ell.isfinite().all()
        torch.testing.assert_close(value.detach(), ell)
        torch.testing.assert_close(torch.autograd.grad(value.sum(), z)[0], grad)
    for divergence in [*bounded, dv.ReverseKL()]:
        ell, grad = divergence.value_and_grad(student, DenseSignal(u), rows)  # q = 0 < p
        assert ell.isfinite().all()
        assert grad.isfinite().all()
        assert (grad[:, 6:] == 0).all()
    assert (dv.ForwardKL().value_and_grad(student, DenseSignal(u), rows)[0] == torch.inf).all()
    assert (dv.ReverseKL().value_and_grad(z.detach(), teacher, rows)[0] == torch.inf).all()


@pytest.mark.parametrize("divergence", OF_PROBABILITIES, ids=str)
def test_certain_sides_stay_finite_in_float32(divergence: dv.Divergence) -> None:
    z = torch.tensor([[300.0, 0.0, -300.0], [0.0, 300.0, 0.0], [80.0, 80.0, -1e4]])
    u = torch.tensor([[0.0, 300.0, 0.0], [0.0, 300.0, 0.0], [1e4, -1e4, 0.0]])
    rows = TokenRows(torch.arange(3), torch.zeros(3, dtype=torch.int64), torch.ones(3))
    ell, grad = divergence.value_and_grad(z, DenseSignal(u), rows)
    assert ell.isfinite().all()
    assert grad.isfinite().all()
    z = z.requires_grad_()
    slope = torch.autograd.grad(divergence.value(z, DenseSignal(u), rows).sum(), z)[0]
    torch.testing.assert_close(slope, grad, rtol=1e-4, atol=1e-5)


def test_a_student_that_is_no_number_is_not_hidden() -> None:
    u, z, rows = case(11)
    broken = z.detach().clone()
    broken[2, 3] = torch.nan
    for divergence in ALL:
        if divergence.name != "mixed" and not isinstance(divergence, dv.LogitMSE):
            ell, grad = divergence.value_and_grad(broken, DenseSignal(u), rows)
            assert ell[2].isnan()
            assert grad[2].isnan().any()
            assert ell[[0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    u, z, rows = case(12)
    u, z = u.to(dtype), z.detach().to(dtype)
    for divergence in ALL:
        ell, grad = divergence.value_and_grad(z, DenseSignal(u), rows)
        expected, slope = divergence.value_and_grad(z.float(), DenseSignal(u.float()), rows)
        assert ell.dtype == grad.dtype == divergence.value(z, DenseSignal(u), rows).dtype == torch.float32
        torch.testing.assert_close((ell, grad), (expected, slope))


# ---- mixtures, names, refusals --------------------------------------------------------------------------------------------


def test_a_mixture_names_its_parts_and_shares_one_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = dv.Mixed(((0.5, dv.CrossEntropy()), (0.25, dv.ForwardKL()), (0.25, dv.ForwardKL(temperature=2.0)), (0.0, dv.TotalVariation())))
    assert mixed.names == ("cross_entropy", "forward_kl", "forward_kl_2")
    assert mixed.uses_teacher
    assert not dv.Mixed(((1.0, dv.CrossEntropy()),)).uses_teacher
    u, z, rows = case(13)
    student = dv.Student(z.detach())
    dv.slopes(mixed, student, DenseSignal(u), rows)
    assert set(student._sides) == {1.0, 2.0}
    p, q = torch.softmax(u, -1), torch.softmax(z.detach(), -1)  # the half and half of `capacity_gap`, eq. 7
    half = dv.Mixed(((0.5, dv.CrossEntropy()), (0.5, dv.ForwardKL())))
    expected = q - 0.5 * torch.nn.functional.one_hot(rows.targets_N, V) - 0.5 * p
    torch.testing.assert_close(half.value_and_grad(z.detach(), DenseSignal(u), rows)[1], expected)


def test_by_name() -> None:
    assert dv.divergence_from("jsd", beta=0.3, temperature=2.0) == dv.GeneralisedJSD(2.0, beta=0.3)
    assert dv.divergence_from("cross_entropy") == dv.CrossEntropy()
    assert all(dv.divergence_from(name).name == name for name in dv.DIVERGENCES)
    with pytest.raises(InputError, match="forward_kl"):
        dv.divergence_from("foward_kl")
    with pytest.raises(InputError, match="no 'beta'"):
        dv.divergence_from("forward_kl", beta=0.5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: dv.ForwardKL(temperature=0.0),
        lambda: dv.ForwardKL(teacher_temperature=-1.0),
        lambda: dv.ForwardKL(temperature=math.nan),
        lambda: dv.GeneralisedJSD(beta=1.1),
        lambda: dv.SkewForwardKL(alpha=1.0),
        lambda: dv.SkewReverseKL(alpha=-0.1),
        lambda: dv.CrossEntropy(temperature=0.0),
        lambda: dv.Mixed(()),
        lambda: dv.Mixed(((-1.0, dv.ForwardKL()),)),
        lambda: dv.Mixed(((0.0, dv.ForwardKL()),)),
    ],
)
def test_settings_out_of_range_are_refused(make) -> None:
    with pytest.raises(InputError):
        make()


def test_signals_that_do_not_fit_are_refused() -> None:
    u, z, rows = case(14)
    for signal, said in (
        (None, "no signal"),
        (DenseSignal(u[:, :5]), "vocabulary"),
        (DenseSignal(u[:3]), "positions"),
        (FeatureSignal({"hidden": u}), "FeatureSignal"),
    ):
        for call in (dv.ForwardKL().value, dv.ForwardKL().value_and_grad):
            with pytest.raises(InputError, match=said):
                call(z, signal, rows)
    with pytest.raises(InputError, match="no logits"):
        dv.LogitMSE().value(z, TopKSignal(torch.zeros(N, 1, dtype=torch.int64), torch.zeros(N, 1)), rows)
    assert dv.CrossEntropy().value(z, None, rows).shape == (N,)
