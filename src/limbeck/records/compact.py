"""The compact token codec: about a sixth of the bytes of plain top-k rows, at a stated error.

Legend: N rows, k ids, V vocabulary, p probabilities, Δ the step, r a rank (`prior`). What is kept of a row, and what each part costs:

*Values.* KL(p ‖ q) = Σ δ_i² / (2 p_i) to second order, and δ_i = 2 √p_i e_i for an error e_i of √p_i: Σ 2 e_i². So levels are uniform in √p,
l = round(√p / Δ), and the error is about k Δ²/6 nats whatever the row looks like. A level stands for the mean probability of what has it (a floor for level 0).
The tail is one more outcome. The most probable id has no level: it gets what the others and the tail leave, at least as much as the greatest of them, and the
row is normalised.

*Ids.* A set has no order. Ids are sent by rank, common ones first, each as its gap to the one before, with its level: a class of the gap by a table for the
bucket of the rank before and the number of ids left, the rest of the gap as plain bits, the level by a table for the rank's bucket and the row's least level.

The rows' bytes come from an entropy coder with a state a row (`rans`), so that any row is read alone and any number of rows together. All ours; the squares of
probabilities' roots as a metric are Fisher's, and asymmetric numeral systems Duda's (1311.2540).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import numpy as np

from limbeck.errors import InputError
from limbeck.records.codecs import ABSENT
from limbeck.records.prior import (
    CENTRES,
    ESCAPE,
    GAP_BITS,
    GAP_FIRST,
    GAP_RAW,
    GAPS,
    LEASTS,
    LEFTS,
    LEVEL_BITS,
    TOP,
    Prior,
    Ranks,
    bucket_bounds,
    fitted,
    left_of,
    level_symbols,
    levels_of,
    tail_class,
)
from limbeck.records.rans import TOTAL, Decoder, Encoder, slots_of
from limbeck.records.token_codecs import TOKEN_CODECS, Array, TokenCodec, damaged

LANES = 4096
"""Rows that take their steps together: their states stay in the processor's cache."""

_TOP_LEVEL = (1 << LEVEL_BITS) - 1
_ID_BITS = 20


@dataclass(frozen=True)
class CompactCodec(TokenCodec):
    """Entropy-coded ids against a prior of the corpus, quantised probabilities, free of order.

    Args:
        k: kept entries. vocabulary: V, at most 1,000,000. step: Δ, 0.001 to 0.25; the error is about k Δ²/6 nats.
        clusters: of rows with a list of their own, at most 256 (and a cluster for 512 rows that were fitted). prior: what `fit` found, as text.
    """

    step: float = 0.0105
    clusters: int = 64
    prior: str = field(default="", repr=False)
    name: ClassVar[str] = "compact"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocabulary > 1_000_000:
            raise InputError(f"'vocabulary' is {self.vocabulary!r}.", where="vocabulary", fix="At most 1,000,000; take plain_topk.")
        if isinstance(self.step, bool) or not isinstance(self.step, int | float) or not 0.001 <= self.step <= 0.25:
            raise InputError(f"'step' is {self.step!r}.", where="step", fix="Give a number from 0.001 to 0.25.")
        if isinstance(self.clusters, bool) or not isinstance(self.clusters, int) or not 1 <= self.clusters <= 256:
            raise InputError(f"'clusters' is {self.clusters!r}.", where="clusters", fix="Give a whole number from 1 to 256.")
        if not isinstance(self.prior, str):
            raise InputError("is not text.", where="prior", fix="Leave it out and fit the codec.")
        if self.prior:
            _tables(self.prior, self.vocabulary)

    @property
    def needs_prior(self) -> bool:
        """Whether it was not fitted yet."""
        return not self.prior

    def identity(self) -> dict[str, Any]:
        """`spec` with the prior's hash in its place."""
        return self.spec() | {"prior": hashlib.sha256(self.prior.encode()).hexdigest() if self.prior else ""}

    def fit(self, ids_NK: Array, logp_NK: Array) -> CompactCodec:
        """The codec with a prior from rows of the corpus, some thousands, as a teacher gives them. Raises InputError: see `canonical`; there are none."""
        ids, logp = self.canonical(ids_NK, logp_NK)
        if not len(ids):
            raise InputError("there are no rows to fit a prior on.", where="codec.prior", fix="Give some thousand rows of the corpus.")
        levels = levels_of(logp, self.step, whole=self.k == self.vocabulary)
        return replace(self, prior=fitted(ids, levels, self.vocabulary, self.step, self.clusters).text())

    @property
    def row_bytes(self) -> None:
        """Each row has its own."""
        return

    @property
    def prior_bytes(self) -> int:
        """What the prior takes in the manifest."""
        return len(self.prior)

    @property
    def fitted_rows(self) -> int:
        """How many rows the prior was fitted on."""
        return self._known.prior.rows

    @property
    def _known(self) -> _Tables:
        if not self.prior:
            raise InputError("the codec 'compact' has no prior yet.", where="codec.prior", fix="Call `fit` with rows of the corpus first.")
        return _tables(self.prior, self.vocabulary)

    def encode(self, ids_NK: Array, logp_NK: Array) -> tuple[Array, Array]:
        """See TokenCodec. Raises InputError where it was not fitted."""
        known = self._known
        found = [self._encoded(known, ids_NK[start : start + LANES], logp_NK[start : start + LANES]) for start in range(0, len(ids_NK), LANES)]
        empty = np.zeros(0, np.uint8), np.zeros(0, np.int64)
        data, lengths = (np.concatenate(part) for part in zip(empty, *found, strict=True))
        return data, lengths

    def _encoded(self, known: _Tables, ids_NK: Array, logp_NK: Array) -> tuple[Array, Array]:
        prior, whole = known.prior, self.k == self.vocabulary
        levels = levels_of(logp_NK, self.step, whole=whole)
        steps = known.ranks.steps(ids_NK, levels)
        coder = Encoder(len(ids_NK), 2 * self.k + 3)
        for place, left in reversed(list(enumerate(left_of(self.k)))):
            level = steps.level[:, place]
            _put_level(coder, prior.level, known.level_start, steps.bucket[:, place] * LEASTS + steps.least, level)
            context, symbol = steps.before[:, place] * LEFTS + left, steps.gap_class[:, place]
            symbol = np.where(prior.gap[context, symbol] > 0, symbol, GAPS - 1)
            raw, bits = steps.gap[:, place] - GAP_FIRST[symbol], GAP_RAW[symbol]
            coder.put(prior.gap[context, symbol], known.gap_start[context, symbol], raw, bits)
        coder.put(prior.least[levels.tail_class, steps.least], known.least_start[levels.tail_class, steps.least])
        if not whole:
            _put_level(coder, prior.tail, known.tail_start, np.zeros(len(ids_NK), np.int64), levels.tail_level)
        if len(prior.cost) > 1:
            coder.put(prior.cluster[0, steps.cluster], known.cluster_start[0, steps.cluster])
        return coder.finish()

    def decode(self, data: Array, starts_N: Array, lengths_N: Array) -> tuple[Array, Array]:
        """See TokenCodec."""
        known = self._known
        ends_N = starts_N + lengths_N
        if len(starts_N) and (lengths_N.min() < 1 or starts_N.min() < 0 or int(ends_N.max()) > len(data)):
            raise damaged("a row has no bytes")
        first, last = int(starts_N.min(initial=len(data))), int(ends_N.max(initial=0))
        padded, starts_N = np.concatenate([data[first:last], np.zeros(8, np.uint8)]), starts_N - first
        ids, logp = np.empty((len(starts_N), self.k), np.int64), np.empty((len(starts_N), self.k), np.float32)
        for start in range(0, len(starts_N), LANES):
            some = slice(start, start + LANES)
            ids[some], logp[some] = self._decoded(known, padded, starts_N[some], lengths_N[some])
        return ids, logp

    def _decoded(self, known: _Tables, data: Array, starts_n: Array, lengths_n: Array) -> tuple[Array, Array]:
        rows, coder, whole = len(starts_n), Decoder(data, starts_n, lengths_n), self.k == self.vocabulary
        cluster = np.zeros(rows, np.int64)
        if len(known.prior.cost) > 1:
            cluster = coder.symbol(known.cluster, 0).copy()
            coder.refill()
        tail = np.zeros(rows, np.int64) if whole else _level(coder, known.tail, 0)
        least = coder.symbol(known.least, tail_class(tail, self.step) * TOTAL) * TOTAL
        coder.refill()
        rank, gap, context = np.full(rows, -1, np.int64), np.empty(rows, np.int64), np.empty(rows, np.int64)
        bits, mask = np.empty(rows, np.uint64), np.empty(rows, np.uint64)
        bucket = np.zeros(rows, np.int64)
        ranks_kn, levels_kn = np.empty((self.k, rows), np.int64), np.empty((self.k, rows), np.int64)
        for place, left in enumerate(left_of(self.k)):
            np.multiply(bucket, LEFTS * TOTAL, out=context)
            np.add(context, left * TOTAL, out=context)
            symbol = coder.symbol(known.gap, context)
            np.take(known.gap_bits, symbol, out=bits, mode="clip")
            np.take(known.gap_mask, symbol, out=mask, mode="clip")
            np.take(known.gap_first, symbol, out=gap, mode="clip")
            np.add(rank, gap, out=rank)
            np.add(rank, coder.raw(bits, mask), out=rank)
            coder.refill()
            ranks_kn[place] = rank
            np.take(known.bucket, rank, out=bucket, mode="clip")
            np.multiply(bucket, LEASTS * TOTAL, out=context)
            np.add(context, least, out=context)
            levels_kn[place] = _level(coder, known.level, context)
        if int(rank.max(initial=0)) >= known.listed + self.vocabulary or not coder.whole():
            raise damaged("a row does not end where it should")
        return self._row_values(known, cluster, ranks_kn, levels_kn, tail)

    def _row_values(self, known: _Tables, cluster: Array, ranks_kn: Array, levels_kn: Array, tail: Array) -> tuple[Array, Array]:
        """Ranks and levels to ids [n, k] and log-probabilities [n, k], descending."""
        place = np.where(ranks_kn < known.listed, ranks_kn + cluster * known.listed, ranks_kn + known.past_lists)
        keys = ((_TOP_LEVEL - levels_kn) << _ID_BITS) | known.ids[place]
        keys = np.sort(np.ascontiguousarray(keys.T.astype(np.int32)), axis=1)
        ids, level = (keys & ((1 << _ID_BITS) - 1)).astype(np.int64), _TOP_LEVEL - (keys >> _ID_BITS)
        if (level[:, 0] != _TOP_LEVEL).any() or (self.k > 1 and (level[:, 1] == _TOP_LEVEL).any()):
            raise damaged("a row has not one most probable id")
        p, log_p, p_tail = self._centres
        others = p[level[:, 1:]]
        taken = others.sum(axis=1) + (0.0 if self.k == self.vocabulary else p_tail[tail])
        top = np.maximum(1 - taken, others[:, 0] if self.k > 1 else 1e-9)
        total = np.log(taken + top)
        logp = np.empty(ids.shape, np.float32)
        np.subtract(log_p[level[:, 1:]], total[:, None].astype(np.float32), out=logp[:, 1:])
        logp[:, 0] = np.log(top) - total
        if self.k > 1:
            np.maximum(logp[:, 0], logp[:, 1], out=logp[:, 0])  # equal ones differ by their rounding
        return ids, np.maximum(logp, np.float32(ABSENT))

    @cached_property
    def _centres(self) -> tuple[Array, Array, Array]:
        """What a level stands for: probabilities, their logarithms (float32), and probabilities of the tail, [2^LEVEL_BITS] each."""
        prior = self._known.prior
        p = (np.arange(_TOP_LEVEL + 1) * self.step) ** 2 + self.step**2 / 12
        p_tail = p.copy()
        p[:CENTRES] = prior.centre
        p_tail[0] = prior.tail_centre[0]
        return p, np.log(p).astype(np.float32), p_tail


def _put_level(coder: Encoder, table: Array, start: Array, context: Array, level: Array) -> None:
    """A level (−1: the most probable id): its symbol, or the escape and the level."""
    symbol = level_symbols(level)
    symbol = np.where(table[context, symbol] > 0, symbol, ESCAPE)
    bits = np.where(symbol == ESCAPE, LEVEL_BITS, 0)
    raw = np.where(symbol == ESCAPE, np.where(level < 0, _TOP_LEVEL, np.minimum(level, _TOP_LEVEL - 1)), 0)
    coder.put(table[context, symbol], start[context, symbol], raw, bits)


def _level(coder: Decoder, slots: Array, context: Array | int) -> Array:
    """The next level of each row, `_TOP_LEVEL` for the most probable id."""
    level = coder.symbol(slots, context).copy()
    special = np.flatnonzero(level >= TOP)
    if len(special):
        escaped = special[level[special] == ESCAPE]
        level[special] = _TOP_LEVEL
        level[escaped] = coder.raw_of(escaped, LEVEL_BITS)
    coder.refill()
    return level


class _Tables:
    """What a prior's text is turned into for coding."""

    def __init__(self, text: str, vocabulary: int) -> None:
        self.prior = prior = Prior.of_text(text, vocabulary)
        self.listed = prior.listed
        base, lists = prior.base(), prior.lists()
        self.ids = np.concatenate([base[lists].reshape(-1), base])
        self.past_lists = lists.size - self.listed
        bounds = bucket_bounds(self.listed)
        self.bucket = np.searchsorted(bounds, np.arange(int(bounds[-1]) + 1), side="right")
        self.cluster, self.tail, self.least = slots_of(prior.cluster), slots_of(prior.tail), slots_of(prior.least)
        self.gap, self.level = slots_of(prior.gap), slots_of(prior.level)
        self.gap_first = GAP_FIRST + 1
        self.gap_bits = GAP_RAW.astype(np.uint64)
        self.gap_mask = (np.uint64(1) << self.gap_bits) - np.uint64(1)
        assert int(GAP_RAW.max()) == GAP_BITS

    @cached_property
    def ranks(self) -> Ranks:
        """Only what writes needs it."""
        prior = self.prior
        share = prior.cluster[0, : len(prior.cost)] / TOTAL
        return Ranks(prior.base_cost, prior.cost, prior.unlisted, np.rint(-4 * np.log2(share)))

    def __getattr__(self, name: str) -> Array:
        """`gap_start` and the like: where the slots of a symbol begin."""
        if not name.endswith("_start"):
            raise AttributeError(name)
        table = getattr(self.prior, name.removesuffix("_start")).astype(np.int64)
        found = np.cumsum(table, axis=1) - table
        setattr(self, name, found)
        return found


@lru_cache(maxsize=8)
def _tables(text: str, vocabulary: int) -> _Tables:
    return _Tables(text, vocabulary)


TOKEN_CODECS[CompactCodec.name] = CompactCodec
