"""Training and measuring, seed by seed: teacher, student alone, student distilled."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck import data as datasets
from limbeck import seeds
from limbeck.components import Component
from limbeck.contract import IGNORE, Artefact, Method, Teacher
from limbeck.data import AugmentSpec, BatchPlan, Views
from limbeck.errors import InputError
from limbeck.evaluate import cost
from limbeck.export import folder as artefacts
from limbeck.ingredients import Ingredients, PlannedExperts, Prepared, all_inputs, make_method, network, prepare
from limbeck.kinds import Kind, Measured, kind_of
from limbeck.recipe import ModelSpec, TeacherSpec
from limbeck.report.summary import Curve, Outcome, Picture
from limbeck.synthetic.experts import train_experts
from limbeck.synthetic.trajectories import Trajectories
from limbeck.teachers.recorded import RecordTeacher
from limbeck.train import TrainConfig, Trained, Trainer, parallel
from limbeck.train.progress import choose

Style = Literal["auto", "plain", "quiet"]


@dataclass
class Made:
    """A network that came out of a training (or was given), and what that cost."""

    module: nn.Module
    trained: Trained | None = None
    method: Method | None = None


@dataclass
class SeedResult:
    """What one seed gave: the arms' numbers, the distilled network, costs by role (of the first seed), pictures, facts, and what was noticed."""

    arms: tuple[Measured, ...]
    made: Made
    costs: dict[str, Any]
    pictures: tuple[Picture, ...]
    facts: dict[str, Any]
    notes: tuple[str, ...]


@dataclass
class Runner:
    """Trains and measures, seed by seed. folder: where it all goes (None: nowhere); cache: where networks shared by arms are kept."""

    parts: Ingredients
    folder: Path | None = None
    cache: Path | None = None
    style: Style = "quiet"
    resume_from: str | None = None
    _teachers: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    _scratch: tempfile.TemporaryDirectory[str] | None = None

    @cached_property
    def kind(self) -> Kind:
        """How what this run makes is checked and measured."""
        found = kind_of(self.parts.method(), self.parts.evaluate)
        found.fresh, found.seed = self.parts.fresh, self.parts.seeds[0]
        return found

    def check(self) -> None:
        """Build everything once and pass two samples through it, so that a wrong recipe fails before anything is written."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again in earnest
            self._check()

    def _check(self) -> None:
        parts, seed = self.parts, self.parts.seeds[0]
        method = parts.method()
        if method.needs_teacher and not parts.teachers and parts.given_teacher is None and parts.record is None and parts.experts is None:
            raise InputError(f"the method '{type(method).__name__}' needs a teacher.", where="teacher", fix="Add a 'teacher:' section.")
        if method.needs_experts != (parts.experts is not None) and parts.given_teacher is None:
            what = f"the method '{type(method).__name__}' {'needs' if method.needs_experts else 'does not take'} experts as its teacher."
            raise InputError(what, where="teacher", fix="Give 'teacher' a section 'experts'." if method.needs_experts else "Give 'teacher' a 'model'.")
        own = parts.student_spec
        if method.produces == "dataset" and own is not None and (own.weights is not None or own.train is not None):
            what = "a set is made for, and judged by, fresh networks."
            raise InputError(what, where="student.weights" if own.weights is not None else "student.train", fix="Leave it out.")
        prepared, kind = parts.data(seed), self.kind
        kind.check(prepared, parts.train, parts.augment)
        if method.needs_labels and prepared.train.targets is None:
            raise InputError("the method needs labels, the data have none.", where="data")
        if parts.train.sharding == "fsdp2" and parts.train.ema is not None:
            raise InputError("a moving average of sharded weights is not supported.", where="train.ema", fix="Leave out ema, or sharding.")
        ids = torch.arange(min(2, len(prepared.train)))
        raw, targets = prepared.train.fetch(ids)
        try:
            if parts.views is not None:
                shown = Views(parts.views, parts.augment, prepared.train)
                shown.batch(ids, shown.draw(ids, count=1, seed=seed, epoch=0))
            else:
                datasets.augment(raw, targets, ids, spec=parts.augment, seed=seed, epoch=0, num_classes=prepared.num_classes)
        except InputError as error:
            raise (error if error.where.startswith("data.") else error.at("data.augment")) from error
        example = prepared.train.prepare(raw)
        student = parts.student(prepared, seed)
        kind.fits(student, example, prepared, "student")
        if not any(p.requires_grad for p in student.parameters()):
            raise InputError("the student has no parameters to train.", where="student")
        if parts.given_teacher is not None:
            kind.fits(kind.asked(parts.given_teacher), example, prepared, "teacher")
        members = []
        for index, spec in enumerate(parts.teachers):
            where = "teacher" if len(parts.teachers) == 1 else f"teacher.{index}"
            shape = self._shaping(spec, prepared, seed, where)
            members.append(network(spec, shape, 0, where))
            kind.fits(members[-1], example if shape is prepared else _example(shape), shape, where)
            if spec.train is not None:
                base = prepared if spec.data is None else self._other_data(spec, prepared, seed, where)
                self._rehearse(self._first_method(spec), members[-1], base, seed, spec.train, None, where)
        for spec in parts.live:
            kind.fits(network(spec, prepared, 0, "teacher.make"), example, prepared, "teacher.make")
        teacher = parts.given_teacher if parts.given_teacher is not None else kind.teacher(members) if members else None
        if parts.record is not None:
            teacher = parts.record(prepared)
        if parts.experts is not None and (planned := parts.experts.experts) is not None:
            teacher = PlannedExperts(planned.count, planned.epochs, sum(p.numel() for p in student.parameters()))
        if parts.student_spec is not None and parts.student_spec.train is not None:
            self._rehearse(self._first_method(parts.student_spec), copy.deepcopy(student), prepared, seed, parts.student_spec.train, teacher, "student")
        self._rehearse(method, copy.deepcopy(student), prepared, seed, parts.train, teacher, "")
        if self._has_alone(method, prepared):
            self._rehearse(kind.plain(), copy.deepcopy(student), prepared, seed, parts.train, None, "")

    def _rehearse(self, method: Method, student: nn.Module, prepared: Prepared, seed: int, config: TrainConfig, teacher: Teacher | None, where: str) -> None:
        """Bind a method and cut its data into batches, without training. Raises InputError."""
        try:
            prepared = self._bind(method, student, prepared, seed, teacher, test=False)
        except InputError as error:
            raise (error.at("method") if error.where.split(".")[0] in type(method.config).model_fields else error) from error
        if config.sharding == "fsdp2" and len(list(method.phases())) > 1:
            raise InputError("methods of several phases cannot be sharded.", where=f"{where}.train.sharding".lstrip("."), fix="Use 'none'.")
        try:
            plan = BatchPlan(len(prepared.train), config.batch_size, seed=0, drop_last=config.drop_last)
        except InputError as error:
            raise error.at(f"{where}.train" if where else "train") from error
        try:
            method.check_length(config.steps if config.steps is not None else (config.epochs or 0) * plan.steps_per_epoch)
        except InputError as error:
            raise error.at(where) if where else error from error

    def _has_alone(self, method: Method, prepared: Prepared) -> bool:
        """Whether the student is also trained without a teacher."""
        plain = self.kind.plain()
        learnable = prepared.train.targets is not None or not plain.needs_labels
        return self.parts.compare.alone and not isinstance(method, type(plain)) and self.kind.trains_alone and learnable

    def _first_method(self, spec: ModelSpec) -> Method:
        """How a network is trained first; where the recipe does not say, as its kind learns from the data alone."""
        return self.kind.plain() if spec.method == Component(name="supervised") else make_method(spec.method)

    def seed(self, seed: int) -> SeedResult:
        """Train and measure one seed."""
        parts, kind = self.parts, self.kind
        prepared = parts.data(seed)
        place = self._place(seed)
        kind.check(prepared, parts.train, parts.augment)
        teacher, reference = self.teacher(prepared, seed)
        method = parts.method()
        start = self.student(prepared, seed, teacher)
        alone: Made | None = None
        arms: list[Measured] = []
        if self._has_alone(method, prepared):
            alone = self._alone(prepared, seed, start, None if place is None else place / "alone")
            arms.append(Measured("alone", kind.labels["alone"], self._outcome(alone, prepared, seed, reference)))
        if parts.live:
            live, _ = self.live(prepared, seed)
            beside = self._train(
                parts.method(), copy.deepcopy(start), prepared, seed, parts.train, None if place is None else place / "live", teacher=live,
                label=f"live seed {seed}", test=True,
            )  # fmt: skip
            arms.append(Measured("other", kind.labels["live"], self._outcome(beside, prepared, seed, reference)))
        student = copy.deepcopy(start)
        made = self._train(method, student, prepared, seed, parts.train, place, teacher=teacher, label=f"{parts.name} seed {seed}", test=True)
        if place is not None and rank() == 0 and kind.keeps_first:
            self._keep(made, prepared, place / "artefact", None)
        own = self._outcome(made, prepared, seed, reference)
        if place is not None and rank() == 0:  # first what took long, then what is nice to have
            self._keep(made, prepared, place / "artefact", own)
            if alone is not None:
                self._keep(alone, prepared, place / "alone" / "artefact", next(arm.outcome for arm in arms if arm.role == "alone"))
        arms = [*kind.teacher_arms(seed, teacher, made.module, prepared, reference), *arms, Measured("distilled", kind.labels["distilled"], own)]
        costs: dict[str, Any] = {}
        pictures: tuple[Picture, ...] = ()
        facts = method.facts()
        if seed == parts.seeds[0]:
            shown = self.live(prepared, seed)[0] if parts.live else teacher
            costs = self._costs({"teacher": shown, "alone": alone, "distilled": made}, prepared)
            if parts.live:
                costs["other"] = {key: costs["distilled"][key] for key in ("parameters", "macs", "bytes")}
            pictures, facts = kind.pictures(teacher, made.module, prepared, reference), kind.facts(reference) | facts
        barrier()
        notes = () if made.trained is None else tuple(made.trained.notes)
        return SeedResult(tuple(arms), made, costs, pictures, facts, notes)

    # -- networks that are trained beforehand

    def teacher(self, prepared: Prepared, seed: int) -> tuple[Any, Any]:
        """The teacher of a seed and what students are compared with (`Kind.reference`); made once where neither depends on the seed."""
        parts = self.parts
        if parts.record is not None:
            recorded = parts.record(prepared)
            return recorded, self.live(prepared, seed)[1] if parts.live else self.reference(recorded, prepared)
        if parts.experts is not None:
            of = seed if parts.experts.seed is None else parts.experts.seed
            if (key := f"experts {of}") not in self._teachers:
                experts = self._experts(parts.experts, prepared if parts.experts.seed is None else parts.data(of), of)
                self._teachers = {key: (experts, self.reference(None, prepared))}
            return self._teachers[key]
        if parts.given_teacher is None and not parts.teachers:
            if "none" not in self._teachers:
                self._teachers["none"] = (None, self.reference(None, prepared))
            return self._teachers["none"]
        if parts.given_teacher is not None:
            key = "given"
            if key not in self._teachers:
                self._teachers[key] = (parts.given_teacher, self.reference(parts.given_teacher, prepared))
            return self._teachers[key]
        return self._networks(parts.teachers, prepared, seed)

    def live(self, prepared: Prepared, seed: int) -> tuple[Any, Any]:
        """The networks that a record was made of, as `teacher` gives them."""
        return self._networks(self.parts.live, prepared, seed)

    def _networks(self, specs: Sequence[TeacherSpec], prepared: Prepared, seed: int) -> tuple[Any, Any]:
        parts = self.parts
        own = [seed if spec.seed is None else spec.seed for spec in specs]
        key = json.dumps(own)
        if key not in self._teachers:
            members = []
            for index, (spec, of) in enumerate(zip(specs, own, strict=True)):
                where = "teacher" if len(specs) == 1 else f"teacher.{index}"
                name = "teacher" if len(specs) == 1 else f"teacher-{index + 1}"
                place = 0 if spec.seed is not None else index  # a seed of its own makes the same network wherever it stands
                module = network(spec, self._shaping(spec, prepared, of, where), seeds.derive(of, "teacher", place), where)
                if spec.train is not None:
                    shared = spec.seed is not None
                    base = self._other_data(spec, prepared, of, where) if spec.data is not None else parts.data(of) if shared else prepared
                    module = self._beforehand(spec, module, base, of, name, self.folder if shared else self._place(seed), teacher=None)
                members.append(module)
            teacher = self.kind.teacher(members)
            if isinstance(teacher, nn.Module) and not parts.cpu:
                teacher.to(parallel.accelerator("no", cpu=False).device)  # where its student will be trained and compared with it
            self._teachers = {key: (teacher, self.reference(teacher, prepared))}
        return self._teachers[key]

    def _experts(self, spec: TeacherSpec, prepared: Prepared, seed: int) -> Trajectories:
        """Students trained on the real data, their weights after every epoch; where they lie already they are opened, those that are missing trained."""
        parts = self.parts
        assert spec.experts is not None
        student = "" if parts.student_spec is None else parts.student_spec.model.model_dump_json()
        identity = {
            "experts": spec.experts.model_dump(mode="json", exclude={"count", "together"}),
            "network": student,
            "data": datasets.inputs_fingerprint(prepared.train),
            "samples": hashlib.sha256(datasets.origins(prepared.train).numpy().tobytes()).hexdigest(),
            "labels": hashlib.sha256(_labels(prepared).numpy().tobytes()).hexdigest(),
            "seed": seed,
        }
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]
        shared = None if spec.folder is None else Path(spec.folder) if spec.seed is not None else Path(spec.folder) / f"seed-{seed}"
        place = shared if shared is not None else self.cache / f"experts-{key}" if self.cache is not None else None
        if place is None and self.folder is not None:
            place = (self.folder if spec.seed is not None or seed == parts.seeds[0] else self.folder / f"seed-{seed}") / "experts"
        if place is None:
            self._scratch = self._scratch or tempfile.TemporaryDirectory(prefix="limbeck-experts-")
            place = Path(self._scratch.name) / key

        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"the experts' folder {place} cannot be made: {error.strerror}.", where="teacher.folder", fix="Give another.") from error

        def network_of(expert_seed: int) -> nn.Module:
            return parts.fresh(prepared, expert_seed)

        if rank() != 0:
            barrier()
            return Trajectories.open(place, spec.experts.count)
        device = parallel.accelerator("no", cpu=parts.cpu).device
        found = train_experts(
            spec.experts, network_of, all_inputs(prepared.train).to(device), _labels(prepared).to(device), prepared.num_classes, place, seed=seed,
            identity=identity, progress=choose(self.style),
        )  # fmt: skip
        barrier()
        return found

    def _shaping(self, spec: ModelSpec, prepared: Prepared, seed: int, where: str) -> Prepared:
        """The data that decide how many outputs a teacher has: its own, where the method takes one of another tokenizer."""
        return self._other_data(spec, prepared, seed, where) if spec.data is not None and self.parts.method().foreign_teacher else prepared

    def _other_data(self, spec: ModelSpec, prepared: Prepared, seed: int, where: str) -> Prepared:
        """The data that a network is trained on beforehand, where they are not the run's. Raises InputError where the two do not fit."""
        assert spec.data is not None
        try:
            found = prepare(spec.data, seed)
        except InputError as error:
            raise error.at(where) from error
        if self.parts.method().foreign_teacher and where.startswith("teacher"):
            return found
        if found.num_classes != prepared.num_classes or found.input_shape != prepared.input_shape:
            raise InputError(
                f"its data have {found.num_classes} classes and inputs of shape {list(found.input_shape)}, the run's {prepared.num_classes} and "
                f"{list(prepared.input_shape)}.",
                where=f"{where}.data",
            )
        return found

    def reference(self, teacher: Any, prepared: Prepared) -> Any:
        """See `Kind.reference`; what it must keep lies in the cache or the run's folder. The first process makes it, the others read it."""
        place = self.cache if self.cache is not None else self.folder
        if rank() != 0:
            barrier()
        found = self.kind.reference(teacher, prepared, None if place is None else place / "features")
        if rank() == 0:
            barrier()
        return found

    def student(self, prepared: Prepared, seed: int, teacher: Teacher | None) -> nn.Module:
        """The student that distillation starts from: built, its weights loaded, trained beforehand where the recipe says so."""
        spec = self.parts.student_spec
        of = seed if spec is None or spec.seed is None else spec.seed
        module = self.parts.student(prepared, seeds.derive(of, "student"))
        if spec is None or spec.train is None:
            return module
        base = prepared if spec.seed is None else self.parts.data(of)
        if spec.data is not None:
            base = self._other_data(spec, prepared, of, "student")
        return self._beforehand(spec, module, base, of, "student", self._place(seed), teacher=teacher, run_seed=seed)

    def _beforehand(
        self, spec: ModelSpec, module: nn.Module, prepared: Prepared, seed: int, name: str, folder: Path | None, *, teacher: Teacher | None, run_seed: int = 0
    ) -> nn.Module:
        assert spec.train is not None
        data_key = self.parts.data_key if spec.data is None else spec.data.model_dump_json()
        facts = [spec.model_dump_json(), data_key, str(seed), str(self.parts.cpu)]
        if teacher is not None and self._first_method(spec).needs_teacher:
            facts += [f"{t.model_dump_json()} {run_seed if t.seed is None else t.seed}" for t in self.parts.teachers]
        facts += [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in (s.weights for s in (spec, *self.parts.teachers)) if file is not None]
        key = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:20]
        place = self.cache / f"{name.partition('-')[0]}-{key}" if self.cache is not None else None if folder is None else folder / name
        if place is not None and (place / "artefact" / "config.json").exists():
            kept = artefacts.read_config(place / "artefact")
            if kept.extra.get("key") == key:
                return artefacts.load(place / "artefact", model=module)
        method = self._first_method(spec)
        augment = self.parts.augment if spec.data is None else spec.data.augment
        made = self._train(method, module, prepared, seed, spec.train, place, teacher=teacher, label=f"{name} seed {seed}", test=False, augment=augment)
        artefact = self.kind.beforehand(method)
        if place is not None and rank() == 0:
            self._keep(made, prepared, place / "artefact", None, spec=spec, key=key, artefact=artefact)
        barrier()
        return artefact.module.eval()

    def _alone(self, prepared: Prepared, seed: int, start: nn.Module, folder: Path | None) -> Made:
        """The same student from the same start, on the labels alone, for as many steps and with the same optimiser."""
        config = self.parts.train
        if config.steps is None and (labelled := prepared.labelled) is not None:

            def epoch(samples: int) -> int:
                return samples // config.batch_size if config.drop_last else -(-samples // config.batch_size)

            whole, part = epoch(len(prepared.train)), max(epoch(len(labelled)), 1)
            every = config.evaluate_every and max(1, round(config.evaluate_every * whole / part))
            config = config.model_copy(update={"epochs": None, "steps": (config.epochs or 0) * whole, "evaluate_every": every})
        method = self.kind.plain()
        return self._train(method, copy.deepcopy(start), prepared, seed, config, folder, teacher=None, label=f"alone seed {seed}", test=True)

    # -- training, measuring, keeping

    def _train(
        self, method: Method, student: nn.Module, prepared: Prepared, seed: int, config: TrainConfig, folder: Path | None,
        *, teacher: Teacher | None, label: str, test: bool, augment: AugmentSpec | None = None,
    ) -> Made:  # fmt: skip
        prepared = self._bind(method, student, prepared, seed, teacher, test=test)
        views = None
        recorded = method.teacher if isinstance(method.teacher, RecordTeacher) else None
        if self.parts.views is not None and (
            augment is None or recorded is not None
        ):  # a network trained beforehand does not depend on how many views there are
            views = Views(self.parts.views, self.parts.augment, prepared.train, recorded)
        curve_data = prepared.validation or prepared.test

        def evaluate(current: Method) -> dict[str, float]:
            return self.kind.curve(current, curve_data)

        trainer = Trainer(
            method, prepared.train, config, seed=seed, folder=folder, augment=augment or self.parts.augment, evaluate=evaluate, views=views,
            progress=choose(self.style if rank() == 0 else "quiet"), label=label, resume_from=self.resume_from,
            num_classes=prepared.num_classes, cpu=self.parts.cpu,
        )  # fmt: skip
        plain = copy.deepcopy(student) if trainer.sharded else None
        trained = trainer.fit()
        if plain is not None:  # what comes out is whole again
            plain.load_state_dict(parallel.whole_state(student))
            method.student = plain.to(trainer.device)
        return Made(method.inference().eval(), trained, method)

    def _bind(self, method: Method, student: nn.Module, prepared: Prepared, seed: int, teacher: Teacher | None, *, test: bool) -> Prepared:
        """Bind a method; returns the data that it trains on: of partly labelled ones the labelled, where it needs labels."""
        if method.needs_labels and (labelled := prepared.labelled) is not None:
            prepared = replace(prepared, train=datasets.subset(prepared.train, labelled), pool=None)
        if isinstance(teacher, RecordTeacher):
            teacher = teacher.attach(prepared.train)
        method.bind(
            student=student,
            teacher=teacher,
            fresh_student=lambda s: self.parts.fresh(prepared, s),
            train=prepared.train,
            validation=prepared.validation,
            test=prepared.test if test else None,
            num_classes=prepared.num_classes,
            pool=prepared.pool,
            seed=seed,
        )
        return prepared

    def _outcome(self, made: Made, prepared: Prepared, seed: int, reference: Any) -> Outcome:
        outcome, trained = self.kind.outcome(seed, made.module, prepared, reference), made.trained
        if trained is None:
            return outcome
        outcome = replace(outcome, training_seconds=trained.seconds, examples_seen=trained.samples, curves=_curves(trained.rows))
        return self.kind.trained(outcome, trained, prepared)

    def _costs(self, made: Mapping[str, Any], prepared: Prepared) -> dict[str, Any]:
        """Parameters, multiply-accumulates, bytes and latencies by role, measured side by side."""
        modules: dict[str, nn.Module] = {}
        for role, found in made.items():
            module = self.kind.timed(role, found.module if isinstance(found, Made) else found)
            if module is not None:
                modules[role] = module
        example = self.kind.example(prepared)
        costs: dict[str, Any] = {}
        for role, module in modules.items():
            costs[role] = {"parameters": cost.parameters(module), "macs": _macs(module, prepared.input_shape, example.dtype), "bytes": _bytes(made[role], module)}
        if self.parts.evaluate.latency:
            most = self.kind.most_repeats
            repeats = self.parts.evaluate.latency_repeats if most is None else min(self.parts.evaluate.latency_repeats, most)
            measured = cost.latencies(modules, example, repeats=repeats, warmup=5 if most is None else 1)
            for role in modules:
                costs[role]["latencies"] = list(measured[role])
        if isinstance(recorded := made["teacher"], RecordTeacher):  # as it was when it was recorded
            costs["teacher"] = {key: recorded.record.about.get(key) for key in ("parameters", "macs", "bytes")}
        return costs

    def _keep(
        self, made: Made, prepared: Prepared, folder: Path, outcome: Outcome | None, *, spec: ModelSpec | None = None, key: str = "",
        artefact: Artefact | None = None,
    ) -> None:  # fmt: skip
        assert made.method is not None
        artefact = artefact or made.method.artefact()
        spec = spec or self.parts.student_spec
        metrics = {} if outcome is None else self.kind.metrics(outcome)
        component = None if spec is None else artefact.around(spec.model) if artefact.around is not None else spec.model
        artefacts.save(
            artefact,
            folder,
            model=component,
            num_classes=prepared.num_classes,
            input_shape=prepared.input_shape,
            preprocess=datasets.preprocessing(prepared.train),
            classes=list(prepared.train.classes),
            extra={"key": key, "metrics": metrics, "method": type(made.method).__name__},
        )

    def _place(self, seed: int) -> Path | None:
        if self.folder is None:
            return None
        return self.folder if seed == self.parts.seeds[0] else self.folder / f"seed-{seed}"


def _example(prepared: Prepared) -> Tensor:
    """Two inputs as a network takes them."""
    return prepared.train.prepare(prepared.train.fetch(torch.arange(min(2, len(prepared.train))))[0])


def _macs(module: nn.Module, input_shape: Sequence[int], dtype: torch.dtype) -> int | None:
    try:
        return cost.macs(module, input_shape, dtype)
    except (RuntimeError, NotImplementedError):
        return None


def _curves(rows: Sequence[Mapping[str, Any]]) -> tuple[Curve, ...]:
    """Learning curves out of metrics.jsonl's rows; steps count over all phases."""
    found: dict[str, tuple[list[int], list[float | None]]] = {}
    before, last, phase = 0, 0, None
    for row in rows:
        if row["phase"] != phase:
            before, phase = before + last, row["phase"]
        last = row["step"]
        for name, value in row.items():
            if "/" in name and not name.endswith("/lr"):
                steps, values = found.setdefault(name, ([], []))
                steps.append(before + last)
                values.append(value)
    return tuple(Curve(name.split("/", 1)[0], name.split("/", 1)[1], tuple(s), tuple(v)) for name, (s, v) in found.items())


def _bytes(made: Any, module: nn.Module) -> int:
    """Of the tensors as they go to disk: packed where the method packs them."""
    artefact = made.method.artefact() if isinstance(made, Made) and made.method is not None else None
    if artefact is None or artefact.encoder is None:
        return cost.tensor_bytes(module)
    return sum(t.numel() * t.element_size() for t in artefact.encoder.encode(artefact.module.state_dict()).values())


def _labels(prepared: Prepared) -> Tensor:
    """[N] int64 labels of the training data. Raises InputError: some have none."""
    targets = prepared.train.targets
    if targets is None or bool((targets == IGNORE).any()):
        raise InputError("experts learn from labels, and some samples have none.", where="data", fix="Leave out data.labelled and data.pool.")
    return targets


def rank() -> int:
    """This process's number among those that were launched together."""
    return int(os.environ.get("RANK", "0"))


def start_processes(*, cpu: bool) -> None:
    """Join the other processes of a launch, so that barriers hold from here on."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        parallel.accelerator("no", cpu=cpu)


def barrier() -> None:
    """Wait for the other processes, where there are any."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
