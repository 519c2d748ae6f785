"""What FIRST's claim (2408.12168) is made of: disjoint parts of Banking77, arms that tell how sure they are of test texts, and how much of a real language
model's next-token probability its k largest entries hold.

Texts are features: a sentence embedding, which the teacher sees, and hashed words, which the student sees.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import nn

from limbeck import seeds
from limbeck.contract import IGNORE, Data, Method
from limbeck.data import Splits, subset
from limbeck.errors import InputError
from limbeck.evaluate.predict import predict
from limbeck.language.build import smollm2
from limbeck.language.calibration import expected_calibration_error, trust_score
from limbeck.language.classification import text_features
from limbeck.language.signals import DenseLike, top_k
from limbeck.language.sources import ModelSource
from limbeck.language.texts import text_file
from limbeck.language.tokens import TokenBatch
from limbeck.methods.classifiers.kd import KD
from limbeck.methods.classifiers.supervised import Supervised
from limbeck.methods.language.first import FIRST

DROPPED = 0.2
"""The share of a test text's words that its shifted copy lacks (our sheet)."""


@lru_cache(2)
def features(drop_words: float = 0.0) -> Splits:
    """Banking77 as 384 columns of a sentence embedding and 2,048 of hashed words. drop_words: see `text_features`."""
    return text_features("banking77", drop_words=drop_words)


def texts(first: int, count: int) -> Splits:
    """Banking77's training texts `first` to `first + count − 1` of a fixed random order, with all its test texts. Parts that do not overlap are disjoint.

    Raises:
        InputError: there are not so many texts.
    """
    whole = features()
    if first < 0 or count < 1 or first + count > len(whole.train):
        raise InputError(f"texts {first} to {first + count - 1} of {len(whole.train)} cannot be had.", where="count")
    order = torch.randperm(len(whole.train), generator=seeds.generator(0, "banking77"))
    return Splits(subset(whole.train, order[first : first + count]), whole.test)


def confidence(module: nn.Module, data: Data) -> dict[str, float]:
    """A classifier on labelled data: accuracy, ece10 (ten bins, eq. 4 of our sheet), trust (eq. 8), confidence (the mean of its largest probability)."""
    assert data.targets is not None
    logits = predict(module, data)
    known = data.targets != IGNORE
    sure, guess = logits.softmax(-1).max(-1)
    right = (guess == data.targets)[known]
    accuracy, ece = right.double().mean().item(), expected_calibration_error(sure[known], right).item()
    return {"accuracy": accuracy, "ece10": ece, "trust": trust_score(accuracy, ece), "confidence": sure[known].double().mean().item()}


class Judged(Method):
    """A method that also reports `confidence` of its student on the test texts, and as shifted_… on their copies without a fifth of the words."""

    def facts(self) -> dict[str, Any]:
        """Those of the method; `metrics` with the above, and shift_gap: how much larger the calibration error is on the shifted copies."""
        found = super().facts()
        if self.test is None:
            return found
        plain, shifted = confidence(self.inference(), self.test), confidence(self.inference(), features(DROPPED).test)
        told = {name: value for name, value in plain.items() if name != "accuracy"} | {f"shifted_{name}": value for name, value in shifted.items()}
        return found | {"metrics": found.get("metrics", {}) | told | {"shift_gap": shifted["ece10"] - plain["ece10"]}}


class JudgedFIRST(Judged, FIRST):
    """FIRST, judged."""


class JudgedKD(Judged, KD):
    """Distillation of all classes, judged."""


class JudgedLabels(Judged, Supervised):
    """Training on labels, judged."""


def coverage(tokens: int = 1000, length: int = 128, text: str = "wikitext2_valid.txt") -> dict[str, float]:
    """How much probability SmolLM2-135M-Instruct puts on its most likely next tokens, a mean over positions of a text (teacher forcing).

    Args:
        tokens: about how many positions, from the start of the text. length: of a window. text: a file (of $LIMBECK_DATA).

    Returns:
        kappa_1, kappa_5, kappa_10, kappa_50 and positions.

    Raises:
        InputError: the model's package or the text is missing, or the text is too short. MissingExtra: transformers is not installed.
    """
    data = text_file(text, tokenizer="smollm2", length=length).train
    rows = min(-(-tokens // length), len(data))
    batch = TokenBatch.from_inputs(data.fetch(torch.arange(rows))[0])
    signal = ModelSource([smollm2(num_classes=0, input_shape=(2, length))]).get(batch)
    assert isinstance(signal, DenseLike)
    best_N = top_k(signal, 50).logp_Nk.exp().cumsum(-1).double().mean(0)
    return {f"kappa_{k}": best_N[k - 1].item() for k in (1, 5, 10, 50)} | {"positions": float(len(signal))}
