"""Robust Active Distillation: what is asked, of whom, how often; the loss; the rounds on the real engine; wrong input."""

import copy
import math
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.contract import IGNORE, Batch, Clock
from limbeck.data import ArrayData
from limbeck.data.augment import AugmentSpec
from limbeck.errors import InputError
from limbeck.losses.sampling_game import robust_batch
from limbeck.methods.classifiers.robust_active import RobustActive, active_loss
from limbeck.methods.classifiers.robust_active_part import batch_sampling, gains_of
from limbeck.train import TrainConfig, Trainer

C, N, LABELLED, PER_ROUND = 3, 60, 12, 5
TRUTH_CALLS: list[int] = []


def hidden_truth(train: ArrayData) -> Tensor:
    """The labels that `samples` hides."""
    TRUTH_CALLS.append(len(train))
    return train.inputs[:, :C].argmax(1)


TRUTH = f"{__name__}:hidden_truth"


def samples(count: int = N, labelled: int | None = LABELLED, seed: int = 3) -> ArrayData:
    """Features whose first three numbers give the class; only `labelled` of them keep their label (None: all), scattered."""
    inputs = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    targets = inputs[:, :C].argmax(1)
    if labelled is not None:
        hidden = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[labelled:]
        targets[hidden] = IGNORE
    return ArrayData(inputs, targets, ["a", "b", "c"])


class Counting:
    """A teacher that notes every sample it is shown: right on all, or the next class on a share of them."""

    def __init__(self, wrong_every: int = 0) -> None:
        self.wrong_every = wrong_every
        self.ids: list[int] = []
        self.inputs: list[Tensor] = []

    def logits(self, batch: Batch) -> Tensor:
        if batch.ids is not None:
            self.ids += batch.ids.tolist()
        self.inputs += list(batch.inputs)
        logits_BC = 4 * batch.inputs[:, :C]
        if self.wrong_every:
            wrong_B = (batch.inputs[:, 0] * 1000).long() % self.wrong_every == 0
            logits_BC = torch.where(wrong_B[:, None], logits_BC.roll(1, 1), logits_BC)
        return logits_BC

    def all_logits(self, batch: Batch) -> Tensor:
        return self.logits(batch)[None]


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, C))


def bound(teacher=None, *, train=None, validation=None, seed: int = 0, fresh=network, **knobs) -> RobustActive:
    knobs = {"rounds": 3, "budget": PER_ROUND, "teacher_accuracy": 0.8} | knobs
    return RobustActive(**knobs).bind(
        student=network(), teacher=teacher or Counting(), fresh_student=fresh, train=train or samples(), validation=validation, num_classes=C, seed=seed
    )


def trained(method: RobustActive, folder: Path | None = None, **train) -> Trainer:
    config = TrainConfig(**({"epochs": 4, "batch_size": 8, "optimiser": {"name": "adam", "lr": 0.01}} | train))
    trainer = Trainer(method, method.train_data, config, seed=method.seed, folder=folder, num_classes=C, cpu=True)
    trainer.fit()
    return trainer


# ---- gains -----------------------------------------------------------------------------------------------------------------


def test_gains_are_what_their_names_say() -> None:
    p_NC = torch.tensor([[0.6, 0.3, 0.1], [1 / 3, 1 / 3, 1 / 3], [1.0 - 2e-9, 1e-9, 1e-9]], dtype=torch.float64)
    logits_NC = p_NC.log() + 5.0
    torch.testing.assert_close(gains_of(logits_NC, "margin"), torch.tensor([0.7, 1.0, 1e-6], dtype=torch.float64))
    torch.testing.assert_close(gains_of(logits_NC, "confidence"), torch.tensor([0.4, 2 / 3, 1e-6], dtype=torch.float64))
    entropy = -(p_NC[0] * p_NC[0].log()).sum() / math.log(3)
    torch.testing.assert_close(gains_of(logits_NC, "entropy"), torch.tensor([float(entropy), 1.0, 1e-6], dtype=torch.float64))
    assert float(gains_of(torch.tensor([[1e4, 0.0, 0.0]]), "margin", floor=0.01)) == 0.01
    assert gains_of(torch.randn(5, 3), "margin").dtype == torch.float64


@pytest.mark.parametrize("selection", ["robust", "top", "uniform", "proportional"])
def test_every_selection_spends_the_budget(selection) -> None:
    g_N = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e-6
    found = batch_sampling(g_N, 7, selection, wrong=10)
    assert float(found.probabilities.sum()) == pytest.approx(7)
    assert found.value <= robust_batch(g_N, 7, 10).value + 1e-12
    assert (found.value == pytest.approx(robust_batch(g_N, 7, 10).value)) == (selection == "robust")
    if selection == "top":
        assert set(found.probabilities.nonzero()[:, 0].tolist()) == set(g_N.topk(7).indices.tolist())


# ---- the loss --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_loss_is_one_mean_over_labelled_and_queried_samples(temperature) -> None:
    s, t = (torch.randn(5, C, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in (1, 2))
    s = s.float().requires_grad_()
    targets, queried = torch.tensor([0, 2, IGNORE, IGNORE, IGNORE]), torch.tensor([False, False, True, True, True])
    hard, soft = active_loss(s, targets, t.float(), queried, temperature)
    by_hand = F.cross_entropy(s[:2], targets[:2], reduction="sum") / 5
    torch.testing.assert_close(hard, by_hand)
    p = (t[2:].float() / temperature).softmax(-1)
    torch.testing.assert_close(soft, -(temperature**2) * (p * (s[2:] / temperature).log_softmax(-1)).sum() / 5)
    (gradient,) = torch.autograd.grad(hard + soft, s)
    torch.testing.assert_close(gradient[:2], (s[:2].softmax(-1) - F.one_hot(targets[:2], C)) / 5)
    torch.testing.assert_close(gradient[2:], temperature * ((s[2:] / temperature).softmax(-1) - p) / 5)


def test_an_update_learns_from_labels_and_cached_answers_and_never_asks_the_teacher() -> None:
    teacher = Counting()
    method = bound(teacher)
    chosen = (method.train_data.targets == IGNORE).nonzero()[:4, 0]
    method._learn(chosen, torch.randn(4, C))
    ids = torch.cat([method.labelled[:3], chosen.flip(0)])
    raw, targets = method.train_data.fetch(ids)
    (update,) = method.updates(Batch(raw, targets, ids), Clock())
    queried = torch.tensor([False] * 3 + [True] * 4)
    answers = torch.cat([torch.zeros(3, C), method.answers.flip(0)])
    hard, soft = active_loss(method.student(raw), targets, answers, queried)
    torch.testing.assert_close(update.loss, hard + soft)
    assert update.metrics.keys() == {"hard", "soft"}
    assert teacher.inputs == []


# ---- the rounds, on the engine -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selection", ["robust", "top", "uniform", "proportional"])
def test_the_teacher_is_asked_about_exactly_b_unlabelled_items_a_round_once_each(selection) -> None:
    teacher = Counting()
    method = bound(teacher, selection=selection)
    trained(method)
    assert len(teacher.ids) == len(set(teacher.ids)) == 3 * PER_ROUND
    assert teacher.ids == method.chosen.tolist()
    assert bool((method.train_data.targets[method.chosen] == IGNORE).all())
    for id_, shown in zip(teacher.ids, teacher.inputs, strict=True):
        assert torch.equal(shown, method.train_data.prepare(method.train_data.fetch(torch.tensor([id_]))[0])[0])
    torch.testing.assert_close(method.answers, 4 * method.train_data.inputs[method.chosen][:, :C])
    rows = method.facts()["rounds"]
    assert [row["pool"] for row in rows] == [N - LABELLED - r * PER_ROUND for r in range(3)]
    assert [row["queries"] for row in rows] == [PER_ROUND] * 3
    assert method.facts()["metrics"]["queries"] == 15.0
    assert [row["calls"] for row in method.facts()["ledger"]] == [PER_ROUND] * 3
    assert method.facts()["ledger"][-1]["remaining"] == 0


def test_m_follows_the_pool_that_is_left() -> None:
    method = bound(teacher_accuracy=0.75)
    trained(method)
    assert [row["wrong_expected"] for row in method.facts()["rounds"]] == [round(0.25 * (48 - 5 * r)) for r in range(3)]


def test_each_round_trains_on_the_labelled_and_all_that_was_asked_so_far() -> None:
    method = bound()
    trained(method)
    phases = method.phases()
    assert [phase.name for phase in phases] == ["round-0", "round-1", "round-2", "round-3"]
    for r, phase in enumerate(phases):
        assert phase.indices.tolist() == method.labelled.tolist() + method.chosen[: r * PER_ROUND].tolist()


def test_later_rounds_start_from_scratch_or_warm() -> None:
    made: list[int] = []

    def fresh(seed: int) -> nn.Module:
        made.append(seed)
        return network(seed)

    trained(bound(fresh=fresh))
    assert len(set(made)) == len(made) == 3
    made.clear()
    warm = bound(fresh=fresh, start="warm")
    first = warm.student
    trained(warm)
    assert made == []
    assert warm.student is first
    trained(bound(fresh=None, start="warm"))


def test_a_perfect_teacher_makes_it_margin_sampling() -> None:
    robust, top = (bound(teacher_accuracy=1.0, selection=s) for s in ("robust", "top"))
    trained(robust)
    trained(top)
    assert robust.chosen.sort().values.tolist() == top.chosen.sort().values.tolist()


def test_a_hopeless_teacher_warns_and_draws_uniformly() -> None:
    method = bound(teacher_accuracy=0.0, rounds=1)
    with pytest.warns(UserWarning, match="too often wrong"):
        trained(method)
    assert method.facts()["rounds"][0]["support"] == N - LABELLED


def test_a_run_is_reproducible_and_depends_on_its_seed() -> None:
    first, again, other = bound(seed=1), bound(seed=1), bound(seed=2)
    for method in (first, again, other):
        trained(method)
    assert torch.equal(first.chosen, again.chosen)
    assert all(torch.equal(a, b) for a, b in zip(first.student.parameters(), again.student.parameters(), strict=True))
    assert not torch.equal(first.chosen, other.chosen)


@pytest.mark.parametrize("step", [9, 11, 20])
def test_a_cut_run_goes_on_to_the_same_end(tmp_path, step) -> None:
    """Cut in the middle of a round, and at a round's last step before the teacher is asked (12 labelled in batches of 8, 4 epochs: 8 steps)."""
    whole_teacher, teacher = Counting(), Counting()
    whole = bound(whole_teacher, start="warm")
    trained(whole, tmp_path / "whole", checkpoint_steps=1, keep=200)
    cut = tmp_path / "cut"
    (cut / "checkpoints").mkdir(parents=True)
    (cut / "metrics.jsonl").write_bytes((tmp_path / "whole" / "metrics.jsonl").read_bytes())
    (cut / "checkpoints" / f"step-{step}").symlink_to(tmp_path / "whole" / "checkpoints" / f"step-{step}")
    method = bound(teacher, start="warm")
    trained(method, cut)
    assert torch.equal(method.chosen, whole.chosen)
    assert torch.equal(method.answers, whole.answers)
    assert all(torch.equal(a, b) for a, b in zip(method.student.parameters(), whole.student.parameters(), strict=True))
    assert method.facts() == whole.facts()
    assert teacher.ids == whole_teacher.ids[-len(teacher.ids) :]  # what had been answered is not asked again
    assert 0 < len(teacher.ids) < 15


def test_state_is_put_back_as_a_copy() -> None:
    method = bound(rounds=2)
    trained(method)
    again = bound(rounds=2)
    again.load_state_dict(copy.deepcopy(method.state_dict()))
    assert again.facts() == method.facts()
    assert [p.indices.tolist() for p in again.phases()] == [p.indices.tolist() for p in method.phases()]


# ---- the teacher's accuracy ---------------------------------------------------------------------------------------------------


def test_the_accuracy_is_measured_on_held_out_labels_and_not_on_anything_else() -> None:
    teacher, validation = Counting(wrong_every=3), samples(40, None, seed=8)
    method = bound(teacher, validation=validation, teacher_accuracy=None)
    trained(method)
    answers = Counting(wrong_every=3).logits(Batch(validation.inputs))
    expected = float((answers.argmax(-1) == validation.targets).double().mean())
    assert 0.4 < expected < 0.9
    assert method.facts()["teacher_accuracy"] == expected
    assert method.facts()["rounds"][0]["wrong_expected"] == round((1 - expected) * 48)
    assert method.ledger.total == 15  # the held-out calls are not queries


def test_unlabelled_held_out_samples_do_not_count() -> None:
    validation = samples(40, 25, seed=8)
    method = bound(validation=validation, teacher_accuracy=None)
    trained(method)
    assert method.facts()["teacher_accuracy"] == 1.0


def test_only_the_robust_selection_needs_the_accuracy() -> None:
    teacher = Counting()
    method = bound(teacher, selection="uniform", teacher_accuracy=None)
    trained(method)
    assert method.facts()["teacher_accuracy"] is None
    assert method.facts()["rounds"][0]["wrong_expected"] is None
    assert len(teacher.inputs) == 15


class Recorded:
    """A record: answers by id, whatever the input."""

    is_record = True

    def __init__(self) -> None:
        self.rows_NC = torch.randn(N, C, generator=torch.Generator().manual_seed(9))

    def logits(self, batch: Batch) -> Tensor:
        return self.rows_NC[batch.ids]


def test_a_recorded_teacher_answers_by_id_and_needs_its_accuracy_given() -> None:
    teacher = Recorded()
    method = bound(teacher)
    trained(method)
    assert torch.equal(method.answers, teacher.rows_NC[method.chosen])
    with pytest.raises(InputError, match="a record holds answers to training samples only") as caught:
        bound(teacher, validation=samples(40, None), teacher_accuracy=None)
    assert caught.value.where == "method.teacher_accuracy"


# ---- the truth, for reports ---------------------------------------------------------------------------------------------------


def test_the_truth_is_asked_by_the_report_alone_and_changes_nothing() -> None:
    TRUTH_CALLS.clear()
    plain, watched = bound(Counting(wrong_every=2)), bound(Counting(wrong_every=2), truth=TRUTH)
    trained(plain)
    trained(watched)
    assert TRUTH_CALLS == []
    assert torch.equal(plain.chosen, watched.chosen)
    assert all(torch.equal(a, b) for a, b in zip(plain.student.parameters(), watched.student.parameters(), strict=True))
    facts = watched.facts()
    assert TRUTH_CALLS == [N]
    right = (watched.answers.argmax(-1) == hidden_truth(watched.train_data)[watched.chosen]).double()
    assert facts["metrics"]["share_correct"] == pytest.approx(float(right.mean()))
    assert [row["share_correct"] for row in facts["rounds"]] == pytest.approx(right.view(3, 5).mean(1).tolist())
    assert "share_correct" not in plain.facts()["metrics"]


# ---- wrong input ---------------------------------------------------------------------------------------------------------------


def test_what_is_missing_is_named_with_its_remedy() -> None:
    refused = {
        "data": (lambda: bound(train=samples(labelled=0)), "no training sample has one"),
        "data.labelled": (lambda: bound(train=samples(labelled=None)), "no pool to choose from"),
        "method.budget": (lambda: bound(budget=17), "At most 16 a round"),
        "student": (lambda: bound(fresh=None), "start: warm"),
        "data.validation": (lambda: bound(teacher_accuracy=None), "Set data.validation"),
    }
    for where, (call, words) in refused.items():
        with pytest.raises(InputError, match=words) as caught:
            call()
        assert caught.value.where == where
    with pytest.raises(InputError, match=r"Set data\.validation"):
        bound(teacher_accuracy=None, validation=samples(labelled=0))
    with pytest.raises(InputError) as caught:
        RobustActive().bind(student=network(), teacher=Counting())
    assert caught.value.where == "data"


def test_a_truth_that_is_not_there_is_found_before_training() -> None:
    with pytest.raises(InputError, match="cannot import"):
        bound(truth="no.such.module:labels")


def test_mixed_samples_are_refused() -> None:
    method = bound()
    trainer = Trainer(method, method.train_data, TrainConfig(epochs=1, batch_size=8), augment=AugmentSpec(mixup=0.2), num_classes=C, cpu=True)
    with pytest.raises(InputError, match="Leave out mixup and cutmix"):
        trainer.fit()


@pytest.mark.parametrize(
    "knob", [{"rounds": 0}, {"budget": 0}, {"gain": "loss"}, {"selection": "best"}, {"teacher_accuracy": 1.2}, {"floor": 0.0}, {"wrong_loss": -1}]
)
def test_knobs_are_checked(knob) -> None:
    with pytest.raises(InputError) as caught:
        RobustActive(**knob)
    assert caught.value.where == next(iter(knob))


def test_nothing_is_read_on_the_host_in_a_step() -> None:
    """On the meta device any `.item()`, `bool()` or `float()` of a tensor raises."""
    method = bound()
    method._placed = torch.empty(N, dtype=torch.int64, device="meta"), torch.empty(5, C, device="meta")
    with torch.device("meta"):
        method.student = nn.Linear(6, C)
        batch = Batch(torch.empty(4, 6), torch.empty(4, dtype=torch.int64), torch.empty(4, dtype=torch.int64))
    (update,) = method.updates(batch, Clock())
    assert update.loss.device.type == "meta"


def test_no_warning_where_all_is_well() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(bound())
