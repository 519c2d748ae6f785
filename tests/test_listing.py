import json
import re
import sys
import types

import pytest
import yaml

from limbeck import listing
from limbeck.contract import Frozen, Method, Paper
from limbeck.errors import InputError
from limbeck.ingredients import from_recipe
from limbeck.kinds import KINDS
from limbeck.methods import BUILT_IN
from limbeck.recipe import Recipe
from limbeck.runner import Runner
from recipe_parts import limbeck


def test_methods_lists_every_method_with_paper_and_state():
    called = limbeck("methods")
    assert called.code == 0
    words = " ".join(called.out.split())
    for name in BUILT_IN:
        method = listing.find(name)
        assert re.search(rf"\b{name}\b", words)
        assert method.paper.arxiv in words
        assert listing.state(name) in words


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_method_is_shown_with_all_its_knobs(name):
    called = limbeck("methods", name)
    assert called.code == 0
    method = listing.find(name)
    words = " ".join(called.out.split())
    for knob in method.Config.model_fields:
        assert knob in words
    assert method.paper.title in words
    assert f"Claim: {listing.state(name)}." in words


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_knob_has_a_meaning_and_its_default_is_yaml(name):
    config = listing.find(name).Config
    for knob, default, meaning in listing.knobs(config):
        assert meaning, f"{name}.{knob} has no description"
        if default != "(needed)":
            config.model_validate({knob: yaml.safe_load(default)})


def test_an_unknown_method_gets_a_suggestion():
    called = limbeck("methods", "meal_v3")
    assert (called.code, called.err) == (2, "limbeck: unknown method 'meal_v3'. Did you mean 'meal_v2'?\n")


def test_the_state_is_what_the_evidence_says(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "_ROOTS", (tmp_path,))
    assert listing.state("kd") == "no claim run"
    folder = tmp_path / "docs" / "evidence"
    folder.mkdir(parents=True)
    (folder / "kd.json").write_text(json.dumps({"verdict": "holds in part"}))
    assert listing.state("kd") == "holds in part"
    for text in ("{", "[]", "3", "{}", ""):
        (folder / "kd.json").write_text(text)
        assert listing.state("kd") == "evidence unreadable"
    (folder / "kd.json").write_bytes(b"\xff\xfe")
    assert listing.state("kd") == "evidence unreadable"


def test_an_entry_point_that_is_no_method_is_refused(monkeypatch):
    monkeypatch.setitem(BUILT_IN, "strange", "os:getcwd")
    with pytest.raises(InputError, match=r"the entry point 'strange' \(os:getcwd\) is not a method"):
        listing.find("strange")


@pytest.mark.parametrize("name", [name for name in BUILT_IN if listing.find(name).produces in KINDS])
def test_new_writes_a_commented_recipe(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    called = limbeck("new", name)
    assert (called.code, called.out, called.err) == (0, f"{name}.yaml\n", "")
    text = (tmp_path / f"{name}.yaml").read_text(encoding="utf-8")
    recipe = Recipe.read(tmp_path / f"{name}.yaml")
    method = listing.find(name)
    assert recipe.method.name == recipe.name == name
    assert bool(recipe.teacher) == (method.needs_teacher or name in ("quantized_distillation", "data_pruning"))
    assert (recipe.student.train is not None) == method.starts_trained
    given = set(recipe.method.args)
    assert given == set() or method.produces == "dataset"
    method.Config.model_validate(recipe.method.args)
    for knob in method.Config.model_fields:
        assert re.search(rf"^  {'' if knob in given else '# '}{knob}: ", text, re.MULTILINE)
    # uncommenting the other knobs changes nothing: they are the defaults
    uncommented = yaml.safe_load(re.sub(r"^  # (\w+: .*)$", r"  \1", text, flags=re.MULTILINE).split("\nstudent:")[0].split("\nteacher:")[0])
    knobs = {k: v for k, v in uncommented["method"].items() if k != "name" and k not in given}
    assert method.Config.model_validate(knobs) == method.Config()
    # it is not overwritten
    again = limbeck("new", name)
    assert again.code == 2
    assert again.err == f"limbeck: {name}.yaml: the file exists already. Give another name with --output.\n"
    assert (tmp_path / f"{name}.yaml").read_text(encoding="utf-8") == text


def test_a_recipe_for_a_data_set_passes_what_a_run_checks_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("ftd", "ast", "real_images", "krr_st", "infer"):
        method = listing.find(name)
        recipe = Recipe.read(listing.write_recipe(name, None), ["data.train_size=600"])
        assert (recipe.experts is not None) == method.needs_experts
        parts = from_recipe(recipe)
        Runner(parts, folder=None).check()  # builds everything, trains nothing


def test_a_data_sets_method_of_a_third_party_gets_experts_where_it_needs_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(BUILT_IN, "theirs", BUILT_IN["ftd"])
    recipe = Recipe.read(listing.write_recipe("theirs", None))
    assert recipe.experts is not None
    assert recipe.method.args == {}


def test_no_recipe_for_a_teachers_method(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    called = limbeck("new", "barlow_twins")
    said = "limbeck: 'barlow_twins' makes an encoder, which no run makes alone. `limbeck new krr_st` writes a recipe whose teacher it trains.\n"
    assert (called.code, called.out, called.err) == (2, "", said)
    assert not list(tmp_path.iterdir())
    assert "Makes an encoder." in limbeck("methods", "barlow_twins").out


def test_new_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert limbeck("new", "kd", "-o", "mine.yaml").out == "mine.yaml\n"
    assert limbeck("new", "kd", "--output", "no/such/folder.yaml").code == 2
    assert limbeck("new", "kdd").err == "limbeck: unknown method 'kdd'. Did you mean 'kd'?\n"
    assert [p.name for p in tmp_path.iterdir()] == ["mine.yaml"]


def test_a_third_partys_method_is_listed(monkeypatch):
    class Config(Frozen):
        """Knobs."""

        needed: int

    class Theirs(Method):
        """A method of somebody else."""

        paper = Paper("Their paper", "", "Their venue", 2026)

        def updates(self, batch, clock):
            yield from ()

    Theirs.Config = Config
    module = types.ModuleType("their_package")
    module.Theirs = Theirs
    monkeypatch.setitem(sys.modules, "their_package", module)
    from importlib.metadata import EntryPoint

    points = [EntryPoint("theirs", "their_package:Theirs", "limbeck.methods"), EntryPoint("kd", "their_package:Theirs", "limbeck.methods")]
    monkeypatch.setattr("limbeck.methods.entry_points", lambda group: points if group == "limbeck.methods" else [])
    assert listing.find("theirs") is Theirs
    assert listing.find("kd") is not Theirs  # built-in names win
    assert list(listing.knobs(Config)) == [("needed", "(needed)", "")]
    assert "Their paper" in " ".join(limbeck("methods").out.split())
