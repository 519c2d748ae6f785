"""Which layer of the teacher a layer of the student learns from: tables, or a transport plan (Distiller, arXiv 2109.11105; section 2 of our sheet's loop).

K_S and K_T are layers of student and teacher. Hidden states count from the embeddings' output, 0 to K; attention maps from 0 to K − 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from limbeck.errors import InputError

Mapping = Literal["skip", "last", "emd"]
"""skip: evenly spread; last: the teacher's last layers; emd: every pair, weighted by an optimal transport plan (BERT-EMD, arXiv 2010.06133)."""
Pairs = tuple[tuple[int, int], ...]
"""(student's index, teacher's index), one a match."""


def hidden_map(student_layers: int, teacher_layers: int, mapping: Literal["skip", "last"]) -> Pairs:
    """Hidden states n = 0..K_S: skip n → ⌊n K_T/K_S⌋, last n → K_T − K_S + n. Raises InputError: the student has more layers.

    >>> hidden_map(4, 12, "skip"), hidden_map(4, 12, "last")
    (((0, 0), (1, 3), (2, 6), (3, 9), (4, 12)), ((0, 8), (1, 9), (2, 10), (3, 11), (4, 12)))
    """
    _check(student_layers, teacher_layers)
    if mapping == "skip":
        return tuple((n, n * teacher_layers // student_layers) for n in range(student_layers + 1))
    return tuple((n, teacher_layers - student_layers + n) for n in range(student_layers + 1))


def attention_map(student_layers: int, teacher_layers: int, mapping: Literal["skip", "last"]) -> Pairs:
    """Attention maps n = 0..K_S − 1: skip n → ⌊(n+1) K_T/K_S⌋ − 1, last n → K_T − K_S + n. Raises InputError: the student has more layers.

    >>> attention_map(4, 12, "skip")
    ((0, 2), (1, 5), (2, 8), (3, 11))
    """
    _check(student_layers, teacher_layers)
    if mapping == "skip":
        return tuple((n, (n + 1) * teacher_layers // student_layers - 1) for n in range(student_layers))
    return tuple((n, teacher_layers - student_layers + n) for n in range(student_layers))


def every_pair(student_layers: int, teacher_layers: int, first: int = 1) -> Pairs:
    """Each layer of the student with each of the teacher, student's major. first: 1 for hidden states (embeddings left out), 0 for attention maps."""
    return tuple((n, m) for n in range(first, student_layers + first) for m in range(first, teacher_layers + first))


def transport_plan(distances_NM: Tensor, student_mass: Sequence[float] | None = None, teacher_mass: Sequence[float] | None = None) -> Tensor:
    """F ≥ 0 that minimises Σ F_nm D_nm with Σ_m F_nm = student_mass_n and Σ_n F_nm = teacher_mass_m (uniform masses by default): exact, by linear programming.

    Args:
        distances_NM: D, [N, M], finite, of any sign; its graph is not used. The plan is solved on the host, in float64: one small transfer a call.

    Returns:
        F, [N, M], of D's type and device, a constant. Where several plans are best, any of them.

    Raises:
        InputError: D is no matrix or not finite; masses of the wrong number, negative, or of different sums.
    """
    from scipy.optimize import linprog

    if distances_NM.dim() != 2:
        raise InputError(f"distances are of shape {list(distances_NM.shape)}, no matrix.", where="distances")
    cost = distances_NM.detach().double().cpu().numpy()
    N, M = cost.shape
    rows = np.full(N, 1.0 / N) if student_mass is None else np.asarray(student_mass, dtype=float)
    columns = np.full(M, 1.0 / M) if teacher_mass is None else np.asarray(teacher_mass, dtype=float)
    if rows.shape != (N,) or columns.shape != (M,) or (rows < 0).any() or (columns < 0).any() or abs(rows.sum() - columns.sum()) > 1e-9:
        raise InputError("masses must be as many as layers, not negative, and sum to the same on both sides.", where="masses")
    if not np.isfinite(cost).all():
        raise InputError("a distance between two layers is not finite.", where="mapping", fix="A smaller learning rate may help.")
    constraints = np.concatenate((np.kron(np.eye(N), np.ones((1, M))), np.kron(np.ones((1, N)), np.eye(M))))
    found = linprog(cost.ravel(), A_eq=constraints, b_eq=np.concatenate((rows, columns)), bounds=(0, None), method="highs")
    return torch.from_numpy(found.x.reshape(N, M).clip(min=0)).to(distances_NM)


def _check(student_layers: int, teacher_layers: int) -> None:
    if not 1 <= student_layers <= teacher_layers:
        raise InputError(
            f"a student of {student_layers} layers cannot be matched with a teacher of {teacher_layers}.",
            where="mapping",
            fix="Give the student at most the teacher's layers, or use mapping 'emd'.",
        )
