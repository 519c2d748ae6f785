"""What a network returns, as logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

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
