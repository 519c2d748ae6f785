"""Text that every Python brings along: the reference topics that `help()` shows (0.5 MB of English, PSF licence). For trying things out, without any file.

Its words differ a little from one Python to another, so numbers measured on it are for one Python version.
"""

from __future__ import annotations

import importlib

from limbeck.data.splits import Splits
from limbeck.errors import InputError
from limbeck.language.texts import TokenizerSpec, windows
from limbeck.language.tokenizers import tokenizer_from

TEST_EVERY = 10
"""One paragraph in ten belongs to the test text."""


def topics() -> dict[str, str]:
    """Name → text of the topics, in the order of their names.

    Raises:
        InputError: this Python was installed without its documentation.
    """
    try:
        found: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise InputError("this Python was installed without its documentation topics.", where="data.source", fix="Use text_file with a text of yours.") from error
    return {name: found[name] for name in sorted(found)}


def paragraphs() -> list[tuple[str, str]]:
    """(topic, paragraph) of all paragraphs of at least 40 characters, each once, in order."""
    seen: set[str] = set()
    found = []
    for name, text in topics().items():
        for part in text.split("\n\n"):
            paragraph = "\n".join(line.strip() for line in part.splitlines()).strip()
            if len(paragraph) >= 40 and paragraph not in seen:
                seen.add(paragraph)
                found.append((name, paragraph))
    return found


def python_manual(tokenizer: TokenizerSpec = "bytes", length: int = 64, stride: int | None = None) -> Splits:
    """Windows of Python's own reference topics; every tenth paragraph is the test text.

    Args:
        tokenizer: see `tokenizer_from`; "characters" without an alphabet is fitted to both parts. length, stride: see `texts.windows`.

    Raises:
        InputError: this Python has no topics; a length below 2, a stride below 1, an unknown tokenizer.
    """
    known = [text for _, text in paragraphs()]
    parts = [
        "\n\n".join(text for number, text in enumerate(known) if (number % TEST_EVERY == TEST_EVERY - 1) is test) for test in (False, True)
    ]
    made = tokenizer_from(tokenizer, "".join(parts))
    return Splits(*(windows([part], made, length, stride, [name]) for part, name in zip(parts, ("the training part", "the test part"), strict=True)))
