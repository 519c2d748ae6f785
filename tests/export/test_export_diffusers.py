"""Folders that diffusers opens without limbeck: the same samples from the same noise, or no folder."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from limbeck import models
from limbeck.components import Component
from limbeck.contract import Artefact
from limbeck.diffusion.generator import Sampling, TeacherSampler
from limbeck.errors import InputError, LimbeckError, MissingExtra
from limbeck.evaluate.cost import torch_threads
from limbeck.export import Exported, export, load, save
from limbeck.models import build_model

diffusers = pytest.importorskip("diffusers")

from limbeck.export import diffusers as exporter  # noqa: E402

ADAPTED: dict[str, Any] = {
    "block_out_channels": [8, 16], "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8,
}  # fmt: skip
TEXT = {
    **ADAPTED, "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "cross_attention_dim": 6,
}  # fmt: skip
DIT: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "patch_size": 2}


def mlp(**args: Any) -> dict[str, Any]:
    return {"name": "mlp_denoiser", "args": {"widths": [12, 12], **args}}


def unet(**args: Any) -> dict[str, Any]:
    return {"name": "unet_denoiser", "args": {"width": 8, **args}}


def around(denoiser: dict[str, Any], times: list[float], **args: Any) -> Component:
    return Component(name="generator", args={"denoiser": denoiser, "times": times, **args})


SCALE = {"mean": [0.5, 0.25], "std": [2.0, 3.0]}
GREY = {"mean": [0.5], "std": [0.5], "bounded": True}
PLAIN = {"precondition": "none"}
CASES: dict[str, tuple[Component, tuple[int, ...], int]] = {
    "one step": (around(mlp(), [80.0], scale=SCALE), (2,), 3),
    "unconditional": (around(mlp(conditional=False, residual=True), [80.0]), (2,), 3),
    "four steps": (around(mlp(), [80.0, 17.5, 2.5, 0.2]), (2,), 3),
    "ode, flow": (around(mlp(schedule="flow", prediction="velocity", **PLAIN), [0.999, 0.6, 0.2], mode="ode"), (2,), 3),
    "gamma, cosine": (around(mlp(schedule="cosine", prediction="v", embedding="fourier", **PLAIN), [0.999, 0.5, 0.1], mode="gamma", share=0.3), (2,), 0),
    "eps, vp": (around(mlp(schedule="vp", prediction="eps", **PLAIN), [0.999, 0.749, 0.249]), (2,), 3),
    "trig": (around(mlp(schedule="trig", precondition="consistency"), [1.5, 1.0]), (2,), 3),
    "images": (around(unet(schedule="vp", prediction="v", **PLAIN), [0.999, 0.4], scale=GREY), (1, 7, 6), 10),
    "attention": (around(unet(multipliers=[1, 2, 2], attention=[8, 2], blocks=2), [80.0], scale=GREY), (3, 8, 8), 10),
    "no attention": (around(unet(attention=[], precondition="consistency"), [80.0, 1.0], scale=GREY), (3, 8, 8), 0),
    "consistency": (
        Component(name="consistency_generator", args={"denoiser": mlp(precondition="consistency"), "ladder": [80.0, 2.0, 0.5], "steps": 2}),
        (2,),
        3,
    ),
    "signal": (Component(name="signal_generator", args={"denoiser": mlp(schedule="flow"), "guidance_range": [1, 4], "guidance_scale": 2.5}), (2,), 3),
    "signal images": (Component(name="signal_generator", args={"denoiser": unet(), "guidance_range": [1, 4], "guidance_scale": 3.0}), (1, 8, 8), 3),
    "direct": (Component(name="direct_generator", args={"module": {"name": "mlp_generator", "args": {"offset": [1.0, 2.0]}}, "scale": SCALE}), (2,), 3),
    "their u-net": (around({"name": "diffusers_unet", "args": {"model": ADAPTED}}, [0.999, 0.5], scale=GREY), (3, 8, 8), 4),
    "their dit": (around({"name": "diffusers_dit", "args": {"model": DIT, "conditional": False, "prediction": "v"}}, [0.999], scale=GREY), (3, 8, 8), 4),
    "their text": (around({"name": "diffusers_unet_condition", "args": {"model": TEXT, "tokens": 5}}, [0.999], scale=GREY), (3, 8, 8), 4),
}


@pytest.fixture(autouse=True, scope="module")
def _registered() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("diffusers_unet", "diffusers_unet_condition", "diffusers_dit"):
            patch.setitem(models.CATALOGUE, name, f"limbeck.diffusion.adapters:{name}")
        yield


def artefact(name: str, folder: Path) -> Sampling:
    """A generator of random weights, none of them zero, saved as a run saves it."""
    component, shape, classes = CASES[name]
    module: Any = build_model(component, num_classes=classes, input_shape=shape, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    labels = [f"class {i}" for i in range(classes)]
    save(Artefact("generator", module), folder, model=component, num_classes=classes, input_shape=shape, preprocess={}, classes=labels, extra={})
    return module.eval()


SCRIPT = """
import json, sys
sys.modules["limbeck"] = None  # an import of it fails
import safetensors.torch, torch
from diffusers import DiffusionPipeline
from pathlib import Path
place = Path(sys.argv[1])
for folder in sorted(place.glob("*-diffusers")):
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    given = safetensors.torch.load_file(place / (folder.name + ".in"))
    noise, labels, text = given["noise"], given.get("labels"), given.get("text")
    found = {
        "seeded": pipe(5, labels=labels, prompt_embeds=text, seed=7).images,
        "batches": pipe(5, labels=labels, prompt_embeds=text, seed=7, batch_size=2).images,
        "noise": pipe(labels=labels, prompt_embeds=text, noise=noise, generator=torch.Generator().manual_seed(3)).images,
    }
    assert type(pipe).__module__.startswith("diffusers_modules."), type(pipe)
    safetensors.torch.save_file({k: v.contiguous() for k, v in found.items()}, place / (folder.name + ".out"))
assert not [name for name in sys.modules if name.startswith("limbeck.")]
"""


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case saved, exported, and sampled from in one process that cannot import limbeck."""
    place = tmp_path_factory.mktemp("diffusers")
    for name, (_, shape, _) in CASES.items():
        module = artefact(name, place / name / "artefact")
        export(place / name, "diffusers", place / f"{name}-diffusers")
        network: Any = getattr(getattr(module, "denoiser", None), "network", None)
        given = {"noise": torch.randn(5, *shape)}
        if module.num_classes:
            labels = torch.arange(5) % module.num_classes
            given |= {"text": network.prompts[labels]} if hasattr(network, "prompts") else {"labels": labels}
        safetensors.torch.save_file(given, place / f"{name}-diffusers.in")
    environment = {**os.environ, "HF_HOME": str(place / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-I", "-c", SCRIPT, str(place)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return place


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_diffusers_alone_gives_the_same_samples(sampled: Path, name: str) -> None:
    module: Any = load(sampled / name)
    given, found = (safetensors.torch.load_file(sampled / f"{name}-diffusers{end}") for end in (".in", ".out"))
    labels = torch.arange(5) % module.num_classes if module.num_classes else None
    with torch_threads(1):  # as many as the other process has: threads sum in another order
        expected = {
            "seeded": module.sample(5, labels=labels, seed=7),
            "batches": module.sample(5, labels=labels, seed=7, batch_size=2),
            "noise": module.scale(module(given["noise"], labels, torch.Generator().manual_seed(3))).detach(),
        }
    for kind, samples in expected.items():
        assert samples.std() > 1e-3, kind  # something that could differ
        torch.testing.assert_close(found[kind], samples, rtol=1e-5, atol=1e-5)


def test_the_folder_says_what_it_is(tmp_path: Path) -> None:
    module = artefact("eps, vp", tmp_path / "run" / "artefact")
    written = export(tmp_path / "run", "diffusers")
    assert isinstance(written, Exported)
    assert written.path == (tmp_path / "run" / "artefact-diffusers").resolve()
    files = {str(file.relative_to(written.path)): file.stat().st_size for file in written.path.rglob("*") if file.is_file()}
    weights = "network/diffusion_pytorch_model.safetensors"
    assert set(files) == {"model_index.json", "pipeline.py", "README.md", "network/network.py", "network/config.json", weights}
    assert written.bytes == sum(files.values())
    index = json.loads((written.path / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "LimbeckPipeline"]
    assert index["classes"] == ["class 0", "class 1", "class 2"]
    facts = index["facts"]
    assert (facts["times"], facts["mode"], facts["prediction"], facts["precondition"]) == ([0.999, 0.749, 0.249], "renoise", "eps", "none")
    assert facts["schedule"]["name"] == "vp"
    assert facts["schedule"]["beta_end"] == 0.012
    assert [row["time"] for row in index["table"]] == [999.0, 749.0, 249.0]
    card = (written.path / "README.md").read_text()
    assert "trust_remote_code=True" in card
    assert "3 network calls" in card
    # again: an earlier export is replaced, anything else is left alone
    export(tmp_path / "run", "diffusers")
    (written.path / "network" / "mine.txt").write_text("")
    (written.path / "extra").mkdir()
    with pytest.raises(InputError, match="not a saved model"):
        export(tmp_path / "run", "diffusers")
    with pytest.raises(InputError, match="not a saved model"):
        exporter.export_diffusers(module, tmp_path / "run" / "artefact")


def test_a_difference_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artefact("one step", tmp_path / "run")
    real = exporter.sampling_table
    monkeypatch.setattr(exporter, "sampling_table", lambda g: ([{**row, "skip": row["skip"] + 0.01} for row in real(g)[0]], real(g)[1]))
    with pytest.raises(LimbeckError, match="differ from the generator's"):
        export(tmp_path / "run", "diffusers")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_networks_code_is_limbecks_own_and_stands_alone() -> None:
    """Put together from the sources at every export; here: that it holds no import of limbeck, and no name twice."""
    tree = ast.parse(exporter.network_source())
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert {name.partition(".")[0] for name in modules} <= {"__future__", "abc", "collections", "difflib", "math", "typing", "torch", "diffusers"}
    names = Counter(node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef))
    assert {"MLPNetwork", "UNetNetwork", "Network", "InputError"} <= set(names)
    assert max(names.values()) == 1


def test_what_cannot_be_exported_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = {"name": "mixture_denoiser", "args": {"means": [[0.0, 1.0]], "std": 0.1}}
    closed = build_model(around(mixture, [80.0]), num_classes=0, input_shape=(2,), seed=0)
    inner: Any = build_model(around(mlp(), [80.0]), num_classes=2, input_shape=(2,), seed=0)
    for module, words in (
        (closed, "MixtureDenoiser is no network"),
        (inner.denoiser, "NetworkDenoiser makes no samples"),
        (TeacherSampler(inner.denoiser, 3), "how TeacherSampler samples"),
    ):
        with pytest.raises(InputError, match=words):
            exporter.export_diffusers(module, tmp_path / "out")
    monkeypatch.setattr(inner.denoiser, "network", torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="Linear is neither"):
        exporter.export_diffusers(inner, tmp_path / "out")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingExtra, match="diffusers"):
        exporter.export_diffusers(inner, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# ---- ONNX of the same generators -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one step", "unconditional", "signal images", "direct", "attention, one step", "their text"])
def test_one_call_as_onnx(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    if name.endswith(", one step"):
        component, shape, classes = CASES[name.removesuffix(", one step")]
        args = {**component.args, "times": component.args["times"][:1]}
        monkeypatch.setitem(CASES, name, (Component(name="generator", args=args), shape, classes))
    module = artefact(name, tmp_path / "run" / "artefact")
    report = export(tmp_path / "run", "onnx")
    session = onnxruntime.InferenceSession(report.path)
    assert [one.name for one in session.get_inputs()] == (["noise", "labels"] if module.num_classes else ["noise"])
    for count in (1, 7):
        noise = torch.randn(count, *module.shape)
        labels = torch.arange(count) % module.num_classes if module.num_classes else None
        feed = {"noise": noise.numpy()} | ({} if labels is None else {"labels": labels.numpy()})
        [found] = session.run(["samples"], feed)
        with torch.no_grad():
            expected = module.scale(module(noise, labels))
        assert expected.std() > 1e-3
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == ([f"class {i}" for i in range(module.num_classes)] if module.num_classes else [])


def test_several_calls_are_no_onnx_graph(tmp_path: Path) -> None:
    artefact("four steps", tmp_path / "run")
    with pytest.raises(InputError, match=r"4 calls with fresh noise.*--to diffusers"):
        export(tmp_path / "run", "onnx")
    component = Component.model_validate(mlp())
    denoiser = build_model(component, num_classes=3, input_shape=(2,), seed=0)
    save(Artefact("denoiser", denoiser), tmp_path / "teacher", model=component, num_classes=3, input_shape=(2,), preprocess={}, classes=(), extra={})
    for to in ("onnx", "diffusers"):
        with pytest.raises(InputError, match=r"[Dd]istil"):
            export(tmp_path / "teacher", to)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "teacher"]
