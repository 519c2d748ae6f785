"""Records of language models, and of test data: what they are taken for, when their teacher is asked, and what is refused before it is made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import limbeck
from limbeck import data as datasets
from limbeck.errors import InputError
from limbeck.language.decoder import decoder
from limbeck.language.manual import python_manual
from limbeck.language.sources import ModelSource
from limbeck.recipe import RecordRecipe
from limbeck.records import Record
from limbeck.teachers.recorded import RecordTeacher, TokenRecordTeacher

TEXT = {"source": {"name": "python_manual", "tokenizer": "bytes", "length": 16}, "train_size": 40, "test_size": 12}
COMPACT = {"codec": {"name": "compact", "k": 6}, "prior_rows": 256, "batch_size": 8, "shard_rows": 16}


def record_recipe(**changes: Any) -> RecordRecipe:
    teacher = {"model": {"name": "decoder", "layers": 1, "width": 8, "heads": 1}}
    return RecordRecipe.parse({"name": "kept", "teacher": teacher, "data": TEXT, "record": COMPACT, "threads": 1, "device": "cpu"} | changes)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every question that a language model was asked as a teacher."""
    rows, get = [], ModelSource.get

    def counted(self: ModelSource, tokens: Any) -> Any:
        rows.append(len(tokens.input_ids))
        return get(self, tokens)

    monkeypatch.setattr(ModelSource, "get", counted)
    return rows


def text(length: int = 16) -> tuple[Any, Any]:
    """Training and test text, 12 rows each."""
    found = python_manual(tokenizer="bytes", length=length)
    return tuple(datasets.subset(part, torch.arange(12)) for part in (found.train, found.test))  # type: ignore[return-value]


def test_a_finished_record_does_not_ask_its_teacher_again(tmp_path: Path, asked: list[int]) -> None:
    limbeck.record(record_recipe(), output=tmp_path / "r")
    assert sum(asked) == 40 + 12 + 16  # all rows, and the prior's 256 positions
    asked.clear()
    limbeck.record(record_recipe(), output=tmp_path / "r")
    assert asked == []
    shard = tmp_path / "r" / "train" / "shards" / "00000-00001.arrow"
    whole = shard.read_bytes()
    shard.unlink()
    limbeck.record(record_recipe(), output=tmp_path / "r")
    assert sum(asked) == 16
    assert shard.read_bytes() == whole


@pytest.mark.parametrize(
    ("changes", "where"),
    [({"record": COMPACT | {"codec": {"name": "compact", "k": 7}}}, "codec.k"), ({"seed": 1, "teacher": None}, "teacher.fingerprint")],
)
def test_another_record_is_refused_before_a_prior_is_fitted(tmp_path: Path, asked: list[int], changes: dict[str, Any], where: str) -> None:
    limbeck.record(record_recipe(), output=tmp_path / "r")
    asked.clear()
    if "teacher" in changes:
        changes = changes | {"teacher": {"model": {"name": "decoder", "layers": 1, "width": 8, "heads": 1}, "seed": None}}
    with pytest.raises(InputError) as told:
        limbeck.record(record_recipe(**changes), output=tmp_path / "r")
    assert told.value.where == f"{tmp_path / 'r'}.{where}"
    assert asked == []


@pytest.mark.slow
def test_two_processes_make_the_compact_record_of_one(tmp_path: Path) -> None:
    """One prior for all shards, though the second process, were it asked, would fit another."""
    import yaml

    (tmp_path / "r.yaml").write_text(yaml.safe_dump(record_recipe().model_dump(mode="json", exclude_defaults=True)))
    script = tmp_path / "shaken.py"
    script.write_text(
        "import os\nfrom limbeck.recording_tokens import TokenRecorder\nfit = TokenRecorder._fitted\n"
        "def shaken(self):\n"
        "    if os.environ.get('RANK', '0') != '0':\n"
        "        self.spec = self.spec.model_copy(update={'prior_rows': 64})\n"
        "    return fit(self)\n"
        "TokenRecorder._fitted = shaken\nimport sys, limbeck\nlimbeck.record(sys.argv[1], output=sys.argv[2])\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    rest = [str(script), str(tmp_path / "r.yaml")]
    for command in ([sys.executable], [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]):
        place = str(tmp_path / ("one" if len(command) == 1 else "two"))
        done = subprocess.run([*command, *rest, place], check=False, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    one, two = (
        {file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
        for folder in (tmp_path / "one", tmp_path / "two")
    )
    assert one == two
    assert any(name.endswith("00000-00001.arrow") for name in one)  # the second process wrote one


@pytest.mark.parametrize(
    ("codec", "where", "said"),
    [
        (None, "record.codec.name", "compact or plain_topk"),
        ({"name": "topk", "k": 5}, "record.codec.name", "compact or plain_topk"),
        ({"name": "compcat", "k": 5}, "record.codec.name", "compact or plain_topk"),
        ({"name": "compact"}, "record.codec.k", "needs 'k'"),
        ({"name": "compact", "k": 300}, "record.codec.k", "1 to 257"),
        ({"name": "plain_topk", "k": True}, "record.codec.k", "True"),
        ({"name": "plain_topk", "k": 5, "step": 0.1}, "record.codec.step", "no field"),
    ],
)
def test_a_wrong_codec_is_told_before_a_teacher_is_made(
    tmp_path: Path, codec: dict[str, Any] | None, where: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> nn.Module:
        raise AssertionError("a teacher was made")

    monkeypatch.setattr("limbeck.models.build_model", never)
    with pytest.raises(InputError) as told:
        limbeck.record(record_recipe(record={} if codec is None else {"codec": codec}), output=tmp_path / "r")
    assert told.value.where == where
    assert said in str(told.value)
    assert not list(tmp_path.iterdir())


def test_a_codec_of_another_vocabulary_than_the_teachers_is_refused(tmp_path: Path) -> None:
    teacher = decoder(257, (2, 16), layers=1, width=8, heads=1)
    with pytest.raises(InputError, match="vocabulary"):
        limbeck.record(teacher=teacher, data=text(), output=tmp_path / "r", settings={"codec": {"name": "plain_topk", "k": 4, "vocabulary": 300}})


def test_a_record_answers_for_the_test_text_that_it_was_made_of(tmp_path: Path) -> None:
    train, test = text()
    teacher = decoder(257, (2, 16), layers=1, width=8, heads=1)
    record = limbeck.record(teacher=teacher, data=(train, test), output=tmp_path / "r", settings={"codec": {"name": "plain_topk", "k": 4}})
    found = TokenRecordTeacher(record, train)
    assert found.vocabulary == 257
    part = found.of_test(datasets.subset(test, torch.tensor([3, 1])))
    assert part is not None
    assert part.vocabulary == 257
    assert found.of_test(train) is None  # samples of the same numbers, another text
    assert found.of_test(text(length=12)[1]) is None
    record.identity["data"].pop("test")
    assert found.of_test(test) is None
    alone = limbeck.record(teacher=teacher, data=train, output=tmp_path / "alone", settings={"codec": {"name": "plain_topk", "k": 4}})
    assert TokenRecordTeacher(alone, train).of_test(test) is None


def test_a_record_answers_for_the_test_images_that_it_was_made_of(tmp_path: Path) -> None:
    inputs = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
    data, other = (datasets.as_data(TensorDataset(x, (x[:, 0] > 0).long())) for x in (inputs, inputs + 1))
    teacher = nn.Linear(4, 2)
    found = RecordTeacher(limbeck.record(teacher=teacher, data=(data, data), output=tmp_path / "r"), data)
    logits = found.test_logits(data)
    assert logits is not None
    torch.testing.assert_close(logits.softmax(1), teacher(inputs).softmax(1), atol=1e-3, rtol=0)
    assert found.test_logits(other) is None


IMAGES = {"source": {"name": "digits"}, "train_size": 60, "test_size": 20, "views": {"count": 1}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished records of text ("text") and of images ("images"), to be looked at only."""
    folder = tmp_path_factory.mktemp("finished")
    limbeck.record(record_recipe(), output=folder / "text")
    limbeck.record(record_recipe(**OF_IMAGES), output=folder / "images")
    return folder


OF_IMAGES: dict[str, Any] = {"teacher": {"model": {"name": "mlp", "hidden": [4]}}, "data": IMAGES, "record": {"batch_size": 16}}


def ensured(folder: Path, url: Path, **changes: Any) -> None:
    """What a run does that names this record, with a recipe for it that was changed."""
    make = folder / "make.yaml"
    make.write_text(json.dumps(record_recipe(**changes).model_dump(mode="json", exclude_defaults=True)), encoding="utf-8")
    text_run = "data" not in changes or changes["data"]["source"]["name"] != "digits"
    student = {"name": "decoder", "layers": 1, "width": 8, "heads": 1} if text_run else {"name": "mlp", "hidden": [4]}
    run = {"name": "run", "method": "token_kd" if text_run else "kd", "teacher": {"record": str(url), "make": str(make)}, "student": {"model": student}}
    limbeck.recording.ensure(limbeck.Recipe.parse({**run, "data": TEXT if text_run else IMAGES, "train": {"steps": 1}}))


@pytest.mark.parametrize(
    ("kind", "changes", "where"),
    [
        ("text", {"record": COMPACT | {"codec": {"name": "compact", "k": 7}}}, "codec.k"),
        ("text", {"record": COMPACT | {"codec": {"name": "plain_topk", "k": 6}}}, "codec.name"),
        ("text", {"record": COMPACT | {"codec": {"name": "compact", "k": 6, "step": 0.02}}}, "codec.step"),
        ("text", {"record": COMPACT | {"test": False}}, "data.test"),
        ("text", {"data": TEXT | {"train_size": 41}}, "data"),
        ("text", {"data": TEXT | {"source": TEXT["source"] | {"length": 12}}}, "data.fingerprint"),  # type: ignore[operator]
        ("text", {"record": COMPACT | {"codec": {"name": "compact", "k": 900}}}, "record.codec.k"),
        ("images", OF_IMAGES | {"data": IMAGES | {"views": {"count": 1, "seed": 5}}}, "views.seed"),
        ("images", OF_IMAGES | {"record": {"batch_size": 16, "codec": "half"}}, "codec.name"),
        ("images", OF_IMAGES | {"record": {"batch_size": 16, "scores": ["margin"]}}, "contents.scores"),
    ],
)
def test_a_finished_record_of_another_recipe_than_make_is_refused(finished: Path, tmp_path: Path, kind: str, changes: dict[str, Any], where: str) -> None:
    with pytest.raises(InputError) as told:
        ensured(tmp_path, finished / kind, **changes)
    assert told.value.where == f"teacher.make.{where}"


def test_a_finished_record_that_agrees_is_used_as_it_is(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> nn.Module:
        raise AssertionError("a teacher was made")

    monkeypatch.setattr("limbeck.models.build_model", never)
    ensured(tmp_path, finished / "text")
    ensured(tmp_path, finished / "images", **OF_IMAGES)
    ensured(tmp_path, finished / "text", record=COMPACT | {"codec": {"name": "compact", "k": 6, "vocabulary": 257}})


def test_views_that_a_finished_record_lacks_are_added(tmp_path: Path) -> None:
    limbeck.record(record_recipe(**OF_IMAGES), output=tmp_path / "r")
    ensured(tmp_path, tmp_path / "r", **OF_IMAGES | {"data": IMAGES | {"views": {"count": 2}}})
    assert Record.open(tmp_path / "r").parts["train"].views == 2
