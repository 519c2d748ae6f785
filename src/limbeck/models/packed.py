"""Low-bit weights in bytes: what they cost, how they are packed, and their exact return (1802.05668 eq. 10 of our sheet).

The indices of all quantised tensors are coded with ONE canonical code, Huffman's or a fixed width, whichever is smaller in all. A packed state
is a dict of tensors: every unquantised tensor under its own name, and
    packed.header     uint8: CRC-32 (4 bytes) and compressed JSON: names, shapes, code, the CRC-32 of every other tensor
    packed.bits       uint8: the indices' codes, most significant bit first
    packed.lengths    uint8, Huffman: the code's length of each symbol (0: unused); canonical codes follow from it
    packed.blocks     uint8, Huffman: bits of each block of 1024 symbols, 2 bytes little-endian each, so that blocks are decoded side by side
    packed.scales     [2, M]: lowest and highest weight of each bucket
    packed.codebooks  [S], learned points: the tensors' points end to end
"""

from __future__ import annotations

import heapq
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from limbeck.errors import InputError
from limbeck.losses.quantisation import Scaled, buckets, place, uniform_points

HEADER, BITS, LENGTHS, BLOCKS, SCALES, CODEBOOKS = (f"packed.{part}" for part in ("header", "bits", "lengths", "blocks", "scales", "codebooks"))
BLOCK = 1024
"""Symbols that share one entry of the block index."""
LONGEST = 32
"""Bits of the longest Huffman code that is used (BLOCK·LONGEST fits 2 bytes); beyond it the width is fixed."""

Integers = NDArray[np.int64]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Codes:
    """Quantised tensors as integers: all that is needed to compute them.

    shapes: by name, in order. index: into points, of each entry, int64 [N]. low, high: the buckets' extrema, [M].
    bucket: entries a bucket, None: the whole tensor. points: positions in [0, 1], about, [S]; counts: how many of them each tensor owns, end to
    end, where they were learned; empty: all tensors share these evenly spaced levels.
    """

    shapes: Mapping[str, tuple[int, ...]]
    index: Tensor
    low: Tensor
    high: Tensor
    bucket: int | None
    points: Tensor
    counts: tuple[int, ...] = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Entries of each tensor."""
        return tuple(math.prod(shape) for shape in self.shapes.values())

    @property
    def owned(self) -> tuple[int, ...]:
        """How many levels or points each tensor may use."""
        return self.counts or (len(self.points),) * len(self.shapes)

    def symbols(self) -> Tensor:
        """The indices counted from each tensor's own first point, on the CPU, [N]: what is coded."""
        return self.index.cpu() - _offsets(self.sizes, self.counts)

    def tensors(self) -> dict[str, Tensor]:
        """The quantised tensors by name."""
        position_N = self.points[self.index]
        flat_N = place(position_N, Scaled(position_N, self.low, self.high, buckets(self.sizes, self.bucket, self.index.device)))
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), flat_N.split(self.sizes), strict=True)}

    def occupancy(self) -> dict[str, list[int]]:
        """How many entries sit on each level or point, by tensor; 0 marks a dead one."""
        parts = zip(self.shapes, self.symbols().split(self.sizes), self.owned, strict=True)
        return {name: torch.bincount(part, minlength=count).tolist() for name, part, count in parts}


def _offsets(sizes_T: Sequence[int], counts_T: Sequence[int]) -> Tensor:
    """Position of its tensor's first point in points_S for each entry, [N]; 0 where the points are shared."""
    first_T = torch.tensor([0, *counts_T]).cumsum(0)[:-1] if counts_T else torch.zeros(len(sizes_T), dtype=torch.int64)
    return first_T.repeat_interleave(torch.tensor(sizes_T))


# ---- what it costs ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """What a packed state costs, in bytes unless said otherwise.

    bits_per_weight: b̄, mean Huffman code length. official_factor: 32k/(k b̄ + 64), scales paid by exact division, nothing else counted.
    official: n b̄/8 + 8n/k + 4·unquantised parameters. honest: also whole buckets, codebooks, code table and buffers.
    packed: of the packed tensors as they are, the header included. full: of the same state in full precision.
    """

    bits_per_weight: float
    official_factor: float
    official: float
    honest: int
    packed: int
    full: int

    def metrics(self) -> dict[str, float]:
        """Scalars for a table: bits a weight, the official factor, and bytes and factors that leave nothing out."""
        return {
            "bits_per_weight": self.bits_per_weight,
            "compression_factor": self.official_factor,
            "honest_bytes": self.honest,
            "honest_factor": self.full / self.honest,
            "packed_bytes": self.packed,
            "packed_factor": self.full / self.packed,
        }


def huffman_lengths(frequencies_S: Sequence[float]) -> list[int]:
    """Code length of each symbol in bits, 0 for one that never occurs; a lone symbol gets 1 bit.

    Deterministic: among equal frequencies the lower symbol, then the earlier node, is merged first.
    """
    heap = [(frequency, symbol, [symbol]) for symbol, frequency in enumerate(frequencies_S) if frequency > 0]
    lengths = [0] * len(frequencies_S)
    if len(heap) == 1:
        lengths[heap[0][1]] = 1
    heapq.heapify(heap)
    order = len(frequencies_S)
    while len(heap) > 1:
        (f, _, left), (g, _, right) = heapq.heappop(heap), heapq.heappop(heap)
        for symbol in left + right:
            lengths[symbol] += 1
        heapq.heappush(heap, (f + g, order, left + right))
        order += 1
    return lengths


def mean_length(frequencies_S: Sequence[float], lengths_S: Sequence[int]) -> float:
    """b̄ = Σ f_j len_j with the frequencies scaled to sum to 1, in bits."""
    return sum(f * length for f, length in zip(frequencies_S, lengths_S, strict=True)) / sum(frequencies_S)


def official_factor(mean_bits: float, bucket: int | None) -> float:
    """Compression against 32 bits a weight, two 32-bit scales a bucket: 32k/(k b̄ + 64), without buckets 32/b̄. Source: eq. 10."""
    return 32 / mean_bits if bucket is None else 32 * bucket / (bucket * mean_bits + 64)


def measure(codes: Codes, state: Mapping[str, Tensor], parameters: int) -> Size:
    """The size of a state whose tensors `codes.shapes` are quantised.

    Args:
        state: the whole state dict, unquantised tensors and buffers included. parameters: how many of its entries are parameters.
    """
    frequencies = torch.bincount(codes.symbols(), minlength=max(codes.owned)).tolist()
    bits = mean_length(frequencies, huffman_lengths(frequencies))
    n, width = len(codes.index), codes.low.element_size()
    others = _bytes({name: t for name, t in state.items() if name not in codes.shapes})
    return Size(
        bits_per_weight=bits,
        official_factor=official_factor(bits, codes.bucket),
        official=n * bits / 8 + (8 * n / codes.bucket if codes.bucket else 0) + 4 * (parameters - n),
        honest=math.ceil(n * bits / 8 - 1e-6) + width * (2 * len(codes.low) + sum(codes.counts)) + len(frequencies) + others,
        packed=_bytes(PackedEncoder(codes).encode(state)),
        full=n * width + others,
    )


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


# ---- the bits --------------------------------------------------------------------------------------------------------


def canonical_codes(lengths_S: Sequence[int]) -> tuple[Integers, Integers]:
    """The used symbols in code order (by length, then symbol), and the code of each of these."""
    order = np.array(sorted((s for s, length in enumerate(lengths_S) if length), key=lambda s: (lengths_S[s], s)), dtype=np.int64)
    codes, code, before = np.zeros(len(order), np.int64), 0, 0
    for rank, symbol in enumerate(order):
        code <<= lengths_S[symbol] - before
        codes[rank], before = code, lengths_S[symbol]
        code += 1
    return order, codes


def pack(index_N: Integers, lengths_S: Sequence[int]) -> tuple[Bytes, Integers]:
    """Codes of the indices end to end, and the bits that each block of 1024 of them takes."""
    order, ordered_codes = canonical_codes(lengths_S)
    codes_S = np.zeros(len(lengths_S), np.int64)
    codes_S[order] = ordered_codes
    length_N, code_N = np.asarray(lengths_S, np.int64)[index_N], codes_S[index_N]
    end_N = np.cumsum(length_N)
    bits = np.zeros(int(end_N[-1]), np.uint8)
    for j in range(max(lengths_S)):  # bit j, counted from a code's last
        has = length_N > j
        bits[end_N[has] - 1 - j] = (code_N[has] >> j) & 1
    return np.packbits(bits), np.add.reduceat(length_N, np.arange(0, len(length_N), BLOCK))


def unpack(content: Bytes, block_bits: Integers, lengths_S: Sequence[int], n: int) -> Integers:
    """The n indices that `pack` was given. The blocks are decoded side by side, one symbol of each at a time."""
    order, codes = canonical_codes(lengths_S)
    length = np.asarray(lengths_S, np.int64)[order]
    longest = int(length.max())
    left_justified = codes << (longest - length)  # increasing, so that the next `longest` bits tell the code by bisection
    content = np.concatenate([content, np.zeros(LONGEST // 8 + 1, np.uint8)])
    position = np.cumsum(block_bits) - block_bits
    index = np.zeros((len(block_bits), BLOCK), np.int64)
    for step in range(min(BLOCK, n)):
        if step == n % BLOCK:
            position = position[: n // BLOCK]  # the last block is shorter and done
        first = position >> 3
        word = sum(content[first + i].astype(np.int64) << (LONGEST - 8 * i) for i in range(LONGEST // 8 + 1))
        window = (word >> (LONGEST + 8 - longest - (position & 7))) & ((1 << longest) - 1)
        found = np.searchsorted(left_justified, window, side="right") - 1
        index[: len(position), step] = order[found]
        position = position + length[found]
    return index.reshape(-1)[:n]


# ---- the packed state ------------------------------------------------------------------------------------------------


@dataclass
class PackedEncoder:
    """Puts the state dict of a quantised module into packed tensors (an `Encoder` of the contract)."""

    codes: Codes
    decoder: str = "limbeck.models.packed:decode"

    def encode(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """State dict to packed tensors on the CPU; `decode` gives it back bit by bit.

        Raises:
            InputError: the state is not the one that was quantised.
        """
        codes = self.codes
        for name, tensor in codes.tensors().items():
            if name not in state or not torch.equal(state[name], tensor.to(state[name].device)):
                raise InputError(f"the tensor '{name}' is not the one that was quantised.", where=name, fix="Pack the state of the artefact's own module.")
        packed = {name: tensor.detach().cpu() for name, tensor in state.items() if name not in codes.shapes}
        packed[SCALES] = torch.stack([codes.low, codes.high]).cpu()
        if codes.counts:
            packed[CODEBOOKS] = codes.points.detach().cpu()
        coded, width = _smaller_code(codes.symbols().numpy(), max(codes.owned))
        packed |= coded
        header: dict[str, Any] = {"version": 1, "tensors": list(codes.shapes.items()), "bucket": codes.bucket, "width": width}
        header |= {"points": list(codes.counts)} if codes.counts else {"levels": len(codes.points)}
        header["checksums"] = {name: _checksum(tensor) for name, tensor in packed.items()}
        text = zlib.compress(json.dumps(header, separators=(",", ":")).encode(), 9)
        packed[HEADER] = _tensor(zlib.crc32(text).to_bytes(4, "little") + text)
        return packed


def _smaller_code(symbol_N: Integers, symbols: int) -> tuple[dict[str, Tensor], int | None]:
    """The coded indices with what decoding them takes, and the width where it is fixed (None: Huffman)."""
    width = max(1, (symbols - 1).bit_length())
    lengths = huffman_lengths(np.bincount(symbol_N, minlength=symbols).tolist())
    if max(lengths) <= LONGEST:
        bits, block_bits = pack(symbol_N, lengths)
        coded = {BITS: _tensor(bits.tobytes()), LENGTHS: _tensor(bytes(lengths)), BLOCKS: _tensor(block_bits.astype("<u2").tobytes())}
        if _bytes(coded) < math.ceil(len(symbol_N) * width / 8):
            return coded, None
    return {BITS: _tensor(pack(symbol_N, [width] * 2**width)[0].tobytes())}, width


def decode(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the quantised module, bit by bit what was packed.

    Raises:
        InputError: a tensor is missing, foreign, truncated or damaged.
    """
    header = _header(tensors)
    checksums: dict[str, int] = header["checksums"]
    for name in [*checksums, *(name for name in tensors if name != HEADER)]:
        if name not in tensors or checksums.get(name) != _checksum(tensors[name]):
            fault = "missing" if name not in tensors else "damaged: its checksum differs" if name in checksums else "not part of these packed weights"
            raise InputError(f"the packed tensor '{name}' is {fault}.", where=name, fix="Copy the file again, or export it anew.")
    shapes = {name: tuple(shape) for name, shape in header["tensors"]}
    sizes_T, counts_T, width = [math.prod(shape) for shape in shapes.values()], tuple(header.get("points", ())), header["width"]
    n, content = sum(sizes_T), tensors[BITS].numpy()
    if width is None:
        index_N = unpack(content, np.frombuffer(tensors[BLOCKS].numpy().tobytes(), "<u2").astype(np.int64), tensors[LENGTHS].tolist(), n)
    else:
        index_N = unpack(content, width * np.diff(np.append(np.arange(0, n, BLOCK), n)), [width] * 2**width, n)
    low_M, high_M = tensors[SCALES]
    points_S = tensors[CODEBOOKS] if counts_T else uniform_points(header["levels"], low_M)
    codes = Codes(shapes, torch.from_numpy(index_N) + _offsets(sizes_T, counts_T), low_M, high_M, header["bucket"], points_S, counts_T)
    return {name: tensors[name] for name in checksums if not name.startswith("packed.")} | codes.tensors()


def _header(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    if HEADER not in tensors:
        raise InputError("these are not packed weights: the header is missing.", where=HEADER, fix="Load them without the decoder.")
    content = tensors[HEADER].contiguous().view(torch.uint8).numpy().tobytes()
    if len(content) < 4 or zlib.crc32(content[4:]) != int.from_bytes(content[:4], "little"):
        raise InputError("the header of the packed weights is damaged.", where=HEADER, fix="Copy the file again, or export it anew.")
    header: dict[str, Any] = json.loads(zlib.decompress(content[4:]))
    if header["version"] != 1:
        raise InputError(f"the packed weights are of version {header['version']}, this limbeck reads version 1.", where=HEADER, fix="Update limbeck.")
    return header


def _checksum(tensor: Tensor) -> int:
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return zlib.crc32(content, zlib.crc32(f"{tensor.dtype}{tuple(tensor.shape)}".encode()))


def _tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
