"""Teachers of another tokenizer, as a method: the loss is the sum that it says, on data and on the student's own tokens, and it learns."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from limbeck.contract import Batch, Clock
from limbeck.errors import InputError
from limbeck.language.cross_tokenizer import GOLD, CrossTokenizerSource, cross_tokenizer_loss, matching
from limbeck.language.decoder import Decoder, decoder
from limbeck.language.sources import ModelSource
from limbeck.language.tokenizers import Bytes, Characters
from limbeck.language.tokens import TokenBatch
from limbeck.methods.language.cross_tokenizer import CrossTokenizer

LETTERS = Characters("abé ", end=True)
L = 9


def model(vocabulary: int, seed: int) -> Decoder:
    torch.manual_seed(seed)
    found = decoder(vocabulary, (2, L), layers=1, width=16, heads=2)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return found


class Rows:
    """Rows of letters (a `contract.Data`)."""

    classes = ()
    targets = None

    def __init__(self, tokenizer: object = LETTERS) -> None:
        ids = torch.randint(4, (6, L + 1), generator=torch.Generator().manual_seed(4))
        self.rows = TokenBatch.from_text(ids).packed()
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self.rows)

    def fetch(self, ids_B: Tensor, *, seed: int = 0, epoch: int = 0) -> tuple[Tensor, None]:
        return self.rows[ids_B], None

    def prepare(self, raw: Tensor) -> Tensor:
        return raw


def bound(teacher: Decoder | None = None, data: Rows | None = None, **knobs: object) -> CrossTokenizer:
    teacher = model(257, 0) if teacher is None else teacher
    method = CrossTokenizer(**knobs).bind(student=model(LETTERS.vocabulary, 1), teacher=ModelSource([teacher]), train=data or Rows())  # type: ignore[arg-type]
    assert isinstance(method, CrossTokenizer)
    return method


def batch() -> Batch:
    return Batch(Rows().rows, ids=torch.arange(6))


@pytest.mark.parametrize("objective", ["uld", "gold"])
def test_the_loss_is_soft_times_groups_plus_hard_times_cross_entropy(objective: str) -> None:
    method = bound(objective=objective, soft=0.7, hard=0.4, strategy="last")
    (update,) = method.updates(batch(), Clock(2))
    tokens = TokenBatch.of(batch())
    rows = tokens.rows()
    q = method.student(tokens.packed()).log_softmax(-1).flatten(0, 1)
    hard = -q.gather(1, rows.targets_N[:, None]).mean()
    pair = CrossTokenizerSource(model(257, 0).eval(), Bytes(), LETTERS).pair(tokens)
    what = GOLD(matching(LETTERS, Bytes()), 0.5) if objective == "gold" else method.objective
    soft = cross_tokenizer_loss(rows.gather(method.student.hidden(tokens)), method.student.head(), rows.targets_N, pair, what, strategy="last")
    torch.testing.assert_close(update.loss, 0.7 * soft.loss + 0.4 * hard)
    torch.testing.assert_close(update.metrics["hard"], hard)
    torch.testing.assert_close(update.metrics["soft"], soft.loss)
    assert ("matched" in update.metrics) == (objective == "gold")
    assert method.facts() == ({"matched_ids": 4} if objective == "gold" else {})  # a, b, the space and the end; é is two bytes
    update.loss.backward()
    assert all(parameter.grad is None for parameter in method.teacher.parameters())  # type: ignore[attr-defined]
    assert int(method.weigh(batch(), Clock(2))) == 6 * L


def test_the_students_own_tokens_are_learnt_from_and_the_cross_entropy_can_be_left_out() -> None:
    method = bound(student_share=1.0, hard=0.0, objective="gold", weights=(1.0, 0.5), sampler={"max_new": 5}, prompts={"kind": "prefix", "length": 2})
    assert method.source.sampler.stop == (LETTERS.eos,)
    (update,) = method.updates(batch(), Clock(2))
    assert float(update.metrics["drawn"]) == 1
    assert "hard" not in update.metrics
    torch.testing.assert_close(update.loss, 1.5 * (update.metrics["matched"] + 0.5 * update.metrics["rest"]))


def test_the_student_learns_a_text_that_only_the_teacher_of_bytes_was_told_of() -> None:
    """Both read the same prompts; the student never has a cross-entropy with the text, and has a low one in the end."""
    text = "abé ab béa " * 12
    theirs = TokenBatch.from_text(torch.tensor(Bytes().encode(text)[:120]).view(6, 20))
    teacher = model(257, 0)
    for _, optimiser in zip(range(60), adam(teacher, 0.02), strict=False):
        (-likelihood(teacher, theirs)).backward()
        optimiser.step()
    data = Rows()
    data.rows = TokenBatch.from_text(torch.tensor(LETTERS.encode(text)[:120]).view(6, 20)).packed()
    told = TokenBatch.from_inputs(data.rows)
    after = {}
    for name, knobs in {"gold": {"objective": "gold", "weights": (1.0, 1.0)}, "uld": {"objective": "uld"}}.items():
        method = bound(teacher, data, hard=0.0, soft=1.0, **knobs)  # type: ignore[arg-type]
        assert likelihood(method.student, told).item() < -1.6
        for step, optimiser in zip(range(60), adam(method.student, 0.005), strict=False):
            (update,) = method.updates(Batch(data.rows), Clock(2, step=step))
            update.loss.backward()
            optimiser.step()
        after[name] = -likelihood(method.student, told).item()
    assert after["gold"] < 0.6  # matched ids say which letter comes
    assert after["uld"] > 1.5  # sorted masses alone say how sure to be, not of what


def likelihood(network: torch.nn.Module, tokens: TokenBatch) -> Tensor:
    """log q(y), the mean over targets."""
    return network(tokens.packed()).log_softmax(-1).gather(2, tokens.targets[..., None]).mean()


def adam(network: torch.nn.Module, lr: float) -> Iterator[torch.optim.Optimizer]:
    """One optimiser again and again, its gradients cleared each time."""
    optimiser = torch.optim.AdamW(network.parameters(), lr=lr)
    while True:
        optimiser.zero_grad()
        yield optimiser


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match="which tokenizer made them"):
        bound(data=Rows(tokenizer=None))
    with pytest.raises(InputError, match="'bytes' has 257 tokens, the teacher 40"):
        bound(model(40, 0))
    with pytest.raises(InputError, match="no tokenizer"):
        bound(teacher_tokenizer="morse")
    with pytest.raises(InputError, match="a record"):
        CrossTokenizer().bind(student=model(5, 1), teacher=SimpleNamespace(get=None), train=Rows())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="nor both 0"):
        CrossTokenizer(weights=(0.0, 0.0))
