"""The engine: runs anything that keeps the contract (DESIGN §3).

For each Update that a method yields: backward restricted to that player's parameters, average over processes, clip, step, zero,
the method's `after_step`, moving average, metrics. The phases, checkpoints and signals around that are here too.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck import seeds
from limbeck.contract import Batch, Clock, Data, Method, OptimiserSpec, Phase, Player, Update
from limbeck.data import AugmentSpec, BatchPlan, Views, blank, evaluation_batches, stream
from limbeck.errors import InputError, Interrupted, TrainingError
from limbeck.optimise import build_optimiser, set_rate
from limbeck.train import checkpoint, parallel
from limbeck.train.config import TrainConfig
from limbeck.train.metrics import MetricBuffer, MetricFile
from limbeck.train.progress import Progress, Silent

Evaluate = Callable[[Method], Mapping[str, float]]


@dataclass
class _Seat:
    """A player at the table: its parameters, optimiser and average."""

    player: Player
    parameters: list[nn.Parameter]
    spec: OptimiserSpec
    optimiser: torch.optim.Optimizer
    average: torch.optim.swa_utils.AveragedModel | None = None


@dataclass
class Trained:
    """What a training cost. samples: batch items seen; seconds: wall clock of this process; rows: of metrics.jsonl."""

    steps: int
    samples: int
    seconds: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What the method noticed on the way (`Method.notice`), each once."""


class Trainer:
    """Train a bound method.

    Args:
        method: bound to its student, teacher and data.
        data: what batches are drawn from.
        config: the `train:` section.
        seed: of the run; every random number follows from it.
        folder: where metrics and checkpoints go; None: nowhere.
        augment: what is done to every training sample; None: nothing.
        evaluate: called every `evaluate_every` epochs, for the learning curve.
        resume_from: name of a checkpoint (`step-40`); None: the newest.
        num_classes: width of soft labels that augmentation makes.
        views: what batches show in place of `data` and `augment`; None: the data.
        cpu: stay on the CPU even where there is an accelerator.
    """

    def __init__(
        self,
        method: Method,
        data: Data,
        config: TrainConfig,
        *,
        seed: int = 0,
        folder: Path | None = None,
        augment: AugmentSpec | None = None,
        evaluate: Evaluate | None = None,
        progress: Progress | None = None,
        label: str = "train",
        resume_from: str | None = None,
        num_classes: int = 0,
        views: Views | None = None,
        cpu: bool = False,
    ) -> None:
        self.method, self.data, self.config, self.seed, self.folder = method, data, config, seed, folder
        self.augment, self.evaluate, self.progress, self.label = augment, evaluate, progress or Silent(), label
        self.resume_from, self.num_classes, self.views = resume_from, num_classes, views
        self.accelerator = parallel.accelerator(config.precision, cpu=cpu)
        self.device: torch.device = self.accelerator.device
        self.rank, self.world = int(self.accelerator.process_index), int(self.accelerator.num_processes)
        self.sharded = config.sharding == "fsdp2" and self.world > 1
        self.seats: dict[str, _Seat] = {}
        self.restricted = False  # whether a backward must be told where to stop
        self.buffer = MetricBuffer()
        self.total = 0  # batches over all phases
        self.samples = 0
        self.notes: list[str] = []
        self._finite: dict[str, float] = {}
        self._signal = 0
        if self.device.type == "cpu":
            parallel.keep_freed_memory()
        self._autocast = nullcontext if config.precision == "no" else self.accelerator.autocast

    # ---- the step -------------------------------------------------------------------------------------------------

    def _step(self, micros: list[Batch], clock: Clock, size: int) -> None:
        """One global batch: the micro-batches' generators advance in lockstep, one optimiser step an Update."""
        self._reseed(seeds.derive(self.seed, "step", clock.phase_index, clock.step, self.rank))
        clocks = [clock] if len(micros) == 1 else [_at(clock, i) for i in range(len(micros))]
        running = [self.method.updates(batch, c) for batch, c in zip(micros, clocks, strict=True)]
        weights = self._weights(micros, clocks, size)
        while True:
            player = ""
            for generator, weight in zip(running, weights, strict=True):
                with self._autocast():
                    update = next(generator, None)
                if update is None:
                    continue
                if player and update.player != player:
                    raise RuntimeError(
                        f"micro-batches ask for different players: '{player}' and '{update.player}'; a method's updates may not depend on the batch."
                    )
                player = update.player
                if update.fresh:
                    self.seats[player].optimiser.state.clear()
                self._backward(update, weight, clock.step)
            if not player:
                return
            self._apply(player, clock)

    def _weights(self, micros: list[Batch], clocks: list[Clock], size: int) -> Sequence[float | Tensor]:
        """What each micro-batch's loss, a mean, is worth in the mean over the global batch of `size` samples (or of what the method weighs by)."""
        if len(micros) == 1 and self.world == 1:
            return [1.0]
        masses = [self.method.weigh(batch, c) for batch, c in zip(micros, clocks, strict=True)]
        known = [mass.to(torch.float64) for mass in masses if mass is not None]
        if len(known) < len(masses):
            return [len(batch) * self.world / size for batch in micros]
        whole = torch.stack(known).sum()
        if self.world > 1:
            whole = parallel.total(whole)
        return [(mass * self.world / whole.clamp(min=1e-30)).float() for mass in known]

    def _reseed(self, seed: int) -> None:
        """Make dropout and the like a function of the step. (torch.manual_seed would format a stack trace each time where CUDA is idle.)"""
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _backward(self, update: Update, weight: float | Tensor, step: int) -> None:
        seat = self.seats.get(update.player)
        if seat is None:
            raise RuntimeError(f"the method asks for the player '{update.player}', this phase has {sorted(self.seats)}.")
        loss = update.loss if isinstance(weight, float) and weight == 1.0 else update.loss * weight
        self.accelerator.backward(loss, **({"inputs": seat.parameters} if self.restricted else {}))
        self.buffer.add_loss(f"{update.player}/loss", update.loss, step)
        for name, value in update.metrics.items():
            self.buffer.add(f"{update.player}/{name}", value)

    def _apply(self, player: str, clock: Clock) -> None:
        seat, scaler = self.seats[player], self.accelerator.scaler
        if not self.sharded:
            parallel.average_gradients(seat.parameters, self.world)
        if self.config.clip_norm is not None:
            if scaler is not None:
                scaler.unscale_(seat.optimiser)
            self.buffer.add(f"{player}/grad_norm", nn.utils.clip_grad_norm_(seat.parameters, self.config.clip_norm))
        if scaler is None:
            seat.optimiser.step()
        else:
            scaler.step(seat.optimiser)
            scaler.update()
        if self.sharded:
            for other in self.seats.values():
                other.optimiser.zero_grad(set_to_none=True)
        else:
            seat.optimiser.zero_grad(set_to_none=True)
        with torch.no_grad():
            self.method.after_step(player, clock)
        if seat.average is not None:
            seat.average.update_parameters(seat.player.module)

    # ---- the phases -----------------------------------------------------------------------------------------------

    def fit(self) -> Trained:
        """Train from the start, or from a checkpoint in the folder, to the end.

        Raises:
            TrainingError: a loss is not finite. Interrupted: a signal came; a checkpoint was written.
            InputError: a checkpoint is damaged or belongs to other phases; the data are too small.
        """
        self._began, self._before = time.monotonic(), 0.0
        self.file = MetricFile(self.folder / "metrics.jsonl" if self.folder is not None and self.rank == 0 else None)
        self._saved_at = self._began
        try:
            with self._signals():
                self.method.check_length(self._length(Phase(), self._plan(Phase(), 0)))
                index, step = self._restore()
                restored = self.total if index and not step else -1
                for player in self.method.players().values():
                    player.module.to(self.device).eval()
                if step:
                    self._mode(training=True)
                while True:
                    phase = next(islice(iter(self.method.phases()), index, None), None)
                    if phase is None:
                        break
                    self._phase(phase, index, step)
                    index, step = index + 1, 0
                if self.folder is not None and self.total != restored:
                    self._save(index, 0, "")
                (number,) = parallel.agree([self._signal], self.device, self.world)
                if number:
                    raise Interrupted(f"stopped by {signal.Signals(number).name}: this training is done; the same command goes on from it.", number)
        finally:
            self.file.close()
            self._mode(training=False)
        return Trained(self.total, self.samples, self._spent(), self.file.rows, self.notes)

    def _spent(self) -> float:
        return self._before + time.monotonic() - self._began

    def _phase(self, phase: Phase, index: int, start: int) -> None:
        clock = Clock(self.seed, phase.name, index, start, rank=self.rank, device=self.device, world=self.world)
        if self.world > 1:
            clock.total = parallel.total
        if start == 0:
            self.method.enter(phase, clock, self)
            self._seat(phase)
        plan = self._plan(phase, index)
        clock.steps = self._length(phase, plan)
        if phase.single_last:
            plan.end_single(phase.single_last, clock.steps)
        config = self.config
        self.progress.start(f"{self.label}" if phase.name == "train" else f"{self.label} {phase.name}", clock.steps, start)
        batches = blank(plan, start=start, stop=clock.steps, rank=self.rank, world=self.world, micro=config.accumulate) if phase.data_free else stream(
            self.data, plan, augment=self.augment, start=start, stop=clock.steps, rank=self.rank, world=self.world,
            micro=config.accumulate, workers=config.workers, num_classes=self.num_classes, views=self.views, usable=phase.usable,
        )  # fmt: skip
        per_epoch = plan.steps_per_epoch
        try:
            for step, micros in zip(range(start, clock.steps), batches, strict=True):
                clock.step, clock.epoch = step, plan.epoch(step)
                for seat in self.seats.values():
                    set_rate(seat.optimiser, seat.spec, step, clock.steps)
                if self.device.type != "cpu":
                    micros = [batch.to(self.device) for batch in micros]
                size = sum(len(batch) for batch in micros) if self.world == 1 else len(plan.ids(step)[1]) * plan.views_at(step)
                self.buffer.ids[step] = micros[0].ids if len(micros) == 1 else _join(micros)
                self._step(micros, clock, size)
                self.total += 1
                self.samples += size
                ended = step + 1 == clock.steps
                if ended or (step + 1) % config.log_every == 0:
                    self._log(clock, ended)
                if config.evaluate_every and self.evaluate is not None and (ended or (step + 1) % (per_epoch * config.evaluate_every) == 0):
                    self._evaluate(clock)
                self._upkeep(index, step + 1, phase.name, ended)
        finally:
            batches.close()
        self.progress.stop()
        self._mode(training=False)
        for player in self.method.players().values():  # one that only gathers statistics included
            parallel.broadcast(player.module, 1 if self.sharded else self.world, parameters=False)
        for seat in self.seats.values():
            if seat.average is not None:
                seat.player.module.load_state_dict(seat.average.module.state_dict())
        self.method.leave(phase, clock, self)
        self.seats = {}

    def _plan(self, phase: Phase, index: int) -> BatchPlan:
        samples = len(self.data) if phase.indices is None else phase.indices
        seed, n = seeds.derive(self.seed, "order", index), phase.views_per_sample
        if self.views is None and (n > 1 or phase.usable is not None):
            raise InputError("the method chooses among views, and there are none.", where="data.views", fix="Give data.views, as the record has them.")
        return BatchPlan(samples, self.config.batch_size, seed=seed, drop_last=self.config.drop_last, views=n)

    def _length(self, phase: Phase, plan: BatchPlan) -> int:
        if phase.steps is not None or phase.epochs is not None:
            steps, epochs = phase.steps, phase.epochs
        else:
            steps, epochs = self.config.steps, self.config.epochs
        return steps if steps is not None else (epochs or 0) * plan.steps_per_epoch

    def _seat(self, phase: Phase) -> None:
        """Put the players of a phase on the device with fresh optimisers."""
        self.seats = {}
        for module in self.method.frozen():
            module.to(self.device)
        players = self.method.players()
        # With one player there is nothing else to reach, and a plain backward is 5 % faster. FSDP's leaves are not the sharded parameters.
        self.restricted = len(players) > 1 and not self.sharded
        for name, player in players.items():
            player.module.to(self.device)
            if phase.trains is not None and name not in phase.trains:
                continue
            parallel.broadcast(player.module, 1 if self.sharded else self.world, parameters=True)
            if self.sharded:
                parallel.shard(player.module, self.device, self.config.precision)
            parameters = [p for p in player.module.parameters() if p.requires_grad]
            spec = phase.optimisers.get(name) or player.optimiser or self.config.optimiser
            if phase.rate != 1.0:
                spec = spec.model_copy(update={"lr": spec.lr * phase.rate})
            decay = player.ema if player.ema is not None else (self.config.ema if name in ("student", "generator") else None)
            average = None
            if decay is not None:
                from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

                average = AveragedModel(player.module, multi_avg_fn=get_ema_multi_avg_fn(decay))
            self.seats[name] = _Seat(player, parameters, spec, build_optimiser(parameters, spec), average)
        self._mode(training=True)

    def _mode(self, *, training: bool) -> None:
        for seat in self.seats.values():
            seat.player.module.train(training)
        for module in self.method.frozen():
            module.eval()

    # ---- what happens now and then --------------------------------------------------------------------------------

    def _log(self, clock: Clock, ended: bool) -> None:
        """One row of means; the only place in a phase where tensors are read on the host."""
        stacked = self.buffer.stacked()
        self._check(stacked, clock)
        if not stacked:
            return
        means = torch.stack([value.mean() for value in stacked.values()])
        if self.world > 1:
            means = self.accelerator.reduce(means, reduction="mean")
        row: dict[str, Any] = {"phase": clock.phase, "step": clock.step + 1, "epoch": clock.epoch}
        row |= dict(zip(stacked, (float(v) for v in means.tolist()), strict=True))
        row |= {f"{name}/lr": seat.optimiser.param_groups[0]["lr"] for name, seat in self.seats.items()}
        if self.rank == 0:
            self.file.write(row)
        self._finite = {name: row[name] for name in stacked if name.endswith("/loss")}
        self._notice({name: row[name] for name in stacked} | {"progress": (clock.step + 1) / max(clock.steps, 1)})
        self.buffer.clear()
        self.progress.advance(clock.step + 1, " ".join(f"{name} {value:.4f}" for name, value in self._finite.items()) if ended or self.rank == 0 else "")

    def _notice(self, row: Mapping[str, float]) -> None:
        """What the method makes of a row of the log, each sentence said and kept once."""
        for text in self.method.notice(row):
            if text not in self.notes:
                self.notes.append(text)
                if self.rank == 0:
                    self.progress.say(text)

    def _check(self, stacked: Mapping[str, Tensor], clock: Clock) -> None:
        """Stop on a non-finite loss, naming the first step that had one and its samples."""
        losses = {name: value for name, value in stacked.items() if name.endswith("/loss")}
        if not losses:
            return
        finite = torch.stack([value.isfinite().all() for value in losses.values()]).all()
        bad_here = not bool(finite)
        if not any(parallel.agree([bad_here], self.device, self.world)):
            return
        found = None
        if bad_here:
            first = {n: self.buffer.steps[n][int((~v.isfinite()).nonzero()[0])] for n, v in losses.items() if not bool(v.isfinite().all())}
            name = min(first, key=lambda n: first[n])
            ids = self.buffer.ids.get(first[name])
            found = (first[name], name, [] if ids is None else ids.tolist())
        step, name, samples = min(f for f in parallel.gather(found, self.world) if f is not None)
        shown = ", ".join(map(str, samples[:16])) + (f", … ({len(samples)} in all)" if len(samples) > 16 else "")
        last = ", ".join(f"{k} {v:.6g}" for k, v in self._finite.items()) or "none was logged"
        good = checkpoint.latest(self.folder / "checkpoints") if self.folder is not None else None
        raise TrainingError(
            f"{name} is not finite at step {step + 1} of the phase '{clock.phase}'; samples of that batch: {shown}. Last finite values: {last}. "
            + (f"The last good checkpoint is {good}." if good else "No checkpoint had been written yet.")
            + " A smaller learning rate, train.clip_norm, or a look at those samples may help."
        )

    def _evaluate(self, clock: Clock) -> None:
        assert self.evaluate is not None
        self._mode(training=False)
        with self._averaged():
            values = self.evaluate(self.method)
        self._mode(training=True)
        if self.rank == 0:
            self.file.write({"phase": clock.phase, "step": clock.step + 1, "epoch": clock.epoch, **{f"eval/{k}": float(v) for k, v in values.items()}})

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Players that have a moving average carry it meanwhile."""
        kept = {name: {k: v.clone() for k, v in seat.player.module.state_dict().items()} for name, seat in self.seats.items() if seat.average is not None}
        for name in kept:
            self.seats[name].player.module.load_state_dict(self.seats[name].average.module.state_dict())  # type: ignore[union-attr]
        yield
        for name, state in kept.items():
            self.seats[name].player.module.load_state_dict(state)

    def _upkeep(self, index: int, done: int, phase: str, ended: bool) -> None:
        """Signals, checkpoints and the display, after each batch; processes agree at logging steps only."""
        self.progress.advance(done)
        if self.world > 1 and not ended and done % self.config.log_every and self.config.checkpoint_steps is None:
            return
        if self.config.checkpoint_steps is not None:
            due = self.total % self.config.checkpoint_steps == 0
        else:
            due = time.monotonic() - self._saved_at >= self.config.checkpoint_minutes * 60
        number, due_now = self._signal, int(due)
        if self.world > 1:
            number, due_now = parallel.agree([number, due_now], self.device, self.world)
        if (due_now or number) and self.folder is not None:
            self._save(index, done, phase)
        if number:
            self.progress.stop()
            where = f"a checkpoint at step {self.total} was written; the same command goes on from it" if self.folder is not None else "nothing was saved"
            raise Interrupted(f"stopped by {signal.Signals(number).name}: {where}.", number)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C ask for a checkpoint at the next batch; a second Ctrl-C stops at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, _frame: Any) -> None:
            if self._signal and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._signal = number

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def _save(self, index: int, step: int, phase: str) -> None:
        assert self.folder is not None
        self._check(self.buffer.stacked(), Clock(self.seed, phase, index, max(step - 1, 0)))
        weights: dict[str, Tensor] = {}
        optimisers: dict[str, Any] = {}
        for name, seat in self.seats.items():
            parallel.broadcast(seat.player.module, self.world, parameters=False)
            if seat.average is not None:
                weights |= {f"average.{name}.{k}": v for k, v in seat.average.state_dict().items()}
            if self.sharded:
                from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

                full = StateDictOptions(full_state_dict=True, cpu_offload=True)
                _, optimisers[name] = get_state_dict(seat.player.module, seat.optimiser, options=full)
            else:
                optimisers[name] = seat.optimiser.state_dict()
        for name, player in self.method.players().items():
            weights |= {f"player.{name}.{k}": v for k, v in self._module_state(player.module).items()}
        bad = [name for name, value in weights.items() if value.is_floating_point() and not bool(value.isfinite().all())]
        if any(parallel.agree([bool(bad)], self.device, self.world)):
            good = checkpoint.latest(self.folder / "checkpoints")
            raise TrainingError(
                f"the weights are not finite after step {step} of the phase '{phase}' ({', '.join(bad[:3])}). "
                f"The last good checkpoint is {good or 'none: it had not been written yet'}."
            )
        buffers = parallel.gather(self.buffer.state_dict(), self.world)
        if self.rank == 0:
            state = {
                "optimisers": optimisers,
                "method": self.method.state_dict(),
                "buffers": buffers,
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {},
            }
            progress = {
                "phase_index": index, "phase": phase, "step": step, "total": self.total, "samples": self.samples, "seed": self.seed,
                "metrics_bytes": self.file.sync(), "finite": self._finite, "world": self.world, "seconds": self._spent(), "notes": self.notes,
            }  # fmt: skip
            checkpoint.write(self.folder / "checkpoints", self.total, checkpoint.Checkpoint(weights, state, progress), keep=self.config.keep)
        if self.world > 1:
            self.accelerator.wait_for_everyone()
        self._saved_at = time.monotonic()

    def _module_state(self, module: nn.Module) -> Mapping[str, Tensor]:
        if not self.sharded or not hasattr(module, "unshard"):
            return module.state_dict()
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        full = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        return {name: value for name, value in full.items() if isinstance(value, Tensor)}

    def _restore(self) -> tuple[int, int]:
        """Phase index and step to go on from; (0, 0) with nothing to restore."""
        folder = self.folder / "checkpoints" if self.folder is not None else None
        asked = folder / self.resume_from if folder is not None and self.resume_from else None
        path = None if folder is None else asked if asked is not None and asked.is_dir() else checkpoint.latest(folder)
        if path is None:
            if self.file.path is not None:
                self.file.cut(0)
            return 0, 0
        saved = checkpoint.read(path)
        if saved.progress["seed"] != self.seed:
            raise InputError(
                f"the checkpoint is of seed {saved.progress['seed']}, this run has {self.seed}.", where=str(path), fix="Give this run another folder."
            )
        index, step = int(saved.progress["phase_index"]), int(saved.progress["step"])
        self.total, self.samples, self._finite = int(saved.progress["total"]), int(saved.progress["samples"]), dict(saved.progress["finite"])
        self._before, self.notes = float(saved.progress["seconds"]), list(saved.progress.get("notes", ()))
        self.method.load_state_dict(saved.state["method"])
        players = self.method.players()
        try:
            for name, player in players.items():
                player.module.load_state_dict(_under(saved.weights, f"player.{name}."))
            if step:
                phase = next(islice(iter(self.method.phases()), index, None))
                self._seat(phase)
                for name, seat in self.seats.items():
                    self._restore_optimiser(seat, saved.state["optimisers"][name])
                    if seat.average is not None:
                        seat.average.load_state_dict(_under(saved.weights, f"average.{name}."))
        except (RuntimeError, KeyError, ValueError, StopIteration) as error:
            raise InputError(
                f"the checkpoint does not fit this recipe: {error}", where=str(path), fix="Was the recipe changed? Give this run another folder."
            ) from error
        buffers = saved.state["buffers"]
        self.buffer.load_state_dict(buffers[self.rank if len(buffers) == self.world else 0], self.device)
        if self.accelerator.scaler is not None and saved.state["scaler"]:
            self.accelerator.scaler.load_state_dict(saved.state["scaler"])
        if self.rank == 0:
            self.file.cut(int(saved.progress["metrics_bytes"]))
            checkpoint.forget_later(path)
        if self.world > 1:
            self.accelerator.wait_for_everyone()
        return index, step

    def _restore_optimiser(self, seat: _Seat, state: Any) -> None:
        if not self.sharded:
            seat.optimiser.load_state_dict(state)
            return
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        set_optimizer_state_dict(seat.player.module, seat.optimiser, state, options=StateDictOptions(full_state_dict=True))

    # ---- the method's workbench -----------------------------------------------------------------------------------

    @torch.no_grad()
    def outputs(self, forward: Callable[[Tensor], Tensor], data: Data, indices: Tensor | None = None) -> Tensor:
        """`forward` over data in order, without gradient or augmentation; see contract.Workbench."""
        modules = [seat.player.module for seat in self.seats.values()]
        was = [module.training for module in modules]
        for module in modules:
            parallel.broadcast(module, self.world, parameters=False)
            module.eval()
        found = [forward(inputs.to(self.device)).float().cpu() for inputs, _, _ in evaluation_batches(data, max(self.config.batch_size, 256), indices)]
        for module, training in zip(modules, was, strict=True):
            module.train(training)
        return torch.cat(found)

    def average(self, player: str) -> nn.Module:
        """The moving average of a player's weights; see contract.Workbench."""
        found = self.seats[player].average
        if found is None:
            raise InputError(f"the player '{player}' has no moving average.", where="train.ema", fix="Set train.ema.")
        return found.module


def _at(clock: Clock, micro: int) -> Clock:
    copy = Clock(**clock.__dict__)
    copy.micro = micro
    return copy


def _join(micros: list[Batch]) -> Tensor | None:
    ids = [batch.ids for batch in micros if batch.ids is not None]
    return torch.cat(ids) if ids else None


def _under(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
