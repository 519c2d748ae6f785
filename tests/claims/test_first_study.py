"""The parts of FIRST's claim: disjoint texts, what arms report, and coverage, all with small stand-ins."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from limbeck.claims.studies import first as study
from limbeck.contract import IGNORE, Batch, Clock
from limbeck.data import ArrayData, Splits
from limbeck.errors import InputError
from limbeck.evaluate.classifier import classifier_metrics
from limbeck.language.columns import columns_mlp
from limbeck.language.models import LanguageModel
from limbeck.language.signals import Head
from limbeck.language.tokens import TokenBatch
from limbeck.methods.classifiers.supervised import Supervised


def data(count: int = 40, seed: int = 0) -> ArrayData:
    rng = torch.Generator().manual_seed(seed)
    return ArrayData(torch.randn(count, 6, generator=rng), torch.arange(count) % 3, ("a", "b", "c"))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Splits:
    whole = Splits(data(), data(12, 1))
    shifted = Splits(data(), data(12, 2))
    monkeypatch.setattr(study, "features", lambda drop_words=0.0: shifted if drop_words else whole)
    return whole


def inputs(part: ArrayData) -> Tensor:
    return part.fetch(torch.arange(len(part)))[0]


def test_parts_of_the_texts_do_not_overlap(small: Splits) -> None:
    a, b = study.texts(0, 15), study.texts(15, 25)
    rows = torch.cat((inputs(a.train), inputs(b.train)))
    assert torch.equal(rows.sort(0).values, inputs(small.train).sort(0).values)
    assert not torch.equal(rows, inputs(small.train))
    assert torch.equal(inputs(a.test), inputs(small.test))
    assert torch.equal(inputs(study.texts(0, 15).train), inputs(a.train))
    for first, count in ((30, 11), (-1, 3), (0, 0)):
        with pytest.raises(InputError, match="cannot be had"):
            study.texts(first, count)


def test_arms_report_how_sure_they_are(small: Splits) -> None:
    student = columns_mlp([], 3, [6])
    method = study.JudgedLabels().bind(student=student, train=small.train, test=small.test)
    found = method.facts()["metrics"]
    with torch.no_grad():
        logits = student(inputs(small.test))
    wanted = classifier_metrics(logits, small.test.targets)
    assert found["trust"] == pytest.approx(wanted.accuracy - found["ece10"])
    assert found["confidence"] == pytest.approx(logits.softmax(-1).amax(-1).mean().item(), abs=1e-6)
    assert found["shift_gap"] == pytest.approx(found["shifted_ece10"] - found["ece10"])
    assert found["shifted_accuracy"] == study.confidence(student, study.features(0.2).test)["accuracy"]
    assert found["shifted_ece10"] != found["ece10"]


def test_unlabelled_texts_do_not_count() -> None:
    part = data(9)
    half = part.with_targets(torch.where(torch.arange(9) < 4, part.targets, IGNORE))
    student = columns_mlp([], 3, [6])
    assert study.confidence(student, half) == study.confidence(student, part.subset(torch.arange(4)))


def test_judged_methods_train_as_they_do(small: Splits) -> None:
    batch = Batch(*small.train.fetch(torch.arange(8)))
    student = columns_mlp([], 3, [6])
    for judged, plain in ((study.JudgedLabels, Supervised),):
        (a,), (b,) = (kind().bind(student=student, train=small.train, test=small.test).updates(batch, Clock()) for kind in (judged, plain))
        assert torch.equal(a.loss, b.loss)
    assert study.JudgedFIRST(answers="classes").produces == "classifier"
    assert study.JudgedKD.paper.arxiv == "1503.02531"


def test_models_over_columns_see_nothing_else() -> None:
    model = columns_mlp([5], 3, [6], first=2, stop=4)
    x = torch.randn(4, 6)
    other = x.clone()
    other[:, [0, 1, 4, 5]] = 0
    assert torch.equal(model(x), model(other))
    assert not torch.equal(model(x), model(torch.zeros(4, 6)))
    assert model(x).shape == (4, 3)
    assert next(p.shape for p in columns_mlp([5], 3, [2, 3], first=1).parameters()) == (5, 5)
    assert isinstance(model.features[0], nn.Module)
    for first, stop in ((4, 4), (0, 7), (3, 2)):
        with pytest.raises(InputError, match="there are none"):
            columns_mlp([5], 3, [6], first=first, stop=stop)


class Tiny(LanguageModel):
    """Embeds a token and answers from it alone."""

    def __init__(self) -> None:
        super().__init__()
        self.vocabulary = 60
        self.embedding, self.out = (nn.Parameter(torch.randn(60, 4, generator=torch.Generator().manual_seed(seed))) for seed in (0, 1))

    def hidden(self, tokens: TokenBatch) -> Tensor:
        return self.embedding[tokens.input_ids]

    def head(self) -> Head:
        return Head(self.out)


class Text:
    """Token rows as data."""

    vocabulary = 60

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def fetch(self, ids_B: Tensor) -> tuple[Tensor, None]:
        return self.rows[ids_B], None


def test_coverage_is_a_mean_over_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randint(60, (5, 2, 8), generator=torch.Generator().manual_seed(0))
    model, text = Tiny(), Text(rows)
    monkeypatch.setattr(study, "text_file", lambda *args, **kwargs: Splits(text, text))
    monkeypatch.setattr(study, "smollm2", lambda **kwargs: model)
    found = study.coverage(tokens=20, length=8)
    best = model(rows[:3]).softmax(-1).flatten(0, 1).sort(-1, descending=True).values
    assert found["positions"] == 24
    for k in (1, 5, 10, 50):
        assert found[f"kappa_{k}"] == pytest.approx(best[:, :k].sum(-1).mean().item(), abs=1e-5)
