"""What methods that make generators share: the generator around the student, the guided teacher, random draws, and a watch over collapse and divergence."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck import seeds
from limbeck.components import Component
from limbeck.contract import IGNORE, Artefact, Clock, Frozen, Method
from limbeck.diffusion.denoisers import Denoiser, Guided, NetworkDenoiser
from limbeck.diffusion.distribution import normal, random_labels
from limbeck.diffusion.generator import DirectGenerator, Generator, Sampling, data_scale
from limbeck.errors import InputError

COLLAPSED = 0.1
"""A generator whose samples spread less than this share of what they should is said to have collapsed (ours)."""
SPREAD = 0.5
"""A generator whose samples once spread this share of what they should can collapse (ours)."""
DIVERGED = 10.0
"""A critic whose loss is this many times its lowest so far is said to have diverged (ours)."""


class GeneratorConfig(Frozen):
    """Knobs that methods which distil a denoiser into a generator share."""

    steps: int = Field(1, ge=1, le=1000, description="network calls of the generator")
    guidance_scale: float = Field(1.0, ge=0, le=100, description="κ of the teacher's guidance, P_∅ + κ (P_c − P_∅); 1: the conditional teacher alone")
    start: Literal["teacher", "fresh"] = Field("teacher", description="the generator's first weights: the teacher's, or those that the student has")


class GeneratorMethod(Method):
    """Base of methods whose student is a denoiser that becomes a generator (or, where the method allows it, a module from noise to samples)."""

    produces = "generator"

    def setup(self) -> None:
        """The generator around the student, the guided teacher. Raises InputError: guidance without classes."""
        self.generator: Sampling = self.make_generator()
        if self.needs_teacher:
            scale = getattr(self.config, "guidance_scale", 1.0)
            if scale != 1 and not (self.generator.num_classes and self.denoiser_teacher.num_classes):
                fix = "Set it to 1, or give a teacher and a student with classes."
                raise InputError("guidance needs conditions, and there are no classes.", where="method.guidance_scale", fix=fix)
            if self.generator.num_classes and not self.denoiser_teacher.num_classes:
                fix = "Set the student's conditional: false, or give a conditional teacher."
                raise InputError("the student takes classes, the teacher none.", where="student.model", fix=fix)
            self.guided = Guided(self.denoiser_teacher, scale)
        self.spread: float | None = None
        self.widest, self.lowest = 0.0, math.inf  # of the samples' spread against the expected, and of the critic's loss

    # ---- what is built --------------------------------------------------------------------------------------------

    @property
    def denoiser_teacher(self) -> Denoiser:
        """The teacher, which must be a denoiser. Raises InputError."""
        teacher: Any = self.teacher
        if not isinstance(teacher, Denoiser):
            raise InputError(f"the teacher is {type(teacher).__name__}, no denoiser.", where="teacher", fix="Give a diffusion model (unet_denoiser, say).")
        return teacher

    def make_generator(self) -> Sampling:
        """The student as a generator of `steps` calls, with the teacher's weights where the config says so. Raises InputError."""
        student: Any = self.student
        if getattr(self.config, "start", "fresh") == "teacher":
            same_weights(student, self.denoiser_teacher)
        if isinstance(student, Sampling):
            if (steps := getattr(self.config, "steps", student.calls)) != student.calls:
                what = f"the student is a generator of {student.calls} calls already, and {steps} are asked for."
                raise InputError(what, where="method.steps", fix=f"Set steps to {student.calls}.")
            return student
        scale = data_scale(self.train_data, getattr(student, "shape", ()))
        if isinstance(student, Denoiser):
            return Generator(student, student.schedule.few_steps(getattr(self.config, "steps", 1)), scale=scale)
        if getattr(self.config, "steps", 1) > 1:
            raise InputError("a student that is no denoiser samples in one call.", where="method.steps", fix="Set steps to 1.")
        shape = getattr(student, "shape", None)
        if shape is None:
            raise InputError("the student is neither a denoiser nor a module with the attribute 'shape'.", where="student.model")
        return DirectGenerator(student, shape, num_classes=int(getattr(student, "num_classes", 0)), scale=scale)

    def make_critic(self) -> NetworkDenoiser:
        """A trainable copy of the teacher, for the online score of the generator's samples. Raises InputError: the teacher is no network."""
        teacher = self.denoiser_teacher
        if not isinstance(teacher, NetworkDenoiser):
            what = f"the critic starts as a copy of the teacher, and {type(teacher).__name__} is no network."
            raise InputError(what, where="teacher.model", fix="Give a network (mlp_denoiser, unet_denoiser).")
        return copy.deepcopy(teacher).requires_grad_(True)

    def check_labels(self, fix: str) -> None:
        """Raise InputError where a generator with classes is to be compared to real data without: generator, critic and heads are told the class."""
        targets = None if self.train_data is None else self.train_data.targets
        if self.train_data is not None and self.generator.num_classes and (targets is None or bool((targets == IGNORE).any())):
            raise InputError("real samples without a label give themselves away.", where="data", fix=fix)

    def frozen(self) -> Sequence[nn.Module]:
        """The teacher."""
        return [self.teacher] if isinstance(self.teacher, nn.Module) else []

    def inference(self) -> nn.Module:
        """The generator."""
        return self.generator

    def artefact(self) -> Artefact:
        """The generator, with all that sampling needs."""
        generator = self.generator

        def around(component: Component) -> Component:
            return Component(name=generator.builder, args={generator.inner: component.model_dump(mode="json"), **generator.arguments})

        return Artefact("generator", generator, around=None if generator is self.student else around)

    # ---- draws ----------------------------------------------------------------------------------------------------

    def draw(self, count: int, clock: Clock, name: str = "noise") -> tuple[Tensor, Tensor | None]:
        """Standard normal noise [B, *shape] and uniform labels [B] (None without classes) of this step."""
        generator = clock.generator(name)
        return normal(count, self.generator.shape, generator), random_labels(count, self.generator.num_classes, generator)

    def drawn_call(self, clock: Clock) -> int:
        """k, which of the generator's calls this step trains: one for all samples, micro-batches and processes (DMD2, arXiv 2405.14867, §4.5)."""
        return seeds.derive(clock.seed, clock.phase_index, clock.step, "k") % self.generator.calls

    def generated(self, count: int, clock: Clock) -> tuple[Tensor, Tensor | None]:
        """Samples [B, *shape] of one call, with gradient, and their labels [B]; the input of a call after the first is simulated, without gradient."""
        generator, (noise, cond) = self.generator, self.draw(count, clock)
        if not isinstance(generator, Generator):
            return generator(noise, cond), cond
        k = self.drawn_call(clock)
        return generator.call(generator.simulate(k, noise, cond, generator=clock.generator("renoise")), k, cond), cond

    # ---- a watch over what goes wrong -----------------------------------------------------------------------------

    def watched(self, x: Tensor, broken: Tensor | None = None) -> dict[str, Tensor]:
        """Metrics that `notice` reads: the samples' spread (mean standard deviation over the batch; one sample has none) and the share of directions that
        were no numbers."""
        found: dict[str, Tensor] = {"spread": x.detach().float().flatten(1).std(0).mean()} if len(x) > 1 else {}
        return found if broken is None else found | {"broken": broken.float().mean()}

    def expected_spread(self) -> float | None:
        """The spread of real samples, in network units; None where there are no data to look at."""
        if self.spread is None and self.train_data is not None and len(self.train_data) > 1:
            ids = torch.arange(min(512, len(self.train_data)))
            self.spread = float(self.train_data.prepare(self.train_data.fetch(ids)[0]).flatten(1).std(0).mean())
        return self.spread

    def notice(self, row: Mapping[str, float]) -> Sequence[str]:
        """Says when the generator collapses, the critic diverges, or directions were no numbers.

        A generator that starts from its teacher's weights maps all noise to nearly one point at first, and its critic then has next to nothing to
        learn: collapse is said of samples that once spread, or still do not in the second half; divergence of a loss above 1, which predicting
        nothing has, too.
        """
        found = []
        spread, broken = row.get("generator/spread"), row.get("generator/broken", 0.0)
        expected = self.expected_spread() if spread is not None else None
        if spread is not None and expected and math.isfinite(spread):
            self.widest = max(self.widest, spread / expected)
            if spread < COLLAPSED * expected and (self.widest >= SPREAD or row.get("progress", 0.0) >= 0.5):
                found.append(f"the generator has collapsed: its samples spread less than {COLLAPSED:.0%} of what real ones do.")
        if broken > 0:
            found.append("some score directions held NaN or infinity and were left out.")
        if (loss := row.get("critic/denoising", row.get("critic/loss"))) is not None:
            self.lowest = min(self.lowest, loss) if math.isfinite(loss) else self.lowest
            if loss > max(DIVERGED * self.lowest, 1.0):
                found.append(f"the critic has diverged: its loss rose to more than {DIVERGED:g} times the lowest it had.")
        return found

    def state_dict(self) -> dict[str, Any]:
        """What the watch remembers."""
        return {"watch": [self.widest, self.lowest]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put it back."""
        self.widest, self.lowest = state["watch"]


def same_weights(student: nn.Module, teacher: nn.Module) -> None:
    """Copy the teacher's weights into the student. Raises InputError: they are not built alike, or the same weights mean something else in the student."""
    for name in ("schedule", "prediction", "precondition", "sigma_data"):
        if isinstance(teacher, NetworkDenoiser) and isinstance(student, NetworkDenoiser) and (its := getattr(teacher, name)) != (own := getattr(student, name)):
            what = f"the teacher's weights are of another {name} than the student's: {its}, not {own}."
            raise InputError(what, where="method.start", fix="Leave the student out of the recipe (it is then built as the teacher is), or set start: fresh.")
    try:
        student.load_state_dict(teacher.state_dict())
    except RuntimeError as error:
        raise InputError(
            f"the student cannot start from the teacher's weights: {' '.join(str(error).split())[:200]}",
            where="method.start",
            fix="Leave the student out of the recipe (it is then built as the teacher is), or set start: fresh.",
        ) from error
