"""Reading a record, refusing the wrong one, and noticing every damaged file."""

import json
import multiprocessing
import pickle

import numpy as np
import pytest
import record_script as script

from limbeck.errors import InputError
from limbeck.records import Field, Part, Record, RecordWriter, check_identity, codec_from


def expected(part, name, ids, views):
    field = part.fields[name]
    rows = [script.values(part.fields.values(), [number], int(view))[name] for number, view in zip(ids, views, strict=True)]
    stacked = np.concatenate(rows)
    if field.codec:
        flat = stacked.reshape(-1, field.shape[1])
        return field.codec.decode(field.codec.encode(flat), field.shape[1]).reshape(stacked.shape)
    return stacked.astype(field.dtype).astype(np.uint8 if name == "flip" else np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("record") / "r"
    script.record(path)
    return path


@pytest.fixture
def copy(folder, tmp_path):
    for file in folder.rglob("*"):
        if file.is_file():
            target = tmp_path / "copy" / file.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    return tmp_path / "copy"


def test_rows_come_back_in_the_order_asked_for(folder):
    part = Record.open(folder).parts["train"]
    rng = np.random.default_rng(5)
    ids, views = rng.choice(part.ids, 90), rng.integers(0, 3, 90)
    found = part.read(list(part.fields), ids, views)
    assert list(found) == list(part.fields)
    for name, array in found.items():
        want = expected(part, name, ids, views)
        assert array.dtype == want.dtype
        np.testing.assert_array_equal(array, want, err_msg=name)


def test_an_empty_batch_and_large_ids(folder):
    record = Record.open(folder)
    assert record.parts["train"].read(["logits"], np.array([], np.int64), np.array([], np.int64))["logits"].shape == (0, 2, 20)
    test = record.parts["test"]
    np.testing.assert_array_equal(test.read(["logits"], [10**12 + 6], [0])["logits"], expected(test, "logits", [10**12 + 6], [0]))


@pytest.mark.parametrize(
    "codec", [{"name": "full"}, {"name": "half"}, {"name": "log8"}, {"name": "topk8", "k": 4}, {"name": "topk", "k": 4, "tail": "renormalise"}]
)
def test_every_codec_through_the_disk(tmp_path, codec):
    script.record(tmp_path / "r", parts=script.parts(1, 20, codec), identity={"codec": codec})
    record = Record.open(tmp_path / "r")
    part = record.parts["train"]
    np.testing.assert_array_equal(part.read(["logits"], part.ids, np.zeros(20))["logits"], expected(part, "logits", part.ids, np.zeros(20)))
    errors = record.summary()["parts"]["train"]["errors"]["logits"]
    assert ("kl_outcomes_mean" in errors) == codec["name"].startswith("topk")
    assert (errors["kl_mean"] is None) == ("tail" in codec)
    if codec["name"] == "full":
        assert errors["kl_max"] == 0


def test_summary_and_public_facts(folder):
    record = Record.open(folder)
    summary = record.summary()
    assert record.identity == script.IDENTITY
    assert record.about == {"made_by": "tests"}
    assert summary["rows"] == 157
    assert summary["bytes"] == sum(file.stat().st_size for file in folder.rglob("shards/*"))
    assert summary["parts"]["train"]["fields"]["logits"]["codec"] == codec_from(script.CODEC).spec()
    assert sorted(file.name for file in folder.iterdir()) == ["index.json", "manifest.json", "test", "train"]
    assert len(list(folder.glob("train/shards/*"))) == 3 * 4


@pytest.mark.parametrize(
    ("ids", "views", "names", "words"),
    [
        ([1, 2], [0, 0], ["logits"], "sample 2 is not"),
        ([1, -4], [0, 0], ["logits"], "sample -4 is not"),
        ([1, 10**15], [0, 0], ["logits"], "sample 1000000000000000 is not"),
        ([1, 4], [0, 3], ["logits"], "view 3 is not"),
        ([1, 4], [0, -1], ["logits"], "view -1 is not"),
        ([1, 4], [0], ["logits"], "one length"),
        ([1], [0], ["logit"], "logits"),
    ],
)
def test_wrong_questions(folder, ids, views, names, words):
    with pytest.raises(InputError, match=words):
        Record.open(folder).parts["train"].read(names, ids, views)


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_damaged_shard_is_named_before_anything_is_returned(copy):
    shard = copy / "train/shards/00001-00002.arrow"
    flip(shard)
    record = Record.open(copy)
    part = record.parts["train"]
    part.read(["logits"], part.ids, np.zeros(50))
    with pytest.raises(InputError, match=r"00001-00002\.arrow.*damaged"):
        part.read(["flip"], part.ids, np.ones(50))
    with pytest.raises(InputError, match=r"00001-00002\.arrow.*damaged"):
        record.verify()
    shard.unlink()
    with pytest.raises(InputError, match=r"00001-00002\.arrow.*missing"):
        record.verify()


@pytest.mark.parametrize("name", ["manifest.json", "index.json", "train/samples.arrow"])
def test_other_damaged_files_are_named_on_opening(copy, name):
    flip(copy / name)
    with pytest.raises(InputError, match=rf"{name}.*damaged"):
        Record.open(copy)


def test_every_byte_of_the_json_files_counts(copy):
    for name in ("manifest.json", "index.json"):
        whole = (copy / name).read_bytes()
        for place in range(0, len(whole), 37):
            (copy / name).write_bytes(whole[:place] + bytes([whole[place] ^ 2]) + whole[place + 1 :])
            with pytest.raises(InputError):
                Record.open(copy)
        (copy / name).write_bytes(whole)
    Record.open(copy).verify()


def test_no_record_unfinished_and_other_formats(copy, tmp_path):
    with pytest.raises(InputError, match="no record here"):
        Record.open(tmp_path / "nothing")
    with pytest.raises(InputError, match="empty"):
        Record.open("")
    (copy / "index.json").rename(tmp_path / "index.json")
    with pytest.raises(InputError, match=r"not finished.*limbeck record"):
        Record.open(copy)
    (copy / "manifest.json").write_text(json.dumps({**json.loads((copy / "manifest.json").read_text()), "format": 2}))
    with pytest.raises(InputError, match="format 2"):
        Record.open(copy)
    (copy / "manifest.json").write_text("[]")
    with pytest.raises(InputError, match="damaged"):
        Record.open(copy)


def first_logit(record):
    return float(record.parts["train"].read(["logits"], [4], [2])["logits"][0, 0, 0])


def test_pickled_forked_and_spawned(folder):
    record = Record.open(folder)
    value = first_logit(record)
    assert first_logit(pickle.loads(pickle.dumps(record))) == value
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(2) as pool:
            assert pool.map(first_logit, [record] * 4) == [value] * 4
    assert first_logit(record) == value


def test_a_record_that_changed_after_pickling_is_refused(copy):
    pickled = pickle.dumps(Record.open(copy))
    script.record(copy, views=4)
    with pytest.raises(InputError, match="changed"):
        first_logit(pickle.loads(pickled))


@pytest.mark.parametrize(
    ("path", "value", "shown"),
    [
        ("teacher.weights", "c" * 64, "cccccccccccc…"),
        ("data.content", "d" * 64, "dddddddddddd…"),
        ("views.seed", 1, "this run has 1"),
        ("views.scale", [0.5, 1.0], "0.5"),
        ("tokenizer", {"name": "bpe"}, "bpe"),
        ("codec.k", 4, "this run has 4"),
    ],
)
def test_differences_of_identity_are_named(folder, path, value, shown):
    wanted = json.loads(json.dumps(script.IDENTITY))
    *above, last = path.split(".")
    place = wanted
    for key in above:
        place = place[key]
    place[last] = value
    with pytest.raises(InputError, match=shown) as caught:
        check_identity(script.IDENTITY, wanted)
    assert caught.value.where == path
    assert "aaaaaaaaaaaaa" not in str(caught.value)
    for refuse in (
        lambda: script.writer(folder, identity=wanted),
        lambda: Record.open(folder).check({above[0] if above else last: wanted[(above or [last])[0]]}),
    ):
        with pytest.raises(InputError) as caught:
            refuse()
        assert caught.value.where == f"{folder}.{path}"


def test_identity_whole_and_in_parts():
    check_identity(script.IDENTITY, {**script.IDENTITY, "views": {**script.IDENTITY["views"], "scale": (0.08, 1.0)}})
    check_identity(script.IDENTITY, {"data": script.IDENTITY["data"]}, partial=True)
    for wanted, options, path in [
        ({"data": script.IDENTITY["data"]}, {}, "teacher"),
        ({"data": {"name": "images"}}, {"partial": True}, "data.content"),
        ({"loader": 1}, {"partial": True}, "loader"),
        ({**script.IDENTITY, "views": {**script.IDENTITY["views"], "seed": False}}, {}, "views.seed"),
    ]:
        with pytest.raises(InputError) as caught:
            check_identity(script.IDENTITY, wanted, **options)
        assert caught.value.where == path


def test_wrong_parts_and_fields():
    score = Field.score("x")
    for make in (
        lambda: Part(np.array([1, 1]), 1, (score,)),
        lambda: Part(np.array([]), 1, (score,)),
        lambda: Part(np.array([1.5]), 1, (score,)),
        lambda: Part(np.array([1]), 0, (score,)),
        lambda: Part(np.array([1]), 1, ()),
        lambda: Part(np.array([1]), 1, (score, score)),
        lambda: Field("../x"),
        lambda: Field("x", (0,)),
        lambda: Field("x", (), "int64"),
        lambda: Field("logits", (1, 10)),
        lambda: Field.logits(codec_from({"name": "topk", "k": 11}), 10),
    ):
        with pytest.raises(InputError):
            make()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda given: given.pop("flip"), "flip"),
        (lambda given: given.update(more=given["flip"]), "more"),
        (lambda given: given.update(logits=given["logits"][:, :1]), "shape"),
        (lambda given: given["logits"].__setitem__((2, 1, 3), np.nan), "sample 7 .*finite"),
        (lambda given: given["logits"].__setitem__((0, 1, 3), np.inf), "sample 1 .*finite"),
        (lambda given: given["features/pool"].__setitem__((1, 1, 1), 1e6), "sample 4 .*float16"),
    ],
)
def test_wrong_values_are_refused_and_nothing_is_written(tmp_path, change, words):
    one = script.writer(tmp_path / "r")
    task = next(one.pending())
    given = script.values(one.parts["train"].fields, task.ids, 0)
    change(given)
    with pytest.raises(InputError, match=words):
        one.write(task, given)
    assert not list(tmp_path.rglob("shards/*"))


def test_wrong_writers(tmp_path):
    for changes in ({"shard_rows": 0}, {"rank": 2, "world": 2}, {"parts": {}}, {"parts": {"a/b": script.parts()["test"]}}, {"identity": {"x": float("nan")}}):
        with pytest.raises(InputError):
            script.writer(tmp_path / "r", **changes)
    assert RecordWriter(tmp_path / "r", identity={}, about={}, parts=script.parts()).progress == (0, 4)
