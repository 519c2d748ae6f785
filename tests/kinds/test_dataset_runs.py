"""Runs that make data sets, end to end: experts, images, artefact, what is measured beside them, wrong input."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import limbeck
from limbeck.data.sources import digits
from limbeck.errors import InputError
from limbeck.ingredients import prepare
from limbeck.kinds.dataset import LABELS
from limbeck.methods.datasets import ftd as method_file
from limbeck.models import build_model
from limbeck.recipe import Recipe
from limbeck.report.summary import RunSummary
from limbeck.run import distill, evaluate_run, measure
from limbeck.synthetic.synthetic_set import SyntheticSet
from limbeck.synthetic.trajectories import Trajectories

FTD: dict[str, Any] = {
    "name": "set",
    "threads": 1,
    "method": {"name": "ftd", "images_per_class": 1, "steps": 3, "expert_epochs": 1, "latest_start": 2, "step_size": 0.02, "image_ema": 0.5},
    "teacher": {"experts": {"count": 2, "epochs": 3, "batch_size": 64, "lr": 0.05}},
    "student": {"model": {"name": "convnet", "depth": 1, "width": 8}},
    "data": {"source": {"name": "digits"}, "train_size": 200, "test_size": 100},
    "train": {"steps": 4, "batch_size": 8, "optimiser": {"name": "sgd", "lr": 1.0, "momentum": 0.5}},
    "evaluate": {"networks": 2, "training": {"steps": 20}, "full_training": {"epochs": 2}, "architectures": [{"name": "mlp", "hidden": [16]}]},
}


def recipe(**changes: Any) -> dict[str, Any]:
    return {**FTD, **changes}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset") / "run"
    distill(Recipe.parse(FTD), run=folder)
    return folder


def test_a_run_leaves_a_set_experts_and_a_page(run: Path) -> None:
    made = limbeck.load(run)
    assert isinstance(made, SyntheticSet)
    images, labels = made.expanded()
    assert images.shape == (10, 1, 8, 8)
    assert labels.tolist() == list(range(10))
    experts = Trajectories.open(run / "experts")
    assert (experts.count, experts.epochs) == (2, 3)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Synthetic images" in page
    assert all(label in page for label in LABELS.values())


def test_what_stands_beside_a_set(run: Path) -> None:
    summary = RunSummary.from_json((run / "result.json").read_text())
    assert summary.kind == "dataset"
    arms = {arm.label: arm for arm in summary.arms}
    assert set(arms) == {*LABELS.values(), "distilled"}
    for label in (LABELS["random"], LABELS["kmeans"], "distilled"):
        assert arms[label].values("images_per_class") == [1.0]
    assert arms[LABELS["random"]].values("bytes") == [10 * 64 * 4.0]
    assert arms[LABELS["full"]].values("compression") == [1.0]
    own = arms["distilled"]
    assert 0 <= own.values("accuracy")[0] <= 1
    assert own.values("cross/mlp")
    assert own.values("random_cross_drop")
    assert own.values("cross_drop")[0] == pytest.approx(own.values("accuracy")[0] - own.values("cross/mlp")[0])
    (ior,) = own.values("improvement_over_random")
    assert ior == pytest.approx(own.values("accuracy")[0] - arms[LABELS["random"]].values("accuracy")[0])


def test_evaluating_a_run_again_gives_its_numbers(run: Path) -> None:
    summary = RunSummary.from_json((run / "result.json").read_text())
    arm = summary.arm("distilled")
    assert arm is not None
    assert evaluate_run(run)["accuracy"] == arm.values("accuracy")[0]


def test_the_images_moved_and_the_start_was_real(run: Path, tmp_path: Path) -> None:
    still = recipe(train={**FTD["train"], "steps": 0}, evaluate={**FTD["evaluate"], "baselines": [], "architectures": []})
    start = distill(Recipe.parse(still), run=tmp_path / "still").student
    end = limbeck.load(run)
    assert isinstance(start, SyntheticSet)
    assert isinstance(end, SyntheticSet)
    assert not torch.equal(start.images, end.images)
    source = digits()
    real = source.train.prepare(source.train.fetch(torch.arange(len(source.train)))[0])
    assert all(bool((real == image).flatten(1).all(1).any()) for image in start.images)


def test_arms_of_a_claim_share_their_experts(tmp_path: Path) -> None:
    short = {**FTD["evaluate"], "baselines": [], "architectures": []}
    first = measure(recipe(evaluate=short), seed=5, cache=tmp_path, arm="one")
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    again = measure(recipe(evaluate=short), seed=5, cache=tmp_path, arm="two")
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert {k: v for k, v in first.items() if "seconds" not in k} == {k: v for k, v in again.items() if "seconds" not in k}


def test_real_images_are_a_method(tmp_path: Path) -> None:
    found = {}
    for selection in ("random", "kmeans"):
        values = recipe(
            name=selection, method={"name": "real_images", "images_per_class": 2, "selection": selection}, teacher=None,
            evaluate={"networks": 1, "training": {"steps": 5}, "baselines": []},
        )  # fmt: skip
        made = distill(Recipe.parse(values), run=tmp_path / selection).student
        assert isinstance(made, SyntheticSet)
        assert made.images.shape == (20, 1, 8, 8)
        found[selection] = made.images
    assert not torch.equal(found["random"], found["kmeans"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"teacher": None}, "needs a teacher"),
        ({"teacher": {"model": {"name": "mlp", "hidden": [8]}}}, "needs experts"),
        ({"method": {"name": "kd"}}, "does not take experts"),
        ({"method": {**FTD["method"], "latest_start": 9}}, "latest_start"),
        ({"method": {**FTD["method"], "images_per_class": 500}}, "images_per_class"),
        ({"method": {**FTD["method"], "inner_batch": 50}}, "inner_batch"),
        ({"student": {"model": {"name": "cnn", "widths": [8]}}}, "running statistics"),
        ({"train": {**FTD["train"], "sharding": "fsdp2"}}, "sharding"),
        ({"data": {**FTD["data"], "augment": {"mixup": 0.4}}}, "augment"),
        ({"data": {**FTD["data"], "labelled": 50}}, "label"),
        ({"evaluate": {**FTD["evaluate"], "search_rate": True}}, "search_rate"),
        ({"evaluate": {**FTD["evaluate"], "architectures": [{"name": "nosuch"}]}}, "evaluate.architectures.0"),
        ({"evaluate": {**FTD["evaluate"], "architectures": [{"name": "convnet", "depth": 7}]}}, "evaluate.architectures.0"),
        ({"evaluate": {**FTD["evaluate"], "training": {"labels": "dynamic"}}}, "dynamic"),
        ({"train": {**FTD["train"], "ema": 0.9}}, "train.ema"),
        ({"student": {**FTD["student"], "train": {"epochs": 1}}}, "student.train"),
    ],
)
def test_what_a_recipe_may_not_say(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        distill(Recipe.parse(recipe(**changes)), run=tmp_path / "run")
    assert said in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_recipe_with_experts_is_read_and_written_again() -> None:
    parsed = Recipe.parse(FTD)
    assert Recipe.parse(yaml.safe_load(parsed.to_yaml())) == parsed
    with pytest.raises(InputError, match="without 'model'"):
        Recipe.parse(recipe(teacher={**FTD["teacher"], "model": {"name": "mlp", "hidden": [8]}}))
    with pytest.raises(InputError, match="belongs to 'experts'"):
        Recipe.parse(recipe(teacher={"model": {"name": "mlp", "hidden": [8]}, "folder": "x"}))


WITH_NORM = {"model": {"name": "convnet", "depth": 1, "width": 8, "norm": "batch"}}
SHORT = {"networks": 1, "training": {"steps": 8, "temperature": 4.0, "mixup": 0.4}, "full_training": {"epochs": 1}}


def test_a_set_with_shared_patterns_runs_to_the_end(tmp_path: Path) -> None:
    trained = {"epochs": 1, "batch_size": 32}
    values = recipe(
        name="infer", method={"name": "infer", "images_per_class": 2}, student=WITH_NORM, teacher=[{**WITH_NORM, "train": trained}] * 2,
        train={"steps": 3, "batch_size": 8}, evaluate=SHORT,
    )  # fmt: skip
    distill(Recipe.parse(values), run=tmp_path / "run")
    summary = RunSummary.from_json((tmp_path / "run" / "result.json").read_text())
    made, arms = limbeck.load(tmp_path / "run"), {arm.label: arm for arm in summary.arms}
    assert isinstance(made, SyntheticSet)
    assert len(made) > len(made.images)
    assert arms[LABELS["random"]].values("images_per_class") == [float((len(made.images) + len(made.patterns)) // 10)]
    assert evaluate_run(tmp_path / "run")["accuracy"] == arms["distilled"].values("accuracy")[0]
    assert summary.pictures


def test_pairs_run_to_the_end(tmp_path: Path) -> None:
    trained = {"epochs": 1, "batch_size": 32, "drop_last": True, "optimiser": {"name": "adam", "lr": 0.001}}
    values = recipe(
        name="pairs", method={"name": "krr_st", "images": 20, "networks": 2, "life": 5, "inner": {"lr": 0.01}}, student=WITH_NORM,
        teacher={**WITH_NORM, "method": {"name": "barlow_twins", "representation": "outputs"}, "train": trained},
        train={"steps": 3, "batch_size": 16, "optimiser": {"name": "adamw", "lr": 0.001}},
        evaluate={"networks": 1, "transfer": {"labels_per_class": 2, "pretraining": {"epochs": 2}, "fine_tuning": {"steps": 3}}, "baselines": ["random"]},
    )  # fmt: skip
    distill(Recipe.parse(values), run=tmp_path / "run")
    summary = RunSummary.from_json((tmp_path / "run" / "result.json").read_text())
    arms = {arm.label: arm for arm in summary.arms}
    assert "no pre-training" in arms
    assert arms["distilled"].values("ridge_loss")[0] > 0
    assert evaluate_run(tmp_path / "run")["transfer/own"] == arms["distilled"].values("transfer/own")[0]


@pytest.mark.parametrize("change", ["data.whiten=true", "data.source.name=two_moons"])
def test_a_set_is_not_judged_on_data_of_another_kind(run: Path, change: str) -> None:
    with pytest.raises(InputError, match=r"whitened|shape|two_moons|count"):
        evaluate_run(run, [change])


def test_experts_of_several_seeds_lie_side_by_side_in_a_shared_folder(tmp_path: Path) -> None:
    values = recipe(
        seeds=[0, 1], teacher={**FTD["teacher"], "seed": None, "folder": str(tmp_path / "experts")},
        evaluate={"networks": 1, "training": {"steps": 5}, "baselines": []},
    )  # fmt: skip
    distill(Recipe.parse(values), run=tmp_path / "run")
    first, second = (Trajectories.open(tmp_path / "experts" / f"seed-{seed}") for seed in (0, 1))
    assert not torch.equal(first.weights(0, 0), second.weights(0, 0))


def test_a_set_that_cannot_be_judged_is_kept_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("the machine went down")

    monkeypatch.setattr("limbeck.kinds.dataset.DatasetKind.outcome", broken)
    with pytest.raises(RuntimeError, match="went down"):
        distill(Recipe.parse(FTD), run=tmp_path / "run")
    assert isinstance(limbeck.load(tmp_path / "run"), SyntheticSet)


def test_experts_may_be_given_as_an_object(run: Path) -> None:
    data, experts = digits(), Trajectories.open(run / "experts")
    student = build_model(Recipe.parse(FTD).student.model, num_classes=10, input_shape=(1, 8, 8), seed=3)
    method = method_file.FTD(**{k: v for k, v in FTD["method"].items() if k != "name"})
    made = distill(teacher=experts, student=student, data=(data.train, data.test), method=method, train={"steps": 2, "batch_size": 8}).student
    assert isinstance(made, SyntheticSet)


def test_whitened_data_are_whitened_in_the_artefact_too(tmp_path: Path) -> None:
    values = recipe(data={**FTD["data"], "whiten": True}, evaluate={"networks": 1, "training": {"steps": 5}, "baselines": []})
    distill(Recipe.parse(values), run=tmp_path / "run")
    made = limbeck.load(tmp_path / "run")
    assert isinstance(made, SyntheticSet)
    assert made.whitened
    prepared = prepare(Recipe.parse(values).data, 0)
    raw = prepared.test.fetch(torch.arange(5))[0]
    pixels = raw.float() / (255 if raw.dtype == torch.uint8 else 1)
    torch.testing.assert_close(made.prepare(pixels), prepared.test.prepare(raw), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made.to_pixels(prepared.test.prepare(raw)), pixels, rtol=1e-3, atol=1e-3)


def test_a_folder_of_experts_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"teacher\.folder") as caught:
        distill(Recipe.parse(recipe(teacher={**FTD["teacher"], "folder": str(tmp_path / "file" / "experts")})), run=tmp_path / "run")
    assert "Not a directory" in str(caught.value)
    assert not (tmp_path / "run").exists()
