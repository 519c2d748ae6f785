"""Means, paired differences and tables of a few numbers, in plain Python: what results are reported with.

Nothing here imports torch, so that a report can be made from a file of results alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from limbeck.errors import InputError

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Paired:
    """A paired difference: mean of a − b, its standard error, and the 95 % t-interval. One pair: no error, no interval (None)."""

    mean: float
    stderr: float | None
    low: float | None
    high: float | None
    n: int

    @property
    def verdict(self) -> Literal["higher", "lower", "unclear"]:
        """'higher' or 'lower' where the mean is more than two standard errors from 0; otherwise, and for a single pair, 'unclear'."""
        if self.stderr is None or abs(self.mean) <= 2 * self.stderr:
            return "unclear"
        return "higher" if self.mean > 0 else "lower"


@dataclass(frozen=True)
class Bin:
    """A row of a reliability table: samples whose confidence is in (low, high]. Means are None where there are no samples."""

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Latency:
    """Seconds of one forward pass of a batch: median, 10th and 90th percentile, and every measurement."""

    batch_size: int
    median_s: float
    p10: float
    p90: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float], batch_size: int) -> Latency:
        """The summary of measured seconds."""
        return cls(batch_size, quantile(values, 0.5), quantile(values, 0.1), quantile(values, 0.9), tuple(values))


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile (q in [0, 1]), interpolated linearly between order statistics. Raises InputError where there are no values."""
    if not values:
        raise InputError("no values to summarise.")
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def mean_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error s/√n (s with n − 1); the error of one value is None. Raises InputError where there are no values."""
    if not values:
        raise InputError("no values to average.")
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return mean, None
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)


def paired(a: Sequence[float], b: Sequence[float]) -> Paired:
    """The difference a − b of results paired by seed, with Student's 95 % interval of its mean.

    Raises:
        InputError: there are no values, or not as many of one as of the other.
    """
    if len(a) != len(b):
        raise InputError(f"paired results must be as many on both sides, not {len(a)} and {len(b)}.")
    mean, stderr = mean_stderr([x - y for x, y in zip(a, b, strict=True)])
    if stderr is None:
        return Paired(mean, None, None, None, 1)
    from scipy.special import stdtrit  # the quantile of Student's t, without scipy.stats' long import

    reach = float(stdtrit(len(a) - 1, (1 + CONFIDENCE) / 2)) * stderr
    return Paired(mean, stderr, mean - reach, mean + reach, len(a))
