"""Data sets: fresh networks trained on what came out, beside real images of the same number, by one recipe (arXiv 2207.09639, 2505.13300)."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck import models, seeds
from limbeck.components import Component
from limbeck.contract import IGNORE, Batch, Data, Method
from limbeck.data import AugmentSpec
from limbeck.errors import InputError
from limbeck.evaluate.predict import device_of
from limbeck.evaluate.robust_scores import hard_label_recovery, improvement_over_random, label_robustness
from limbeck.evaluate.synthetic_sets import Evaluation, Evaluator, SetTraining, check_samples
from limbeck.evaluate.transfer import Task, TransferSpec, few_labels, held_out_loss, pretrain, transfer
from limbeck.ingredients import Prepared, all_inputs, fits, prepare
from limbeck.kinds.base import Kind, Measured
from limbeck.models.outputs import mean_logits
from limbeck.modes import evaluating
from limbeck.report.samples import image_grid
from limbeck.report.summary import Outcome, Picture
from limbeck.synthetic.selection import kmeans_per_class, random_per_class
from limbeck.synthetic.synthetic_set import SyntheticSet
from limbeck.synthetic.trajectories import Trajectories
from limbeck.teachers import as_teacher
from limbeck.train import TrainConfig

HEADLINE = ("accuracy", "accuracy_std", "bytes", "compression")
LABELS = {"random": "random real images", "kmeans": "k-means real images", "full": "all real data"}
HELD_OUT = 2000
"""Test images that the ridge loss of pairs is measured on."""
SHOWN = 100
"""The most images that a report shows of a set."""


@dataclass
class Reference:
    """What sets are compared with: real data as networks take them, and what was measured on them, by name and seed."""

    test_inputs: Tensor
    test_labels: Tensor
    teacher: Any
    real_bytes: int
    measured: dict[str, Evaluation] = field(default_factory=dict)
    networks: dict[str, Any] = field(default_factory=dict)
    """Of every arm's first seed the accuracy and the seed of each network."""


class DatasetKind(Kind):
    """Accuracy of K fresh networks at their last epoch, with random, k-means and all real images beside, robust scores, other architectures, bytes."""

    name = "dataset"
    keeps_first = True
    labels = {"teacher": LABELS["full"], "alone": LABELS["random"], "distilled": "distilled"}  # noqa: RUF012

    def headline(self, prepared: Prepared) -> tuple[str, ...]:
        """Accuracy first."""
        return HEADLINE

    def check(self, prepared: Prepared, train: TrainConfig, augment: AugmentSpec) -> None:
        """There must be labelled test data, one process's players, and batches that are real images."""
        if train.sharding == "fsdp2":
            raise InputError("images cannot be sharded.", where="train.sharding", fix="Use 'none'.")
        if augment.mixes:
            raise InputError("images that are mixed have no class.", where="data.augment", fix="Leave out mixup and cutmix.")
        if not self.method.takes_augmented and augment != AugmentSpec():
            raise InputError("the method knows the teacher's answers to plain images alone.", where="data.augment", fix="Leave it out.")
        if train.ema is not None:
            raise InputError("a data set has no average of weights.", where="train.ema", fix="Leave it out; ftd averages its images by method.image_ema.")
        if self.evaluate.search_rate and prepared.validation is None:
            raise InputError("a learning rate is chosen on validation data.", where="evaluate.search_rate", fix="Set data.validation, or leave it out.")
        self._measurable(prepared)
        self._judgeable(prepared)

    def _judgeable(self, prepared: Prepared) -> None:
        """Raise InputError for what would stop the judging, which comes after all the work."""
        training, example = self.training, self.example(prepared)
        for name, found in (("training", training), ("full_training", self.evaluate.full_training)):
            if found is not None:
                try:
                    check_samples(found, tuple(example.shape[1:]))
                except InputError as error:
                    raise InputError(error.what, where=f"evaluate.{name}{error.where.removeprefix('training')}", fix=error.fix) from error
            if found is not None and found.labels == "dynamic" and self.method.needs_experts:
                raise InputError("dynamic labels are a teacher's answers, and there is none.", where=f"evaluate.{name}.labels", fix="Use static.")
        for number, component in enumerate(self.evaluate.architectures):
            where = f"evaluate.architectures.{number}"
            try:
                network = models.build_model(component, num_classes=prepared.num_classes, input_shape=prepared.input_shape, seed=0)
            except InputError as error:
                raise error.at(where) from error
            if tuple(_outputs(network, example, where).shape) != (1, prepared.num_classes):
                raise InputError(f"it does not give {prepared.num_classes} logits.", where=where)

    def _measurable(self, prepared: Prepared) -> None:
        targets = prepared.test.targets
        if targets is None or bool((targets == IGNORE).any()) or not prepared.num_classes:
            raise InputError("the test data have no labels to measure against.", where="data")

    def fits(self, module: nn.Module, example: Tensor, prepared: Prepared, where: str) -> None:
        """The student gives one logit a class; a teacher may give vectors instead."""
        if not isinstance(module, nn.Module):
            return  # experts that were given as an object: the method looks at them
        if where.startswith("student"):
            fits(module, example, prepared, where)
            return
        out = _outputs(module, example, where)
        if out.dim() != 2 or len(out) != len(example):
            raise InputError(f"the teacher gives outputs of shape {list(out.shape[1:])}.", where=f"{where}.model", fix="It must return [batch, numbers].")

    def teacher(self, members: Sequence[Any]) -> Any:
        """One network, or several: classifiers, or what gives vectors; or experts, given as an object."""
        if len(members) == 1 and isinstance(members[0], Trajectories):
            return members[0]
        return as_teacher(members[0] if len(members) == 1 else list(members))

    def reference(self, teacher: Any, prepared: Prepared, place: Path | None) -> Reference:
        """The test data, prepared once."""
        assert prepared.test.targets is not None
        one = prepared.train.prepare(prepared.train.fetch(torch.zeros(1, dtype=torch.int64))[0])
        return Reference(all_inputs(prepared.test), prepared.test.targets, teacher, len(prepared.train) * one[0].numel() * 4)

    def curve(self, method: Method, data: Data) -> dict[str, float]:
        """Nothing: networks are trained on the set when it is finished."""
        return {}

    # ---- how a set is judged --------------------------------------------------------------------------------------

    @property
    def training(self) -> SetTraining:
        """How a fresh network is trained on a set: the recipe's, else the method's, else the default."""
        own: SetTraining | None = getattr(self.method, "training", None)
        return self.evaluate.training or own or SetTraining()

    def evaluator(self, prepared: Prepared, reference: Reference, seed: int, training: SetTraining | None = None, model: Component | None = None) -> Evaluator:
        """K fresh networks (of the recipe's student, or of another architecture), the same for every arm of a seed."""

        def network(of: int) -> nn.Module:
            if model is not None:
                return models.build_model(model, num_classes=prepared.num_classes, input_shape=prepared.input_shape, seed=of)
            assert self.fresh is not None
            return self.fresh(prepared, of)

        return Evaluator(
            network, training or self.training, reference.test_inputs, reference.test_labels, count=self.evaluate.networks,
            seed=seeds.derive(seed, "evaluate"),
        )  # fmt: skip

    def outcome(self, seed: int, module: nn.Module, prepared: Prepared, reference: Reference) -> Outcome:
        """Of a synthetic set. Raises InputError: it is none."""
        if not isinstance(module, SyntheticSet):
            raise InputError(f"{type(module).__name__} is no data set.", where="student")
        if module.labels == "vectors":
            return self._of_pairs(seed, module, prepared, reference)
        images, targets = (tensor.detach() for tensor in module.expanded())
        if not bool(images.isfinite().all()):
            return Outcome(seed, nonfinite=int((~images.isfinite().flatten(1).all(1)).sum()), measures={"accuracy": None})
        began = time.perf_counter()
        step_size = module.learned_step_size
        found = self.evaluator(prepared, reference, seed).evaluate(images, targets, step_size=step_size, teachers=self._teachers(reference))
        reference.networks.setdefault("distilled", {"accuracies": found.accuracies, "seeds": found.seeds})
        measures = _measures(found) | {"evaluation_seconds": time.perf_counter() - began}
        size = _size(module)
        per_class = (len(module.images) + len(module.patterns)) / prepared.num_classes
        measures |= {"bytes": float(size), "compression": size / reference.real_bytes, "images_per_class": per_class}
        measures |= self._robust(seed, found, prepared, reference, module)
        measures |= self._across(seed, images, targets, prepared, reference, found, module)
        return Outcome(seed, measures=measures)

    def _fits_data(self, made: SyntheticSet, prepared: Prepared) -> None:
        """Raise InputError where a set was made of other data than those it is to be judged on: another shape, other classes, other normalisation."""
        if made.input_shape != tuple(prepared.input_shape) or (made.labels != "vectors" and made.num_classes != prepared.num_classes):
            what = f"the set has images of shape {list(made.input_shape)} and {made.num_classes} classes, the data {list(prepared.input_shape)} and"
            raise InputError(f"{what} {prepared.num_classes}.", where="data", fix="Judge it on data like those it was made of.")
        like = SyntheticSet.hard(self.example(prepared), torch.zeros(1, dtype=torch.int64), prepared.num_classes, data=prepared.train)
        same = made.whitened == like.whitened
        for name in ("mean", "std", "zca_mean", "zca_matrix") if same else ():
            same = same and torch.allclose(getattr(made, name).cpu(), getattr(like, name), rtol=1e-3, atol=1e-3)
        if not same:
            raise InputError("the set's images are normalised or whitened otherwise than these data.", where="data", fix="Use the data of its recipe.")

    def _of_pairs(self, seed: int, made: SyntheticSet, prepared: Prepared, reference: Reference) -> Outcome:
        """Of images with vectors: networks pre-trained on them, then tuned to labels; and the ridge loss on the test images (arXiv 2310.06511)."""
        pairs = (made.images.detach(), made.targets.detach())
        began = time.perf_counter()
        measures = self._transferred(seed, pairs, prepared)
        measures |= {"ridge_loss": self._ridge_loss(seed, pairs, prepared, reference), "evaluation_seconds": time.perf_counter() - began}
        size = _size(made)
        return Outcome(seed, measures=measures | {"bytes": float(size), "compression": size / reference.real_bytes})

    def _transferred(self, seed: int, pairs: tuple[Tensor, Tensor] | None, prepared: Prepared) -> dict[str, float | None]:
        """Accuracy on each task, the mean over K networks (and over tasks: "accuracy")."""
        assert self.fresh is not None
        spec, fresh, found = self.evaluate.transfer or TransferSpec(), self.fresh, dict[str, float | None]()
        numbers = [seeds.derive(seed, "transfer", k) % 2**31 for k in range(self.evaluate.networks)]
        for name, task in self._tasks(seed, prepared, spec).items():
            accuracies = [transfer(pairs, lambda of: fresh(prepared, of), task, spec, number).accuracy for number in numbers]
            found[f"transfer/{name}"] = statistics.fmean(accuracies)
        return {"accuracy": statistics.fmean(value for value in found.values() if value is not None)} | found

    def _tasks(self, seed: int, prepared: Prepared, spec: TransferSpec) -> dict[str, Task]:
        """The labelled tasks, by name, with few labels a class. Raises InputError: one has no labels, too few, or images of another shape."""
        found = {}
        for name, data in ({name: prepare(task, seed) for name, task in self.evaluate.tasks.items()} or {"own": prepared}).items():
            where, labels, tested = f"evaluate.tasks.{name}", data.train.targets, data.test.targets
            if labels is None or tested is None or data.input_shape != prepared.input_shape:
                raise InputError(f"a task has labels, and images of shape {list(prepared.input_shape)}.", where=where)
            try:
                which = few_labels(labels, spec.labels_per_class, data.num_classes, seeds.derive(seed, "labels") % 2**31)
                inputs = data.train.prepare(data.train.fetch(which)[0])
                found[name] = Task(inputs, labels[which], all_inputs(data.test), tested, data.num_classes)
            except InputError as error:
                raise error.at(where) from error
        return found

    def _ridge_loss(self, seed: int, pairs: tuple[Tensor, Tensor], prepared: Prepared, reference: Reference) -> float | None:
        """J on up to `HELD_OUT` test images, by two networks pre-trained on the pairs; None without a teacher."""
        if reference.teacher is None:
            return None
        assert self.fresh is not None
        spec, networks = self.evaluate.transfer or TransferSpec(), []
        for k in range(2):
            network = self.fresh(prepared, seeds.derive(seed, "ridge", k))
            pretrain(network, *pairs, spec.pretraining, seeds.derive(seed, "ridge", k) % 2**31)
            networks.append(network.eval())
        inputs = reference.test_inputs[:HELD_OUT].to(pairs[0].device)
        with torch.no_grad():
            answers = reference.teacher.logits(Batch(inputs))
        return held_out_loss(pairs, inputs, answers, networks)

    def _teachers(self, reference: Reference) -> tuple[nn.Module, ...]:
        members = getattr(reference.teacher, "members", ())
        return tuple(members)

    def _robust(self, seed: int, found: Evaluation, prepared: Prepared, reference: Reference, made: SyntheticSet) -> dict[str, float | None]:
        """DD-Ranking's scores, where the baselines they need are asked for."""
        if not {"random", "full"} <= set(self.evaluate.baselines):
            return {}
        random, full = self.baseline("random", seed, prepared, reference, made), self.baseline("full", seed, prepared, reference, made)
        hard = found if made.labels == "hard" else self._hard(seed, made, prepared, reference)
        ior, hlr = improvement_over_random(found.mean, random.mean), hard_label_recovery(full.mean, hard.mean)
        score = label_robustness(full.accuracies, hard.accuracies, found.accuracies, random.accuracies)
        return {
            "improvement_over_random": ior, "hard_label_recovery": hlr,
            "label_robust_score": score.value, "label_robust_low": score.low, "label_robust_high": score.high,
        }  # fmt: skip

    def _hard(self, seed: int, made: SyntheticSet, prepared: Prepared, reference: Reference) -> Evaluation:
        """The same images with their likeliest class as the label, by the same recipe for hard labels."""
        images, targets = (tensor.detach() for tensor in made.expanded())
        return self.evaluator(prepared, reference, seed, _plain(self.training)).evaluate(images, targets.argmax(1), step_size=made.learned_step_size)

    def _across(
        self, seed: int, images: Tensor, targets: Tensor, prepared: Prepared, reference: Reference, own: Evaluation, made: SyntheticSet
    ) -> dict[str, float | None]:
        """Accuracy of other architectures, each at its own rate and not at the one that was learned with the student; the same of random real images."""
        teachers, found = self._teachers(reference), dict[str, float | None]()
        beside = "random" in self.evaluate.baselines
        real, real_targets = self._real("random", seed, made, prepared, reference) if beside else (images, targets)
        theirs = []
        for number, component in enumerate(self.evaluate.architectures):
            try:
                evaluator = self.evaluator(prepared, reference, seed, model=component)
                name = f"cross/{component.name or component.target}"
                name = name if name not in found else f"{name} ({number + 1})"
                found[name] = evaluator.evaluate(images, targets, teachers=teachers, rate=self._rate(evaluator, images, targets, prepared, reference)).mean
                if beside:
                    rate = self._rate(evaluator, real, real_targets, prepared, reference)
                    theirs.append(evaluator.evaluate(real, real_targets, teachers=teachers, rate=rate).mean)
            except InputError as error:
                raise error.at(f"evaluate.architectures.{number}") from error
        if found:
            found["cross_drop"] = own.mean - statistics.fmean(value for value in found.values() if value is not None)
        if theirs:
            found["random_cross_drop"] = self.baseline("random", seed, prepared, reference, made).mean - statistics.fmean(theirs)
        return found

    def _rate(self, evaluator: Evaluator, images: Tensor, targets: Tensor, prepared: Prepared, reference: Reference) -> float | None:
        """The rate that is best on validation data, where the recipe asks for it."""
        if not self.evaluate.search_rate or prepared.validation is None or prepared.validation.targets is None:
            return None
        return evaluator.search_rate(images, targets, all_inputs(prepared.validation), prepared.validation.targets, teachers=self._teachers(reference))

    # ---- real images beside ---------------------------------------------------------------------------------------

    def baseline(self, name: str, seed: int, prepared: Prepared, reference: Reference, made: SyntheticSet) -> Evaluation:
        """Networks trained on real images: as many a class as the set's images, with labels of its kind; or on all. Measured once a seed."""
        per_class = _budget(made, prepared)
        key = f"{name} {seed if name != 'full' else 0} {per_class}"
        if key not in reference.measured:
            found = reference.measured[key] = self._baseline(name, 0 if name == "full" else seed, prepared, reference, made)
            reference.networks.setdefault(name, {"accuracies": found.accuracies, "seeds": found.seeds})
        return reference.measured[key]

    def _baseline(self, name: str, seed: int, prepared: Prepared, reference: Reference, made: SyntheticSet) -> Evaluation:
        if name == "full":
            labels = prepared.train.targets
            assert labels is not None
            training = self.evaluate.full_training or _plain(self.training)
            device = made.images.device
            return self.evaluator(prepared, reference, seed, training).evaluate(all_inputs(prepared.train).to(device), labels.to(device))
        images, targets = self._real(name, seed, made, prepared, reference)
        evaluator = self.evaluator(prepared, reference, seed, _as_long(self.training, len(made)))
        rate = self._rate(evaluator, images, targets, prepared, reference)
        return evaluator.evaluate(images, targets, teachers=self._teachers(reference), rate=rate)

    def _real(self, name: str, seed: int, made: SyntheticSet, prepared: Prepared, reference: Reference) -> tuple[Tensor, Tensor]:
        """As many real images a class as the set has bytes for, drawn or nearest to centres, with labels of its kind."""
        labels, per_class = prepared.train.targets, _budget(made, prepared)
        assert labels is not None
        if name == "random":
            which = random_per_class(labels, per_class, seeds.generator(seed, "random baseline"))
        else:
            which = kmeans_per_class(all_inputs(prepared.train).flatten(1), labels, per_class, seeds.derive(seed, "k-means baseline") % 2**31)
        device = made.images.device
        images = prepared.train.prepare(prepared.train.fetch(which)[0]).to(device)
        return images, labels[which].to(device) if made.labels == "hard" else self._labelled(images, reference)

    @torch.no_grad()
    def _labelled(self, images: Tensor, reference: Reference) -> Tensor:
        """[M, C] the teachers' mean logits, as soft labels of real images."""
        return mean_logits(self._teachers(reference), images)

    def teacher_arms(self, seed: int, teacher: Any, student: nn.Module, prepared: Prepared, reference: Reference) -> list[Measured]:
        """Real images: all, drawn, nearest to centres."""
        if not isinstance(student, SyntheticSet):
            return []
        if student.labels == "vectors":
            return self._pairs_beside(seed, student, prepared, reference)
        found, per_class = [], _budget(student, prepared)
        one = student.images[0].numel() * 4
        for name in ("full", "random", "kmeans"):
            if name in self.evaluate.baselines:
                made = self.baseline(name, seed, prepared, reference, student)
                count = len(prepared.train) if name == "full" else per_class * prepared.num_classes
                size = {"bytes": float(count * one), "compression": count * one / reference.real_bytes, "images_per_class": count / prepared.num_classes}
                role = {"full": "teacher", "random": "alone"}.get(name, "other")
                found.append(Measured(role, LABELS[name], Outcome(seed, measures=_measures(made) | size)))  # type: ignore[arg-type]
        return found

    def _pairs_beside(self, seed: int, student: SyntheticSet, prepared: Prepared, reference: Reference) -> list[Measured]:
        """As many random real images with the teacher's answers, and no pre-training."""
        found, count = [], len(student.images)
        if "random" in self.evaluate.baselines and reference.teacher is not None:
            which = torch.randperm(len(prepared.train), generator=seeds.generator(seed, "random baseline"))[:count]
            images = prepared.train.prepare(prepared.train.fetch(which)[0]).to(student.images.device)
            with torch.no_grad():
                made = SyntheticSet.vectors(images, reference.teacher.logits(Batch(images)), num_classes=prepared.num_classes, data=prepared.train)
            found.append(Measured("alone", "random real images, the teacher's answers", self._of_pairs(seed, made, prepared, reference)))
        if self.evaluate.baselines:
            found.append(
                Measured("other", "no pre-training", Outcome(seed, measures=self._transferred(seed, None, prepared) | {"bytes": 0.0, "compression": 0.0}))
            )
        return found

    # ---- cost, pictures, numbers ----------------------------------------------------------------------------------

    def timed(self, role: str, module: Any) -> nn.Module | None:
        """Nothing: a set answers nothing."""
        return None

    def example(self, prepared: Prepared) -> Tensor:
        """One real sample."""
        return prepared.train.prepare(prepared.train.fetch(torch.zeros(1, dtype=torch.int64))[0])

    def pictures(self, teacher: Any, student: nn.Module, prepared: Prepared, reference: Reference) -> tuple[Picture, ...]:
        """The images, class by class."""
        if not isinstance(student, SyntheticSet) or student.images.dim() != 4 or student.images.shape[1] not in (1, 3):
            return ()
        images, targets = (tensor.detach() for tensor in student.expanded())
        if student.labels == "vectors":
            return (image_grid(student.to_pixels(images[:SHOWN]).cpu(), columns=10, caption="The images of the pairs", group="Synthetic images"),)
        classes = (targets if student.labels == "hard" else targets.argmax(1)).cpu()
        members = [(classes == k).nonzero()[:, 0] for k in range(prepared.num_classes)]
        rows = max(1, min(min(map(len, members)), SHOWN // prepared.num_classes))
        columns = min(prepared.num_classes, 20)
        which = torch.stack([found[:rows] for found in members[:SHOWN]]).T.reshape(-1) if all(map(len, members)) else torch.arange(min(len(images), SHOWN))
        caption = "One column a class" if columns == prepared.num_classes and all(map(len, members)) else "Classes in turn"
        return (image_grid(student.to_pixels(images[which.to(images.device)]).cpu(), columns=columns, caption=caption, group="Synthetic images"),)

    def facts(self, reference: Reference) -> dict[str, Any]:
        """How sets were judged."""
        return {
            "judged": {"networks": self.evaluate.networks, "epoch": "the last", "training": self.training.model_dump(mode="json")},
            "networks": reference.networks,
        }

    def metrics(self, outcome: Outcome) -> dict[str, float]:
        """Those that are known."""
        return {name: float(value) for name, value in outcome.measures.items() if value is not None}

    def evaluated(self, module: nn.Module, prepared: Prepared) -> dict[str, float]:
        """As the run measured it, with the same fresh networks; real images beside it are not measured again."""
        self._measurable(prepared)
        if not isinstance(module, SyntheticSet):
            raise InputError(f"{type(module).__name__} is no data set.", where="artefact")
        self._fits_data(module, prepared)
        if self.training.labels == "dynamic":
            fix = "Add --set evaluate.training.labels=static."
            raise InputError("dynamic labels are the teachers' answers, which are not loaded here.", where="evaluate.training.labels", fix=fix)
        self.evaluate = self.evaluate.model_copy(update={"baselines": ()})
        return self.metrics(self.outcome(self.seed, module, prepared, self.reference(None, prepared, None)))


def _budget(made: SyntheticSet, prepared: Prepared) -> int:
    """Real images a class that have as many bytes as the set's images and shared patterns (at least one)."""
    return max(1, (len(made.images) + len(made.patterns)) // prepared.num_classes)


def _size(made: SyntheticSet) -> int:
    """Bytes of a set; the whitening matrix, which real images need as well, is told among the facts and not counted."""
    return sum(size for part, size in made.bytes().items() if part not in ("whitening", "preprocessing"))


@torch.no_grad()
def _outputs(module: nn.Module, example: Tensor, where: str) -> Tensor:
    """What a network gives for two samples. Raises InputError: it cannot take them."""
    try:
        with evaluating(module):
            return models.logits_of(module(example.to(device_of(module))))
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise InputError(f"it cannot take inputs of shape {list(example.shape[1:])}: {str(error).splitlines()[0]}", where=f"{where}.model") from error


def _plain(training: SetTraining) -> SetTraining:
    """A recipe for soft labels as one for hard labels."""
    return training.model_copy(update={"mixup": 0.0, "labels": "static", "temperature": 1.0})


def _as_long(training: SetTraining, samples: int) -> SetTraining:
    """The recipe with as many steps as it takes for so many samples: equal work, whatever the number of samples."""
    steps = training.steps or training.epochs * math.ceil(samples / training.batch_size)
    return training.model_copy(update={"steps": steps})


def _measures(found: Evaluation) -> dict[str, float | None]:
    return {
        "accuracy": found.mean, "accuracy_std": found.std, "accuracy_low": found.interval[0], "accuracy_high": found.interval[1], "learning_rate": found.rate,
    }  # fmt: skip
