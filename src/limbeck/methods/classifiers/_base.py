"""What methods that make classifiers share."""

from __future__ import annotations

from limbeck.contract import IGNORE, Data
from limbeck.errors import InputError


def require_labels(train: Data | None, why: str) -> None:
    """Refuse a training set without a single label, where there is a training set to look at.

    Args:
        train: what `bind` was given. why: who needs labels, the start of the sentence ("'kd' with weight < 1").

    Raises:
        InputError: no sample is labelled.
    """
    if train is not None and (train.targets is None or not (train.targets != IGNORE).any()):
        raise InputError(f"{why} learns from labels, and no training sample has one.", where="data", fix="Give labelled data.")
