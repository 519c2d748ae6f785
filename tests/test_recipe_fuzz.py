"""Valid recipes, broken in every way that we could think of: each ends with exit code 2 and one line that names a file, line or field; nothing stays.

A mutation takes a valid recipe and gives one that is wrong by construction, with the words one of which the message must contain.
"""

import copy
import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from limbeck.ingredients import from_recipe
from limbeck.recipe import Recipe
from limbeck.runner import Runner
from recipe_parts import BASES, MODULE, as_yaml, everything_in, limbeck, temporary_files_in

HUGE, NAN, INF = 10**30, float("nan"), float("inf")
COUNT = [-1, -HUGE, HUGE, 1.5, "many", [], {}, NAN, INF, [3], "0x10", ""]  # no whole number in a sensible range
SMALL = [value for value in COUNT if value != HUGE]  # where there is no largest
RATE = [-0.1, NAN, INF, -INF, HUGE, "fast", [], {}, "1/3", [0.1]]
SWITCH = ["maybe", 2, -1, [], {}, 0.5]
MAPPING = ["text", 3, [1], NAN, [[]], True]
SPEC = [3, [], {}, NAN, ["cnn"], True, {"args": {}}, {"name": 3}, {"name": ["x"]}, {"target": 3}, {"name": "x", "args": 3}, {"name": "x", "target": "y:z"}]

# field path → values that it cannot have; the paths exist in every recipe, or may be added to every recipe
FIELDS: dict[str, list[Any]] = {
    "name": [None, "", "a/b", "../up", ".hidden", "é", ["x"], {}, 7, "x" * 101, "a b", "a\nb", True],
    "seeds": [[], [-1], [2**62], [HUGE], [0, 0], [1.5], ["zero"], [None], {}, "zero", 3, None, [NAN], [[0]], list(range(1001))],
    "method": [None, "no_such_method", "os:getcwd", "math:pi", "no_such_package.x:y", "math:nope", ":", "os:", *SPEC],
    "student": [None, "cnn", 3, [], [1], {}],
    "student.model": [None, "no_such_model", "os:getcwd", "math:pi", "no_such_package.x:y", "math:nope", ":", "os:", ":path", "own_models:text", *SPEC],
    "student.weights": ["missing.safetensors", "", "/", "/dev/null", "junk.safetensors", "junk.pt", "other.pt", "\0", "x" * 5000, 3, [], {}],
    "student.seed": [-1, 2**62, 1.5, "x", [], HUGE],
    "teacher": [3, "cnn", [[]], [None], {}, {"weights": "x"}, [{"model": "mlp"}, 5]],
    "data": [None, [], "digits", 3, {}, {"train_size": 5}],
    "data.source": [
        "no_such_data",
        "math:pi",
        "os:getcwd",
        "no_such_package.x:y",
        {"name": "digits", "test_size": 0},
        {"name": "digits", "test_size": HUGE},
        None,
        *SPEC,
    ],
    "data.train_size": [0, 10**6, *COUNT],
    "data.test_size": [0, 10**6, *COUNT],
    "data.validation": [10**6, *COUNT],
    "data.labelled": [0, 10**6, *COUNT],
    "data.label_noise": [1.01, *RATE],
    "data.augment": MAPPING,
    "data.augment.crop": [257, *COUNT],
    "data.augment.flip": SWITCH,
    "data.augment.noise": [11, *RATE],
    "data.augment.cutout": [10**5, *COUNT],
    "data.augment.mixup": [101, *RATE],
    "data.augment.cutmix": [101, *RATE],
    "train": [None, {}, {"epochs": 1, "steps": 1}, {"batch_size": 3}, *MAPPING],
    "train.epochs": [10**7, *COUNT],
    "train.steps": [-1, HUGE, "many"],
    "train.batch_size": [0, 10**9, None, *COUNT],
    "train.accumulate": [0, 10**6, None, *COUNT],
    "train.clip_norm": [0, -1, NAN, INF, "x", [], {}],
    "train.precision": ["fp8", 16, [], {}, None, "bfloat16"],
    "train.ema": [1, 1.5, -0.1, NAN, "x", [], {}],
    "train.workers": [257, None, *COUNT],
    "train.sharding": ["ddp", 3, None, []],
    "train.log_every": [0, None, *SMALL],
    "train.evaluate_every": [None, *SMALL],
    "train.checkpoint_steps": [0, *SMALL],
    "train.checkpoint_minutes": [0, None, -1, NAN, "x", []],
    "train.keep": [0, 1001, None, *COUNT],
    "train.drop_last": [None, *SWITCH],
    "train.optimiser": [None, "sgd", *MAPPING],
    "train.optimiser.name": ["sdg", "lamb", 3, None, [], {}],
    "train.optimiser.lr": [None, 1e5, *RATE],
    "train.optimiser.momentum": [None, 1, 1.5, *RATE],
    "train.optimiser.weight_decay": [None, 1e4, *RATE],
    "train.optimiser.nesterov": [None, *SWITCH],
    "train.optimiser.betas": [None, 0.9, [0.9], [0.9, 0.99, 0.999], "x", [0.9, "x"], [0.9, NAN], {}],
    "train.optimiser.eps": [None, 0, -1, NAN, "x"],
    "train.optimiser.schedule": [None, "cosine", *MAPPING],
    "train.optimiser.schedule.name": ["cosin", 3, None, []],
    "train.optimiser.schedule.warmup": [1.5, None, *RATE],
    "train.optimiser.schedule.gamma": [0, 1.5, None, *RATE],
    "train.optimiser.schedule.milestones": [0.5, "x", ["x"], [NAN], None, {}],
    "evaluate": MAPPING,
    "evaluate.batch_size": [0, None, 10**9, *COUNT],
    "evaluate.latency": [None, *SWITCH],
    "evaluate.latency_repeats": [2, None, 10**9, *COUNT],
    "compare": MAPPING,
    "compare.alone": [None, *SWITCH],
    "threads": [0, 10**6, *COUNT],
    "device": ["gpu", "cuda:0", 3, None, []],
}
# of the method or model that a base has
KNOBS: dict[str, dict[str, list[Any]]] = {
    "quickstart": {
        "method.temperature": [0, None, *RATE],
        "method.weight": [1.5, None, *RATE],
        "student.model.widths": [None, "x", 8, [0], [-3], [1.5], [HUGE], [NAN], [4] * 9, {}],
    },
    "ensemble": {
        "teacher.0.model.hidden": [None, "x", 8, [0], [HUGE]],
        "teacher.1.seed": [-1, "x"],
        "teacher.0.train.optimiser.lr": RATE,
        "teacher.1.model": [[], 3, "no_such"],
    },
    "meal": {"method.mode": ["on", 3, None, "oficial"], "method.shrink": [0, 1, -1, NAN, "x"], "student.train": [{}, *MAPPING], "student.train.epochs": COUNT},
    "weight_align": {
        "method.classes_per_step": [0, -1, NAN, [5, 6], [5], [10, 0], "x"],
        "method.class_order": ["random", [0, 1], [0] * 10, 3],
        "method.memory": [-1, 1.5, "x"],
        "method.head": ["nowhere", 3, "features.0"],
        "student.model.width": COUNT,
        "student.model": [{"name": "target"}, {"target": "own_models:build", "args": {"wdth": 3}}],
    },
    "target": {"student.model.args": [3, [], "x", {"wdth": 3}, {"width": 0}], "student.model.target": ["own_models:bild", "own_model:build", "own_models", 3]},
}


@dataclass(frozen=True)
class Broken:
    """A recipe's content, and words one of which the message must contain."""

    content: bytes
    names: tuple[str, ...]


def at(values: Any, path: str) -> Any:
    for part in path.split("."):
        values = values[int(part)] if isinstance(values, list) else values[part]
    return values


def put(values: Any, path: str, value: Any) -> None:
    *way, last = path.split(".")
    for part in way:
        values = values[int(part)] if isinstance(values, list) else values.setdefault(part, {})
    values[int(last) if isinstance(values, list) else last] = value


def is_mapping_at(values: Any, path: str) -> bool:
    """Whether a field can be put at this path: what leads there is a mapping, or absent."""
    for part in path.split(".")[:-1]:
        if isinstance(values, dict) and part not in values:
            return True
        values = values[int(part)] if isinstance(values, list) else values[part]
        if not isinstance(values, dict | list):
            return False
    return True


def wrong_value(base: str, recipe: dict[str, Any], rng: random.Random) -> Broken:
    """A field gets a value that it cannot have."""
    table = FIELDS | KNOBS[base]
    path = rng.choice([p for p in table if is_mapping_at(recipe, p)])
    value = rng.choice(table[path])
    put(recipe, path, value)
    return Broken(as_yaml(recipe).encode(), named(path))


def named(path: str) -> tuple[str, ...]:
    """A field path, or (where a whole section is wrong) any field in it."""
    return (path, path.replace("model.args", "model"), path.replace("model.target", "model"))


def misspelt_key(base: str, recipe: dict[str, Any], rng: random.Random) -> Broken:
    """A key somewhere in the recipe is misspelt."""
    del base
    places = [p for p in key_paths(recipe) if not p.endswith(".args")]
    path = rng.choice(places)
    parent, _, key = path.rpartition(".")
    holder = at(recipe, parent) if parent else recipe
    position = rng.randrange(len(key))
    new = rng.choice([key[:position] + key[position] + key[position:], key[:position] + "q" + key[position:], key + "s_", key.upper() + "X"])
    holder[new] = holder.pop(key)
    return Broken(as_yaml(recipe).encode(), (new, key))


def key_paths(values: Any, path: str = "") -> list[str]:
    found = []
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        here = f"{path}.{key}" if path else str(key)
        found += [here] if isinstance(values, dict) else []
        found += key_paths(value, here)
    return found


def missing_key(base: str, recipe: dict[str, Any], rng: random.Random) -> Broken:
    """A field that is needed is not there."""
    needed = ["name", "method", "student", "data", "train", "student.model", "data.source", "train.epochs"]
    needed += ["teacher"] if base in ("quickstart", "ensemble", "meal", "target") else []
    path = rng.choice(needed)
    parent, _, key = path.rpartition(".")
    del (at(recipe, parent) if parent else recipe)[key]
    return Broken(as_yaml(recipe).encode(), (path, "train"))


def not_utf8(base: str, recipe: dict[str, Any], rng: random.Random) -> Broken:
    """A byte that UTF-8 does not know, anywhere; or another encoding."""
    del base
    text = as_yaml(recipe)
    if rng.random() < 0.2:
        return Broken(text.encode("utf-16"), ("recipe.yaml",))
    content = text.encode()
    position = rng.randrange(len(content) + 1)
    content = content[:position] + bytes([rng.choice([0xFF, 0xC0, 0xFE, 0xF8])]) + content[position:]
    return Broken(content, (f"recipe.yaml:{content.count(10, 0, position) + 1}:",))


def binary_junk(base: str, recipe: dict[str, Any], rng: random.Random) -> Broken:
    """No text at all, or text with control characters."""
    del base
    junk = rng.randbytes(rng.randrange(1, 4000))
    content = rng.choice([junk + b"\xff", b"\x00" * 100, as_yaml(recipe).encode().replace(b"e", b"\x07", 1), b"PK\x03\x04" + junk, b"\x1f\x8b\x08" + junk])
    return Broken(content, ("recipe.yaml",))


SYNTAX = [
    "  ]\n",
    "}\n",
    "\t- x\n",
    "a: b: c\n",
    "- item\n",
    "just words\n",
    '"open\n',
    "key: [1, 2\n",
    "*nowhere\n",
    "k: *nowhere\n",
    "%TAG\n",
    "@x: 1\n",
    "---\nsecond: document\n",
    "!!bad",
]


def syntax_error(base: str, recipe: dict[str, Any], rng: random.Random) -> Broken:
    """A line that YAML does not take."""
    del base
    lines = as_yaml(recipe).splitlines(keepends=True)
    starts = [i for i, line in enumerate(lines) if line[0].isalpha()]
    place = rng.choice(starts[1:])
    lines.insert(place, rng.choice(SYNTAX))
    return Broken("".join(lines).encode(), ("recipe.yaml:",))


OTHER = [
    "", "\n\n", "# only a comment\n", "[]", "- a\n- b\n", "text", "3", "null", "~", "true", "---\n---\n",
    "[" * 5000, "{a: " * 3000 + "1" + "}" * 3000, "- " * 3000, "a:\n" + "".join("  " * i + "a:\n" for i in range(1, 300)),
    "a: &a [*a]\n", "&a {b: *a}\n", "name: &n {x: *n}\n",
    "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{chr(97 + i)}: &{chr(97 + i)} [{','.join(['*' + chr(96 + i)] * 9)}]\n" for i in range(1, 12)),
    "? [1, 2]\n: 3\n", "? {a: 1}\n: 3\n", "1: 2\n", "name: !!python/object/apply:os.system ['touch owned']\n", "name: !!python/name:os.system\n",
    "name: !!int x\n", "name: !!float x\n", "name: 2020-99-99\n", "name: !!timestamp x\n", "name: !!binary '*'\n", "name: !unknown x\n",
    "name: !!bool x\n", "name: !!int ''\n", "name: !!omap 3\n", "name: !!pairs [3]\n", "name: !!set {a, b}\n",
    "<<: 3\n", "<<: [1]\n", "name: " + "9" * 5000 + "\n", "name: 1e999\n", "true: 1\n", "null: 1\n", "=: 1\n",
]  # fmt: skip


def another_file(base: str, recipe: dict[str, Any], rng: random.Random) -> Broken:
    """Something that is no recipe: empty, a list, bombs, recursion, tags."""
    del base, recipe
    return Broken(rng.choice(OTHER).encode(), ("recipe.yaml",))


def hostile_lines(base: str, recipe: dict[str, Any], rng: random.Random) -> Broken:
    """A valid recipe with one hostile line more."""
    del base
    line, name = rng.choice([
        ("name: again\n", "name"), ("zz: &z [*z]\n", "recipe.yaml"), ("1: 2\n", "1"), ("null: 2\n", "recipe.yaml"), ("? [a]\n: 1\n", "recipe.yaml"),
        ("zz: !!python/name:os.system\n", "recipe.yaml"),
        ("surrogate: \"\\ud800\"\n", "recipe.yaml"), ("zz: ${NO_SUCH_VARIABLE}\n", "NO_SUCH_VARIABLE"), ("<<: {zz: 1}\n", "zz"),
        ("threads: &n 1\nseed: *n\n", "seed"), ("train.epochs: 3\n", "train.epochs"), ("x: [" + "a," * 50_000 + "]\n", "x"),
    ])  # fmt: skip
    return Broken((as_yaml(recipe) + line).encode(), (name,))


def does_not_fit(base: str, recipe: dict[str, Any], rng: random.Random) -> Broken:
    """Everything is well formed, and nothing fits: shapes, classes, files, sizes, memory."""
    student_or_teacher = "student" if base == "weight_align" or rng.random() < 0.5 else "teacher.0" if isinstance(recipe.get("teacher"), list) else "teacher"
    model, where = f"{student_or_teacher}.model", student_or_teacher.split(".")[0]
    cases: list[tuple[str, Any, tuple[str, ...]]] = [
        (model, {"name": "mlp", "hidden": [8], "num_classes": 7}, (where,)),
        (model, {"name": "mlp", "hidden": [8], "input_shape": [1, 28, 28]}, (where,)),
        (model, {"name": "cnn", "widths": [8], "input_shape": [3, 8, 8]}, (where,)),
        (model, {"name": "cnn", "widths": [8, 8, 8, 8, 8]}, (model,)),
        (model, {"name": "resnet_cifar", "depth": 21}, (model,)),
        (model, {"name": "torchvision", "model": "resnet18"}, (model,)),
        (model, {"name": "timm", "model": "no_such_model"}, (model,)),
        (model, {"name": "mlp", "hidden": [8], "activation": "rely"}, (model,)),
        (model, {"target": "torch.nn:Linear", "args": {"in_features": 3, "out_features": 10}}, (where,)),
        (model, {"target": "torch.nn:Identity"}, (where,)),
        (model, {"name": "mlp", "hidden": [65536, 65536, 65536, 65536]}, (model,)),
        (model, {"name": "convnet3", "width": 65536}, (model,)),
        (model, {"name": "resnet20", "width": 65536}, (model,)),
        (model, {"name": "feature_cnn", "width": 65536, "dim": 65536}, (model,)),
        (f"{student_or_teacher}.weights", "other.pt", (f"{where}.", "other.pt")),
        (f"{student_or_teacher}.weights", "classes.pt", (f"{where}.", "classes.pt")),
        (f"{student_or_teacher}.weights", "junk.safetensors", ("junk.safetensors",)),
        (f"{student_or_teacher}.weights", "junk.pt", ("junk.pt",)),
        (f"{student_or_teacher}.weights", "nowhere/w.pt", ("nowhere/w.pt",)),
        ("data.source", {"name": "fashion_mnist", "folder": "nowhere"}, ("nowhere",)),
        ("data.source", {"name": "fashion_mnist", "folder": "."}, ("data.source",)),
        ("data.source", {"name": "cifar10", "folder": "nowhere"}, ("data.source",)),
        ("data.source", {"name": "image_folder", "folder": "nowhere", "size": 8}, ("nowhere",)),
        ("data.source", {"name": "image_folder", "folder": "images", "size": 8}, ("images",)),
        ("data.source", {"name": "image_folder", "folder": "images", "size": HUGE}, ("data.source",)),
        ("data.source", {"name": "tensors", "train": "nowhere.npz", "test": "junk.npz"}, ("nowhere.npz",)),
        ("data.source", {"name": "tensors", "train": "junk.npz", "test": "junk.npz"}, ("junk.npz",)),
        ("data.source", {"name": "tensors", "train": "strange.npz", "test": "strange.npz"}, ("strange.npz",)),
        ("data.source", {"name": "tensors", "train": "flat.npz", "test": "flat.npz"}, ("data", "student", "teacher")),
        ("data.source", {"name": "tensors", "train": 3, "test": []}, ("data.source",)),
        ("data.source", {"name": "digits", "test_siz": 100}, ("test_siz",)),
        ("data.source", {"name": "digits", "test_size": "x"}, ("data.source",)),
        ("data.source", {"target": "own_models:build", "args": {"num_classes": 3, "input_shape": [1, 8, 8]}}, ("data.source",)),
        ("data", {"source": {"name": "digits"}, "train_size": 1348}, ("data",)),
        ("data", {"source": {"name": "digits"}, "train_size": 100, "validation": 100}, ("data",)),
        ("data", {"source": {"name": "digits"}, "train_size": 100, "labelled": 101}, ("data",)),
        ("train", {"epochs": 1, "batch_size": 5000, "drop_last": True}, ("batch_size",)),
        ("method", {"name": "kd", "temprature": 3}, ("method.temprature",)),
        ("method", {"name": "kd", "args": {"temperature": 3, "weihgt": 1}}, ("method.weihgt",)),
        ("method", {"name": "self_distillation", "rounds": 3, "alpha": [0.5]}, ("method",)),
        ("method", {"name": "quantized_distillation", "bits": 0}, ("method.bits",)),
        ("method", {"name": "weight_align", "head": "nowhere", "classes_per_step": 2}, ("head", "labelled")),
    ]  # fmt: skip
    path, value, names = rng.choice(cases)
    put(recipe, path, value)
    return Broken(as_yaml(recipe).encode(), names)


MUTATIONS: dict[str, tuple[Callable[[str, dict[str, Any], random.Random], Broken], int]] = {
    "wrong_value": (wrong_value, 12),
    "misspelt_key": (misspelt_key, 4),
    "missing_key": (missing_key, 2),
    "not_utf8": (not_utf8, 2),
    "binary_junk": (binary_junk, 1),
    "syntax_error": (syntax_error, 3),
    "another_file": (another_file, 4),
    "hostile_lines": (hostile_lines, 2),
    "does_not_fit": (does_not_fit, 6),
}
WEIGHTED = [name for name, (_, weight) in MUTATIONS.items() for _ in range(weight)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with things that recipes may name, as the working directory; a model of one's own can be imported."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "own_models.py").write_text(MODULE)
    rng = np.random.default_rng(0)
    for name in ("junk.safetensors", "junk.pt", "junk.npz"):
        (folder / name).write_bytes(rng.bytes(200))
    torch.save(torch.nn.Linear(5, 3).state_dict(), folder / "other.pt")
    torch.save({"features.0.weight": torch.zeros(4, 1, 3, 3), "head.weight": torch.zeros(7, 64), "head.bias": torch.zeros(7)}, folder / "classes.pt")
    np.savez(folder / "strange.npz", inputs=np.zeros((4, 2), np.complex64), targets=np.zeros(3, np.int64))
    np.savez(folder / "flat.npz", inputs=np.zeros((40, 6), np.float32), targets=np.arange(40) % 2)
    for split in ("train", "test"):
        (folder / "images" / split / "one").mkdir(parents=True)
        (folder / "images" / split / "one" / "x.png").write_bytes(b"no image")
    before, modules = os.getcwd(), set(sys.modules)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    os.chdir(before)
    for name in set(sys.modules) - modules:
        if name.startswith("own_models"):
            del sys.modules[name]


def check(place: Path, broken: Broken) -> None:
    """The recipe is refused as it should be, and leaves nothing behind."""
    path = place / "recipe.yaml"
    path.write_bytes(broken.content)
    with temporary_files_in(place / "temporary"):
        before = everything_in(place)
        called = limbeck("distill", "recipe.yaml", "--quiet")
        assert called.code == 2, called
        left = {name for name in everything_in(place) - before if "torchinductor" not in name}  # torch makes that folder when it is imported
    assert not left, left
    assert one_paragraph(called.err)
    assert any(name in called.err for name in broken.names), (broken.names, called.err)
    assert not called.out


def one_paragraph(text: str) -> bool:
    line = text.removesuffix("\n")
    return line.startswith("limbeck: ") and "\n" not in line and "Traceback" not in line and 20 < len(line) < 1500


@pytest.mark.parametrize("base", BASES)
def test_the_recipes_that_are_mutated_are_valid(place, base):
    recipe = Recipe.parse(yaml.safe_load(as_yaml(BASES[base]())))
    Runner(from_recipe(recipe), None).check()


@settings(max_examples=400, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(base=st.sampled_from(list(BASES)), mutation=st.sampled_from(WEIGHTED), seed=st.integers(0, 2**32))
def test_a_mutated_recipe_is_refused(place, base, mutation, seed):
    check(place, MUTATIONS[mutation][0](base, copy.deepcopy(BASES[base]()), random.Random(seed)))


def test_huge_models_are_refused_before_they_take_memory(place):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for model in ({"name": "mlp", "hidden": [65536] * 4}, {"name": "convnet3", "width": 65536}, {"name": "resnet110", "width": 65536}):
        recipe = BASES["quickstart"]()
        recipe["student"]["model"] = model
        check(place, Broken(as_yaml(recipe).encode(), ("student.model.args",)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


SHELL: list[tuple[bytes | None, list[str], str]] = [
    (None, [], "there is no such recipe"),
    (b"name: \xff", [], "recipe.yaml:1: the recipe is not UTF-8 text"),
    (b"a: &a [*a]", [], "recipe.yaml: the nesting is deeper than 50"),
    (as_yaml(BASES["quickstart"]()).encode(), ["--set", "student.model.widths=[65536, 65536, 65536]"], "student.model.args"),
    (as_yaml(BASES["quickstart"]()).encode(), ["--set", "student.weights=nowhere.pt"], "student.weights.nowhere.pt: there is no such file"),
]


@pytest.mark.parametrize(("content", "arguments", "words"), SHELL, ids=["missing", "bytes", "recursion", "huge", "weights"])
def test_from_the_shell(tmp_path, content, arguments, words):
    if content is not None:
        (tmp_path / "recipe.yaml").write_bytes(content)
    before = everything_in(tmp_path)
    command = [sys.executable, "-m", "limbeck", "distill", "recipe.yaml", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stdout) == (2, "")
    assert one_paragraph(done.stderr)
    assert words in done.stderr
    assert everything_in(tmp_path) == before
