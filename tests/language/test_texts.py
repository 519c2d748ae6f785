"""Text sources: windows by hand, bytes that add up, books held out, prompts and answers, through batches unharmed, plain refusals."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from limbeck.contract import IGNORE, Batch
from limbeck.data import (
    CATALOGUE,
    AugmentSpec,
    BatchPlan,
    Joined,
    Splits,
    Views,
    ViewSpec,
    evaluation_batches,
    hold_out,
    inputs_fingerprint,
    origins,
    root,
    stratified_subset,
    stream,
    subset,
)
from limbeck.errors import InputError
from limbeck.language.texts import NOVELS, TokenData, columns, novels, prompts, text8, text_file, windows
from limbeck.language.tokenizers import Bytes, Characters, tokenizer_from
from limbeck.language.tokens import PADDING, TokenBatch

WORDS = "the quick brown fox jumps over the lazy dog and runs away "


class WithStart(Bytes):
    """Bytes whose model wants 256 in front of every row, as Gemma wants its <bos>."""

    start = 256


def all_rows(data: TokenData) -> torch.Tensor:
    return data.fetch(torch.arange(len(data)))[0]


# windows


@pytest.mark.parametrize("stride", [None, 1, 3, 7])
def test_windows_by_hand(stride: int | None) -> None:
    text = "abcdefghijklmnopqrstu"
    data = windows([text], Characters(text), 5, stride)
    rows = all_rows(data)
    starts = range(0, 21 - 5, stride or 5)
    assert rows.dtype == torch.int64
    assert rows.tolist() == [[list(range(s, s + 5)), list(range(s + 1, s + 6))] for s in starts]
    assert data.bytes_per_row.tolist() == [5] * len(starts)
    tokens = TokenBatch.from_inputs(rows)
    assert tokens.whole
    assert data.tokenizer.decode(tokens.targets[0].tolist()) == text[1:6]


def test_a_start_stands_in_front_of_every_row() -> None:
    rows = all_rows(windows(["abcdefgh"], WithStart(), 4))
    assert rows.tolist() == [[[256, *b"abc"], [*b"abcd"]], [[256, *b"efg"], [*b"efgh"]]]


def test_no_window_reaches_into_the_next_text() -> None:
    data = windows(["aaaaaaaa", "bbbbbb"], Characters("ab"), 3)
    assert {tuple(row.flatten().tolist()) for row in all_rows(data)} == {(0,) * 6, (1,) * 6}
    assert len(data) == 2 + 1


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=8, max_size=60), st.integers(2, 5))
def test_bytes_add_up(text: str, length: int) -> None:
    """The bytes of the rows' targets are those of the text that they spell; without overlaps each byte counts at most once."""
    if not text.strip():
        return
    for tokenizer in (Bytes(), WithStart(), Characters(text)):
        data = windows([text], tokenizer, length)
        targets = all_rows(data)[:, 1]
        assert data.bytes_per_row.tolist() == [sum(map(len, tokenizer.pieces(row.tolist()))) for row in targets]
        assert data.bytes_total <= len(text.encode())
        assert data.bytes_total >= len(text.encode()) - 4 * (length + 1)  # the first token, and what is left at the end


def test_bits_per_byte_do_not_depend_on_the_tokenizer() -> None:
    """A model that gives every byte probability 1/256 costs 8 bits a byte, whether its tokens are bytes or characters."""
    text = "héllo wörld, naïve café — " * 5
    for tokenizer in (Bytes(), Characters(text)):
        data = windows([text], tokenizer, 6)
        nll = sum(len(piece) * math.log(256) for piece in tokenizer.pieces(all_rows(data)[:, 1].flatten().tolist()))
        assert nll / (math.log(2) * data.bytes_total) == pytest.approx(8)


@pytest.mark.parametrize(
    ("texts", "arguments", "said"),
    [
        (["abcdef"], {"length": 1}, "'length' is 1"),
        (["abcdef"], {"length": True}, "'length' is True"),
        (["abcdef"], {"length": 4, "stride": 0}, "'stride' is 0"),
        (["abcdef", "  \n"], {"length": 4}, "text 1 is empty"),
        (["abcdef", "abcd"], {"length": 4}, "length: text 1 has 4 tokens, a window takes 5"),
        (["abc\ud800def"], {"length": 4}, "surrogate"),
    ],
)
def test_impossible_windows_are_named(texts: list[str], arguments: dict[str, int], said: str) -> None:
    with pytest.raises(InputError, match=said):
        windows(texts, Bytes(), **arguments)


# as data


def test_it_is_data_like_any_other() -> None:
    """Subsets, held-out parts, origins, fingerprints, joined parts: rows stay whole and can be found again in the whole."""
    data = windows([WORDS * 8], Bytes(), 8)
    assert data.targets is None
    assert data.classes == ()
    assert data.vocabulary == 257
    assert Splits(data, data).input_shape == (2, 8)
    assert data.prepare(all_rows(data)).dtype == torch.int64
    few = stratified_subset(data, 9, seed=0)
    rest, held = hold_out(few, 3, seed=1)
    assert len(rest) == 6
    for part in (few, rest, held, subset(data, torch.tensor([4, 2]))):
        whole = root(part)
        assert whole is data
        rows, targets = part.fetch(torch.arange(len(part)))
        assert targets is None
        assert torch.equal(rows, all_rows(data)[origins(part)])
        assert inputs_fingerprint(part) == data.inputs_fingerprint
    assert not set(origins(rest).tolist()) & set(origins(held).tolist())
    assert len(Joined(data, few)) == len(data) + 9


def test_fingerprints_tell_texts_tokenizers_and_lengths_apart() -> None:
    made = [windows([text], tokenizer, length) for text in (WORDS, WORDS.upper()) for tokenizer in (Bytes(), WithStart()) for length in (4, 5)]
    made += [windows([WORDS], Bytes(), 4, 2), windows([WORDS], Characters(WORDS), 4)]
    assert len({data.inputs_fingerprint for data in made}) == len(made)
    assert windows([WORDS], Bytes(), 4).inputs_fingerprint == made[0].inputs_fingerprint


def test_preprocessing_is_json() -> None:
    told = windows([WORDS], Bytes(), 4).preprocessing()
    assert json.loads(json.dumps(told)) == told
    assert told["tokenizer"] == "bytes"
    assert (told["length"], told["stride"]) == (4, 4)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_pass_rows_unharmed(workers: int) -> None:
    """The loader (with the default augmentation, with workers, cut into micro-batches), views, evaluation: int64, bit for bit."""
    data = windows([WORDS * 8], Bytes(), 8)
    plan = BatchPlan(len(data), 6, seed=0)
    views = Views(ViewSpec(count=1), AugmentSpec(), data)
    for shown in (None, views) if not workers else (None,):
        steps = list(stream(data, plan, augment=AugmentSpec(), start=0, stop=4, num_classes=257, micro=2, workers=workers, views=shown))
        assert len(steps) == 4
        for batch in [batch for step in steps for batch in step]:
            assert batch.inputs.dtype == torch.int64
            assert batch.targets is None
            assert torch.equal(batch.inputs, all_rows(data)[batch.ids])
    found = torch.cat([rows for rows, _, _ in evaluation_batches(data, 5)])
    assert torch.equal(found, all_rows(data))


# text8


def test_text8_has_letters_and_single_spaces() -> None:
    assert text8("  The 3 Cafés,\n\tnaïve—İstanbul & K2! ﬁ ℌ ²  ") == "the three cafes naive istanbul k two fi h two"
    assert text8("123") == "one two three"
    assert text8("!?") == ""
    assert text8(text8("Ünïcode 42")) == text8("Ünïcode 42")


@given(st.text(max_size=40))
def test_text8_is_its_alphabet(text: str) -> None:
    found = text8(text)
    assert set(found) <= set(" abcdefghijklmnopqrstuvwxyz")
    assert "  " not in found
    assert found == found.strip()


# novels

BOOKS = {
    "Red Book (A. Author)": ["One red line.", "Another red line, longer."] * 5,
    "Blue Book (B. Author)": ["Blue é."] * 20,
    "Green Book": ["Green and 7."] * 9,
}


@pytest.fixture
def library(tmp_path: Path) -> Path:
    rows = [(book, paragraph) for book, paragraphs in BOOKS.items() for paragraph in paragraphs]
    pq.write_table(pa.table({"book": [b for b, _ in rows], "text": [t for _, t in rows]}), tmp_path / NOVELS)
    return tmp_path


def test_novels_hold_out_whole_books(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMBECK_DATA", str(library))
    found = novels("blue", length=10)
    test = found.test.tokenizer.decode(all_rows(found.test)[:, 1].flatten().tolist())
    train = found.train.tokenizer.decode(all_rows(found.train)[:, 1].flatten().tolist())
    assert "\n\n".join(BOOKS["Blue Book (B. Author)"])[1:].startswith(test)
    assert "Blue" not in train
    assert "red" in train
    assert "Green" in train
    assert found.train.tokenizer is found.test.tokenizer
    assert novels(["Red Book (A. Author)", "Green"], length=10).test.bytes_total > found.test.bytes_total
    only = novels("blue", length=10, train_books=["Green Book"], file=str(library / NOVELS))
    assert "red" not in only.train.tokenizer.decode(all_rows(only.train)[:, 1].flatten().tolist())
    letters = novels("blue", tokenizer="characters", length=10, characters="text8")
    assert letters.train.vocabulary == 27
    assert letters.test.tokenizer.decode(all_rows(letters.test)[0, 0].tolist()) == "blue e blu"
    fitted = novels("blue", tokenizer="characters", length=10)
    assert fitted.train.vocabulary == len({c for paragraphs in BOOKS.values() for text in paragraphs for c in text} | {"\n"})


def test_wrong_novels_are_named(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIMBECK_DATA", raising=False)
    with pytest.raises(InputError, match=r"gutenberg_novels\.parquet.*LIMBECK_DATA"):
        novels("blue")
    monkeypatch.setenv("LIMBECK_DATA", str(library))
    for arguments, said in (
        ({"held_out": "yellow"}, r"fits no books.*Red Book \(A. Author\); Blue Book"),
        ({"held_out": "book"}, "fits 3 books"),
        ({"held_out": []}, "no book is held out.*Known: Red Book"),
        ({"held_out": list(BOOKS)}, "no book is left"),
        ({"held_out": "blue", "train_books": ["Blue Book (B. Author)"]}, "train_books: .* is held out"),
        ({"held_out": "blue", "length": 400}, r"Red Book \(A. Author\) has .* tokens, a window takes 401"),
        ({"held_out": "blue", "characters": "text9"}, "Did you mean 'text8'"),
        ({"held_out": "blue", "tokenizer": "byte"}, "Did you mean 'bytes'"),
        ({"held_out": "blue", "tokenizer": {"name": "characters", "alphabet": "abc"}}, "alphabet has no"),
    ):
        with pytest.raises(InputError, match=said):
            novels(**arguments)
    pq.write_table(pa.table({"book": ["a"], "words": ["b"]}), library / NOVELS)
    with pytest.raises(InputError, match=r"gutenberg.*has no column 'text'.*book, words"):
        novels("a")
    (library / NOVELS).write_bytes(b"PAR1 no more")
    with pytest.raises(InputError, match=r"gutenberg.*cannot be read"):
        novels("a")


real = pytest.mark.skipif(not os.environ.get("LIMBECK_DATA"), reason="LIMBECK_DATA is not set")


@real
def test_the_real_novels() -> None:
    found = novels("Alice", length=128)
    assert found.test.bytes_total == 128 * len(found.test)
    assert len(found.train) > 30_000
    assert "Alice was beginning to get very tired" in found.test.tokenizer.decode(all_rows(found.test)[:3, 1].flatten().tolist())


# text files


def test_a_text_file_is_cut_at_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "some.txt"
    path.write_bytes(b"\xef\xbb\xbf" + (WORDS * 10).encode())
    found = text_file(str(path), test_fraction=0.25, length=7)
    told = found.test.tokenizer.decode(all_rows(found.test)[:, 1].flatten().tolist())
    cut = round(0.75 * len(WORDS) * 10)
    assert (WORDS * 10)[cut + 1 :].startswith(told)
    assert found.train.vocabulary == len(set(WORDS))
    monkeypatch.setenv("LIMBECK_DATA", str(tmp_path))
    (tmp_path / "other.txt").write_text("THE END OF THE STORY!", encoding="utf-8")
    two = text_file("some.txt", "other.txt", length=7)
    assert two.train.vocabulary == len(set(WORDS + "THE END OF THE STORY!"))
    assert len(two.test) == 2
    assert text_file("some.txt", "other.txt", length=7, characters="text8").test.vocabulary == 27


def test_wrong_text_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIMBECK_DATA", raising=False)
    path = tmp_path / "some.txt"
    for content, arguments, said in (
        (WORDS.encode(), {"test_fraction": 1.0}, "the test fraction is 1.0"),
        (WORDS.encode(), {"test_fraction": "half"}, "the test fraction is 'half'"),
        (WORDS.encode(), {"length": 60}, r"some.txt \(training part\) has .* a window takes 61"),
        (WORDS.encode(), {"length": 20}, r"some.txt \(test part\)"),
        (WORDS.encode(), {"test": "none.txt"}, "test: there is no file 'none.txt'.*LIMBECK_DATA"),
        (b"", {}, r"some\.txt: it is empty"),
        (b"!!! ", {"characters": "text8"}, r"training part\) is empty"),
        (b"\xff\xfe\xfd", {}, "UTF-8"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=said):
            text_file(str(path), **arguments)


# prompts

CHAT = [
    {"prompt": "Say hi.", "answer": "hi"},
    {"prompt": "Capital of France?", "answer": "Paris."},
    {"prompt": "1+1?", "answer": "Two, I think."},
    {"prompt": "Bye?", "answer": "é!"},
]


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    return str(path)


class Chatting(Bytes):
    """Bytes with a template like those of chat models."""

    template = "…"

    def chat(self, messages, *, ask=False):
        return "".join(f"<{m['role']}>{m['content']}|" for m in messages) + ("<assistant>" if ask else "")


def said(data: TokenData) -> list[str]:
    """What is learnt, segment by segment."""
    tokens = TokenBatch.from_inputs(all_rows(data))
    found = []
    for row in range(len(tokens)):
        for segment in sorted(set(tokens.segments[row].tolist()) - {PADDING}):
            targets = tokens.targets[row][tokens.segments[row] == segment]
            found.append(data.tokenizer.decode(targets[targets != IGNORE].tolist()) + ("$" if (targets == 256).any() else ""))
    return found


def test_only_answers_are_learnt(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "chat.jsonl", CHAT)
    found = prompts(path, test_fraction=0.25, tokenizer="bytes", length=48)
    assert sorted(said(found.train)) == sorted(["hi$", "Paris.$", "Two, I think.$"])
    assert said(found.test) == ["é!$"]
    assert found.test.bytes_per_row.tolist() == [3]
    assert found.train.bytes_total == len("hiParis.Two, I think.")  # ends have no bytes
    assert found.input_shape == (4, 48)
    assert len(found.train) == 2  # three examples in two rows
    padded = prompts(path, test_fraction=0.25, tokenizer="bytes", length=48, layout="padded")
    assert len(padded.train) == 3
    assert said(padded.train) == ["hi$", "Paris.$", "Two, I think.$"]
    everything = prompts(path, test_fraction=0.25, tokenizer="bytes", length=48, learn="all", separator=" -> ")
    assert "ay hi. -> hi$" in said(everything.train)
    told = found.train.preprocessing()
    assert (told["examples"], told["cut"], told["left_out"], told["without_answer"], told["layout"]) == (3, 0, 0, 0, "packed")


def test_long_rows_are_cut_or_left_out_and_counted(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "chat.jsonl", CHAT)
    cut = prompts(path, test_fraction=0.25, tokenizer="bytes", length=15)
    assert sorted(said(cut.train)) == sorted(["hi$", "", "Two, I thi"])  # "Capital of France?" fills its row
    assert {name: cut.train.facts[name] for name in ("cut", "left_out", "without_answer")} == {"cut": 2, "left_out": 0, "without_answer": 1}
    left = prompts(path, test_fraction=0.25, tokenizer="bytes", length=15, longer="leave_out")
    assert said(left.train) == ["hi$"]
    assert left.train.facts["left_out"] == 2


def test_files_with_splits_and_other_columns(tmp_path: Path) -> None:
    rows = {"split": ["train", "dev", "train"], "text": ["a?", "b?", "c?"], "label_name": ["x", "y", "z"]}
    pq.write_table(pa.table(rows), tmp_path / "intents.parquet")
    found = prompts(str(tmp_path / "intents.parquet"), prompt="text", answer="label_name", tokenizer="bytes", length=8, layout="padded")
    assert (said(found.train), said(found.test)) == (["x$", "z$"], ["y$"])
    two = prompts(write_jsonl(tmp_path / "a.jsonl", CHAT), write_jsonl(tmp_path / "b.jsonl", CHAT[:1]), tokenizer="bytes", length=48)
    assert (len(said(two.train)), said(two.test)) == (4, ["hi$"])


def test_a_chat_template_ends_at_its_first_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import limbeck.language.texts as module

    path = write_jsonl(tmp_path / "chat.jsonl", CHAT)
    monkeypatch.setattr(module, "tokenizer_from", lambda spec, text: Chatting())
    found = prompts(path, test_fraction=0.25, template="chat", length=64, layout="padded")
    tokens = TokenBatch.from_inputs(all_rows(found.train))
    assert found.train.tokenizer.decode(tokens.input_ids[0][tokens.segments[0] == 0].tolist()) == "<user>Say hi.|<assistant>hi|"
    assert said(found.train)[0] == "hi|$"

    class Ending(Chatting):
        eos = ord("|")

    monkeypatch.setattr(module, "tokenizer_from", lambda spec, text: Ending())
    found = prompts(path, test_fraction=0.25, template="chat", length=64, layout="padded")
    assert said(found.train)[0] == "hi|"  # the template's own end is the end
    monkeypatch.setattr(module, "tokenizer_from", lambda spec, text: WithStart())
    found = prompts(path, test_fraction=0.25, length=64, layout="padded")
    assert TokenBatch.from_inputs(all_rows(found.train)).input_ids[0, 0] == 256


def test_packed_prompts_have_the_losses_of_padded_ones(tmp_path: Path) -> None:
    """Through the source, with a model that sees its segment alone (an average of what it may attend to)."""
    path = write_jsonl(tmp_path / "chat.jsonl", CHAT)
    table = torch.randn(257, 257, generator=torch.Generator().manual_seed(0))

    def loss(layout: str) -> torch.Tensor:
        tokens = TokenBatch.of(Batch(all_rows(prompts(path, test_fraction=0.25, tokenizer="bytes", length=48, layout=layout).train)))
        mask = tokens.attention()[:, 0].float()
        logits = (mask / mask.sum(-1, keepdim=True)) @ table[tokens.input_ids]
        rows = tokens.rows()
        return F.cross_entropy(rows.gather(logits), rows.targets_N)

    assert torch.allclose(loss("packed"), loss("padded"), atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        (CHAT, {"learn": "answer"}, "Did you mean 'answers'"),
        (CHAT, {"template": "chat"}, "template: the tokenizer 'bytes' has no chat template"),
        (CHAT, {"layout": "padding"}, "Did you mean 'padded'"),
        (CHAT, {"longer": "drop"}, "unknown longer"),
        (CHAT, {"length": 1}, "'length' is 1"),
        (CHAT, {"length": 4}, "length: no answer fits"),
        (CHAT, {"tokenizer": "characters"}, "has no end of text.*end: true"),
        (CHAT, {"answer": "reply"}, "line 1 has no column 'reply'.*prompt, answer"),
        (CHAT[:1], {}, "one row cannot be divided"),
        ([], {}, "has no rows"),
        ([{"prompt": "a", "answer": 3}] * 2, {}, "column 'answer' holds int"),
        ([{"prompt": "a", "answer": " "}] * 2, {}, "answer: the answer of row 0 is empty"),
        ([{"prompt": "a", "answer": "\ud800"}] * 2, {}, "surrogate"),
        ([["a"]], {}, "line 1 is no JSON object"),
    ],
)
def test_wrong_prompts_are_named(rows: list[dict[str, object]], arguments: dict[str, object], message: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "chat.jsonl", rows)
    with pytest.raises(InputError, match=message):
        prompts(path, **{"tokenizer": "bytes", "length": 32, **arguments})


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text('{"a": "b"}\n\n{"a": \n', encoding="utf-8")
    with pytest.raises(InputError, match=r"chat\.jsonl.*line 3 is no JSON"):
        columns(path, ("a",))
    with pytest.raises(InputError, match="its splits are extra, train"):
        pq.write_table(pa.table({"prompt": ["a", "b"], "answer": ["c", "d"], "split": ["train", "extra"]}), tmp_path / "t.parquet")
        prompts(str(tmp_path / "t.parquet"), tokenizer="bytes")


def test_all_is_the_same_again(library: Path) -> None:
    one, two = (novels("blue", length=9, file=str(library / NOVELS)) for _ in range(2))
    assert one.train.inputs_fingerprint == two.train.inputs_fingerprint
    assert torch.equal(all_rows(one.test), all_rows(two.test))
    assert replace(TokenBatch.from_inputs(all_rows(one.test)), whole=False).attention() is not None
    assert {"novels", "text_file", "prompts"} <= set(CATALOGUE)
    assert tokenizer_from("bytes").fingerprint == one.train.tokenizer.fingerprint
