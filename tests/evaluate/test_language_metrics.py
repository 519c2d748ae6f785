"""Metrics of language models against plain computations over all logits at once."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor, nn

from limbeck import seeds
from limbeck.contract import IGNORE
from limbeck.data import subset
from limbeck.errors import InputError
from limbeck.evaluate import language as module
from limbeck.evaluate.classifier import classifier_metrics
from limbeck.evaluate.language import LanguageMetrics, evaluate_language, exposure, kept_scores, teacher_scores, token_scores
from limbeck.language.calibration import answer_positions
from limbeck.language.models import LanguageModel
from limbeck.language.signals import Head, TakenSignal, TopKSignal
from limbeck.language.sources import ModelSource
from limbeck.language.tokens import TokenBatch

V = 13


class Tiny(LanguageModel):
    """Embeds a token, drops out in training, and answers from it alone."""

    def __init__(self, seed: int, vocabulary: int = V) -> None:
        super().__init__()
        rng = seeds.generator(seed, "tiny")
        self.vocabulary = vocabulary
        self.embedding = nn.Parameter(2 * torch.randn(vocabulary, 5, generator=rng))
        self.out = nn.Parameter(torch.randn(vocabulary, 5, generator=rng))
        self.dropout = nn.Dropout(0.5)

    def hidden(self, tokens: TokenBatch) -> Tensor:
        return self.dropout(self.embedding[tokens.input_ids])

    def head(self) -> Head:
        return Head(self.out, None)


class Rows:
    """Token rows as data that knows the bytes of its targets."""

    classes = ()
    targets = None

    def __init__(self, rows: Tensor, bytes_per_row: Tensor | None = None) -> None:
        self.rows = rows
        if bytes_per_row is not None:
            self.bytes_per_row = bytes_per_row

    def __len__(self) -> int:
        return len(self.rows)

    def fetch(self, ids_B: Tensor, *, seed: int = 0, epoch: int = 0) -> tuple[Tensor, None]:
        return self.rows[ids_B], None

    def prepare(self, raw: Tensor) -> Tensor:
        return raw


def rows(count: int = 9, L: int = 7, vocabulary: int = V) -> Tensor:
    text = torch.randint(vocabulary, (count, L + 1), generator=seeds.generator(0, "rows"))
    found = torch.stack((text[:, :-1], text[:, 1:]), 1)
    found[:, 1, :2] = IGNORE
    found[4, 1] = IGNORE
    return found


def dense(model: LanguageModel, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [N, V] and targets [N] of everything, at once."""
    model = model.eval()
    found = TokenBatch.from_inputs(inputs).rows()
    return found.gather(model(inputs)).detach(), found.targets_N


@pytest.mark.parametrize("floats", [1 << 24, 40])
def test_everything_is_that_of_all_logits_at_once(floats: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_FLOATS", floats)
    student, teacher, inputs = Tiny(1), Tiny(2), rows()
    found = evaluate_language(student, Rows(inputs), ModelSource([teacher]), batch_size=4)
    logits, targets = dense(student, inputs)
    theirs, _ = dense(teacher, inputs)
    wanted = classifier_metrics(logits, targets, theirs)
    assert found.tokens == wanted.labelled == 8 * 5
    for name in ("accuracy", "nll", "agreement", "kl_to_teacher"):
        assert getattr(found, name) == pytest.approx(getattr(wanted, name), abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(wanted.nll), rel=1e-5)
    assert found.acceptance == pytest.approx(torch.minimum(logits.softmax(-1), theirs.softmax(-1)).sum(-1).mean().item(), abs=1e-5)
    assert found.bits_per_byte is None
    assert found.kl_to_teacher_kept is None
    assert found.nonfinite == 0
    assert len(found.bins) == 10
    assert sum(row.count for row in found.bins) == found.tokens
    assert found.trust == pytest.approx(found.accuracy - found.ece)
    json.dumps(asdict(found), allow_nan=False)


def test_the_model_is_left_as_it_was_and_answers_in_eval_mode() -> None:
    student = Tiny(1).train()
    a, b = (evaluate_language(student, Rows(rows()), batch_size=size) for size in (2, 9))
    assert student.training
    assert student.dropout.training
    assert a.nll == pytest.approx(b.nll, abs=1e-6)
    assert a.agreement is a.kl_to_teacher is a.acceptance is None


def test_a_model_agrees_with_itself() -> None:
    found = evaluate_language(Tiny(1), Rows(rows()), ModelSource([Tiny(1)]))
    assert found.kl_to_teacher == pytest.approx(0, abs=1e-6)
    assert found.agreement == 1
    assert found.acceptance == pytest.approx(1, abs=1e-6)


class Recorded:
    """k entries of every position of `Tiny(2)`, looked up by row."""

    def __init__(self, inputs: Tensor, k: int, temperature: float = 1.0) -> None:
        best = (Tiny(2).eval()(inputs).detach() / temperature).log_softmax(-1).topk(k, -1)
        self.held, self.temperature = {"tokens/ids": best.indices, "tokens/logp": best.values}, temperature

    def lookup(self, ids_B: Tensor, views_B: Tensor) -> dict[str, Tensor]:
        return {name: held[ids_B] for name, held in self.held.items()}

    def get(self, tokens: TokenBatch) -> TopKSignal:
        told = tokens.rows().annotations
        return TopKSignal(told["tokens/ids"], told["tokens/logp"], temperature=self.temperature)


def test_a_record_of_k_entries() -> None:
    inputs = rows()
    live = evaluate_language(Tiny(1), Rows(inputs), ModelSource([Tiny(2)]))
    coarser = 0.0
    for k in (1, 4, V - 1):
        found = evaluate_language(Tiny(1), Rows(inputs), Recorded(inputs, k), batch_size=2)
        assert found.kl_to_teacher is found.acceptance is None
        assert found.agreement == live.agreement
        assert coarser <= found.kl_to_teacher_kept + 1e-7
        assert found.kl_to_teacher_kept <= live.kl_to_teacher + 1e-6
        coarser = found.kl_to_teacher_kept
    assert coarser == pytest.approx(live.kl_to_teacher, rel=1e-3)  # what a clamped tail of a few 1e-7 costs
    itself = evaluate_language(Tiny(2), Rows(inputs), Recorded(inputs, 4, temperature=2.0))
    assert itself.kl_to_teacher_kept == pytest.approx(0, abs=1e-6)


def test_signals_without_a_distribution_tell_nothing() -> None:
    class Taken:
        def get(self, tokens: TokenBatch) -> TakenSignal:
            return TakenSignal(torch.zeros(len(tokens.rows())))

    found = evaluate_language(Tiny(1), Rows(rows()), Taken())
    assert found.kl_to_teacher is found.kl_to_teacher_kept is found.agreement is None


def test_bits_per_byte_of_all_and_of_some_rows() -> None:
    inputs, counts = rows(), torch.arange(1, 10)
    data = Rows(inputs, counts)
    found = evaluate_language(Tiny(1), data)
    assert found.bits_per_byte == pytest.approx(found.nll * found.tokens / (math.log(2) * 45), rel=1e-9)
    chosen = torch.tensor([5, 1])
    for some in (evaluate_language(Tiny(1), data, indices=chosen), evaluate_language(Tiny(1), subset(data, chosen))):
        assert some.tokens == 10
        assert some.bits_per_byte == pytest.approx(some.nll * 10 / (math.log(2) * 8), rel=1e-9)


def test_answers_only() -> None:
    inputs = rows()
    found = evaluate_language(Tiny(1), Rows(inputs, torch.ones(9, dtype=torch.int64)), answers_only=True)
    tokens = TokenBatch.from_inputs(inputs)
    chosen = replace(tokens, targets=tokens.targets.masked_fill(~answer_positions(tokens), IGNORE)).rows()
    logits = chosen.gather(Tiny(1).eval()(inputs)).detach()
    assert found.tokens == 8
    assert found.bits_per_byte is None
    assert found.accuracy == pytest.approx((logits.argmax(-1) == chosen.targets_N).double().mean().item())


def test_rows_that_are_no_distribution() -> None:
    model = Tiny(1)
    with torch.no_grad():
        model.embedding[3] = torch.nan
    inputs = rows()
    found = evaluate_language(model, Rows(inputs), ModelSource([Tiny(2)]))
    broken = (TokenBatch.from_inputs(inputs).rows().gather(inputs[:, 0, :, None])[:, 0] == 3).sum().item()
    assert found.nonfinite == broken > 0
    assert found.nll is found.ece is found.perplexity is found.kl_to_teacher is found.trust is None
    assert 0 <= found.accuracy < 1
    assert 0 <= found.agreement < 1
    json.dumps(asdict(found), allow_nan=False)


def test_guesses_take_the_first_of_equals() -> None:
    scores, logq = token_scores(torch.tensor([[0.0, 1.0, 1.0], [2.0, 0.0, 2.0]]), torch.tensor([1, 2]))
    assert scores["correct"].tolist() == [1.0, 0.0]
    assert torch.allclose(logq.exp().sum(-1), torch.ones(2))


def test_forbidden_entries_of_a_teacher_cost_nothing() -> None:
    logp = torch.tensor([[0.5, 0.5, 0.0]]).log()
    logq = torch.tensor([[0.25, 0.5, 0.25]]).log()
    found = teacher_scores(logq, logp)
    assert found["kl"].item() == pytest.approx(0.5 * math.log(2))
    assert found["acceptance"].item() == pytest.approx(0.75)
    kept = kept_scores(logq, torch.tensor([[1, 2, -1]]), torch.cat((logp[:, 1:], torch.zeros(1, 1)), 1))
    assert kept["kl_kept"].item() == pytest.approx(0.5 * math.log(2), abs=1e-6)


def test_exposure_is_a_difference_of_divergences() -> None:
    base = evaluate_language(Tiny(1), Rows(rows()), ModelSource([Tiny(2)]))
    worse = replace(base, kl_to_teacher=(base.kl_to_teacher or 0) + 0.5)
    assert exposure(base, worse) == pytest.approx(0.5)
    assert exposure(base, LanguageMetrics(1, 0.0, 1.0, None, 1.0, 0.0, ())) is None


def test_what_cannot_be_evaluated_is_refused() -> None:
    nothing = rows()
    nothing[:, 1] = IGNORE
    with pytest.raises(InputError, match="no token"):
        evaluate_language(Tiny(1), Rows(nothing))
    with pytest.raises(InputError, match="vocabulary"):
        evaluate_language(Tiny(1), Rows(rows()), ModelSource([Tiny(2, vocabulary=V + 1)]))
    with pytest.raises(InputError, match="token rows"):
        evaluate_language(Tiny(1), Rows(torch.zeros(2, 3)))
