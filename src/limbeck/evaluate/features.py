"""What generated samples are compared by: features of a small classifier of the real data, raw values, or Inception's.

An extractor is made from the real data once and used for every arm: numbers are comparable exactly where its `fingerprint` is the same.
Inputs are in network units, as `data.prepare` gives and as a generator returns them; features are [N, F] float64 on the CPU, for `evaluate.samples`.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from limbeck import seeds
from limbeck.contract import IGNORE, Data, Frozen
from limbeck.data import hold_out, inputs_fingerprint, origins, subset
from limbeck.errors import InputError, MissingExtra
from limbeck.evaluate.classifier import accuracy
from limbeck.evaluate.cost import torch_threads
from limbeck.evaluate.predict import device_of, predict
from limbeck.files import write_atomic, write_json
from limbeck.models.small import Network, cnn
from limbeck.models.weights import fingerprint, load_weights
from limbeck.modes import evaluating

BATCH = 128
"""Samples a step of the classifier's training."""
LEARNING_RATE = 2e-3
"""Adam's, falling to 0 in a straight line."""
LEAST_STEPS = 300
"""Steps of training however small the real data are (unless the spec allows fewer)."""
HELD_OUT = 5000
"""The most samples kept out of training to state the classifier's accuracy; a tenth where there are fewer."""


class FeatureSpec(Frozen):
    """Which features generated samples are compared by."""

    kind: Literal["classifier", "pixels", "inception"] = Field(
        "classifier",
        description="'classifier': the penultimate layer of a small CNN trained on the real labelled images; 'pixels': the inputs themselves, flattened "
        "(also for points); 'inception': the 2048 of FID's Inception, from weights on disk",
    )
    width: int = Field(64, ge=2, le=4096, description="'classifier': number of features")
    epochs: int = Field(3, ge=1, le=1000, description="'classifier': passes over the real data; more where these are fewer than 300 steps")
    steps: int = Field(3000, ge=1, description="'classifier': the most steps of training, of 128 samples each")
    seed: int = Field(0, ge=0, description="'classifier': of the first weights, the order of the samples and what is held out")
    weights: str | None = Field(None, description="'inception': path of torch-fidelity's weights, pt_inception or weights-inception-2015-12-05 (.pth)")


@dataclass(frozen=True)
class Extractor:
    """A fixed function from inputs to features.

    name: as reports call it. fingerprint: SHA-256 (hex) of its weights ('pixels': of its input shape). dimension: F.
    input_shape: of one input; None: any image. module: [B, *input_shape] float32 -> [B, F]. facts: JSON values for a report (held-out accuracy, …).
    """

    name: str
    fingerprint: str
    dimension: int
    module: nn.Module
    input_shape: tuple[int, ...] | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def features(self, inputs_NX: Tensor, batch_size: int = 512) -> Tensor:
        """Features of inputs in network units, in order, in eval mode, without gradient; computed where the module is.

        Args:
            inputs_NX: [N, *input_shape], N ≥ 1. batch_size: inputs a call; it changes nothing but rounding.

        Returns:
            [N, F] float64 on the CPU.

        Raises:
            InputError: the inputs are of another shape, or hold NaN or infinity.
        """
        if len(inputs_NX.shape) < 2 or not len(inputs_NX) or (self.input_shape is not None and tuple(inputs_NX.shape[1:]) != self.input_shape):
            wanted = "[N, channels, height, width]" if self.input_shape is None else f"[N, {', '.join(map(str, self.input_shape))}]"
            raise InputError(f"the features '{self.name}' are of inputs {wanted}, N ≥ 1, not {list(inputs_NX.shape)}.", where="inputs")
        if batch_size < 1:
            raise InputError(f"'batch_size' is {batch_size}, at least 1 is needed.", where="batch_size")
        place, found = device_of(self.module), []
        with torch.no_grad(), evaluating(self.module):
            for inputs in inputs_NX.split(batch_size):
                if not bool(torch.isfinite(inputs).all()):
                    raise InputError("the inputs hold NaN or infinity.", where="inputs", fix="Look at the generator: did it diverge?")
                found.append(self.module(inputs.to(place, torch.float32)).double().cpu())
        return torch.cat(found)


def extractor(spec: FeatureSpec, data: Data, folder: Path | None = None) -> Extractor:
    """The extractor that a spec names, for the real data.

    Args:
        data: the real training set; labelled for 'classifier' (unlabelled samples are left out). What it is made of decides the features.
        folder: where 'classifier' keeps its weights, and finds them where they are of the same data, labels and spec; None: nowhere.

    Raises:
        InputError: the data have no labels or are no images where the kind needs them, weights are missing or damaged.
        MissingExtra: torch-fidelity is not installed ('inception').
    """
    if not len(data):
        raise InputError("the real data are empty.", where="data")
    if spec.weights is not None and spec.kind != "inception":
        raise InputError(f"the features '{spec.kind}' take no weights.", where="weights", fix="Leave them out, or set kind: inception.")
    if spec.kind == "inception":
        return _inception(spec, data)
    shape = _input_shape(data)
    if spec.kind == "pixels":
        digest = hashlib.sha256(f"pixels {shape}".encode()).hexdigest()
        return Extractor("pixels", digest, math.prod(shape), nn.Flatten(), shape)
    return _classifier(spec, data, shape, folder)


def _input_shape(data: Data) -> tuple[int, ...]:
    return tuple(data.prepare(data.fetch(torch.zeros(1, dtype=torch.int64))[0]).shape[1:])


# ---- a classifier of the real data -------------------------------------------------------------------------------------------


def _classifier(spec: FeatureSpec, data: Data, shape: tuple[int, ...], folder: Path | None) -> Extractor:
    labelled = _labelled(data)
    if len(shape) != 3:
        raise InputError(f"the features 'classifier' are of images, these inputs are {list(shape)}.", where="kind", fix="Use kind: pixels.")
    identity = {
        "kind": spec.kind,
        "width": spec.width,
        "epochs": spec.epochs,
        "steps": spec.steps,
        "seed": spec.seed,
        "input_shape": list(shape),
        "inputs": inputs_fingerprint(data),
        "samples": _samples_fingerprint(labelled),
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    network = _network(spec, shape, labelled)
    about = None if folder is None else folder / f"classifier-{key}.json"
    if about is not None and about.is_file():
        facts = _load(network.features, about, identity)
    else:
        facts = {"trained_on": identity, **_train(network, spec, labelled)}
        facts["fingerprint"] = fingerprint(network.features)
        if about is not None:
            _save(network.features, about, facts)
    found = {name: facts[name] for name in ("accuracy", "held_out", "trained_steps")}
    return Extractor(f"classifier-{spec.width}", facts["fingerprint"], spec.width, network.features, shape, found)


def _labelled(data: Data) -> Data:
    """The samples with a label. Raises InputError where these are of fewer than two classes."""
    targets_N = data.targets
    known = torch.zeros(len(data), dtype=torch.bool) if targets_N is None else targets_N != IGNORE
    if targets_N is None or len(targets_N[known].unique()) < 2:
        raise InputError("the features 'classifier' need real data with labels of two classes or more.", where="kind", fix="Use kind: pixels.")
    return data if bool(known.all()) else subset(data, known.nonzero()[:, 0])


def _samples_fingerprint(data: Data) -> str:
    """SHA-256 (hex) of which samples of the whole data set these are, and of their labels."""
    digest = hashlib.sha256(origins(data).numpy().tobytes())
    if data.targets is not None:
        digest.update(data.targets.numpy().tobytes())
    return digest.hexdigest()


def _network(spec: FeatureSpec, shape: tuple[int, ...], data: Data) -> Network:
    """Blocks of 3×3 convolution, batch norm, ReLU, halving, down to a side of about 4 (at least two where possible); then `width` features with ReLU."""
    side = min(shape[1:])
    blocks = min(max(2, math.ceil(math.log2(side / 4))), int(math.log2(side)))
    widths = [min(16 * 2**block, 64) for block in range(blocks)]
    classes = int(data.targets.max()) + 1 if data.targets is not None else 0
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seeds.derive(spec.seed, "features"))
        return cnn(widths, classes, shape, hidden=spec.width)


def _train(network: Network, spec: FeatureSpec, data: Data) -> dict[str, Any]:
    """Train on the labelled data but for a held-out part, on one CPU thread, so that a machine always arrives at the same weights; its facts."""
    train, held_out = hold_out(data, max(1, min(len(data) // 10, HELD_OUT)), spec.seed)
    steps_an_epoch = max(1, len(train) // BATCH)
    steps = min(max(spec.epochs * steps_an_epoch, LEAST_STEPS), spec.steps)
    optimiser = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    network.train()
    with torch_threads(1), torch.enable_grad():
        for step in range(steps):
            epoch, place = divmod(step, steps_an_epoch)
            if place == 0:
                order_N = torch.randperm(len(train), generator=seeds.generator(spec.seed, "features", epoch))
            raw, targets = train.fetch(order_N[place * BATCH : (place + 1) * BATCH])
            loss = F.cross_entropy(network(train.prepare(raw)), targets)  # type: ignore[arg-type]  # labelled, or `_labelled` would have said so
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    network.requires_grad_(False).eval()
    targets_N = held_out.targets
    right = accuracy(predict(network, held_out), targets_N) if targets_N is not None else None
    return {"accuracy": right, "held_out": len(held_out), "trained_steps": steps}


def _save(module: nn.Module, about: Path, facts: dict[str, Any]) -> None:
    """The weights first, then what they are: where there is a .json, its weights are whole."""
    from safetensors.torch import save

    write_atomic(about.with_suffix(".safetensors"), save(dict(module.state_dict())))
    write_json(about, facts)


def _load(module: nn.Module, about: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The facts of the weights beside `about`, which are loaded. Raises InputError where the two do not belong together."""
    weights = about.with_suffix(".safetensors")
    fix = f"Delete {about} and {weights.name}: the classifier is then trained again, and what was measured with the old one must be measured again."
    try:
        facts = json.loads(about.read_text(encoding="utf-8"))
        fits = facts["trained_on"] == identity
        expected = facts["fingerprint"]
        facts["accuracy"], facts["held_out"], facts["trained_steps"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"this does not describe a classifier ({type(error).__name__}).", where=str(about), fix=fix) from error
    if not fits:
        raise InputError("the classifier was trained on other data than its name says.", where=str(about), fix=fix)
    load_weights(module, weights)
    module.requires_grad_(False).eval()
    if fingerprint(module) != expected:
        raise InputError("the weights are not those that the .json beside them describes.", where=str(weights), fix=fix)
    return facts


# ---- Inception ---------------------------------------------------------------------------------------------------------------


class _Inception(nn.Module):
    """Images in network units -> FID's 2048 features, by torch-fidelity's network (TF1 resizing, as the published numbers have it)."""

    black: Tensor
    white: Tensor

    def __init__(self, inner: nn.Module, black_CHW: Tensor, white_CHW: Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("black", black_CHW, persistent=False)
        self.register_buffer("white", white_CHW, persistent=False)

    def forward(self, inputs_BX: Tensor) -> Tensor:
        """[B, 1 or 3, H, W] -> [B, 2048]; rounded to 8 bits as image files are, grey repeated."""
        unit = (inputs_BX - self.black) / (self.white - self.black)
        bytes_BX = (unit * 255).round().clamp(0, 255).to(torch.uint8)
        return self.inner(bytes_BX.expand(-1, 3, -1, -1))[0]


def _inception(spec: FeatureSpec, data: Data) -> Extractor:
    where = "Download pt_inception-2015-12-05-6726825d.pth (torch-fidelity's release v0.2.0) and give its path as 'weights', or use kind: classifier."
    if spec.weights is None:
        raise InputError("the features 'inception' need weights on disk; limbeck fetches none.", where="weights", fix=where)
    if not Path(spec.weights).is_file():
        raise InputError(f"there are no weights at {spec.weights}.", where="weights", fix=where)
    shape = _input_shape(data)
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise InputError(f"the features 'inception' are of grey or RGB images, these inputs are {list(shape)}.", where="kind", fix="Use kind: pixels.")
    inner = _inception_network(Path(spec.weights))
    black, white = _black_and_white(data)
    return Extractor("inception-2048", fingerprint(inner), 2048, _Inception(inner, black, white), shape)


def _inception_network(path: Path) -> nn.Module:
    """torch-fidelity's Inception in eval mode. The file is read as tensors alone: its own loader would run whatever pickle holds."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise MissingExtra("torch-fidelity", "diffusion", why="the features 'inception'") from error
    checked = io.BytesIO()
    try:
        torch.save(torch.load(path, map_location="cpu", weights_only=True), checked)
        checked.seek(0)
        with torch.random.fork_rng(devices=[]):  # its layers draw first weights, which the file's then replace
            return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=checked)
    except Exception as error:  # a damaged or foreign file fails in many ways: UnpicklingError, RuntimeError, EOFError, TypeError, ...
        reason = str(error).partition("\n")[0][:200]
        fix = "Is it torch-fidelity's file (pt_inception-2015-12-05-6726825d.pth), and complete?"
        raise InputError(f"these are no weights of FID's Inception ({type(error).__name__}: {reason}).", where=str(path), fix=fix) from error


def _black_and_white(data: Data) -> tuple[Tensor, Tensor]:
    """What `prepare` makes of a black and of a white image, each [C, H, W], where it acts on every value alone and in a straight line.

    Raises:
        InputError: it does not, or raw floats are not in [0, 1], so that nobody knows which value is black.
    """
    raw, _ = data.fetch(torch.linspace(0, len(data) - 1, min(64, len(data)), dtype=torch.float64).long())
    if raw.is_floating_point() and (raw.min() < 0 or raw.max() > 1):
        what = f"raw images are floats from {float(raw.min()):.3g} to {float(raw.max()):.3g}, so that it is not known which value is black."
        raise InputError(what, where="data", fix="Give raw images as uint8 or in [0, 1], with mean and std, or use kind: classifier.")
    largest = 1.0 if raw.is_floating_point() else 255
    black, white, grey = (data.prepare(torch.full_like(raw[:1], share * largest))[0] for share in (0, 1, 0.2))
    if not torch.allclose(grey, black + 0.2 * (white - black), atol=1e-5) or not bool((white != black).all()):
        raise InputError("the preparation of the images is no rescaling, and cannot be undone.", where="data", fix="Use kind: classifier.")
    return black, white
