"""FIRST's loss and its gradients, the targets, fitting c, both sorts of answers (sheet `first`, invariants 3 to 6 and 8)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from limbeck.language.linear_divergence import linear_divergence
from torch import Tensor, nn

from limbeck import seeds
from limbeck.contract import IGNORE, Batch, Clock, Phase
from limbeck.data import ArrayData
from limbeck.errors import InputError
from limbeck.language.calibration import expected_calibration_error, softmax_of_prob
from limbeck.language.models import LanguageModel
from limbeck.language.signals import DenseSignal, Head, TopKSignal
from limbeck.language.sources import ModelSource
from limbeck.language.tokens import TokenBatch, TokenRows
from limbeck.losses import kl_divergence
from limbeck.methods.language.first import FIRST
from limbeck.methods.language.first_part import Against, Matching, kept, matching, recalibrated, top

LINEAR0 = Against("linear", epsilon=0.0)
WAYS = (Against(), LINEAR0, Against("softmax", c=0.4), Against("tail"))


def case(n: int = 6, V: int = 11, k: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Student logits [n, V] and a teacher's k kept entries: ids [n, k], probabilities [n, k], in float64."""
    rng = seeds.generator(seed, "case")
    z, u = torch.randn(2, n, V, generator=rng, dtype=torch.float64).unbind()
    probs, ids = (2 * u).softmax(-1).topk(k, -1)
    return z, ids, probs


def matching_with_gradient(z: Tensor, ids: Tensor, t: Tensor, against: Against) -> tuple[Tensor, Tensor]:
    """Value and gradient by hand, as the chunked loss takes them."""
    return Matching(against).value_and_grad(z, recalibrated(ids, t), rows_of(len(z)))


def rows_of(n: int) -> TokenRows:
    return TokenRows(torch.arange(n), torch.zeros(n, dtype=torch.int64), torch.ones(n))


def targets_for(against: Against, probs: Tensor) -> Tensor:
    return probs if against.comparison == "tail" else softmax_of_prob(probs, 0.4)


# ---- the loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("against", WAYS)
def test_gradient_is_that_of_finite_differences_and_sums_to_zero(against: Against) -> None:
    z, ids, probs = case()
    t = targets_for(against, probs)
    z.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda z: matching(z, ids, t, against), [z])
    ell = matching(z, ids, t, against)
    (by_graph,) = torch.autograd.grad(ell.sum(), z)
    value, by_hand = matching_with_gradient(z.detach(), ids, t, against)
    assert torch.allclose(value, ell)
    assert torch.allclose(by_hand, by_graph, atol=1e-12)
    assert by_graph.sum(-1).abs().max() < 1e-12
    assert bool((ell > 0).all())


def test_gradient_of_the_linear_normaliser_is_zero_outside_the_kept_entries() -> None:
    z, ids, probs = case()
    t = softmax_of_prob(probs, 0.3)
    _, gradient = matching_with_gradient(z, ids, t, LINEAR0)
    q = z.softmax(-1).gather(1, ids)
    expected = torch.zeros_like(z).scatter(1, ids, q / q.sum(-1, keepdim=True) - t)
    assert torch.allclose(gradient, expected)


def test_gradient_of_the_tail() -> None:
    z, ids, probs = case()
    _, gradient = matching_with_gradient(z, ids, probs, Against("tail"))
    q = z.softmax(-1)
    p_r, q_r = 1 - probs.sum(-1, keepdim=True), 1 - q.gather(1, ids).sum(-1, keepdim=True)
    expected = (q * (1 - p_r / q_r)).scatter(1, ids, q.gather(1, ids) - probs)
    assert torch.allclose(gradient, expected)


@pytest.mark.parametrize("against", [LINEAR0, Against("tail")])
def test_all_entries_uncalibrated_are_plain_distillation(against: Against) -> None:
    rng = seeds.generator(0, "full")
    u, z = torch.randn(2, 8, 7, generator=rng, dtype=torch.float64).unbind()
    probs, ids = u.softmax(-1).topk(7, -1)
    assert torch.allclose(matching(z, ids, probs, against).mean(), kl_divergence(u, z), atol=1e-6)


def test_one_entry_teaches_nothing_without_the_tail() -> None:
    z, ids, probs = case(k=1)
    for against in (Against(), LINEAR0):
        value, gradient = matching_with_gradient(z, ids, torch.ones_like(probs), against)
        assert value.abs().max() < 1e-12
        assert gradient.abs().max() < 1e-12
    assert matching_with_gradient(z, ids, probs, Against("tail"))[1].abs().max() > 0.01


@pytest.mark.parametrize("c", [0.05, 0.3, 1.0, 5.0])
def test_the_same_constant_on_both_sides_copies_the_uncalibrated_teacher(c: float) -> None:
    u = torch.randn(5, 9, generator=seeds.generator(0, "u"), dtype=torch.float64)
    probs, ids = u.softmax(-1).topk(4, -1)
    value, gradient = matching_with_gradient(u, ids, softmax_of_prob(probs, c), Against("softmax", c=c))
    assert value.abs().max() < 1e-9
    assert gradient.abs().max() < 1e-9


def test_a_student_with_constant_one_cannot_be_sure() -> None:
    """Against a softmax of probabilities with c = 1 sharp targets are never reached, which drives the student to certainty."""
    z = torch.tensor([[30.0, 0, 0, 0, 0]], dtype=torch.float64)
    t = torch.tensor([[0.8, 0.05, 0.05, 0.05, 0.05]], dtype=torch.float64)
    ids = torch.arange(5)[None]
    assert matching(z, ids, t, Against("softmax", c=1.0)).item() > 0.2
    milder = torch.log(torch.tensor([[0.8, 0.05, 0.05, 0.05, 0.05]], dtype=torch.float64))
    assert matching(milder, ids, t, Against("softmax", c=1.0)).item() > matching(z, ids, t, Against("softmax", c=1.0)).item()


@pytest.mark.parametrize("against", WAYS)
def test_extreme_logits_and_empty_targets_stay_finite(against: Against) -> None:
    z = torch.tensor([[60.0, -200.0, 0.0, 20.0], [-300.0, 80.0, 0.0, 0.0]])
    ids = torch.tensor([[0, 1], [2, 3]])
    t = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    value, gradient = matching_with_gradient(z, ids, t, against)
    assert torch.isfinite(value).all()
    assert torch.isfinite(gradient).all()
    assert torch.allclose(value, matching(z, ids, t, against))


def test_through_the_head_it_is_the_dense_loss_whatever_the_chunk() -> None:
    rng = seeds.generator(0, "head")
    hidden = torch.randn(10, 6, generator=rng, requires_grad=True)
    weight = torch.randn(13, 6, generator=rng, requires_grad=True)
    _, ids, probs = case(10, 13, 4)
    t = softmax_of_prob(probs.float(), 0.4)
    rows = TokenRows(torch.arange(10), torch.zeros(10, dtype=torch.int64), torch.rand(10, generator=rng))
    weights = rows.weight_N / rows.weight_N.sum()
    for against in WAYS:
        for chunk in (3, 10):
            loss = linear_divergence(hidden, Head(weight, None), recalibrated(ids, t), Matching(against), rows, chunk=chunk).loss
            dense = (matching(hidden @ weight.T, ids, t, against) * weights).sum()
            assert torch.allclose(loss, dense, atol=1e-6)
            found, wanted = torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(dense, (hidden, weight))
            for a, b in zip(found, wanted, strict=True):
                assert torch.allclose(a, b, atol=1e-6)


# ---- what the teacher keeps -----------------------------------------------------------------------------------------


def test_kept_entries_of_dense_and_recorded_signals() -> None:
    u = torch.randn(40, 30, generator=seeds.generator(0, "dense"))
    ids, logp = kept(DenseSignal(u), 5)
    wanted = u.log_softmax(-1).topk(5, -1)
    assert torch.equal(ids, wanted.indices)
    assert torch.allclose(logp, wanted.values, atol=1e-6)
    of_record, less = kept(TopKSignal(ids.flip(1), logp.flip(1)), 3)
    assert torch.equal(of_record, ids[:, :3])
    assert torch.equal(less, logp[:, :3])


def test_kept_entries_of_no_position() -> None:
    ids, logp = kept(DenseSignal(torch.zeros(0, 30)), 5)
    assert ids.shape == logp.shape == (0, 5)


def test_too_few_or_tempered_entries_are_refused() -> None:
    signal = TopKSignal(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3))
    with pytest.raises(InputError, match="keeps 3"):
        kept(signal, 5)
    with pytest.raises(InputError, match="temperature"):
        kept(replace(signal, temperature=2.0), 2)
    with pytest.raises(InputError, match="Lower k"):
        top(torch.zeros(2, 3), 4)


# ---- the method over classes ----------------------------------------------------------------------------------------


class Told:
    """A teacher whose logits are its inputs."""

    def logits(self, batch: Batch) -> Tensor:
        return batch.inputs

    def all_logits(self, batch: Batch) -> Tensor:
        return batch.inputs[None]


class Bench:
    device = torch.device("cpu")


def class_data(n: int = 300, C: int = 6) -> ArrayData:
    """Inputs that are an over-confident teacher's logits: right 70 % of the time."""
    rng = seeds.generator(0, "classes")
    targets = torch.randint(C, (n,), generator=rng)
    said = torch.where(torch.rand(n, generator=rng) < 0.7, targets, (targets + 1) % C)
    logits = torch.randn(n, C, generator=rng) + 6 * nn.functional.one_hot(said, C)
    return ArrayData(logits, targets)


def bound(data: ArrayData | None = None, **knobs: object) -> FIRST:
    method = FIRST(answers="classes", **knobs)
    student = nn.Linear(6, 6)
    nn.init.zeros_(student.weight)
    method.bind(student=student, teacher=Told(), train=data, validation=data, num_classes=6)
    return method


def test_classes_make_a_classifier_and_tokens_a_language_model() -> None:
    assert FIRST.produces == FIRST().produces == "language_model"
    assert FIRST(answers="classes").produces == "classifier"


def test_c_is_fitted_on_validation_data_and_kept_over_a_restart() -> None:
    data = class_data()
    method = bound(data)
    method.enter(Phase(), Clock(), Bench())
    facts = method.facts()
    probs = data.prepare(data.fetch(torch.arange(300))[0]).softmax(-1)
    best = probs.topk(5, -1)
    errors = [expected_calibration_error(softmax_of_prob(best.values, c).amax(-1), best.indices[:, 0] == data.targets).item() for c, _ in facts["grid"]]
    assert facts["ece_calibrated"] == pytest.approx(min(errors))
    assert facts["ece_calibrated"] < 0.05 < facts["ece_uncalibrated"]
    assert facts["coverage"] == pytest.approx(best.values.sum(-1).mean().item(), abs=1e-6)
    assert facts["positions"] == 300
    again = bound(data)
    again.load_state_dict(method.state_dict())
    assert again.facts() == facts


def test_the_loss_over_classes_is_the_mean_of_the_pure_one() -> None:
    data = class_data()
    for knobs, against in (
        ({}, Against()),
        ({"student": "softmax"}, Against("softmax", c=0.3)),
        ({"policy": "tail"}, Against("tail")),
    ):
        method = bound(data, c=0.3, **knobs)
        x, y = data.fetch(torch.arange(8))
        (update,) = method.updates(Batch(x, y), Clock())
        probs, ids = x.softmax(-1).topk(5, -1)
        t = softmax_of_prob(probs, 0.3) * (probs.sum(-1, keepdim=True) if against.comparison == "tail" else 1)
        wanted = matching(method.student(x), ids, t, against).mean()
        assert torch.allclose(update.loss, wanted)
        assert update.loss.requires_grad
        assert update.metrics["coverage"].item() == pytest.approx(probs.sum(-1).mean().item())


def test_smoothing_and_no_transform_need_no_validation() -> None:
    for transform in ("label_smoothing", "none"):
        method = FIRST(answers="classes", transform=transform).bind(student=nn.Linear(6, 6), teacher=Told(), num_classes=6)
        method.enter(Phase(), Clock(), Bench())
        assert method.targets(torch.tensor([[0.5, 0.3, 0.1, 0.0, 0.0]])).sum().item() == pytest.approx(1)
        assert method.facts()["metrics"] == {}


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(InputError, match="validation"):
        FIRST(answers="classes").bind(student=nn.Linear(6, 6), teacher=Told(), num_classes=6)
    with pytest.raises(InputError, match="no 7 entries"):
        bound(class_data(), k=7)
    with pytest.raises(InputError, match="softmax"):
        FIRST(student="softmax", policy="tail")
    unlabelled = ArrayData(torch.zeros(4, 6), torch.full((4,), IGNORE))
    with pytest.raises(InputError, match="labelled"):
        bound(unlabelled).enter(Phase(), Clock(), Bench())


# ---- the method over tokens -----------------------------------------------------------------------------------------


class Tiny(LanguageModel):
    """Embeds a token and answers from it alone."""

    def __init__(self, vocabulary: int = 12, width: int = 4, seed: int = 0) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        rng = seeds.generator(seed, "tiny")
        self.embedding = nn.Parameter(torch.randn(vocabulary, width, generator=rng))
        self.out = nn.Parameter(torch.randn(vocabulary, width, generator=rng))

    def hidden(self, tokens: TokenBatch) -> Tensor:
        return self.embedding[tokens.input_ids]

    def head(self) -> Head:
        return Head(self.out, None)


class Rows:
    """Token rows as data."""

    classes = ()
    targets = None

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def fetch(self, ids_B: Tensor, *, seed: int = 0, epoch: int = 0) -> tuple[Tensor, None]:
        return self.rows[ids_B], None

    def prepare(self, raw: Tensor) -> Tensor:
        return raw


def prompts(rows: int = 20, seed: int = 0) -> Tensor:
    """[rows, 4, 8]: two examples a row, whose first two targets are prompt."""
    rng = seeds.generator(seed, "prompts")
    text = torch.randint(12, (rows, 9), generator=rng)
    targets = text[:, 1:].clone()
    targets[:, [0, 1, 3, 4, 5]] = IGNORE
    segments = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]).expand(rows, 8)
    positions = torch.tensor([0, 1, 2, 3] * 2).expand(rows, 8)
    return torch.stack((text[:, :-1], targets, positions, segments), 1)


def language(**knobs: object) -> FIRST:
    data = Rows(prompts())
    return FIRST(**knobs).bind(student=Tiny(seed=1), teacher=ModelSource([Tiny(seed=2)]), train=data, validation=data)


def test_the_loss_over_tokens_is_the_mean_over_answers() -> None:
    method, inputs = language(c=0.3), prompts()
    (update,) = method.updates(Batch(inputs), Clock())
    tokens = TokenBatch.from_inputs(inputs)
    rows = tokens.rows()
    z = rows.gather(method.student(inputs))
    probs, ids = rows.gather(Tiny(seed=2)(inputs)).softmax(-1).topk(5, -1)
    values = matching(z, ids, softmax_of_prob(probs, 0.3))
    assert torch.allclose(update.loss, values.mean(), atol=1e-6)
    assert len(rows) == 20 * 3
    assert method.weigh(Batch(inputs), Clock()).item() == 60
    summed = language(c=0.3, reduction="sum_per_example")
    (update,) = summed.updates(Batch(inputs), Clock())
    assert torch.allclose(update.loss, values.sum() / 40, atol=1e-5)
    assert summed.weigh(Batch(inputs), Clock()).item() == 40


def test_c_over_tokens_is_fitted_at_answers() -> None:
    method = language()
    method.enter(Phase(), Clock(), Bench())
    assert method.facts()["positions"] == 40
    everywhere = language(fit_at="targets")
    everywhere.enter(Phase(), Clock(), Bench())
    assert everywhere.facts()["positions"] == 60


class Recorded:
    """A record of `Tiny(seed=2)` that keeps k entries of every position and travels with batches."""

    is_record = True

    def __init__(self, rows: Tensor, k: int = 7) -> None:
        best = Tiny(seed=2)(rows).detach().log_softmax(-1).topk(k, -1)
        self.held = {"tokens/ids": best.indices, "tokens/logp": best.values}

    def attach(self, data: object) -> Recorded:
        return self

    def lookup(self, ids_B: Tensor, views_B: Tensor) -> dict[str, Tensor]:
        return {name: held[ids_B] for name, held in self.held.items()}

    def get(self, tokens: TokenBatch) -> TopKSignal:
        rows = tokens.rows()
        return TopKSignal(rows.annotations["tokens/ids"], rows.annotations["tokens/logp"])


def test_a_record_teaches_what_the_teacher_would_have() -> None:
    """Reading the cache and applying c is applying c online, and one cache serves every c; so is the fit."""
    rows = prompts()
    record, data = Recorded(rows), Rows(rows)
    for c in (0.1, 0.7):
        live = language(c=c)
        recorded = FIRST(c=c).bind(student=Tiny(seed=1), teacher=record, train=data, validation=data)
        (a,), (b,) = live.updates(Batch(rows), Clock()), recorded.updates(Batch(rows, recorded=record.lookup(torch.arange(20), torch.zeros(20))), Clock())
        assert torch.allclose(a.loss, b.loss, atol=1e-6)
    fitted = FIRST().bind(student=Tiny(seed=1), teacher=record, train=data, validation=data)
    fitted.enter(Phase(), Clock(), Bench())
    live = language()
    live.enter(Phase(), Clock(), Bench())
    assert fitted.c == live.c
