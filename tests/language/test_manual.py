"""Python's own topics as text: rows for language models and paragraphs with classes, without any file."""

import sys

import pytest
import torch

from limbeck.errors import InputError
from limbeck.language.manual import paragraphs, python_manual, python_manual_topics


def test_every_paragraph_is_in_one_part_only() -> None:
    found = python_manual(length=32)
    train, test = ("".join(map(chr, data.rows.tokens_T.tolist())) for data in (found.train, found.test))
    some = [text for _, text in paragraphs() if text.isascii() and len(text) > 200]
    assert len(some) > 300
    for text in some[::7]:
        assert (text in train) is not (text in test)
    assert 5 < len(found.train) / len(found.test) < 15


def test_rows_are_the_same_every_time() -> None:
    assert python_manual(length=16).train.inputs_fingerprint == python_manual(length=16).train.inputs_fingerprint


def test_topics_have_paragraphs_of_their_own() -> None:
    found = python_manual_topics(classes=5, length=24)
    assert len(found.train.classes) == found.num_classes == 5
    rows, targets = found.test.fetch(torch.arange(len(found.test)))
    assert rows.shape[1:] == (2, 24)
    assert set(targets.tolist()) == set(range(5))


@pytest.mark.parametrize("classes", [1, 10_000])
def test_a_number_of_topics_that_is_not_there(classes: int) -> None:
    with pytest.raises(InputError, match="classes"):
        python_manual_topics(classes=classes)


def test_a_python_without_topics_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(InputError, match="without its documentation"):
        python_manual()
