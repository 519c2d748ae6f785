import json
import socket
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from limbeck.components import Component
from limbeck.errors import InputError, MissingExtra
from limbeck.models import adapters, build_model, fingerprint

pytest.importorskip("timm")
pytest.importorskip("torchvision")
pytest.importorskip("transformers")

RESNET = {"model_type": "resnet", "embedding_size": 4, "hidden_sizes": [4, 6], "depths": [1, 1]}
VIT = {"model_type": "vit", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "patch_size": 4}


@pytest.fixture(autouse=True)
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Any attempt to reach a network fails at once, and is listed."""
    made: list[object] = []

    def refuse(*args: object, **_kwargs: object) -> None:
        made.append(args)
        raise OSError("the network is out of bounds in this test")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # tests/conftest.py switches it on, which would hide attempts
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return made


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        ({"name": "timm", "model": "test_resnet"}, (1, 28, 28)),
        ({"name": "timm", "model": "test_vit", "options": {"depth": 1}}, (3, 48, 32)),
        ({"name": "timm", "model": "resnet10t.c3_in1k"}, (3, 32, 32)),
        ({"name": "torchvision", "model": "squeezenet1_1"}, (3, 32, 32)),
        ({"name": "torchvision", "model": "mobilenet_v3_small", "options": {"width_mult": 0.3}}, (3, 32, 32)),
        ({"name": "transformers", "model": RESNET}, (1, 28, 28)),
        ({"name": "transformers", "model": VIT}, (3, 16, 16)),
        ({"name": "transformers", "model": VIT}, (1, 8, 16)),
    ],
)
def test_random_classifiers_give_logits_without_a_network(value: dict, shape: tuple[int, ...], attempts: list[object]) -> None:
    def built(seed: int) -> nn.Module:
        return build_model(Component.model_validate(value), num_classes=7, input_shape=shape, seed=seed)

    network = built(0)
    x = torch.randn(2, *shape)
    for mode in (True, False):
        logits = network.train(mode)(x)
        assert logits.shape == (2, 7)
        assert logits.requires_grad
    if value["model"] != "resnet10t.c3_in1k":
        assert fingerprint(built(0)) == fingerprint(built(0)) != fingerprint(built(1))
    assert not attempts


def test_torchvisions_transformer_takes_its_image_size_from_the_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.models

    asked: dict = {}
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, **given: asked.update(given) or nn.Linear(1, 1))
    adapters.torchvision("vit_b_16", num_classes=3, input_shape=(3, 32, 32))
    assert asked == {"num_classes": 3, "image_size": 32}


def test_auxiliary_heads_are_left_out() -> None:
    network = adapters.torchvision("googlenet", num_classes=3, input_shape=(3, 32, 32), options={"init_weights": False})
    assert network.train()(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    assert not any(name.startswith("aux") for name, _ in network.named_parameters())


@pytest.mark.parametrize(
    ("build", "where", "says"),
    [
        (lambda: adapters.timm("resnet10x"), "model", "Did you mean 'resnet10t'"),
        (lambda: adapters.timm("hf-hub:someone/something"), "model", "no image classifier"),
        (lambda: adapters.timm(3), "model", "no image classifier '3'"),
        (lambda: adapters.timm("test_resnet", pretrained="false"), "pretrained", "neither true nor false"),
        (lambda: adapters.transformers("nobody/nothing", pretrained="false"), "pretrained", "neither true nor false"),
        (lambda: adapters.transformers("x" * 5000), "model", "no folder"),
        (lambda: adapters.timm("test_resnet.nonsense"), "model", "nonsense"),
        (lambda: adapters.timm("test_resnet", options={"bogus": 1}), "options", "bogus"),
        (lambda: adapters.timm("test_resnet", options={"bogus": 1}, pretrained=True), "options", "cannot build 'test_resnet'"),
        (lambda: adapters.torchvision("squeezenet1_1", options={"bogus": 1}, weights="DEFAULT"), "options", "cannot build"),
        (lambda: adapters.timm("test_resnet", input_shape=(64,)), "input_shape", "images"),
        (lambda: adapters.timm("test_resnet", num_classes=0), "num_classes", "0"),
        (lambda: adapters.torchvision("squeezenet_1"), "model", "Did you mean 'squeezenet1_1'"),
        (lambda: adapters.torchvision("fasterrcnn_resnet50_fpn"), "model", "no image classifier"),
        (lambda: adapters.torchvision("squeezenet1_1", options={"bogus": 1}), "options", "bogus"),
        (lambda: adapters.torchvision("squeezenet1_1", input_shape=(1, 28, 28)), "input_shape", "3 channels"),
        (lambda: adapters.torchvision("squeezenet1_1", weights="IMAGENET1K_V7"), "weights", "Did you mean 'IMAGENET1K_V1'"),
        (lambda: adapters.transformers({"model_type": "vitt"}), "model_type.model", "Did you mean"),
        (lambda: adapters.transformers({"model_type": "bert"}), "model_type.model", "no image classifier 'bert'"),
        (lambda: adapters.transformers({}), "model_type.model", "None"),
        (lambda: adapters.transformers(VIT | {"hidden_sise": 8}), "model.hidden_sise", "Did you mean 'hidden_size'"),
        (lambda: adapters.transformers(VIT | {"hidden_size": "x"}), "model", "hidden_size"),
        (lambda: adapters.transformers(VIT | {"num_channels": 1}), "model", "1 channels, the inputs have 3"),
        (lambda: adapters.transformers(VIT, pretrained=True), "pretrained", "configuration"),
        (lambda: adapters.transformers("nobody/nothing"), "model", "nobody/nothing"),
        (lambda: adapters.transformers("/no/such/folder"), "model", "/no/such/folder"),
    ],
)
def test_wrong_names_and_options_are_explained(build, where: str, says: str, attempts: list[object]) -> None:
    with pytest.raises(InputError) as caught:
        build()
    assert not attempts  # nothing is fetched unless asked for
    assert caught.value.where == where
    assert says in str(caught.value)
    assert not isinstance(caught.value, MissingExtra)


@pytest.mark.parametrize(
    ("build", "where"),
    [
        (lambda: adapters.timm("test_resnet", pretrained=True), "pretrained"),
        (lambda: adapters.torchvision("squeezenet1_1", weights="DEFAULT"), "weights"),
        (lambda: adapters.transformers("nobody/nothing", pretrained=True), "pretrained"),
    ],
)
def test_a_failed_download_is_an_input_error(build, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no retries with pauses
    with pytest.raises(InputError, match="cannot get the pretrained weights") as caught:
        build()
    assert caught.value.where == where


@pytest.mark.parametrize(
    ("build", "package", "extra"),
    [
        (lambda: adapters.timm("test_resnet"), "timm", "vision"),
        (lambda: adapters.torchvision("squeezenet1_1"), "torchvision", "vision"),
        (lambda: adapters.transformers(VIT), "transformers", "language"),
    ],
)
def test_a_missing_package_names_its_extra(build, package: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=rf"'{package}'.*limbeck\[{extra}\]"):
        build()


@pytest.mark.parametrize("model", ["squeezenet1_1", "shufflenet_v2_x0_5"])
def test_torchvisions_pretrained_body_is_kept_and_the_head_drawn_afresh(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.models

    published = torchvision.models.get_model(model).state_dict()
    weights = torchvision.models.get_model_weights(model)
    monkeypatch.setattr(weights, "get_state_dict", lambda self, **_: published)
    whole = adapters.torchvision(model, weights="DEFAULT")
    assert all(torch.equal(tensor, published[name]) for name, tensor in whole.state_dict().items())
    network = adapters.torchvision(model, num_classes=4, input_shape=(3, 32, 32), weights="DEFAULT").eval()
    kept = [name for name, tensor in network.state_dict().items() if torch.equal(tensor, published[name])]
    assert len(kept) == len(published) - 2  # weight and bias of the head
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 4)


@pytest.fixture
def folder(tmp_path: Path, capfd: pytest.CaptureFixture) -> Path:
    """A folder as transformers saves it: a tiny ResNet for one channel and 7 classes."""
    torch.manual_seed(0)
    adapters.transformers(RESNET, num_classes=7, input_shape=(1, 16, 16)).network.save_pretrained(tmp_path / "it")
    capfd.readouterr()
    return tmp_path / "it"


def test_a_transformers_folder_gives_its_weights_only_when_asked(folder: Path, attempts: list[object]) -> None:
    def built(seed: int, pretrained: bool) -> nn.Module:
        value = {"name": "transformers", "model": str(folder), "pretrained": pretrained}
        return build_model(Component.model_validate(value), num_classes=7, input_shape=(1, 16, 16), seed=seed)

    assert fingerprint(built(0, True)) == fingerprint(built(1, True))
    assert fingerprint(built(0, False)) != fingerprint(built(1, False))
    assert fingerprint(built(0, False)) != fingerprint(built(0, True))
    assert not attempts


def test_a_transformers_head_of_another_width_is_drawn_afresh_in_silence(folder: Path, capfd: pytest.CaptureFixture) -> None:
    old = adapters.transformers(str(folder), num_classes=7, input_shape=(1, 16, 16), pretrained=True).state_dict()
    network = adapters.transformers(str(folder), num_classes=3, input_shape=(1, 16, 16), pretrained=True)
    assert network.eval()(torch.randn(2, 1, 16, 16)).shape == (2, 3)
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, old[name])}
    assert changed == {"network.classifier.1.weight", "network.classifier.1.bias"}
    printed = capfd.readouterr()
    assert "Loading" not in printed.out + printed.err
    assert "MISMATCH" not in printed.out + printed.err


def test_a_transformers_folder_that_does_not_fit_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="takes 1 channels, the inputs have 3"):
        adapters.transformers(str(folder), num_classes=7, pretrained=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_sizes": [4, 8]}))
    with pytest.raises(InputError, match="beside the head"):
        adapters.transformers(str(folder), num_classes=7, input_shape=(1, 16, 16), pretrained=True)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"cannot build .*JSON"):
        adapters.transformers(str(folder), num_classes=7, input_shape=(1, 16, 16))
