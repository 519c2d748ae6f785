"""Range asymmetric numeral systems over many rows at once: every row has a state of its own, all rows take the same step together, in numpy.

Legend: n rows, M contexts, S symbols of an alphabet, f frequencies of `TOTAL` = 2^12. A row's bytes are its last state (1 to 8 bytes), then 32-bit words.
A step codes a symbol by its frequency in a context and `bits` further bits as they are; the two together are one step of a coder with frequencies of
2^(12 + bits), so that a state in [2^32, 2^64) needs at most one word a step (12 + bits ≤ 32). The encoder starts at state 1 and is not filled up to 2^32: a row
wastes no more than the bits to its next whole byte, and a decoder that does not arrive at 1, all words read, has read damaged bytes.
Asymmetric numeral systems: 1311.2540; the lockstep and the start at 1 are ours.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

BITS = 12
TOTAL = 1 << BITS
MAX_RAW = 32 - BITS
_LOW = np.uint64(1 << 32)
_WORD = np.uint64(32)
_SHIFT = np.uint64(BITS)
_MASK = np.uint64(TOTAL - 1)


def frequencies(counts_MS: Array, escape: int | None = None) -> Array:
    """Counts (any numbers ≥ 0, each row with at least two symbols) to whole frequencies [M, S] uint16 that sum to `TOTAL`, each below it.

    With an escape symbol, what would get less than half a slot gets none (it is sent by the escape, which always has one); without, every symbol gets a slot.
    """
    counts = np.asarray(counts_MS, np.float64)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1e-300) * TOTAL
    found = np.floor(share + 0.5).astype(np.int64) if escape is not None else np.maximum(np.floor(share).astype(np.int64), 1)
    if escape is not None:
        found[:, escape] = np.maximum(found[:, escape], 1)
        found[found.sum(axis=1) == found[:, escape], (escape + 1) % found.shape[1]] += 1
    for row in found:
        while (excess := int(row.sum()) - TOTAL) > 0:  # from the greatest, by at most half of what it has
            most = int(row.argmax())
            row[most] -= min(excess, max(1, int(row[most]) // 2))
        row[int(row.argmax())] += TOTAL - int(row.sum())
        if row.max() == TOTAL:
            most = int(row.argmax())
            row[most] -= 1
            row[escape if escape not in (None, most) else (most + 1) % len(row)] += 1
    return found.astype(np.uint16)


def slots_of(frequencies_MS: Array) -> Array:
    """What a decoder looks up, [M · TOTAL] uint32: symbol, place within the symbol's slots, frequency (8, 12, 12 bits)."""
    f = frequencies_MS.astype(np.int64)
    contexts, symbols = f.shape
    symbol = np.repeat(np.tile(np.arange(symbols), contexts), f.reshape(-1))
    starts = np.cumsum(f, axis=1) - f
    place = np.tile(np.arange(TOTAL), contexts) - np.repeat(starts.reshape(-1), f.reshape(-1))
    return ((symbol << 24) | (place << 12) | np.repeat(f.reshape(-1), f.reshape(-1))).astype(np.uint32)


class Encoder:
    """Takes the steps of n rows in the reverse of the decoder's order. At most `steps` of them."""

    def __init__(self, rows: int, steps: int) -> None:
        self._state = np.ones(rows, np.uint64)
        self._words = np.zeros((rows, steps), np.uint32)
        self._count = np.zeros(rows, np.int64)

    def put(self, f_n: Array, start_n: Array, raw_n: Array | None = None, bits_n: Array | None = None) -> None:
        """A symbol of frequency f (≥ 1) whose slots begin at `start`, and `bits` bits of `raw` (< 2^bits, bits ≤ MAX_RAW)."""
        f, start = f_n.astype(np.uint64), start_n.astype(np.uint64)
        bits = np.uint64(0) if bits_n is None else bits_n.astype(np.uint64)
        full = np.flatnonzero(self._state >= f << (np.uint64(64 - BITS) - bits))
        self._words[full, self._count[full]] = self._state[full] & np.uint64(0xFFFFFFFF)
        self._count[full] += 1
        self._state[full] >>= _WORD
        below = self._state if raw_n is None else (self._state << bits) | raw_n.astype(np.uint64)
        self._state = ((below // f) << _SHIFT) + below % f + start

    def finish(self) -> tuple[Array, Array]:
        """(data [T] uint8, lengths [n] int64)."""
        head = np.ones(len(self._state), np.int64)
        for byte in range(1, 8):
            head += self._state >> np.uint64(8 * byte) > 0
        lengths = head + 4 * self._count
        ends = np.cumsum(lengths)
        starts = ends - lengths
        data = np.zeros(int(ends[-1]) if len(ends) else 0, np.uint8)
        for byte in range(8):
            some = np.flatnonzero(head > byte)
            data[starts[some] + byte] = (self._state[some] >> np.uint64(8 * byte)) & np.uint64(255)
        for word in range(int(self._count.max(initial=0))):
            some = np.flatnonzero(self._count > word)
            value, place = self._words[some, self._count[some] - 1 - word], starts[some] + head[some] + 4 * word
            for byte in range(4):
                data[place + byte] = (value >> np.uint32(8 * byte)) & np.uint32(255)
        return data, lengths


class Decoder:
    """Takes the steps of n rows together. `data` has at least 8 bytes after the last row; lengths ≥ 1. What it gives out is overwritten by the next step."""

    def __init__(self, data: Array, starts_n: Array, lengths_n: Array) -> None:
        self._quads = np.ndarray((len(data) - 3,), "<u4", data, strides=(1,))
        head = np.where(lengths_n < 5, lengths_n, 5 + (lengths_n - 5) % 4)
        state = np.ndarray((len(data) - 7,), "<u8", data, strides=(1,))[starts_n].astype(np.uint64)
        self._state = state & (np.uint64(0xFFFFFFFFFFFFFFFF) >> ((8 - head) * 8).astype(np.uint64))
        self._at, self._end = starts_n + head, starts_n + lengths_n
        rows = len(starts_n)
        self._slot, self._entry = np.empty(rows, np.int64), np.empty(rows, np.uint32)
        self._wide, self._part, self._symbol = np.empty(rows, np.uint64), np.empty(rows, np.uint64), np.empty(rows, np.int64)

    def symbol(self, slots: Array, context_n: Array | int) -> Array:
        """The next symbol of each row, [n] int64, by the table of `slots_of` in a context, given as the place of its slots (context · TOTAL)."""
        state, slot, wide, part = self._state, self._slot, self._wide, self._part
        np.bitwise_and(state.view(np.int64), TOTAL - 1, out=slot)
        np.add(slot, context_n, out=slot)
        np.take(slots, slot, out=self._entry, mode="clip")
        np.copyto(wide, self._entry)
        np.right_shift(state, _SHIFT, out=state)
        np.bitwise_and(wide, _MASK, out=part)
        np.multiply(state, part, out=state)
        np.right_shift(wide, _SHIFT, out=wide)
        np.bitwise_and(wide, _MASK, out=part)
        np.add(state, part, out=state)
        np.right_shift(wide.view(np.int64), BITS, out=self._symbol)
        return self._symbol

    def raw(self, bits_n: Array, mask_n: Array) -> Array:
        """The next `bits` bits of each row as they are, [n] int64; `mask` is 2^bits − 1, both uint64."""
        np.bitwise_and(self._state, mask_n, out=self._part)
        np.right_shift(self._state, bits_n, out=self._state)
        return self._part.view(np.int64)

    def raw_of(self, some: Array, bits: int) -> Array:
        """The next `bits` bits of the rows `some` alone, int64."""
        found = self._state[some] & np.uint64((1 << bits) - 1)
        self._state[some] >>= np.uint64(bits)
        return found.astype(np.int64)

    def refill(self) -> None:
        """Ends a step: rows below 2^32 take their next word, where there is one."""
        low = np.flatnonzero(self._state < _LOW)
        at = self._at[low]
        left = at < self._end[low]
        if not left.all():
            low, at = low[left], at[left]
        self._state[low] = (self._state[low] << _WORD) | self._quads[at].astype(np.uint64)
        self._at[low] = at + 4

    def whole(self) -> bool:
        """Whether every row came back to where its encoder started, with nothing left."""
        return bool((self._state == 1).all() and (self._at == self._end).all())
