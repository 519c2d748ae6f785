"""Codecs: what they keep exactly, what they lose, and what they say they lose."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.errors import InputError
from limbeck.records import CODECS, Full, Half, Log8, TopK, TopK8, codec_from, describe, kl_error

ALL = [
    Full(),
    Half(),
    Log8(),
    Log8(levels="linear"),
    TopK(k=5),
    TopK(k=5, tail="renormalise"),
    TopK8(k=5),
    TopK8(k=5, tail="renormalise"),
    TopK8(k=5, levels="linear"),
]
DENSE = [codec for codec in ALL if not isinstance(codec, TopK)]
KEPT = [codec for codec in ALL if isinstance(codec, TopK)]


def named(codecs):
    return pytest.mark.parametrize("codec", codecs, ids=lambda codec: "-".join(str(value) for value in codec.spec().values()))


def logits(rows=64, classes=50, scale=3.0, seed=0):
    return (np.random.default_rng(seed).normal(size=(rows, classes)) * scale).astype(np.float32)


def log_softmax(values):
    """In float64, written apart from the source."""
    values = values.astype(np.float64)
    values = values - values.max(axis=1, keepdims=True)
    return values - np.log(np.exp(values).sum(axis=1, keepdims=True))


def through(codec, values):
    return codec.decode(codec.encode(values), values.shape[1])


@named(ALL)
def test_arrays_have_the_stated_layout_and_size(codec):
    values = logits()
    arrays = codec.encode(values)
    layout = codec.layout(50)
    assert set(arrays) == set(layout)
    for name, (dtype, entries) in layout.items():
        assert arrays[name].dtype == dtype
        assert arrays[name].shape == (64, entries)
    assert sum(array.nbytes for array in arrays.values()) == 64 * codec.bytes_per_row(50)
    decoded = codec.decode(arrays, 50)
    assert decoded.shape == (64, 50)
    assert decoded.dtype == np.float32


@named(ALL)
def test_spec_goes_there_and_back(codec):
    assert codec_from(codec.spec()) == codec


@named(ALL)
def test_a_row_is_encoded_alike_whatever_stands_beside_it(codec):
    values = logits(rows=33, classes=40)
    together = codec.encode(values)
    for row in (0, 7, 32):
        alone = codec.encode(values[row : row + 1])
        assert all(alone[name].tobytes() == together[name][row : row + 1].tobytes() for name in alone)


@given(st.integers(0, 2**32 - 1), st.integers(1, 8))
def test_full_gives_every_bit_back(seed, rows):
    bits = np.random.default_rng(seed).integers(0, 2**32, (rows, 6), dtype=np.uint32).view(np.float32)
    values = np.where(np.isfinite(bits), bits, np.float32(-0.0))
    assert through(Full(), values).tobytes() == values.tobytes()


@named([codec for codec in ALL if codec.name != "full"])
@given(data=st.data())
def test_normalised_and_the_greatest_stays_the_greatest(codec, data):
    classes = data.draw(st.integers(5, 300))
    scale = data.draw(st.sampled_from([1e-4, 0.1, 1.0, 8.0, 60.0, 1e4]))
    values = logits(4, classes, scale, data.draw(st.integers(0, 10**6)))
    decoded = through(codec, values)
    assert np.isfinite(decoded).all()
    np.testing.assert_allclose(np.exp(decoded.astype(np.float64)).sum(axis=1), 1, atol=2e-5)
    rows = np.arange(4)
    best = decoded[rows, values.argmax(axis=1)]
    assert (best >= decoded.max(axis=1) - 1e-6).all()  # near-ties may become ties (to float32's rounding), never more


@named([codec for codec in ALL if codec.name != "full"])
@pytest.mark.parametrize("shift", [-1e6, 0.0, 512.0])
def test_a_constant_added_to_a_row_changes_nothing(codec, shift):
    values = np.round(logits(classes=30) * 4) / 4  # quarters: the shift is exact in float32
    arrays, moved = codec.encode(values), codec.encode(values + np.float32(shift))
    assert all(arrays[name].tobytes() == moved[name].tobytes() for name in arrays)


@named(ALL)
def test_uniform_rows_come_back_uniform(codec):
    for classes in (5, 6, 1000):
        decoded = through(codec, np.full((2, classes), 7.25, np.float32)).astype(np.float64)
        kept = classes if not isinstance(codec, TopK) or codec.tail == "spread" else codec.k
        expected = 7.25 if codec.name == "full" else -math.log(kept)
        np.testing.assert_allclose(decoded[:, :kept], expected, atol=1e-6)
        assert (decoded[:, kept:] <= -1e3).all()


@named(ALL)
@pytest.mark.parametrize("size", [1e30, 3e38])
def test_huge_logits(codec, size):
    values = np.zeros((2, 8), np.float32)
    values[0, 3], values[0, 5], values[1, :4] = size, -size, -size
    arrays = codec.encode(values)
    assert all(np.isfinite(array).all() for array in arrays.values())
    decoded = codec.decode(arrays, 8)
    assert np.isfinite(decoded).all()
    assert decoded[0].argmax() == 3
    if codec.name != "full":
        assert decoded[0, 3] == pytest.approx(0, abs=1e-6)
        np.testing.assert_allclose(decoded[1, 4:], -math.log(4), atol=1e-6)
    assert kl_error(values, decoded) == pytest.approx([0, 0], abs=1e-5)


@named(KEPT)
@given(data=st.data())
def test_the_k_greatest_descending_and_ties_by_lower_class(codec, data):
    classes = data.draw(st.integers(5, 40))
    values = np.array(data.draw(st.lists(st.sampled_from([-2.0, -0.0, 0.0, 1.0, 1.5]), min_size=classes, max_size=classes)), np.float32)[None]
    expected = sorted(range(classes), key=lambda place: (-values[0, place], place))[: codec.k]
    assert codec.encode(values)["index"][0].tolist() == expected


def test_topk_keeps_the_gaps_to_float16_and_the_tail_to_float32():
    values = logits(rows=200, classes=500)
    codec, exact = TopK(k=10), log_softmax(values)
    arrays = codec.encode(values)
    index = arrays["index"].astype(int)
    top = np.take_along_axis(exact, index, axis=1)
    gap = np.take_along_axis(values, index, axis=1) - values.max(axis=1, keepdims=True)
    assert (arrays["gap"] == gap.astype(np.float16)).all()
    np.testing.assert_allclose(arrays["tail"][:, 0], 1 - np.exp(top).sum(axis=1), rtol=1e-5)
    decoded = codec.decode(arrays, 500)
    np.testing.assert_allclose(np.take_along_axis(decoded, index, axis=1), top, atol=8 * 2**-11)
    others = np.ones((200, 500), bool)
    np.put_along_axis(others, index, False, axis=1)
    rest = decoded[others].reshape(200, 490)
    assert (rest == rest[:, :1]).all()
    np.testing.assert_allclose(np.exp(rest[:, 0]) * 490, arrays["tail"][:, 0], rtol=1e-5)


def test_renormalise_gives_the_others_nothing_and_divides_by_the_sum():
    values = logits(classes=20)
    decoded, exact = through(TopK(k=3, tail="renormalise"), values), log_softmax(values)
    order = np.argsort(-exact, axis=1, kind="stable")
    top = np.take_along_axis(exact, order[:, :3], axis=1)
    expected = top - np.log(np.exp(top).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(np.take_along_axis(decoded, order[:, :3], axis=1), expected, atol=8 * 2**-11)
    assert (np.exp(np.take_along_axis(decoded, order[:, 3:], axis=1)) == 0).all()
    assert np.isinf(kl_error(values, decoded)).all()


@named([TopK(k=7), TopK(k=7, tail="renormalise"), TopK8(k=7), TopK8(k=7, tail="renormalise")])
def test_k_may_be_all_classes(codec):
    values = logits(classes=7)
    arrays = codec.encode(values)
    assert (arrays["tail"] == 0).all()
    assert kl_error(values, codec.decode(arrays, 7)).max() < 1e-3


@pytest.mark.parametrize(
    ("classes", "dtype"),
    [(2, np.uint8), (256, np.uint8), (257, np.uint16), (2049, np.uint16), (65_536, np.uint16), (65_537, np.uint32)],
)
def test_class_numbers_are_exact_in_the_smallest_integers(classes, dtype):
    values = np.zeros((1, classes), np.float32)
    values[0, -1], values[0, -2] = 9, 8
    arrays = TopK(k=2).encode(values)
    assert arrays["index"].dtype == dtype
    assert arrays["index"][0].tolist() == [classes - 1, classes - 2]
    assert TopK(k=2).decode(arrays, classes)[0].argmax() == classes - 1


@named([Half(), Log8(), Log8(levels="linear")])
def test_dense_codecs_stay_under_a_bound(codec):
    values = logits(rows=300, classes=1000, scale=2.0)
    bound = {"half": 2e-6, "log8": 1e-3}[codec.name]
    assert kl_error(values, through(codec, values)).max() < bound


@pytest.mark.parametrize("levels", ["quadratic", "linear"])
@pytest.mark.parametrize("scale", [1.0, 2.0, 4.0])
def test_log8_costs_what_its_docstring_derives(levels, scale):
    values = logits(rows=400, classes=1000, scale=scale, seed=3)
    codec = Log8(levels=levels, nats=60)
    measured, derived = kl_error(values, through(codec, values)).mean(), codec.expected_kl(values).mean()
    assert measured == pytest.approx(derived, rel=0.15)


def test_quadratic_levels_beat_linear_ones_where_a_teacher_is_sure():
    values = logits(rows=400, classes=1000, scale=3.0)
    assert kl_error(values, through(Log8(), values)).mean() < kl_error(values, through(Log8(levels="linear"), values)).mean()


def test_the_cap_of_log8_is_a_trade():
    values = np.concatenate([logits(rows=50, classes=100), np.full((50, 1), -500, np.float32)], axis=1)
    errors = {nats: kl_error(values, through(Log8(nats=nats), values)).mean() for nats in (3.0, 20.0, 600.0)}
    assert errors[20.0] < errors[600.0]
    assert errors[20.0] < errors[3.0]


@given(st.integers(2, 30), st.integers(0, 10**6))
def test_kl_error_is_the_definition(classes, seed):
    values, other = logits(3, classes, 3.0, seed), logits(3, classes, 3.0, seed + 1)
    p, q = log_softmax(values), log_softmax(other)
    expected = (np.exp(p) * (p - q)).sum(axis=1)
    found = kl_error(values, other)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, atol=1e-12)
    np.testing.assert_allclose(kl_error(values, values + np.float32(2)), 0, atol=1e-9)


@named([TopK(k=4), TopK(k=4, tail="renormalise"), TopK8(k=4)])
def test_kl_over_the_outcomes_is_the_definition_and_no_more_than_over_classes(codec):
    values = logits(rows=100, classes=30)
    arrays = codec.encode(values)
    spread = codec_from({**codec.spec(), "tail": "spread"}).decode(arrays, 30)
    index, p, q = arrays["index"].astype(int), log_softmax(values), log_softmax(spread)

    def merged(log):
        top = np.exp(np.take_along_axis(log, index, axis=1))
        return np.concatenate([top, 1 - top.sum(axis=1, keepdims=True)], axis=1)

    expected = (merged(p) * (np.log(merged(p)) - np.log(merged(q)))).sum(axis=1)
    found = codec.kl_outcomes(values, arrays)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert (found <= kl_error(values, spread) + 1e-9).all()
    assert Half().kl_outcomes(values, {}) is None


def test_spread_leaves_only_what_the_tail_hides():
    values = logits(rows=100, classes=30)
    values[:, 4:] = -3.0  # every class but four alike: spreading is then exact
    values[:, :4] += 5
    assert kl_error(values, through(TopK(k=4), values)).max() < 1e-5


def test_describe():
    assert describe(Full(), 1000)["ratio"] == 1
    assert describe(TopK(k=10), 1000) | {"ratio": 0} == {"bytes_per_row": 10 * 2 + 10 * 2 + 4, "raw_bytes_per_row": 4000, "ratio": 0}
    assert describe(TopK8(k=10), 100)["bytes_per_row"] == 10 + 10 + 4 + 4
    assert describe(Log8(), 1000)["ratio"] == pytest.approx(4000 / 1004)
    with pytest.raises(InputError, match="classes"):
        describe(TopK(k=11), 10)


@pytest.mark.parametrize(
    ("spec", "where", "words"),
    [
        ({"name": "topq", "k": 5}, "codec.name", "topk"),
        ({}, "codec.name", "None"),
        ({"name": ["topk"]}, "codec.name", "no codec"),
        ({"name": "topk"}, "codec.k", "needs 'k'"),
        ({"name": "topk", "k": 5, "tial": "spread"}, "codec.tial", "tail"),
        ({"name": "topk", "k": 0}, "codec.k", "at least 1"),
        ({"name": "topk", "k": True}, "codec.k", "True"),
        ({"name": "topk", "k": 2.5}, "codec.k", "2.5"),
        ({"name": "topk", "k": 5, "tail": "drop"}, "codec.tail", "renormalise"),
        ({"name": "log8", "levels": "cubic"}, "codec.levels", "quadratic"),
        ({"name": "log8", "nats": 0}, "codec.nats", "above 0"),
        ({"name": "log8", "nats": float("nan")}, "codec.nats", "nan"),
        ({"name": "log8", "nats": "wide"}, "codec.nats", "wide"),
        ({"name": "topk8", "k": 5, "levels": 3}, "codec.levels", "linear"),
        ({"name": "full", "k": 5}, "codec.k", "no field"),
    ],
)
def test_wrong_specs_name_the_field(spec, where, words):
    with pytest.raises(InputError, match=words) as caught:
        codec_from(spec)
    assert caught.value.where == where


def test_k_above_the_classes_is_refused():
    with pytest.raises(InputError, match="10") as caught:
        TopK(k=11).check(10)
    assert caught.value.where == "k"
    with pytest.raises(InputError):
        TopK(k=11).encode(logits(classes=10))


def test_every_codec_is_tested():
    assert {codec.name for codec in ALL} == set(CODECS)
    assert {codec.name for codec in DENSE} | {codec.name for codec in KEPT} == set(CODECS)
