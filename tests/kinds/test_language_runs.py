"""Runs that make language models: measured, reported, loaded again; recorded teachers beside live ones; what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import limbeck
from limbeck import data as datasets
from limbeck.errors import InputError
from limbeck.kinds import KINDS
from limbeck.language.models import LanguageModel
from limbeck.recipe import Recipe, RecordRecipe
from limbeck.run import evaluate_run
from recipe_parts import limbeck as command

TEXT = {"source": {"name": "python_manual", "tokenizer": "bytes", "length": 24}, "train_size": 96, "test_size": 24}


def recipe(**changes: Any) -> dict[str, Any]:
    optimiser = {"name": "adamw", "lr": 0.01}
    teacher = {"model": {"name": "decoder", "layers": 2, "width": 16, "heads": 2}, "train": {"steps": 20, "batch_size": 16, "optimiser": optimiser}}
    return {
        "name": "tiny",
        "method": {"name": "token_kd", "hard": 0.5},
        "teacher": teacher,
        "student": {"model": {"name": "decoder", "layers": 1, "width": 8, "heads": 1}},
        "data": TEXT,
        "train": {"steps": 12, "batch_size": 16, "optimiser": optimiser, "log_every": 4},
        "evaluate": {"batch_size": 8, "latency_repeats": 3},
        "threads": 1,
        "device": "cpu",
    } | changes


def test_a_run_measures_reports_and_loads_again(tmp_path: Path) -> None:
    found = limbeck.distill(Recipe.parse(recipe()), run=tmp_path / "run")
    assert isinstance(found.student, LanguageModel)
    assert found.metrics["perplexity"] == pytest.approx(torch.tensor(found.metrics["nll"]).exp().item(), rel=1e-5)
    assert 0 <= found.metrics["agreement"] <= 1
    assert found.metrics["kl_to_teacher"] > 0
    assert found.metrics["training_tokens"] == 12 * 16 * 24
    roles = {arm.role: arm for arm in found.summary.arms}
    assert set(roles) == {"teacher", "alone", "distilled"}
    assert roles["teacher"].mean("kl_to_teacher") == (0.0, None)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Perplexity" in page
    assert "Bits a byte" in page
    again = evaluate_run(tmp_path / "run")
    assert again["nll"] == pytest.approx(found.metrics["nll"], abs=1e-6)
    rows = torch.randint(0, 256, (2, 2, 24))
    torch.testing.assert_close(limbeck.load(tmp_path / "run")(rows), found.student(rows))


def test_the_command_line_runs_it_and_prints_it(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(json.dumps(recipe(compare={"alone": False})), encoding="utf-8")
    done = command("distill", path, "--run", tmp_path / "run", "--quiet")
    assert done.code == 0, done.err
    shown = command("report", tmp_path / "run")
    assert shown.code == 0
    assert "Perplexity" in shown.out


def recorded(folder: Path, codec: dict[str, Any]) -> dict[str, Any]:
    """A recipe of a student that learns from a record, and the record's recipe beside it."""
    make = {"name": "kept", "teacher": recipe()["teacher"], "data": TEXT, "record": {"codec": codec, "batch_size": 16}, "threads": 1, "device": "cpu"}
    (folder / "make.yaml").write_text(json.dumps(make), encoding="utf-8")
    teacher = {"record": str(folder / "record"), "make": str(folder / "make.yaml")}
    return recipe(teacher=teacher, compare={"alone": False, "live": True})


def test_a_whole_record_teaches_as_its_teacher_does(tmp_path: Path) -> None:
    found = limbeck.distill(Recipe.parse(recorded(tmp_path, {"name": "plain_topk", "k": 257})), run=tmp_path / "run")
    arms = {arm.role: arm for arm in found.summary.arms}
    live, own = arms["other"].values("nll")[0], arms["distilled"].values("nll")[0]
    assert own == pytest.approx(live, abs=3e-3)
    assert arms["teacher"].mean("perplexity") is not None


def test_fewer_entries_and_a_tail_teach_nearly_the_same(tmp_path: Path) -> None:
    found = limbeck.distill(Recipe.parse(recorded(tmp_path, {"name": "compact", "k": 16})), run=tmp_path / "run")
    arms = {arm.role: arm for arm in found.summary.arms}
    assert arms["distilled"].values("nll")[0] == pytest.approx(arms["other"].values("nll")[0], abs=0.05)


def test_without_the_live_teacher_the_records_test_rows_are_compared_with(tmp_path: Path) -> None:
    plain = recorded(tmp_path, {"name": "plain_topk", "k": 16}) | {"compare": {"alone": False}}
    found = limbeck.distill(Recipe.parse(plain), run=tmp_path / "run")
    assert "kl_to_teacher" not in found.metrics
    assert found.metrics["kl_to_teacher_kept"] > 0
    assert {arm.role for arm in found.summary.arms} == {"distilled"}


def test_recording_goes_on_where_it_stopped_and_gives_the_same_bytes(tmp_path: Path) -> None:
    spec = {"name": "kept", "teacher": recipe()["teacher"], "data": TEXT, "threads": 1, "device": "cpu"}
    spec["record"] = {"codec": {"name": "compact", "k": 8}, "batch_size": 16, "shard_rows": 32}
    whole = limbeck.record(RecordRecipe.parse(spec), output=tmp_path / "a")
    limbeck.record(RecordRecipe.parse(spec), output=tmp_path / "b")
    shard = sorted((tmp_path / "b").glob("train/shards/*.arrow"))[1]
    shard.unlink()
    limbeck.record(RecordRecipe.parse(spec), output=tmp_path / "b")
    assert whole.parts["train"].ids.tolist()
    for file in sorted((tmp_path / "a").rglob("*.arrow")):
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes(), file.name


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"data": {"source": {"name": "digits"}}}, "no tokens"),
        ({"student": {"model": {"name": "mlp", "hidden": [4]}}}, "no language model"),
        ({"data": TEXT | {"augment": {"flip": True}}}, "augmented"),
        ({"method": {"name": "token_kd", "soft": 0.0}}, "nothing to learn"),
        ({"compare": {"live": True}}, "recorded teacher"),
        ({"teacher": None}, "needs a teacher"),
    ],
)
def test_what_does_not_fit_is_said(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(InputError) as told:
        limbeck.distill(Recipe.parse(recipe(**changes)), run=None if "run" in changes else Path("/nonexistent/never"))
    assert what in str(told.value)


def test_a_record_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    plan = recorded(tmp_path, {"name": "plain_topk", "k": 8}) | {"compare": {"alone": False}}
    limbeck.distill(Recipe.parse(plan), run=tmp_path / "run")
    other = plan | {"data": TEXT | {"source": TEXT["source"] | {"tokenizer": "characters"}}}
    with pytest.raises(InputError):
        limbeck.distill(Recipe.parse(other), run=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_objects_without_a_recipe() -> None:
    from limbeck.language.decoder import decoder
    from limbeck.language.manual import python_manual

    data = python_manual(tokenizer="bytes", length=16)
    teacher, student = (decoder(257, (2, 16), layers=1, width=width, heads=1) for width in (16, 8))
    found = limbeck.distill(teacher=teacher, student=student, data=tuple(datasets.stratified_subset(part, 64, 0) for part in (data.train, data.test)), train={"steps": 2, "batch_size": 8})
    assert found.metrics["kl_to_teacher"] > 0


def test_every_kind_says_what_it_is() -> None:
    assert {name: kind.name for name, kind in KINDS.items()} == {name: name for name in KINDS}
