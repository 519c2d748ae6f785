"""The size accountant and the packed codec (1802.05668 eq. 10 of our sheet)."""

import json
import math
import zlib
from itertools import pairwise

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.errors import InputError
from limbeck.losses import quantisation as q
from limbeck.models import packed
from limbeck.models.packed import Codes, PackedEncoder, canonical_codes, decode, huffman_lengths, mean_length, measure, official_factor, pack, unpack

SETTINGS = settings(deadline=None, max_examples=40)
frequencies = st.lists(st.integers(0, 10**6), min_size=1, max_size=300).filter(any)


def coded(shapes, *, bits=2, bucket=256, learned=False, dtype=torch.float32, seed=0):
    """Codes of bell-shaped random tensors."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(sum(math.prod(s) for s in shapes), generator=generator, dtype=dtype)
    sizes = tuple(math.prod(s) for s in shapes)
    scaled = q.scale(flat, q.buckets(sizes, bucket, flat.device))
    named = {f"layer{i}.weight": tuple(shape) for i, shape in enumerate(shapes)}
    if not learned:
        return Codes(named, q.uniform_index(scaled.u, 2**bits), scaled.low, scaled.high, bucket, q.uniform_points(2**bits, flat))
    counts = [2**bits + 3 * i for i in range(len(shapes))]
    points = q.initial_points(scaled.u, sizes, counts, "quantile")
    return Codes(named, q.nearest_index(scaled.u, points, sizes, counts), scaled.low, scaled.high, bucket, points, tuple(counts))


def whole_state(codes):
    """The quantised tensors among others: a norm's buffers, a half-precision tensor, a flag."""
    others = {"norm.running_mean": torch.randn(7), "norm.num_batches_tracked": torch.tensor(3), "half": torch.randn(2, 3).bfloat16()}
    return codes.tensors() | others | {"flag": torch.tensor([True])}


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.contiguous().reshape(-1).view(torch.uint8).equal(b.contiguous().reshape(-1).view(torch.uint8))


def nbytes(tensors, names=None):
    return sum(t.numel() * t.element_size() for name, t in tensors.items() if names is None or name in names)


# ---- what it costs ---------------------------------------------------------------------------------------------------


def test_huffman_examples():
    assert huffman_lengths([0.5, 0.25, 0.125, 0.125]) == [1, 2, 3, 3]
    assert huffman_lengths([1, 1, 1, 1]) == [2, 2, 2, 2]
    assert huffman_lengths([0, 5, 0]) == [0, 1, 0]  # a lone symbol still takes a bit
    assert mean_length([0.5, 0.25, 0.125, 0.125], [1, 2, 3, 3]) == 1.75


@SETTINGS
@given(frequencies)
def test_huffman_lies_between_entropy_and_entropy_plus_one_and_never_above_the_fixed_width(f):
    lengths = huffman_lengths(f)
    p = np.array(f) / sum(f)
    entropy = -sum(x * math.log2(x) for x in p if x > 0)
    mean = mean_length(f, lengths)
    assert [length > 0 for length in lengths] == [x > 0 for x in f]
    assert mean <= max(1, math.ceil(math.log2(len(f)))) + 1e-9
    if sum(x > 0 for x in f) > 1:
        assert entropy - 1e-9 <= mean < entropy + 1
        assert sum(2.0**-length for length in lengths if length) == 1  # Kraft: complete


def test_official_factor_of_the_sheet():
    assert official_factor(2, 256) == pytest.approx(14.2, abs=0.05)
    assert official_factor(4, 256) == pytest.approx(7.5, abs=0.05)
    assert official_factor(1.6, 256) == pytest.approx(17.3, abs=0.05)
    assert official_factor(2, None) == 16


def test_size_by_hand():
    """Two tensors, 300 and 4 entries, buckets of 256: 3 buckets; one of the four levels takes half of all entries."""
    index = torch.tensor([0] * 152 + [1] * 76 + [2] * 38 + [3] * 38)
    low, high = torch.zeros(3), torch.ones(3)
    codes = Codes({"a": (30, 10), "b": (4,)}, index, low, high, 256, q.uniform_points(4, low))
    state = codes.tensors() | {"bias": torch.zeros(5), "count": torch.tensor(1)}
    size = measure(codes, state, parameters=309)
    bits = (152 * 1 + 76 * 2 + 76 * 3) / 304
    assert size.bits_per_weight == pytest.approx(bits)
    assert size.official_factor == pytest.approx(32 * 256 / (256 * bits + 64))
    assert size.official == pytest.approx(304 * bits / 8 + 8 * 304 / 256 + 4 * 5)
    assert size.honest == math.ceil(304 * bits / 8) + 8 * 3 + 4 + (4 * 5 + 8)
    assert size.full == 304 * 4 + 28
    assert size.metrics()["honest_factor"] == pytest.approx(size.full / size.honest)
    assert size.metrics()["packed_bytes"] == nbytes(PackedEncoder(codes).encode(state))
    assert codes.occupancy() == {"a": [152, 76, 38, 34], "b": [0, 0, 0, 4]}


def test_size_counts_codebooks_and_wide_scales():
    codes = coded([(40, 40), (9,)], learned=True, dtype=torch.float64)
    state = whole_state(codes)
    size = measure(codes, state, parameters=1609)
    occupied = np.bincount(codes.symbols(), minlength=7)
    payload = math.ceil(sum(n * length for n, length in zip(occupied, huffman_lengths(occupied.tolist()), strict=True)) / 8)
    others = 7 * 4 + 8 + 12 + 1
    assert size.honest == payload + 16 * (7 + 1) + 8 * (4 + 7) + 7 + others


@pytest.mark.parametrize("learned", [False, True])
def test_measured_bytes_are_the_honest_ones_plus_header_and_block_index(learned):
    codes = coded([(100, 81), (100,)], bits=3, learned=learned)
    state = whole_state(codes)
    tensors = PackedEncoder(codes).encode(state)
    size = measure(codes, state, parameters=8200)
    assert size.packed == nbytes(tensors) == size.honest + nbytes(tensors, ["packed.header", "packed.blocks"])
    assert nbytes(tensors, ["packed.blocks"]) == 2 * math.ceil(8200 / 1024)
    assert size.packed < size.full / 6


def test_the_smaller_of_huffman_and_fixed_width_is_taken():
    even, skewed = torch.arange(4).repeat(300), torch.tensor([0] * 1100 + [1] * 60 + [2] * 30 + [3] * 10)
    low, high = torch.zeros(1), torch.ones(1)
    sizes = {}
    for name, index in (("even", even), ("skewed", skewed)):
        codes = Codes({"w": (1200,)}, index, low, high, None, q.uniform_points(4, low))
        sizes[name] = PackedEncoder(codes).encode(codes.tensors())
    assert "packed.lengths" not in sizes["even"]
    assert sizes["even"]["packed.bits"].numel() == 300
    assert sizes["skewed"]["packed.lengths"].tolist() == [1, 2, 3, 3]
    assert sizes["skewed"]["packed.bits"].numel() == math.ceil((1100 + 120 + 90 + 30) / 8)


def test_codes_longer_than_the_window_fall_back_to_a_fixed_width(monkeypatch):
    fibonacci = [1, 1]
    while len(fibonacci) < 12:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    index = torch.repeat_interleave(torch.arange(12), torch.tensor(fibonacci))
    codes = Codes({"w": (len(index),)}, index, torch.zeros(1), torch.ones(1), None, q.uniform_points(12, torch.zeros(1)))
    assert "packed.lengths" in PackedEncoder(codes).encode(codes.tensors())
    monkeypatch.setattr(packed, "LONGEST", 8)
    tensors = PackedEncoder(codes).encode(codes.tensors())
    assert "packed.lengths" not in tensors
    assert same_bits(decode(tensors)["w"], codes.tensors()["w"])


# ---- the bits --------------------------------------------------------------------------------------------------------


@SETTINGS
@given(frequencies)
def test_canonical_codes_are_free_of_prefixes(f):
    lengths = huffman_lengths(f)
    order, codes = canonical_codes(lengths)
    texts = [f"{code:0{lengths[symbol]}b}" for symbol, code in zip(order, codes, strict=True)]
    assert [len(text) for text in texts] == [lengths[symbol] for symbol in order]
    assert not any(longer.startswith(shorter) for shorter, longer in pairwise(sorted(texts)))


@SETTINGS
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 1023, 1024, 1025, 2048, 2500]), st.integers(1, 300), st.floats(0.3, 8))
def test_unpacking_gives_the_indices_back(seed, n, symbols, skew):
    index = (np.random.default_rng(seed).random(n) ** skew * symbols).astype(np.int64)
    lengths = huffman_lengths(np.bincount(index, minlength=symbols).tolist())
    content, block_bits = pack(index, lengths)
    assert len(content) == math.ceil(sum(lengths[i] for i in index) / 8)
    assert np.array_equal(unpack(content, block_bits, lengths, n), index)


def test_unpacking_reads_codes_of_32_bits():
    lengths = [*range(1, 33), 32]
    index = np.random.default_rng(0).integers(0, 33, 3000)
    content, block_bits = pack(index, lengths)
    assert np.array_equal(unpack(content, block_bits, lengths, 3000), index)


# ---- the packed state ------------------------------------------------------------------------------------------------


@SETTINGS
@given(
    st.lists(st.lists(st.integers(1, 12), min_size=0, max_size=3), min_size=1, max_size=4),
    st.integers(1, 6), st.sampled_from([None, 2, 16, 256]), st.booleans(), st.sampled_from([torch.float32, torch.float64]), st.integers(0, 999),
)  # fmt: skip
def test_decoding_gives_every_bit_back(shapes, bits, bucket, learned, dtype, seed):
    codes = coded(shapes, bits=bits, bucket=bucket, learned=learned, dtype=dtype, seed=seed)
    state = whole_state(codes)
    back = decode(PackedEncoder(codes).encode(state))
    assert back.keys() == state.keys()
    assert all(same_bits(back[name], state[name]) for name in state)


@pytest.mark.parametrize("learned", [False, True])
def test_decoding_from_a_safetensors_file(tmp_path, learned):
    codes = coded([(50, 40), (50,)], learned=learned)
    state = whole_state(codes)
    safetensors.torch.save_file(PackedEncoder(codes).encode(state), tmp_path / "model.safetensors")
    back = decode(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    assert all(same_bits(back[name], state[name]) for name in state)


def test_a_state_that_was_not_the_quantised_one_is_refused():
    codes = coded([(5, 5)])
    state = codes.tensors()
    state["layer0.weight"][0, 0] += 1e-3
    with pytest.raises(InputError, match=r"layer0\.weight"):
        PackedEncoder(codes).encode(state)
    with pytest.raises(InputError, match=r"layer0\.weight"):
        PackedEncoder(codes).encode({})


@pytest.mark.parametrize("learned", [False, True])
def test_a_flipped_bit_anywhere_is_found(learned):
    codes = coded([(60, 30), (6,)], learned=learned)
    tensors = PackedEncoder(codes).encode(whole_state(codes))
    random = np.random.default_rng(0)
    for name, tensor in tensors.items():
        content = tensor.reshape(-1).view(torch.uint8).numpy()
        for position in {0, len(content) - 1, *random.integers(0, len(content), 20).tolist()}:
            damaged = content.copy()
            damaged[position] ^= 1 << int(random.integers(8))
            changed = torch.from_numpy(damaged).view(tensor.dtype).reshape(tensor.shape)
            with pytest.raises(InputError, match="header" if name == "packed.header" else name):
                decode(tensors | {name: changed})


def test_truncated_missing_reshaped_and_foreign_tensors_are_named():
    codes = coded([(60, 30), (6,)], learned=True)
    tensors = PackedEncoder(codes).encode(whole_state(codes))
    for name, tensor in tensors.items():
        with pytest.raises(InputError):
            decode({other: t for other, t in tensors.items() if other != name})
        if tensor.ndim:
            with pytest.raises(InputError, match="damaged"):
                decode(tensors | {name: tensor[:-1]})
        if tensor.numel() > 1 and name != "packed.header":
            with pytest.raises(InputError, match="damaged"):
                decode(tensors | {name: tensor[None]})
    with pytest.raises(InputError, match="not part of"):
        decode(tensors | {"stranger": torch.zeros(1)})
    with pytest.raises(InputError, match="not packed weights"):
        decode({"weight": torch.zeros(3)})


def test_a_header_of_a_later_version_is_refused():
    codes = coded([(6, 3)])
    tensors = PackedEncoder(codes).encode(codes.tensors())
    header = json.loads(zlib.decompress(tensors["packed.header"].numpy().tobytes()[4:]))
    text = zlib.compress(json.dumps(header | {"version": 2}).encode())
    content = torch.frombuffer(bytearray(zlib.crc32(text).to_bytes(4, "little") + text), dtype=torch.uint8)
    with pytest.raises(InputError, match="version 2"):
        decode(tensors | {"packed.header": content})
