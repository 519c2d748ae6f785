"""Small recipes, and the command line called in this process: shared by the tests of recipes, runs and the command line."""

import contextlib
import copy
import io
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

from limbeck import cli

TRAIN = {"epochs": 1, "batch_size": 64, "optimiser": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "schedule": {"name": "cosine"}}}
MODULE = '''\
"""A person's own model."""
from torch import nn


def build(num_classes, input_shape, width=4):
    return nn.Sequential(nn.Conv2d(input_shape[0], width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, num_classes))


def text(num_classes):
    return "no module"
'''


@dataclass(frozen=True)
class Called:
    """What a command left: exit code, standard output and error."""

    code: int
    out: str
    err: str


def limbeck(*arguments: str | Path) -> Called:
    """Call the command line's entry point as the shell would, in this process. Whatever is no SystemExit goes through, as a traceback would."""
    out, err = io.StringIO(), io.StringIO()
    with mock.patch.object(sys, "argv", ["limbeck", *map(str, arguments)]), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
            code: Any = 0
        except SystemExit as stop:
            code = stop.code or 0
    return Called(int(code), out.getvalue(), err.getvalue())


def quickstart() -> dict[str, Any]:
    """kd on digits with few labels, a teacher trained here."""
    return {
        "name": "quick",
        "seeds": [0],
        "method": {"name": "kd", "temperature": 4.0},
        "teacher": {"model": {"name": "cnn", "widths": [8]}, "seed": 0, "train": copy.deepcopy(TRAIN)},
        "student": {"model": {"name": "cnn", "widths": [4]}},
        "data": {"source": {"name": "digits"}, "train_size": 200, "test_size": 100, "labelled": 50, "validation": 20, "augment": {"crop": 1}},
        "train": copy.deepcopy(TRAIN),
        "evaluate": {"latency_repeats": 3},
    }


def ensemble() -> dict[str, Any]:
    """kd from two teachers of different shape."""
    recipe = quickstart()
    recipe["name"] = "ensemble"
    recipe["teacher"] = [
        {"model": {"name": "mlp", "hidden": [16]}, "train": copy.deepcopy(TRAIN)},
        {"model": {"name": "cnn", "widths": [4, 8]}, "seed": 3},
    ]
    return recipe


def meal() -> dict[str, Any]:
    """meal_v2: a student trained first, an ensemble, cutmix."""
    recipe = ensemble()
    recipe["name"] = "meal"
    recipe["method"] = {"name": "meal_v2", "mode": "adversarial", "shrink": 8}
    recipe["student"]["train"] = copy.deepcopy(TRAIN)
    recipe["data"]["augment"] = {"cutmix": 1.0, "flip": False}
    return recipe


def weight_align() -> dict[str, Any]:
    """A stream of tasks, no teacher."""
    recipe = quickstart()
    del recipe["teacher"], recipe["data"]["labelled"]
    recipe["name"] = "stream"
    recipe["method"] = {"name": "weight_align", "classes_per_step": 5, "memory": 20}
    recipe["student"] = {"model": {"name": "feature_cnn", "width": 4, "dim": 8}}
    return recipe


def target() -> dict[str, Any]:
    """A model of one's own, by import path (`own_models.py` with MODULE in it must be importable)."""
    recipe = quickstart()
    recipe["name"] = "own"
    recipe["student"] = {"model": {"target": "own_models:build", "args": {"width": 3}}}
    return recipe


BASES = {"quickstart": quickstart, "ensemble": ensemble, "meal": meal, "weight_align": weight_align, "target": target}


def as_yaml(recipe: Any) -> str:
    """In block style, a field a line."""
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=10_000)


def write(folder: Path, recipe: dict[str, Any], name: str = "recipe.yaml") -> Path:
    """A recipe as a file."""
    path = folder / name
    path.write_text(as_yaml(recipe), encoding="utf-8")
    return path


def everything_in(folder: Path) -> set[str]:
    """Names of all files and folders below, `__pycache__` apart."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if "__pycache__" not in p.parts}


@contextlib.contextmanager
def temporary_files_in(folder: Path):
    """`tempfile` puts its files into `folder` meanwhile, where a test can see what is left of them."""
    folder.mkdir(exist_ok=True)
    with mock.patch.object(tempfile, "tempdir", str(folder)):
        yield folder


def fast(method: str, folder: Path) -> Sequence[str]:
    """Settings that make the recipe of `limbeck new` tiny."""
    settings = ["seeds=[0]", "data.test_size=60", "train.epochs=1", "evaluate.latency_repeats=3"]
    text = (folder / f"{method}.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    if "networks" in values.get("evaluate", {}):
        return [part for setting in _fast_set(values) for part in ("--set", setting)]
    if values["data"]["source"]["name"].startswith("python_manual"):
        return [part for setting in _fast_text(values) for part in ("--set", setting)]
    if "student" not in values or "denoiser" in str(values["student"]["model"]["name"]):
        settings = ["train.steps=4", "train.batch_size=16", "data.source.count=200", "data.source.test=60", "evaluate.samples=50", "evaluate.latency_repeats=3"]
        settings += ["teacher.train.steps=3"] if "teacher" in values else []
        settings += {"disback": ["method.stage1_steps=2", "method.record_every=1", "method.iterations_per_node=1"]}.get(method, [])
        return [part for setting in settings for part in ("--set", setting)]
    if "record" in values.get("teacher", {}):  # what is recorded must hold what is trained on
        recorded = folder / f"{method}_record.yaml"
        recorded.write_text(recorded.read_text(encoding="utf-8").replace("epochs: 20", "epochs: 1").replace("[32, 64, 128]", "[4]"), encoding="utf-8")
    else:
        settings += ["data.train_size=150", "data.validation=40"]
        settings += ["teacher.train.epochs=1", "teacher.model.widths=[4]"] if "teacher" in values else []
    settings += {"robust_active": ["data.labelled=60", "method.budget=10"]}.get(method, [])
    settings += ["student.train.epochs=1"] if "train" in values["student"] else []
    return [part for setting in settings for part in ("--set", setting)]


def _fast_text(values: Mapping[str, Any]) -> list[str]:
    """The same for methods that read text."""
    settings = ["seeds=[0]", "data.train_size=120", "data.test_size=40", "data.validation=20", "evaluate.latency_repeats=3"]
    trainings = ["train", *(["teacher.train"] if "teacher" in values else [])]
    unit = "steps" if "steps" in values["train"] else "epochs"
    return settings + [f"{training}.{unit}={2 if unit == 'steps' else 1}" for training in trainings]


def _fast_set(values: Mapping[str, Any]) -> list[str]:
    """The same for methods that make data sets."""
    settings = ["train.steps=2", "data.train_size=200", "data.validation=40", "data.test_size=60", "evaluate.networks=1"]
    teacher, evaluate = values.get("teacher", {}), values["evaluate"]
    settings += ["teacher.experts.count=1"] if "experts" in teacher else ["teacher.train.epochs=1"] if "train" in teacher else []
    settings += ["evaluate.training.epochs=2"] if "epochs" in (evaluate.get("training") or {}) else []
    settings += ["evaluate.full_training.epochs=1"] if "full_training" in evaluate else []
    shorter = ("pretraining.epochs=2", "fine_tuning.steps=2", "labels_per_class=4")
    settings += [f"evaluate.transfer.{setting}" for setting in shorter] if "transfer" in evaluate else []
    return settings + (["method.life=5"] if "life" in values["method"] else [])
