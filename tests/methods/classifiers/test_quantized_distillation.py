"""Quantised distillation as a method (1802.05668): what the steps do to which weights, what comes out, what a restart needs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck.contract import IGNORE, Batch, Clock
from limbeck.data import ArrayData
from limbeck.errors import InputError
from limbeck.losses import hinton
from limbeck.losses import quantisation as q
from limbeck.methods import KD, QuantizedDistillation
from limbeck.methods.classifiers.quantisation_part import mean_gradient_norms
from limbeck.models.packed import decode
from limbeck.teachers import ModuleTeacher

CLASSES = 3


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, CLASSES))


@pytest.fixture
def data():
    torch.manual_seed(7)
    return ArrayData(torch.randn(60, 1, 8, 8), torch.randint(0, CLASSES, (60,)), ["a", "b", "c"])


@pytest.fixture
def batch(data):
    return Batch(*data.fetch(torch.arange(20)), torch.arange(20))


def bound(data, student=None, teacher=None, **knobs):
    student = network() if student is None else student
    teacher = ModuleTeacher(network(1)) if teacher is None else teacher
    return QuantizedDistillation(**knobs).bind(student=student.train(), teacher=teacher, train=data, num_classes=CLASSES)


def loop(method, data, steps, *, lr=0.05, start=(0, 0), optimisers=None, stop=None, momentum=0.9):
    """A person's own loop over the phases, `steps` batches each; `stop` = (phase, step) returns there, before that step, for a restart."""
    for index, phase in enumerate(method.phases()):
        if index < start[0]:
            continue
        begun = index == start[0] and start[1] > 0
        clock = Clock(seed=0, phase=phase.name, phase_index=index, steps=steps)
        if not begun:
            method.enter(phase, clock, None)
            optimisers = None
        players = {name: p.module for name, p in method.players().items() if name in phase.trains}
        fresh = {n: torch.optim.SGD(m.parameters(), lr=lr if n == "student" else 1e-3, momentum=momentum) for n, m in players.items()}
        for name, optimiser in (fresh if optimisers else {}).items():
            optimiser.load_state_dict(optimisers[name])
        for module in players.values():
            module.train()
        for step in range(start[1] if begun else 0, steps):
            if stop == (index, step):
                return {name: optimiser.state_dict() for name, optimiser in fresh.items()}
            clock.step = step
            ids = torch.arange(20) + 20 * (step % 3)
            for update in method.updates(Batch(*data.fetch(ids), ids), clock):
                parameters = list(players[update.player].parameters())
                update.loss.backward(inputs=parameters)
                fresh[update.player].step()
                fresh[update.player].zero_grad()
                method.after_step(update.player, clock)
        method.leave(phase, clock, None)
    return None


def update_and_gradients(method, batch, clock=None):
    parameters = dict(method.student.named_parameters())
    (update,) = method.updates(batch, clock or Clock(phase="qd"))
    return update, dict(zip(parameters, torch.autograd.grad(update.loss, list(parameters.values())), strict=True))


def index_of(method, name):
    codes = method.codes()
    return dict(zip(codes.shapes, codes.index.split(codes.sizes), strict=True))[name]


def same_state(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- QD --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["batchmean", "code"])
def test_qd_is_hintons_loss_at_the_quantised_weights_with_its_gradient_there(data, batch, reduction):
    method = bound(data, bits=2, bucket=16, reduction=reduction)
    quantised = method.inference().train()
    loss = hinton(quantised(batch.inputs), method.teacher.logits(batch), batch.targets, 2.0, 0.7, reduction)
    loss.backward()
    update, gradients = update_and_gradients(method, batch)
    assert update.player == "student"
    torch.testing.assert_close(update.loss, loss)
    for name, parameter in quantised.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)
    torch.testing.assert_close(0.7 * update.metrics["soft"] + 0.3 * update.metrics["hard"], update.loss)


def test_qd_collects_batch_norm_statistics_under_the_quantised_weights(data, batch):
    method = bound(data, bits=2, bucket=None)
    quantised = method.inference().train()
    quantised(batch.inputs)
    list(method.updates(batch, Clock(phase="qd")))
    assert torch.equal(method.student[1].running_mean, quantised[1].running_mean)
    assert method.student[1].num_batches_tracked == 1
    plain = network().train()
    plain(batch.inputs)
    assert not torch.equal(method.student[1].running_mean, plain[1].running_mean)


def test_qd_leaves_the_full_precision_weights_alone_at_rate_0_and_accumulates_steps_below_the_rounding(data):
    method = bound(data, bits=2)
    before = copy.deepcopy(dict(method.student.named_parameters()))
    loop(method, data, 3, lr=0.0)
    assert same_state(before, dict(method.student.named_parameters()))
    levels = index_of(method, "6.weight")
    loop(method, data, 3, lr=1e-6)
    assert torch.equal(index_of(method, "6.weight"), levels)
    assert all(not torch.equal(before[name], p) for name, p in method.student.named_parameters() if name.endswith("weight"))


def test_qd_tends_to_plain_distillation_with_many_levels(data, batch):
    student = network()
    teacher = ModuleTeacher(network(1))
    (plain,) = KD(temperature=2.0, weight=0.7).bind(student=student.train(), teacher=teacher).updates(batch, Clock())
    exact = torch.autograd.grad(plain.loss, list(student.parameters()))
    far = {}
    for bits in (4, 8, 16):
        _, gradients = update_and_gradients(bound(data, copy.deepcopy(student), teacher, bits=bits), batch)
        far[bits] = float(torch.cat([(g - e).flatten() for g, e in zip(gradients.values(), exact, strict=True)]).norm())
    assert far[8] < far[4] / 4
    assert far[16] < far[8] / 20
    assert far[16] < 1e-3 * float(torch.cat([e.flatten() for e in exact]).norm())


def test_weight_0_is_quantisation_aware_training_without_a_teacher(data, batch):
    method = QuantizedDistillation(weight=0.0, bits=2).bind(student=network().train(), train=data)
    update, _ = update_and_gradients(method, batch)
    torch.testing.assert_close(update.loss, F.cross_entropy(method.inference().train()(batch.inputs), batch.targets))
    unlabelled = ArrayData(torch.randn(9, 1, 8, 8), torch.full((9,), IGNORE))
    with pytest.raises(InputError, match="learns from labels"):
        QuantizedDistillation(weight=0.0).bind(student=network(), train=unlabelled)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_a_teacher_that_agrees_with_the_quantised_student_pulls_nowhere(data, batch, temperature):
    method = bound(data, bits=3, weight=1.0, temperature=temperature)
    method.student.eval()
    method.teacher = ModuleTeacher(method.inference())
    update, gradients = update_and_gradients(method, batch)
    assert abs(float(update.loss.detach())) < 1e-6
    assert max(float(g.abs().max()) for g in gradients.values()) < 1e-6


def test_truncated_gradient_clamps_the_weights_and_stops_beyond_one(data, batch):
    student = network()
    with torch.no_grad():
        student[6].weight[0, :2] = torch.tensor([1.7, -3.0])
    method = bound(data, student, bits=4, gradient="truncated")
    shipped = method.inference()[6].weight
    assert shipped.max() == 1
    assert shipped.min() == -1
    _, gradients = update_and_gradients(method, batch)
    assert gradients["6.weight"][0, :2].tolist() == [0, 0]
    plain = bound(data, nn.Sequential(*(copy.deepcopy(student))), bits=4)
    with torch.no_grad():
        plain.student[6].weight.clamp_(-1, 1)
    _, expected = update_and_gradients(plain, batch)
    torch.testing.assert_close(gradients["6.weight"][:, 2:], expected["6.weight"][:, 2:])


def test_gradient_through_the_scale_differs_at_the_extrema_only_and_keeps_each_tensors_sum(data, batch):
    _, plain = update_and_gradients(bound(data, bits=2, bucket=None), batch)
    method = bound(data, bits=2, bucket=None, gradient="through_scale")
    _, scaled = update_and_gradients(method, batch)
    for name, parameter in method.student.named_parameters():
        torch.testing.assert_close(scaled[name].sum(), plain[name].sum(), rtol=1e-4, atol=1e-5)
        elsewhere = torch.ones(parameter.numel(), dtype=torch.bool)
        elsewhere[torch.stack([parameter.argmax(), parameter.argmin()])] = False
        torch.testing.assert_close(scaled[name].flatten()[elsewhere], plain[name].flatten()[elsewhere])
    assert not torch.allclose(scaled["6.weight"], plain["6.weight"])


def test_stochastic_rounding_is_drawn_from_the_clock_and_never_shipped(data, batch):
    method = bound(data, bits=2, stochastic=True)
    nearest = next(bound(data, bits=2).updates(batch, Clock(phase="qd"))).loss.item()
    losses = [next(method.updates(batch, Clock(phase="qd", step=step))).loss.item() for step in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert nearest not in losses
    assert torch.equal(method.codes().index, bound(data, bits=2).codes().index)


# ---- which tensors ---------------------------------------------------------------------------------------------------


def quantised_names(data, **knobs):
    return list(bound(data, **knobs).codes().shapes)


def test_which_tensors_are_quantised(data):
    everything = [name for name, _ in network().named_parameters()]
    assert quantised_names(data) == everything
    assert quantised_names(data, quantise="weights") == ["0.weight", "3.weight", "6.weight"]
    assert quantised_names(data, keep_first_last=True) == ["1.weight", "1.bias", "3.weight", "3.bias"]
    assert quantised_names(data, keep_first_last=True, quantise="weights") == ["3.weight"]


def test_tensors_that_are_kept_are_shipped_in_full_precision(data):
    method = bound(data, bits=2, quantise="weights", keep_first_last=True)
    loop(method, data, 2)
    shipped, trained = method.inference().state_dict(), method.student.state_dict()
    assert [name for name in shipped if not torch.equal(shipped[name], trained[name])] == ["3.weight"]
    assert method.facts()["size"]["honest"] > method.facts()["size"]["full"] / 3


def test_nothing_left_to_quantise_is_refused(data):
    with pytest.raises(InputError, match="no tensor"):
        bound(data, nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES)), keep_first_last=True)


# ---- DQ --------------------------------------------------------------------------------------------------------------


def test_dq_gradient_of_a_point_sums_range_times_gradient_over_its_weights(data, batch):
    method = bound(data, mode="dq", bits=2, bucket=32)
    method.enter(method.phases()[0], Clock(), None)
    points = method.points.values_S
    (update,) = method.updates(batch, Clock(phase="dq"))
    assert update.player == "points"
    (gradient,) = torch.autograd.grad(update.loss, [points])
    quantised, codes = method.inference().train(), method.codes()
    soft_target = method.reference(batch.inputs)
    hinton(quantised(batch.inputs), soft_target, batch.targets, 2.0, 0.7).backward()
    g = torch.cat([p.grad.flatten() for p in quantised.parameters()])
    span = (codes.high - codes.low)[q.buckets(codes.sizes, 32, g.device).of_entry]
    torch.testing.assert_close(gradient, torch.zeros_like(gradient).index_add(0, codes.index, span * g), rtol=1e-4, atol=1e-6)


class Refuses:
    def logits(self, batch):
        raise AssertionError("dq learns from its own network")


def test_dq_learns_from_its_own_network_moves_only_sorted_points_and_keeps_its_statistics(data):
    student = network()
    with torch.no_grad():
        student[6].weight.copy_(torch.randn(student[6].weight.shape) ** 3 / 3)  # far from evenly spread
    method = bound(data, student, Refuses(), mode="dq", bits=2, weight=1.0, bucket=None)
    before = copy.deepcopy(method.student.state_dict())
    loop(method, data, 1)
    start = method.points.values_S.detach().clone()
    assert QuantizedDistillation(mode="dq").bind(student=network(), train=data).teacher is None
    losses = []
    clock = Clock(phase="dq")
    optimiser = torch.optim.SGD(method.points.parameters(), lr=1e-3)
    for step in range(40):
        clock.step = step
        (update,) = method.updates(Batch(*data.fetch(torch.arange(60))), clock)
        losses.append(float(update.loss.detach()))
        update.loss.backward(inputs=list(method.points.parameters()))
        optimiser.step()
        optimiser.zero_grad()
        method.after_step("points", clock)
        for points in method.points.values_S.split(method.counts):
            assert torch.equal(points, points.sort().values)
    assert losses[-1] < losses[0] / 3
    assert not torch.equal(method.points.values_S, start)
    assert same_state({n: t for n, t in before.items() if n in method.chosen.names}, dict(method.student.named_parameters()))
    assert not torch.equal(before["1.running_mean"], method.student[1].running_mean)
    assert torch.equal(method.inference()[1].running_mean, method.student[1].running_mean)
    assert torch.equal(method.reference[1].running_mean, before["1.running_mean"])


def test_dq_assigns_anew_at_every_step(data, batch):
    method = bound(data, mode="dq", bits=2, allocation="equal")
    list(method.updates(batch, Clock(phase="dq")))
    before = method.codes().index.clone()
    method.points.values_S.data[-4:] = torch.tensor([0.0, 0.01, 0.02, 0.03])
    (update,) = method.updates(batch, Clock(phase="dq"))
    loss = hinton(method.inference().train()(batch.inputs), method.reference(batch.inputs), batch.targets, 2.0, 0.7)
    torch.testing.assert_close(update.loss, loss)
    assert not torch.equal(method.codes().index, before)


def test_points_are_sorted_within_each_tensor_after_a_step(data):
    method = bound(data, mode="dq", bits=1, allocation="equal")
    method.points.values_S.data = torch.tensor([0.7, 0.2] * len(method.counts))
    method.after_step("student", Clock())
    assert method.points.values_S[0] == 0.7
    method.after_step("points", Clock())
    assert method.points.values_S.tolist() == pytest.approx([0.2, 0.7] * len(method.counts))


def test_points_are_shared_by_the_gradients_of_the_plain_loss(data):
    method = bound(data, mode="dq", bits=3)
    method.enter(method.phases()[0], Clock(), None)
    norms = mean_gradient_norms(network().eval(), method.chosen.names, data, 0)
    assert method.counts == q.allocate_points(8, norms)
    assert sum(method.counts) == 8 * len(norms) == len(method.points.values_S)
    assert len(set(method.counts)) > 1
    module = network().eval()  # 60 samples fit the first of the five batches
    F.cross_entropy(module(data.inputs), data.targets).backward()
    assert norms == pytest.approx([float(p.grad.norm()) for p in module.parameters()], rel=1e-4)
    equal = bound(data, mode="dq", bits=3, allocation="equal")
    equal.enter(equal.phases()[0], Clock(), None)
    assert equal.counts == [8] * len(norms)


def test_gradient_norms_are_of_the_mean_over_five_batches_of_labelled_samples():
    torch.manual_seed(0)
    targets = torch.randint(0, CLASSES, (700,))
    targets[::2] = IGNORE
    data = ArrayData(torch.randn(700, 1, 8, 8), targets, ["a", "b", "c"])
    seen = []

    class Watched:
        targets = data.targets
        prepare = staticmethod(data.prepare)

        @staticmethod
        def fetch(ids):
            seen.append(ids)
            return data.fetch(ids)

    norms = mean_gradient_norms(network().eval(), ("0.weight",), Watched, 3)
    assert [len(ids) for ids in seen] == [64] * 5
    assert (torch.cat(seen) % 2 == 1).all()
    module = network().eval()
    F.cross_entropy(module(data.inputs[torch.cat(seen)]), targets[torch.cat(seen)]).backward()
    assert norms == pytest.approx([5 * float(module[0].weight.grad.norm())], rel=1e-4)


def test_automatic_allocation_needs_labels():
    method = QuantizedDistillation(mode="dq").bind(student=network())
    with pytest.raises(InputError, match="labelled"):
        method.enter(method.phases()[0], Clock(), None)


# ---- mixed and pm ----------------------------------------------------------------------------------------------------


def test_mixed_alternates_ends_on_qd_and_each_phase_moves_its_own(data):
    method = bound(data, mode="mixed", bits=2, rounds=1)
    phases = method.phases()
    assert [(p.name, p.epochs, tuple(p.trains)) for p in phases] == [("qd0", 1, ("student",)), ("dq0", 1, ("points",)), ("qd1", 1, ("student",))]
    moved = []

    def snapshot():
        return method.student[6].weight.detach().clone(), method.points.values_S.detach().clone()

    leave, enter = method.leave, method.enter

    def watched_enter(*arguments):
        enter(*arguments)
        moved.append(snapshot())

    def watched_leave(*arguments):
        leave(*arguments)
        moved.append(snapshot())

    method.enter, method.leave = watched_enter, watched_leave
    loop(method, data, 2)
    changed = [[not torch.equal(a, b) for a, b in zip(moved[2 * i], moved[2 * i + 1], strict=True)] for i in range(3)]
    assert changed == [[True, False], [False, True], [True, False]]
    assert all(torch.equal(moved[2 * i + 1][part], moved[2 * i + 2][part]) for i in range(2) for part in range(2))  # nothing moves in between
    assert not method.student.training
    shipped = method.inference()[6].weight
    assert torch.equal(shipped, method.codes().tensors()["6.weight"])
    assert all(not torch.equal(shipped, weight) for weight, _ in moved)


def test_each_dq_phase_looks_anew_at_the_network_it_finds(data, batch):
    method = bound(data, mode="mixed", bits=2, rounds=2)
    for name in ("qd0", "dq0"):
        method.enter(next(p for p in method.phases() if p.name == name), Clock(phase=name), None)
        list(method.updates(batch, Clock(phase=name)))
    with torch.no_grad():
        method.student[6].weight.mul_(-2.0)
    method.enter(next(p for p in method.phases() if p.name == "dq1"), Clock(phase="dq1"), None)
    assert same_state(method.reference.state_dict(), method.student.state_dict())
    (update,) = method.updates(batch, Clock(phase="dq1"))
    expected = hinton(method.inference().train()(batch.inputs), method.reference(batch.inputs), batch.targets, 2.0, 0.7)
    torch.testing.assert_close(update.loss, expected)


def test_pm_has_nothing_to_train_and_ships_the_rounded_network(data):
    method = QuantizedDistillation(mode="pm", bits=3, bucket=16).bind(student=network())
    assert list(method.phases()) == []
    for name, parameter in method.inference().named_parameters():
        assert torch.equal(parameter, q.quantise_uniform(dict(network().named_parameters())[name], bits=3, bucket=16))


# ---- knobs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["qd", "mixed"])
def test_training_weights_needs_a_teacher_unless_the_weight_is_0(data, mode):
    with pytest.raises(InputError, match="needs a teacher"):
        QuantizedDistillation(mode=mode).bind(student=network(), train=data)
    QuantizedDistillation(mode=mode, weight=0.0).bind(student=network(), train=data)


def test_wrong_knobs_are_refused():
    with pytest.raises(InputError, match="stochastic"):
        QuantizedDistillation(mode="dq", stochastic=True)
    with pytest.raises(InputError, match="bits"):
        QuantizedDistillation(bits=0)


def test_defaults_are_those_of_the_code():
    config = QuantizedDistillation().config
    assert (config.bits, config.bucket, config.weight, config.temperature) == (4, 256, 0.7, 2.0)
    points = config.points_optimiser
    assert (points.name, points.lr, points.momentum, points.nesterov) == ("sgd", 1e-5, 0.9, True)


# ---- what comes out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("knobs", [{"mode": "qd", "bits": 2}, {"mode": "dq", "bits": 2}, {"mode": "qd", "quantise": "weights", "bucket": None}], ids=str)
def test_the_artefact_holds_quantised_weights_and_decodes_exactly(data, batch, knobs):
    method = bound(data, **knobs)
    loop(method, data, 3)
    trained = copy.deepcopy(method.student.state_dict())
    artefact = method.artefact()
    state = artefact.module.state_dict()
    tensors = artefact.encoder.encode(state)
    assert artefact.encoder.decoder == "limbeck.models.packed:decode"
    assert same_state(decode(tensors), state)
    assert same_state(method.inference().state_dict(), state)
    assert same_state(method.student.state_dict(), trained)
    assert not artefact.module.training
    rebuilt = network(5).eval()
    rebuilt.load_state_dict(decode(tensors))
    assert torch.equal(rebuilt(batch.inputs), artefact.module(batch.inputs))
    facts = artefact.facts
    assert facts["metrics"]["packed_bytes"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert facts["size"]["full"] == sum(t.numel() * t.element_size() for t in state.values())
    for name, counts in facts["occupancy"].items():
        assert sum(counts) == state[name].numel()
    if method.config.mode == "dq":
        assert [len(counts) for counts in facts["occupancy"].values()] == method.counts


def test_inference_never_gives_unquantised_weights(data):
    for mode in ("qd", "dq", "mixed", "pm"):
        method = bound(data, mode=mode, bits=1, bucket=None, allocation="equal", **({"rounds": 1} if mode == "mixed" else {}))
        for _ in range(2):
            assert all(len(p.unique()) <= 2 for p in method.inference().parameters())
            loop(method, data, 1)


# ---- restarts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "stop"), [("qd", (0, 2)), ("dq", (0, 2)), ("mixed", (0, 1)), ("mixed", (1, 2)), ("mixed", (2, 0))])
def test_a_stopped_run_goes_on_bit_by_bit(data, mode, stop):
    knobs = {"mode": mode, "bits": 2, "stochastic": mode == "qd", "rounds": 1}
    whole = bound(data, **knobs)
    loop(whole, data, 4)
    first = bound(data, **knobs)
    optimisers = copy.deepcopy(loop(first, data, 4, stop=stop))
    saved = copy.deepcopy((first.state_dict(), {name: p.module.state_dict() for name, p in first.players().items()}))
    second = bound(data, student=network(9), **knobs)
    second.load_state_dict(saved[0])
    for name, player in second.players().items():
        player.module.load_state_dict(saved[1][name])
    loop(second, data, 4, start=stop, optimisers=optimisers)
    assert same_state(second.inference().state_dict(), whole.inference().state_dict())
    assert same_state(second.student.state_dict(), whole.student.state_dict())
    assert second.counts == whole.counts
