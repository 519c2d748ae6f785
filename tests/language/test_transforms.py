"""Transforms of what a teacher says: their formulas on dense and kept entries, what they preserve, laziness, and that chunks change nothing."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from limbeck.errors import InputError
from limbeck.language import calibration
from limbeck.language import divergences as dv
from limbeck.language import transforms as tf
from limbeck.language.linear_divergence import dense_divergence, linear_divergence
from limbeck.language.signals import ABSENT, DenseSignal, FeatureSignal, Head, HeadSignal, Recast, TopKSignal, draw, top_k
from limbeck.language.tokens import TokenRows

N, V, D, K = 9, 13, 4, 4


def case(seed: int = 0) -> tuple[HeadSignal, TokenRows]:
    generator = torch.Generator().manual_seed(seed)
    signal = HeadSignal(torch.randn(N, D, generator=generator, dtype=torch.float64), Head(torch.randn(V, D, generator=generator, dtype=torch.float64)))
    annotations = {"tau": 1 + 3 * torch.rand(N, generator=generator), "private": torch.arange(N) % 3 == 0, "number": torch.arange(N) + 100}
    return signal, TokenRows(torch.arange(N) * 2, torch.randint(0, V, (N,), generator=generator), torch.ones(N), annotations)


def probs(signal) -> Tensor:
    return signal.log_probs(0, N).exp() if not isinstance(signal, TopKSignal) else signal.logp_Nk.exp()


EVERY = [
    tf.Temperature(2.0),
    tf.Temperature("tau"),
    tf.Power(0.5),
    tf.SoftmaxOfProb(0.3),
    tf.LabelSmooth(0.1),
    tf.Noise("gaussian", 0.01, key=1),
    tf.Noise("laplace", 0.5, key=1, on="logits", where="private"),
    tf.CropVocabulary(V),
    tf.CropVocabulary(8),
    tf.LogitStandardise(2.0),
    tf.CorrectWithLabel("swap"),
    tf.CorrectWithLabel("mix", 0.3),
    tf.Chain((tf.CropVocabulary(10), tf.SoftmaxOfProb(0.3), tf.Temperature("tau"))),
]


@pytest.mark.parametrize("transform", EVERY, ids=str)
def test_dense_signals_stay_lazy_and_chunks_change_nothing(transform: tf.Transform) -> None:
    signal, rows = case()
    made = transform(signal, rows)
    assert isinstance(made, Recast | HeadSignal)
    whole = made.log_probs(0, N)
    assert whole.shape == (N, made.vocabulary)
    torch.testing.assert_close(torch.cat([made.log_probs(i, i + 2) for i in range(0, N - 1, 2)] + [made.log_probs(N - 1, N)]), whole)
    torch.testing.assert_close(made.cut(3, 6).log_probs(0, 3), whole[3:6])
    torch.testing.assert_close(made.cut(2, 8).cut(1, 4).log_probs(0, 3), whole[3:6])
    torch.testing.assert_close(transform(DenseSignal(signal.logits(0, N)), rows).log_probs(0, N), whole)
    head = Head(torch.randn(made.vocabulary, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_())
    hidden = torch.randn(N, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    bounded = replace(rows, targets_N=rows.targets_N % made.vocabulary)
    found = linear_divergence(hidden, head, made, dv.ForwardKL(), bounded, chunk=4)
    expected = dense_divergence(head.logits(hidden), DenseSignal(whole), dv.ForwardKL(), bounded)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(torch.autograd.grad(found.loss, head.weight_Vd), torch.autograd.grad(expected.loss, head.weight_Vd))


@pytest.mark.parametrize("transform", EVERY, ids=str)
def test_what_they_say_they_preserve_they_preserve(transform: tf.Transform) -> None:
    signal, rows = case(1)
    masked = DenseSignal(signal.logits(0, N).masked_fill(torch.arange(V) == 5, -torch.inf))
    rows = replace(rows, targets_N=rows.targets_N % 5)
    made = transform(masked, rows)
    before, after = probs(masked)[:, : made.vocabulary], probs(made)
    if transform.preserves.simplex:
        torch.testing.assert_close(after.sum(-1), torch.ones(N, dtype=torch.float64))
    if transform.preserves.order:
        assert torch.equal(before.argsort(-1), after.argsort(-1))
    if transform.preserves.sparsity:
        assert (after[:, 5] == 0).all()
    kept = [step for step in (transform.transforms if isinstance(transform, tf.Chain) else (transform,)) if isinstance(step, tf.SoftmaxOfProb | tf.LabelSmooth)]
    if kept:
        assert (after[:, 5] > 0).all()
        assert not transform.preserves.sparsity


def test_temperature_and_power_by_hand() -> None:
    signal, rows = case(2)
    u = signal.logits(0, N)
    torch.testing.assert_close(probs(tf.Temperature(3.0)(signal, rows)), torch.softmax(u / 3, -1))
    tau = rows.annotations["tau"].double()[:, None]
    torch.testing.assert_close(probs(tf.Temperature("tau")(signal, rows)), torch.softmax(u / tau, -1))
    torch.testing.assert_close(probs(tf.Power(0.5)(signal, rows)), torch.softmax(u * 2, -1))
    one = dv.ForwardKL(temperature=1.0, teacher_temperature=2.0)
    z = torch.zeros(N, V, dtype=torch.float64)
    torch.testing.assert_close(one.value(z, signal, rows), dv.ForwardKL().value(z, tf.Temperature(2.0)(signal, rows), rows))


@pytest.mark.parametrize("policy", ["renorm_teacher", "renorm_both", "tail"])
def test_temperature_of_kept_entries(policy: str) -> None:
    signal, rows = case(3)
    kept = replace(top_k(signal, K, targets_N=rows.targets_N), policy=policy)
    z = torch.randn(N, V, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hot = tf.Temperature(2.0)(kept, rows)
    assert hot.temperature == 1.0
    expected = dv.ForwardKL(temperature=1.0, teacher_temperature=2.0).value(z, kept, rows)
    torch.testing.assert_close(dv.ForwardKL().value(z, hot, rows), expected)
    place = kept.ids_Nk == rows.targets_N[:, None]
    torch.testing.assert_close(hot.target_logp_N[place.any(1)], hot.logp_Nk[place])
    if policy != "tail":
        exact = replace(top_k(signal, K, temperature=2.0), policy=policy)
        torch.testing.assert_close(dv.ForwardKL().value(z, hot, rows), dv.ForwardKL(teacher_temperature=2.0).value(z, exact, rows))
        back = tf.Temperature(1.0)(exact, rows)
        torch.testing.assert_close(torch.softmax(back.logp_Nk, -1), torch.softmax(kept.logp_Nk, -1))
    else:
        with pytest.raises(InputError, match="tail"):
            tf.Temperature(2.0)(replace(kept, strict=True), rows)


def test_firsts_transforms_on_kept_entries_and_their_mass() -> None:
    signal, rows = case(4)
    kept = replace(top_k(signal, K), policy="renorm_both")
    p, covered = kept.logp_Nk.exp(), kept.logp_Nk.exp().sum(-1, keepdim=True)
    for transform, expected in (
        (tf.SoftmaxOfProb(0.3), torch.softmax(p / 0.3, -1)),
        (tf.Power(0.5), p**2 / (p**2).sum(-1, keepdim=True)),
        (tf.LabelSmooth(0.1), calibration.label_smoothing(p, 0.1)),
    ):
        made = transform(kept, rows)
        torch.testing.assert_close(made.logp_Nk.exp(), expected)
        assert torch.equal(made.ids_Nk, kept.ids_Nk)
        with pytest.raises(InputError, match="no tail"):
            transform(replace(kept, policy="tail"), rows)
        with_tail = replace(transform, mass="kept")(replace(kept, policy="tail"), rows)
        torch.testing.assert_close(with_tail.logp_Nk.exp(), expected * covered)
    certain = TopKSignal(torch.arange(5)[None], torch.tensor([[1.0, 0, 0, 0, 0]]).log(), policy="renorm_both")
    found = tf.SoftmaxOfProb(1.0)(certain, rows.cut(0, 1)).logp_Nk.exp()
    torch.testing.assert_close(found, torch.tensor([[0.4046] + [0.1488] * 4]), rtol=0, atol=1e-4)
    padded = replace(kept, ids_Nk=torch.cat((kept.ids_Nk, torch.full((N, 1), ABSENT)), 1), logp_Nk=torch.cat((kept.logp_Nk, torch.full((N, 1), -torch.inf)), 1))
    torch.testing.assert_close(tf.SoftmaxOfProb(0.3)(padded, rows).logp_Nk[:, :K], tf.SoftmaxOfProb(0.3)(kept, rows).logp_Nk)
    assert (tf.SoftmaxOfProb(0.3)(padded, rows).logp_Nk[:, K] == -torch.inf).all()


def test_all_entries_kept_are_the_dense_transform() -> None:
    signal, rows = case(5)
    everything = replace(top_k(signal, V), policy="renorm_both")
    for transform in (tf.SoftmaxOfProb(0.2), tf.Power(2.0), tf.LabelSmooth(0.05), tf.Temperature(1.7), tf.CorrectWithLabel("swap")):
        found = torch.zeros(N, V, dtype=torch.float64).scatter(1, (made := transform(everything, rows)).ids_Nk, made.logp_Nk.exp())
        torch.testing.assert_close(found, probs(transform(signal, rows)))


# ---- noise ---------------------------------------------------------------------------------------------------------------


def test_noise_is_a_function_of_position_and_key() -> None:
    signal, rows = case(6)
    noise = tf.Noise("gaussian", 0.05, key=7, ids="number")
    made = probs(noise(signal, rows))
    torch.testing.assert_close(made, probs(noise(signal, rows)))
    assert not torch.allclose(made, probs(replace(noise, key=8)(signal, rows)))
    reverse = torch.arange(N - 1, -1, -1)
    turned = TokenRows(rows.where_N[reverse], rows.targets_N[reverse], rows.weight_N, {name: told[reverse] for name, told in rows.annotations.items()})
    torch.testing.assert_close(probs(noise(HeadSignal(signal.hidden_Nd[reverse], signal.head), turned)), made[reverse])
    somewhere = probs(replace(noise, where="private")(signal, rows))
    private = rows.annotations["private"]
    torch.testing.assert_close(somewhere[private], made[private])
    torch.testing.assert_close(somewhere[~private], probs(signal)[~private])
    torch.testing.assert_close(probs(tf.Noise("gaussian", 0.0, key=7)(signal, rows)), probs(signal))
    kept = replace(top_k(signal, K), policy="renorm_both")
    sparse = replace(noise, where="private")(kept, rows).logp_Nk.exp()
    torch.testing.assert_close(sparse.sum(-1), torch.ones(N, dtype=torch.float64))
    torch.testing.assert_close(sparse[~private], calibration.renormalised(kept.logp_Nk.exp())[~private])


@pytest.mark.parametrize(("kind", "sd"), [("gaussian", 1.0), ("laplace", 2**0.5)])
def test_noise_has_its_distribution(kind: str, sd: float) -> None:
    rows = TokenRows(torch.arange(200), torch.zeros(200, dtype=torch.int64), torch.ones(200))
    u = torch.zeros(200, 500, dtype=torch.float64)
    drawn = tf.Noise(kind, 1.0, key=3, on="logits")(DenseSignal(u), rows).logits(0, 200)
    assert drawn.isfinite().all()
    assert abs(drawn.mean()) < 0.02
    assert abs(drawn.std() / sd - 1) < 0.02
    tail = (drawn.abs() > 3).double().mean()
    assert abs(tail - (0.0027 if kind == "gaussian" else torch.tensor(-3.0).exp().item())) < 0.002
    noisy = tf.Noise(kind, 0.01, key=3)(DenseSignal(u), rows).log_probs(0, 200).exp()
    torch.testing.assert_close(noisy.sum(-1), torch.ones(200, dtype=torch.float64))


# ---- vocabularies, standardised logits, labels -----------------------------------------------------------------------------


def test_a_cropped_vocabulary_is_the_conditional_distribution() -> None:
    signal, rows = case(7)
    made = tf.CropVocabulary(8)(signal, rows)
    assert isinstance(made, HeadSignal)  # the product beyond is never made
    p = probs(signal)[:, :8]
    torch.testing.assert_close(probs(made), p / p.sum(-1, keepdim=True))
    kept = top_k(signal, V, targets_N=rows.targets_N % 8)
    cropped = tf.CropVocabulary(8)(kept, rows)
    assert (cropped.ids_Nk < 8).all()
    assert (cropped.ids_Nk[:, 0] >= 0).all()
    z = torch.randn(N, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    some = tf.CropVocabulary(8)(top_k(signal, 5), rows)
    torch.testing.assert_close(cropped.target_logp_N, made.log_probs(0, N)[range(N), rows.targets_N % 8])
    assert dv.ForwardKL().value(z, some, rows).isfinite().all()
    outside = tf.CropVocabulary(8)(DenseSignal(signal.logits(0, N)), rows)
    torch.testing.assert_close(probs(outside), probs(made))
    head = tf.crop_head(Head(torch.zeros(V, D), torch.zeros(V)), 8)
    assert (head.vocabulary, head.bias_V.shape) == (8, (8,))
    for call in (
        lambda: tf.crop_head(signal.head, V + 1),
        lambda: tf.CropVocabulary(V + 1)(DenseSignal(signal.logits(0, N)), rows),
        lambda: tf.CropVocabulary(0),
    ):
        with pytest.raises(InputError):
            call()


@pytest.mark.parametrize("policy", ["tail", "renorm_teacher", "renorm_both"])
def test_a_row_whose_entries_are_all_cropped_says_nothing(policy: str) -> None:
    signal, rows = case(7)
    u = signal.logits(0, N).clone()
    u[0, 8:] += 40  # row 0 keeps entries from 8 on, row 1 none of those
    u[1, :8] += 40
    rows = replace(rows, targets_N=rows.targets_N % 8)
    kept = replace(top_k(DenseSignal(u), 3, targets_N=rows.targets_N), policy=policy)
    made = tf.CropVocabulary(8)(kept, rows)
    z = torch.randn(N, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for divergence in (dv.ForwardKL(), dv.GeneralisedJSD(0.5)):
        value = divergence.value(z, made, rows)
        ell, grad = divergence.value_and_grad(z.detach(), made, rows)
        assert value.isfinite().all()
        torch.testing.assert_close(value.detach(), ell)
        torch.testing.assert_close(torch.autograd.grad(value.sum(), z)[0], grad)
        assert ell[0].abs() < 1e-6
        assert grad[0].abs().max() < 1e-6
        assert ell[1] > 1e-3
    if policy != "renorm_both":
        assert (made.ids_Nk[0] == ABSENT).all()
        assert (tf.CorrectWithLabel("swap")(made, rows).ids_Nk[0] == ABSENT).all()


def test_more_kept_entries_than_a_cropped_vocabulary_has() -> None:
    signal, rows = case(7)
    z = torch.randn(N, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    dense = tf.CropVocabulary(8)(signal, rows)
    for k in (V - 1, V):
        made = tf.CropVocabulary(8)(top_k(signal, k), rows)
        assert made.kept == 8
        assert (made.ids_Nk != ABSENT).all(1).any()
        for divergence in (dv.ForwardKL(), dv.ReverseKL()):
            found = divergence.value_and_grad(z, made, rows)
            assert all(part.isfinite().all() for part in found)
            if k == V:
                torch.testing.assert_close(found, divergence.value_and_grad(z, dense, rows), rtol=1e-4, atol=1e-5)


def test_standardised_logits_have_mean_zero_and_the_scale_asked_for() -> None:
    signal, rows = case(8)
    made = tf.LogitStandardise(2.0)(signal, rows).logits(0, N)
    torch.testing.assert_close(made.mean(-1), torch.zeros(N, dtype=torch.float64))
    torch.testing.assert_close(made.std(-1, correction=0), torch.full((N,), 2.0, dtype=torch.float64))
    shifted = DenseSignal(5 + 3 * signal.logits(0, N))
    torch.testing.assert_close(tf.LogitStandardise(2.0)(shifted, rows).logits(0, N), made)
    masked = DenseSignal(torch.cat((signal.logits(0, N), torch.full((N, 2), -torch.inf)), 1))
    torch.testing.assert_close(tf.LogitStandardise(2.0)(masked, rows).logits(0, N)[:, :V], made)


def test_a_wrong_teacher_is_corrected_and_a_right_one_left_alone() -> None:
    signal, rows = case(9)
    p = probs(signal)
    right = TokenRows(rows.where_N, p.argmax(-1), rows.weight_N)
    kept = top_k(signal, K, targets_N=rows.targets_N)
    for kind in ("swap", "mix"):
        torch.testing.assert_close(probs(tf.CorrectWithLabel(kind)(signal, right)), p)
    wrong = p.argmax(-1) != rows.targets_N
    assert wrong.any()
    swapped = probs(tf.CorrectWithLabel("swap")(signal, rows))
    assert (swapped.argmax(-1) == rows.targets_N).all()
    torch.testing.assert_close(swapped.sort(-1).values, p.sort(-1).values)
    y = rows.targets_N[:, None]
    mixed = probs(tf.CorrectWithLabel("mix", 0.3)(signal, rows))
    torch.testing.assert_close(mixed[wrong], (0.7 * p).scatter_add(1, y, torch.full_like(p[:, :1], 0.3))[wrong])
    z = torch.randn(N, V, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for transform, target in ((tf.CorrectWithLabel("swap"), swapped), (tf.CorrectWithLabel("mix", 0.3), mixed)):
        made = transform(kept, rows)  # the kept entries' probabilities are exact, and so is the tail
        here = made.ids_Nk != ABSENT
        torch.testing.assert_close(made.logp_Nk.exp()[here], target.gather(1, made.ids_Nk.clamp(min=0))[here])
        torch.testing.assert_close(made.target_logp_N.exp(), target.gather(1, y)[:, 0])
        assert dv.ForwardKL().value(z, made, rows).isfinite().all()
    with pytest.raises(InputError, match="target"):
        tf.CorrectWithLabel("mix")(top_k(signal, K), rows)


def test_mixtures_and_chains() -> None:
    signal, rows = case(10)
    other = DenseSignal(signal.logits(0, N).flip(1))
    mixed = tf.mix([signal, other], [0.25, 0.75])
    torch.testing.assert_close(probs(mixed), 0.25 * probs(signal) + 0.75 * probs(other))
    chain = tf.Chain((tf.Temperature(2.0), tf.SoftmaxOfProb(0.3)))
    torch.testing.assert_close(probs(chain(mixed, rows)), torch.softmax(torch.softmax(mixed.logits(0, N) / 2, -1) / 0.3, -1))
    assert chain.preserves == tf.Preserves(True, True, False)
    assert tf.Chain(()).preserves == tf.Preserves(True, True, True)
    assert tf.Chain(())(signal, rows) is signal


def test_what_cannot_be_changed_is_refused() -> None:
    signal, rows = case(11)
    kept, drawn = top_k(signal, K), draw(signal, K, torch.Generator())
    for call in (
        lambda: tf.Temperature(0.0),
        lambda: tf.Temperature("heat")(signal, rows).logits(0, 1),
        lambda: tf.SoftmaxOfProb(-1.0),
        lambda: tf.LabelSmooth(1.5),
        lambda: tf.Noise("gaussian", -1.0, key=0),
        lambda: tf.Noise("gaussian", 1.0, key=0, on="logits")(kept, rows),
        lambda: tf.LogitStandardise(0.0),
        lambda: tf.LogitStandardise()(kept, rows),
        lambda: tf.CorrectWithLabel("mix", 2.0),
        lambda: tf.Temperature(2.0)(drawn, rows),
        lambda: tf.SoftmaxOfProb(0.3)(drawn, rows),
        lambda: tf.CorrectWithLabel()(drawn, rows),
        lambda: tf.CropVocabulary(3)(drawn, rows),
        lambda: tf.SoftmaxOfProb(0.3)(replace(kept, temperature=2.0, policy="renorm_both"), rows),
        lambda: tf.Temperature(2.0)(FeatureSignal({"hidden": torch.zeros(N, 2)}), rows),
        lambda: tf.Temperature(2.0)(signal, rows.cut(0, 3)),
    ):
        with pytest.raises(InputError):
            call()
