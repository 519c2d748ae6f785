"""What an entropy coder knows of a corpus before it sees a row: which ids go together, and how often what comes next. Fitted once, then whole numbers only.

Legend: N rows of k ids, V vocabulary, C clusters of rows, M ids listed for each cluster. A row belongs to the cluster in which its ids are likeliest.
In it every id has a *rank*: its place in the cluster's list of M ids, or M + its place among all ids by how often they come (`base`). Common ids come first.
Costs are in quarters of a bit: whole numbers, so that the same row gets the same cluster on every machine.
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limbeck.errors import InputError
from limbeck.records.rans import TOTAL, frequencies

Array = NDArray[Any]

TOP, ESCAPE, LEVELS = 126, 127, 128
"""Symbols of levels: 0 … 125, the most probable id, and a level above that follows in `LEVEL_BITS` bits."""
LEVEL_BITS, GAP_BITS = 10, 20
LEASTS, TAILS, LEFTS = 10, 8, 16
CENTRES = 16
LISTED = 2048
_ROUNDS, _PULL, _ROWS_A_CLUSTER = 12, 4000.0, 512


def _gap_classes() -> tuple[Array, Array]:
    """Gaps 0 … 7 one by one, then four classes an octave, up to 2^20; the last class is the escape: (first gap, bits of the rest)."""
    first, bits = list(range(8)), [0] * 8
    for octave in range(3, GAP_BITS):
        first += [(1 << octave) + (quarter << (octave - 2)) for quarter in range(4)]
        bits += [octave - 2] * 4
    return np.array([*first, 0]), np.array([*bits, GAP_BITS])


GAP_FIRST, GAP_RAW = _gap_classes()
GAPS = len(GAP_FIRST)


def left_of(k: int) -> list[int]:
    """The class of how many ids of a row are left, before each of its k ids: half octaves."""
    return [min(LEFTS - 1, int(2 * np.log2(left) + 1e-9)) for left in range(k, 0, -1)]


def bucket_bounds(listed: int) -> Array:
    """Where buckets of ranks begin: octaves, then four beyond the list."""
    inside = [0, *(1 << octave for octave in range(20) if 1 << octave < listed)]
    return np.array([*inside, *(listed + more for more in (0, 512, 2048, 8192))])


@dataclass(frozen=True, eq=False)
class Prior:
    """The tables. Frequencies have a row for each context (`rans.frequencies`): `gap` by bucket of the rank before and number of ids left, `level` by bucket
    of the rank and least level of the row.

    rows: how many rows it was fitted on. base_cost [V] uint8. cost [C, W] uint8: of the W first ids of `base`, 0 where an id is not in the list; unlisted [C]:
    what an id that is not in the list costs beyond its base cost. centre [CENTRES]: mean probability of the lowest levels; tail_centre: of level 0 of the tail.
    """

    rows: int
    base_cost: Array
    cost: Array
    unlisted: Array
    cluster: Array
    tail: Array
    least: Array
    gap: Array
    level: Array
    centre: Array
    tail_centre: Array

    @property
    def listed(self) -> int:
        """M."""
        return int(np.count_nonzero(self.cost[0]))

    @property
    def buckets(self) -> int:
        """Buckets of ranks, and one for no rank yet."""
        return 1 + len(bucket_bounds(self.listed))

    def base(self) -> Array:
        """All ids by how often they come, [V]."""
        return np.argsort(self.base_cost, kind="stable")

    def lists(self) -> Array:
        """Base ranks of the ids of each cluster by cost, [C, M]."""
        return np.argsort(np.where(self.cost > 0, self.cost.astype(np.int64), 256), axis=1, kind="stable")[:, : self.listed]

    def text(self) -> str:
        """All of it as one line of text, compressed."""
        arrays = {field.name: np.asarray(getattr(self, field.name)) for field in fields(self) if field.name != "rows"}
        head = {"rows": self.rows, "arrays": {name: [array.dtype.str, list(array.shape)] for name, array in arrays.items()}}
        body = json.dumps(head, sort_keys=True).encode() + b"\n" + b"".join(np.ascontiguousarray(arrays[name]).tobytes() for name in sorted(arrays))
        return base64.b64encode(zlib.compress(body, 9)).decode()

    @classmethod
    def of_text(cls, text: str, vocabulary: int) -> Prior:
        """What `text` gave. Raises InputError where it is not that, or of another vocabulary."""
        try:
            body = zlib.decompress(base64.b64decode(text, validate=True))
            line, _, content = body.partition(b"\n")
            head = json.loads(line)
            found, at = {}, 0
            for name in sorted(head["arrays"]):
                kind, shape = head["arrays"][name]
                size = np.dtype(kind).itemsize * int(np.prod(shape))
                found[name] = np.frombuffer(content[at : at + size], kind).reshape(shape)
                at += size
            prior = cls(rows=int(head["rows"]), **found)
        except (binascii.Error, zlib.error, ValueError, KeyError, TypeError) as error:
            raise InputError("is not a prior that was fitted.", where="prior", fix="Restore the record's manifest, or record again.") from error
        if prior.base_cost.shape != (vocabulary,):
            what = f"is of a vocabulary of {len(prior.base_cost):,}, not of {vocabulary:,}."
            raise InputError(what, where="prior", fix="Fit the codec on rows of this vocabulary.")
        prior._check()
        return prior

    def _check(self) -> None:
        """Shapes and sums that decoding relies on. Raises InputError."""
        clusters, contexts = len(self.cost), self.buckets
        shapes = {"cluster": (1, max(2, clusters)), "tail": (1, LEVELS), "least": (TAILS, LEASTS)}
        shapes |= {"gap": (contexts * LEFTS, GAPS), "level": (contexts * LEASTS, LEVELS)}
        whole = all(
            (table := getattr(self, name)).shape == shape and (table.sum(axis=1) == TOTAL).all() and int(table.max()) < TOTAL for name, shape in shapes.items()
        )
        lists = (np.count_nonzero(self.cost, axis=1) == self.listed).all() and self.cost.shape[1] <= len(self.base_cost)
        if not whole or not lists or self.centre.shape != (CENTRES,) or not (self.centre > 0).all() or not (self.tail_centre > 0).all():
            raise InputError("has tables that do not fit together.", where="prior", fix="Restore the record's manifest, or record again.")


@dataclass(frozen=True, eq=False)
class Steps:
    """Rows as the coder sees them, ids by rank: cluster and least level [N]; level (−1: the most probable id), gap to the rank before and its class, bucket of
    the rank before (0: there is none) and of the rank, [N, k].
    """

    cluster: Array
    least: Array
    level: Array
    gap: Array
    gap_class: Array
    before: Array
    bucket: Array


class Ranks:
    """Clusters and ranks of rows, for fitting and encoding."""

    def __init__(self, base_cost_V: Array, cost_CW: Array, unlisted_C: Array, cluster_cost_C: Array) -> None:
        self.base = np.argsort(base_cost_V, kind="stable")
        self.base_cost = base_cost_V[self.base].astype(np.int64)
        self.base_rank = np.empty_like(self.base)
        self.base_rank[self.base] = np.arange(len(self.base))
        self.cost, self.unlisted, self.cluster_cost = cost_CW, unlisted_C.astype(np.int64), cluster_cost_C.astype(np.int64)
        clusters, self.width = cost_CW.shape
        self.listed = int(np.count_nonzero(cost_CW[0]))
        order = np.argsort(np.where(cost_CW > 0, cost_CW.astype(np.int64), 256), axis=1, kind="stable")[:, : self.listed]
        self.place = np.full((clusters, self.width + 1), -1, np.int32)
        np.put_along_axis(self.place, order, np.arange(self.listed, dtype=np.int32)[None], axis=1)
        none = np.zeros((clusters, 1), np.uint8)
        self.padded = np.concatenate([cost_CW, none], axis=1)
        self.bounds = bucket_bounds(self.listed)

    def clusters(self, ids_NK: Array) -> Array:
        """The cheapest cluster of each row (ties: the first), [N]."""
        rank = self.base_rank[ids_NK]
        base = self.base_cost[rank].astype(np.int32)
        column = np.minimum(rank, self.width)
        best = np.full(len(ids_NK), 1 << 30, np.int64)
        found = np.zeros(len(ids_NK), np.int64)
        for cluster in range(len(self.cost)):
            costs = self.padded[cluster][column]
            total = np.where(costs > 0, costs, base + int(self.unlisted[cluster])).sum(axis=1) + self.cluster_cost[cluster]
            less = total < best
            best[less], found[less] = total[less], cluster
        return found

    def steps(self, ids_NK: Array, levels: Levels) -> Steps:
        """Canonical rows with their levels (the first id's is not looked at)."""
        cluster = self.clusters(ids_NK)
        base_rank = self.base_rank[ids_NK]
        place = self.place[cluster[:, None], np.minimum(base_rank, self.width)]
        rank = np.where(place >= 0, place, self.listed + base_rank)
        level = levels.level
        least = np.minimum(level[:, 1:].min(axis=1), LEASTS - 1) if level.shape[1] > 1 else np.zeros(len(level), np.int64)
        level = level.copy()
        level[:, 0] = -1
        order = np.argsort(rank, axis=1)
        rank, level = np.take_along_axis(rank, order, axis=1), np.take_along_axis(level, order, axis=1)
        gap = np.diff(rank, axis=1, prepend=-1) - 1
        bucket = np.searchsorted(self.bounds, rank, side="right")
        before = np.concatenate([np.zeros((len(rank), 1), np.int64), bucket[:, :-1]], axis=1)
        return Steps(cluster, least, level, gap, np.searchsorted(GAP_FIRST[:-1], gap, side="right") - 1, before, bucket)


def level_symbols(level: Array) -> Array:
    """Levels (−1: the most probable id) to symbols."""
    return np.where(level < 0, TOP, np.where(level < TOP, level, ESCAPE))


def _quarters(share: Array) -> Array:
    """Probabilities to costs in quarters of a bit, 1 … 255."""
    return np.clip(np.rint(-4 * np.log2(np.maximum(share, 1e-300))), 1, 255).astype(np.uint8)


def _cluster(ids_NK: Array, clusters: int) -> tuple[Array, Array, Array]:
    """Rows in groups that make their ids likeliest (k-means with code lengths for distances): counts [C, V'], rows of each [C]; V' ids that were seen, [V']."""
    seen, flat = np.unique(ids_NK, return_inverse=True)
    ids = flat.reshape(ids_NK.shape)
    share = np.bincount(ids.reshape(-1)) / ids.size
    start = (ids_NK[:, 0].astype(np.uint64) * np.uint64(2654435761)) >> np.uint64(7)
    group = (start % np.uint64(clusters)).astype(np.int64)
    for turn in range(_ROUNDS + 1):
        counts = np.bincount((group[:, None] * len(seen) + ids).reshape(-1), minlength=clusters * len(seen)).reshape(clusters, -1)
        rows = np.bincount(group, minlength=clusters)
        if turn == _ROUNDS or clusters == 1:
            break
        # costs rounded to 1/64 bit: sums of whole numbers do not depend on their order
        cost = np.rint(-64 * np.log2((counts + _PULL * share) / (counts.sum(axis=1, keepdims=True) + _PULL))).astype(np.int32)
        best = np.full(len(ids), 1 << 30, np.int64)
        for cluster in range(clusters):
            total = cost[cluster][ids].sum(axis=1) - int(64 * np.log2((rows[cluster] + 1) / (len(ids) + clusters)))
            less = total < best
            best[less], group[less] = total[less], cluster
    return counts, rows, seen


def _smoothed(context_n: Array, symbol_n: Array, contexts: tuple[int, int], symbols: int) -> Array:
    """Counts of symbols in contexts (of two parts), each pulled to those of its first part, and those to all, [M, S]."""
    inner = contexts[1]
    counts = np.bincount(context_n * symbols + symbol_n, minlength=contexts[0] * inner * symbols).reshape(*contexts, symbols).astype(np.float64)
    share = counts.sum(axis=(0, 1)) / max(1.0, counts.sum())
    first = counts.sum(axis=1) + 20 * share
    first /= np.maximum(first.sum(axis=1, keepdims=True), 1e-300)
    return (counts + 20 * first[:, None]).reshape(-1, symbols)


@dataclass(frozen=True, eq=False)
class Levels:
    """Canonical rows in steps of the square root of a probability: p [N, k] and tail [N] float64, level [N, k], tail_level and tail_class [N]."""

    p: Array
    tail: Array
    level: Array
    tail_level: Array
    tail_class: Array


def levels_of(logp_NK: Array, step: float, *, whole: bool) -> Levels:
    """Levels of log-probabilities; `whole`: the ids are the whole vocabulary, there is no tail."""
    p = np.exp(logp_NK.astype(np.float64))
    tail = np.zeros(len(p)) if whole else np.maximum(1 - p.sum(axis=1), 0.0)
    tail_level = np.rint(np.sqrt(tail) / step).astype(np.int64)
    return Levels(p, tail, np.rint(np.sqrt(p) / step).astype(np.int64), tail_level, tail_class(tail_level, step))


def tail_class(tail_level_N: Array, step: float) -> Array:
    """Eight classes of the square root of the tail's mass."""
    return np.minimum((tail_level_N * (step * TAILS)).astype(np.int64), TAILS - 1)


def fitted(ids_NK: Array, levels: Levels, vocabulary: int, step: float, clusters: int) -> Prior:
    """The prior of canonical rows, at least one."""
    rows, k = ids_NK.shape
    counts = np.bincount(ids_NK.reshape(-1), minlength=vocabulary)
    base_cost = _quarters((counts + 0.05) / (ids_NK.size + 0.05 * vocabulary))
    base_rank = np.empty(vocabulary, np.int64)
    base_rank[np.argsort(base_cost, kind="stable")] = np.arange(vocabulary)
    clusters = max(1, min(clusters, rows // _ROWS_A_CLUSTER))
    counts_CS, rows_C, seen = _cluster(ids_NK, clusters)
    listed = min(LISTED, len(seen))
    size_C1 = counts_CS.sum(axis=1, keepdims=True)
    costs_CS = _quarters((counts_CS + _PULL * counts[seen] / ids_NK.size) / (size_C1 + _PULL))
    kept_CS = costs_CS[:, np.argsort(base_rank[seen])]  # columns by base rank: ids that were seen are the first of it
    order = np.argsort(kept_CS.astype(np.int64), axis=1, kind="stable")[:, :listed]
    cost = np.zeros_like(kept_CS)
    np.put_along_axis(cost, order, np.take_along_axis(kept_CS, order, axis=1), axis=1)
    cost = np.ascontiguousarray(cost[:, : int(order.max()) + 1])
    unlisted = np.clip(np.rint(4 * np.log2((size_C1[:, 0] + _PULL) / _PULL)), 0, 255).astype(np.uint8)
    ranks = Ranks(base_cost, cost, unlisted, _quarters((rows_C + 1) / (rows + clusters)))
    steps = ranks.steps(ids_NK, levels)
    buckets, symbols = 1 + len(ranks.bounds), level_symbols(steps.level)
    left = np.broadcast_to(np.array(left_of(k)), steps.gap.shape)
    least = np.broadcast_to(steps.least[:, None], steps.level.shape)
    middle = (np.arange(CENTRES) * step) ** 2 + step**2 / 12
    others = levels.level[:, 1:]
    centre = [_mean(levels.p[:, 1:][others == number], float(middle[number])) for number in range(CENTRES)]
    return Prior(
        rows=rows,
        base_cost=base_cost,
        cost=cost,
        unlisted=unlisted,
        cluster=frequencies(np.bincount(steps.cluster, minlength=max(2, clusters))[None] + 0.5),
        tail=frequencies(np.bincount(level_symbols(levels.tail_level), minlength=LEVELS)[None] + 0.02, ESCAPE),
        least=frequencies(_smoothed(levels.tail_class, steps.least, (TAILS, 1), LEASTS) + 0.5),
        gap=frequencies(_smoothed((steps.before * LEFTS + left).reshape(-1), steps.gap_class.reshape(-1), (buckets, LEFTS), GAPS), GAPS - 1),
        level=frequencies(_smoothed((steps.bucket * LEASTS + least).reshape(-1), symbols.reshape(-1), (buckets, LEASTS), LEVELS), ESCAPE),
        centre=np.array(centre),
        tail_centre=np.array([_mean(levels.tail[levels.tail_level == 0], float(middle[0]))]),
    )


def _mean(values: Array, otherwise: float) -> float:
    """The mean, at least 1e-9; `otherwise` where there is none."""
    return max(1e-9, float(values.mean())) if len(values) else otherwise
