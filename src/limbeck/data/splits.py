"""Dividing a data set: validation, nested subsets, hidden labels; each a pure function of the data and a seed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck import seeds
from limbeck.contract import IGNORE, Data
from limbeck.data.arrays import ArrayData
from limbeck.errors import InputError


@dataclass(frozen=True)
class Splits:
    """What a data source returns: a training set and a test set."""

    train: Data
    test: Data

    @property
    def num_classes(self) -> int:
        """Number of classes: named ones, or one more than the largest training target. Raises InputError where there are no targets."""
        if self.train.classes:
            return len(self.train.classes)
        targets = self.train.targets
        if targets is None or not len(targets) or int(targets.max()) < 0:
            raise InputError("the training set has neither class names nor targets.", where="data", fix="Give it targets, or name its classes.")
        return int(targets.max()) + 1

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one prepared input, without the batch dimension."""
        raw, _ = self.train.fetch(torch.zeros(1, dtype=torch.int64))
        return tuple(self.train.prepare(raw).shape[1:])


class View:
    """Some samples of another data set, or all of them with other targets, without copying (a `contract.Data`).

    Args:
        data: the data set looked at. indices_M: [M] int64, None: all. targets_M: [M] int64 in place of the data set's own.

    A random transform of `data` is seeded by the position in `data`, so a sample looks the same through every view.
    """

    def __init__(self, data: Data, indices_M: Tensor | None = None, targets_M: Tensor | None = None) -> None:
        self.data, self.classes = data, data.classes
        self.indices = torch.arange(len(data)) if indices_M is None else indices_M
        self._replaced = targets_M

    @property
    def targets(self) -> Tensor | None:
        """[M] int64, IGNORE where unlabelled, or None."""
        if self._replaced is not None:
            return self._replaced
        targets = self.data.targets
        return None if targets is None else targets.index_select(0, self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def fetch(self, ids_B: Tensor, *, seed: int = 0, epoch: int = 0) -> tuple[Tensor, Tensor | None]:
        """Raw inputs [B, ...] and targets [B] of positions in this view."""
        raw, targets = self.data.fetch(self.indices.index_select(0, ids_B), seed=seed, epoch=epoch)
        return raw, targets if self._replaced is None else self._replaced.index_select(0, ids_B)

    def prepare(self, raw: Tensor) -> Tensor:
        """As the data set looked at prepares."""
        return self.data.prepare(raw)

    def preprocessing(self) -> dict[str, object]:
        """As the data set looked at says, for artefacts."""
        return preprocessing(self.data)


class Joined:
    """A data set with the inputs of others behind it, unlabelled (a `contract.Data`): what `data.pool` makes.

    Args:
        first: comes first, with its targets, classes and normalisation. others: their inputs are taken, their targets are not.

    Raises:
        InputError: the raw inputs differ in shape or type.
    """

    def __init__(self, first: Data, *others: Data) -> None:
        self.parts, self.classes = (first, *others), first.classes
        self.starts = torch.tensor([0, *(len(part) for part in self.parts)]).cumsum(0)
        own = first.targets
        self._targets = None if own is None else torch.cat((own, own.new_full((int(self.starts[-1]) - len(own),), IGNORE)))
        probes = [part.fetch(torch.zeros(1, dtype=torch.int64))[0] for part in self.parts]
        for number, probe in enumerate(probes[1:]):
            if probe.shape != probes[0].shape or probe.dtype != probes[0].dtype:
                raise InputError(
                    f"its inputs are {list(probe.shape[1:])} {probe.dtype}, the data's {list(probes[0].shape[1:])} {probes[0].dtype}.", where=str(number)
                )

    @property
    def targets(self) -> Tensor | None:
        """[N] int64: the first part's, IGNORE for the others; None where the first has none."""
        return self._targets

    def __len__(self) -> int:
        return int(self.starts[-1])

    def fetch(self, ids_B: Tensor, *, seed: int = 0, epoch: int = 0) -> tuple[Tensor, Tensor | None]:
        """Raw inputs [B, ...] and targets [B], out of the parts."""
        part_B = torch.searchsorted(self.starts[1:], ids_B, right=True)
        found, places = [], []
        for number in part_B.unique().tolist():
            where = (part_B == number).nonzero()[:, 0]
            found.append(self.parts[number].fetch(ids_B[where] - self.starts[number], seed=seed, epoch=epoch)[0])
            places.append(where)
        targets = self.targets
        return torch.cat(found)[torch.cat(places).argsort()], None if targets is None else targets.index_select(0, ids_B)

    def prepare(self, raw: Tensor) -> Tensor:
        """As the first part prepares."""
        return self.parts[0].prepare(raw)

    def preprocessing(self) -> dict[str, object]:
        """As the first part says, for artefacts."""
        return preprocessing(self.parts[0])


def preprocessing(data: Data) -> dict[str, object]:
    """What turns raw inputs into a network's, as JSON values; empty where the data do not say."""
    found = getattr(data, "preprocessing", None)
    return found() if callable(found) else {}


def origins(data: Data) -> Tensor:
    """[N] int64: each sample's place in the whole data set that `data` was cut out of (`root`)."""
    if isinstance(data, View):
        return origins(data.data).index_select(0, data.indices)
    found = getattr(data, "origins", None)
    return found if isinstance(found, Tensor) else torch.arange(len(data))


def root(data: Data) -> Data:
    """The whole data set that `data` was cut out of, through subsets and replaced targets."""
    return root(data.data) if isinstance(data, View) else getattr(data, "root", data)


def inputs_fingerprint(data: Data) -> str:
    """SHA-256 (hex) of the inputs that a network sees, of the whole data set, whatever the labels.

    Of data in memory, all inputs and the normalisation are read; of anything else, the length and 64 samples spread evenly, prepared.
    """
    whole = root(data)
    known = getattr(whole, "inputs_fingerprint", None)
    if isinstance(known, str):
        return known
    probe, _ = whole.fetch(torch.linspace(0, len(whole) - 1, min(64, len(whole)), dtype=torch.float64).to(torch.int64))
    digest = hashlib.sha256(repr((len(whole), tuple(probe.shape))).encode())
    digest.update(whole.prepare(probe).contiguous().numpy().data)
    return digest.hexdigest()


def subset(data: Data, indices_M: Tensor) -> Data:
    """The samples at `indices_M` ([M] int64), in that order: a copy of an ArrayData, a view of anything else."""
    return data.subset(indices_M) if isinstance(data, ArrayData) else View(data, indices_M)


def with_targets(data: Data, targets_N: Tensor) -> Data:
    """The same inputs with other targets ([N] int64)."""
    return data.with_targets(targets_N) if isinstance(data, ArrayData) else View(data, targets_M=targets_N)


def stratified_order(targets_N: Tensor, *facts: int | str) -> Tensor:
    """An order of the samples in which every prefix holds the classes in proportion (within one sample a class, nearly).

    Args:
        targets_N: [N] int64; equal numbers form a stratum, IGNORE too. facts: what the order depends on (seed, purpose).

    Returns:
        [N] int64, a permutation. The j-th member of a stratum of n, in random order, is placed at (j + 1/2) / n.
    """
    generator = seeds.generator(*facts, "stratified")
    shuffled_N = torch.randperm(len(targets_N), generator=generator)
    _, stratum_N, size_K = targets_N[shuffled_N].unique(return_inverse=True, return_counts=True)
    grouped_N = stratum_N.argsort(stable=True)  # positions in the shuffle, stratum by stratum
    first_K = size_K.cumsum(0) - size_K
    place_N = torch.empty(len(targets_N), dtype=torch.float64)
    own_N = stratum_N[grouped_N]
    place_N[grouped_N] = (torch.arange(len(targets_N)) - first_K[own_N] + 0.5) / size_K[own_N].to(torch.float64)
    return shuffled_N[place_N.argsort(stable=True)]  # ties fall in the shuffle's order


def hold_out(data: Data, count: int, seed: int) -> tuple[Data, Data]:
    """(the rest, `count` held-out samples), stratified by class where there are targets; both keep the order of `data`.

    Raises:
        InputError: `count` is not between 1 and len(data) - 1.
    """
    _check_count(count, len(data) - 1, "the held-out part")
    order_N = stratified_order(_strata(data), seed, "hold_out")
    return subset(data, order_N[count:].sort().values), subset(data, order_N[:count].sort().values)


def stratified_subset(data: Data, count: int, seed: int) -> Data:
    """`count` samples, stratified by class where there are targets; a smaller count is a prefix of a larger one (same seed).

    Raises:
        InputError: `count` is not between 1 and len(data).
    """
    _check_count(count, len(data), "the subset")
    return subset(data, stratified_order(_strata(data), seed, "subset")[:count])


def hide_labels(data: Data, keep: int, seed: int) -> Data:
    """The same samples, all but `keep` stratified labels replaced by IGNORE; fewer kept labels are among more (same seed).

    Raises:
        InputError: there are no targets, or `keep` is not between 1 and the number of labelled samples.
    """
    targets_N = data.targets
    if targets_N is None:
        raise InputError("the data set has no labels to hide.", where="data")
    labelled_M = (targets_N != IGNORE).nonzero()[:, 0]
    _check_count(keep, len(labelled_M), "the number of labels kept")
    kept = labelled_M[stratified_order(targets_N[labelled_M], seed, "labels")[:keep]]
    hidden_N = torch.full_like(targets_N, IGNORE)
    hidden_N[kept] = targets_N[kept]
    return with_targets(data, hidden_N)


def corrupt_labels(data: Data, fraction: float, seed: int) -> Data:
    """The same data with round(`fraction`·N) labels replaced by a wrong one, uniform over the other classes; unlabelled samples stay so.

    Raises:
        InputError: there are no targets, or only one class.
    """
    targets = data.targets
    if targets is None or int(targets.max()) < 1:
        raise InputError("only data with targets of two classes or more can have wrong labels.", where="label_noise")
    classes = int(targets.max()) + 1
    generator = seeds.generator(seed, "label noise")
    labelled = (targets != IGNORE).nonzero()[:, 0]
    hit = labelled[torch.randperm(len(labelled), generator=generator)[: round(fraction * len(labelled))]]
    wrong = targets.clone()
    wrong[hit] = (targets[hit] + torch.randint(1, classes, (len(hit),), generator=generator)) % classes
    return with_targets(data, wrong)


def _strata(data: Data) -> Tensor:
    targets = data.targets
    return torch.zeros(len(data), dtype=torch.int64) if targets is None else targets


def _check_count(count: int, most: int, what: str) -> None:
    if not 1 <= count <= most:
        raise InputError(f"{what} cannot have {count} samples: between 1 and {most} are possible.", where="count")
