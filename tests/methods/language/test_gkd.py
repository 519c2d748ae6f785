"""GKD: whose tokens a step learns from, that the loss is the divergence on them, DistiLLM's schedule through a run, and that it learns."""

import pytest
import torch
from torch import Tensor

from limbeck.contract import Batch, Clock
from limbeck.errors import InputError
from limbeck.language.decoder import Decoder, decoder
from limbeck.language.divergences import SkewReverseKL, generalised_jsd
from limbeck.language.sources import ModelSource
from limbeck.language.tokens import DATA, REPLAY, STUDENT, TEACHER, TokenBatch
from limbeck.methods.language.gkd import GKD

V, L = 7, 8
SMALL = {"sampler": {"max_new": 4}, "prompts": {"kind": "prefix", "length": 2}}


def model(seed: int, layers: int = 1) -> Decoder:
    torch.manual_seed(seed)
    found = decoder(V, (2, L), layers=layers, width=16, heads=2)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return found


class Rows:
    """Rows of text (a `contract.Data`)."""

    classes = ()
    targets = None

    def __init__(self, count: int = 24) -> None:
        self.rows = TokenBatch.from_text(torch.randint(V, (count, L + 1), generator=torch.Generator().manual_seed(4))).packed()

    def __len__(self) -> int:
        return len(self.rows)

    def fetch(self, ids_B: Tensor, *, seed: int = 0, epoch: int = 0) -> tuple[Tensor, None]:
        return self.rows[ids_B], None

    def prepare(self, raw: Tensor) -> Tensor:
        return raw


def batch(rows: int = 6) -> Batch:
    return Batch(Rows(rows).rows, ids=torch.arange(rows))


def bound(**knobs: object) -> GKD:
    return GKD(**SMALL | knobs).bind(student=model(1), teacher=ModelSource([model(0)]), train=Rows(), validation=Rows(10))  # type: ignore[operator]


def learnt_from(method: GKD, clock: Clock) -> TokenBatch:
    """The tokens of a step."""
    method.weigh(batch(), clock)
    return method._kept[clock.phase_index, clock.step, clock.micro]


@pytest.mark.parametrize(("knobs", "expected"), [
    ({"student_share": 0.0}, DATA), ({"student_share": 1.0}, STUDENT), ({"student_share": 0.0, "rest": "teacher"}, TEACHER),
])  # fmt: skip
def test_the_loss_is_the_divergence_on_the_tokens_of_the_source(knobs: dict[str, object], expected: int) -> None:
    method = bound(**knobs, beta=0.3)
    tokens = learnt_from(method, Clock(3))
    assert tokens.source is not None
    assert tokens.source.unique().tolist() == [expected]
    (update,) = method.updates(batch(), Clock(3))
    valid = tokens.valid
    p = model(0)(tokens.packed()).log_softmax(-1)[valid]
    q = method.student(tokens.packed()).log_softmax(-1)[valid]
    torch.testing.assert_close(update.loss, generalised_jsd(p, q, 0.3).mean(), atol=1e-5, rtol=1e-4)
    assert float(update.metrics["drawn"]) == (0 if expected == DATA else 1)
    assert not method._kept
    update.loss.backward()
    assert all(parameter.grad is None for parameter in method.teacher.parameters())  # type: ignore[attr-defined]
    if expected != DATA:
        assert int(valid.sum()) == 6 * 4


def test_weighing_counts_what_the_step_learns_from_and_changes_nothing() -> None:
    """Invariant (vi): micro-batches are weighed by the tokens that are really learnt from."""
    for share in (0.0, 1.0):
        method = bound(student_share=share)
        assert int(method.weigh(batch(), Clock(3))) == 6 * (L if share == 0 else 4)
        (weighed,) = method.updates(batch(), Clock(3))
        (plain,) = bound(student_share=share).updates(batch(), Clock(3))
        torch.testing.assert_close(weighed.loss, plain.loss)
    parts = Batch(batch().inputs, ids=torch.arange(6)).cut(2)
    method = bound(student_share=0.0)
    (whole,) = method.updates(batch(), Clock(3))
    halves = [next(method.updates(part, Clock(3, micro=i))).loss for i, part in enumerate(parts)]
    torch.testing.assert_close(torch.stack(halves).mean(), whole.loss)


def test_a_step_is_a_function_of_the_clock_and_fresh_every_step() -> None:
    method = bound(student_share=1.0)
    one, two = learnt_from(method, Clock(3, step=5)), learnt_from(bound(student_share=1.0), Clock(3, step=5))
    assert torch.equal(one.targets, two.targets)
    assert not torch.equal(one.targets, learnt_from(method, Clock(3, step=6)).targets)
    assert not torch.equal(one.targets, learnt_from(method, Clock(3, step=5, micro=1)).targets)


def test_distillm_raises_its_threshold_where_the_student_gets_worse_and_comes_back_after_a_restart() -> None:
    knobs = {"schedule": "distillm", "divergence": "skew_reverse_kl", "distillm": {"every": 1, "capacity": 12, "rise": 0.5, "tolerance": 0.0}}
    method = bound(**knobs)
    assert isinstance(method.divergence, SkewReverseKL)
    first = learnt_from(method, Clock(3, steps=100))
    assert first.source is not None
    assert first.source.unique().tolist() == [DATA]  # φ = 0
    reference = method.source.threshold.compared  # type: ignore[attr-defined]
    rows = Rows(10).rows
    own = -method.student(rows).log_softmax(-1).gather(2, rows[:, 1, :, None]).mean()
    assert reference == pytest.approx(float(own.detach()), rel=1e-5)
    origins = []
    for step in range(1, 12):  # the student does not change, and 0 tolerance calls that worse
        tokens = learnt_from(method, Clock(3, step=step, steps=16))
        assert tokens.source is not None
        origins += tokens.source.unique().tolist()
    assert set(origins) == {STUDENT, REPLAY}
    assert method.facts() == {"threshold": 1.0, "kept_texts": 12}
    (update,) = method.updates(batch(), Clock(3, step=12, steps=16))
    assert float(update.metrics["threshold"]) == 1.0
    again = bound(**knobs)
    again.load_state_dict(method.state_dict())
    for step in (13, 14, 15):
        a, b = (learnt_from(m, Clock(3, step=step, steps=16)) for m in (method, again))
        assert torch.equal(a.packed(), b.packed())
    assert bound().state_dict() == {}
    assert bound().facts() == {}


def test_it_learns_the_teacher_on_its_own_texts() -> None:
    method = bound(student_share=1.0, divergence="reverse_kl")
    optimiser = torch.optim.AdamW(method.student.parameters(), lr=0.01)
    losses = []
    for step in range(100):
        (update,) = method.updates(batch(), Clock(3, step=step, steps=100))
        optimiser.zero_grad()
        update.loss.backward()
        optimiser.step()
        losses.append(float(update.loss.detach()))
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_what_cannot_be_is_refused() -> None:
    class Recorded:
        def get(self, tokens: TokenBatch) -> None: ...

    def bind(teacher: object, validation: object = None, **knobs: object) -> GKD:
        return GKD(**knobs).bind(student=model(1), teacher=teacher, train=Rows(), validation=validation)  # type: ignore[arg-type]

    with pytest.raises(InputError, match="a record cannot answer"):
        bind(Recorded())
    assert bind(Recorded(), student_share=0.0)  # data only: a record will do
    with pytest.raises(InputError, match="validation"):
        bind(ModelSource([model(0)]), schedule="distillm")
    with pytest.raises(InputError, match="a record cannot answer"):
        bind(Recorded(), Rows(), schedule="distillm")
    with pytest.raises(InputError, match="an ensemble"):
        bind(ModelSource([model(0), model(2)]), rest="teacher")
    with pytest.raises(InputError, match="rest"):
        GKD(rest="replay")
