"""The law of the capacity gap: which size of teacher is best for a size of student, fitted on small runs (sheet `capacity_gap` eqs. 1 and 2; 2311.07052).

The law T*(S) = a·S + b is the paper's, as are its a and b. How runs of unequal sizes become T*(S) was not to be verified; what is done here is ours: either
one smooth surface over (log S, log T), or bins of S with a parabola over log T in each. It speaks of students that start as *pruned teachers*: the optimum
weighs a better teacher against a start from which more was cut. It says nothing about a given student trained from scratch.

R runs, each with a student of S and a teacher of T parameters, counted in the same way (any unit), and a score, higher being better; K bootstrap draws,
J sizes of students at which the optimum is read off. Everything is float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from limbeck.errors import InputError

How = Literal["surface", "bins"]
SINGULAR = 1e-12
"""Draws whose (scaled) normal equations have a reciprocal condition below this are left out of an interval."""


@dataclass(frozen=True)
class Optimum:
    """T*(S) at one size of student. inside: the curve has its top between the smallest and the largest teacher tried, T* is not just the end of what was."""

    student: float
    teacher: float
    inside: bool


@dataclass(frozen=True)
class Predicted:
    """A size read off the law, with the central 95 % of the bootstrap's (None without one)."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class CapacityLaw:
    """T*(S) ≈ slope · S + intercept.

    r2: of that line through the optima (with a smooth surface it is near 1 whatever the runs say; with bins it means something). explained: R² of the surface
    or parabolas over the runs' scores. slopes, intercepts: [K], one a bootstrap draw, empty without.
    """

    slope: float
    intercept: float
    r2: float
    explained: float
    optima: tuple[Optimum, ...]
    slopes: Tensor
    intercepts: Tensor

    @property
    def slope_interval(self) -> tuple[float, float] | None:
        """The central 95 % of the bootstrap's slopes."""
        return _central(self.slopes)

    def recommend(self, student: float) -> Predicted:
        """T* for a student's size.

        Raises:
            InputError: the size is not positive, or the law gives no positive teacher for it.
        """
        _positive(student, "student")
        return self._predicted(self.slope * student + self.intercept, self.slopes * student + self.intercepts, f"a student of {student:g}")

    def max_student(self, teacher: float) -> Predicted:
        """The student that a teacher is the best one for, (T − b)/a: "at most", since pruning less leaves more than the law asks for.

        Raises:
            InputError: the size is not positive, or the law gives no positive student for it.
        """
        _positive(teacher, "teacher")
        return self._predicted((teacher - self.intercept) / self.slope, (teacher - self.intercepts) / self.slopes, f"a teacher of {teacher:g}")

    def _predicted(self, value: float, drawn_K: Tensor, what: str) -> Predicted:
        if not 0 < value < float("inf"):
            raise InputError(f"the law gives {value:g} for {what}: it lies outside of what it was fitted on.", where="law", fix="Fit it on nearer sizes.")
        return Predicted(value, *(_central(drawn_K) or (None, None)))


PAPER = CapacityLaw(2.498, -11.498, 0.9957, float("nan"), (), torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64))
"""The published fit over GPT-2 (124M to 1.6B) and Pythia (70M to 2.8B), sizes in millions of parameters; quoted as T* ≈ 2.5 S."""


def fit_law(
    students: Sequence[float] | Tensor,
    teachers: Sequence[float] | Tensor,
    scores: Sequence[float] | Tensor,
    *,
    generator: torch.Generator,
    how: How = "surface",
    draws: int = 1000,
    apart: float = 1.25,
) -> CapacityLaw:
    """Fit the law on runs.

    surface: score ≈ a quadratic in (log S, log T), whose highest log T at a log S is T*(S), within the teachers tried. bins: students whose sizes are less than
    a factor `apart` from their neighbours' form a bin; in each, score ≈ a parabola in log T. Both are read off at the bins' geometric means; then T* is
    regressed on S. Interval: runs are drawn anew with replacement `draws` times; draws out of which the curves cannot be had are left out.

    Args:
        students, teachers, scores: [R] each, scores higher for better (minus a loss). generator: on the CPU, for the draws.

    Raises:
        InputError: sizes are not positive or something is not finite, or too few differ: six (S, T) for a surface, three T in a bin, two bins.
    """
    S, T, score = (torch.as_tensor(values, dtype=torch.float64) for values in (students, teachers, scores))
    _check_runs(S, T, score)
    s, t = S.log(), T.log()
    of = _bins(s, apart)
    J = int(of.max()) + 1
    if J < 2:
        raise InputError("all students are of one size: there is no law to fit.", where="students", fix="Give two sizes or more, or a smaller 'apart'.")
    at = torch.stack([s[of == j].mean() for j in range(J)])
    once = torch.ones(1, len(S), dtype=torch.float64)
    curves = _surface if how == "surface" else _parabolas
    best, inside, fitted, known = curves(s, t, score, of, at, once)
    if not bool(known[0]):
        need = "six different pairs of sizes, three of them a size of student" if how == "surface" else "three different teachers in every bin"
        raise InputError(f"these runs do not determine the curves: {need} are needed.", where="runs", fix="Add runs.")
    slope, intercept, r2 = _line(at.exp(), best.exp())
    slopes = intercepts = torch.zeros(0, dtype=torch.float64)
    if draws > 0:
        picked = torch.randint(len(S), (draws, len(S)), generator=generator)
        counts_KR = torch.zeros(draws, len(S), dtype=torch.float64).scatter_add_(1, picked, torch.ones(draws, len(S), dtype=torch.float64))
        again, _, _, whole = curves(s, t, score, of, at, counts_KR)
        slopes, intercepts, _ = _line(at.exp(), again[whole].exp())
    return CapacityLaw(
        float(slope[0]), float(intercept[0]), float(r2[0]), _r2(score, fitted[0]),
        tuple(Optimum(float(a), float(b), bool(c)) for a, b, c in zip(at.exp(), best[0].exp(), inside[0], strict=True)), slopes, intercepts,
    )  # fmt: skip


# ---- the curves ---------------------------------------------------------------------------------------------------------


def _surface(s: Tensor, t: Tensor, score: Tensor, of: Tensor, at: Tensor, weight_KR: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log T* [K, J] at log S `at`, whether it is inside [K, J], fitted scores [K, R], and whether the draw determines a surface [K]."""
    s0, t0 = s.mean(), t.mean()
    x, y = s - s0, t - t0
    design = torch.stack((torch.ones_like(x), x, y, x * x, x * y, y * y), 1)
    beta, known = _least_squares(design, score, weight_KR)
    low, high = _tried(t, of, len(at))
    linear = beta[:, 2:3] + beta[:, 4:5] * (at - s0)
    best, inside = _top(linear, beta[:, 5:6].expand_as(linear), low - t0, high - t0)
    return best + t0, inside, beta @ design.T, known


def _parabolas(s: Tensor, t: Tensor, score: Tensor, of: Tensor, at: Tensor, weight_KR: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same with one parabola in log T a bin."""
    low, high = _tried(t, of, len(at))
    best, inside = torch.zeros(len(weight_KR), len(at), dtype=t.dtype), torch.zeros(len(weight_KR), len(at), dtype=torch.bool)
    fitted, known = torch.zeros_like(weight_KR), torch.ones(len(weight_KR), dtype=torch.bool)
    for j in range(len(at)):
        here = of == j
        t0 = t[here].mean()
        y = t[here] - t0
        design = torch.stack((torch.ones_like(y), y, y * y), 1)
        beta, solved = _least_squares(design, score[here], weight_KR[:, here])
        top, within = _top(beta[:, 1], beta[:, 2], low[j] - t0, high[j] - t0)
        best[:, j], inside[:, j], known = top + t0, within, known & solved
        fitted[:, here] = beta @ design.T
    return best, inside, fitted, known


def _top(linear: Tensor, square: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Where linear·y + square·y² is highest for y in [low, high], and whether that is inside: the vertex of a curve that bends down, else the better end."""
    vertex = -linear / torch.where(square < 0, 2 * square, torch.full_like(square, -1.0))
    inside = (square < 0) & (vertex > low) & (vertex < high)
    at_low, at_high = linear * low + square * low**2, linear * high + square * high**2
    return torch.where(inside, vertex, torch.where(at_high >= at_low, high, low)), inside


def _tried(t: Tensor, of: Tensor, J: int) -> tuple[Tensor, Tensor]:
    """The smallest and the largest log T of every bin, [J] each."""
    return torch.stack([t[of == j].min() for j in range(J)]), torch.stack([t[of == j].max() for j in range(J)])


def _bins(s: Tensor, apart: float) -> Tensor:
    """[R] int64: sizes in rising order, a new bin wherever the next one is larger by the factor `apart` or more."""
    order = s.argsort()
    rises = torch.cat((torch.zeros(1, dtype=torch.bool), s[order].diff() >= torch.tensor(apart, dtype=s.dtype).log()))
    of = torch.empty(len(s), dtype=torch.int64)
    of[order] = rises.cumsum(0)
    return of


def _least_squares(design_RC: Tensor, y_R: Tensor, weight_KR: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients [K, C] of weighted least squares, and whether the weights determine them [K]."""
    scaled = design_RC / design_RC.norm(dim=0).clamp(min=1e-300)
    normal = torch.einsum("kr,ra,rb->kab", weight_KR, scaled, scaled)
    right = torch.einsum("kr,ra,r->ka", weight_KR, scaled, y_R)
    values = torch.linalg.eigvalsh(normal)
    known = values[:, 0] > SINGULAR * values[:, -1]
    eye = torch.eye(scaled.shape[1], dtype=scaled.dtype)
    solved = torch.linalg.solve(torch.where(known[:, None, None], normal, eye), right)
    return solved / design_RC.norm(dim=0).clamp(min=1e-300), known


def _line(x_J: Tensor, y_KJ: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Slope, intercept and R² [K] of least squares through (x, y)."""
    x = x_J - x_J.mean()
    y = y_KJ - y_KJ.mean(1, keepdim=True)
    slope = (x * y).sum(1) / (x * x).sum()
    left = (y - slope[:, None] * x).square().sum(1)
    return slope, y_KJ.mean(1) - slope * x_J.mean(), 1 - left / y.square().sum(1).clamp(min=1e-300)


def _r2(y: Tensor, fitted: Tensor) -> float:
    return float(1 - (y - fitted).square().sum() / (y - y.mean()).square().sum().clamp(min=1e-300))


def _central(drawn: Tensor) -> tuple[float, float] | None:
    if len(drawn) == 0:
        return None
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
    return low, high


def _positive(size: float, what: str) -> None:
    if not 0 < size < float("inf"):
        raise InputError(f"a {what} of {size:g} parameters.", where=what, fix="Give a positive number.")


def _check_runs(S: Tensor, T: Tensor, score: Tensor) -> None:
    if not len(S) == len(T) == len(score) > 0:
        raise InputError(f"{len(S)} students, {len(T)} teachers and {len(score)} scores.", where="runs", fix="Give one of each a run.")
    if not bool(torch.stack((S, T, score)).isfinite().all()) or not bool(((S > 0) & (T > 0)).all()):
        raise InputError("sizes must be positive and scores finite.", where="runs", fix="Leave such runs out.")
