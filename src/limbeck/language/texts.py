"""Text as rows of tokens: novels, text files, prompts with answers (a `contract.Data` whose inputs are int64 and stay what they are).

B rows of L positions, R rows of a data set, T tokens of a corpus, V vocabulary. A row of running text is a window: L tokens are read, the L that follow each
of them predicted, so a row is [2, L] = (ids, targets). A row of prompts and answers is [4, L] = (ids, targets, positions, segments). See `tokens`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from limbeck.contract import IGNORE
from limbeck.data.reading import reading, shown
from limbeck.data.splits import Splits
from limbeck.errors import InputError, suggestion
from limbeck.language.packing import Example, Longer, one_per_row, pack, plan
from limbeck.language.tokenizers import TEXT8, Tokenizer, tokenizer_from, utf8

if TYPE_CHECKING:
    from numpy.typing import NDArray

TokenizerSpec = str | Mapping[str, Any]
"""What `tokenizer_from` takes."""

Alphabet = Literal["all", "text8"]
"""Which characters of a text stay: all, or lower-case letters and single spaces, as in the text8 corpus."""

Learn = Literal["answers", "all"]
Template = Literal["plain", "chat"]
Layout = Literal["packed", "padded"]

NOVELS = "gutenberg_novels.parquet"
"""The file of six novels that lies in $LIMBECK_DATA."""


@dataclass(frozen=True)
class Windows:
    """Rows that are windows of a corpus.

    tokens_T: [T] int32. sizes_T: [T] int64, the UTF-8 bytes of each. starts_R: [R] int64, where each row begins. length: L.
    front: an id in front of every row, None: none. Without it row r reads tokens starts[r] .. + L − 1 and predicts those one further; with it the row reads
    the front and L − 1 tokens, and predicts L tokens from starts[r] on.
    """

    tokens_T: Tensor
    sizes_T: Tensor
    starts_R: Tensor
    length: int
    front: int | None

    def __len__(self) -> int:
        return len(self.starts_R)

    @property
    def first(self) -> Tensor:
        """[R] int64: the place of each row's first target."""
        return self.starts_R + (self.front is None)

    def take(self, ids_B: Tensor) -> Tensor:
        """Rows [B, 2, L] int64."""
        targets_BL = self.tokens_T[self.first[ids_B][:, None] + torch.arange(self.length)].long()
        first_B1 = (self.tokens_T[self.starts_R[ids_B]].long() if self.front is None else torch.full_like(ids_B, self.front))[:, None]
        return torch.stack((torch.cat((first_B1, targets_BL[:, :-1]), 1), targets_BL), 1)

    def target_bytes(self) -> Tensor:
        """[R] int64: UTF-8 bytes of each row's targets."""
        total_T = torch.cat((self.sizes_T.new_zeros(1), self.sizes_T.cumsum(0)))
        return total_T[self.first + self.length] - total_T[self.first]

    def parts(self) -> Sequence[Tensor]:
        """What decides the rows."""
        return self.tokens_T, self.starts_R


@dataclass(frozen=True)
class Ready:
    """Rows that were made before. rows_RCL: [R, 2 | 4, L] int32. bytes_R: [R] int64, UTF-8 bytes of each row's targets."""

    rows_RCL: Tensor
    bytes_R: Tensor
    front: int | None = None

    def __len__(self) -> int:
        return len(self.rows_RCL)

    @property
    def length(self) -> int:
        """L."""
        return self.rows_RCL.shape[2]

    def take(self, ids_B: Tensor) -> Tensor:
        """Rows [B, 2 | 4, L] int64."""
        return self.rows_RCL.index_select(0, ids_B).long()

    def target_bytes(self) -> Tensor:
        """[R] int64."""
        return self.bytes_R

    def parts(self) -> Sequence[Tensor]:
        """The rows."""
        return (self.rows_RCL,)


class TokenData:
    """Rows of tokens (a `contract.Data`): raw inputs are int64 rows, `prepare` leaves them alone, there are no targets beside them and no classes.

    rows: where they come from. tokenizer: what the ids mean. facts: JSON values about how the rows were made.
    Through `data.subset` and `hold_out` it is found again by `data.root`, with `data.origins` for `bytes_per_row`.
    """

    classes: Sequence[str] = ()

    def __init__(self, rows: Windows | Ready, tokenizer: Tokenizer, facts: Mapping[str, Any] | None = None) -> None:
        self.rows, self.tokenizer, self.facts = rows, tokenizer, dict(facts or {})
        self.vocabulary = tokenizer.vocabulary
        self.length = rows.length
        self.bytes_per_row = rows.target_bytes()
        """[R] int64: UTF-8 bytes of each row's targets."""

    @property
    def targets(self) -> Tensor | None:
        """None: a row's targets are in it."""
        return None

    @property
    def bytes_total(self) -> int:
        """UTF-8 bytes of all targets: Σ nll / (ln 2 · this) are bits per byte."""
        return int(self.bytes_per_row.sum())

    def __len__(self) -> int:
        return len(self.rows)

    def fetch(self, ids_B: Tensor, *, seed: int = 0, epoch: int = 0) -> tuple[Tensor, None]:
        """Rows [B, 2, L] or [B, 4, L] int64 (see `tokens`); seed and epoch change nothing."""
        return self.rows.take(ids_B), None

    def prepare(self, raw: Tensor) -> Tensor:
        """The same tensor: ids are no measurements."""
        return raw

    def preprocessing(self) -> dict[str, object]:
        """How text becomes rows, as JSON values."""
        told = {"tokenizer": self.tokenizer.name, "tokenizer_sha256": self.tokenizer.fingerprint, "vocabulary": self.vocabulary}
        return told | {"length": self.length, "front": self.rows.front, **self.facts}

    @cached_property
    def inputs_fingerprint(self) -> str:
        """SHA-256 (hex) over the rows and the tokenizer: what a network sees and what it means."""
        return _digest(self.rows.parts(), self.tokenizer.fingerprint, self.length, self.rows.front)


def windows(texts: Sequence[str], tokenizer: Tokenizer, length: int, stride: int | None = None, names: Sequence[str] = ()) -> TokenData:
    """Windows of texts, none of which reaches from one text into the next; what is left at a text's end is no window.

    Args:
        texts: each tokenised by itself. length: L. stride: tokens from one window's start to the next's; None: L, so that each token is predicted once.
            Below L windows overlap, and a random validation set shares text with the training set. names: of the texts, for errors.

    Raises:
        InputError: L below 2, stride below 1, an empty text, or one shorter than a window.
    """
    _whole("length", length, 2)
    stride = length if stride is None else _whole("stride", stride, 1)
    front = tokenizer.start
    tokens: list[NDArray[np.int32]] = []
    sizes: list[NDArray[np.int64]] = []
    starts: list[NDArray[np.int64]] = []
    offset = 0
    for number, text in enumerate(texts):
        where = names[number] if names else f"text {number}"
        if not text.strip():
            raise InputError(f"{where} is empty.", where="text", fix="Give it words, or leave it out.")
        ids_T, bounds_T2 = tokenizer.byte_spans(text)
        needed = length + (front is None)
        if len(ids_T) < needed:
            raise InputError(f"{where} has {len(ids_T)} tokens, a window takes {needed}.", where="length", fix="Use a smaller one, or a longer text.")
        tokens.append(ids_T)
        sizes.append(bounds_T2[:, 1] - bounds_T2[:, 0])
        starts.append(offset + np.arange(0, len(ids_T) - needed + 1, stride, dtype=np.int64))
        offset += len(ids_T)
    tokens_T, sizes_T, starts_R = (torch.from_numpy(np.concatenate(each)) for each in (tokens, sizes, starts))
    return TokenData(Windows(tokens_T, sizes_T, starts_R, length, front), tokenizer, {"stride": stride})


def text8(text: str) -> str:
    """A text in the 27 characters of the text8 corpus: lower-case letters and single spaces.

    Accents are taken off, digits spelt out one by one, everything else becomes a space; runs of spaces become one, none stand at the ends.
    """
    plain = unicodedata.normalize("NFKD", text).lower()
    if not plain.isascii():
        plain = "".join(character for character in plain if not unicodedata.combining(character))
    return re.sub("[^a-z]+", " ", plain.translate(_DIGITS)).strip()


_DIGITS = {ord("0") + n: f" {word} " for n, word in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"))}


def novels(
    held_out: str | Sequence[str],
    tokenizer: TokenizerSpec = "bytes",
    length: int = 128,
    stride: int | None = None,
    train_books: Sequence[str] | None = None,
    file: str | None = None,
    characters: Alphabet = "all",
) -> Splits:
    """Windows of books, with whole books as the test set; a book's paragraphs are joined by empty lines.

    Args:
        held_out: the test set: names of books, or parts of names that fit one book ("Alice"). tokenizer: see `tokenizer_from`; "characters" without an
            alphabet is fitted to all books. length, stride: see `windows`. train_books: None: all others. file: a parquet file with the columns book and
            text (a paragraph a row); None: $LIMBECK_DATA/gutenberg_novels.parquet. characters: see `Alphabet`.

    Raises:
        InputError: the file is missing or has other columns, a book is unknown (the known ones are listed), in both parts, empty or shorter than a window.
    """
    _known("characters", characters, Alphabet)
    path = found_file(file or NOVELS, "file")
    table = columns(path, ("book", "text"))
    books: dict[str, list[str]] = {}
    for book, paragraph in zip(table["book"], table["text"], strict=True):
        books.setdefault(_text(book, path, "book"), []).append(_text(paragraph, path, "text"))
    test = [_book(name, list(books), "held_out") for name in ([held_out] if isinstance(held_out, str) else held_out)]
    if not test:
        raise InputError("no book is held out.", where="held_out", fix=f"Known: {'; '.join(map(shown, books))}.")
    train = [book for book in books if book not in test] if train_books is None else [_book(name, list(books), "train_books") for name in train_books]
    both = next((book for book in train if book in test), None)
    if both is not None:
        raise InputError(f"'{shown(both)}' is held out.", where="train_books", fix="Leave it out of one of them.")
    if not train:
        raise InputError("no book is left to train on.", where="held_out", fix="Hold out fewer.")
    joined = {book: _kept("\n\n".join(books[book]), characters) for book in (*train, *test)}
    made = _tokenizer(tokenizer, characters, "".join(joined.values()))
    return Splits(*(windows([joined[book] for book in part], made, length, stride, [shown(book) for book in part]) for part in (train, test)))


def text_file(
    train: str,
    test: str | None = None,
    test_fraction: float = 0.1,
    tokenizer: TokenizerSpec = "characters",
    length: int = 128,
    stride: int | None = None,
    characters: Alphabet = "all",
) -> Splits:
    """Windows of a UTF-8 text file.

    Args:
        train: a path; one that is not there is looked for in $LIMBECK_DATA. test: another file; None: the end of the first, `test_fraction` of its
            characters. tokenizer: see `tokenizer_from`; "characters" without an alphabet is fitted to both parts. length, stride: see `windows`.
            characters: see `Alphabet`.

    Raises:
        InputError: a file is missing, no UTF-8, empty, or shorter than a window; the fraction is not between 0 and 1.
    """
    _known("characters", characters, Alphabet)
    whole = _kept(_read(found_file(train, "train")), characters)
    if test is not None:
        parts = whole, _kept(_read(found_file(test, "test")), characters)
    else:
        cut = len(whole) - max(1, round(_fraction(test_fraction) * len(whole)))
        parts = whole[:cut], whole[cut:]
    made = _tokenizer(tokenizer, characters, "".join(parts))
    names = (f"{shown(train)} (training part)", f"{shown(train)} (test part)") if test is None else (shown(train), shown(test))
    return Splits(*(windows([part], made, length, stride, [name]) for part, name in zip(parts, names, strict=True)))


def prompts(
    train: str,
    test: str | None = None,
    test_fraction: float = 0.1,
    prompt: str = "prompt",
    answer: str = "answer",
    learn: Learn = "answers",
    template: Template = "plain",
    separator: str = "\n",
    layout: Layout = "packed",
    longer: Longer = "cut",
    tokenizer: TokenizerSpec = "smollm2",
    length: int = 256,
) -> Splits:
    """Prompts with answers, as rows of L positions.

    Prompt and answer are tokenised one by one, so that a prompt's tokens are those that a model will be asked with; an answer ends with its first end of text,
    which is a target.

    Args:
        train: a JSONL or parquet file; one that is not there is looked for in $LIMBECK_DATA. test: another; None: the rows whose column "split" says test (or
            dev, or validation) where there is such a column, else the last `test_fraction` of the rows.
        prompt, answer: names of the columns. learn: "answers" predicts the answers' tokens, "all" every token but the first.
        template: "plain" is prompt, separator, answer, end; "chat" the tokenizer's own chat template. layout: "packed" puts several examples into a row,
            "padded" one. longer: see `packing.Longer`. tokenizer: see `tokenizer_from`; it needs an end of text. length: L.

    Raises:
        InputError: a file is missing or has other columns, a text is empty, no example is left, the tokenizer has no end or no template.
    """
    for name, value, kind in (("learn", learn, Learn), ("template", template, Template), ("layout", layout, Layout), ("longer", longer, Longer)):
        _known(name, value, kind)
    _whole("length", length, 2)
    pairs = _pairs(train, test, test_fraction, prompt, answer)
    made = _tokenizer(tokenizer, "all", "".join(text for part in pairs for pair in part for text in pair) + separator)
    if made.eos is None:
        raise InputError(f"the tokenizer '{made.name}' has no end of text.", where="tokenizer", fix="Of characters: end: true.")
    return Splits(*(_answered(part, made, learn, template, separator, layout, longer, length) for part in pairs))


def _answered(
    pairs: Sequence[tuple[str, str]], tokenizer: Tokenizer, learn: Learn, template: Template, separator: str, layout: Layout, longer: Longer, length: int
) -> TokenData:
    examples, asked = [], []
    for number, (prompt, answer) in enumerate(pairs):
        for name, text in (("prompt", prompt), ("answer", answer)):
            if not text.strip():
                raise InputError(f"the {name} of row {number} is empty.", where=name, fix="Leave the row out.")
        given, said = _tokens(prompt, answer, tokenizer, template, separator)
        examples.append(Example.answering(given, said) if learn == "answers" else Example.text([*given, *said]))
        asked.append(len(given))
    sizes = [len(example.ids_n) for example in examples]
    packing = (plan if layout == "packed" else one_per_row)(sizes, length, longer=longer)
    inputs_R4L = pack(examples, packing, tokenizer.pad).packed()
    if not len(inputs_R4L) or bool((inputs_R4L[:, 1] == IGNORE).all()):
        raise InputError("no answer fits into the rows.", where="length", fix="Use longer rows.")
    sizes_V = torch.tensor([len(piece) for piece in tokenizer.pieces(range(tokenizer.vocabulary))])
    known_RL = inputs_R4L[:, 1] != IGNORE
    bytes_R = (sizes_V[inputs_R4L[:, 1].clamp(min=0)] * known_RL).sum(1)
    silent = sum(0 < size <= prompt for prompt, size in zip(asked, packing.size_E.tolist(), strict=True))
    facts = {"template": template, "learn": learn, "layout": layout, "examples": len(examples), "cut": packing.cut, "left_out": packing.left_out}
    return TokenData(Ready(inputs_R4L.int(), bytes_R), tokenizer, {**facts, "without_answer": silent, "filled": round(packing.filled, 4)})


def _tokens(prompt: str, answer: str, tokenizer: Tokenizer, template: Template, separator: str) -> tuple[list[int], list[int]]:
    """The tokens of a prompt with what surrounds it, and of the answer up to its end."""
    assert tokenizer.eos is not None
    if template == "plain":
        given, said = prompt + separator, answer
    else:
        question = {"role": "user", "content": prompt}
        given = tokenizer.chat([question], ask=True)
        whole = tokenizer.chat([question, {"role": "assistant", "content": answer}])
        if not whole.startswith(given):
            raise InputError("the chat template does not put the answer behind the question.", where="template", fix="Use template: plain.")
        said = whole[len(given) :]
    given_ids, said_ids = tokenizer.encode(given), tokenizer.encode(said)
    if tokenizer.start is not None and given_ids[:1] != [tokenizer.start]:
        given_ids = [tokenizer.start, *given_ids]
    stop = said_ids.index(tokenizer.eos) if tokenizer.eos in said_ids else len(said_ids)
    return given_ids, [*said_ids[:stop], tokenizer.eos]


def _pairs(train: str, test: str | None, fraction: float, prompt: str, answer: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(prompt, answer) of the training and the test rows."""

    def pairs(path: Path, table: Mapping[str, list[Any]]) -> list[tuple[str, str]]:
        found = [(_text(p, path, prompt), _text(a, path, answer)) for p, a in zip(table[prompt], table[answer], strict=True)]
        if not found:
            raise InputError("it has no rows.", where=shown(path))
        return found

    path = found_file(train, "train")
    if test is not None:
        other = found_file(test, "test")
        return pairs(path, columns(path, (prompt, answer))), pairs(other, columns(other, (prompt, answer)))
    table = columns(path, (prompt, answer), optional=("split",))
    rows = pairs(path, table)
    if "split" in table:
        told = split_names(table["split"], path)
        return tuple([row for row, split in zip(rows, table["split"], strict=True) if split == name] for name in told)  # type: ignore[return-value]
    cut = len(rows) - max(1, round(_fraction(fraction) * len(rows)))
    if not cut:
        raise InputError("one row cannot be divided.", where=shown(path), fix="Give 'test' a file of its own.")
    return rows[:cut], rows[cut:]


def found_file(path: str, where: str) -> Path:
    """A file by its path, or by its name in $LIMBECK_DATA. Raises InputError where it is in neither."""
    home = os.environ.get("LIMBECK_DATA")
    for candidate in (Path(path), *([Path(home) / path] if home else [])):
        if candidate.is_file():
            return candidate
    said = f"nor in LIMBECK_DATA ({shown(home)})" if home else "and LIMBECK_DATA, where it would be looked for too, is not set"
    raise InputError(f"there is no file '{shown(path)}', {said}.", where=where, fix="Check the path, or set LIMBECK_DATA to the folder of the data files.")


def columns(path: Path, names: Sequence[str], optional: Sequence[str] = ()) -> dict[str, list[Any]]:
    """Columns of a parquet file, or of a file of one JSON object a line (.jsonl, .json). Raises InputError with the path: unreadable, or without a column."""
    with reading(path):
        if path.suffix in (".jsonl", ".json"):
            return _json_columns(path, names, optional)
        from pyarrow import parquet

        known = parquet.read_schema(path).names
        _check_columns(names, known)
        found: dict[str, list[Any]] = parquet.read_table(path, columns=[*names, *(name for name in optional if name in known)]).to_pydict()
        return found


def _json_columns(path: Path, names: Sequence[str], optional: Sequence[str]) -> dict[str, list[Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"line {number} is no JSON: {error.msg}.", fix="Write one JSON object a line.") from error
        if not isinstance(row, dict):
            raise InputError(f"line {number} is no JSON object.", fix="Write one JSON object a line.")
        _check_columns(names, list(row), f"line {number} has")
        rows.append(row)
    kept = [*names, *(name for name in optional if rows and all(name in row for row in rows))]
    return {name: [row[name] for row in rows] for name in kept}


def split_names(splits: Sequence[Any], path: Path) -> tuple[str, str]:
    """What a column "split" calls the training and the test rows: train, and the first that there is of test, dev, validation, val.

    Raises:
        InputError: it has no train, or none of the others.
    """
    known = {str(split) for split in splits}
    test = next((name for name in ("test", "dev", "validation", "val") if name in known), None)
    if "train" not in known or test is None:
        raise InputError(f"its splits are {shown(', '.join(sorted(known)))}.", where=shown(path), fix="Call them train and test (or dev).")
    return "train", test


def _check_columns(names: Sequence[str], known: Sequence[str], what: str = "it has") -> None:
    missing = next((name for name in names if name not in known), None)
    if missing is not None:
        raise InputError(f"{what} no column '{shown(missing)}'.", fix=f"Its columns: {shown(', '.join(known))}.")


def _read(path: Path) -> str:
    with reading(path, fix="Is it a UTF-8 text?"):
        text = path.read_bytes().decode("utf-8-sig")
        if not text.strip():
            raise InputError("it is empty.", fix="Give it words.")
        return text


def _kept(text: str, characters: Alphabet) -> str:
    return text8(text) if characters == "text8" else text


def _tokenizer(spec: TokenizerSpec, characters: Alphabet, text: str) -> Tokenizer:
    """A tokenizer; the characters of a text8 text are all 27, whether they occur or not."""
    return tokenizer_from(spec, TEXT8 if characters == "text8" else text)


def _book(name: str, books: Sequence[str], where: str) -> str:
    if name in books:
        return name
    near = [book for book in books if str(name).strip() and str(name).lower() in book.lower()]
    if len(near) == 1:
        return near[0]
    raise InputError(f"'{shown(name)}' fits {len(near) or 'no'} books.", where=where, fix=f"Known: {'; '.join(map(shown, books))}.")


def _text(value: Any, path: Path, column: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"the column '{column}' holds {type(value).__name__}, not text.", where=shown(path))
    utf8(value)
    return value


def _known(name: str, value: Any, kind: Any) -> None:
    if value not in get_args(kind):
        raise InputError(f"unknown {name} '{value}'.", where=name, fix=suggestion(str(value), get_args(kind)))


def _whole(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"'{name}' is {value!r}.", where=name, fix=f"Give a whole number of at least {least}.")
    return value


def _fraction(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise InputError(f"the test fraction is {value!r}.", where="test_fraction", fix="Give a number between 0 and 1.")
    return float(value)


def _digest(parts: Sequence[Tensor], *facts: object) -> str:
    digest = hashlib.sha256(repr((facts, [(part.dtype, tuple(part.shape)) for part in parts])).encode())
    for part in parts:
        digest.update(part.contiguous().numpy().data)
    return digest.hexdigest()
