"""Tokens through the disk: written, read whole and by single rows, refused, damaged, resumed; the same bytes whoever writes."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from limbeck.errors import InputError
from limbeck.records import CompactCodec, Field, Part, PlainTopK, Record, RecordWriter, TopRows, codec_from, outcomes_kl
from limbeck.records.shards import pack, unpack

LENGTH, VOCABULARY = 12, 1000


def rows_of(numbers, k=5, length=LENGTH, vocabulary=VOCABULARY):
    """TopRows that depend on the sample's number alone: sample 0 has no rows, sample 1 all, the others some."""
    ids, logp, present = [], [], []
    for number in numbers:
        rng = np.random.default_rng(int(number))
        z = rng.normal(size=(length, vocabulary)) * 3
        full = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
        top = np.argsort(-full, axis=1)[:, :k]
        ids.append(top)
        logp.append(np.take_along_axis(full, top, axis=1))
        present.append(np.full(length, number == 1) if number < 2 else rng.random(length) < rng.choice([0.2, 0.9]))
    return TopRows(np.stack(ids).astype(np.int32), np.stack(logp).astype(np.float32), np.stack(present))


def writer(url, codec, samples=40, rank=0, world=1, views=2):
    part = Part(np.arange(samples), views, (Field.tokens(codec, LENGTH), Field.score("loss")))
    return RecordWriter(url, identity={"codec": codec.identity()}, about={}, parts={"train": part}, shard_rows=16, rank=rank, world=world)


def work(one, k):
    for task in one.pending():
        one.write(task, {"tokens": rows_of(task.ids + 1000 * task.view * (task.ids > 1), k), "scores/loss": task.ids.astype(np.float32)})


def record(url, codec, **changes):
    one = writer(url, codec, **changes)
    work(one, codec.k)
    one.finish()
    return Record.open(url)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def fitted():
    rows = rows_of(range(100, 300))
    return CompactCodec(k=5, vocabulary=VOCABULARY, step=0.02).fit(rows.ids[rows.present], rows.logp[rows.present])


PLAIN, COMPACT = PlainTopK(k=5, vocabulary=VOCABULARY), fitted()


@pytest.fixture(scope="module", params=[PLAIN, COMPACT], ids=lambda codec: codec.name)
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens") / "r"
    record(folder, request.param)
    return folder, request.param


def test_rows_come_back_in_the_order_asked_for(made):
    folder, codec = made
    part = Record.open(folder).parts["train"]
    assert part.fields["tokens"].codec == codec
    ids, views = np.array([7, 1, 39, 0, 7, 20]), np.array([1, 0, 0, 0, 0, 1])
    found = part.read(["tokens", "scores/loss"], ids, views)
    assert set(found) == {"tokens/ids", "tokens/logp", "tokens/present", "scores/loss"}
    np.testing.assert_array_equal(found["scores/loss"], ids)
    want = rows_of(ids + 1000 * views * (ids > 1))
    mask = want.present
    np.testing.assert_array_equal(found["tokens/present"], mask)
    assert found["tokens/ids"].dtype == np.int64
    assert found["tokens/logp"].dtype == np.float32
    kl = outcomes_kl(want.ids[mask], want.logp[mask], found["tokens/ids"][mask], found["tokens/logp"][mask], VOCABULARY)
    assert kl.max() < (1e-4 if codec.name == "plain_topk" else 1e-2)
    assert (found["tokens/ids"][~mask] == np.arange(5)).all()
    np.testing.assert_allclose(found["tokens/logp"][~mask], -np.log(VOCABULARY), rtol=1e-6)
    empty = part.read(["tokens"], [], [])
    assert empty["tokens/ids"].shape == (0, LENGTH, 5)


def test_single_rows_are_those_of_whole_samples(made):
    folder, _ = made
    part = Record.open(folder).parts["train"]
    rng = np.random.default_rng(0)
    ids, views, at = rng.integers(0, 40, 60), rng.integers(0, 2, 60), rng.integers(0, LENGTH, 60)
    whole, single = part.read(["tokens"], ids, views), part.read_rows(ids, views, at)
    assert set(single) == set(whole)
    for name, array in single.items():
        np.testing.assert_array_equal(array, whole[name][np.arange(60), at], err_msg=name)
    for wrong in ([0, LENGTH], [0, -1], [0]):
        with pytest.raises(InputError, match=r"position|one length"):
            part.read_rows([1, 2], [0, 0], wrong)
    with pytest.raises(InputError, match="sample 40"):
        part.read_rows([40], [0], [0])


def test_the_summary_says_what_tokens_cost_and_lose(made):
    folder, codec = made
    record = Record.open(folder)
    record.verify()
    errors = record.summary()["parts"]["train"]["errors"]["tokens"]
    numbers = np.arange(40)
    want = [rows_of(numbers + 1000 * view * (numbers > 1)) for view in (0, 1)]
    assert errors["tokens"] == sum(int(rows.present.sum()) for rows in want)
    found = [record.parts["train"].read(["tokens"], numbers, np.full(40, view)) for view in (0, 1)]
    kl = np.concatenate(
        [
            outcomes_kl(
                *codec.canonical(rows.ids[rows.present], rows.logp[rows.present]), one["tokens/ids"][rows.present], one["tokens/logp"][rows.present], 1000
            )
            for rows, one in zip(want, found, strict=True)
        ]
    )
    np.testing.assert_allclose([errors["kl_mean"], errors["kl_max"]], [kl.mean(), kl.max()], rtol=1e-9)
    assert 5 < errors["bytes_per_token"] < 25
    assert len(record.identity["codec"].get("prior", "")) in (0, 64)


def test_absent_positions_cost_next_to_nothing(tmp_path):
    sizes = {}
    for share in (1.0, 0.0):
        rows = rows_of([1] * 16)
        rows.present[:] = np.random.default_rng(0).random(rows.present.shape) < share
        one = RecordWriter(tmp_path / str(share), identity={}, about={}, parts={"train": Part(np.arange(16), 1, (Field.tokens(COMPACT, LENGTH),))})
        for task in one.pending():
            one.write(task, {"tokens": rows})
        one.finish()
        found = Record.open(tmp_path / str(share)).summary()["parts"]["train"]["errors"]["tokens"]
        sizes[share] = (found["tokens"], found["bytes_per_token"], found["kl_mean"])
    assert sizes[1.0][0] == 16 * LENGTH
    assert sizes[0.0] == (0, None, None)


def test_the_same_bytes_by_one_process_or_three_and_with_views_added(made, tmp_path):
    folder, codec = made
    for rank in (2, 1, 0):
        work(writer(tmp_path / "three", codec, rank=rank, world=3), 5)
    writer(tmp_path / "three", codec, world=3).finish()
    assert files(tmp_path / "three") == files(folder)
    record(tmp_path / "grown", codec, views=1)
    record(tmp_path / "grown", codec, views=2)
    assert files(tmp_path / "grown") == files(folder)


def test_a_killed_recording_goes_on_to_the_same_bytes(made, tmp_path):
    folder, codec = made
    script = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); import test_token_records as t; from limbeck.records import RecordWriter\n"
        "codec = t.COMPACT if sys.argv[3] == 'compact' else t.PLAIN\n"
        "one = t.writer(sys.argv[2], codec); write = one.write\n"
        "one.write = lambda task, values: (write(task, values), print('shard', flush=True), time.sleep(0.2))\n"
        "t.work(one, 5)"
    )
    child = subprocess.Popen([sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path / "r"), codec.name], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "shard\n"
    time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    with pytest.raises(InputError, match="not finished"):
        Record.open(tmp_path / "r")
    record(tmp_path / "r", codec)
    assert files(tmp_path / "r") == files(folder)


def test_a_damaged_shard_is_named_and_another_codec_refused(made, tmp_path):
    folder, _ = made
    copy = tmp_path / "copy"
    for name, content in files(folder).items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(content)
    shard = copy / "train/shards/00001-00002.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    part = Record.open(copy).parts["train"]
    part.read(["tokens"], np.arange(40), np.zeros(40))
    with pytest.raises(InputError, match=r"00001-00002\.arrow.*damaged"):
        part.read_rows([39], [1], [0])
    for other in (PlainTopK(k=5, vocabulary=1001), PlainTopK(k=5, vocabulary=VOCABULARY, ids="int32"), CompactCodec(5, VOCABULARY)):
        with pytest.raises(InputError, match="the record was made with"):
            writer(copy, other)


def test_pickled_records_read_tokens(made):
    folder, _ = made
    record = Record.open(folder)
    again = pickle.loads(pickle.dumps(record))
    a, b = (one.parts["train"].read(["tokens"], [3, 1], [0, 1]) for one in (record, again))
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_bytes_that_pass_the_checksum_but_are_no_rows_are_one_line(tmp_path):
    import hashlib

    from limbeck.records.blobs import Blobs
    from limbeck.records.manifest import sealed, unsealed

    record(tmp_path / "r", COMPACT)
    shard = tmp_path / "r/train/shards/00000-00000.arrow"
    columns = unpack(shard.read_bytes(), {"tokens": ("blob", ()), "scores/loss": ("float32", ())}, "shard")
    data = np.array(columns["tokens"].data)
    data[columns["tokens"].offsets[1] + 6 :] ^= 85
    shard.write_bytes(pack({"tokens": Blobs(data, columns["tokens"].offsets), "scores/loss": columns["scores/loss"]}))
    index = unsealed((tmp_path / "r/index.json").read_bytes(), "", "")
    index["shards"]["train/shards/00000-00000.arrow"]["sha256"] = hashlib.sha256(shard.read_bytes()).hexdigest()
    (tmp_path / "r/index.json").write_bytes(sealed(index))
    with pytest.raises(InputError, match="damaged"):
        Record.open(tmp_path / "r").parts["train"].read(["tokens"], np.arange(16), np.zeros(16))


def test_columns_of_bytes_are_checked(tmp_path):
    content = pack({"x": np.arange(3)})
    with pytest.raises(InputError, match="not byte strings"):
        unpack(content, {"x": ("blob", ())}, "shard")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: np.zeros((16, LENGTH, 5)), "TopRows"),
        (lambda rows: TopRows(rows.ids[:, :-1], rows.logp[:, :-1], rows.present[:, :-1]), "'present' has shape"),
        (lambda rows: TopRows(rows.ids[..., :-1], rows.logp[..., :-1], rows.present), "must be"),
        (lambda rows: TopRows(rows.ids, rows.logp, rows.present.astype(int)), "must be"),
        (lambda rows: TopRows(rows.ids + 1000, rows.logp, rows.present), "outside the vocabulary"),
        (lambda rows: TopRows(rows.ids, rows.logp * np.nan, rows.present), "not a number"),
        (lambda rows: TopRows(rows.ids * 0, rows.logp, rows.present), "twice"),
    ],
)
def test_wrong_values_are_refused_and_nothing_is_written(tmp_path, change, words):
    one = writer(tmp_path / "r", COMPACT)
    task = next(one.pending())
    with pytest.raises(InputError, match=words):
        one.write(task, {"tokens": change(rows_of(task.ids)), "scores/loss": np.zeros(16)})
    assert not list(tmp_path.rglob("shards/*"))
    with pytest.raises(InputError, match="TopRows"):
        one.write(task, {"tokens": rows_of(task.ids), "scores/loss": rows_of(task.ids)})


def test_a_codec_without_its_prior_cannot_write(tmp_path):
    one = writer(tmp_path / "r", CompactCodec(5, VOCABULARY))
    task = next(one.pending())
    with pytest.raises(InputError, match="no prior yet"):
        one.write(task, {"tokens": rows_of(task.ids), "scores/loss": np.zeros(16)})


def test_fields_of_tokens():
    field = Field.tokens(COMPACT, LENGTH)
    assert Field.from_spec("tokens", json.loads(json.dumps(field.spec()))) == field
    for make in (
        lambda: Field("tokens", (LENGTH,)),
        lambda: Field("tokens", (LENGTH, 2), "float32", PLAIN),
        lambda: Field("tokens", (LENGTH,), "float32", codec_from({"name": "full"})),
        lambda: Field("logits", (1, 10), "float32", PLAIN),
        lambda: Field.tokens(PLAIN, 1 << 16),
        field.bytes_per_row,
    ):
        with pytest.raises(InputError):
            make()


def test_reading_imports_no_torch(made):
    folder, _ = made
    script = (
        "import sys; from limbeck.records import Record; Record.open(sys.argv[1]).parts['train'].read(['tokens'], [1], [0]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, str(folder)], check=True)
