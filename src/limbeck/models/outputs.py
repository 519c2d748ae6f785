"""What a network returns, as logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.errors import InputError


def logits_of(output: Any) -> Tensor:
    """The logits in a network's output: a tensor, or an object or mapping with `logits` (Hugging Face, torchvision's GoogLeNet).

    Raises:
        InputError: there is no tensor to be found.
    """
    found = output if isinstance(output, Tensor) else output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise InputError(
            f"a model returned {type(output).__name__}, not logits.",
            where="model",
            fix="Return a tensor [batch, classes], or an object with 'logits'.",
        )
    return found


def mean_logits(members: Sequence[nn.Module], inputs: Tensor) -> Tensor:
    """(1/M) Σ_m f_m(inputs), [B, C] float32: the mean of logits, not of probabilities (arXiv 2408.06927, equation 7 of our sheet `infer`)."""
    return torch.stack([logits_of(member(inputs)).float() for member in members]).mean(0)
