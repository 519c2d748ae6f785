"""Recording a teacher and training from the record: the same student as live, and refusals that name the field."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import limbeck
from limbeck.contract import Batch
from limbeck.data import ArrayData, AugmentSpec, ViewSpec, subset
from limbeck.errors import InputError
from limbeck.recipe import Recipe, RecordRecipe
from limbeck.records import Record
from limbeck.teachers.recorded import RecordTeacher

DATA = {"source": {"name": "digits"}, "augment": {"noise": 0.05}, "views": {"count": 3}}
TEACHER = {"model": {"name": "mlp", "hidden": [32]}, "train": {"epochs": 2, "batch_size": 64, "optimiser": {"lr": 0.05}}}
RECORD = {"name": "digits", "teacher": TEACHER, "data": DATA, "record": {"scores": ["confidence", "el2n"], "shard_rows": 500}}


def student_recipe(teacher: object, **changes: object) -> Recipe:
    train = {"epochs": 5, "batch_size": 64, "optimiser": {"lr": 0.05}, "log_every": 1}
    base = {"name": "run", "method": "kd", "teacher": teacher, "student": {"model": {"name": "mlp", "hidden": [8]}}, "data": DATA, "train": train}
    return Recipe.parse({**base, "compare": {"alone": False}, "evaluate": {"latency": False}, "threads": 1, **changes})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records") / "digits"
    limbeck.record(RecordRecipe.parse(RECORD), output=folder)
    return folder


def losses(folder: Path) -> torch.Tensor:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([row["student/loss"] for row in rows if "student/loss" in row])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_student_of_the_record_is_the_student_of_the_live_teacher(made: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    live = limbeck.distill(student_recipe(TEACHER), run=tmp_path / "live")

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr("limbeck.teachers.module.ModuleTeacher.__init__", never)
    recipe = student_recipe({"record": str(made)}, train={"epochs": 5, "batch_size": 64, "optimiser": {"lr": 0.05}, "log_every": 1, "workers": workers})
    replayed = limbeck.distill(recipe, run=tmp_path / "replayed")
    assert torch.allclose(losses(tmp_path / "live"), losses(tmp_path / "replayed"), rtol=1e-4, atol=1e-4)
    assert replayed.metrics["accuracy"] == pytest.approx(live.metrics["accuracy"], abs=0.005)
    assert replayed.metrics["agreement"] == pytest.approx(live.metrics["agreement"], abs=0.01)  # the test data were recorded too
    teacher = replayed.summary.arm("teacher")
    assert teacher is not None
    assert teacher.parameters == 64 * 32 + 32 + 320 + 10  # as recorded


def test_objects_are_distilled_from_a_record(tmp_path: Path) -> None:
    inputs = torch.randn(60, 4)
    data = TensorDataset(inputs, (inputs[:, 0] > 0).long())
    teacher, views, noise = nn.Linear(4, 2), ViewSpec(count=2), AugmentSpec(noise=0.1)
    record = limbeck.record(teacher=teacher, data=(data, data), views=views, augment=noise, output=tmp_path / "r")
    torch.manual_seed(0)
    students = [nn.Linear(4, 2) for _ in range(2)]
    students[1].load_state_dict(students[0].state_dict())
    for student, source in zip(students, (teacher, record), strict=True):
        limbeck.distill(teacher=source, student=student, data=(data, data), views=views, augment=noise, train={"epochs": 3, "batch_size": 16})
    assert torch.allclose(students[0].weight, students[1].weight, atol=1e-5)
    with pytest.raises(InputError, match="names none"):
        limbeck.distill(teacher=record, student=students[0], data=(data, data), augment=noise, train={"epochs": 1})


def test_boxes_are_stored_and_shown_again(tmp_path: Path) -> None:
    images = ArrayData(torch.randint(0, 256, (30, 3, 8, 8), dtype=torch.uint8), torch.arange(30) % 3, list("abc"))
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    views = ViewSpec(kind="boxes", count=4)
    record = limbeck.record(teacher=network, data=(images, images), views=views, output=tmp_path / "r", settings={"test": False, "shard_rows": 7})
    part = subset(images, torch.tensor([7, 3, 20]))
    teacher = RecordTeacher(record, part)
    from limbeck.data import Views

    shown = Views(views, AugmentSpec(), part, teacher)
    ids, chosen = torch.tensor([2, 0]), torch.tensor([[1, 3], [0, 2]])
    batch = shown.batch(ids, chosen)
    again = Views(views, AugmentSpec(), images).batch(torch.tensor([20, 7]), chosen)
    assert torch.equal(batch.inputs, again.inputs)
    with torch.no_grad():
        assert torch.allclose(teacher.logits(batch), network(part.prepare(batch.inputs)), atol=1e-5)
    assert teacher.all_logits(Batch(batch.inputs, None, batch.ids, batch.views)).shape == (1, 4, 3)  # looked up where the batch does not carry it


def test_members_features_and_ensembles(tmp_path: Path) -> None:
    inputs = torch.randn(20, 4)
    data = TensorDataset(inputs, torch.arange(20) % 2)
    nets = [nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)) for _ in range(3)]
    both = limbeck.record(teacher=nets, data=(data, data), output=tmp_path / "members", settings={"members": True})
    as_one = limbeck.record(teacher=nets, data=(data, data), output=tmp_path / "one")
    batch = Batch(inputs, None, torch.arange(20))
    assert RecordTeacher(both).all_logits(batch).shape == (3, 20, 2)
    wanted = torch.stack([net(inputs).softmax(-1) for net in nets]).mean(0).log()
    for record in (both, as_one):
        assert torch.allclose(RecordTeacher(record).logits(batch).log_softmax(-1), wanted, atol=1e-5)
    tapped = limbeck.record(teacher=nets[0], data=(data, data), output=tmp_path / "taps", settings={"features": ["0"], "scores": ["entropy"]})
    found = RecordTeacher(tapped).lookup(torch.tensor([4, 2]), torch.zeros(2, dtype=torch.int64))
    assert torch.allclose(found["features/0"], nets[0][0](inputs[[4, 2]]), atol=1e-2)
    assert found["scores/entropy"].shape == (2,)
    with pytest.raises(InputError, match=r"record\.features"):
        limbeck.record(teacher=nets, data=(data, data), output=tmp_path / "no", settings={"features": ["0"]})


UNTRAINED = {**RECORD, "teacher": {"model": TEACHER["model"]}}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records") / "untrained"
    limbeck.record(RecordRecipe.parse(UNTRAINED), output=folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"teacher": {"model": TEACHER["model"], "seed": 1}}, "teacher.fingerprint"),
        ({"data": {**DATA, "source": {"name": "digits", "seed": 1}}}, "data.fingerprint"),
        ({"data": {**DATA, "augment": {"noise": 0.1}}}, "views.augment.noise"),
        ({"data": {**DATA, "views": {"count": 3, "seed": 5}}}, "views.seed"),
        ({"data": {**DATA, "views": {"count": 2}}}, "views"),
        ({"record": {**RECORD["record"], "codec": "half"}}, "codec.name"),
        ({"record": {**RECORD["record"], "tokenizer": "abc"}}, "tokenizer"),
        ({"record": {**RECORD["record"], "scores": ["el2n"]}}, "contents.scores"),
    ],
)
def test_recording_something_else_into_the_same_folder_is_refused(plain: Path, change: dict[str, object], field: str) -> None:
    before = contents(plain)
    with pytest.raises(InputError) as refused:
        limbeck.record(RecordRecipe.parse({**UNTRAINED, **change}), output=plain)
    assert refused.value.where.endswith(field)
    assert contents(plain) == before


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"data": {**DATA, "augment": {"noise": 0.1}}}, "views.augment.noise"),
        ({"data": {**DATA, "views": {"count": 4}}}, "data.views.count"),
        ({"data": {"source": {"name": "digits"}, "augment": {"noise": 0.05}}}, "data.views.count"),
        ({"data": {**DATA, "source": {"name": "digits", "seed": 3}}}, "data.fingerprint"),
        ({"teacher": {"record": "RECORD", "fingerprint": "0000"}}, "teacher.fingerprint"),
        ({"teacher": {"record": "nowhere"}}, "teacher.record (nowhere)"),
    ],
)
def test_a_recipe_that_the_record_does_not_belong_to_is_refused(plain: Path, tmp_path: Path, change: dict[str, object], field: str) -> None:
    if change.get("teacher", {}).get("record") == "RECORD":  # type: ignore[attr-defined]
        change = {"teacher": {**change["teacher"], "record": str(plain)}}  # type: ignore[dict-item]
    recipe = student_recipe(change.pop("teacher", {"record": str(plain)}), **change)
    with pytest.raises(InputError) as refused:
        limbeck.distill(recipe, run=tmp_path / "run")
    assert refused.value.where == field
    assert not (tmp_path / "run").exists()


def test_a_subset_trains_from_the_whole_record_and_more_than_it_is_refused(plain: Path, tmp_path: Path) -> None:
    some = {**DATA, "train_size": 200}
    limbeck.distill(student_recipe({"record": str(plain)}, data=some, train={"epochs": 1, "batch_size": 64}), run=tmp_path / "part")
    limbeck.record(RecordRecipe.parse({**UNTRAINED, "data": some}), output=tmp_path / "some")
    with pytest.raises(InputError, match="are not in the record"):
        limbeck.distill(student_recipe({"record": str(tmp_path / "some")}), run=tmp_path / "run")


def test_more_views_extend_a_record_to_the_bytes_of_a_longer_one(plain: Path, tmp_path: Path) -> None:
    more = {**UNTRAINED, "data": {**DATA, "views": {"count": 5}}}
    limbeck.record(RecordRecipe.parse({**UNTRAINED, "record": {**RECORD["record"], "workers": 2}}), output=tmp_path / "a")  # whatever the workers
    assert contents(tmp_path / "a") == contents(plain)
    limbeck.record(RecordRecipe.parse(more), output=tmp_path / "a")
    limbeck.record(RecordRecipe.parse(more), output=tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_flipped_byte_stops_training_before_a_batch_is_made(plain: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(plain, tmp_path / "damaged")
    shard = sorted((tmp_path / "damaged" / "train" / "shards").iterdir())[1]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(InputError, match=shard.name):
        limbeck.distill(student_recipe({"record": str(tmp_path / "damaged")}), run=tmp_path / "run")
    with pytest.raises(InputError, match=shard.name):
        Record.open(tmp_path / "damaged").verify()
    sorted((tmp_path / "damaged" / "train" / "shards").iterdir())[0].unlink()
    limbeck.record(RecordRecipe.parse(UNTRAINED), output=tmp_path / "damaged")  # records what is damaged or missing again
    assert contents(tmp_path / "damaged") == contents(plain)


def test_a_record_is_made_where_the_recipe_says_how(tmp_path: Path) -> None:
    import yaml

    (tmp_path / "record.yaml").write_text(yaml.safe_dump({**RECORD, "teacher": {"model": TEACHER["model"]}}))
    teacher = {"record": str(tmp_path / "made"), "make": str(tmp_path / "record.yaml")}
    limbeck.distill(student_recipe(teacher, train={"steps": 3, "batch_size": 64}), run=tmp_path / "run")
    assert (tmp_path / "made" / "index.json").exists()


@pytest.mark.slow
def test_killed_at_random_moments_and_recorded_again_it_is_the_same_record(tmp_path: Path) -> None:
    """The command itself, with a real teacher; tests/records kills the writer alone, twenty times."""
    import random

    import yaml

    recipe = {**UNTRAINED, "data": {**DATA, "views": {"count": 40}}, "record": {"shard_rows": 300, "batch_size": 16}, "threads": 1}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "limbeck", "record", str(tmp_path / "r.yaml"), "-q", "-o"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    subprocess.run([*command, str(tmp_path / "whole")], check=True, env=environment, capture_output=True)
    whole = time.monotonic() - began
    draw = random.Random(0)
    for _ in range(4):
        process = subprocess.Popen([*command, str(tmp_path / "killed")], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(draw.uniform(0.5, 1.0) * whole)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run([*command, str(tmp_path / "killed")], check=True, env=environment, capture_output=True)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_make_the_record_of_one(tmp_path: Path) -> None:
    import yaml

    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**UNTRAINED, "threads": 1}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    one = [sys.executable, "-m", "limbeck", "record", str(tmp_path / "r.yaml"), "-q", "-o", str(tmp_path / "one")]
    subprocess.run(one, check=True, env=environment, capture_output=True)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *one[1:-1], str(tmp_path / "two")]
    done = subprocess.run(launch, check=False, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ({}, "a network or a record"),
        ({"record": "x", "weights": "y"}, "neither 'weights' nor 'train'"),
        ({"record": "x", "model": "mlp"}, "a network or a record"),
        ({"model": "mlp", "make": "x"}, "belong to a 'record'"),
        ([{"record": "x"}, {"model": "mlp"}], "stands alone"),
    ],
)
def test_what_a_teacher_section_may_say(teacher: object, said: str) -> None:
    with pytest.raises(InputError, match=said):
        student_recipe(teacher)


def test_views_and_what_goes_with_them() -> None:
    with pytest.raises(InputError, match="cannot be mixed"):
        student_recipe(TEACHER, data={**DATA, "augment": {"mixup": 0.2}})
    with pytest.raises(InputError, match="give 'teacher' a 'model'"):
        RecordRecipe.parse({**RECORD, "teacher": {"record": "x"}})


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"record": {"codec": "zip"}}, "record.codec.name"),
        ({"record": {"codec": {"name": "topk", "k": 50}}}, "record.codec.k"),
        ({"record": {"codec": {"name": "topk", "q": 5}}}, "record.codec.q"),
        ({"record": {"scores": ["hardness"]}}, "record.scores"),
        ({"data": {"source": {"name": "nothing"}}}, "data.source.name"),
        ({"teacher": {"model": {"target": "torch.nn:Linear", "args": {"in_features": 3, "out_features": 10}}}}, "teacher.model"),
        ({"data": {"source": {"name": "digits"}, "train_size": 10**6}}, "data.train_size"),
    ],
)
def test_a_wrong_record_recipe_leaves_nothing_behind(tmp_path: Path, change: dict[str, object], where: str) -> None:
    with pytest.raises(InputError) as refused:
        limbeck.record(RecordRecipe.parse({**RECORD, **change}), output=tmp_path / "r")
    assert refused.value.where == where
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_that_cannot_take_the_data_is_told(tmp_path: Path) -> None:
    data = TensorDataset(torch.randn(5, 4), torch.zeros(5, dtype=torch.int64))
    with pytest.raises(InputError, match="cannot take the data's inputs"):
        limbeck.record(teacher=nn.Linear(3, 2), data=(data, data), output=tmp_path / "r")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_told() -> None:
    with pytest.raises(InputError, match="cannot be made there"):
        limbeck.record(RecordRecipe.parse(UNTRAINED), output="/proc/nowhere/r")
