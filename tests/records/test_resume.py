"""A recording that is cut off at any moment, shared by processes or extended ends in the same bytes."""

import contextlib
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import record_script as script

from limbeck.errors import InputError
from limbeck.records import Record

KILLS = 20


def content(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "r"
    script.record(path)
    return content(path)


def test_the_same_bytes_again(whole, tmp_path):
    script.record(tmp_path / "r")
    assert content(tmp_path / "r") == whole


def test_an_exception_after_each_shard(whole, tmp_path):
    for done in range(30):
        one = script.writer(tmp_path / "r")
        assert one.progress == (done, 13)
        assert not one.complete
        task = next(one.pending(), None)
        if task is None:
            break
        if done:
            with pytest.raises(InputError, match="not recorded yet"):
                one.finish()
        one.write(task, script.values(one.parts[task.part].fields, task.ids, task.view))
    one.finish()
    assert one.complete
    assert not list(script.writer(tmp_path / "r").pending())
    assert content(tmp_path / "r") == whole


def start(url):
    process = subprocess.Popen([sys.executable, str(Path(script.__file__)), str(url), "3", "0.002"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return process, process.stdout.readline()


def test_sigkill_at_random_moments(whole, tmp_path):
    chance, cut = random.Random(0), 0
    began = time.monotonic()
    process, _ = start(tmp_path / "timed")
    opened = time.monotonic()
    process.wait()
    length = time.monotonic() - opened
    assert time.monotonic() - began < 60
    for number in range(KILLS):
        folder = tmp_path / str(number)
        process, line = start(folder)
        assert line == "open\n", process.stderr.read()
        time.sleep(chance.random() * length)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        finished = (folder / "index.json").exists()
        cut += not finished
        if not finished:
            with pytest.raises(InputError, match="not finished"):
                Record.open(folder)
        script.record(folder)
        assert content(folder) == whole
    assert cut >= KILLS // 4


def test_leftovers_are_removed_and_whole_shards_kept(whole, tmp_path):
    one = script.writer(tmp_path / "r")
    for task in list(one.pending())[:5]:
        one.write(task, script.values(one.parts[task.part].fields, task.ids, task.view))
    before = {name: (tmp_path / "r" / name).stat().st_mtime_ns for name in content(tmp_path / "r") if name.endswith("arrow") and "shards" in name}
    assert len(before) == 5
    for name in (
        "train/shards/.00001-00003.arrow.99.tmp",
        "train/shards/.00000-00000.json.99.tmp",
        "train/.samples.arrow.9.tmp",
        ".manifest.json.1.tmp",
        ".index.json.12.tmp",
    ):
        (tmp_path / "r" / name).write_bytes(b"half")
    script.record(tmp_path / "r")
    assert content(tmp_path / "r") == whole
    assert {name: (tmp_path / "r" / name).stat().st_mtime_ns for name in before} == before


@pytest.mark.parametrize("name", ["train/shards/00000-00001.arrow", "train/shards/00000-00001.json", "train/samples.arrow"])
def test_what_was_damaged_while_recording_is_recorded_again(whole, tmp_path, name):
    one = script.writer(tmp_path / "r")
    script.work(one)
    file = tmp_path / "r" / name
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    script.record(tmp_path / "r")
    assert content(tmp_path / "r") == whole


def test_a_damaged_shard_of_a_finished_record_is_recorded_again(whole, tmp_path):
    script.record(tmp_path / "r")
    file = tmp_path / "r/train/shards/00002-00000.arrow"
    file.write_bytes(file.read_bytes()[:-3])
    assert [task.file for task in script.writer(tmp_path / "r").pending()] == ["train/shards/00002-00000.arrow"]
    script.record(tmp_path / "r")
    assert content(tmp_path / "r") == whole


@pytest.mark.parametrize("world", [2, 3])
def test_several_writers_give_the_bytes_of_one(whole, tmp_path, world):
    writers = [script.writer(tmp_path / "r", rank=rank, world=world) for rank in reversed(range(world))]
    tasks = [[task.file for task in one.pending()] for one in writers]
    assert sorted(file for files in tasks for file in files) == sorted(name for name in whole if "shards" in name)
    assert max(map(len, tasks)) - min(map(len, tasks)) <= 1
    for one in writers:
        script.work(one)
    for one in writers:
        one.finish()
    assert content(tmp_path / "r") == whole
    assert not list(script.writer(tmp_path / "r", rank=0, world=5).pending())


def test_another_ranks_temporary_file_is_left_alone(tmp_path):
    script.writer(tmp_path / "r")
    (tmp_path / "r/train/shards").mkdir(exist_ok=True)
    theirs = tmp_path / "r/train/shards/.00000-00000.arrow.99.tmp"
    theirs.write_bytes(b"being written")
    script.writer(tmp_path / "r", rank=1, world=2)
    assert theirs.exists()
    script.writer(tmp_path / "r", rank=0, world=2)
    assert not theirs.exists()


def test_more_views_later_are_more_views_at_once(whole, tmp_path):
    for views in (1, 2, 3):
        script.record(tmp_path / "r", views=views)
    assert content(tmp_path / "r") == whole
    with pytest.raises(InputError, match="3 views, this run wants 2") as caught:
        script.writer(tmp_path / "r", views=2)
    assert caught.value.where.endswith(".parts.train.views")
    assert content(tmp_path / "r") == whole


def test_an_extension_that_is_cut_off_goes_on(whole, tmp_path):
    script.record(tmp_path / "r", views=2)
    one = script.writer(tmp_path / "r", views=3)
    assert not one.complete
    with pytest.raises(InputError, match="not finished"):
        Record.open(tmp_path / "r")
    first, *others = one.pending()
    assert {task.view for task in (first, *others)} == {2}
    one.write(first, script.values(one.parts[first.part].fields, first.ids, first.view))
    assert [task.file for task in script.writer(tmp_path / "r", views=3).pending()] == [task.file for task in others]
    script.record(tmp_path / "r", views=3)
    assert content(tmp_path / "r") == whole


def test_an_extension_killed_between_any_two_writes(whole, tmp_path, monkeypatch):
    from limbeck.records.stores import LocalStore

    class Killed(BaseException):
        pass

    for stop in (0, 4, 8, 9, 10, 11, 12, 13, 18, 19, 20, 21, 27, 33):  # in sidecars, at the index and the manifest, in shards, in the clean-up
        folder, left = tmp_path / str(stop), [stop]
        script.record(folder, views=2)

        def counted(method, left=left):
            def call(self, *arguments):
                if not left[0]:
                    raise Killed
                left[0] -= 1
                return method(self, *arguments)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(LocalStore, "write", counted(LocalStore.write))
            patch.setattr(LocalStore, "delete", counted(LocalStore.delete))
            with contextlib.suppress(Killed):
                script.record(folder, views=3)
        script.record(folder, views=3)
        assert content(folder) == whole


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"parts": script.parts(3, 51)}, "parts.train.samples"),
        ({"parts": script.parts(3, 50, {"name": "topk", "k": 4})}, "parts.train.fields.logits.codec.k"),
        ({"parts": {"train": script.parts()["train"]}}, "parts.test"),
        ({"shard_rows": 32}, "shard_rows"),
    ],
)
def test_a_resumed_recording_must_be_the_same(tmp_path, changes, path):
    script.writer(tmp_path / "r")
    with pytest.raises(InputError) as caught:
        script.writer(tmp_path / "r", **changes)
    assert caught.value.where == f"{tmp_path / 'r'}.{path}"


def test_other_ids_are_refused(tmp_path):
    script.writer(tmp_path / "r")
    other = script.parts()
    other["train"] = type(other["train"])(np.roll(other["train"].ids, 1), 3, other["train"].fields)
    with pytest.raises(InputError, match="ids_sha256"):
        script.writer(tmp_path / "r", parts=other)
