"""Whole runs that make generators: recipe to report, load, evaluate, restart; what wrong recipes get; what is noticed on the way."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

import limbeck
from limbeck.claims.spec import merge
from limbeck.contract import Phase, Player, Update
from limbeck.data import ArrayData
from limbeck.diffusion.denoisers import MixtureDenoiser
from limbeck.diffusion.generator import Generator, TeacherSampler
from limbeck.diffusion.schedules import EDM
from limbeck.errors import InputError
from limbeck.ingredients import from_recipe
from limbeck.kinds.generator import GeneratorKind
from limbeck.methods import DMD2
from limbeck.models import build_model
from limbeck.recipe import Recipe
from limbeck.report.summary import RunSummary
from limbeck.run import distill, execute, measure
from limbeck.runner import Runner
from recipe_parts import limbeck as command
from recipe_parts import write

TEACHER = {
    "model": {"name": "mlp_denoiser", "widths": [16, 16]},
    "method": "denoising",
    "train": {"steps": 30, "batch_size": 64, "ema": 0.9, "optimiser": {"name": "adam", "lr": 1e-3}},
}


def recipe(**changes: Any) -> dict[str, Any]:
    """dmd2 on two moons, small."""
    base = {
        "name": "moons",
        "threads": 1,
        "method": {"name": "dmd2", "ratio": 2},
        "teacher": TEACHER,
        "data": {"source": {"name": "two_moons", "count": 400, "test": 200}},
        "train": {"steps": 8, "batch_size": 32, "optimiser": {"name": "adam", "lr": 1e-4}, "log_every": 4},
        "evaluate": {"samples": 100, "teacher_steps": [2, 3], "latency_repeats": 3},
    }
    return merge(base, changes)


def test_from_recipe_to_report_and_back(tmp_path):
    result = distill(Recipe.parse(recipe(seeds=[0, 1])), run=tmp_path / "run")
    summary = RunSummary.from_json((tmp_path / "run" / "result.json").read_text())
    assert summary.kind == "generator"
    assert summary.headline[0] == "mmd2"
    assert "modes_covered" not in summary.headline  # two moons are no mixture
    assert [(arm.role, arm.label, len(arm.outcomes)) for arm in summary.arms] == [
        ("teacher", "teacher, 5 calls", 2),
        ("other", "teacher, 2 calls", 2),
        ("alone", "teacher, 1 call", 2),
        ("distilled", "student", 2),
    ]
    assert summary.arm("teacher").outcomes[0].measures["paired_rmse"] == 0
    assert [arm.outcomes[0].measures["calls"] for arm in summary.arms] == [5, 2, 1, 1]
    assert all(arm.outcomes[0].measures["seconds_per_sample"] > 0 for arm in summary.arms)
    assert len(summary.pictures) == 1
    assert "student" in (tmp_path / "run" / "report.html").read_text()
    assert result.metrics["mmd2"] == summary.arm("distilled").outcomes[0].measures["mmd2"]
    # what comes out samples by itself, in the data's units, as the run measured
    generator = limbeck.load(tmp_path / "run")
    assert isinstance(generator, Generator)
    assert generator.times == (80.0,)
    assert torch.equal(generator.sample(5, labels=1, seed=3), result.student.sample(5, labels=1, seed=3))
    assert not torch.equal(generator.sample(5, labels=1), generator.sample(5, labels=0))
    assert generator.sample(3, steps=2).shape == (3, 2)
    assert generator.scale.mean.tolist() == pytest.approx([0.5, 0.25])
    called = command("evaluate", tmp_path / "run", "--json")
    assert called.code == 0, called.err
    assert json.loads(called.out)["mmd2"] == pytest.approx(result.metrics["mmd2"], rel=1e-6)
    # the same command again prints what is there
    again = distill(Recipe.parse(recipe(seeds=[0, 1])), run=tmp_path / "run")
    assert again.metrics == result.metrics
    config = json.loads((tmp_path / "run" / "artefact" / "config.json").read_text())
    assert config["kind"] == "generator"
    assert config["preprocess"]["mean"] == [0.5, 0.25]


def test_a_student_that_is_not_named_is_built_as_its_teacher():
    parsed = Recipe.parse(recipe())
    assert parsed.student.model == parsed.teacher[0].model
    assert parsed.student.train is None
    named = Recipe.parse(recipe(student={"model": {"name": "mlp_denoiser", "widths": [8]}}, method={"start": "fresh"}))
    assert named.student.model.args["widths"] == [8]
    with pytest.raises(InputError, match="student"):
        Recipe.parse({k: v for k, v in recipe().items() if k != "teacher"})


def test_images_are_judged_by_features_that_are_kept(tmp_path):
    changes = {
        "data": {"source": {"name": "digits", "scale": "symmetric", "count": None, "test": None}, "test_size": 100},
        "teacher": {"model": {"name": "unet_denoiser", "widths": None, "width": 8}, "train": {"steps": 3}},
        "evaluate": {"features": {"width": 8, "steps": 20}, "latency": False},
        "train": {"steps": 4},
    }
    result = distill(Recipe.parse(recipe(**changes)), run=tmp_path / "run")
    arm = result.summary.arm("distilled")
    assert result.summary.headline[0] == "fid"
    assert {"fid", "kid", "precision", "recall", "density", "coverage", "mmd2"} <= arm.outcomes[0].measures.keys()
    assert [picture.caption.split(",")[0] for picture in result.summary.pictures] == ["Real samples", "Teacher", "Student"]
    kept = list((tmp_path / "run" / "features").glob("*.safetensors"))
    assert len(kept) == 1
    facts = result.summary.facts["measured"]
    assert facts["features_sha256"] in kept[0].with_suffix(".json").read_text()
    images = limbeck.load(tmp_path / "run").sample(3)
    assert images.shape == (3, 1, 8, 8)
    assert images.min() >= 0
    assert images.max() <= 1


@pytest.mark.parametrize(
    ("changes", "said", "where"),
    [
        ({"teacher": {"model": {"name": "cnn", "widths": [4]}}, "student": {"model": {"name": "mlp_denoiser"}}}, "", "teacher.model"),
        ({"teacher": [TEACHER, TEACHER], "student": {"model": {"name": "mlp_denoiser"}}}, "one teacher", "teacher"),
        ({"teacher": None, "student": {"model": {"name": "mlp_denoiser"}}}, "needs a teacher", "teacher"),
        ({"student": {"model": {"name": "mlp_denoiser", "widths": [8]}}}, "cannot start from the teacher's weights", "method.start"),
        ({"student": {"model": {"name": "mlp_denoiser", "input_shape": [3]}}, "method": {"start": "fresh"}}, "samples of shape", "student.model"),
        ({"teacher": {"model": {"num_classes": 7}}}, "7 classes", "student.model"),
        ({"teacher": {"model": {"schedule": "edn"}}}, "unknown schedule", "student.model"),
        ({"teacher": {"model": {"prediction": "v", "precondition": "none"}}}, "'v' needs", "student.model"),
        ({"method": {"name": "kd"}, "student": {"model": {"name": "mlp", "hidden": [3]}}}, "logits|classes|outputs|inputs", "teacher.model"),
    ],
)
def test_wrong_recipes_are_told_before_anything_is_written(changes, said, where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    called = command("distill", write(tmp_path, recipe(**changes)))
    assert called.code == 2, called.err
    assert where in called.err
    assert re.search(said, called.err), called.err
    assert not (tmp_path / "runs").exists()


class Collapsing(DMD2):
    """A generator that is made to give one point whatever the noise."""

    def updates(self, batch, clock):
        if clock.step < 4:
            yield from super().updates(batch, clock)
            return
        with torch.no_grad():
            for parameter in self.student.parameters():
                parameter.zero_()
        x, _ = self.generate(batch, clock)
        yield Update("generator", 0 * x.sum(), self.watched(1e-4 * x))


def test_a_generator_that_collapses_is_told_in_log_and_report(tmp_path, capsys):
    parts = from_recipe(Recipe.parse(recipe()))
    result = execute(replace(parts, method=lambda: Collapsing(ratio=1)), tmp_path / "run", style="plain")
    assert any("collapsed" in note for note in result.summary.notes)
    assert "collapsed" in capsys.readouterr().err
    assert "collapsed" in (tmp_path / "run" / "report.html").read_text()


def test_samples_that_are_no_numbers_are_counted_and_judged_by_nothing():
    parsed = Recipe.parse(recipe())
    runner = Runner(from_recipe(parsed))
    prepared = runner.parts.data(0)
    kind = runner.kind
    assert isinstance(kind, GeneratorKind)
    reference = kind.reference(None, prepared, None)
    broken = build_model(parsed.student.model, num_classes=2, input_shape=(2,), seed=0)
    with torch.no_grad():
        next(iter(broken.parameters())).fill_(torch.nan)
    outcome = kind.outcome(0, Generator(broken, (80.0,)), prepared, reference)
    assert outcome.nonfinite == 100
    assert outcome.measures["mmd2"] is None
    assert "mmd2" not in kind.metrics(outcome)


def test_claims_get_the_measures_of_student_and_teacher(tmp_path):
    changes = {"data": {"source": {"name": "gaussian_grid", "side": 2, "count": 400, "test": 200}}, "evaluate": {"latency": False}}
    found = measure({k: v for k, v in recipe(**changes).items() if k != "name"}, seed=3, cache=tmp_path, arm="dmd2")
    wanted = {"mmd2", "sliced_wasserstein", "energy_distance", "modes_covered", "outliers", "frequency_tv", "paired_rmse", "calls", "seconds"}
    assert wanted <= found.keys()
    assert {"teacher/mmd2", "teacher/modes_covered", "teacher/calls"} <= found.keys()
    assert found["calls"] == 1
    assert found["teacher/calls"] == 5
    assert list(tmp_path.glob("teacher-*"))


def test_an_exact_teacher_given_as_an_object():
    means, g = torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), torch.Generator().manual_seed(0)
    teacher = MixtureDenoiser(EDM(), means, torch.tensor([0.1, 0.1]))
    data = [ArrayData(teacher.sample(n, g)) for n in (300, 200)]
    student = build_model(Recipe.parse(recipe()).student.model, num_classes=0, input_shape=(2,), seed=0)

    class Matched(DMD2):
        """The student learns the teacher's denoised noise: enough to see the objects' front door work."""

        def setup(self) -> None:
            self.generator, self.spread = self.make_generator(), None

        def players(self):
            return {"generator": Player(self.student)}

        def phases(self):
            return [Phase(data_free=True)]

        def updates(self, batch, clock):
            noise, cond = self.draw(len(batch), clock)
            x = self.generator(noise, cond)
            assert batch.inputs.shape[1] == 0
            yield Update("generator", (x - 0.5).square().mean())

        def facts(self):
            return {}

        def state_dict(self):
            return {}

    result = limbeck.distill(teacher=teacher, student=student, data=tuple(data), method=Matched(start="fresh"), train={"steps": 3, "batch_size": 16})
    assert {"mmd2", "calls", "paired_rmse"} <= result.metrics.keys()
    assert isinstance(result.summary.arm("teacher").outcomes[0].measures["mmd2"], float)


def test_the_teachers_ladder_counts_guided_calls_twice():
    parsed = Recipe.parse(recipe(method={"guidance_scale": 2.0}))
    runner = Runner(from_recipe(parsed))
    prepared = runner.parts.data(0)
    teacher = runner.kind.teacher([build_model(parsed.student.model, num_classes=2, input_shape=(2,), seed=0)])
    reference = runner.kind.reference(teacher, prepared, None)
    student = Generator(teacher, (80.0,))
    arms = runner.kind.teacher_arms(0, teacher, student, prepared, reference)
    assert [(arm.role, arm.outcome.measures["calls"]) for arm in arms] == [("teacher", 10), ("other", 4), ("alone", 2)]
    assert isinstance(runner.kind.sampling(teacher, prepared), TeacherSampler)


def test_data_without_labels_make_unconditional_generators_and_no_classifiers(tmp_path, monkeypatch):
    unlabelled = {"data": {"source": {"name": "gaussian_grid", "side": 2, "count": 400, "test": 200, "labels": "none"}}, "train": {"steps": 2}}
    result = distill(Recipe.parse(recipe(**unlabelled)), run=tmp_path / "run")
    assert limbeck.load(tmp_path / "run").num_classes == 0
    assert result.metrics["modes_covered"] >= 0
    monkeypatch.chdir(tmp_path)
    classifier = {"method": {"name": "supervised", "ratio": None}, "teacher": None, "student": {"model": {"name": "mlp", "hidden": [3]}}, **unlabelled}
    called = command("distill", write(tmp_path, recipe(**classifier)))
    assert called.code == 2
    assert "neither class names nor targets" in called.err


def test_a_guided_run_ends_with_costs_and_pictures_whatever_the_batch_size(tmp_path):
    changes = {"method": {"guidance_scale": 1.5}, "evaluate": {"samples": 2050, "batch_size": 600, "teacher_steps": [2, 2]}, "train": {"steps": 2}}
    result = distill(Recipe.parse(recipe(**changes)), run=tmp_path / "run")
    teacher, student = result.summary.arm("teacher"), result.summary.arm("distilled")
    assert teacher.outcomes[0].measures["calls"] == 6  # three passes, guided
    assert len(teacher.outcomes) == 1
    assert teacher.latencies
    assert student.latencies
    assert result.summary.pictures


def test_a_student_that_a_generator_method_trained_first_is_a_denoiser_again(tmp_path):
    first = {"model": {"name": "mlp_denoiser", "widths": [16, 16]}, "method": {"name": "dmd2", "ratio": 1}, "train": {"steps": 2, "batch_size": 16}}
    settings = recipe(student=first, method={"start": "fresh"}, train={"steps": 2}, evaluate={"latency": False})
    for _ in range(2):  # trained, then read from the cache
        runner = Runner(from_recipe(Recipe.parse(settings)), tmp_path / "run")
        prepared = runner.parts.data(0)
        teacher, _ = runner.teacher(prepared, 0)
        student = runner.student(prepared, 0, teacher)
        assert type(student).__name__ == "NetworkDenoiser"
    assert limbeck.load(tmp_path / "run" / "student").num_classes == 2


def test_the_python_door_twice_in_one_folder(tmp_path):
    g = torch.Generator().manual_seed(0)
    teacher = MixtureDenoiser(EDM(), torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), torch.tensor([0.1, 0.1]))
    data = tuple(ArrayData(teacher.sample(n, g)) for n in (100, 60))
    network = build_model(Recipe.parse(recipe()).student.model, num_classes=0, input_shape=(2,), seed=0)
    found = [
        limbeck.distill(
            teacher=network, student=network, data=data, method=DMD2(gan={"weight": 0.0}), train={"steps": 2, "batch_size": 16}, run=tmp_path / "run"
        ).student.sample(4)
        for _ in range(2)
    ]
    assert torch.equal(*found)


def test_a_teacher_of_every_seed_is_measured_anew(tmp_path):
    settings = recipe(teacher={"train": {"steps": 5}}, seeds=[0, 1, 2, 3], train={"steps": 1}, evaluate={"latency": False})
    settings["teacher"]["seed"] = None
    result = distill(Recipe.parse(settings), run=tmp_path / "run")
    for role in ("teacher", "alone"):
        values = [outcome.measures["sliced_wasserstein"] for outcome in result.summary.arm(role).outcomes]
        assert len(set(values)) == 4


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"evaluate": {"features": {"kind": "inception"}}}, "evaluate.features.kind"),
        ({"evaluate": {"features": {"kind": "classifier"}}}, "evaluate.features.kind"),
        ({"data": {"source": {"test": 4}}}, "data"),
        ({"train": {"sharding": "fsdp2"}}, "train.sharding"),
        (
            {"teacher": {"model": {"conditional": False}}, "student": {"model": {"name": "mlp_denoiser", "widths": [16, 16]}}, "method": {"start": "fresh"}},
            "student.model",
        ),
        ({"data": {"augment": {"mixup": 0.2}}}, "data.augment"),
        ({"method": {"name": "disback", "stage1_steps": 4, "record_every": 1, "iterations_per_node": 3}}, "train.steps"),
    ],
)
def test_what_would_fail_at_the_end_is_told_at_once(changes, where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    called = command("distill", write(tmp_path, recipe(**changes)))
    assert called.code == 2, called.err
    assert where in called.err
    assert not (tmp_path / "runs").exists()
