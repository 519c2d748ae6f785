"""Errors a person can act on. Everything else keeps its traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LimbeckError(Exception):
    """A failure with a plain explanation; the command line prints it and exits with `exit_code`."""

    exit_code = 1


class InputError(LimbeckError):
    """The input was wrong: what is wrong, where it stands, and the likely fix (exit code 2).

    Args:
        what: one sentence that names the problem.
        where: `file:line`, a field path such as `train.epochs`, or a file name.
        fix: what to do about it.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(" ".join(part for part in (f"{where}:" if where else "", what, fix) if part))

    def at(self, where: str) -> InputError:
        """The same error with a place in front of the one it already names."""
        place = f"{where}.{self.where}" if self.where else where
        return type(self)(self.what, where=place, fix=self.fix)


class MissingExtra(InputError):
    """A package of an optional extra is not installed."""

    def __init__(self, package: str, extra: str, *, why: str = "") -> None:
        super().__init__(
            f"{why or 'this'} needs the package '{package}', which is not installed.",
            fix=f"Install the extra '{extra}': pip install 'limbeck[{extra}]'",
        )


class TrainingError(LimbeckError):
    """Training cannot go on (a non-finite loss, say); the last good checkpoint is intact."""


class Interrupted(LimbeckError):
    """SIGTERM or Ctrl-C came; a checkpoint was written. Exit code 128 + the signal's number."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


def suggestion(word: str, known: Iterable[str]) -> str:
    """'Did you mean ...?' for a misspelt word, or the list of known words (at most twelve).

    >>> suggestion("epoch", ["epochs", "steps"])
    "Did you mean 'epochs'?"
    """
    words = sorted(known)
    near = difflib.get_close_matches(str(word), words, n=1, cutoff=0.6)
    if near:
        return f"Did you mean '{near[0]}'?"
    shown = ", ".join(words[:12]) + (", …" if len(words) > 12 else "")
    return f"Known: {shown}." if words else ""
