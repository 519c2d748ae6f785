"""Token codecs: what comes back, at which error, in which bytes; and what is refused."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.errors import InputError
from limbeck.records import CompactCodec, PlainTopK, TopRows, outcomes_kl, token_codec, token_codec_from
from limbeck.records.blobs import Blobs
from limbeck.records.prior import Prior
from limbeck.records.rans import TOTAL, Decoder, Encoder, frequencies, slots_of
from limbeck.records.token_codecs import packed_rows, places_of, unpacked_rows

V, K = 3000, 20


def zipf(rows, seed, k=K, vocabulary=V, topics=6):
    """The top k of rows like a language model's: a Zipf law of the ids, tilted by a topic, at a temperature of the row's own."""
    rng = np.random.default_rng(seed)
    tilt = np.random.default_rng(5).normal(size=(topics, vocabulary)) * 3
    z = -1.1 * np.log(np.arange(vocabulary) + 2) + tilt[rng.integers(0, topics, rows)] + rng.normal(size=(rows, vocabulary))
    z = z * np.exp(rng.normal(size=(rows, 1)) * 0.4)
    log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    ids = np.argsort(-log_p, axis=1)[:, :k]
    return ids, np.take_along_axis(log_p, ids, axis=1).astype(np.float32)


@pytest.fixture(scope="module")
def rows():
    return zipf(600, 1)


@pytest.fixture(scope="module")
def compact():
    return CompactCodec(k=K, vocabulary=V).fit(*zipf(3000, 0))


@pytest.fixture(params=["float16", "bfloat16", "int32", "compact"])
def codec(request, compact):
    plain = {"float16": {}, "bfloat16": {"values": "bfloat16"}, "int32": {"ids": "int32"}}
    return compact if request.param == "compact" else PlainTopK(K, V, **plain[request.param])


def starts_of(lengths):
    return np.cumsum(lengths) - lengths


def through(codec, ids, logp):
    data, lengths = codec.encode(*codec.canonical(ids, logp))
    return codec.decode(data, starts_of(lengths), lengths)


def shuffled(ids, logp, seed):
    order = np.argsort(np.random.default_rng(seed).random(ids.shape), axis=1)
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(logp, order, axis=1)


# ---- there and back ---------------------------------------------------------------------------------------------------


def test_the_ids_come_back_and_the_error_is_small(codec, rows):
    ids, logp = through(codec, *rows)
    kl = outcomes_kl(*rows, ids, logp, V)  # refuses other ids
    bound = {"plain_topk": 1e-3}.get(codec.name, 1.3 * K * 0.0105**2 / 6)
    assert kl.mean() < bound
    assert kl.max() < 10 * bound
    assert ids.dtype == np.int64
    assert logp.dtype == np.float32
    assert (np.diff(logp, axis=1) <= 0).all()
    assert (np.exp(logp.astype(np.float64)).sum(axis=1) <= 1 + 1e-5).all()


def test_float16_and_whole_ids_are_nearly_exact(rows):
    ids, logp = through(PlainTopK(K, V), *rows)
    np.testing.assert_array_equal(ids, PlainTopK(K, V).canonical(*rows)[0])
    np.testing.assert_allclose(logp, np.sort(rows[1])[:, ::-1], rtol=2**-10)


def test_the_error_goes_with_the_square_of_the_step(rows):
    errors = {}
    for step in (0.005, 0.01, 0.02):
        one = CompactCodec(k=K, vocabulary=V, step=step, clusters=8).fit(*zipf(1500, 0))
        errors[step] = outcomes_kl(*rows, *through(one, *rows), V).mean()
        assert 0.5 * K * step**2 / 6 < errors[step] < 1.6 * K * step**2 / 6
    assert errors[0.005] < errors[0.01] < errors[0.02]


def test_compact_is_much_smaller_and_knows_its_corpus(compact, rows):
    _, lengths = compact.encode(*compact.canonical(*rows))
    assert lengths.mean() < PlainTopK(K, V).row_bytes / 2
    assert compact.fitted_rows == 3000
    foreign = (rows[0] * 7 + 13) % V  # the same shapes of rows over other ids
    assert compact.encode(*compact.canonical(foreign, rows[1]))[1].mean() > 1.15 * lengths.mean()
    np.testing.assert_array_equal(np.sort(through(compact, foreign, rows[1])[0]), np.sort(foreign))


def test_the_same_bytes_whatever_stands_beside_in_any_order(codec, rows):
    ids, logp = rows[0][:40], rows[1][:40]
    data, lengths = codec.encode(*codec.canonical(ids, logp))
    mixed, mixed_lengths = codec.encode(*codec.canonical(*shuffled(ids, logp, 3)))
    assert mixed.tobytes() == data.tobytes()
    assert np.array_equal(mixed_lengths, lengths)
    starts = starts_of(lengths)
    for row in (0, 17, 39):
        alone, _ = codec.encode(*codec.canonical(ids[row : row + 1], logp[row : row + 1]))
        assert alone.tobytes() == data[starts[row] : starts[row] + lengths[row]].tobytes()


def test_any_row_is_read_alone_as_it_is_read_with_others(codec, rows):
    data, lengths = codec.encode(*codec.canonical(*rows))
    starts = starts_of(lengths)
    whole = codec.decode(data, starts, lengths)
    pick = np.random.default_rng(2).permutation(len(starts))[:50]
    for some in (pick, pick[:1], np.repeat(pick[:2], 3)):
        ids, logp = codec.decode(data, starts[some], lengths[some])
        np.testing.assert_array_equal(ids, whole[0][some])
        np.testing.assert_array_equal(logp, whole[1][some])
    assert codec.decode(data, starts[:0], lengths[:0])[0].shape == (0, K)


def test_more_rows_than_lanes(compact):
    ids, logp = (np.tile(part, (8, 1)) for part in zipf(600, 4))
    found = through(compact, ids, logp)
    np.testing.assert_array_equal(found[0][:600], found[0][4200:])
    assert outcomes_kl(ids, logp, *found, V).max() < 0.01


FITTED = {
    (k, size): CompactCodec(k=k, vocabulary=size, step=step).fit(*zipf(700, 9, k, size)) for k, size, step in ((1, 50, 0.01), (4, 40, 0.05), (6, 6, 0.002))
}


@settings(max_examples=60, deadline=None)
@given(data=st.data(), shape=st.sampled_from(sorted(FITTED)), plain=st.booleans())
def test_any_row_comes_back(data, shape, plain):
    k, size = shape
    codec = PlainTopK(k, size) if plain else FITTED[shape]
    count = data.draw(st.integers(1, 4))
    ids = np.array([data.draw(st.permutations(range(size)))[:k] for _ in range(count)])
    weights = np.array([data.draw(st.lists(st.sampled_from([0.0, 1e-30, 1e-9, 1e-3, 0.5, 1.0, 1.0, 7.0]), min_size=k, max_size=k)) for _ in range(count)])
    tail = np.zeros((count, 1)) if k == size else np.array([[data.draw(st.sampled_from([0.0, 1e-8, 0.1, 50.0]))] for _ in range(count)])
    weights[(weights.sum(axis=1) + tail[:, 0]) == 0, 0] = 1
    with np.errstate(divide="ignore"):
        logp = np.log(weights / (weights.sum(axis=1, keepdims=True) + tail)).astype(np.float32)
    found = through(codec, ids, logp)
    assert np.isfinite(found[1]).all()
    kl = outcomes_kl(*codec.canonical(ids, logp), *found, size)
    assert np.isfinite(kl).all()
    assert kl.max() < (1e-2 if plain else 2 * (k + 1) ** 2 * codec.step**2 + 1e-4)  # every root off by a whole step, and the first takes it all


def test_ids_that_no_fitted_row_had_and_extreme_rows(compact):
    unseen = np.setdiff1d(np.arange(V), zipf(3000, 0)[0])[-K:]
    ids = np.stack([unseen, np.arange(V - K, V), np.arange(K)])
    logp = np.full((3, K), -np.inf, np.float32)
    logp[0, 3], logp[1], logp[2] = 0.0, -np.log(K), -np.log(V)
    found = through(compact, ids, logp)
    kl = outcomes_kl(*compact.canonical(ids, logp), *found, V)
    assert kl.max() < 1e-2


def test_outcomes_kl_is_the_divergence_of_k_and_the_tail():
    p, q = np.array([[0.5, 0.2, 0.1]]), np.array([[0.4, 0.3, 0.2]])
    want = 0.5 * np.log(0.5 / 0.4) + 0.2 * np.log(0.2 / 0.3) + 0.1 * np.log(0.1 / 0.2) + 0.2 * np.log(0.2 / 0.1)
    ids = np.array([[4, 9, 2]])
    np.testing.assert_allclose(outcomes_kl(ids, np.log(p), ids[:, ::-1], np.log(q)[:, ::-1], 100), [want], rtol=1e-6)
    assert outcomes_kl(ids, np.log(p), ids, np.log(p), 100) == pytest.approx(0, abs=1e-12)
    with pytest.raises(InputError, match="different ids"):
        outcomes_kl(ids, np.log(p), ids + 1, np.log(q), 100)


# ---- the entropy coder ------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(0, 40), st.integers(0, 20))
def test_symbols_and_raw_bits_come_back_and_take_what_they_should(seed, rows, steps, most):
    rng = np.random.default_rng(seed)
    table = frequencies(rng.random((3, 9)) ** 6 + 1e-9)
    starts = np.cumsum(table.astype(int), axis=1) - table
    context, symbol = rng.integers(0, 3, (steps, rows)), rng.integers(0, 9, (steps, rows))
    bits = rng.integers(0, most + 1, (steps, rows))
    raw = rng.integers(0, 1 << 20, (steps, rows)) & ((1 << bits) - 1)
    coder = Encoder(rows, steps)
    for step in reversed(range(steps)):
        where = context[step], symbol[step]
        coder.put(table[where], starts[where], raw[step], bits[step])
    data, lengths = coder.finish()
    ideal = (bits - np.log2(table[context, symbol] / TOTAL)).sum(axis=0) / 8
    assert (lengths <= ideal * 1.001 + 2.7).all()  # the next whole byte, and what the first symbol of a small state wastes
    slots = slots_of(table)
    reader = Decoder(np.concatenate([data, np.zeros(8, np.uint8)]), starts_of(lengths), lengths)
    for step in range(steps):
        np.testing.assert_array_equal(reader.symbol(slots, context[step] * TOTAL), symbol[step])
        width = bits[step].astype(np.uint64)
        np.testing.assert_array_equal(reader.raw(width, (np.uint64(1) << width) - np.uint64(1)), raw[step])
        reader.refill()
    assert reader.whole()


@given(st.lists(st.lists(st.sampled_from([0.0, 1e-12, 0.3, 1.0, 1e9]), min_size=5, max_size=5), min_size=1, max_size=4), st.booleans())
def test_frequencies_fill_the_slots(counts, escape):
    counts = np.array(counts)
    counts[counts.sum(axis=1) == 0, 1] = 1
    table = frequencies(counts, 4 if escape else None).astype(int)
    assert (table.sum(axis=1) == TOTAL).all()
    assert table.max() < TOTAL
    assert (table[:, 4] > 0).all() if escape else (table > 0).all()


# ---- blobs ------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 300), st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]), st.booleans())
def test_blobs_keep_which_positions_have_rows(seed, length, share, plain):
    codec = PlainTopK(1, 50) if plain else FITTED[1, 50]
    rng = np.random.default_rng(seed)
    present = rng.random((3, length)) < share
    ids = rng.integers(0, 50, (3, length, 1)).astype(np.int32)
    logp = np.full((3, length, 1), np.nan, np.float32)  # absent positions are not looked at
    logp[present] = np.log(0.25)
    blobs, kept = packed_rows(codec, TopRows(ids, logp, present))
    assert len(kept[0]) == present.sum()
    places = places_of(codec, blobs, length)
    found = unpacked_rows(codec, blobs.data, places.present, places.starts, places.lengths)
    np.testing.assert_array_equal(found["present"], present)
    np.testing.assert_array_equal(found["ids"][present], ids[present])
    assert (found["ids"][~present] == 0).all()
    np.testing.assert_allclose(found["logp"][~present], -np.log(50), rtol=1e-6)
    absent = len(blobs.data) - places.lengths.sum() - (0 if plain else present.sum())
    assert absent <= 3 * (1 + max(4, (length + 7) // 8))


def test_rows_longer_than_a_byte_can_say():
    k, size = 600, 2000
    ids, logp = zipf(30, 3, k, size)
    codec = CompactCodec(k=k, vocabulary=size, step=0.004).fit(*zipf(40, 4, k, size))
    blobs, kept = packed_rows(codec, TopRows(ids.reshape(3, 10, k), logp.reshape(3, 10, k), np.ones((3, 10), bool)))
    places = places_of(codec, blobs, 10)
    assert places.lengths.max() > 255
    found = unpacked_rows(codec, blobs.data, places.present, places.starts, places.lengths)
    assert outcomes_kl(*kept, found["ids"].reshape(30, k), found["logp"].reshape(30, k), size).max() < 0.02


# ---- what is refused --------------------------------------------------------------------------------------------------


def test_damaged_rows_are_refused_and_never_crash(codec, rows):
    data, lengths = codec.encode(*codec.canonical(rows[0][:30], rows[1][:30]))
    starts, rng, refused = starts_of(lengths), np.random.default_rng(0), 0
    for trial in range(200):
        hurt = data.copy()
        row = trial % 30
        place = starts[row] + rng.integers(0, lengths[row])
        hurt[place] ^= np.uint8(1 << rng.integers(0, 8))
        try:
            ids, logp = codec.decode(hurt, starts, lengths)
        except InputError:
            refused += 1
        else:
            assert ids.max() < V
            assert np.isfinite(logp).all()
    assert refused > 150 or codec.name == "plain_topk"  # most are seen by their rows; all by the shard's checksum
    for wrong in (lengths - 1, lengths + 1, np.full_like(lengths, 10**6), np.zeros_like(lengths)):
        with pytest.raises(InputError, match="damaged"):
            codec.decode(data, starts, wrong)


def test_random_bytes_are_no_rows(compact):
    rng = np.random.default_rng(1)
    for size in (1, 2, 5, 9, 60, 400):
        with pytest.raises(InputError, match="damaged"):
            compact.decode(rng.integers(0, 256, size * 20).astype(np.uint8), np.arange(20) * size, np.full(20, size))


def test_damaged_heads_are_refused(codec, rows):
    given_rows = TopRows(rows[0][:40].reshape(2, 20, K), rows[1][:40].reshape(2, 20, K), np.ones((2, 20), bool))
    blobs, _ = packed_rows(codec, given_rows)
    first = blobs.data[: blobs.offsets[1]]
    for change in (
        lambda blob: blob[:0],
        lambda blob: blob[:3],
        lambda blob: blob[:-1],
        lambda blob: np.concatenate([blob, blob[:1]]),
        lambda blob: np.concatenate([np.array([9], np.uint8), blob[1:]]),
        lambda blob: np.concatenate([np.array([255], np.uint8), blob[1:]]),
        lambda blob: np.concatenate([blob[:1], np.array([200], np.uint8), blob[2:]]),
        lambda blob: np.concatenate([blob[:3], np.array([0, 0], np.uint8), blob[5:]]),
    ):
        with pytest.raises(InputError, match="damaged"):
            places_of(codec, Blobs.of([change(first)]), 20)
    with pytest.raises(InputError, match="damaged"):
        places_of(codec, Blobs.of([first]), 19)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda ids, logp: (ids[:, :-1], logp[:, :-1]), "must be"),
        (lambda ids, logp: (ids * 1.0, logp), "must be"),
        (lambda ids, logp: (ids + V, logp), "outside the vocabulary"),
        (lambda ids, logp: (ids - V, logp), "outside the vocabulary"),
        (lambda ids, logp: (np.zeros_like(ids), logp), "twice"),
        (lambda ids, logp: (ids, np.full_like(logp, np.nan)), "not a number"),
        (lambda ids, logp: (ids, logp + 1), "sum to"),
    ],
)
def test_wrong_rows_are_refused(compact, rows, change, words):
    with pytest.raises(InputError, match=words):
        compact.canonical(*change(rows[0][:5], rows[1][:5]))


def test_rows_a_little_above_one_are_normalised(compact, rows):
    logp = rows[1][:5].astype(np.float64)
    logp = (logp - np.log(np.exp(logp).sum(axis=1, keepdims=True)) + np.log(1.01)).astype(np.float32)
    kept = compact.canonical(rows[0][:5], logp)[1]
    np.testing.assert_allclose(np.exp(kept.astype(np.float64)).sum(axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("spec", "where"),
    [
        ({"name": "compakt", "k": 5}, "codec.name"),
        ({"name": "compact"}, "codec.k"),
        ({"name": "compact", "k": 0}, "codec.k"),
        ({"name": "compact", "k": V + 1}, "codec.k"),
        ({"name": "compact", "k": True}, "codec.k"),
        ({"name": "compact", "k": 5, "step": 0}, "codec.step"),
        ({"name": "compact", "k": 5, "clusters": 1000}, "codec.clusters"),
        ({"name": "compact", "k": 5, "prior": "abc"}, "codec.prior"),
        ({"name": "compact", "k": 5, "prior": 5}, "codec.prior"),
        ({"name": "compact", "k": 5, "vocabulary": V + 1}, "codec.vocabulary"),
        ({"name": "compact", "k": 5, "bits": 8}, "codec.bits"),
        ({"name": "plain_topk", "k": 5, "values": "float32"}, "codec.values"),
        ({"name": "plain_topk", "k": 5, "ids": "int16"}, "codec.ids"),
    ],
)
def test_wrong_specs_are_refused(spec, where):
    with pytest.raises(InputError) as caught:
        token_codec(spec, vocabulary=V)
    assert caught.value.where == where


def test_another_vocabulary_is_refused(codec):
    codec.check(V)
    with pytest.raises(InputError, match=r"vocabulary of 3,000, not of 4,000"):
        codec.check(4000)
    with pytest.raises(InputError, match=r"vocabulary of 3,000, not of 4,000"):
        token_codec(codec.spec(), vocabulary=4000)


def test_a_prior_of_another_vocabulary_or_damaged_is_refused(compact):
    spec = compact.spec()
    with pytest.raises(InputError, match=r"vocabulary of 3,000, not of 3,001"):
        token_codec_from(spec | {"vocabulary": V + 1})
    for text in (spec["prior"][:-8], spec["prior"][4:], spec["prior"].swapcase()):
        with pytest.raises(InputError, match="prior"):
            token_codec_from(spec | {"prior": text})


def test_specs_go_there_and_back(codec, rows):
    again = token_codec_from(json.loads(json.dumps(codec.spec())))
    assert again == codec
    for one in (again, pickle.loads(pickle.dumps(codec))):
        for a, b in zip(through(one, *rows), through(codec, *rows), strict=True):
            np.testing.assert_array_equal(a, b)
    assert len(json.dumps(codec.identity())) < 300
    assert not again.needs_prior


def test_fitting_is_deterministic_and_needed(compact):
    assert CompactCodec(k=K, vocabulary=V).fit(*shuffled(*zipf(3000, 0), 8)).prior == compact.prior
    bare = CompactCodec(k=K, vocabulary=V)
    assert bare.needs_prior
    assert PlainTopK(K, V).fit(*zipf(3, 0)) == PlainTopK(K, V)
    for act in (lambda: through(bare, *zipf(3, 0)), lambda: bare.fit(np.zeros((0, K), int), np.zeros((0, K)))):
        with pytest.raises(InputError, match="prior"):
            act()
    assert Prior.of_text(compact.prior, V).text() == compact.prior
