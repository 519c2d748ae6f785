"""The Python front door: distil plain modules on plain data sets, methods of third parties, models of one's own, one's own loop."""

import copy
import json
import sys
import types
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import limbeck
from limbeck import environment
from limbeck.contract import Frozen, Method, Paper, Update
from limbeck.data import AugmentSpec
from limbeck.errors import InputError
from limbeck.ingredients import from_recipe
from limbeck.losses import cross_entropy, hinton
from limbeck.recipe import Recipe
from limbeck.run import measure
from limbeck.runner import Runner
from limbeck.teachers import ModuleTeacher
from limbeck.train import TrainConfig, Trainer
from recipe_parts import MODULE, ensemble, quickstart, target, write


def points(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Six numbers a sample; the class is where the largest of the first three stands."""
    inputs = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return inputs, inputs[:, :3].argmax(1)


def network(width: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))


def perfect() -> nn.Module:
    """A teacher that knows the rule."""
    teacher = nn.Linear(6, 3, bias=False)
    with torch.no_grad():
        teacher.weight.copy_(10 * torch.eye(3, 6))
    return teacher


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def differ(a: nn.Module, b: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(value, b[name]) for name, value in a.state_dict().items())


TRAIN, TEST = TensorDataset(*points(300, 0)), TensorDataset(*points(200, 1))
CONFIG = {"epochs": 8, "batch_size": 20, "optimiser": {"lr": 0.1}}


class Jittered(Dataset):
    """A data set with a random transform, from torch's global generator."""

    def __init__(self, count: int, seed: int) -> None:
        self.inputs, self.targets = points(count, seed)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int):
        return self.inputs[index] + 0.05 * torch.randn(6), int(self.targets[index])


# ---- distill on objects ---------------------------------------------------------------------------------------------


def test_plain_modules_and_data_sets():
    teacher, student = perfect(), network(8, 0)
    taught, before = weights(teacher), weights(student)
    result = limbeck.distill(teacher=teacher, student=student, data=(TRAIN, TEST), method=limbeck.methods.KD(temperature=4), train=CONFIG)
    assert result.student is student  # trained in place
    assert not student.training
    assert differ(student, before)
    assert not differ(teacher, taught)
    accuracy = float((student(TEST.tensors[0]).argmax(1) == TEST.tensors[1]).double().mean())
    assert result.metrics["accuracy"] == pytest.approx(accuracy, abs=1e-9)
    assert accuracy > 0.85
    assert result.metrics["agreement"] == pytest.approx(accuracy, abs=1e-9)  # the teacher is always right
    assert result.folder is None
    assert result.report is None
    assert [arm.role for arm in result.summary.arms] == ["teacher", "distilled"]


def test_the_result_is_a_function_of_the_seed():
    def run(seed: int) -> nn.Module:
        torch.manual_seed(seed + 99)  # what the caller's generators stand at does not matter
        student = network(8, 0)
        return limbeck.distill(teacher=perfect(), student=student, data=(Jittered(60, 0), TEST), train={"epochs": 2, "batch_size": 8}, seed=seed).student

    first = run(3)
    assert not differ(first, weights(run(3)))
    assert differ(first, weights(run(4)))


def test_pairs_of_tensors_ensembles_functions_and_the_student_alone():
    student = network(8, 0)
    teachers = [perfect(), network(16, 5)]
    result = limbeck.distill(
        teacher=teachers, student=student, data=(TRAIN.tensors, TEST.tensors), train=TrainConfig(epochs=1), alone=True, augment=AugmentSpec(noise=0.1)
    )
    assert [arm.role for arm in result.summary.arms] == ["teacher", "alone", "distilled"]
    by_function = limbeck.distill(teacher=lambda x: 10 * x[:, :3], student=network(8, 0), data=(TRAIN, TEST), train=CONFIG)
    assert by_function.metrics["accuracy"] > 0.85
    supervised = limbeck.distill(student=network(8, 0), data=(TRAIN, TEST), method=limbeck.methods.Supervised(), train=CONFIG)
    assert supervised.metrics["accuracy"] > 0.85
    assert [arm.role for arm in supervised.summary.arms] == ["distilled"]


def test_a_run_folder_of_objects(tmp_path):
    student = network(8, 0)
    arguments = {"teacher": perfect(), "data": (TRAIN, TEST), "train": CONFIG, "run": tmp_path / "run"}
    result = limbeck.distill(student=student, **arguments)
    assert result.report == tmp_path / "run" / "report.html"
    assert result.report.exists()
    back = limbeck.load(tmp_path / "run", model=network(8, 7))
    assert not differ(back, weights(student))
    with pytest.raises(InputError, match="does not say how to build"):
        limbeck.load(tmp_path / "run")
    again = network(8, 0)
    fit, Trainer.fit = Trainer.fit, None  # nothing is trained again
    try:
        second = limbeck.distill(student=again, **arguments)
    finally:
        Trainer.fit = fit
    assert second.student is again
    assert not differ(again, weights(student))
    assert second.metrics == result.metrics
    with pytest.raises(InputError, match="another recipe"):
        limbeck.distill(student=network(8, 0), **{**arguments, "train": {"epochs": 1}})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs a recipe, or at least student= and data="),
        ({"student": network(8, 0), "data": TRAIN}, "data: data must be a pair"),
        ({"student": network(8, 0), "data": (TRAIN, 3)}, "data: cannot use a int as data"),
        ({"student": network(8, 0), "data": (TRAIN, TEST)}, "teacher: the method 'KD' needs a teacher"),
        ({"student": network(8, 0), "data": (TRAIN, TEST), "teacher": 3}, "teacher: a int cannot teach"),
        ({"student": nn.Linear(5, 3), "data": (TRAIN, TEST), "teacher": perfect()}, r"student: the student cannot take the data's inputs of shape \[6\]"),
        (
            {"student": network(8, 0), "data": (TRAIN, TEST), "teacher": perfect(), "train": {"epoch": 3}},
            r"train\.epoch: unknown field 'epoch'\. Did you mean 'epochs'",
        ),
        ({"student": network(8, 0), "data": (TRAIN, TEST), "teacher": perfect(), "train": {"epochs": 3, "steps": 3}}, "train: give 'epochs' or 'steps'"),
        ({"student": network(8, 0), "data": (TRAIN, TEST), "teacher": perfect(), "augment": AugmentSpec(crop=2)}, r"data\.augment\.crop: 'crop' needs images"),
        ({"student": network(8, 0), "data": (TRAIN, TEST), "teacher": nn.Linear(6, 4)}, "teacher"),
        ({"student": nn.Flatten(), "data": (TRAIN, TEST), "teacher": perfect()}, "student"),
    ],
)
def test_objects_that_do_not_fit_are_named(arguments, message, tmp_path):
    with pytest.raises(InputError, match=message):
        limbeck.distill(**arguments, run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- distill on recipes ---------------------------------------------------------------------------------------------


def test_a_recipe_object_and_its_file_give_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = {**quickstart(), "evaluate": {"latency": False}}
    first = limbeck.distill(write(tmp_path, values))
    assert first.folder == Path("runs/quick")
    second = limbeck.distill(Recipe.parse(values), run=tmp_path / "other")
    assert second.metrics == first.metrics
    assert not differ(first.student, weights(second.student))
    assert set(first.metrics) >= {"accuracy", "nll", "ece", "brier", "agreement", "kl_to_teacher"}


def test_a_model_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "own_models.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_models", raising=False)
    result = limbeck.distill(write(tmp_path, target()), run=tmp_path / "run")
    assert result.student[0].out_channels == 3
    with pytest.raises(InputError, match="not one of limbeck's own"):
        limbeck.load(tmp_path / "run")
    from limbeck.export import load

    assert not differ(load(tmp_path / "run", trust_imports=True), weights(result.student))
    again = limbeck.distill(tmp_path / "recipe.yaml", run=tmp_path / "run")  # a recipe that one runs is trusted
    assert not differ(again.student, weights(result.student))


class TheirConfig(Frozen):
    """Knobs of `Theirs`."""

    hardness: float = 0.5


class Theirs(Method):
    """A third party's method: half labels, half teacher."""

    Config = TheirConfig
    paper = Paper("Theirs", "", "a workshop", 2026)

    def updates(self, batch, clock):
        out = self.student(batch.inputs)
        loss = cross_entropy(out, batch.targets)
        yield Update("student", self.config.hardness * loss + (out - self.teacher.logits(batch)).square().mean(), {"hard": loss})


def test_a_third_partys_method_by_entry_point_and_by_import_path(tmp_path, monkeypatch):
    module = types.ModuleType("their_package")
    module.Theirs = Theirs
    monkeypatch.setitem(sys.modules, "their_package", module)
    monkeypatch.setattr("limbeck.methods.entry_points", lambda group: [EntryPoint("theirs", "their_package:Theirs", group)])
    values = {**quickstart(), "evaluate": {"latency": False}}
    results = [
        limbeck.distill(Recipe.parse({**values, "method": method}), run=tmp_path / str(index))
        for index, method in enumerate([{"name": "theirs", "hardness": 0.25}, {"target": "their_package:Theirs", "args": {"hardness": 0.25}}])
    ]
    assert results[0].summary.method == "Theirs"
    assert not differ(results[0].student, weights(results[1].student))
    with pytest.raises(InputError, match=r"^method\.hardnes: unknown field 'hardnes'\. Did you mean 'hardness'\?"):
        limbeck.distill(Recipe.parse({**values, "method": {"name": "theirs", "hardnes": 1}}), run=tmp_path / "x")
    with pytest.raises(InputError, match=r"unknown method 'theirz'\. Did you mean 'theirs'"):
        limbeck.distill(Recipe.parse({**values, "method": "theirz"}), run=tmp_path / "x")


def test_weights_of_a_file_start_the_student(tmp_path):
    torch.save(weights(from_recipe(Recipe.parse(quickstart())).student(from_recipe(Recipe.parse(quickstart())).data(0), 123)), tmp_path / "w.pt")
    values = quickstart()
    values["student"]["weights"] = str(tmp_path / "w.pt")
    parts = from_recipe(Recipe.parse(values))
    prepared = parts.data(0)
    assert not differ(parts.student(prepared, 0), torch.load(tmp_path / "w.pt"))
    assert not differ(parts.student(prepared, 1), torch.load(tmp_path / "w.pt"))


def test_a_partly_labelled_recipe_trains_the_alone_student_for_as_many_steps(tmp_path):
    values = {**quickstart(), "evaluate": {"latency": False}}
    result = limbeck.distill(Recipe.parse(values), run=tmp_path / "run")
    seen = {arm.role: arm.outcomes[0].examples_seen for arm in result.summary.arms if arm.role != "teacher"}
    rows = {place: [json.loads(line)["step"] for line in (tmp_path / "run" / place / "metrics.jsonl").read_text().splitlines()] for place in (".", "alone")}
    assert max(rows["."]) == max(rows["alone"]) == 3  # 180 samples in batches of 64
    assert seen["distilled"] == 180
    assert seen["alone"] == 150  # 50 labelled ones, three times


def test_measure_shares_teachers_between_arms(tmp_path):
    values = {**quickstart(), "evaluate": {"latency": False}}
    first = measure(values, seed=0, cache=tmp_path, arm="one")
    kept = sorted(p.name for p in tmp_path.iterdir())
    assert len(kept) == 1
    assert kept[0].startswith("teacher-")
    second = measure({**values, "method": {"name": "kd", "temperature": 1.0}}, seed=0, cache=tmp_path, arm="two")
    assert sorted(p.name for p in tmp_path.iterdir()) == kept
    assert first["kl_to_teacher"] != second["kl_to_teacher"]
    again = measure(values, seed=0, cache=tmp_path, arm="one")
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in first.items() if k != "seconds"}


# ---- the check before anything is written ---------------------------------------------------------------------------


def check(values) -> None:
    Runner(from_recipe(Recipe.parse(values)), None).check()


def test_a_model_that_does_not_fit_into_memory_is_refused_before_it_is_built(monkeypatch):
    monkeypatch.setattr("limbeck.ingredients.available_memory", lambda: 3_000_000)
    values = quickstart()
    check(values)
    values["student"]["model"] = {"name": "mlp", "hidden": [700, 700]}
    with pytest.raises(
        InputError, match=r"^student\.model\.args: 'mlp' has weights of 0\.0 GiB, three times which training needs, and 0\.0 GiB of memory are free"
    ):
        check(values)
    values = ensemble()
    values["teacher"][0]["model"] = {"name": "mlp", "hidden": [700, 700]}
    with pytest.raises(InputError, match=r"^teacher\.0\.model\.args"):
        check(values)
    monkeypatch.setattr("limbeck.ingredients.available_memory", lambda: None)
    check(values)


def test_available_memory_is_what_the_machine_says():
    free = environment.available_memory()
    if not Path("/proc/meminfo").exists():
        assert free is None
        return
    total = next(int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    assert 2**24 < free <= total


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": {"name": "weight_align", "head": "nowhere", "classes_per_step": 5}}, r"^method\.head: "),
        ({"method": {"name": "weight_align", "classes_per_step": [3, 3]}}, r"^method\.classes_per_step: "),
        ({"method": {"name": "self_distillation", "alpha": "estimate"}, "data": {"source": "digits", "train_size": 90}}, r"^data\.validation: "),
        ({"train": {"epochs": 1, "batch_size": 500, "drop_last": True}}, r"^train\.batch_size: "),
        (
            {"teacher": {"model": {"name": "cnn", "widths": [4]}, "train": {"epochs": 1, "batch_size": 500, "drop_last": True}}},
            r"^teacher\.train\.batch_size: ",
        ),
        ({"teacher": None}, r"^teacher: the method 'KD' needs a teacher"),
        ({"train": {"epochs": 1, "ema": 0.9, "sharding": "fsdp2"}}, r"^train\.ema: "),
        ({"student": {"model": {"name": "cnn", "widths": [4]}, "train": {"epochs": 1}, "method": {"name": "kd", "temperature": 0}}}, r"method\.temperature"),
    ],
)
def test_what_training_would_find_out_is_found_out_before(change, message):
    with pytest.raises(InputError, match=message):
        check({**quickstart(), **change})


def test_checking_leaves_what_it_was_given_alone():
    student, teacher = network(8, 0).train(), nn.Linear(6, 4)
    before = weights(student)
    state = torch.get_rng_state()
    with pytest.raises(InputError):
        limbeck.distill(student=student, data=(TRAIN, TEST), teacher=teacher)
    assert not differ(student, before)
    assert student.training
    assert all(p.requires_grad for p in student.parameters())
    assert torch.equal(torch.get_rng_state(), state)


# ---- one's own loop -------------------------------------------------------------------------------------------------


def test_the_loop_of_the_docs():
    teacher, student = perfect(), network(8, 0)
    optimiser = torch.optim.SGD(student.parameters(), lr=0.2, momentum=0.9)
    method = limbeck.methods.KD(temperature=4.0).bind(student=student, teacher=ModuleTeacher(teacher))
    inputs, targets = TRAIN.tensors
    losses = []
    for _ in range(30):
        for update in method.updates(limbeck.Batch(inputs, targets), limbeck.Clock()):
            assert update.player == "student"
            update.loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            losses.append(float(update.loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    expected = hinton(student(inputs), teacher(inputs), targets, temperature=4.0, weight=method.config.weight)
    assert torch.allclose(next(iter(method.updates(limbeck.Batch(inputs, targets), limbeck.Clock()))).loss, expected)


def test_taps_in_ones_own_loop():
    teacher, student = network(16, 1), network(8, 0)
    bridge = nn.Linear(8, 16)
    optimiser = torch.optim.SGD([*student.parameters(), *bridge.parameters()], lr=0.1)
    inputs, targets = TRAIN.tensors
    found = []
    for _ in range(20):
        with torch.no_grad(), limbeck.taps.tap(teacher, "1") as theirs:
            teacher(inputs)
        with limbeck.taps.tap(student, ["1"]) as ours:
            logits = student(inputs)
        distance = (bridge(ours["1"]) - theirs["1"]).square().mean()
        (limbeck.losses.cross_entropy(logits, targets) + distance).backward()
        optimiser.step()
        optimiser.zero_grad()
        found.append(float(distance.detach()))
    assert found[-1] < 0.7 * found[0]
    assert not student[1]._forward_hooks


def test_copies_of_the_given_modules_are_not_shared():
    # the student is trained on a copy, and what comes out is written back: a failure in the middle leaves it as it was
    student = network(8, 0)
    before = weights(student)

    class Fails(Theirs):
        """Stops after three batches."""

        def updates(self, batch, clock):
            if clock.step == 3:
                raise RuntimeError("a fault in the method")
            yield from super().updates(batch, clock)

    with pytest.raises(RuntimeError, match="a fault in the method"):
        limbeck.distill(teacher=perfect(), student=student, data=(TRAIN, TEST), method=Fails(), train=CONFIG)
    assert not differ(student, before)
    assert not differ(copy.deepcopy(student), before)


# ---- the run folder: what a review found ----------------------------------------------------------------------------


def test_fresh_leaves_a_folder_of_other_things_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="other things than a run"):
        limbeck.distill(quickstart_recipe(), run=tmp_path, fresh=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_run_killed_before_its_recipe_was_written_can_go_on(tmp_path):
    (tmp_path / "environment.json").write_text("{}")
    (tmp_path / ".recipe.yaml.1234.tmp").write_text("name: qu")
    result = limbeck.distill(quickstart_recipe(), run=tmp_path)
    assert (tmp_path / "recipe.yaml").exists()
    assert result.report.exists()


def test_other_objects_in_the_same_folder_are_refused(tmp_path):
    common = {"data": (TRAIN, TEST), "train": {"epochs": 1, "batch_size": 50}, "run": tmp_path / "run"}
    limbeck.distill(teacher=perfect(), student=network(4, 0), **common)
    with pytest.raises(InputError, match="another recipe"):
        limbeck.distill(teacher=network(8, 5), student=network(4, 0), **common)
    with pytest.raises(InputError, match="another recipe"):
        limbeck.distill(teacher=perfect(), student=network(4, 0), **(common | {"data": (TEST, TEST)}))


def test_a_student_whose_results_were_kept_is_returned_after_a_restart(tmp_path):
    recipe = quickstart_recipe()
    whole = limbeck.distill(recipe, run=tmp_path)
    expected = weights(whole.student)
    (tmp_path / "result.json").unlink()  # killed after the last seed, before the report
    again = limbeck.distill(recipe, run=tmp_path)
    assert again.student is not None
    assert not differ(again.student, expected)


def test_one_seed_makes_the_same_teacher_alone_and_in_an_ensemble(tmp_path):
    several = ensemble()
    several["teacher"][1]["train"] = several["teacher"][0]["train"]
    alone = {**several, "teacher": several["teacher"][1]}
    for name, values in (("several", several), ("alone", alone)):
        runner = Runner(from_recipe(Recipe.parse(values)), cache=tmp_path / name)
        runner.teacher(runner.parts.data(0), 0)
    found = {name: {path.name for path in (tmp_path / name).iterdir()} for name in ("several", "alone")}
    assert len(found["several"]) == 2
    assert len(found["alone"]) == 1
    assert found["alone"] < found["several"]


def quickstart_recipe() -> Recipe:
    return Recipe.parse(quickstart())
