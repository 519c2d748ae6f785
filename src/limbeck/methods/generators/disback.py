"""Distribution Backtracking Builds A Faster Convergence Trajectory for Diffusion Distillation (DisBack; Zhang et al., arXiv 2408.15991).

A copy of the teacher first learns what the untrained student makes, and its states on that way are the student's teachers in reverse order.
Without a path this is plain score distillation (Diff-Instruct; Luo et al., arXiv 2305.18455).

Legend: G_η the student, x = G_η(z), x_t = α_t x + σ_t ε; D_θ the teacher, D_φ the critic, D_{θ'_i} the active target (denoisers, frozen but for the critic).
    ∇_η L = E[ w(t) (s_φ(x_t, t) − s_{θ'_i}(x_t, t)) ∂x_t/∂η ]                       (1)
    L_φ = E[ λ(t) ‖D_φ(x_t, t) − sg[x]‖² ]                                            (2)
    L_η = Σ sg[D_φ(x_t, t) − D_{θ'_i}(x_t, t)] · x, so that w = σ²                     (3)
    θ'_0 = θ, …, θ'_N: states under (2) on samples of the fixed initial student        (4)
    targets θ'_{N−1}, …, θ'_0 = θ, m2 iterations each, the last for good               (5)
Equation numbers are those of our sheet.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.contract import Batch, Clock, OptimiserSpec, Paper, Phase, Player, Update
from limbeck.diffusion.denoisers import Denoiser, Guided, denoising_loss
from limbeck.diffusion.distribution import inject, normal, score_direction
from limbeck.diffusion.generator import Generator, Sampling
from limbeck.diffusion.levels import LevelSpec
from limbeck.diffusion.teacher_path import Backtracking, ScheduledTeacher, Storage, TeacherPath, score_mismatch
from limbeck.errors import InputError
from limbeck.methods.generators._base import GeneratorConfig, GeneratorMethod
from limbeck.modes import evaluating

DEGRADE, BACKTRACK = "degrade", "backtrack"
PASSES = ("teacher_forward", "critic_forward", "critic_backward", "student_forward", "student_backward")


class DisBackConfig(GeneratorConfig):
    """Knobs of `DisBack`. The length of stage 2 is the recipe's `train.steps`, in generator updates."""

    steps: Literal[1] = Field(1, description="network calls of the generator: the method is for one")
    targets: Literal["path", "teacher"] = Field(
        "path", description="'path': the recorded nodes in reverse (5); 'teacher': θ alone, with the critic warmed by stage 1 all the same (a control, ours)"
    )
    stage1_steps: int = Field(1000, ge=0, description="critic steps on the initial student (SDXL code: 1000); 0: plain score distillation, no path")
    record_every: int = Field(100, ge=1, description="of which every so many are kept as a node, and the last one (SDXL code: 100)")
    iterations_per_node: int = Field(1000, ge=1, description="m2, generator updates with each target but the last (SDXL code: 1000)")
    ratio: int = Field(1, ge=1, le=1000, description="R, critic updates for one of the generator, before it (Diff-Instruct: 1; SDXL code: 5)")
    settle_steps: int = Field(0, ge=0, description="critic updates more where the target has just changed (ours; paper: 0)")
    weight: Literal["unit", "normalised"] = Field(
        "unit", description="'unit': eq. 3, summed over entries (Diff-Instruct); 'normalised': divided by mean |x − D|, averaged over entries (DMD2, SDXL code)"
    )
    levels: LevelSpec = Field(LevelSpec(kind="lognormal"), description="noise levels of (1) and (2); Diff-Instruct: ln(σ/α) ~ N(−1.2, 1.2²)")
    start_level: float | None = Field(
        None, gt=0, description="σ_init, the level at which a student that is a denoiser is called (Diff-Instruct: 1); null: the top"
    )
    critic_optimiser: OptimiserSpec | None = Field(None, description="of the critic, in both stages; null: the recipe's train.optimiser")
    storage: Storage = Field("cpu", description="where the nodes are kept: 'cpu' or 'device' (N + 1 networks)")

    @property
    def recorded(self) -> int:
        """N, the nodes that stage 1 leaves beyond the teacher."""
        return math.ceil(self.stage1_steps / self.record_every)


class DisBack(GeneratorMethod):
    """Score distillation along the teacher's own path back from the untrained student."""

    Config = DisBackConfig
    paper: ClassVar[Paper] = Paper(
        "Distribution Backtracking Builds A Faster Convergence Trajectory for Diffusion Distillation",
        "2408.15991",
        "ICLR",
        2025,
        "https://github.com/SYZhang0805/DisBack",
        "hyper-parameters of the EDM runs, whose code is not public; the released SDXL code never changes the target, as far as we can see",
    )

    def make_generator(self) -> Sampling:
        """The student, as a generator of one call at `start_level`. Raises InputError."""
        made, level = super().make_generator(), self.config.start_level
        if level is None:
            return made
        if not isinstance(made, Generator) or made.calls != 1:
            raise InputError("only a student that is a denoiser has a level to start from.", where="method.start_level", fix="Leave it out.")
        schedule = made.denoiser.schedule
        time = float(schedule.time_of_level(torch.tensor(level, dtype=torch.float64)))
        return Generator(made.denoiser, (time,), scale=made.scale)

    def setup(self) -> None:
        """Build the critic, the path (it begins with the teacher) and the target. Raises InputError."""
        super().setup()
        config = self.config
        self.critic = self.make_critic()
        self.path = TeacherPath(config.storage)
        self.schedule = Backtracking(config.recorded if config.targets == "path" else 0, config.iterations_per_node)
        self.scheduled: ScheduledTeacher | None = None
        if self.schedule.nodes > 1:
            self.path.record(self.denoiser_teacher)
            self.scheduled = ScheduledTeacher(self.denoiser_teacher, self.path, self.schedule)
            self.guided_target = Guided(self.scheduled.denoiser, config.guidance_scale)
        self.passes = dict.fromkeys(PASSES, 0)
        self.mismatch: dict[int, Tensor] = {}

    def players(self) -> Mapping[str, Player]:
        """The generator and the critic."""
        return {"generator": Player(self.student), "critic": Player(self.critic, self.config.critic_optimiser)}

    def frozen(self) -> Sequence[nn.Module]:
        """The teacher, and the target where it is another module."""
        return [*super().frozen(), *([] if self.scheduled is None else [self.scheduled.denoiser])]

    def phases(self) -> Iterable[Phase]:
        """Stage 1 (degradation), if there is one, and stage 2 (backtracking); neither sees data."""
        steps = self.config.stage1_steps
        degrade = [Phase(DEGRADE, steps=steps, trains=("critic",), data_free=True)] if steps else []
        return [*degrade, Phase(BACKTRACK, data_free=True)]

    # ---- one iteration --------------------------------------------------------------------------------------------

    def updates(self, batch: Batch, clock: Clock) -> Iterator[Update]:
        """Stage 1: the critic on the fixed student. Stage 2: R times the critic, then the generator against the active target."""
        if clock.phase == DEGRADE:
            yield self.critic_update(len(batch), clock, 0)
            return
        iteration = clock.step
        target, switched = self.target_at(iteration), self.schedule.switched(iteration)
        if self.scheduled is not None and (iteration == 0 or switched):
            self.measure_mismatch(len(batch), clock)
        for k in range(self.config.ratio + self.config.settle_steps * switched):
            yield self.critic_update(len(batch), clock, k)
        yield self.generator_update(target, len(batch), clock)

    def check_length(self, steps: int) -> None:
        """The teacher's turn as the target must come. Raises InputError: the path is too long."""
        needed = self.schedule.switches[-1] if self.scheduled is not None else -1
        if steps <= needed:
            raise InputError(
                f"stage 2 ends after {steps} iterations, and the teacher's turn as the target comes after {needed}.",
                where="train.steps",
                fix="Train longer, or lower iterations_per_node or the number of nodes.",
            )

    def target_at(self, iteration: int) -> Denoiser:
        """The guided target of this iteration."""
        if self.scheduled is None:
            return self.guided
        self.scheduled.at(iteration)
        return self.guided_target

    def critic_update(self, count: int, clock: Clock, k: int) -> Update:
        """(2) on fresh samples of the student, which is as in evaluation (no dropout) in both stages."""
        generator = clock.generator(f"critic {k}")
        z, cond = self.draw(count, clock, f"critic noise {k}")
        with torch.no_grad(), evaluating(self.generator):
            x = self.generator(z, cond)
        t = self.config.levels.sample(self.critic.schedule, count, generator)
        self.count("student_forward", "critic_forward", "critic_backward")
        return Update("critic", denoising_loss(self.critic, x, t, normal(count, self.critic.shape, generator), cond))

    def generator_update(self, target: Denoiser, count: int, clock: Clock) -> Update:
        """(1) by the surrogate (3); neither denoiser has dropout there, and neither gets a gradient."""
        generator = clock.generator("direction")
        z, cond = self.draw(count, clock)
        t = self.config.levels.sample(target.schedule, count, generator)
        noise = normal(count, target.shape, generator)
        with evaluating(self.generator), evaluating(self.critic):
            x = self.generator(z, cond)
            direction = score_direction(x, target, self.critic, t, noise, cond, weight=self.config.weight)
        self.count("student_forward", "student_backward", "critic_forward", *["teacher_forward"] * (2 if self.config.guidance_scale not in (0, 1) else 1))
        metrics = self.watched(x, direction.broken) | {"direction": direction.g.square().mean().sqrt()}
        return Update("generator", inject(x, direction.g, "sum" if self.config.weight == "unit" else "mean"), metrics)

    @torch.no_grad()
    def measure_mismatch(self, count: int, clock: Clock) -> None:
        """M of the new target (6), on samples of its own. A measurement: its passes are not counted, and training goes on as without it."""
        assert self.scheduled is not None
        generator, node = clock.generator("mismatch"), self.schedule.node(clock.step)
        z, cond = self.draw(count, clock, "mismatch noise")
        t = self.config.levels.sample(self.critic.schedule, count, generator)
        with evaluating(self.generator), evaluating(self.critic):
            x_t = self.critic.schedule.add_noise(self.generator(z, cond), normal(count, self.critic.shape, generator), t)
            answers = [denoiser(x_t, t, cond) for denoiser in (self.scheduled.denoiser, self.denoiser_teacher, self.critic)]
        self.mismatch[node] = score_mismatch(*answers)

    def after_step(self, player: str, clock: Clock) -> None:
        """Stage 1: keep the critic's state, every `record_every` steps and at the end (4)."""
        done = clock.step + 1
        if clock.phase == DEGRADE and self.scheduled is not None and (done % self.config.record_every == 0 or done == self.config.stage1_steps):
            self.path.record(self.critic)

    # ---- what is kept and told ------------------------------------------------------------------------------------

    def count(self, *passes: str) -> None:
        """Note forward and backward passes of a batch through a network."""
        for name in passes:
            self.passes[name] += 1

    def facts(self) -> dict[str, Any]:
        """Number of targets, iterations at which they changed, M at the start of each, passes by network (stage 1 included)."""
        mismatch = {str(node): value for node, tensor in self.mismatch.items() if math.isfinite(value := float(tensor))}
        return {
            "targets": max(self.schedule.nodes, 1),
            "switches": list(self.schedule.switches),
            "mismatch": mismatch,
            "passes": dict(self.passes),
            "metrics": {"passes": float(sum(self.passes.values()))} | {f"mismatch_{node}": value for node, value in mismatch.items()},
        }

    def state_dict(self) -> dict[str, Any]:
        """The nodes so far and the counts."""
        return super().state_dict() | {"path": self.path.state_dict(), "passes": dict(self.passes), "mismatch": dict(self.mismatch)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put them back; the target is loaded when it is next asked for."""
        super().load_state_dict(state)
        self.path.load_state_dict(state["path"])
        self.passes, self.mismatch = dict(state["passes"]), dict(state["mismatch"])
