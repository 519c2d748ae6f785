"""A recorded teacher beside the same teacher live: it is the one that was recorded, or the run is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import limbeck
from limbeck.errors import InputError
from limbeck.ingredients import from_recipe
from limbeck.models.weights import fingerprint
from limbeck.recipe import Recipe
from limbeck.records import Record
from limbeck.run import evaluate_run
from limbeck.runner import Runner

TEXT = {"source": {"name": "python_manual", "tokenizer": "bytes", "length": 16}, "train_size": 64, "test_size": 12}
OPTIMISER = {"name": "adamw", "lr": 0.01}


def make_file(folder: Path, **changes: Any) -> Path:
    """The record's recipe: a teacher that is trained for it, whose seed is the record's."""
    model = {"name": "decoder", "layers": 1, "width": 8, "heads": 1}
    teacher = {"model": model, "seed": None, "train": {"steps": 6, "batch_size": 16, "optimiser": OPTIMISER}}
    base = {"name": "kept", "teacher": teacher, "data": TEXT, "record": {"codec": {"name": "plain_topk", "k": 8}, "batch_size": 16}, "seed": 3}
    path = folder / "make.yaml"
    path.write_text(json.dumps({**base, "threads": 1, "device": "cpu"} | changes), encoding="utf-8")
    return path


def run_recipe(folder: Path) -> Recipe:
    """A student of the record that trains on fewer rows of the text than the teacher did, from another seed."""
    return Recipe.parse(
        {
            "name": "tiny",
            "method": "token_kd",
            "teacher": {"record": str(folder / "record"), "make": str(folder / "make.yaml")},
            "student": {"model": {"name": "decoder", "layers": 1, "width": 8, "heads": 1}},
            "data": TEXT | {"validation": 16},
            "train": {"steps": 3, "batch_size": 16, "optimiser": OPTIMISER},
            "compare": {"alone": False, "live": True},
            "evaluate": {"batch_size": 8, "latency": False},
            "seeds": [11],
            "threads": 1,
            "device": "cpu",
        }
    )


@pytest.fixture
def place(tmp_path: Path) -> Path:
    limbeck.record(make_file(tmp_path), output=tmp_path / "record")
    return tmp_path


def live(place: Path, run: Path | None) -> Any:
    runner = Runner(from_recipe(run_recipe(place)), run)
    return runner.live(runner.parts.data(11), 11)[0]


@pytest.mark.parametrize("folder", [True, False])
def test_the_live_teacher_is_trained_as_for_the_record(place: Path, folder: bool) -> None:
    shutil.rmtree(place / ".record.work")  # the one that recording kept
    found = live(place, place / "run" if folder else None)
    assert fingerprint(found) == Record.open(place / "record").identity["teacher"]["fingerprint"]
    assert not (place / ".record.work").exists()


def test_the_teacher_that_recording_kept_is_not_trained_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a network was trained")

    monkeypatch.setattr(Runner, "_train", never)
    before = sorted(path.relative_to(place) for path in (place / ".record.work").rglob("*"))
    found = live(place, place / "run")
    assert fingerprint(found) == Record.open(place / "record").identity["teacher"]["fingerprint"]
    assert sorted(path.relative_to(place) for path in (place / ".record.work").rglob("*")) == before


def test_a_live_teacher_that_was_not_recorded_is_refused(place: Path) -> None:
    other = json.loads((place / "make.yaml").read_text(encoding="utf-8"))["teacher"]
    make_file(place, teacher=other | {"train": other["train"] | {"steps": 7}})
    with pytest.raises(InputError) as told:
        limbeck.distill(run_recipe(place), run=place / "run")
    assert told.value.where == "compare.live"
    assert Record.open(place / "record").identity["teacher"]["fingerprint"][:12] in told.value.what


def test_a_run_beside_its_live_teacher_is_evaluated_without_the_records_recipe(place: Path) -> None:
    found = limbeck.distill(run_recipe(place), run=place / "run")
    assert {arm.role for arm in found.summary.arms} >= {"other", "distilled"}
    for path in ("make.yaml", "record", ".record.work"):
        target = place / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    assert evaluate_run(place / "run")["nll"] == pytest.approx(found.metrics["nll"], abs=1e-6)


def test_a_live_teacher_without_its_recipe_is_told(place: Path) -> None:
    (place / "make.yaml").unlink()
    with pytest.raises(InputError) as told:
        limbeck.distill(run_recipe(place), run=place / "run")
    assert told.value.where.startswith("teacher.make")
    assert not (place / "run").exists()
