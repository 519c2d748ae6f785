import json

import pytest
import torch
from torch import nn
from toys import Toy, plain_student, same_folders, toy_data, toy_student, weights_of

from limbeck import seeds
from limbeck.contract import Clock, OptimiserSpec, Phase, ScheduleSpec, Update
from limbeck.data import AugmentSpec, BatchPlan, stream
from limbeck.errors import InputError, TrainingError
from limbeck.optimise import build_optimiser, factor
from limbeck.train import TrainConfig, Trainer
from limbeck.train import checkpoint as checkpoints


def fit(folder=None, *, student=None, augment=None, toy=None, seed=3, **config):
    method = (toy or Toy()).bind(student=student or toy_student(), train=toy_data(), num_classes=3, seed=seed)
    settings = {"epochs": 3, "batch_size": 10, "log_every": 4, "optimiser": OptimiserSpec(lr=0.05, momentum=0.9)} | config
    trained = Trainer(method, toy_data(), TrainConfig(**settings), seed=seed, folder=folder, augment=augment, num_classes=3).fit()
    return method, trained


def test_trains_what_a_bare_loop_trains():
    student = plain_student()
    method, trained = fit(student=student, toy=Toy(critic=False))
    bare = plain_student()
    average = {k: v.clone() for k, v in bare.state_dict().items()}
    for index, phase in enumerate(method.phases()):
        optimiser = build_optimiser(bare.parameters(), OptimiserSpec(lr=0.05, momentum=0.9))
        samples = 44 if phase.indices is None else phase.indices
        plan = BatchPlan(samples, 10, seed=seeds.derive(3, "order", index))
        steps = phase.steps or 3 * plan.steps_per_epoch
        average = {k: v.clone() for k, v in bare.state_dict().items()}
        for step, (batch,) in enumerate(stream(toy_data(), plan, augment=None, start=0, stop=steps, num_classes=3)):
            noise = torch.randn(batch.inputs.shape, generator=Clock(3, phase.name, index, step).generator("noise"))
            loss = (bare(batch.inputs + 0.1 * noise) - nn.functional.one_hot(batch.targets, 3)).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            average = {k: v.clone() if step == 0 else 0.9 * average[k] + 0.1 * v for k, v in bare.state_dict().items()}
        bare.load_state_dict(average)  # a phase ends with the moving average in the module
    for name, value in bare.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], value, rtol=1e-5, atol=1e-7)
    assert trained.steps == 3 * 5 + 9


def test_an_update_leaves_the_other_players_alone():
    method = Toy().bind(student=toy_student(), train=toy_data(), num_classes=3)
    trainer = Trainer(method, toy_data(), TrainConfig(epochs=1, batch_size=44), num_classes=3)
    touched = []
    original = trainer._apply

    def watch(player, clock):
        touched.append((player, {n for n, seat in trainer.seats.items() if any(p.grad is not None for p in seat.parameters)}))
        original(player, clock)

    trainer._apply = watch
    trainer.fit()
    assert touched[0] == ("student", {"student"})
    assert touched[1] == ("critic", {"critic"})
    assert [player for player, _ in touched[:3]] == ["student", "critic", "critic"]


@pytest.mark.parametrize("accumulate", [2, 5])
def test_accumulation_does_not_change_the_result(accumulate):
    whole = plain_student()
    cut = plain_student()
    # without noise: noise is drawn per micro-batch
    for student, count in ((whole, 1), (cut, accumulate)):
        method = NoNoise(critic=True).bind(student=student, train=toy_data(), num_classes=3)
        Trainer(method, toy_data(), TrainConfig(epochs=3, batch_size=10, accumulate=count), num_classes=3).fit()
    for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


class NoNoise(Toy):
    def updates(self, batch, clock):
        loss = (self.student(batch.inputs) - nn.functional.one_hot(batch.targets, 3)).square().mean()
        yield Update("student", loss)
        yield Update("critic", (self.critic(self.student(batch.inputs).detach()) - 1).square().mean())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_stops_at_every_checkpoint_ends_as_one_that_never_stopped(tmp_path, workers):
    spec = AugmentSpec(noise=0.1, mixup=0.5)
    whole, _ = fit(tmp_path / "whole", augment=spec, checkpoint_steps=5, keep=100, clip_norm=1.0)
    for _ in range(30):
        method = Toy().bind(student=toy_student(), train=toy_data(), num_classes=3, seed=3)
        config = TrainConfig(
            epochs=3, batch_size=10, log_every=4, optimiser=OptimiserSpec(lr=0.05, momentum=0.9), checkpoint_steps=5, keep=100, clip_norm=1.0, workers=workers
        )  # fmt: skip
        trainer = Trainer(method, toy_data(), config, seed=3, folder=tmp_path / "cut", augment=spec, num_classes=3)
        save, saved = trainer._save, []

        def save_and_stop(index, step, phase, save=save, saved=saved):
            if saved:
                raise Stop
            save(index, step, phase)
            saved.append(step)

        trainer._save = save_and_stop
        try:
            trainer.fit()
            break
        except Stop:
            continue
    else:
        pytest.fail("never finished")
    same_folders(tmp_path / "whole", tmp_path / "cut")
    assert method.seen == whole.seen == 3 * (3 * 5 + 9)
    assert method.entered == ["first", "second"]


class Stop(Exception):
    pass


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    with pytest.raises(TrainingError) as caught:
        fit(tmp_path, toy=Toy(nan_at=7), checkpoint_steps=3, log_every=5)
    message = str(caught.value)
    plan = BatchPlan(44, 10, seed=seeds.derive(3, "order", 0))
    ids = plan.ids(7)[1].tolist()
    assert "student/loss" in message
    assert "step 8 of the phase 'first'" in message
    assert ", ".join(map(str, ids)) in message
    newest = checkpoints.latest(tmp_path / "checkpoints")
    assert newest.name == "step-6"
    assert all(v.isfinite().all() for v in checkpoints.read(newest).weights.values())
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 5
    assert f"student/loss {rows[-1]['student/loss']:.6g}" in message


def flip_a_byte(folder):
    content = bytearray((folder / "weights.safetensors").read_bytes())
    content[-1] ^= 255
    (folder / "weights.safetensors").write_bytes(content)


def truncate(folder):
    (folder / "state.pt").write_bytes((folder / "state.pt").read_bytes()[:-7])


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (flip_a_byte, "weights.safetensors does not match its checksum"),
        (truncate, "state.pt has"),
        (lambda p: (p / "progress.json").unlink(), "progress.json is missing"),
        (lambda p: (p / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_offered(tmp_path, harm, named):
    fit(tmp_path, checkpoint_steps=5, keep=3)
    folder = tmp_path / "checkpoints"
    steps = checkpoints.steps(folder)
    harm(folder / f"step-{steps[-1]}")
    with pytest.raises(InputError) as caught:
        fit(tmp_path, checkpoint_steps=5, keep=3)
    assert named in str(caught.value)
    assert f"--from step-{steps[-2]}" in str(caught.value)
    method = Toy().bind(student=toy_student(), train=toy_data(), num_classes=3, seed=3)
    config = TrainConfig(epochs=3, batch_size=10, log_every=4, optimiser=OptimiserSpec(lr=0.05, momentum=0.9), checkpoint_steps=5, keep=3)
    Trainer(method, toy_data(), config, seed=3, folder=tmp_path, num_classes=3, resume_from=f"step-{steps[-2]}").fit()
    assert not checkpoints.damage(folder / f"step-{steps[-1]}")


def test_bf16_autocasts_the_loss_and_keeps_float_weights():
    seen = []

    class Watch(Toy):
        def updates(self, batch, clock):
            for update in super().updates(batch, clock):
                seen.append(self.student(batch.inputs).dtype)
                yield update

    student = toy_student()
    fit(student=student, toy=Watch(), precision="bf16")
    assert set(seen) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in student.parameters())


def test_fp16_scales_the_loss_and_takes_the_scale_back(tmp_path):
    whole, half = plain_student(), plain_student()
    for student, precision, folder in ((whole, "no", None), (half, "fp16", tmp_path)):
        method = NoNoise().bind(student=student, train=toy_data(), num_classes=3)
        config = TrainConfig(epochs=2, batch_size=11, precision=precision, clip_norm=0.5, checkpoint_steps=4)
        Trainer(method, toy_data(), config, folder=folder, num_classes=3).fit()
    for a, b in zip(whole.parameters(), half.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.01)
    saved = checkpoints.read(checkpoints.latest(tmp_path / "checkpoints"))
    if torch.cuda.is_available():  # on the CPU Accelerate runs fp16 without a scale
        assert saved.state["scaler"]["scale"] > 1


def test_clipping_bounds_the_step():
    before, student = plain_student(), plain_student()
    method = NoNoise(critic=True).bind(student=student, train=toy_data(), num_classes=3)
    config = TrainConfig(steps=1, batch_size=44, clip_norm=0.01, optimiser=OptimiserSpec(lr=1.0, momentum=0.0))
    one_phase = Trainer(method, toy_data(), config, num_classes=3)
    method.phases = lambda: [Phase()]
    one_phase.fit()
    moved = sum((a - b).square().sum() for a, b in zip(before.parameters(), student.parameters(), strict=True)).sqrt()
    # the player has a moving average, which after one step is the weights themselves
    torch.testing.assert_close(moved, torch.tensor(0.01), rtol=1e-3, atol=0)


def test_schedules():
    cosine = ScheduleSpec(name="cosine", warmup=0.1)
    values = [factor(cosine, s, 100) for s in range(100)]
    assert values[:10] == sorted(values[:10])
    assert values[10] == 1.0
    assert values[10:] == sorted(values[10:], reverse=True)
    assert values[-1] < 0.001
    steps = ScheduleSpec(name="step", milestones=(0.5, 0.75), gamma=0.1)
    assert [round(factor(steps, s, 100), 6) for s in (0, 49, 50, 74, 75, 99)] == [1, 1, 0.1, 0.1, 0.01, 0.01]
    assert factor(ScheduleSpec(name="linear", final=0.5), 50, 100) == 0.75


def test_a_second_seed_gives_another_result_and_the_same_seed_the_same():
    results = [weights_of(fit(student=plain_student(), seed=s)[0].student) for s in (3, 3, 4)]
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])
    assert any(not torch.equal(results[0][k], results[2][k]) for k in results[0])


def test_a_checkpoint_of_another_seed_is_refused(tmp_path):
    fit(tmp_path, checkpoint_steps=5)
    with pytest.raises(InputError, match="seed 3"):
        fit(tmp_path, seed=4, checkpoint_steps=5)
