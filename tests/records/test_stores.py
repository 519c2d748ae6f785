"""Records in memory:// and on an S3-compatible server have the bytes of local ones and read alike."""

import os
import pickle
import socket
import uuid

import fsspec
import numpy as np
import pytest
import record_script as script

from limbeck.errors import InputError, MissingExtra
from limbeck.records import Record


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    path = tmp_path_factory.mktemp("local") / "r"
    script.record(path)
    return path


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    one = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    one.start()
    names = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket"
    one.stop()


@pytest.fixture(params=["memory", "s3"])
def url(request):
    base = "memory://records" if request.param == "memory" else request.getfixturevalue("server")
    return f"{base}/{uuid.uuid4().hex}"


def content(url):
    system, root = fsspec.core.url_to_fs(str(url))
    system.invalidate_cache()
    return {path[len(root) :].lstrip("/"): system.cat_file(path) for path in system.find(root)}


def test_remote_and_local_are_alike(url, local, tmp_path):
    script.record(url)
    assert content(url) == content(local)
    record, beside = Record.open(url), Record.open(local)
    record.verify()
    part, other = record.parts["train"], beside.parts["train"]
    views = np.arange(50) % 3
    found, want = part.read(list(part.fields), part.ids, views), other.read(list(part.fields), part.ids, views)
    assert all((found[name] == want[name]).all() for name in want)
    cached = Record.open(url, cache=tmp_path / "cache")
    again = pickle.loads(pickle.dumps(cached)).parts["train"].read(["logits"], part.ids, views)
    assert (again["logits"] == want["logits"]).all()
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 11 + 2  # the shards touched (of the last, two views), both lists of samples
    assert {key: value for key, value in record.summary().items() if key != "url"} == {k: v for k, v in beside.summary().items() if k != "url"}


def test_remote_resume_and_extension(url, local):
    one = script.writer(url, views=2)
    for task in list(one.pending())[::2]:
        one.write(task, script.values(one.parts[task.part].fields, task.ids, task.view))
    with pytest.raises(InputError, match="not finished"):
        Record.open(url)
    script.record(url, views=2)
    script.record(url, views=3)
    assert content(url) == content(local)


def test_remote_damage_is_noticed_on_arrival(url):
    script.record(url)
    system, root = fsspec.core.url_to_fs(url)
    name = f"{root}/train/shards/00000-00001.arrow"
    damaged = bytearray(system.cat_file(name))
    damaged[500] ^= 1
    system.pipe_file(name, bytes(damaged))
    part = Record.open(url).parts["train"]
    with pytest.raises(InputError, match=r"00000-00001\.arrow.*damaged"):
        part.read(["logits"], part.ids, np.zeros(50))
    system.rm_file(name)
    with pytest.raises(InputError, match=r"00000-00001\.arrow.*missing"):
        part.read(["logits"], part.ids, np.zeros(50))


def test_a_damaged_cached_file_is_fetched_again(url, tmp_path):
    script.record(url)
    Record.open(url, cache=tmp_path).verify()
    for file in tmp_path.glob("*.arrow"):
        file.write_bytes(b"x" * file.stat().st_size)
    Record.open(url, cache=tmp_path).verify()
    assert not list(tmp_path.glob(".*"))


def test_the_temporary_cache_goes_with_the_record():
    script.record("memory://gone/r")
    record = Record.open("memory://gone/r")
    folder = record._load().temporary
    assert os.path.isdir(folder)
    del record
    import gc

    gc.collect()
    assert not os.path.isdir(folder)


def test_no_such_bucket_and_nothing_there(server):
    with pytest.raises(InputError, match="nowhere"):
        script.writer("s3://nowhere-at-all/r")
    with pytest.raises(InputError, match="no record here"):
        Record.open(f"{server}/empty")


def test_wrong_addresses(monkeypatch):
    with pytest.raises(InputError, match="ftpx"):
        Record.open("ftpx://a/b")

    def missing(*arguments, **options):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(MissingExtra, match="s3fs"):
        Record.open("s3://bucket/r")
    with pytest.raises(InputError, match="gcsfs"):
        Record.open("gs://bucket/r")


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        script.writer(tmp_path / "file" / "r")
