"""token_kd and next_token: the losses are what they say, whatever the divergence, the teacher's form, and the cut into micro-batches."""

import pytest
import torch
import torch.nn.functional as F

from limbeck.contract import IGNORE, Batch, Clock, OptimiserSpec
from limbeck.errors import InputError
from limbeck.language.decoder import decoder
from limbeck.language.sources import RECORDED_IDS, RECORDED_LOGP, ModelSource, recorded_signal
from limbeck.language.tokens import TokenBatch
from limbeck.methods.language.next_token import NextToken
from limbeck.methods.language.token_kd import TokenKD
from limbeck.train.config import TrainConfig
from limbeck.train.trainer import Trainer

V, L = 17, 6


def model(seed: int, width: int = 8):
    torch.manual_seed(seed)
    return decoder(V, (2, L), layers=1, width=width, heads=2)


def rows(count: int, seed: int = 0) -> torch.Tensor:
    """[B, 2, L] int64, some positions without a target."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, V, (count, L + 1), generator=draw)
    targets = ids[:, 1:].masked_fill(torch.rand(count, L, generator=draw) < 0.3, IGNORE)
    return torch.stack((ids[:, :-1], targets), 1)


class Rows:
    """Token rows as the engine's data."""

    classes, targets, vocabulary = (), None, V

    def __init__(self, inputs: torch.Tensor) -> None:
        self.inputs = inputs

    def __len__(self) -> int:
        return len(self.inputs)

    def fetch(self, ids, *, seed=0, epoch=0):
        return self.inputs[ids], None

    def prepare(self, raw):
        return raw


def loss_of(method, inputs: torch.Tensor, recorded=None) -> torch.Tensor:
    (update,) = method.updates(Batch(inputs, recorded=recorded or {}), Clock())
    return update.loss


def plain(student, teacher, inputs):
    """log p, log q [N, V] and targets [N] the long way."""
    keep = (inputs[:, 1] != IGNORE).flatten()
    logp, logq = (torch.log_softmax(net(inputs).flatten(0, 1)[keep].float(), -1) for net in (teacher, student))
    return logp, logq, inputs[:, 1].flatten()[keep]


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({}, lambda p, q, y: (p.exp() * (p - q)).sum(-1).mean()),
        ({"divergence": "reverse_kl"}, lambda p, q, y: (q.exp() * (q - p)).sum(-1).mean()),
        ({"divergence": "total_variation"}, lambda p, q, y: 0.5 * (p.exp() - q.exp()).abs().sum(-1).mean()),
        ({"soft": 0.5, "hard": 0.5}, lambda p, q, y: 0.5 * (p.exp() * (p - q)).sum(-1).mean() + 0.5 * F.nll_loss(q, y)),
        ({"soft": 0.0, "hard": 1.0}, lambda p, q, y: F.nll_loss(q, y)),
    ],
)
def test_the_loss_and_its_gradient_are_the_long_ways(knobs, expected) -> None:
    student, teacher, inputs = model(0), model(1, 12), rows(5)
    method = TokenKD(**knobs).bind(student=student, teacher=ModelSource([teacher]), num_classes=V)
    found = loss_of(method, inputs)
    found.backward()
    own = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    with torch.no_grad():
        logp = plain(student, teacher, inputs)[0]
    _, logq, targets = plain(student, teacher, inputs)
    wanted = expected(logp, logq, targets)
    wanted.backward()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(own, [p.grad for p in student.parameters()], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_temperature_multiplies_by_its_square() -> None:
    student, teacher, inputs = model(0), model(1), rows(4)
    hot = TokenKD(temperature=3.0).bind(student=student, teacher=ModelSource([teacher]))
    bare = TokenKD(temperature=3.0, tau_sq=False).bind(student=student, teacher=ModelSource([teacher]))
    torch.testing.assert_close(loss_of(hot, inputs), 9 * loss_of(bare, inputs))


def test_next_token_is_token_kd_without_the_teacher() -> None:
    student, inputs = model(0), rows(4)
    alone = NextToken().bind(student=student)
    both = TokenKD(soft=0.0, hard=1.0).bind(student=student, teacher=ModelSource([model(1)]))
    assert torch.equal(loss_of(alone, inputs), loss_of(both, inputs))


def everything(teacher, inputs: torch.Tensor, k: int) -> dict[str, torch.Tensor]:
    """What a record of k entries holds for a batch."""
    top = torch.log_softmax(teacher(inputs).float(), -1).topk(k, -1)
    return {RECORDED_IDS: top.indices, RECORDED_LOGP: top.values}


def test_a_record_of_the_whole_vocabulary_is_the_live_teacher() -> None:
    student, teacher, inputs = model(0), model(1), rows(4)
    live = TokenKD().bind(student=student, teacher=ModelSource([teacher]))

    class Recorded:
        get = staticmethod(recorded_signal)

    off = TokenKD().bind(student=student, teacher=Recorded())
    torch.testing.assert_close(loss_of(off, inputs, everything(teacher, inputs, V)), loss_of(live, inputs), rtol=1e-4, atol=1e-5)
    fewer = loss_of(off, inputs, everything(teacher, inputs, 4))
    assert fewer <= loss_of(live, inputs) + 1e-6, "k + 1 outcomes can only tell less apart"
    alone = TokenKD(tail="renorm_both").bind(student=student, teacher=Recorded())
    assert loss_of(alone, inputs, everything(teacher, inputs, 1)).item() == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(InputError, match="no recorded tokens"):
        loss_of(off, inputs)


def test_several_teachers_teach_their_mean_probability() -> None:
    student, inputs = model(0), rows(4)
    members = [model(1), model(2, 12)]
    method = TokenKD().bind(student=student, teacher=ModelSource(members))
    logps = [plain(student, member, inputs)[0] for member in members]
    _, logq, _ = plain(student, members[0], inputs)
    logp = torch.stack(logps).exp().mean(0).log()
    torch.testing.assert_close(loss_of(method, inputs), (logp.exp() * (logp - logq)).sum(-1).mean(), rtol=1e-5, atol=1e-6)


def trained(accumulate: int) -> torch.Tensor:
    student = model(0)
    method = TokenKD(hard=0.5).bind(student=student, teacher=ModelSource([model(1)]))
    config = TrainConfig(steps=5, batch_size=12, accumulate=accumulate, optimiser=OptimiserSpec(name="sgd", lr=0.5))
    Trainer(method, Rows(rows(24)), config, cpu=True).fit()
    return torch.cat([p.detach().flatten() for p in student.parameters()])


@pytest.mark.parametrize("parts", [2, 5])
def test_micro_batches_are_weighed_by_their_targets(parts: int) -> None:
    torch.testing.assert_close(trained(parts), trained(1), rtol=0, atol=2e-5)


def test_a_batch_without_a_target_gives_zero_and_a_graph() -> None:
    student, inputs = model(0), rows(2)
    inputs[:, 1] = IGNORE
    found = loss_of(TokenKD(hard=1.0).bind(student=student, teacher=ModelSource([model(1)])), inputs)
    assert found.item() == 0
    found.backward()
    assert all(p.grad is None or torch.equal(p.grad, torch.zeros_like(p.grad)) for p in student.parameters())


def test_what_teaches_must_be_language_models_of_one_vocabulary() -> None:
    with pytest.raises(InputError, match="no language model"):
        ModelSource([torch.nn.Linear(2, 2)])
    torch.manual_seed(0)
    with pytest.raises(InputError, match="differ in vocabulary"):
        ModelSource([model(0), decoder(V + 1, (2, L), layers=1, width=8, heads=2)])
    with pytest.raises(InputError, match="nothing to learn"):
        TokenKD(soft=0.0).bind(student=model(0), teacher=ModelSource([model(1)]))


def test_the_teacher_stays_at_rest() -> None:
    source = ModelSource([model(1)])
    source.train()
    assert not source.training
    assert not any(p.requires_grad for p in source.parameters())
    assert not source.get(TokenBatch.from_inputs(rows(2))).log_probs(0, 2).requires_grad
