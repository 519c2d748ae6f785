"""Saving and loading artefacts: exact, whole or absent, checked, and never running a stranger's code."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import limbeck
from limbeck.components import Component
from limbeck.contract import Artefact
from limbeck.errors import InputError
from limbeck.export import export, load, save
from limbeck.export import folder as folder_module
from limbeck.models import build_model

MLP = Component(name="mlp", args={"hidden": [5]})
INPUTS = torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(0))


def network(component: Component = MLP, seed: int = 1) -> nn.Module:
    return build_model(component, num_classes=3, input_shape=(1, 3, 3), seed=seed)


def keep(module: nn.Module, folder: Path, *, model: Component | None = MLP, encoder=None, facts: Mapping | None = None) -> Path:
    return save(
        Artefact("classifier", module, encoder, facts or {}),
        folder,
        model=model,
        num_classes=3,
        input_shape=(1, 3, 3),
        preprocess={"mean": [0.5], "std": [0.25]},
        classes=["a", "b", "c"],
        extra={"metrics": {"accuracy": 0.75}},
    )


def edit(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_saved_model_comes_back_exactly_in_eval_mode_with_its_config(tmp_path):
    module = network().train()
    keep(module, tmp_path / "run" / "artefact", facts={"bits": 4})
    for path in (tmp_path / "run", tmp_path / "run" / "artefact", str(tmp_path / "run")):
        found = limbeck.load(path)
        assert not found.training
        assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), module.state_dict().values(), strict=True))
        assert torch.equal(found(INPUTS), module.eval()(INPUTS))
    config = found.limbeck_config
    assert config["classes"] == ["a", "b", "c"]
    assert config["input_shape"] == [1, 3, 3]
    assert config["preprocess"] == {"mean": [0.5], "std": [0.25]}
    assert config["facts"] == {"bits": 4}
    assert config["weights"]["bytes"] == (tmp_path / "run" / "artefact" / "model.safetensors").stat().st_size
    json.dumps(config)


class Tied(nn.Module):
    """Two names for one weight, a slice that shares its memory, a transposed (not contiguous) parameter, integers."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(3, 3, bias=False)
        self.decode = nn.Linear(3, 3, bias=False)
        self.decode.weight = self.encode.weight
        self.transposed = nn.Parameter(torch.randn(4, 2).t())
        self.register_buffer("counts", torch.arange(4))
        self.register_buffer("some", self.counts[:2])

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


def test_tied_tensors_are_stored_once_and_come_back_tied(tmp_path):
    module = Tied()
    keep(module, tmp_path / "tied", model=None)
    found = load(tmp_path / "tied", model=Tied())
    for name, value in module.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)
    assert found.decode.weight is found.encode.weight
    assert found.limbeck_config["weights"]["tied"] == {"decode.weight": "encode.weight"}
    bare = nn.Linear(30, 30)
    twice = nn.ModuleList([bare, bare])
    assert keep(bare, tmp_path / "one", model=None)
    keep(twice, tmp_path / "two", model=None)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("one", "two")]
    assert abs(sizes[0] - sizes[1]) < 100


class ByteEncoder:
    """Weights that are multiples of 1/8, as signed bytes."""

    decoder = "limbeck.packs_for_tests:unpack"

    def encode(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {f"packed.{name}": (value * 8).to(torch.int8) for name, value in state.items()}


@pytest.fixture
def _decoder(monkeypatch):
    """A decoder that is defined in a module of limbeck."""
    module = types.ModuleType("limbeck.packs_for_tests")
    exec("def unpack(tensors):\n    return {name.removeprefix('packed.'): value.float() / 8 for name, value in tensors.items()}", module.__dict__)
    monkeypatch.setitem(sys.modules, "limbeck.packs_for_tests", module)


@pytest.mark.usefixtures("_decoder")
def test_packed_weights_are_small_on_disk_and_come_back_exactly(tmp_path):
    wide = Component(name="mlp", args={"hidden": [200]})
    module = network(wide)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_((parameter * 8).round() / 8)
    keep(module, tmp_path / "packed", model=wide, encoder=ByteEncoder())
    keep(module, tmp_path / "plain", model=wide)
    found = load(tmp_path / "packed")
    assert torch.equal(found(INPUTS), module.eval()(INPUTS))
    size, plain = (found_in.stat().st_size for found_in in (tmp_path / "packed" / "model.safetensors", tmp_path / "plain" / "model.safetensors"))
    assert size < plain / 3
    copied = export(tmp_path / "packed", "safetensors", tmp_path / "copy")
    assert torch.equal(load(copied.path)(INPUTS), module(INPUTS))
    assert copied.bytes < plain / 2


# ---- what is refused


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_a_flipped_bit_or_a_cut_anywhere_in_the_weights_is_named(tmp_path_factory, data):
    folder = keep(network(), tmp_path_factory.mktemp("artefact") / "a")
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[place] ^= 1 << data.draw(st.integers(0, 7))
        words = "damaged"
    else:
        del content[place:]
        words = f"{place} bytes instead of"
    file.write_bytes(bytes(content))
    for use in (load, lambda folder: export(folder, "safetensors")):
        with pytest.raises(InputError) as caught:
            use(folder)
        assert str(file) in str(caught.value)
        assert words in str(caught.value)
    assert [path.name for path in folder.parent.iterdir()] == ["a"]


def test_missing_files_and_folders_are_named(tmp_path):
    folder = keep(network(), tmp_path / "a")
    with pytest.raises(InputError, match="no such folder"):
        load(tmp_path / "b")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors: the weights are missing"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match="no saved model here"):
        load(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"format": ', r"config\.json:1: not JSON"),
        (b"\xff\xfe\x00", "not a UTF-8"),
        (b"[1, 2]", "not written by limbeck"),
        (b'{"model_type": "vit"}', "not written by limbeck"),
        (b'{"format": "limbeck-artefact", "format_version": 2, "limbeck": "9.0"}', "format version is 2.*written by limbeck 9.0"),
        (b'{"format": "limbeck-artefact", "format_version": 1}', "is missing"),
    ],
)
def test_a_config_that_cannot_be_read_is_named(tmp_path, content, words):
    folder = keep(network(), tmp_path / "a")
    (folder / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        load(folder)
    assert "config.json" in str(caught.value)


def test_weights_of_another_file_name_are_refused(tmp_path):
    folder = keep(network(), tmp_path / "a")
    weights = json.loads((folder / "config.json").read_text())["weights"]
    edit(folder, weights={**weights, "file": "../../secret"})
    with pytest.raises(InputError, match=r"weights\.file"):
        load(folder)
    edit(folder, weights={**weights, "tied": {"x": "nowhere"}})
    with pytest.raises(InputError, match="'nowhere' is not in the weights"):
        load(folder)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    folder = keep(network(), tmp_path / "a")
    with pytest.raises(InputError, match="do not fit the model"):
        load(folder, model=nn.Linear(3, 3))
    edit(folder, model={"name": "mlp", "args": {"hidden": [6]}})
    with pytest.raises(InputError, match="do not fit the model"):
        load(folder)
    edit(folder, model={"name": "mpl"})
    with pytest.raises(InputError, match=r"config\.json: model.*Did you mean 'mlp'"):
        load(folder)


def test_a_module_of_ones_own_is_asked_for(tmp_path):
    folder = keep(nn.Linear(2, 3), tmp_path / "a", model=None)
    with pytest.raises(InputError, match="model=module"):
        load(folder)
    assert isinstance(load(folder, model=nn.Linear(2, 3)), nn.Linear)


def test_code_outside_limbeck_is_imported_only_with_trust(tmp_path, monkeypatch):
    touched = []
    theirs = types.ModuleType("theirs")
    theirs.build = lambda num_classes: touched.append("built") or nn.Linear(2, num_classes)
    theirs.unpack = lambda tensors: touched.append("unpacked") or tensors
    monkeypatch.setitem(sys.modules, "theirs", theirs)
    folder = keep(nn.Linear(2, 3), tmp_path / "a", model=Component(target="theirs:build"))
    with pytest.raises(InputError, match="trust_imports=True"):
        load(folder)
    edit(folder, encoder="theirs:unpack")
    with pytest.raises(InputError, match="trust_imports=True"):
        load(folder, model=nn.Linear(2, 3))
    assert touched == []
    assert isinstance(load(folder, trust_imports=True), nn.Linear)
    assert touched == ["unpacked", "built"]


@pytest.mark.parametrize(
    "path", ["limbeck.files:os.system", "limbeck.files:os", "limbeck.models.fresh:build", "limbeck.models.small:Network.forward", "limbeckx.mod:f", "os:system"]
)
def test_limbecks_own_modules_are_no_way_to_other_code(tmp_path, path):
    """What a module of limbeck merely imports is not its own; models are only those of the catalogue."""
    folder = keep(network(), tmp_path / "a")
    edit(folder, encoder=path)
    with pytest.raises(InputError, match="from a stranger"):
        load(folder)
    edit(folder, encoder=None, model={"target": path, "args": {"command": "false"}})
    with pytest.raises(InputError, match="from a stranger"):
        load(folder)
    edit(folder, encoder=None, model={"target": "limbeck.models.small:mlp", "args": {"hidden": [5]}})
    assert isinstance(load(folder), nn.Module)


def test_building_to_load_fetches_no_weights(tmp_path, monkeypatch):
    """An artefact whose student began from pretrained weights opens without the network, whatever its config says."""
    asked = []

    def recorded(component, **given):
        asked.append(component)
        return network()

    monkeypatch.setattr("limbeck.models.build_model", recorded, raising=False)
    timm = Component(name="timm", args={"model": "resnet18", "pretrained": True, "options": {"checkpoint_path": "x.pth", "drop_rate": 0.1}})
    folder = keep(network(), tmp_path / "a", model=timm)
    assert json.loads((folder / "config.json").read_text())["model"]["args"] == {"model": "resnet18", "options": {"drop_rate": 0.1}}
    edit(folder, model=timm.model_dump())
    load(folder)
    edit(folder, model={"target": "limbeck.models.adapters:timm", "args": timm.args})
    load(folder)
    edit(folder, model={"name": "torchvision", "args": {"model": "resnet18", "weights": "DEFAULT"}})
    load(folder)
    timms = {"model": "resnet18", "options": {"drop_rate": 0.1}}
    assert [component.args for component in asked] == [timms, timms, {"model": "resnet18"}]


# ---- whole or absent


def test_an_earlier_artefact_is_replaced_and_nothing_is_left_beside(tmp_path):
    keep(network(seed=1), tmp_path / "a")
    new = network(seed=2)
    keep(new, tmp_path / "a")
    assert torch.equal(load(tmp_path / "a")(INPUTS), new.eval()(INPUTS))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("rename", [1, 2])
def test_a_kill_at_either_rename_leaves_the_old_artefact_readable(tmp_path, monkeypatch, rename):
    old = network(seed=1)
    keep(old, tmp_path / "run" / "artefact")
    count, real = [], Path.rename

    def dying(self, target):
        count.append(target)
        if len(count) == rename:
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "rename", dying)
    with pytest.raises(KeyboardInterrupt):
        keep(network(seed=2), tmp_path / "run" / "artefact")
    monkeypatch.setattr(Path, "rename", real)
    for path in (tmp_path / "run", tmp_path / "run" / "artefact"):
        assert torch.equal(load(path)(INPUTS), old.eval()(INPUTS))
    new = network(seed=3)
    keep(new, tmp_path / "run" / "artefact")
    assert torch.equal(load(tmp_path / "run")(INPUTS), new.eval()(INPUTS))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["artefact"]


def test_a_failed_write_leaves_the_old_artefact_and_no_rest(tmp_path):
    old = network()
    keep(old, tmp_path / "a")
    with pytest.raises(TypeError):
        keep(network(seed=2), tmp_path / "a", facts={"tensor": torch.zeros(1)})
    with pytest.raises(ValueError, match="not JSON compliant"):
        keep(network(seed=2), tmp_path / "a", facts={"nan": float("nan")})
    assert torch.equal(load(tmp_path / "a")(INPUTS), old.eval()(INPUTS))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_other_folders_and_files_are_left_alone(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years")
    (tmp_path / "file").write_text("text")
    for name in ("home", "file"):
        with pytest.raises(InputError, match=f"{name}"):
            keep(network(), tmp_path / name)
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years"
    (tmp_path / "empty").mkdir()
    keep(network(), tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").exists()


def test_an_export_without_a_name_lies_beside_the_artefact(tmp_path):
    keep(network(), tmp_path / "run" / "artefact")
    written = export(tmp_path / "run", "safetensors")
    assert written.path == tmp_path / "run" / "artefact-safetensors"
    assert str(written) == f"{written.path}: {sum(f.stat().st_size for f in written.path.iterdir()):,} bytes"
    keep(nn.Linear(2, 3), tmp_path / "own", model=None)
    assert isinstance(load(export(tmp_path / "own", "safetensors").path, model=nn.Linear(2, 3)), nn.Linear)  # no need to build it for a copy
    with pytest.raises(InputError, match="Did you mean 'onnx'"):
        export(tmp_path / "run", "onxn")


def test_everything_written_is_flushed_to_the_disk(tmp_path, monkeypatch):
    synced = []
    real = folder_module.os.fsync
    monkeypatch.setattr(folder_module.os, "fsync", lambda handle: synced.append(Path(f"/proc/self/fd/{handle}").resolve().name) or real(handle))
    keep(network(), tmp_path / "a")
    assert {"model.safetensors", "config.json", ".a.new"} <= set(synced)
