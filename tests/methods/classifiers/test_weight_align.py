"""Weight aligning: the sheet's invariants, the stream of tasks, and restarts."""

import copy
import io
import json
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from limbeck import seeds
from limbeck.contract import IGNORE, Batch, Clock
from limbeck.errors import InputError
from limbeck.methods.classifiers.weight_align import WeightAlign, align_weights, incremental_loss

fast = settings(deadline=None, max_examples=40)
shapes = st.tuples(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 5), st.integers(1, 9))


def rows(seed, old, new, width):
    """[C, d] float64 weights, the new rows of another size than the old ones."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(old + new, width, generator=generator, dtype=torch.float64)
    W[old:] *= 10 ** torch.empty((), dtype=torch.float64).uniform_(-1, 1, generator=generator)
    return W


# ---- weight aligning, eq. 4 -------------------------------------------------------------------------------------------


@fast
@given(shapes)
def test_aligning_equalises_the_mean_norms_and_changes_nothing_else(shape):
    _, old, new, width = shape
    W = rows(*shape)
    aligned, gamma = align_weights(W, old, new)
    norms = aligned.norm(dim=1)
    assert torch.isclose(norms[:old].mean(), norms[old:].mean())
    assert torch.equal(aligned[:old], W[:old])
    assert torch.allclose(F.cosine_similarity(aligned[old:], W[old:]), torch.ones(new, dtype=torch.float64))
    assert torch.isclose(gamma, W[:old].norm(dim=1).mean() / W[old:].norm(dim=1).mean())
    phi = torch.rand(20, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    before, after = phi @ W.T, phi @ aligned.T
    assert torch.equal(before[:, :old].argsort(1), after[:, :old].argsort(1))
    assert torch.equal(before[:, old:].argsort(1), after[:, old:].argsort(1))


@fast
@given(shapes, st.floats(0.01, 100))
def test_aligning_is_idempotent_and_blind_to_the_size_of_the_new_rows(shape, scale):
    _, old, new, _ = shape
    W = rows(*shape)
    aligned, _ = align_weights(W, old, new)
    again, gamma = align_weights(aligned, old, new)
    assert torch.isclose(gamma, torch.ones((), dtype=torch.float64))
    assert torch.allclose(again, aligned)
    scaled = torch.cat((W[:old], scale * W[old:]))
    assert torch.allclose(align_weights(scaled, old, new)[0], aligned)


def test_equal_mean_norms_leave_the_weights_alone():
    W = torch.tensor([[3.0, 4.0], [0.0, 5.0], [4.0, 3.0]])
    aligned, gamma = align_weights(W, 2, 1)
    assert gamma == 1
    assert torch.equal(aligned, W)


def test_a_gamma_above_one_scales_up_unless_the_rule_says_otherwise():
    W = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    assert torch.equal(align_weights(W, 1, 1)[0], torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
    kept, gamma = align_weights(W, 1, 1, "shrink_only")
    assert gamma == 1
    assert torch.equal(kept, W)
    shrunk, gamma = align_weights(W.flip(0), 1, 1, "shrink_only")
    assert gamma == 0.5
    assert torch.equal(shrunk, torch.tensor([[0.0, 1.0], [1.0, 0.0]]))


# ---- the loss, eq. 1 to 3 ---------------------------------------------------------------------------------------------


@fast
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(0, 4), st.floats(0.5, 5))
def test_the_loss_weighs_its_parts_by_the_share_of_old_classes(seed, old, new, temperature):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, old + new, generator=generator, dtype=torch.float64, requires_grad=True)
    before = torch.randn(6, old, generator=generator, dtype=torch.float64)
    targets = torch.randint(old + new, (6,), generator=generator)
    loss, ce, kd = incremental_loss(logits, targets, before, temperature)
    q_hat, q = (before / temperature).softmax(1), (logits[:, :old] / temperature).softmax(1)
    assert torch.isclose(ce, F.cross_entropy(logits, targets))
    assert torch.isclose(kd, -(q_hat * q.log()).sum(1).mean())
    lam = old / (old + new)
    assert torch.isclose(loss, (1 - lam) * ce + lam * kd)
    (gradient,) = torch.autograd.grad(kd, logits, retain_graph=True)
    assert torch.allclose(gradient[:, :old], (q - q_hat) / (temperature * 6))
    assert torch.count_nonzero(gradient[:, old:]) == 0
    if new == 0:
        assert torch.equal(loss, kd)


def test_the_same_old_logits_give_the_entropy_and_no_gradient():
    before = torch.randn(5, 3, dtype=torch.float64)
    logits = torch.cat((before, torch.randn(5, 2, dtype=torch.float64)), 1).requires_grad_()
    _, _, kd = incremental_loss(logits, torch.zeros(5, dtype=torch.int64), before, 2.0)
    assert torch.isclose(kd, torch.distributions.Categorical(logits=before / 2).entropy().mean())
    (gradient,) = torch.autograd.grad(kd, logits)
    assert gradient.abs().max() < 1e-15


def test_without_an_old_model_the_loss_is_the_cross_entropy():
    logits, targets = torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])
    loss, ce, kd = incremental_loss(logits, targets, None)
    assert torch.equal(loss, F.cross_entropy(logits, targets))
    assert torch.equal(loss, ce)
    assert kd == 0


# ---- the stream -------------------------------------------------------------------------------------------------------

CLASSES, PER_CLASS = 6, 30


class Clusters:
    """A labelled data set of six clusters in R^8 (a `contract.Data`); every tenth sample of class 0 has lost its label."""

    classes = tuple("abcdef")

    def __init__(self, stream: str) -> None:
        generator = seeds.generator("clusters", stream)
        labels = torch.arange(CLASSES).repeat(PER_CLASS)
        centres = 2 * torch.randn(CLASSES, 8, generator=seeds.generator("centres"))
        self.inputs = centres[labels] + torch.randn(len(labels), 8, generator=generator)
        self.targets = labels.clone()
        self.targets[0 :: 10 * CLASSES] = IGNORE

    def __len__(self):
        return len(self.targets)

    def fetch(self, ids_B, *, seed=0, epoch=0):
        return self.inputs[ids_B], self.targets[ids_B]

    def prepare(self, raw):
        return raw


class Bench:
    """The workbench of a loop by hand."""

    device = torch.device("cpu")

    def __init__(self, method):
        self.method = method

    def outputs(self, forward, data, indices=None):
        was = self.method.student.training
        self.method.student.eval()
        with torch.no_grad():
            found = forward(data.prepare(data.fetch(torch.arange(len(data)) if indices is None else indices)[0]))
        self.method.student.train(was)
        return found


def student(bias=False):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, CLASSES, bias=bias))


def bound(net=None, seed=1, **knobs):
    knobs = {"classes_per_step": 2, "memory": 20, "clip": False} | knobs
    method = WeightAlign(**knobs)
    return method.bind(student=net or student(), train=Clusters("train"), test=Clusters("test"), num_classes=CLASSES, seed=seed)


def train(method, start=(0, 0), stop=(99, 0), optimiser_state=None, watch=None, steps=24):
    """Drive a method from (phase, step) to (phase, step), as the engine does; returns what the optimiser remembers."""
    index, first = start
    optimiser = None
    while (phase := next(islice(iter(method.phases()), index, None), None)) is not None:
        clock = Clock(method.seed, phase.name, index, first, steps)
        if (index, first) == stop:
            return copy.deepcopy(optimiser.state_dict()) if optimiser else None
        if first == 0:
            method.enter(phase, clock, Bench(method))
        parameters = list(method.players()["student"].module.parameters())
        optimiser = torch.optim.SGD(parameters, lr=0.2, momentum=0.9)
        if first:
            optimiser.load_state_dict(optimiser_state)
        for step in range(first, steps):
            if (index, step) == stop:
                return copy.deepcopy(optimiser.state_dict())
            clock.step = step
            method.student.train()
            picked = phase.indices[torch.randperm(len(phase.indices), generator=clock.generator("batch"))[:16]]
            inputs, targets = method.train_data.fetch(picked)
            for update in method.updates(Batch(inputs, targets, picked), clock):
                update.loss.backward(inputs=parameters)
                optimiser.step()
                optimiser.zero_grad()
                method.after_step(update.player, clock)
                if watch:
                    watch(method, update, clock)
        if (index, steps) == stop:
            return copy.deepcopy(optimiser.state_dict())
        method.leave(phase, clock, Bench(method))
        optimiser = None
        index, first = index + 1, 0
    return None


def test_a_stream_is_learnt_and_answers_in_the_datas_class_order():
    net, method = student(), bound()
    train(method)
    model = method.artefact().module.eval()
    test = Clusters("test")
    own = test.targets != IGNORE
    accuracy = (model(test.inputs).argmax(1) == test.targets)[own].double().mean().item()
    facts = method.facts()
    assert accuracy == facts["final_accuracy"] == facts["metrics"]["final_accuracy"] > 0.85
    assert method.stream.order != tuple(range(CLASSES))
    net.load_state_dict(model.state_dict())  # the shape it was given in
    assert torch.equal(net(test.inputs), model(test.inputs))
    assert json.loads(json.dumps(facts)) == facts
    assert [len(step["tasks"]) for step in facts["steps"]] == [1, 2, 3]
    assert len(facts["gammas"]) == 2
    assert facts["gamma_max"] == max(facts["gammas"])
    assert facts["exemplars_per_class"] == [3] * CLASSES


def test_before_all_classes_have_come_only_those_seen_are_answered():
    method = bound(student(bias=True))
    assert method.inference() is method.student
    train(method, stop=(1, 5))
    answers = method.inference()(Clusters("test").inputs).argmax(1)
    assert set(answers.tolist()) <= set(method.stream.order[:4])
    assert method.inference()[2].bias is not None


def test_a_task_has_its_new_classes_and_the_exemplars_of_the_older_ones():
    method = bound()
    targets, order = method.targets, method.stream.order
    seen_phases = []
    for index in range(3):
        phase = next(islice(method.phases(), index, None))
        train(method, start=(index, 0), stop=(index + 1, 0))
        seen_phases.append(phase)
    first, second, third = (phase.indices for phase in seen_phases)
    assert [phase.name for phase in seen_phases] == ["task-1", "task-2", "task-3"]
    assert set(targets[first].tolist()) == set(order[:2])
    assert IGNORE not in targets[torch.cat((first, second, third))]
    new = torch.isin(targets[third], torch.tensor(order[4:]))
    assert int(new.sum()) == int(torch.isin(targets, torch.tensor(order[4:])).sum())
    assert torch.bincount(targets[third][~new], minlength=CLASSES)[list(order[:4])].tolist() == [5] * 4
    assert torch.isin(third[~new], torch.cat((first, second))).all()
    assert len(second) - int(torch.isin(targets[second], torch.tensor(order[2:4])).sum()) == 20


def test_phases_are_lazy_and_asking_anew_gives_the_same():
    method = bound()
    phases = method.phases()
    first = next(phases)
    train(method, stop=(1, 0))
    lazy, fresh = next(phases), next(islice(method.phases(), 1, None))
    assert torch.equal(lazy.indices, fresh.indices)
    assert len(lazy.indices) > len(list(bound().phases())[1].indices)
    assert torch.equal(next(method.phases()).indices, first.indices)


def test_the_first_task_has_no_distillation_and_no_aligning():
    method = bound()
    given = method.student[2]
    train(method, stop=(0, 24), watch=lambda _m, update, _c: _same(update.loss, update.metrics["ce"]))
    assert method.student[2] is not given
    assert method.student[2].weight.shape == (2, 16)
    trained = method.student[2].weight.clone()
    method.leave(next(method.phases()), Clock(), Bench(method))
    assert torch.equal(method.student[2].weight, trained)
    assert method.gammas == []
    assert method.frozen() == []


def _same(a, b):
    assert torch.equal(a, b)


def test_the_old_model_is_the_aligned_one_frozen_in_eval_mode():
    method = bound()
    train(method, stop=(2, 0))
    aligned = copy.deepcopy(method.student.state_dict())
    norms = method.head.weight.norm(dim=1)
    assert torch.isclose(norms[:2].mean(), norms[2:].mean())
    train(method, start=(2, 0), stop=(2, 7))
    (old,) = method.frozen()
    assert {k: v.tolist() for k, v in old.state_dict().items()} == {k: v.tolist() for k, v in aligned.items()}
    assert not old.training
    assert not any(p.requires_grad for p in old.parameters())
    assert not torch.equal(method.student[0].weight, old[0].weight)


def test_the_head_grows_under_its_old_rows():
    method = bound()
    train(method, stop=(1, 0))
    before = method.head.weight.clone()
    phase = next(islice(method.phases(), 1, None))
    method.enter(phase, Clock(), Bench(method))
    assert method.head.weight.shape == (4, 16)
    assert torch.equal(method.head.weight[:2], before)
    assert (method.head.weight[2:] < 0).any()
    assert method.players()["student"].module is method.student


def test_with_clipping_the_head_is_never_negative_and_starts_alive():
    method = bound(clip=True)
    lows, alive = [], {}

    def watch(m, _update, clock):
        lows.append(m.head.weight.min())
        alive.setdefault(clock.phase, (m.head.weight[-2:] > 0).double().mean().item())

    train(method, watch=watch)
    assert len(lows) == 3 * 24
    assert min(lows) == 0
    assert min(alive.values()) > 0.7
    phi = torch.rand(10, 16)
    more = phi.clone()
    more[:, 3] += 1
    assert (method.head(more) >= method.head(phi)).all()
    free = bound(clip=False)
    train(free)
    assert free.head.weight.min() < 0


def test_the_arms_switch_distillation_and_aligning_off():
    kd = []
    tuned = bound(distil=False, align=False)
    train(tuned, watch=lambda _m, update, _c: kd.append(update.metrics["kd"].item()))
    assert set(kd) == {0.0}
    assert tuned.frozen() == []
    assert tuned.gammas == []
    assert "gamma_max" not in tuned.facts()["metrics"]
    norms = tuned.head.weight.norm(dim=1)
    assert not torch.isclose(norms[:4].mean(), norms[4:].mean())
    kd.clear()
    train(bound(align=False), watch=lambda _m, update, _c: kd.append(update.metrics["kd"].item()))
    assert set(kd[:24]) == {0.0}
    assert min(kd[24:]) > 0


def test_soft_labels_give_the_same_update_as_the_labels_they_stand_for():
    method = bound()
    train(method, stop=(1, 3))
    picked = next(islice(method.phases(), 1, None)).indices[:9]
    inputs, targets = method.train_data.fetch(picked)
    (hard,) = method.updates(Batch(inputs, targets), Clock())
    (soft,) = method.updates(Batch(inputs, F.one_hot(targets, CLASSES).float()), Clock())
    assert torch.isclose(hard.loss, soft.loss)


def test_exemplars_are_chosen_with_the_aligned_model_and_cut_to_prefixes():
    method = bound(memory=24)
    train(method, stop=(1, 0))
    earlier = list(method.memory.lists)
    train(method, start=(1, 0), stop=(2, 0))
    assert [len(ids) for ids in earlier] == [12, 12]
    assert [len(ids) for ids in method.memory.lists] == [6] * 4
    assert all(torch.equal(now, then[:6]) for now, then in zip(method.memory.lists, earlier, strict=False))
    label = method.stream.order[3]
    own = (method.targets == label).nonzero().flatten()
    phi = F.normalize(method.student[:2](method.train_data.inputs[own]), dim=1)
    assert method.memory.lists[3][0] == own[(phi - phi.mean(0)).norm(dim=1).argmin()]


def test_a_bias_is_dropped_unless_kept_and_comes_back_as_zero():
    dropped = bound(student(bias=True))
    train(dropped, stop=(1, 0))
    assert dropped.head.bias is None
    kept = bound(student(bias=True), bias=True)
    train(kept, stop=(1, 24))
    bias = kept.head.bias.clone()
    kept.leave(next(kept.phases()), Clock(), Bench(kept))
    assert torch.equal(kept.head.bias, bias)
    train(dropped, start=(1, 0))
    assert torch.equal(dropped.inference()[2].bias, torch.zeros(CLASSES))


def test_without_a_test_set_nothing_is_measured():
    method = WeightAlign(classes_per_step=3).bind(student=student(), train=Clusters("train"), num_classes=CLASSES)
    train(method)
    assert set(method.facts()["metrics"]) == {"gamma_max", "gamma_below_one"}


# ---- restarts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [(0, 9), (0, 24), (1, 0), (1, 11), (1, 24), (2, 0), (2, 1)])
def test_a_restart_ends_bit_identical_to_the_run_that_was_never_stopped(stop):
    whole = bound(clip=True)
    train(whole)
    first = bound(clip=True)
    optimiser_state = train(first, stop=stop)
    file = io.BytesIO()
    torch.save({"method": first.state_dict(), "student": first.players()["student"].module.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = bound(clip=True)
    second.load_state_dict(saved["method"])
    second.players()["student"].module.load_state_dict(saved["student"])
    train(second, start=stop, optimiser_state=optimiser_state)
    for name, value in whole.student.state_dict().items():
        assert torch.equal(second.student.state_dict()[name], value), name
    for now, then in zip(second.frozen(), whole.frozen(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(now.parameters(), then.parameters(), strict=True))
    assert second.facts() == whole.facts()
    assert torch.equal(second.memory.indices(), whole.memory.indices())


def test_the_seed_decides_order_and_head_and_nothing_else_does():
    torch.manual_seed(1)
    one = bound(student())
    train(one)
    torch.manual_seed(2)
    two, three = bound(student()), bound(student(), seed=2)
    train(two)
    assert all(torch.equal(a, b) for a, b in zip(one.student.parameters(), two.student.parameters(), strict=True))
    assert one.stream.order != three.stream.order


# ---- refusals ---------------------------------------------------------------------------------------------------------


def test_a_student_without_a_linear_head_is_refused():
    with pytest.raises(InputError, match="'head', 'linear', 'fc', 'classifier'"):
        bound(nn.Sequential(nn.Flatten(), nn.ReLU()))
    with pytest.raises(InputError, match="'neck' is not"):
        bound(head="neck")


def test_a_training_set_without_labels_is_refused():
    data = Clusters("train")
    data.targets = None
    with pytest.raises(InputError, match="learns from labels"):
        WeightAlign().bind(student=student(), train=data)
    with pytest.raises(InputError, match="splits its training set into tasks"):
        WeightAlign().bind(student=student())


@pytest.mark.parametrize(
    ("knobs", "place"),
    [
        ({"temperature": 0}, "temperature"),
        ({"memory": -1}, "memory"),
        ({"classes_per_step": 0}, "classes_per_step"),
        ({"classes_per_step": [2, 5]}, "classes_per_step"),
        ({"class_order": "alphabetical"}, "class_order"),
        ({"class_order": [0, 1, 2, 3, 4, 4]}, "class_order"),
        ({"gama": "paper"}, "gama"),
    ],
)
def test_a_wrong_knob_is_named(knobs, place):
    with pytest.raises(InputError, match=place) as refused:
        bound(**knobs)
    assert place in refused.value.where


def test_tasks_of_several_sizes_and_a_given_order():
    method = bound(classes_per_step=[3, 1, 2], class_order=[5, 4, 3, 2, 1, 0])
    assert [sorted(set(method.targets[phase.indices].tolist())) for phase in method.phases()] == [[3, 4, 5], [2], [0, 1]]
