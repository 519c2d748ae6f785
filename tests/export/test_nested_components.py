"""A generator's artefact names the component within it; a stranger's must not be run, in whatever form it is written."""

import json
import sys
import types

import pytest
from torch import nn

from limbeck.components import Component
from limbeck.contract import Artefact
from limbeck.diffusion.generator import Generator
from limbeck.errors import InputError
from limbeck.export import load, rebuild, save
from limbeck.models import build_model


@pytest.fixture
def folder(tmp_path):
    inner = {"name": "mlp_denoiser", "args": {"widths": [4]}}
    denoiser = build_model(Component.model_validate(inner), num_classes=0, input_shape=(2,), seed=0)
    generator = Generator(denoiser, (80.0,))
    component = Component(name="generator", args={"denoiser": inner, **generator.arguments})
    return save(
        Artefact("generator", generator), tmp_path / "artefact", model=component, num_classes=0, input_shape=(2,), preprocess={}, classes=(), extra={}
    )  # fmt: skip


@pytest.mark.parametrize("inner", ["a_strangers:code", {"target": "a_strangers:code"}, {"name": "generator", "denoiser": "a_strangers:code", "times": [1.0]}])
def test_code_within_is_not_run_unless_trusted(folder, inner, monkeypatch):
    ran = []
    module = types.ModuleType("a_strangers")
    module.code = lambda **_: ran.append(1) or nn.Identity()
    monkeypatch.setitem(sys.modules, "a_strangers", module)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["model"]["args"]["denoiser"] = inner
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match="not one of limbeck's own"):
        load(folder)
    assert not ran


def test_nothing_within_fetches_weights():
    inner = {"name": "timm", "model": "resnet18", "pretrained": True}
    made = rebuild._plain(Component(name="generator", args={"denoiser": inner, "times": [1.0]}))
    assert "pretrained" not in made.args["denoiser"]["args"]


def test_what_is_no_component_is_told(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["model"]["args"]["denoiser"] = 3
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match="no component"):
        load(folder)


def test_an_argument_of_that_name_of_another_builder_is_left_alone():
    theirs = Component(target="pkg:build", args={"module": "relu"})
    assert list(rebuild.within(theirs)) == [theirs]
    assert rebuild._plain(theirs) == theirs
