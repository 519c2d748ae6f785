"""A generator as a folder that diffusers alone opens and samples from: its own code, its weights, and a table of numbers in place of limbeck's samplers.

All that a sampler of ours does between two network calls is linear in x, x̂0 and fresh noise, with factors that depend on the time alone. They are computed
once (`calls.sampling_table`), so that the folder's pipeline.py knows no schedule, no preconditioning and no kind of prediction. The networks' code is taken
from limbeck's own sources (`network_source`), so that it cannot fall behind. The folder is sampled from and compared before it takes its place.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

import limbeck
from limbeck import errors
from limbeck.diffusion import networks
from limbeck.diffusion.adapters import AdaptedNetwork, TextUNet
from limbeck.diffusion.denoisers import NetworkDenoiser
from limbeck.diffusion.generator import Sampling
from limbeck.diffusion.networks import MLPNetwork, UNetNetwork
from limbeck.errors import InputError, LimbeckError, MissingExtra
from limbeck.export.calls import plain_network, sampling_table
from limbeck.export.folder import Exported, replace_folder
from limbeck.files import write_atomic
from limbeck.models import arguments as checks

INDEX, PIPELINE, NETWORK, WEIGHTS = "model_index.json", "pipeline.py", "network", "diffusion_pytorch_model.safetensors"
MARKS = frozenset({INDEX, PIPELINE, NETWORK})
"""Names by which an earlier export is told."""
TOLERANCE = 1e-5
"""Bound of the largest difference between the folder's samples and the generator's, relative to the largest sample."""
SAMPLES = 4  # that the check draws


def export_diffusers(generator: nn.Module, output: Path | str) -> Exported:
    """Write a generator as a folder for `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`.

    Kinds: `Generator` (any number of steps and mode), `ConsistencyGenerator`, `SignalGenerator`, and `DirectGenerator` around a `NoiseMap`; the networks
    limbeck's own and those of diffusers.

    Raises:
        InputError: what cannot be expressed so, or `output` holds something else. MissingExtra: diffusers is not installed.
        LimbeckError: the folder's samples differ from the generator's; nothing is left.
    """
    try:
        version = importlib.import_module("diffusers").__version__
    except ModuleNotFoundError as error:
        raise MissingExtra("diffusers", "diffusion", why="an export for diffusers") from error
    if not isinstance(generator, Sampling):
        raise InputError(f"{type(generator).__name__} makes no samples.", where="--to", fix="Export a generator; a denoiser has to be distilled first.")
    table, start = sampling_table(generator)
    network, mean = plain_network(generator)
    if type(network) not in (MLPNetwork, UNetNetwork) and not isinstance(network, AdaptedNetwork):
        raise InputError(f"{type(network).__name__} is neither a network of limbeck nor of diffusers; its code cannot be put into the folder.", where="--to")
    known: dict[str, Any] = getattr(generator, "limbeck_config", {})
    settings = {
        "table": table, "start": start, "shape": list(generator.shape), "num_classes": generator.num_classes,
        "mean": mean, "std": generator.scale.std.tolist(), "bounded": generator.scale.bounded,
        "classes": list(known.get("classes") or ()) if generator.num_classes else [], "facts": _facts(generator),
    }  # fmt: skip

    def write(target: Path) -> None:
        place = target / NETWORK
        place.mkdir()
        if isinstance(network, AdaptedNetwork):
            model: Any = network.model
            model.save_pretrained(place)
            component = ["diffusers", type(model).__name__]
        else:
            kind, arguments = _arguments(network)
            config = {"_class_name": "Network", "_diffusers_version": version, "kind": kind, "arguments": arguments}
            write_atomic(place / "config.json", json.dumps(config, indent=2) + "\n")
            state = {f"network.{name}": value.detach().cpu().clone().contiguous() for name, value in network.state_dict().items()}
            (place / WEIGHTS).write_bytes(safetensors.torch.save(state, metadata={"format": "pt"}))
            write_atomic(place / f"{NETWORK}.py", network_source())
            component = [NETWORK, "Network"]
        index = {"_class_name": ["pipeline", "LimbeckPipeline"], "_diffusers_version": version, "network": component, **settings}
        write_atomic(target / INDEX, json.dumps(index, indent=2, allow_nan=False) + "\n")
        write_atomic(target / PIPELINE, _source("limbeck.export.standalone_pipeline"))
        write_atomic(target / "README.md", _card(Path(output).name, generator))
        _compare(generator, target, settings)

    return Exported.of(replace_folder(output, write, marks=MARKS))


# ---- the network as code --------------------------------------------------------------------------------------------------


def _arguments(network: nn.Module) -> tuple[str, dict[str, Any]]:
    """What builds a network of limbeck again."""
    given: Any = network
    common = {
        "shape": list(given.shape), "num_classes": given.num_classes, "time_frequencies": given.time.count, "embedding": given.time.embedding,
        "fourier_scale": given.time.scale, "zero_output": given.zero_output,
    }  # fmt: skip
    if isinstance(network, MLPNetwork):
        return "mlp", {**common, "widths": list(network.widths), "dropout": network.dropout.p, "residual": network.residual}
    assert isinstance(network, UNetNetwork)
    width = given.embed[0].out_features // 4
    heights = [-(-network.shape[1] // 2**level) for level in range(len(network.channels))]
    attends = [height for height, level in zip(heights, given.down, strict=True) if len(level.attention)]
    middle_alone = len(given.middle.attention) > 0 and heights[-1] not in attends
    if middle_alone and attends:
        raise InputError("a U-Net whose middle attends alone beside other levels cannot be described.", where="--to")
    return "unet", {
        **common, "width": width, "multipliers": [channels // width for channels in network.channels], "blocks": len(given.down[0].blocks),
        "dropout": given.down[0].blocks[0].dropout.p, "attention": None if middle_alone else attends,
    }  # fmt: skip


def network_source() -> str:
    """One file with limbeck's networks as a model of diffusers: the sources of errors, of argument checks and of networks, without imports of limbeck."""
    sources = [inspect.getsource(module) for module in (errors, checks, networks)]
    wrapper = _source("limbeck.export.standalone_network")
    head = '"""Networks of limbeck as a model of diffusers, put together from its sources; it needs no limbeck."""\n\nfrom __future__ import annotations\n\n'
    return head + "\n\n".join(_without_imports(source) for source in (*sources, wrapper))


def _source(module: str) -> str:
    """The text of a module of limbeck that is not imported."""
    return (Path(limbeck.__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")).read_text(encoding="utf-8")


def _without_imports(source: str) -> str:
    """A module's text without its docstring and its imports of limbeck and of __future__."""
    lines = source.splitlines()
    for index, node in enumerate(ast.parse(source).body):
        docstring = index == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ours = isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ("limbeck", "__future__")
        if docstring or ours:
            for line in range(node.lineno - 1, node.end_lineno or node.lineno):
                lines[line] = ""
    return "\n".join(lines).strip() + "\n"


# ---- facts and the check --------------------------------------------------------------------------------------------------


def _facts(generator: Sampling) -> dict[str, Any]:
    """What the folder was made of, for the reader."""
    found: dict[str, Any] = {"limbeck": limbeck.__version__, "generator": type(generator).__name__, "calls": generator.calls}
    found |= {key: value for key, value in generator.arguments.items() if key != "scale"}
    denoiser: Any = getattr(generator, "denoiser", None)
    if isinstance(denoiser, NetworkDenoiser):
        options = {key: value for key, value in vars(denoiser.schedule).items() if isinstance(value, int | float | str)}
        found["schedule"] = {"name": denoiser.schedule.name, **options}
        found |= {"prediction": denoiser.prediction, "precondition": denoiser.precondition, "sigma_data": denoiser.sigma_data}
    return found


def _card(name: str, generator: Sampling) -> str:
    """README.md."""
    text = isinstance(getattr(getattr(generator, "denoiser", None), "network", None), TextUNet)
    call = "pipe(prompt_embeds=embeddings, seed=0)" if text else f"pipe(16, {'labels=0, ' if generator.num_classes else ''}seed=0)"
    lines = ["---", "library_name: diffusers", "tags:", "- distillation", "- limbeck", "---", "", f"# {name}", ""]
    lines += [f"A generator of {generator.calls} network call{'s' * (generator.calls != 1)}, distilled with limbeck {limbeck.__version__}.", "", "```python"]
    lines += ["from diffusers import DiffusionPipeline", "", 'pipe = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)']
    lines += [f"samples = {call}.images  # [N, {', '.join(map(str, generator.shape))}]", "```", ""]
    return "\n".join([*lines, "`trust_remote_code` lets diffusers run pipeline.py and network/network.py of this folder; limbeck is not needed.", ""])


def _compare(generator: Sampling, folder: Path, settings: Mapping[str, Any]) -> None:
    """Sample from the written folder, in this process, and compare. Raises LimbeckError."""
    diffusers: Any = importlib.import_module("diffusers")
    code = _executed(folder / PIPELINE, "limbeck_exported_pipeline")
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    library, name = index["network"]
    own = _executed(folder / NETWORK / f"{NETWORK}.py", "limbeck_exported_network") if library == NETWORK else None
    cls = getattr(diffusers if own is None else own, name)
    pipeline = code.LimbeckPipeline(cls.from_pretrained(folder / NETWORK, local_files_only=True), **{key: index[key] for key in settings})
    pipeline.set_progress_bar_config(disable=True)
    more: dict[str, Any] = {}
    network: Any = getattr(getattr(generator, "denoiser", None), "network", None)
    if isinstance(network, TextUNet):
        labels = torch.arange(SAMPLES) % network.num_classes if network.num_classes else None
        more["prompt_embeds"] = network.embeddings(None if labels is None else labels.to(network.prompts.device), SAMPLES).cpu()
    device = next(generator.parameters()).device
    expected, found = generator.to("cpu").sample(SAMPLES), pipeline(SAMPLES, **more).images
    generator.to(device)
    difference, size = float((found - expected).abs().max()), max(float(expected.abs().max()), 1.0)
    if not difference <= TOLERANCE * size:
        raise LimbeckError(f"the folder's samples differ from the generator's by {difference:.3g} where they reach {size:.3g}; nothing was written.")


def _executed(file: Path, name: str) -> Any:
    """A module of a file's code, which is limbeck's own; not kept."""
    module = types.ModuleType(name)
    exec(compile(file.read_text(encoding="utf-8"), str(file), "exec"), module.__dict__)
    return module
