"""Self-distillation: the loss, the rounds, the estimate of α, resuming; and the exact mode against closed forms and published figures."""

import io
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from limbeck import seeds
from limbeck.claims.studies.self_distillation import PUBLISHED, ridge_table, toy
from limbeck.contract import IGNORE, Batch, Clock
from limbeck.errors import InputError
from limbeck.losses import prob_mse
from limbeck.losses.kernel_ridge import effective_ridge, factorise, greedy_schedule, mixture_weights, optimal_alpha, self_distil, solve, spectral_filters
from limbeck.methods import SelfDistillation
from limbeck.methods.classifiers.self_distillation import SelfDistilledRidge, mixed_mse, norm_penalty, rbf

few = settings(deadline=None, max_examples=30)
numbers = st.integers(0, 2**32)
PAGE = Path(__file__).parents[3] / "docs" / "methods" / "self_distillation.md"


# ---- the loss of eq. 9 ------------------------------------------------------------------------------------------------------


def loss_inputs(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    noise = torch.Generator().manual_seed(seed)
    logits, teacher = torch.randn(2, 5, 4, generator=noise, dtype=dtype)
    return logits, F.one_hot(torch.randint(4, (5,), generator=noise), 4).to(dtype), teacher.softmax(-1)


@few
@given(numbers, st.floats(0, 1))
def test_the_loss_is_the_mean_over_batch_and_classes_and_affine_in_alpha(seed, alpha):
    logits, labels, teacher = loss_inputs(seed)
    s = logits.softmax(-1)
    by_hand = sum(alpha * (s[b, c] - labels[b, c]) ** 2 + (1 - alpha) * (s[b, c] - teacher[b, c]) ** 2 for b in range(5) for c in range(4)) / 20
    torch.testing.assert_close(mixed_mse(logits, labels, teacher, alpha), by_hand)
    ends = mixed_mse(logits, labels, teacher, 1.0), mixed_mse(logits, labels, teacher, 0.0)
    torch.testing.assert_close(mixed_mse(logits, labels, teacher, alpha), alpha * ends[0] + (1 - alpha) * ends[1])


@few
@given(numbers, st.floats(0, 1))
def test_an_oracle_teacher_is_supervision_and_a_mixed_target_has_the_same_gradient(seed, alpha):
    logits, labels, teacher = loss_inputs(seed)
    torch.testing.assert_close(mixed_mse(logits, labels, labels, alpha), prob_mse(logits, labels))
    logits.requires_grad_()
    (two_terms,) = torch.autograd.grad(mixed_mse(logits, labels, teacher, alpha), logits)
    (one_target,) = torch.autograd.grad(prob_mse(logits, alpha * labels + (1 - alpha) * teacher), logits)
    torch.testing.assert_close(two_terms, one_target, rtol=1e-9, atol=1e-12)


def test_the_penalty_sums_norms_that_are_not_squared_and_is_flat_at_zero():
    parameters = [torch.tensor([3.0, 4.0], requires_grad=True), torch.tensor([[-2.0]], requires_grad=True), torch.zeros(3, requires_grad=True)]
    assert norm_penalty(parameters).item() == 7.0
    gradients = torch.autograd.grad(norm_penalty(parameters), parameters)
    assert [g.tolist() for g in gradients] == [[pytest.approx(0.6), pytest.approx(0.8)], [[-1.0]], [0.0, 0.0, 0.0]]


# ---- the rounds, in a loop of one's own -------------------------------------------------------------------------------------


@dataclass
class Points:
    """A data set in memory."""

    inputs: Tensor
    targets: Tensor | None
    classes: tuple[str, ...] = ("a", "b", "c")

    def __len__(self) -> int:
        return len(self.inputs)

    def fetch(self, ids_B: Tensor, *, seed: int = 0, epoch: int = 0) -> tuple[Tensor, Tensor | None]:
        return self.inputs[ids_B], None if self.targets is None else self.targets[ids_B]

    def prepare(self, raw: Tensor) -> Tensor:
        return raw


def points(seed: int, count: int = 48) -> Points:
    noise = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 6, generator=noise)
    return Points(inputs, (inputs[:, :3] + 0.8 * torch.randn(count, 3, generator=noise)).argmax(1))


class Bench:
    """What the engine lends, without the engine."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.asked: list[Points] = []

    @torch.no_grad()
    def outputs(self, forward, data, indices=None):
        self.asked.append(data)
        was = forward.training
        forward.eval()
        found = forward(data.inputs)
        forward.train(was)
        return found


def network(seed: int) -> nn.Module:
    """Batch norm has state beside its parameters, dropout draws in every step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 3))


def method(**knobs) -> SelfDistillation:
    given = {"train": points(0), "validation": points(1), "test": points(2)} | knobs.pop("data", {})
    return SelfDistillation(**knobs).bind(student=network(7), fresh_student=network, num_classes=3, seed=5, **given)


STEPS = 6  # of a phase: 2 epochs of 3 batches of 16


def train(method, stop=None, checkpoint=None, watch=None, bench=None):
    """A trainer in miniature. Ends after `stop` batches with a checkpoint's bytes (at a phase's end: after `leave`, before the next `enter`)."""
    data, bench = points(0), bench or Bench()
    saved = {"phase": 0, "step": 0}
    if checkpoint is not None:
        saved = torch.load(io.BytesIO(checkpoint), weights_only=True)
        method.load_state_dict(saved["method"])
        method.players()["student"].module.load_state_dict(saved["student"])

    def written(phase, step, optimiser):
        buffer = io.BytesIO()
        student = method.players()["student"].module.state_dict()
        torch.save({"phase": phase, "step": step, "method": method.state_dict(), "student": student, "optimiser": optimiser}, buffer)
        return buffer.getvalue()

    for index, phase in list(enumerate(method.phases()))[saved["phase"] :]:
        clock, begun = Clock(5, phase.name, index), saved["step"] if index == saved["phase"] else 0
        if stop == index * STEPS:
            return written(index, 0, {})
        if begun == 0:
            method.enter(phase, clock, bench)
        module = method.players()["student"].module.train()
        parameters = list(module.parameters())
        optimiser = torch.optim.Adam(parameters, lr=0.02)
        if begun:
            optimiser.load_state_dict(saved["optimiser"])
        for step in range(begun, STEPS):
            if begun < step and index * STEPS + step == stop:
                return written(index, step, optimiser.state_dict())
            clock.step = step
            torch.manual_seed(seeds.derive(5, index, step))
            ids = torch.randperm(48, generator=seeds.generator(5, "order", index, step // 3))[step % 3 * 16 :][:16]
            for update in method.updates(Batch(data.inputs[ids], data.targets[ids], ids), clock):
                assert update.player == "student"
                update.loss.backward(inputs=parameters)
                optimiser.step()
                optimiser.zero_grad()
                method.after_step("student", clock)
        method.leave(phase, clock, bench)
        if watch is not None:
            watch(phase.name)
    return None


def weights_of(module: nn.Module) -> list[Tensor]:
    return [value.clone() for value in module.state_dict().values()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_phases_are_the_rounds_and_two_trainings_a_round_where_alpha_is_estimated():
    fixed, estimated = method(rounds=3, alpha=0.4), method(rounds=3, alpha="estimate")
    assert [phase.name for phase in fixed.phases()] == ["round-1", "round-2", "round-3"]
    names = ["round-1", "round-2-teacher-only", "round-2", "round-3-teacher-only", "round-3"]
    assert [phase.name for phase in estimated.phases()] == names == [phase.name for phase in estimated.phases()]
    assert [phase.name for phase in method(rounds=1, alpha="estimate", data={"validation": None}).phases()] == ["round-1"]


def test_round_one_learns_from_the_labels_alone():
    chain = method(rounds=2, alpha=0.3, penalty=0.01)
    assert chain.frozen() == []
    batch = Batch(points(0).inputs, points(0).targets)
    chain.student.eval()
    (update,) = chain.updates(batch, Clock())
    expected = F.mse_loss(chain.student(batch.inputs).softmax(-1), F.one_hot(batch.targets, 3).float())
    torch.testing.assert_close(update.loss, expected + 0.01 * sum(p.norm() for p in chain.student.parameters()))


def test_later_rounds_start_afresh_with_the_network_before_as_frozen_teacher():
    chain, given, bench = method(rounds=3, alpha=(0.3, 0.6)), None, Bench()
    for index, phase in enumerate(chain.phases()):
        before = chain.student
        chain.enter(phase, Clock(5, phase.name, index), bench)
        student = chain.players()["student"].module
        if index == 0:
            assert student is before
        else:
            assert chain.alpha == (0.3, 0.6)[index - 1]
            assert same(weights_of(student), weights_of(network(seeds.derive(5, "self_distillation", phase.name))))
            (teacher,) = chain.frozen()  # earlier ones are dropped
            assert same(weights_of(teacher), weights_of(before))
            assert not any(p.requires_grad for p in teacher.parameters())
            assert not any(part.training for part in teacher.modules())
            given = weights_of(teacher)
        with torch.no_grad():
            for p in student.parameters():
                p.add_(0.1 * (index + 1))
        chain.leave(phase, Clock(5, phase.name, index), bench)
    assert same(given, weights_of(chain.previous))
    assert chain.inference() is student


def test_the_teacher_sees_the_batch_as_the_student_does_and_gets_no_gradient():
    chain, batch = method(rounds=2, alpha=0.25, penalty=0.0), Batch(torch.randn(8, 6), torch.randint(3, (8,)))
    for index, phase in enumerate(chain.phases()):
        chain.enter(phase, Clock(5, phase.name, index), Bench())
    seen = []
    chain.previous.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    chain.previous.requires_grad_(True)
    chain.student.eval()
    (update,) = chain.updates(batch, Clock())
    update.loss.backward()
    assert len(seen) == 1
    assert seen[0] is batch.inputs
    assert all(p.grad is None for p in chain.previous.parameters())
    assert all(p.grad is not None for p in chain.student.parameters())
    teacher = chain.previous(batch.inputs).softmax(-1).detach()
    torch.testing.assert_close(update.loss, mixed_mse(chain.student(batch.inputs), F.one_hot(batch.targets, 3), teacher, 0.25))


def test_soft_labels_of_mixed_samples_are_taken_as_they_are():
    chain, soft = method(rounds=1, penalty=0.0), torch.rand(8, 3).softmax(-1)
    chain.student.eval()
    x = torch.randn(8, 6)
    (update,) = chain.updates(Batch(x, soft), Clock())
    torch.testing.assert_close(update.loss, prob_mse(chain.student(x), soft))


@pytest.mark.parametrize("clip", [True, False])
def test_alpha_is_estimated_from_round_one_and_a_network_that_saw_the_teacher_only(clip):
    chain, bench, outputs = method(rounds=3, alpha="estimate", clip=clip), Bench(), {}
    held_out = points(1)

    def watch(name):
        outputs[name] = bench.outputs(chain.student, held_out).softmax(-1)
        if name.endswith("teacher-only"):
            assert chain.alpha == 0.0
        elif name != "round-1":
            assert chain.alpha == chain.alphas[int(name[-1]) - 2]

    train(chain, watch=watch, bench=bench)
    truth = F.one_hot(held_out.targets, 3)
    expected = [optimal_alpha(outputs["round-1"], outputs[f"round-{t}-teacher-only"], truth, clip=clip) for t in (2, 3)]
    assert chain.alphas == [float(e.alpha) for e in expected]
    facts = chain.facts()
    assert [e["unclipped"] for e in facts["estimates"]] == [float(e.unclipped) for e in expected]
    assert facts["trainings"] == facts["metrics"]["trainings"] == 5
    assert facts["metrics"]["alpha_round_3"] == chain.alphas[1]
    assert [row["alpha"] for row in facts["rounds"]] == [1.0, *chain.alphas]
    assert facts["implied_mixture_weights"] == mixture_weights(chain.alphas).tolist()
    json.dumps(facts)


def test_the_network_that_saw_the_teacher_only_teaches_nobody():
    chain, finals = method(rounds=3, alpha="estimate"), {}
    train(chain, watch=lambda name: finals.setdefault(name, (weights_of(chain.student), [weights_of(m) for m in chain.frozen()])))
    assert same(finals["round-2-teacher-only"][1][0], finals["round-1"][0])
    assert same(finals["round-2"][1][0], finals["round-1"][0])
    assert same(finals["round-3"][1][0], finals["round-2"][0])


def test_alpha_depends_on_the_validation_data_and_never_on_the_test_data():
    found = {}
    for name, data in {"usual": {}, "no test": {"test": None}, "other test": {"test": points(9)}, "other validation": {"validation": points(9)}}.items():
        chain = method(rounds=2, alpha="estimate", clip=False, data=data)
        train(chain)
        found[name] = chain.alphas
    assert found["usual"] == found["no test"] == found["other test"] != found["other validation"]


def test_facts_hold_what_the_rounds_reached():
    chain, bench, expected = method(rounds=2, alpha=0.4), Bench(), []

    def accuracy(data):
        return float((bench.outputs(chain.student, data).argmax(1) == data.targets).double().mean())

    train(chain, watch=lambda name: expected.append({"validation_accuracy": accuracy(points(1)), "test_accuracy": accuracy(points(2))}))
    facts = chain.facts()
    assert facts["rounds"] == [{"round": 1, "alpha": 1.0, **expected[0]}, {"round": 2, "alpha": 0.4, **expected[1]}]
    assert facts["implied_mixture_weights"] == [0.4, 0.6]
    assert facts["implied_ridge_factor_in_the_limit"] == 2.5
    assert (facts["trainings"], facts["estimates"]) == (2, [])
    bare = method(rounds=2, alpha=0.0, data={"validation": None, "test": None})
    train(bare)
    assert bare.facts()["rounds"] == [{"round": 1, "alpha": 1.0}, {"round": 2, "alpha": 0.0}]
    assert bare.facts()["implied_ridge_factor_in_the_limit"] is None


@pytest.fixture(scope="module")
def undisturbed():
    chain = method(rounds=3, alpha="estimate", clip=False)
    train(chain)
    return weights_of(chain.student), chain.facts()


@pytest.mark.parametrize("stop", [2, STEPS, STEPS + 2, 2 * STEPS, 2 * STEPS + 4, 3 * STEPS, 4 * STEPS + 1])
def test_a_restart_in_or_between_rounds_changes_no_bit(undisturbed, stop):
    checkpoint = train(method(rounds=3, alpha="estimate", clip=False), stop=stop)
    assert checkpoint is not None
    again = method(rounds=3, alpha="estimate", clip=False)
    assert train(again, checkpoint=checkpoint) is None
    assert same(weights_of(again.student), undisturbed[0])
    assert again.facts() == undisturbed[1]


def test_a_module_that_is_copied_for_every_round_is_not_frozen_by_the_first():
    import copy

    start = network(7)
    chain = SelfDistillation(rounds=2, alpha=0.4).bind(student=start, fresh_student=lambda seed: copy.deepcopy(start), seed=5)
    for index, phase in enumerate(chain.phases()):
        chain.enter(phase, Clock(5, phase.name, index), Bench())
    assert all(p.requires_grad for p in chain.players()["student"].module.parameters())


@pytest.mark.parametrize(
    ("knobs", "where"),
    [
        ({"alpha": "estimate", "data": {"validation": None}}, "data.validation"),
        ({"alpha": "estimate", "data": {"validation": Points(torch.randn(4, 6), None)}}, "data.validation"),
        ({"data": {"train": Points(torch.randn(4, 6), torch.tensor([0, 1, IGNORE, 2]))}}, "data.labelled"),
        ({"alpha": 1.5}, "alpha"),
        ({"alpha": "guess"}, "alpha"),
        ({"alpha": []}, "alpha"),
        ({"rounds": 3, "alpha": (0.1, 0.2, 0.3)}, ""),
        ({"rounds": 0}, "rounds"),
    ],
)
def test_what_cannot_work_is_refused_with_its_place(knobs, where):
    with pytest.raises(InputError) as caught:
        method(**knobs)
    assert caught.value.where == where


def test_rounds_need_fresh_students():
    with pytest.raises(InputError, match="fresh network"):
        SelfDistillation(rounds=2).bind(student=network(0))
    SelfDistillation(rounds=1).bind(student=network(0))


# ---- the exact mode ---------------------------------------------------------------------------------------------------------


def sine(seed: int, count: int = 12, outputs: int = 1) -> tuple[Tensor, Tensor]:
    noise = torch.Generator().manual_seed(seed)
    x = torch.rand(count, generator=noise, dtype=torch.float64)
    y = torch.sin(2 * math.pi * x)[:, None] + 0.4 * torch.randn(count, outputs, generator=noise, dtype=torch.float64)
    return x, y[:, 0] if outputs == 1 else y


def test_the_toy_of_the_notebook_to_five_decimals():
    found = toy()
    assert found["largest_deviation"] < 5e-6
    assert len(found) == 3 * 7 + 1
    assert found["alpha_0.25_round_4"] == pytest.approx(PUBLISHED[0.25][3], abs=5e-6)


def test_greedy_weights_stay_near_the_best_column_for_every_ridge():
    found = ridge_table(0, problems=25)
    assert found["worst_ratio_greedy"] < 1.2
    assert found["worst_ratio_best_fixed"] > 1.3
    assert found["worst_ratio_alpha_0"] > 3
    assert found["ridge_4_greedy_unclipped"] < found["ridge_4_greedy"]
    assert found == ridge_table(0, problems=25) != ridge_table(1, problems=25)


@few
@given(numbers, st.lists(st.floats(0, 1), min_size=1, max_size=4), st.integers(1, 9))
def test_any_round_is_the_recursion_with_the_last_weight_kept(seed, alphas, t):
    x, y = sine(seed)
    model = SelfDistilledRidge(rbf(20.0), ridge=0.3, alpha=alphas).fit(x, y)
    extended = [alphas[min(i, len(alphas) - 1)] for i in range(t - 1)]
    kernel = rbf(20.0)(x[:, None], x[:, None])
    expected = self_distil(factorise(kernel), y[:, None], extended, 0.3)
    grid = torch.linspace(0, 1, 7, dtype=torch.float64)
    torch.testing.assert_close(model.predict(grid, rounds=t), (rbf(20.0)(grid[:, None], x[:, None]) @ expected.duals[-1])[:, 0], rtol=0, atol=1e-10)
    torch.testing.assert_close(model.predict(x, rounds=t), expected.fits[-1, :, 0], rtol=0, atol=1e-9)


def test_the_limit_is_ridge_regression_with_the_amplified_ridge():
    x, y = sine(1, outputs=2)
    model = SelfDistilledRidge(rbf(20.0), ridge=0.3, alpha=(0.9, 0.2)).fit(x, y)
    grid = torch.linspace(0, 1, 7, dtype=torch.float64)
    plain = SelfDistilledRidge(rbf(20.0), ridge=effective_ridge(0.3, 0.2), alpha=1).fit(x, y)
    torch.testing.assert_close(model.predict(grid), plain.predict(grid, rounds=1))
    torch.testing.assert_close(model.predict(grid), model.predict(grid, rounds=10**6))
    assert model.predict(grid).shape == (7, 2)
    assert SelfDistilledRidge(rbf(20.0), ridge=0.3, alpha=0).fit(x, y).predict(grid).abs().max() == 0


@pytest.mark.parametrize("per_output", [False, True])
def test_estimated_weights_are_the_greedy_schedule(per_output):
    (x, y), (x_v, y_v) = sine(1, outputs=2), sine(2, outputs=2)
    kernel = rbf(20.0)
    model = SelfDistilledRidge(kernel, ridge=0.005, alpha="estimate", rounds=4, per_output=per_output).fit(x, y, validation=(x_v, y_v))
    factor, k_v = factorise(kernel(x[:, None], x[:, None])), kernel(x_v[:, None], x[:, None])
    expected = greedy_schedule(factor, y, k_v, y_v, 0.005, 4, per_output=per_output)
    torch.testing.assert_close(model.alphas, expected.alphas)
    torch.testing.assert_close(model.predict(x_v, rounds=4), k_v @ self_distil(factor, y, expected.alphas, 0.005).duals[-1])
    report = model.report(rounds=4)
    assert report["alphas"] == expected.alphas.tolist()
    json.dumps(report, allow_nan=False)
    errors = [row["validation_error"] for row in report["rounds"][:4]]
    assert max(errors) == errors[0] > errors[1]


def test_of_several_ridges_the_best_plain_fit_on_validation_is_taken():
    (x, y), held_out = sine(1), sine(2)
    ridges = (1e-4, 0.1, 0.5, 10.0)
    errors = []
    for ridge in ridges:
        plain = SelfDistilledRidge(rbf(20.0), ridge=ridge).fit(x, y)
        errors.append(float((plain.predict(held_out[0], rounds=1) - held_out[1]).square().mean()))
    assert SelfDistilledRidge(rbf(20.0), ridge=ridges).fit(x, y, validation=held_out).ridge == ridges[errors.index(min(errors))]


def test_the_report_states_filters_freedom_errors_and_the_effective_ridge():
    x, y = sine(3)
    model = SelfDistilledRidge(rbf(20.0), ridge=0.2, alpha=0.25).fit(x, y, validation=sine(4))
    report = model.report(rounds=3)
    json.dumps(report, allow_nan=False)
    factor = factorise(rbf(20.0)(x[:, None], x[:, None]))
    filters = spectral_filters(factor.values, [0.25, 0.25], 0.2)
    assert [row["round"] for row in report["rounds"]] == [1, 2, 3, "limit"]
    assert report["limit_ridge"] == 0.8
    assert report["mixture_weights"] == pytest.approx(mixture_weights([0.25, 0.25]).tolist())
    for row, b in zip(report["rounds"], filters, strict=False):
        assert row["filter"] == pytest.approx(b.tolist())
        assert row["degrees_of_freedom"] == pytest.approx(float(b.sum()))
    assert report["rounds"][-1]["filter"] == pytest.approx((factor.values / (factor.values + 0.8)).tolist())
    plain = rbf(20.0)(x[:, None], x[:, None]) @ solve(factor, y[:, None], 0.2)
    assert report["rounds"][0]["training_error"] == pytest.approx(float((plain[:, 0] - y).square().mean()))
    assert SelfDistilledRidge(rbf(20.0), ridge=0.2, alpha=0).fit(x, y).report(rounds=1)["limit_ridge"] is None


@pytest.mark.parametrize(
    ("call", "where"),
    [
        (lambda x, y: SelfDistilledRidge(rbf(1.0), ridge=0.0), "ridge"),
        (lambda x, y: SelfDistilledRidge(rbf(1.0), ridge=1.0, alpha=2.0), "alpha"),
        (lambda x, y: SelfDistilledRidge(rbf(1.0), ridge=1.0, alpha="estimate").fit(x, y), "validation"),
        (lambda x, y: SelfDistilledRidge(rbf(1.0), ridge=[1.0, 2.0]).fit(x, y), "validation"),
        (lambda x, y: SelfDistilledRidge(rbf(1.0), ridge=1.0).fit(x, y[:-1]), "Y"),
        (lambda x, y: SelfDistilledRidge(lambda a, b: a @ b.flip(0).T, ridge=1.0).fit(x, y), "kernel"),
        (lambda x, y: SelfDistilledRidge(rbf(1.0), ridge=1.0).fit(x, y).predict(x, rounds=0), "rounds"),
        (lambda x, y: SelfDistilledRidge(rbf(1.0), ridge=1.0).fit(x, y).predict(x, rounds=1.5), "rounds"),
    ],
)
def test_wrong_use_of_the_exact_mode_is_refused_with_its_place(call, where):
    with pytest.raises(InputError) as caught:
        call(*sine(0))
    assert caught.value.where == where


def test_a_schedule_that_ends_outside_the_bounds_has_no_continuation():
    (x, y), (x_v, y_v) = sine(1), sine(2)
    model = SelfDistilledRidge(rbf(20.0), ridge=5.0, alpha="estimate", rounds=2, clip=False).fit(x, y, validation=(x_v, 3 * y_v))
    assert float(model.alphas[-1]) > 1
    model.predict(x, rounds=2)
    with pytest.raises(InputError, match="outside"):
        model.predict(x, rounds=4)


def test_the_example_of_the_page_runs_as_printed():
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(example, str(PAGE), "exec"), names)
    for name, printed in re.findall(r"^(\w+) = .*# (-?[\d.]+)$", example, flags=re.MULTILINE):
        assert round(float(names[name]), len(printed.partition(".")[2])) == float(printed), name
    assert len(re.findall(r"# -?[\d.]+$", example, flags=re.MULTILINE)) >= 3
