import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.errors import InputError
from limbeck.ingredients import make_method
from limbeck.recipe import Recipe, expand, line_of, override, parse_yaml
from recipe_parts import BASES, as_yaml, ensemble, meal, quickstart, write


def refusal(call, *arguments, **named) -> InputError:
    with pytest.raises(InputError) as caught:
        call(*arguments, **named)
    return caught.value


# ---- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
def test_a_recipe_reads_as_it_parses(tmp_path, base):
    values = BASES[base]()
    assert Recipe.read(write(tmp_path, values)) == Recipe.parse(values)


def test_defaults_and_short_forms():
    recipe = Recipe.parse({"name": "x", "method": "kd", "student": {"model": "resnet20"}, "data": {"source": "digits"}, "train": {"steps": 3}})
    assert recipe.seeds == (0,)
    assert recipe.teacher == ()
    assert recipe.compare.alone
    assert recipe.method.name == "kd"
    assert recipe.data.source.name == "digits"
    one = Recipe.parse({**quickstart(), "teacher": {"model": {"target": "a.b:c"}}})
    assert [t.model.target for t in one.teacher] == ["a.b:c"]
    assert one.teacher[0].seed == 0  # one teacher for all seeds
    assert one.student.seed is None  # a student for each
    assert Recipe.parse({**quickstart(), "teacher": {"model": "cnn", "seed": None}}).teacher[0].seed is None
    assert Recipe.parse({**quickstart(), "teacher": None}).teacher == ()


def test_arguments_beside_a_name_are_its_arguments():
    recipe = Recipe.parse(quickstart())
    assert recipe.student.model.args == {"widths": [4]}
    assert recipe.method.args == {"temperature": 4.0}


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("1E+2", 100.0), ("-.5", -0.5), ("1_000.5", 1000.5), (".inf", float("inf")), ("7", 7), ("1e", "1e"), ("e3", "e3"), ("1.2.3", "1.2.3")],
)
def test_numbers_in_yaml(text, value):
    found = parse_yaml(f"x: {text}\n", "f")[0]["x"]
    assert found == value
    assert type(found) is type(value)


# ---- where the error is ---------------------------------------------------------------------------------------------


def test_an_error_names_file_line_and_field(tmp_path):
    path = write(tmp_path, quickstart())
    lines = path.read_text().splitlines()
    number = next(i for i, line in enumerate(lines, 1) if line == "train:") + 4
    assert lines[number - 1].strip().startswith("name: sgd")
    lines[number] = "    lr: fast"
    path.write_text("\n".join(lines))
    assert str(refusal(Recipe.read, path)).startswith(f"{path}:{number + 1}, field 'train.optimiser.lr': Input should be a valid number")


LEVELS = {
    "sedes": "seeds", "teacher.0.modle": "model", "teacher.1.wieghts": "weights", "student.trian": "train", "student.train.epoch": "epochs",
    "data.train_sise": "train_size",
    "data.augment.cut_mix": "cutmix", "train.batchsize": "batch_size", "train.optimiser.momentun": "momentum", "train.optimiser.schedule.warm_up": "warmup",
    "evaluate.latncy": "latency", "compare.alon": "alone", "teacher.0.train.optimiser.nestrov": "nesterov",
}  # fmt: skip


@pytest.mark.parametrize("path", LEVELS)
def test_a_misspelt_key_gets_a_suggestion_at_every_level(tmp_path, path):
    recipe = meal()
    holder = recipe
    *way, key = path.split(".")
    for part in way:
        holder = holder[int(part)] if isinstance(holder, list) else holder.setdefault(part, {})
    holder[key] = 1
    file = write(tmp_path, recipe)
    number = next(i for i, line in enumerate(file.read_text().splitlines(), 1) if re.match(rf"[\s-]*{key}:", line))
    error = refusal(Recipe.read, file)
    assert str(error) == f"{file}:{number}, field '{path}': unknown field '{key}'. Did you mean '{LEVELS[path]}'?"


def test_a_misspelt_key_of_a_single_teacher_is_named_as_it_was_written(tmp_path):
    recipe = quickstart()
    recipe["teacher"]["wieghts"] = "x"
    assert "field 'teacher.wieghts'" in str(refusal(Recipe.read, write(tmp_path, recipe)))


@pytest.mark.parametrize(
    ("component", "message"),
    [
        ({"name": "kd", "temprature": 3}, r"^method\.temprature: unknown field 'temprature'\. Did you mean 'temperature'\?"),
        ({"name": "kd", "temperature": -1}, r"^method\.temperature: Input should be greater than 0 \(given: -1\)"),
        ({"name": "kd", "temperature": "hot"}, r"^method\.temperature: "),
        ({"name": "meal_v2", "discriminator_optimiser": {"lr": -1}}, r"^method\.discriminator_optimiser\.lr: "),
        ({"name": "meal_v2", "discriminator_optimiser": {"nmae": "sgd"}}, r"^method\.discriminator_optimiser\.nmae: .*Did you mean 'name'"),
        ({"name": "kdd"}, r"^method\.name: unknown method 'kdd'\. Did you mean 'kd'\?"),
        ({"target": "limbeck.models.small:mlp"}, r"^method\.target: 'limbeck\.models\.small:mlp' is not a method"),
    ],
)
def test_a_wrong_knob_of_the_method_is_named(component, message):
    recipe = Recipe.parse({**quickstart(), "method": component})
    assert re.search(message, str(refusal(make_method, recipe.method)))


def test_syntax_errors_have_a_line(tmp_path):
    path = tmp_path / "r.yaml"
    for text, line in [
        ("name: x\n\tseeds: [0]\n", 2),
        ("name: x\nseeds: [0\nmethod: kd\n", 3),
        ("name: x\nname: y\n", 2),
        ("a: {b: 1, c: 2, b: 3}\n", 1),
        ("- a\n", 1),
    ]:
        path.write_text(text)
        assert str(refusal(Recipe.read, path)).startswith(f"{path}:{line}: "), text
    path.write_bytes(b"name: x\nseeds: [0]\n# caf\xe9\n")
    assert str(refusal(Recipe.read, path)) == f"{path}:3: the recipe is not UTF-8 text. Save it as UTF-8."
    path.write_bytes(b"x" * (4 * 2**20 + 1))
    assert "larger than 4 MiB" in str(refusal(Recipe.read, path))
    assert "there is no such recipe" in str(refusal(Recipe.read, tmp_path / "none.yaml"))
    assert "cannot be read" in str(refusal(Recipe.read, tmp_path))


def test_a_bomb_of_aliases_is_refused_before_it_explodes():
    bomb = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 30))
    assert "more than 100,000 fields" in str(refusal(parse_yaml, bomb, "f"))
    assert "deeper than 50" in str(refusal(parse_yaml, "a: &a [*a]\n", "f"))


def test_half_a_surrogate_pair_is_refused_before_it_meets_an_encoder():
    error = refusal(parse_yaml, 'name: x\ndata:\n  source: {name: image_folder, folder: "\\ud800"}\n', "f")
    assert str(error) == "f:3: half a surrogate pair is no character."


def test_aliases_and_merge_keys_are_plain_yaml():
    values, lines = parse_yaml("a: &t {x: 1}\nb: *t\nc:\n  <<: *t\n  y: 2\n", "f")
    assert values == {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1, "y": 2}}
    assert lines["c.y"] == 5


def test_line_of_the_nearest_part():
    lines = {"a": 1, "a.b": 2, "m.widths": 7}
    assert line_of(lines, "a.b.c.d") == 2
    assert line_of(lines, "m.args.widths") == 7
    assert line_of(lines, "z") is None


# ---- overrides and variables ----------------------------------------------------------------------------------------


def test_settings_override_fields(tmp_path):
    path = write(tmp_path, ensemble())
    settings = [
        "train.epochs=3",
        "teacher.1.seed=null",
        "method.temperature=1e0",
        "seeds=[4, 5]",
        "data.augment.flip=true",
        "train.optimiser.schedule={name: linear, warmup: 0.1}",
    ]
    recipe = Recipe.read(path, settings)
    assert recipe.train.epochs == 3
    assert recipe.teacher[1].seed is None
    assert recipe.method.args["temperature"] == 1.0
    assert recipe.seeds == (4, 5)
    assert recipe.data.augment.flip
    assert recipe.data.augment.crop == 1
    assert recipe.train.optimiser.schedule.warmup == 0.1
    assert recipe.student == Recipe.read(path).student


def test_settings_do_not_touch_what_they_were_given():
    values = ensemble()
    before = as_yaml(values)
    override(values, ["train.epochs=3", "teacher.0.model.hidden.0=5", "new.deep.path=1"])
    assert as_yaml(values) == before


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.epochs", "is not a setting"),
        ("=3", "is not a setting"),
        ("train.epochs=[1", "not YAML"),
        ("train.epochs=&a [*a]", "deeper than 50"),
        ("train.epochs=!!python/name:os.system", "not YAML"),
        ("train.epochs.x=3", "'train.epochs' is not a mapping"),
        ("teacher.7.seed=3", "the list has no entry '7'"),
        ("teacher.x.seed=3", "the list has no entry 'x'"),
        ("train.epoch=3", "field 'train.epoch': unknown field 'epoch'. Did you mean 'epochs'?"),
        ("train.epochs=many", "field 'train.epochs'"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, setting, message):
    assert message in str(refusal(Recipe.read, write(tmp_path, ensemble()), [setting]))


def test_environment_variables_are_put_in(monkeypatch):
    monkeypatch.setenv("LIMBECK_TEST_FOLDER", "/some/where")
    recipe = {**quickstart(), "student": {"model": {"name": "cnn", "widths": [4]}, "weights": "${LIMBECK_TEST_FOLDER}/w.pt"}}
    assert Recipe.parse(recipe).student.weights == "/some/where/w.pt"
    recipe["data"]["source"] = {"name": "image_folder", "folder": "a${LIMBECK_TEST_FOLDER}${LIMBECK_TEST_FOLDER}", "size": 3}
    assert Recipe.parse(recipe).data.source.args["folder"] == "a/some/where/some/where"
    assert expand("cost: $5 ${not a name}") == "cost: $5 ${not a name}"
    recipe["student"]["weights"] = "${LIMBECK_NOT_SET}"
    assert str(refusal(Recipe.parse, recipe)) == "student.weights: the environment variable LIMBECK_NOT_SET is not set. export LIMBECK_NOT_SET=…"


# ---- the resolved recipe --------------------------------------------------------------------------------------------

FLOAT = st.floats(1e-8, 1.0)
SCHEDULE = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["constant", "cosine", "linear", "step"]),
        "warmup": FLOAT,
        "milestones": st.lists(FLOAT, max_size=2),
        "gamma": FLOAT,
        "final": FLOAT,
    },
)
OPTIMISER = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["sgd", "adam", "adamw"]),
        "lr": FLOAT,
        "momentum": st.floats(0, 0.99),
        "nesterov": st.booleans(),
        "schedule": SCHEDULE,
        "eps": FLOAT,
    },
)
# fmt: off
LENGTH = st.one_of(st.fixed_dictionaries({"epochs": st.integers(0, 10**6)}), st.fixed_dictionaries({"steps": st.integers(0, 10**12)}))
TRAIN = st.builds(
    lambda length, rest: {**length, **rest},
    LENGTH,
    st.fixed_dictionaries({}, optional={
        "batch_size": st.integers(1, 10**7), "accumulate": st.integers(1, 100), "optimiser": OPTIMISER, "clip_norm": st.none() | FLOAT,
        "precision": st.sampled_from(["no", "bf16", "fp16"]), "ema": st.none() | st.floats(0, 0.9999), "workers": st.integers(0, 8),
        "checkpoint_steps": st.none() | st.integers(1, 10**6), "keep": st.integers(1, 9), "drop_last": st.booleans(),
    }),
)
TEXT = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="$\x85\u2028\u2029\ufeff"), max_size=8)  # PyYAML loses these line ends itself
LEAF = st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats(allow_nan=False, allow_infinity=False) | TEXT
ARGS = st.dictionaries(TEXT, LEAF | st.lists(LEAF, max_size=2) | st.dictionaries(TEXT, LEAF, max_size=2), max_size=2)
COMPONENT = st.one_of(st.fixed_dictionaries({"name": TEXT}, optional={"args": ARGS}), st.fixed_dictionaries({"target": TEXT}, optional={"args": ARGS}))
SEED = st.integers(0, 2**62 - 1)
MODEL = st.fixed_dictionaries({"model": COMPONENT}, optional={"weights": st.none() | TEXT, "train": TRAIN, "seed": st.none() | SEED})
AUGMENT = st.fixed_dictionaries({}, optional={"crop": st.integers(0, 256), "mixup": FLOAT})
COUNT = st.none() | st.integers(1, 9)
DATA = st.fixed_dictionaries({"source": COMPONENT}, optional={"train_size": COUNT, "labelled": COUNT, "label_noise": FLOAT, "augment": AUGMENT})
RECIPE = st.fixed_dictionaries(
    {"name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True), "method": COMPONENT, "student": MODEL, "data": DATA, "train": TRAIN},
    optional={
        "teacher": MODEL | st.lists(MODEL, max_size=2), "seeds": st.lists(SEED, min_size=1, max_size=3, unique=True),
        "threads": st.none() | st.integers(1, 64), "device": st.sampled_from(["auto", "cpu"]),
    },
)
# fmt: on


@settings(max_examples=50, deadline=None)
@given(RECIPE)
def test_the_resolved_recipe_is_the_recipe(values):
    recipe = Recipe.parse(values)
    text = recipe.to_yaml()
    assert Recipe.parse(yaml.safe_load(text)) == recipe
    assert Recipe.parse(parse_yaml(text, "f")[0]) == recipe
    assert Recipe.parse(parse_yaml(text, "f")[0]).to_yaml() == text


@pytest.mark.parametrize("text", ["1e3", "1E-5", "1_0.5", "on", "null", "~", "2020-01-01", "0x10", ".inf", "é\n", "a: b", "# x", "", " ", "1:30"])
def test_texts_that_look_like_something_else_stay_texts(tmp_path, text):
    recipe = Recipe.parse({**quickstart(), "method": {"name": "kd", "args": {"reduction": text}}})
    (tmp_path / "r.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe.read(tmp_path / "r.yaml") == recipe
    assert Recipe.read(tmp_path / "r.yaml").method.args == {"reduction": text}
