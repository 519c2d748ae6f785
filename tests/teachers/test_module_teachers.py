import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from limbeck.contract import Batch
from limbeck.errors import InputError
from limbeck.models import fingerprint
from limbeck.models.small import cnn, mlp
from limbeck.teachers import EnsembleTeacher, FunctionTeacher, ModuleTeacher, as_teacher

X = torch.linspace(-1, 1, 5 * 6).reshape(5, 6)


class Table(nn.Module):
    """Answers with given logits, whatever it is asked."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.table


tables = st.integers(1, 4).flatmap(lambda members: st.lists(st.lists(st.floats(-80, 80, width=32), min_size=6, max_size=6), min_size=members, max_size=members))


@settings(deadline=None, max_examples=50)
@given(tables)
def test_an_ensembles_probabilities_are_the_mean_and_sum_to_one(rows: list[list[float]]) -> None:
    logits_TBC = torch.tensor(rows).reshape(len(rows), 2, 3)
    log_probs = EnsembleTeacher([Table(logits) for logits in logits_TBC]).logits(Batch(X[:2]))
    mean = logits_TBC.double().softmax(-1).mean(0)
    torch.testing.assert_close(log_probs.exp().double(), mean, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(2))


@settings(deadline=None, max_examples=50)
@given(tables, st.randoms(use_true_random=False))
def test_the_order_of_members_does_not_matter(rows: list[list[float]], random) -> None:
    members = [Table(torch.tensor(row).reshape(2, 3)) for row in rows]
    shuffled = random.sample(members, len(members))
    torch.testing.assert_close(EnsembleTeacher(members).logits(Batch(X[:2])), EnsembleTeacher(shuffled).logits(Batch(X[:2])), rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(tables, st.integers(1, 5))
def test_identical_members_answer_as_one(rows: list[list[float]], times: int) -> None:
    logits = torch.tensor(rows[0]).reshape(2, 3)
    answer = EnsembleTeacher([Table(logits.clone()) for _ in range(times)]).logits(Batch(X[:2]))
    torch.testing.assert_close(answer, logits.log_softmax(-1), rtol=1e-5, atol=1e-5)


def test_extreme_logits_stay_finite_and_half_precision_is_widened() -> None:
    logits = torch.tensor([[1e4, 0.0, -1e4]])
    log_probs = EnsembleTeacher([Table(logits), Table(-logits)]).logits(Batch(X[:1]))
    torch.testing.assert_close(log_probs, torch.tensor([[-0.6931, -1e4 - 0.6931, -0.6931]]), rtol=1e-4, atol=1e-3)
    assert EnsembleTeacher([Table(logits.bfloat16())]).logits(Batch(X[:1])).dtype == torch.float32
    assert EnsembleTeacher([Table(logits.double())]).logits(Batch(X[:1])).dtype == torch.float64


def test_all_logits_are_the_members_answers_without_gradient() -> None:
    members = [mlp([4], 3, (6,)), mlp([], 3, (6,))]
    wanted = torch.stack([member(X) for member in members])
    teacher = EnsembleTeacher(members)
    assert torch.equal(teacher.all_logits(Batch(X)), wanted)
    assert torch.equal(ModuleTeacher(members[0]).logits(Batch(X)), wanted[0])
    assert torch.equal(ModuleTeacher(members[0]).all_logits(Batch(X)), wanted[:1])
    x = X.clone().requires_grad_()
    for answer in (teacher.logits(Batch(x)), teacher.all_logits(Batch(x)), ModuleTeacher(members[0]).logits(Batch(x)), teacher(x)):
        assert not answer.requires_grad
    assert list(teacher.members) == members
    assert not any(p.requires_grad for p in teacher.parameters())


class Parent(nn.Module):
    """A student that registers its teacher, which `.train()` therefore reaches."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher, self.student = teacher, mlp([4], 3, (1, 4, 4))


@pytest.mark.parametrize("kind", [ModuleTeacher, lambda module: EnsembleTeacher([module, copy.deepcopy(module)])])
def test_teachers_keep_their_buffers_and_eval_mode_whatever_the_student_does(kind) -> None:
    module = nn.Sequential(cnn([3], 3, (1, 4, 4)), nn.Dropout(0.5))
    images = torch.randn(8, 1, 4, 4) + 3
    module.train()(images)  # statistics that are neither zero nor one
    teacher = kind(module)
    before, wanted = fingerprint(teacher), teacher.logits(Batch(images))
    parent = Parent(teacher)
    optimiser = torch.optim.SGD(parent.parameters(), lr=1.0, weight_decay=0.1)
    for provoke in (parent.train, teacher.train, module.train, lambda: module[0].features[1].train(), lambda: parent.requires_grad_(True)):
        provoke()
        soft = teacher.logits(Batch(images)).softmax(-1)
        loss = -(soft * parent.student(images).log_softmax(-1)).sum()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        assert torch.equal(teacher.logits(Batch(images)), wanted)
        assert fingerprint(teacher) == before
    parent.train()
    assert parent.student.training
    assert not any(part.training for part in teacher.modules())


def test_a_part_shared_with_a_training_student_goes_on_training() -> None:
    body = cnn([3], 3, (1, 4, 4))
    teacher, student = ModuleTeacher(body), nn.Sequential(body, nn.Linear(3, 3))
    student.train()
    before = fingerprint(body)
    teacher.logits(Batch(torch.randn(4, 1, 4, 4)))
    assert fingerprint(body) == before
    assert body.features[1].training


def test_a_teacher_does_not_copy_the_module_and_freezes_it() -> None:
    module = mlp([4], 3, (6,))
    ModuleTeacher(module)
    assert not module.training
    assert not any(p.requires_grad for p in module.parameters())


def test_functions_and_outputs_with_logits_can_teach() -> None:
    class Wrapped(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": x[:, :3]}

    wanted = X[:, :3]
    assert torch.equal(ModuleTeacher(Wrapped()).logits(Batch(X)), wanted)
    assert torch.equal(FunctionTeacher(lambda x: x[:, :3]).logits(Batch(X)), wanted)
    assert torch.equal(FunctionTeacher(lambda x: x[:, :3]).all_logits(Batch(X)), wanted[None])


class Served:
    def logits(self, batch: Batch) -> torch.Tensor:
        return batch.inputs[:, :3]

    def all_logits(self, batch: Batch) -> torch.Tensor:
        return self.logits(batch)[None]


def test_as_teacher_takes_what_can_teach() -> None:
    module, served = mlp([], 3, (6,)), Served()
    assert as_teacher(served) is served
    assert as_teacher(teacher := ModuleTeacher(module)) is teacher
    assert type(as_teacher(module)) is ModuleTeacher
    for several in ([module, module], (module,), nn.ModuleList([module])):
        assert type(as_teacher(several)) is EnsembleTeacher
    assert type(as_teacher(lambda x: x)) is FunctionTeacher
    assert as_teacher([ModuleTeacher(module), FunctionTeacher(lambda x: x[:, :3])]).all_logits(Batch(X)).shape == (2, 5, 3)


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda: as_teacher("pkg.mod:fn"), "a str cannot teach"),
        (lambda: as_teacher(None), "NoneType"),
        (lambda: as_teacher(dict), "cannot teach"),
        (lambda: as_teacher([]), "at least one"),
        (lambda: as_teacher([len]), "FunctionTeacher"),
        (lambda: as_teacher([mlp([], 3, (6,)), mlp([], 4, (6,))]).logits(Batch(X)), "same classes: 3, 4"),
        (lambda: FunctionTeacher(lambda x: x.sum()).logits(Batch(X)), r"shape \(\) for 5 inputs"),
        (lambda: FunctionTeacher(lambda x: x[:2]).logits(Batch(X)), r"shape \(2, 6\) for 5 inputs"),
        (lambda: FunctionTeacher(lambda x: None).logits(Batch(X)), "NoneType"),
    ],
)
def test_what_cannot_teach_is_explained(ask, says: str) -> None:
    with pytest.raises(InputError, match=says):
        ask()


def test_a_plain_hugging_face_model_can_teach() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(num_channels=1, embedding_size=4, hidden_sizes=[4], depths=[1], num_labels=3)
    network = transformers.ResNetForImageClassification(config)
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(as_teacher(network).logits(Batch(images)), network.eval()(images).logits)
