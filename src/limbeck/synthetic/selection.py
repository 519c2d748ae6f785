"""Which real images stand for their class: drawn at random, or nearest to the centres of k-means. What sets start from, and what they are compared with.

N samples, F features, C classes; unlabelled samples (IGNORE) are never chosen.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from limbeck import seeds
from limbeck.contract import IGNORE
from limbeck.errors import InputError

RESTARTS = 10
"""How often k-means is started anew; the best run counts."""


def random_per_class(labels_N: Tensor, per_class: int, generator: torch.Generator, *, num_classes: int | None = None) -> Tensor:
    """[C · per_class] int64 positions, distinct, class by class, uniformly drawn.

    Args:
        labels_N: [N] int64. generator: on the CPU. num_classes: C; None: the largest label and one.

    Raises:
        InputError: `per_class` is below 1, or a class has too few samples.
    """
    found = []
    for members in _members(labels_N, per_class, num_classes):
        found.append(members[torch.randperm(len(members), generator=generator)[:per_class]])
    return torch.cat(found)


def kmeans_per_class(features_NF: Tensor, labels_N: Tensor, per_class: int, seed: int, *, num_classes: int | None = None) -> Tensor:
    """[C · per_class] int64 positions, distinct, class by class: k-means with `per_class` centres in each class, and the sample nearest to each centre.

    In logits of a trained network it is AST's representative start (our sheet `ast`, eq. 11); in its features DC-BENCH's baseline (arXiv 2207.09639).
    The released code of AST has ten centres whatever is asked for; here there are as many as images. Where two centres have the same nearest sample, the
    nearer centre takes it and the other takes its next (ours). Equal samples may share a centre: then others fill up.

    Args:
        features_NF: [N, F] finite numbers. labels_N: [N] int64. seed: of the centres' starts. num_classes: as in `random_per_class`.

    Raises:
        InputError: as `random_per_class`; or the features are not [N, F] finite numbers.
    """
    if features_NF.dim() != 2 or len(features_NF) != len(labels_N) or features_NF.shape[1] < 1:
        raise InputError(f"features must be [{len(labels_N)}, numbers], these are {list(features_NF.shape)}.", where="features", fix="Flatten images first.")
    if not bool(features_NF.isfinite().all()):
        raise InputError("some features are not finite.", where="features")
    points_NF = features_NF.detach().cpu().double()
    return torch.cat([
        members[_nearest(points_NF[members], per_class, seeds.derive(seed, "k-means", number) % 2**32)]
        for number, members in enumerate(_members(labels_N, per_class, num_classes))
    ])  # fmt: skip


def _members(labels_N: Tensor, per_class: int, num_classes: int | None) -> list[Tensor]:
    """The positions of each class, in order."""
    if per_class < 1:
        raise InputError(f"'per_class' is {per_class}.", where="per_class", fix="It must be 1 or more.")
    labels = labels_N.detach().cpu()
    known = labels[labels != IGNORE]
    if labels.dim() != 1 or labels.is_floating_point() or not len(known) or int(known.min()) < 0:
        raise InputError("labels must be [N] classes from 0.", where="labels")
    classes = int(known.max()) + 1 if num_classes is None else num_classes
    found = [(labels == k).nonzero()[:, 0] for k in range(classes)]
    for number, members in enumerate(found):
        if len(members) < per_class:
            raise InputError(
                f"class {number} has {len(members)} samples, {per_class} are asked for.", where="per_class", fix="Ask for fewer, or give more data."
            )
    return found


def _nearest(points_KF: Tensor, count: int, seed: int) -> Tensor:
    """[count] distinct places among the points of one class: of each centre's nearest, the nearest pair first."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than centres
        centres = KMeans(count, n_init=RESTARTS, random_state=seed).fit(points_KF.numpy()).cluster_centers_
    distance = torch.cdist(torch.from_numpy(centres), points_KF, compute_mode="donot_use_mm_for_euclid_dist")
    found = torch.full((count,), -1)
    for _ in range(count):
        centre, point = divmod(int(distance.argmin()), len(points_KF))
        found[centre] = point
        distance[centre] = torch.inf
        distance[:, point] = torch.inf
    return found
