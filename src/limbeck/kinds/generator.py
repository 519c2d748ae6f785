"""Generators: samples against real samples, and against the teacher's samples from the same noise, at so many network calls."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.contract import Artefact, Data, Method
from limbeck.data import AugmentSpec
from limbeck.data.points import Mixture, network_mixture_of
from limbeck.diffusion.denoisers import Denoiser, Guided
from limbeck.diffusion.generator import DataScale, Sampling, TeacherSampler, data_scale
from limbeck.errors import InputError
from limbeck.evaluate import samples as statistics
from limbeck.evaluate.features import Extractor, FeatureSpec, extractor
from limbeck.evaluate.predict import device_of
from limbeck.ingredients import Prepared
from limbeck.kinds.base import Kind, Measured
from limbeck.modes import evaluating
from limbeck.report.samples import image_grid, scatter
from limbeck.report.summary import Outcome, Picture
from limbeck.train import TrainConfig

IMAGE_HEADLINE = ("fid", "mmd2", "precision", "recall", "coverage", "paired_rmse", "calls", "seconds_per_sample")
POINT_HEADLINE = ("mmd2", "sliced_wasserstein", "energy_distance", "modes_covered", "outliers", "frequency_tv", "paired_rmse", "calls", "seconds_per_sample")
NOISE_SEED = 20_000
LEAST_REAL = 6
"""Real samples without which no neighbourhood can be measured."""


@dataclass
class Reference:
    """What generators are compared with.

    noise [N, *shape] and labels [N] (None without classes): the same for all arms. real [R, F]: features of test samples. best [N, *shape]: what the teacher
    makes of the noise with its best sampler, network units (None without a teacher); best_seconds: a sample.
    """

    extractor: Extractor
    real: Tensor
    real_inputs: Tensor
    mixture: Mixture | None
    scale: DataScale
    noise: Tensor
    labels: Tensor | None
    best: Tensor | None = None
    best_seconds: float = 0.0
    measured: dict[str, Outcome] = field(default_factory=dict)
    """The teacher's own outcomes, by sampler: they do not depend on the student's seed."""


class GeneratorKind(Kind):
    """FID, MMD² and their like on features; for points sliced Wasserstein, energy distance and modes; RMSE to the teacher from the same noise."""

    name = "generator"
    most_repeats = 7
    labels = {"teacher": "teacher", "distilled": "student"}  # noqa: RUF012

    def __init__(self, method: Method, evaluate: Any) -> None:
        super().__init__(method, evaluate)
        self.guidance = float(getattr(method.config, "guidance_scale", 1.0))

    def headline(self, prepared: Prepared) -> tuple[str, ...]:
        """FID first for images, MMD² for points; what cannot be measured of these data is left out."""
        if len(prepared.input_shape) != 1:
            return IMAGE_HEADLINE
        known = network_mixture_of(prepared.test) is not None
        return tuple(name for name in POINT_HEADLINE if known or name not in ("modes_covered", "outliers", "frequency_tv"))

    def check(self, prepared: Prepared, train: TrainConfig, augment: AugmentSpec) -> None:
        """There must be real samples to compare with, unmixed ones to train on, and whole networks to sample from."""
        if train.sharding == "fsdp2":
            raise InputError("generators cannot be sharded yet.", where="train.sharding", fix="Use 'none'.")
        if augment.mixes:
            raise InputError("mixed images are no samples of the data.", where="data.augment", fix="Leave out mixup and cutmix.")
        self._measurable(prepared)

    def beforehand(self, method: Method) -> Artefact:
        """The denoiser, not the generator around it."""
        return Artefact("denoiser", method.student)

    def _measurable(self, prepared: Prepared) -> None:
        if len(prepared.test) < LEAST_REAL:
            raise InputError(f"the test data have {len(prepared.test)} samples, too few to compare with.", where="data", fix=f"Use at least {LEAST_REAL}.")
        spec = self.evaluate.features
        if spec is None or spec.kind == "pixels":
            return
        if len(prepared.input_shape) != 3:
            raise InputError(f"features of kind '{spec.kind}' are of images.", where="evaluate.features.kind", fix="Use pixels, or leave it out.")
        if spec.kind == "classifier" and prepared.train.targets is None:
            raise InputError("features of kind 'classifier' need labels.", where="evaluate.features.kind", fix="Use pixels.")
        if spec.kind == "inception" and (spec.weights is None or not Path(spec.weights).is_file()):
            raise InputError(
                "features of kind 'inception' need their weights on disk.",
                where="evaluate.features.weights",
                fix="Name torch-fidelity's weights-inception file.",
            )

    def fits(self, module: nn.Module, example: Tensor, prepared: Prepared, where: str) -> None:
        """Samples of the data's shape, and no more classes than the data have."""
        shape = getattr(module, "shape", None)
        if shape is None:
            raise InputError(
                f"the {where.split('.')[0]} is {type(module).__name__}, neither a denoiser nor a generator.",
                where=f"{where}.model",
                fix="Use unet_denoiser, say.",
            )
        if tuple(shape) != tuple(prepared.input_shape):
            raise InputError(f"it makes samples of shape {list(shape)}, the data's are {list(prepared.input_shape)}.", where=f"{where}.model")
        classes = int(getattr(module, "num_classes", 0))
        if classes and classes != prepared.num_classes:
            raise InputError(f"it has {classes} classes, the data have {prepared.num_classes}.", where=f"{where}.model", fix="Or set conditional: false.")
        try:
            with torch.no_grad(), evaluating(module):
                x = example.to(device_of(module))
                if isinstance(module, Denoiser):
                    out = module(x, torch.full((len(x),), module.schedule.t_max, dtype=torch.float64, device=x.device))
                else:
                    out = module(x)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise InputError(f"it cannot take inputs of shape {list(example.shape[1:])}: {str(error).splitlines()[0]}", where=f"{where}.model") from error
        if out.shape != example.shape:
            raise InputError(f"it gives {list(out.shape[1:])} for samples of {list(example.shape[1:])}.", where=f"{where}.model")

    def teacher(self, members: Sequence[nn.Module]) -> Denoiser:
        """The one denoiser, frozen."""
        if len(members) != 1:
            raise InputError("a generator has one teacher.", where="teacher", fix="Name one denoiser.")
        if not isinstance(members[0], Denoiser):
            raise InputError(f"the teacher is {type(members[0]).__name__}, no denoiser.", where="teacher.model", fix="Use unet_denoiser, say.")
        return members[0].requires_grad_(False).eval()

    # ---- samples --------------------------------------------------------------------------------------------------

    def sampling(self, module: nn.Module, prepared: Prepared, *, steps: int | None = None, sampler: str | None = None) -> Sampling:
        """A module as something to sample from: a generator as it is, a denoiser with its sampler (guided as the method says)."""
        if isinstance(module, Sampling):
            return module
        if not isinstance(module, Denoiser):
            raise InputError(f"{type(module).__name__} is neither a generator nor a denoiser.", where="student")
        return self._sampler(module, steps, sampler, data_scale(prepared.train, prepared.input_shape))

    def _sampler(self, denoiser: Denoiser, steps: int | None = None, sampler: str | None = None, scale: DataScale | None = None) -> TeacherSampler:
        guided = denoiser if self.guidance == 1 or not denoiser.num_classes else Guided(denoiser, self.guidance)
        return TeacherSampler(guided, steps or max(self.evaluate.teacher_steps), sampler=sampler or self.evaluate.teacher_sampler, scale=scale)

    def cost(self, sampling: Sampling) -> int:
        """Network calls a sample; a guided call counts twice."""
        twice = isinstance(sampling, TeacherSampler) and isinstance(sampling.denoiser, Guided) and sampling.denoiser.scale not in (0, 1)
        return sampling.calls * (2 if twice else 1)

    @torch.no_grad()
    def draw(self, sampling: Sampling, noise: Tensor, labels: Tensor | None) -> tuple[Tensor, float]:
        """Samples [N, *shape] of this noise on the CPU, network units, and the seconds a sample took."""
        device = device_of(sampling)
        later = torch.Generator(device).manual_seed(NOISE_SEED + 1)
        conditional, found = bool(sampling.num_classes), []
        began = time.perf_counter()
        size = self.evaluate.batch_size
        with evaluating(sampling):
            if device.type != "cpu":  # kernels are chosen and loaded at the first call
                Conditioned(sampling)(noise[:size].to(device))
                began = time.perf_counter()
            for first in range(0, len(noise), size):
                part = slice(first, first + size)
                cond = labels[part].to(device) if conditional and labels is not None else None
                found.append(sampling(noise[part].to(device), cond, later).float().cpu())
        return torch.cat(found), (time.perf_counter() - began) / len(noise)

    def reference(self, teacher: Any, prepared: Prepared, place: Path | None) -> Reference:
        """Features of real samples, the noise that all arms get, and what the teacher makes of it."""
        spec = self.evaluate.features or FeatureSpec(kind="classifier" if len(prepared.input_shape) == 3 and prepared.train.targets is not None else "pixels")
        features = extractor(spec, prepared.train, place)
        count = self.evaluate.samples
        drawn = torch.randperm(len(prepared.test), generator=torch.Generator().manual_seed(NOISE_SEED))[:count]  # a test set may be sorted
        real = prepared.test.prepare(prepared.test.fetch(drawn)[0])
        noise = torch.randn(count, *prepared.input_shape, generator=torch.Generator().manual_seed(NOISE_SEED))
        labels = torch.arange(count) % prepared.num_classes if prepared.num_classes else None
        mixture = network_mixture_of(prepared.test)
        found = Reference(features, features.features(real), real, mixture, data_scale(prepared.train, prepared.input_shape), noise, labels)
        if isinstance(teacher, Denoiser):
            found.best, found.best_seconds = self.draw(self.sampling(teacher, prepared), noise, labels)
        return found

    # ---- numbers --------------------------------------------------------------------------------------------------

    def measures(self, fake: Tensor, reference: Reference) -> dict[str, float | None]:
        """Every measure of samples [N, *shape] in network units that these data allow; None where a sample is not finite."""
        if not bool(fake.isfinite().all()):
            return dict.fromkeys(("fid", "kid", "mmd2", "sliced_wasserstein", "energy_distance", "precision", "recall", "density", "coverage"))
        real, features = reference.real, reference.extractor.features(fake)
        found: dict[str, float | None] = {"mmd2": statistics.mmd2(real, features)}
        if fake.dim() > 2:
            manifold, neighbours = statistics.precision_recall(real, features), statistics.density_coverage(real, features)
            return found | {
                "fid": statistics.fid(real, features), "kid": statistics.kid(real, features),
                "precision": manifold.precision, "recall": manifold.recall, "density": neighbours.density, "coverage": neighbours.coverage,
            }  # fmt: skip
        points = reference.real_inputs
        found |= {"sliced_wasserstein": statistics.sliced_wasserstein(points, fake), "energy_distance": statistics.energy_distance(points, fake)}
        if (mixture := reference.mixture) is not None:
            modes = statistics.mode_coverage(fake, mixture.means_KD, mixture.std, mixture.weights_K)
            found |= {"modes_covered": float(modes.covered), "outliers": modes.outliers, "frequency_tv": modes.total_variation}
        return found

    def _outcome(self, seed: int, sampling: Sampling, reference: Reference, made: tuple[Tensor, float] | None = None) -> Outcome:
        fake, seconds = made or self.draw(sampling, reference.noise, reference.labels)
        found = self.measures(fake, reference)
        if reference.best is not None and bool(fake.isfinite().all()):
            found["paired_rmse"] = statistics.paired_rmse(fake, reference.best)
        found |= {"calls": float(self.cost(sampling)), "seconds_per_sample": seconds}
        return Outcome(seed, nonfinite=int((~fake.isfinite().flatten(1).all(1)).sum()), measures=found)

    def outcome(self, seed: int, module: nn.Module, prepared: Prepared, reference: Reference) -> Outcome:
        """Of a generator, or of a denoiser with its sampler."""
        return self._outcome(seed, self.sampling(module, prepared), reference)

    def curve(self, method: Method, data: Data) -> dict[str, float]:
        """The spread of a few samples alone: quality is measured at the end, where features are at hand."""
        module = method.inference()
        if not isinstance(module, Sampling):
            return {}
        noise = torch.randn(256, *module.shape, generator=torch.Generator().manual_seed(NOISE_SEED))
        labels = torch.arange(256) % module.num_classes if module.num_classes else None
        return {"spread": float(self.draw(module, noise, labels)[0].flatten(1).std(0).mean())}

    def teacher_arms(self, seed: int, teacher: Any, student: nn.Module, prepared: Prepared, reference: Reference) -> list[Measured]:
        """The teacher with its best sampler, with as many calls as the student makes, and with some numbers between."""
        if not isinstance(teacher, Denoiser) or reference.best is None:
            return []
        best = self.sampling(teacher, prepared)
        found = [Measured("teacher", _calls("teacher", self.cost(best)), self._kept("best", seed, best, reference, (reference.best, reference.best_seconds)))]
        ladder = [self.sampling(teacher, prepared, steps=steps, sampler="ddim") for steps in sorted(set(self.evaluate.teacher_steps))[:-1]]
        own = self.sampling(teacher, prepared, steps=student.calls, sampler="ddim") if isinstance(student, Sampling) else None
        for rung in ladder:
            if own is None or self.cost(rung) != self.cost(own):
                found.append(Measured("other", _calls("teacher", self.cost(rung)), self._kept(f"rung {self.cost(rung)}", seed, rung, reference)))
        if own is not None and self.cost(own) != self.cost(best):
            found.append(Measured("alone", _calls("teacher", self.cost(own)), self._kept(f"own {self.cost(own)}", seed, own, reference)))
        return found

    def _kept(self, key: str, seed: int, sampling: Sampling, reference: Reference, made: tuple[Tensor, float] | None = None) -> Outcome:
        """An outcome of the teacher that does not depend on the seed, measured once a teacher."""
        if key not in reference.measured:
            reference.measured[key] = self._outcome(seed, sampling, reference, made)
        return replace(reference.measured[key], seed=seed)

    # ---- cost, pictures, facts ------------------------------------------------------------------------------------

    def timed(self, role: str, module: Any) -> nn.Module | None:
        """Noise in, samples out."""
        if isinstance(module, Sampling):
            return Conditioned(module)
        return Conditioned(self._sampler(module)) if isinstance(module, Denoiser) else None

    def example(self, prepared: Prepared) -> Tensor:
        """Noise."""
        return torch.randn(64, *prepared.input_shape, generator=torch.Generator().manual_seed(NOISE_SEED))

    def pictures(self, teacher: Any, student: nn.Module, prepared: Prepared, reference: Reference) -> tuple[Picture, ...]:
        """Teacher and student from the same noise beside real samples: grids of images, or clouds of points."""
        labels = None if reference.labels is None else reference.labels[:2000]
        made, _ = self.draw(self.sampling(student, prepared), reference.noise[:2000], labels)
        sets = {"real": reference.real_inputs} | ({} if reference.best is None else {"teacher": reference.best}) | {"student": made}
        shape = tuple(prepared.input_shape)
        if shape == (2,):
            clouds = {name: reference.scale(points[:2000]) for name, points in sets.items()}
            return (scatter(clouds, caption="Real samples, and what teacher and student make of the same noise", group="Samples"),)
        if len(shape) == 3 and shape[0] in (1, 3):
            captions = {"real": "Real samples", "teacher": "Teacher", "student": "Student, from the same noise"}
            columns = 10 if prepared.num_classes == 10 else 8
            grids = {name: reference.scale(images[: 8 * columns]) for name, images in sets.items()}
            return tuple(image_grid(grid, columns=columns, caption=captions[name], group="Samples") for name, grid in grids.items())
        return ()

    def facts(self, reference: Reference) -> dict[str, Any]:
        """Which features, how many samples, and what these measures say of real samples against real ones."""
        half = len(reference.real) // 2
        baseline = self.measures(reference.real_inputs[:half], _other_half(reference, half)) if half >= 50 else {}
        return {
            "measured": {
                "samples": len(reference.noise),
                "real_samples": len(reference.real),
                "features": f"{reference.extractor.name}, {reference.extractor.dimension} dimensions",
                "features_sha256": reference.extractor.fingerprint,
                **{f"features_{k}": v for k, v in reference.extractor.facts.items() if isinstance(v, int | float | str)},
                **{f"real_halves_{k}": v for k, v in baseline.items() if k in ("fid", "mmd2", "sliced_wasserstein")},
            }
        }

    def metrics(self, outcome: Outcome) -> dict[str, float]:
        """Those that are known."""
        return {name: float(value) for name, value in outcome.measures.items() if value is not None}

    def evaluated(self, module: nn.Module, prepared: Prepared) -> dict[str, float]:
        """On the test data, without a teacher."""
        self._measurable(prepared)
        return self.metrics(self.outcome(0, module, prepared, self.reference(None, prepared, None)))


class Conditioned(nn.Module):
    """A generator as a function of noise alone: its classes in turn where it has any."""

    def __init__(self, sampling: Sampling) -> None:
        super().__init__()
        self.sampling = sampling

    def forward(self, noise: Tensor) -> Tensor:
        """Noise [B, *shape] → samples [B, *shape]."""
        classes = self.sampling.num_classes
        return self.sampling(noise, torch.arange(len(noise), device=noise.device) % classes if classes else None)


def _other_half(reference: Reference, half: int) -> Reference:
    """The reference with the second half of its real samples."""
    return replace(reference, real=reference.real[half : 2 * half], real_inputs=reference.real_inputs[half : 2 * half])


def _calls(name: str, calls: int) -> str:
    return f"{name}, {calls} call{'s' * (calls != 1)}"
