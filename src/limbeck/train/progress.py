"""Live progress: a bar with throughput and time left on a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
import time
from typing import Any, Literal, Protocol


class Progress(Protocol):
    """What the trainer tells whoever watches."""

    def start(self, label: str, steps: int, done: int, unit: str = "batches") -> None:
        """A stretch of `steps` units begins, `done` of them already behind."""
        ...

    def advance(self, step: int, note: str = "") -> None:
        """Batches done so far in this stretch."""
        ...

    def say(self, text: str) -> None:
        """Something a person should know at once."""
        ...

    def stop(self) -> None:
        """The stretch is over."""
        ...


class Silent:
    """Says nothing."""

    def start(self, label: str, steps: int, done: int, unit: str = "batches") -> None:
        """Nothing."""

    def advance(self, step: int, note: str = "") -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def stop(self) -> None:
        """Nothing."""


class Plain:
    """A line at the start, one every `seconds`, one at the end, on standard error."""

    def __init__(self, seconds: float = 15.0) -> None:
        self.seconds = seconds

    def start(self, label: str, steps: int, done: int, unit: str = "batches") -> None:
        """Begin a stretch."""
        self.label, self.steps, self.first, self.unit = label, steps, done, unit
        self.began = self.said = time.monotonic()
        self.step, self.note = done, ""

    def advance(self, step: int, note: str = "") -> None:
        """Print a line if it is time for one."""
        self.step, self.note = step, note or self.note
        now = time.monotonic()
        if now - self.said >= self.seconds:
            self.said = now
            self._say(now)

    def _say(self, now: float) -> None:
        rate = (self.step - self.first) / max(now - self.began, 1e-9)
        left = (self.steps - self.step) / rate if rate > 0 else float("nan")
        print(f"{self.label}: {self.step}/{self.steps} {self.unit}, {_rate(rate)}, {left:.0f} s left {self.note}".rstrip(), file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Print it on a line of its own."""
        print(f"{self.label}: {text}", file=sys.stderr, flush=True)

    def stop(self) -> None:
        """Say how long the stretch took."""
        took = time.monotonic() - self.began
        print(f"{self.label}: {self.step}/{self.steps} {self.unit} in {took:.1f} s {self.note}".rstrip(), file=sys.stderr, flush=True)


class Live:
    """A rich bar on standard error."""

    def __init__(self) -> None:
        self._bar: Any = None

    def start(self, label: str, steps: int, done: int, unit: str = "batches") -> None:
        """Begin a stretch."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), TimeRemainingColumn())
        self._bar = Bars(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True), refresh_per_second=4)
        self._task = self._bar.add_task(label, total=steps, completed=done, rate="", note="")
        self._first, self._began, self._drawn = done, time.monotonic(), 0.0
        self._bar.start()

    def advance(self, step: int, note: str = "") -> None:
        """Redraw at most ten times a second."""
        now = time.monotonic()
        if now - self._drawn > 0.1 or note:
            self._drawn = now
            rate = _rate((step - self._first) / max(now - self._began, 1e-9))
            self._bar.update(self._task, completed=step, rate=rate, **({"note": note} if note else {}))

    def say(self, text: str) -> None:
        """Print it above the bar."""
        self._bar.console.print(text, markup=False, highlight=False)

    def stop(self) -> None:
        """Leave the finished bar standing."""
        self._bar.stop()


def _rate(a_second: float) -> str:
    return f"{a_second:.1f}/s" if a_second >= 0.5 else f"{a_second * 60:.1f}/min"


def choose(style: Literal["auto", "plain", "quiet"]) -> Progress:
    """A display for the terminal that standard error is, or not."""
    if style == "quiet":
        return Silent()
    return Live() if style == "auto" and sys.stderr.isatty() else Plain()
