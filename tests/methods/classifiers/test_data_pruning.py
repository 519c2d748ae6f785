"""Data pruning: the loss, the rule for α, what is kept, the scores of trained networks, the student on what is kept, resuming."""

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from limbeck import seeds
from limbeck.contract import IGNORE, Batch, Clock, OptimiserSpec, Phase, Update, Workbench
from limbeck.data import ArrayData, AugmentSpec
from limbeck.errors import InputError
from limbeck.losses.scores import el2n, forgetting
from limbeck.methods.classifiers.data_pruning import DataPruning, pruning_loss
from limbeck.methods.classifiers.data_pruning_part import auto_alpha
from limbeck.methods.classifiers.kd import KD
from limbeck.teachers import ModuleTeacher
from limbeck.train import TrainConfig, Trainer

few = settings(deadline=None, max_examples=30)
N, C = 60, 3
SCORES = ("random", "el2n", "grand", "grand_last_layer", "forgetting")


def network(seed: int) -> nn.Sequential:
    """[B, 6] → [B, C]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, C))


def points(count: int = N, seed: int = 5) -> ArrayData:
    noise = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 6, generator=noise)
    return ArrayData(inputs, (inputs[:, :C] + 0.7 * torch.randn(count, C, generator=noise)).argmax(1), ["a", "b", "c"])


class Untouchable:
    """A teacher that must not be asked."""

    def logits(self, batch: Batch) -> Tensor:
        raise AssertionError("the teacher was asked")

    all_logits = logits


def bound(data: ArrayData | None = None, *, teacher=None, seed: int = 3, fresh=network, kind=DataPruning, student=None, **knobs) -> DataPruning:
    data = points() if data is None else data
    teacher = ModuleTeacher(network(2)) if teacher is None else teacher
    return kind(**knobs).bind(student=student or network(1), teacher=teacher, fresh_student=fresh, train=data, num_classes=C, seed=seed)


def config(**changes) -> TrainConfig:
    return TrainConfig(**{"epochs": 3, "batch_size": 16, "log_every": 1, "optimiser": OptimiserSpec(lr=0.1)} | changes)


def fitted(method, folder: Path | None = None, augment: AugmentSpec | None = None, **changes) -> list[dict]:
    trainer = Trainer(method, method.train_data, config(**changes), seed=method.seed, folder=folder, augment=augment, cpu=True, num_classes=C)
    return trainer.fit().rows


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(module.state_dict())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


class Noting(DataPruning):
    """Notes which samples each phase showed, whether each was classified rightly before the step, and the weights at its start; stops where told to."""

    stop_at = ("", -1)

    def setup(self) -> None:
        super().setup()
        self.shown: dict[str, list[Tensor]] = {}
        self.right: dict[str, list[Tensor]] = {}
        self.first: dict[str, dict[str, Tensor]] = {}
        self.last: list[nn.Module] = []

    def updates(self, batch: Batch, clock: Clock) -> Iterator[Update]:
        if (clock.phase, clock.step) == self.stop_at:
            raise RuntimeError("stopped")
        player = "student" if clock.phase == "train" else "scorer"
        module = self.players()[player].module
        if clock.step == 0:
            self.first[clock.phase] = weights_of(module)
        self.shown.setdefault(clock.phase, []).append(batch.ids)
        answers: list[Tensor] = []
        hook = module.register_forward_hook(lambda _module, _inputs, output: answers.append(output))
        for update in super().updates(batch, clock):
            assert update.player == player
            yield update
        hook.remove()
        self.right.setdefault(clock.phase, []).append(answers[0].argmax(-1) == batch.targets)

    def leave(self, phase: Phase, clock: Clock, bench: Workbench) -> None:
        if phase.name != "train":
            self.last.append(copy.deepcopy(self.players()["scorer"].module))
        super().leave(phase, clock, bench)


# ---- the loss ------------------------------------------------------------------------------------------------------------


def loss_inputs(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    noise = torch.Generator().manual_seed(seed)
    s, t = torch.randn(2, 7, C, generator=noise, dtype=torch.float64)
    return s.requires_grad_(), t, torch.randint(C, (7,), generator=noise)


@few
@given(st.integers(0, 2**32), st.floats(0, 1), st.floats(0.5, 10))
def test_loss_and_gradient_are_those_of_equation_1(seed, alpha, tau):
    s, t, y = loss_inputs(seed)
    value, _ = pruning_loss(s, t, y, alpha, tau)
    p, q = (t / tau).softmax(-1), (s / tau).softmax(-1)
    by_hand = sum((1 - alpha) * -s[i].log_softmax(-1)[y[i]] + alpha * tau**2 * (p[i] * (p[i] / q[i]).log()).sum() for i in range(7)) / 7
    torch.testing.assert_close(value, by_hand)
    (gradient,) = torch.autograd.grad(value, s)
    torch.testing.assert_close(gradient, (alpha * tau * (q - p) + (1 - alpha) * (s.softmax(-1) - F.one_hot(y, C))) / 7)


def test_without_the_factor_the_soft_term_is_a_temperature_squared_smaller():
    s, t, y = loss_inputs(0)
    torch.testing.assert_close(pruning_loss(s, t, y, 1.0, 4.0, tau_squared=False)[0] * 16, pruning_loss(s, t, y, 1.0, 4.0)[0])


def test_no_gradient_reaches_the_teacher():
    s, t, y = loss_inputs(0)
    pruning_loss(s, t.requires_grad_(), y, 0.5)[0].backward()
    assert t.grad is None


def test_alpha_0_is_cross_entropy_and_the_teacher_is_never_asked():
    method, data = bound(teacher=Untouchable(), fraction=0.5, alpha=0), points()
    method.student.eval()
    batch = Batch(data.inputs, data.targets)
    (update,) = method.updates(batch, Clock())
    assert update.loss == F.cross_entropy(method.student(batch.inputs), batch.targets)
    update.loss.backward()
    found = [p.grad.clone() for p in method.student.parameters()]
    method.student.zero_grad()
    F.cross_entropy(method.student(batch.inputs), batch.targets).backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(found, method.student.parameters(), strict=True))
    assert "soft" not in update.metrics
    fitted(method)
    fitted(DataPruning(fraction=0.5, alpha=0).bind(student=network(1), train=points()))  # nor does there have to be one


def test_alpha_1_does_not_look_at_labels():
    found = []
    for targets in (points().targets, points().targets.flip(0), torch.full((N,), IGNORE), None):
        method = bound(points().with_targets(targets) if targets is not None else ArrayData(points().inputs, None, ["a", "b", "c"]), fraction=0.3, alpha=1.0)
        found.append((fitted(method), weights_of(method.student)))
    assert all(rows == found[0][0] and same(weights, found[0][1]) for rows, weights in found)


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    method = bound(student=network(2), fraction=0.5, alpha=1.0)
    method.student.eval()
    (update,) = method.updates(Batch(points().inputs), Clock())
    update.loss.backward()
    assert update.loss.abs() < 1e-6
    assert max(float(p.grad.abs().max()) for p in method.student.parameters()) < 1e-6


def test_unlabelled_samples_count_in_the_soft_term_alone():
    s, t, y = loss_inputs(1)
    some = torch.where(torch.arange(7) < 3, IGNORE, y)
    value, terms = pruning_loss(s, t, some, 0.25)
    torch.testing.assert_close(terms["hard"], F.cross_entropy(s[3:], y[3:]))
    torch.testing.assert_close(terms["soft"], pruning_loss(s, t, None, 1.0)[0])
    torch.testing.assert_close(value, 0.25 * terms["soft"] + 0.75 * terms["hard"])


def test_our_rule_for_alpha():
    assert [auto_alpha(f) for f in (0.001, 0.05, 0.1)] == [1.0, 1.0, 1.0]
    assert auto_alpha(1.0) == 0.5
    assert auto_alpha(0.55) == pytest.approx(0.75)
    assert bound(fraction=0.05).alpha == 1.0
    assert bound(fraction=0.55).alpha == pytest.approx(0.75)
    assert bound(fraction=0.05, alpha=0.3).alpha == 0.3


# ---- what is kept --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", SCORES)
def test_the_whole_set_is_plain_distillation_whatever_the_score(score):
    method = bound(fraction=1.0, score=score, alpha=0.4, temperature=3.0)
    plain = KD(weight=0.4, temperature=3.0).bind(student=network(1), teacher=ModuleTeacher(network(2)), train=points(), seed=3)
    assert [phase.name for phase in method.phases()] == ["train"]
    assert fitted(method) == fitted(plain)
    assert same(weights_of(method.student), weights_of(plain.student))


def test_the_student_sees_every_kept_sample_and_no_other():
    method = bound(kind=Noting, fraction=0.25)
    fitted(method)
    assert len(method.kept) == 15
    assert torch.cat(method.shown["train"]).sort().values.tolist() == method.kept.repeat_interleave(3).tolist()  # three epochs of the kept


def test_random_parts_are_nested_and_of_the_run_s_seed_alone():
    kept = [set(bound(fraction=f, alpha=a).kept.tolist()) for f, a in ((0.1, 0.0), (0.3, 1.0), (0.8, 0.5))]
    assert kept[0] < kept[1] < kept[2]
    assert [len(k) for k in kept] == [6, 18, 48]
    assert kept[1] == set(bound(fraction=0.3).kept.tolist())
    assert kept[1] != set(bound(fraction=0.3, seed=4).kept.tolist())


def test_scores_out_of_a_file_keep_the_highest_or_the_lowest(tmp_path):
    scores = np.arange(N, dtype=np.float32)[::-1].copy()
    scores[7] = np.inf
    np.save(tmp_path / "scores.npy", scores)
    file = str(tmp_path / "scores.npy")
    assert bound(fraction=0.05, score="file", file=file).kept.tolist() == [0, 1, 7]
    assert bound(fraction=0.05, score="file", file=file, keep="easiest").kept.tolist() == [57, 58, 59]
    method = bound(fraction=0.05, score="file", file=file)
    assert [phase.name for phase in method.phases()] == ["train"]
    assert method.scores.tolist() == scores.tolist()


def test_classes_are_balanced_guarded_or_reported_lost(tmp_path):
    data = points().with_targets(torch.arange(N) // 20)
    np.save(tmp_path / "scores.npy", np.arange(N) // 20 == 2)  # the last class is the hardest
    knobs = {"fraction": 0.2, "score": "file", "file": str(tmp_path / "scores.npy")}
    with pytest.warns(UserWarning, match=r"no sample of 2 class\(es\) is kept \(0, 1\)"):
        method = bound(data, **knobs)
    assert method.kept.tolist() == list(range(40, 52))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (bound(data, **knobs, class_balanced=True).kept // 20).bincount().tolist() == [4, 4, 4]
        guarded = bound(data, **knobs, min_per_class=1)
    assert (guarded.kept // 20).bincount().tolist() == [1, 1, 10]
    assert guarded.facts()["kept_by_class"] == {"0": 0.05, "1": 0.05, "2": 0.5}
    assert guarded.facts()["metrics"]["least_kept_of_a_class"] == 0.05


# ---- scores --------------------------------------------------------------------------------------------------------------


def fresh_of(method: DataPruning, index: int) -> nn.Module:
    return network(seeds.derive(method.seed, "data_pruning", f"score-{index}")).eval()


def gradient_norms(module: nn.Module, data: ArrayData, of: nn.Module) -> Tensor:
    """‖∂CE_i/∂θ‖ of a part's parameters by one backward pass a sample."""
    found = []
    for x, y in zip(data.inputs, data.targets, strict=True):
        gradients = torch.autograd.grad(F.cross_entropy(module(x[None]), y[None]), list(of.parameters()))
        found.append(torch.cat([g.flatten() for g in gradients]).double().norm())
    return torch.stack(found)


@pytest.mark.parametrize("score", ["el2n", "grand", "grand_last_layer"])
def test_scores_at_initialisation_are_means_over_fresh_networks(score):
    method, data = bound(fraction=0.2, score=score, networks=3, score_epochs=0), points()
    fitted(method)
    found = []
    for module in (fresh_of(method, 1), fresh_of(method, 2), fresh_of(method, 3)):
        if score == "el2n":
            found.append((module(data.inputs).softmax(-1) - F.one_hot(data.targets, C)).norm(dim=-1).double())
        else:
            found.append(gradient_norms(module, data, module if score == "grand" else module[3]))
    torch.testing.assert_close(method.scores, sum(found) / 3, rtol=1e-5, atol=1e-6)
    assert method.kept.tolist() == sorted(method.scores.argsort(descending=True)[:12].tolist())


def test_grand_of_a_linear_model_without_bias_is_el2n_times_the_inputs_norm():
    def linear(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Linear(6, C, bias=False)

    scores = {}
    for score in ("el2n", "grand", "grand_last_layer"):
        method = bound(fraction=0.2, score=score, networks=1, score_epochs=0, fresh=linear)
        fitted(method)
        scores[score] = method.scores
    torch.testing.assert_close(scores["grand"], scores["el2n"] * points().inputs.norm(dim=1).double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scores["grand"], scores["grand_last_layer"], rtol=1e-5, atol=1e-6)


def test_scoring_networks_are_trained_on_everything_and_the_student_is_not_touched():
    method = bound(kind=Noting, fraction=0.2, score="el2n", networks=2, score_epochs=4)
    assert [(phase.name, phase.epochs, phase.trains) for phase in method.phases()] == [
        ("score-1", 4, ("scorer",)), ("score-2", 4, ("scorer",)), ("train", None, None)
    ]  # fmt: skip
    assert method.kept is None
    rows, data = fitted(method), points()
    assert same(method.first["score-2"], fresh_of(method, 2).state_dict())
    assert same(method.first["train"], network(1).state_dict())
    assert torch.cat(method.shown["score-1"]).bincount().tolist() == [4] * N
    assert set(torch.cat(method.shown["train"]).tolist()) == set(method.kept.tolist())
    expected = torch.stack([el2n(module.eval()(data.inputs), data.targets) for module in method.last]).mean(0)
    torch.testing.assert_close(method.scores, expected, rtol=1e-6, atol=1e-6)
    assert not torch.equal(method.last[0](data.inputs), fresh_of(method, 1)(data.inputs))
    losses = [row["scorer/loss"] for row in rows if row["phase"] == "score-1"]
    assert losses[-1] < losses[0]
    assert list(method.players()) == ["student"]  # the scorers are gone
    assert method.inference() is method.student


def test_default_lengths_are_those_of_the_original_score_paper():
    assert [(p.name, p.epochs) for p in bound(score="el2n").phases()][-2:] == [("score-10", 10), ("train", None)]
    assert [(p.name, p.epochs) for p in bound(score="forgetting").phases()] == [("score-1", None), ("train", None)]


def test_scoring_may_have_its_own_optimiser():
    method = bound(score="el2n", score_optimiser={"name": "adam", "lr": 1e-4})
    method.enter(method.phases()[0], Clock(), None)
    assert method.players()["scorer"].optimiser == OptimiserSpec(name="adam", lr=1e-4)
    assert method.players()["student"].optimiser is None


@pytest.mark.parametrize("accumulate", [1, 2])
def test_forgetting_is_counted_on_training_batches_before_the_step(accumulate):
    method = bound(kind=Noting, fraction=0.2, score="forgetting", score_epochs=5)
    fitted(method, accumulate=accumulate, optimiser=OptimiserSpec(lr=0.3))
    ids, right = torch.cat(method.shown["score-1"]), torch.cat(method.right["score-1"])
    expected = torch.stack([forgetting(right[ids == i]) for i in range(N)])
    assert method.scores.tolist() == expected.tolist()
    assert len(expected[expected.isfinite()].unique()) > 2
    assert expected.isinf().any()
    assert method.facts()["metrics"]["never_learnt"] == float(expected.isinf().double().mean())
    assert method.kept.tolist() == sorted(expected.argsort(descending=True, stable=True)[:12].tolist())  # never learnt first


def test_the_kept_parts_of_a_score_are_nested():
    kept = []
    for fraction in (0.1, 0.4, 0.7):
        method = bound(fraction=fraction, score="el2n", networks=1, score_epochs=2)
        fitted(method)
        kept.append(set(method.kept.tolist()))
    assert kept[0] < kept[1] < kept[2]


# ---- resuming ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("knobs", [{"score": "el2n", "networks": 2, "score_epochs": 2}, {"score": "forgetting", "networks": 2}, {"score": "random"}])
def test_a_training_goes_on_where_it_stood_bit_for_bit(knobs, tmp_path):
    whole = bound(kind=Noting, fraction=0.3, **knobs)
    rows = fitted(whole, checkpoint_steps=1)
    stops = [("score-1", 3), ("score-2", 0), ("score-2", 5), ("train", 2)] if whole.networks else [("train", 1)]
    for number, stop in enumerate(stops):
        folder = tmp_path / str(number)
        first = bound(kind=Noting, fraction=0.3, **knobs)
        first.stop_at = stop
        with pytest.raises(RuntimeError, match="stopped"):
            fitted(first, folder, checkpoint_steps=1)
        second = bound(kind=Noting, fraction=0.3, **knobs)
        again = fitted(second, folder, checkpoint_steps=1)
        assert again == rows[len(rows) - len(again) :] or again == rows
        assert same(weights_of(second.student), weights_of(whole.student)), stop
        assert torch.equal(second.kept, whole.kept)
        assert (second.scores is None and whole.scores is None) or torch.equal(second.scores, whole.scores)
        assert second.facts() == whole.facts()
        third = bound(kind=Noting, fraction=0.3, **knobs)  # one that is done has nothing left to do, and still its state
        fitted(third, folder, checkpoint_steps=1)
        assert third.shown == {}
        assert third.facts() == whole.facts()


# ---- wrong input ---------------------------------------------------------------------------------------------------------


def test_facts_say_what_was_kept_and_the_weight():
    method = bound(fraction=0.1, score="el2n", networks=1, score_epochs=1)
    assert "kept" not in method.facts()
    fitted(method)
    found = method.facts()
    assert (found["score"], found["alpha"], found["alpha_is_our_rule"], found["kept"]) == ("el2n", 1.0, True, 6)
    sizes = points().targets.bincount()
    assert sum(share * int(sizes[int(label)]) for label, share in found["kept_by_class"].items()) == pytest.approx(6)
    assert found["metrics"]["networks_scored"] == 1


def test_wrong_knobs_are_named():
    for knobs, word in [
        ({"fraction": 0.0}, "fraction"), ({"fraction": 1.1}, "fraction"), ({"alpha": 1.5}, "alpha"), ({"alpha": "some"}, "alpha"),
        ({"networks": 0}, "networks"), ({"score": "file"}, "file"),
        ({"file": "x.npy"}, "file"), ({"score": "forgetting", "score_epochs": 1}, "score_epochs"), ({"keep": "half"}, "keep"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=word):
            DataPruning(**knobs)


def test_what_cannot_be_done_is_refused_before_anything_is_trained(tmp_path):
    np.save(tmp_path / "short.npy", np.zeros(N - 1))
    np.save(tmp_path / "nan.npy", np.full(N, np.nan))
    np.save(tmp_path / "text.npy", np.full(N, "a"))
    np.savez(tmp_path / "many.npz", a=np.zeros(N))
    (tmp_path / "none.npy").write_text("scores")
    partly = points().with_targets(torch.where(torch.arange(N) < 9, IGNORE, points().targets))
    none = ArrayData(points().inputs, None, ["a", "b", "c"])
    for case, where in [
        (lambda: DataPruning(alpha=0.5).bind(student=network(1), train=points()), "teacher"),
        (lambda: bound(none, alpha=0), "data"),
        (lambda: bound(none, score="el2n"), "data"),
        (lambda: bound(partly, score="forgetting"), "score"),
        (lambda: bound(none, class_balanced=True), "class_balanced"),
        (lambda: bound(none, min_per_class=1), "min_per_class"),
        (lambda: bound(score="el2n", fraction=0.1, min_per_class=3), "min_per_class"),
        (lambda: bound(score="el2n", fresh=None), "student"),
        (lambda: DataPruning(alpha=0, fraction=0.5).bind(student=network(1)), "train"),
        *((lambda n=n: bound(score="file", file=str(tmp_path / n)), "file") for n in ("short.npy", "nan.npy", "text.npy", "many.npz", "none.npy", "no")),
    ]:  # fmt: skip
        with pytest.raises(InputError) as caught:
            case()
        assert caught.value.where == where
    bound(partly, fraction=0.5)  # random needs no labels


def test_forgetting_is_refused_where_batches_mix_samples_or_are_shared_out():
    data = ArrayData(torch.randn(20, 1, 8, 8), torch.randint(C, (20,)), ["a", "b", "c"])

    def flat(seed: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, C))

    method = bound(data, student=flat(0), fresh=flat, score="forgetting")
    with pytest.raises(InputError, match="mixtures"):
        fitted(method, augment=AugmentSpec(mixup=1.0))
    method.enter(method.phases()[0], Clock(), None)
    with pytest.raises(InputError, match="one process"):
        next(method.updates(Batch(data.inputs, data.targets, torch.arange(20)), Clock(rank=1)))


def test_the_last_layer_must_be_linear_on_vectors():
    def scaled(seed: int) -> nn.Module:
        return nn.Sequential(network(seed), nn.Softplus())

    with pytest.raises(InputError, match="does not end in a linear layer"):
        fitted(bound(score="grand_last_layer", fresh=scaled, score_epochs=0))
