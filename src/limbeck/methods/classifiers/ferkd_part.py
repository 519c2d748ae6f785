"""What FKD (2112.01528) and FerKD (2312.17473) do to stored soft labels, as pure functions of tensors: compact label types, regions, adapted labels, SelfMix.

Legend: B rows (crops), C classes, K kept classes, N images, V stored crops of each; q a teacher's softmax of a crop, y the true class, s a crop's score.
Equation numbers are those of our sheet. No function here knows a teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from limbeck.contract import IGNORE
from limbeck.errors import InputError

LabelType = Literal["full", "hard", "smoothing", "marginal_smoothing", "marginal_renorm"]
"""What is kept of a soft label (eq. 2): all of it; the top class; the top class and its value; the top K and their values, in two ways to fill the rest."""

DISCARD, HARD, SOFT = 0, 1, 2
"""The regions of eq. 4: not used; used with the smoothed truth; used with the stored soft label."""


# ---- label types (2112.01528) ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredLabels:
    """A compact soft label. indices: [B, K] int64, descending by value (never cast to float16, which is exact to 2048 only). values: [B, K]."""

    indices: Tensor
    values: Tensor


def kept_classes(label_type: LabelType, k: int, classes: int) -> int:
    """How many classes a label type keeps: C, 1, 1, or k.

    Raises:
        InputError: k is not in [1, C] where it counts.
    """
    if label_type in ("hard", "smoothing"):
        return 1
    if label_type == "full":
        return classes
    if not 1 <= k <= classes:
        raise InputError(f"the {k} largest of {classes} classes cannot be kept.", where="k", fix=f"Use 1 to {classes}.")
    return k


def quantise(q_BC: Tensor, label_type: LabelType, k: int = 5) -> StoredLabels:
    """Keep the largest entries of each soft label (eq. 2, the storing half; FKD's code: `marginal_smoothing_k5`, here the type and k apart).

    Args:
        q_BC: [B, C] probabilities. k: classes kept by the two marginal types.

    Raises:
        InputError: k is not in [1, C].
    """
    values_BK, indices_BK = q_BC.topk(kept_classes(label_type, k, q_BC.shape[-1]), dim=-1)
    return StoredLabels(indices_BK, torch.ones_like(values_BK) if label_type == "hard" else values_BK)


def recover(stored: StoredLabels, label_type: LabelType, classes: int) -> Tensor:
    """Soft labels out of what was kept, rows sum to 1, [B, C] (eq. 2, the reading half).

    hard, full: what was stored, 0 elsewhere. smoothing, marginal_smoothing: the rest, 1 − Σ values, spread over the C − K other classes (not over C;
    with K = C there is none). marginal_renorm: the values divided by their sum.
    """
    values_BK, rest_B1 = stored.values, stored.values.new_zeros(len(stored.values), 1)
    others = classes - values_BK.shape[-1]
    if label_type == "marginal_renorm":
        values_BK = values_BK / values_BK.sum(-1, keepdim=True)
    elif label_type in ("smoothing", "marginal_smoothing") and others:
        rest_B1 = (1 - values_BK.sum(-1, keepdim=True)).clamp(min=0) / others
    return rest_B1.repeat(1, classes).scatter(-1, stored.indices, values_BK)


# ---- regions and adapted labels (2312.17473, partly reconstructed) --------------------------------------------------------


def crop_scores(q_BC: Tensor, targets_B: Tensor | None, by: Literal["max", "label"] = "max") -> Tensor:
    """The teacher's certainty s of a crop, [B] float32 in [0, 1] (eq. 4; which of the two the paper means is not known).

    Args:
        q_BC: [B, C] probabilities. targets_B: [B] int64, IGNORE where unlabelled, or None. by: "max": max_k q_k; "label": q_y (unlabelled: max_k q_k, ours).
    """
    s_B = q_BC.amax(-1)
    if by == "label" and targets_B is not None:
        of_label_B = q_BC.gather(-1, targets_B.clamp(min=0)[:, None])[:, 0]
        s_B = torch.where(targets_B == IGNORE, s_B, of_label_B)
    return s_B.to(torch.float32).clamp(0, 1)  # a softmax may be 1 + 1e-7, which is no more than T_T = 1


def quantile(s: Tensor, share: float) -> float:
    """The value at rank round(share · (n − 1)) of all n values, any shape: at most that share lies below it. inf for a share above 1 (ours)."""
    return float("inf") if share > 1 else float(s.flatten().kthvalue(1 + round(share * (s.numel() - 1))).values)


def crop_regions(s: Tensor, low: float, middle: float, top: float) -> Tensor:
    """Eq. 4: DISCARD where s < T_L or s > T_T, HARD where T_L ≤ s < T_M, else SOFT; uint8, the shape of s."""
    region = torch.full_like(s, SOFT, dtype=torch.uint8)
    region[s < middle] = HARD
    region[(s < low) | (s > top)] = DISCARD
    return region


def keep_a_crop(region_NV: Tensor, s_NV: Tensor, labelled_N: Tensor) -> tuple[Tensor, int]:
    """Give every image a crop to train on: our rules, the paper's are not known.

    HARD crops of unlabelled images have no truth and become DISCARD. An image without any usable crop keeps the one with the highest s, with the
    smoothed truth, or its soft label where it is unlabelled.

    Args:
        region_NV: [N, V] uint8. s_NV: [N, V]. labelled_N: [N] bool.

    Returns:
        [N, V] uint8 anew, and how many images had no usable crop.
    """
    region_NV = region_NV.masked_fill((region_NV == HARD) & ~labelled_N[:, None], DISCARD)
    bare_M = (region_NV == DISCARD).all(1).nonzero()[:, 0]
    region_NV[bare_M, s_NV[bare_M].argmax(1)] = torch.where(labelled_N[bare_M], HARD, SOFT).to(torch.uint8)
    return region_NV, len(bare_M)


def smoothed_truth(targets_B: Tensor, classes: int, epsilon: float) -> Tensor:
    """1 − ε at y and ε/(C − 1) elsewhere, [B, C] float32 (eq. 4; the spread over C − 1 is ours). Unlabelled rows are meaningless."""
    rows_BC = torch.full((len(targets_B), classes), epsilon / max(classes - 1, 1), device=targets_B.device)
    return rows_BC.scatter_(1, targets_B.clamp(min=0)[:, None], 1 - epsilon)


def adapted_labels(q_BC: Tensor, targets_B: Tensor, region_B: Tensor, epsilon: float) -> Tensor:
    """ŷ of eq. 4, [B, C]: the smoothed truth where the region is HARD, the stored soft label, bit for bit, elsewhere."""
    truth_BC = smoothed_truth(targets_B, q_BC.shape[-1], epsilon).to(q_BC.dtype)
    return torch.where((region_B == HARD)[:, None], truth_BC, q_BC)


# ---- SelfMix (2312.17473, pairing and probability reconstructed) ------------------------------------------------------------


def same_image_mates(ids_B: Tensor) -> Tensor:
    """The partner of each crop: the next one of its image, the first after the last; [B] int64. A lone crop is its own.

    Args:
        ids_B: [B] int64, the crops of an image side by side.
    """
    row_B = torch.arange(len(ids_B), device=ids_B.device)
    first_B = torch.ones_like(ids_B, dtype=torch.bool)
    first_B[1:] = ids_B[1:] != ids_B[:-1]
    start_B = torch.where(first_B, row_B, 0).cummax(0).values
    return torch.where(first_B.roll(-1), start_B, row_B + 1)


def other_image_mates(ids_B: Tensor) -> Tensor:
    """The crop half a batch further on, of another image if there are two or more with equally many crops: ordinary mixing, the baseline."""
    return torch.arange(len(ids_B), device=ids_B.device).roll(-(len(ids_B) // 2))


def mixup(inputs: Tensor, labels_BC: Tensor, mates_B: Tensor, keep: float) -> tuple[Tensor, Tensor]:
    """λ x_a + (1 − λ) x_b and the same of the labels, in probability space (eq. 5). λ = `keep`; a crop with itself, or λ = 1, is left as it is, exactly."""
    return torch.lerp(inputs, inputs[mates_B], 1 - keep), torch.lerp(labels_BC, labels_BC[mates_B], 1 - keep)


def cutmix(inputs_BCHW: Tensor, labels_BC: Tensor, mates_B: Tensor, keep: float, row: float, column: float) -> tuple[Tensor, Tensor]:
    """Paste the same box of every mate, about the share 1 − λ of the area, clipped at the border; labels by the exact share (eq. 5; box: 1905.04899).

    Args:
        inputs_BCHW: images. labels_BC: [B, C]. keep: λ wanted. row, column: the box's centre in [0, 1).

    Raises:
        InputError: the inputs are not images.
    """
    if inputs_BCHW.dim() != 4:
        raise InputError(f"cutmix needs images, these inputs have the shape {list(inputs_BCHW.shape)[1:]}.", where="method.mix", fix="Use mixup.")
    sides, side = inputs_BCHW.shape[2:], (1 - keep) ** 0.5
    (top, bottom), (left, right) = (_span(centre, side, length) for centre, length in zip((row, column), sides, strict=True))
    mixed = inputs_BCHW.clone()
    mixed[:, :, top:bottom, left:right] = inputs_BCHW[mates_B, :, top:bottom, left:right]
    return mixed, torch.lerp(labels_BC, labels_BC[mates_B], (bottom - top) * (right - left) / (sides[0] * sides[1]))


def _span(centre: float, side: float, length: int) -> tuple[int, int]:
    """First pixel and the one after the last of a side of `side · length` pixels around `centre · length`, inside the image."""
    size = int(side * length)
    start = int(centre * length) - size // 2
    return max(start, 0), min(max(start + size, 0), length)
