"""KRR-ST: gradients where they belong, the pool's course, the start, restarts, and that it learns."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck import seeds
from limbeck.components import Component
from limbeck.contract import Batch, Clock, Method, OptimiserSpec, ScheduleSpec
from limbeck.data import ArrayData
from limbeck.errors import InputError, Interrupted
from limbeck.evaluate.transfer import Pretraining, held_out_loss, pretrain
from limbeck.methods.datasets.krr_st import KRRST
from limbeck.models import build_model
from limbeck.synthetic.krr import ridge_loss
from limbeck.synthetic.pool import frozen_features
from limbeck.synthetic.synthetic_set import SyntheticSet
from limbeck.teachers import as_teacher
from limbeck.train import TrainConfig, Trainer

QUICK = OptimiserSpec(name="adamw", lr=0.02, schedule=ScheduleSpec(name="linear", final=1e-3))


def small(seed: int, batch_norm: bool = True) -> nn.Module:
    return build_model(Component(name="cnn", args={"widths": [4], "batch_norm": batch_norm}), num_classes=10, input_shape=(1, 6, 6), seed=seed)


def data(count: int = 96) -> ArrayData:
    """Sums of five patterns, and a little noise."""
    patterns = torch.randn(5, 1, 6, 6, generator=seeds.generator(2))
    much = torch.randn(count, 5, generator=seeds.generator(3))
    images = 110 + 25 * torch.einsum("nk,kchw->nchw", much, patterns) + 5 * torch.randn(count, 1, 6, 6, generator=seeds.generator(5))
    return ArrayData(images.clamp(0, 255).to(torch.uint8), mean=(0.4,), std=(0.25,))


def encoder() -> nn.Module:
    """g with batch norm, its statistics not those of a fresh one."""
    made = build_model(Component(name="cnn", args={"widths": [5]}), num_classes=7, input_shape=(1, 6, 6), seed=99)
    made.train()(torch.randn(32, 1, 6, 6, generator=seeds.generator(4)))
    return made.eval()


def bound(train: Any = None, g: nn.Module | None = None, seed: int = 0, **knobs: Any) -> KRRST:
    knobs = {"images": 8, "networks": 3, "life": 5} | knobs
    method = KRRST(**knobs)
    source = data() if train is None else train
    return method.bind(student=small(0), teacher=as_teacher(encoder() if g is None else g), fresh_student=small, train=source, seed=seed)


def config(**changes: Any) -> TrainConfig:
    values: dict[str, Any] = {"steps": 40, "batch_size": 32, "optimiser": QUICK, "log_every": 10}
    return TrainConfig(**(values | changes))


def batch_of(method: KRRST, count: int = 32) -> Batch:
    ids = torch.arange(count)
    return Batch(method.prepared(ids), None, ids)


def driven(method: Method, batch: Batch, clock: Clock) -> Iterator[str]:
    """A loop of one's own: plain SGD, every gradient that was not asked for is an error."""
    players = method.players()
    for update in method.updates(batch, clock):
        yield update.player
        parameters = list(players[update.player].module.parameters())
        for p, gradient in zip(parameters, torch.autograd.grad(update.loss, parameters), strict=True):
            p.data -= 0.01 * gradient
        with torch.no_grad():
            method.after_step(update.player, clock)


def test_pairs_start_as_random_images_and_what_g_says_of_them() -> None:
    method = bound()
    images, targets = method.pairs
    chosen = method.chosen_images()
    assert len(chosen.unique()) == 8
    assert torch.equal(images.detach(), method.prepared(chosen))
    torch.testing.assert_close(targets.detach(), encoder()(method.prepared(chosen)).detach())
    assert not torch.equal(chosen, bound(seed=1).chosen_images())
    raw = bound(start="pixels")
    assert float(raw.pairs[0].detach().min()) >= 0
    assert float(raw.pairs[0].detach().max()) <= 1
    torch.testing.assert_close(raw.pairs[0].detach(), images.detach() * 0.25 + 0.4)
    assert torch.equal(raw.pairs[1], targets)  # computed from the normalised ones either way


def test_the_outer_loss_is_j_in_eval_mode_and_its_gradient_reaches_the_pairs_alone() -> None:
    method, clock = bound(), Clock(phase="distil", phase_index=1)
    member, batch = method.networks.members[method.visited(clock)], batch_of(bound())
    member.train()(torch.randn(16, 1, 6, 6, generator=seeds.generator(5)))
    batch.inputs.requires_grad_()
    before = copy.deepcopy(member.state_dict())
    update = next(method.updates(batch, clock))
    assert update.player == "pairs"
    images, targets = (p.detach().clone().requires_grad_() for p in method.pairs)
    member.eval()
    g_of_x = encoder()(batch.inputs).detach()
    expected = ridge_loss(frozen_features(member, images), targets, frozen_features(member, batch.inputs).detach(), g_of_x)
    torch.testing.assert_close(update.loss, expected)
    update.loss.backward()
    expected.backward()
    for mine, theirs in zip(method.pairs, (images, targets), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
        assert theirs.grad.abs().sum() > 0
    assert all(p.grad is None for p in member.parameters())
    assert batch.inputs.grad is None
    assert all(torch.equal(value, before[name]) for name, value in member.state_dict().items())  # statistics too


def test_the_target_network_is_left_as_it_was() -> None:
    g = encoder()
    method = bound(g=g)
    before = copy.deepcopy(g.state_dict())
    g.train()  # it answers in eval mode all the same
    Trainer(method, method.data, config(steps=6)).fit()
    assert all(torch.equal(value, before[name]) for name, value in g.state_dict().items())
    assert all(p.grad is None for p in g.parameters())


def test_answers_are_computed_once_and_belong_to_their_images() -> None:
    method, clock = bound(), Clock(phase="distil", phase_index=1)
    ids = torch.tensor([5, 80, 2])
    found = method.answers(Batch(method.prepared(ids), None, ids), clock)
    torch.testing.assert_close(found, encoder()(method.prepared(ids)).detach())
    kept = method.answers_ND
    method.answers(batch_of(method), clock)
    assert method.answers_ND is kept


def test_the_warm_up_takes_every_network_to_its_age() -> None:
    method = bound(life=20)
    phase = method.phases()[0]
    assert (phase.name, phase.steps, phase.data_free) == ("warm_up", max(method.networks.starts), True)
    images = method.pairs[0].detach().clone()
    for step in range(phase.steps or 0):
        clock = Clock(phase="warm_up", step=step)
        assert list(driven(method, Batch(torch.empty(8, 0)), clock)) == [f"pool-{i}" for i in range(3) if step < method.networks.starts[i]]
    assert method.networks.ages == method.networks.starts
    assert torch.equal(method.pairs[0], images)


@pytest.mark.parametrize("reset", ["paper", "released"])
def test_a_network_learns_the_new_pairs_until_it_is_made_anew(reset: str) -> None:
    method = bound(reset=reset, networks=1, life=2)
    seen = []
    for step in range(6):
        players = list(driven(method, batch_of(method), Clock(phase="distil", phase_index=1, step=step)))
        seen.append((len(players), method.networks.ages[0]))
        assert players[0] == "pairs"
    paper = [(2, 1), (2, 2), (1, 0), (2, 1), (2, 2), (1, 0)]
    assert seen == (paper if reset == "paper" else [(2, 1), (2, 2), (1, 2), (1, 2), (1, 2), (1, 2)])
    assert method.networks.resets == [2 if reset == "paper" else 4]
    assert method.facts()["metrics"] == {"resets": sum(method.networks.resets)}


def test_the_network_is_stepped_after_the_pairs_on_the_new_pairs_and_freshly_after_a_reset() -> None:
    method, clock = bound(networks=1, life=2), Clock(phase="distil", phase_index=1)
    updates = method.updates(batch_of(method), clock)
    next(updates)
    with torch.no_grad():
        method.pairs[1].add_(1.0)
    second = next(updates)
    member = method.networks.members[0].train()
    torch.testing.assert_close(second.loss, (member(method.pairs[0]) - method.pairs[1]).square().mean())
    (gradient,) = torch.autograd.grad(second.loss, method.pairs[0], allow_unused=True)
    assert gradient is None  # (1) does not move the pairs
    assert second.fresh
    method.after_step("pool-0", clock)
    updates = method.updates(batch_of(method), clock)
    next(updates)
    assert not next(updates).fresh


def weights(method: KRRST) -> list[Tensor]:
    return [p.detach().clone() for p in (*method.pairs, *(q for m in method.networks.members for q in m.parameters()))]


def test_momentum_does_not_outlive_a_reset() -> None:
    """A life of one step: with and without momentum the same course, as every step is a first one."""
    found = []
    for momentum in (0.0, 0.9):
        method = bound(life=1, inner=OptimiserSpec(lr=0.1, momentum=momentum))
        Trainer(method, method.data, config(steps=14)).fit()
        assert sum(method.networks.resets) > 2
        found.append(weights(method))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_it_stops_and_goes_on_exactly(tmp_path: Path) -> None:
    whole = bound(life=4)
    Trainer(whole, whole.data, config(steps=20), folder=tmp_path / "whole").fit()
    for stop in (2, 15):
        folder = tmp_path / str(stop)
        half = bound(life=4)
        trainer = Trainer(half, half.data, config(steps=20, checkpoint_steps=1), folder=folder)
        original = half.after_step

        def stopping(player: str, clock: Clock, trainer: Trainer = trainer, original: Any = original, stop: int = stop) -> None:
            original(player, clock)
            if trainer.total == stop:
                trainer._signal = 15

        half.after_step = stopping  # type: ignore[method-assign]
        with pytest.raises(Interrupted):
            trainer.fit()
        again = bound(life=4)
        Trainer(again, again.data, config(steps=20), folder=folder).fit()
        assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(again), strict=True))
        assert again.networks.state_dict() == whole.networks.state_dict()
        assert sum(again.networks.resets) > 0


def test_batches_in_parts_are_one_batch() -> None:
    """With networks that keep no statistics: these move once a part."""
    found = []
    for parts in (1, 2):
        method = KRRST(images=8, networks=3, life=4)
        method.bind(student=small(0), teacher=as_teacher(encoder()), fresh_student=lambda seed: small(seed, batch_norm=False), train=data())
        Trainer(method, method.data, config(steps=9, accumulate=parts, optimiser=OptimiserSpec(lr=0.5, momentum=0.9))).fit()
        found.append(weights(method))
        ages = method.networks.ages
    assert ages == method.networks.ages
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_it_learns() -> None:
    """J on images that it never saw, by networks that it never saw (and that were trained on the pairs), falls well below that of the first pairs."""
    whole = data(400)
    train, rest = ArrayData(whole.inputs[:300], mean=(0.4,), std=(0.25,)), whole.inputs[300:]
    method = bound(train=train, images=12, networks=2, life=30)
    first = copy.deepcopy(method.synthetic)
    Trainer(method, train, config(steps=150, batch_size=64)).fit()
    x = train.prepare(rest)
    answers = encoder()(x).detach()

    def j(made: SyntheticSet) -> float:
        pairs, networks = (made.images.detach(), made.targets.detach()), [small(seed) for seed in range(50, 54)]
        for network in networks:
            pretrain(network, *pairs, Pretraining(epochs=15), seed=0)
        return held_out_loss(pairs, x, answers, networks)

    before, after = j(first), j(method.synthetic)
    assert after < 0.7 * before


def test_what_comes_out() -> None:
    method = bound()
    Trainer(method, method.data, config(steps=2)).fit()
    artefact = method.artefact()
    assert artefact.kind == "dataset"
    assert isinstance(artefact.module, SyntheticSet)
    assert artefact.module.labels == "vectors"
    assert artefact.module.images.data_ptr() == method.pairs[0].data_ptr()
    assert method.facts()["vector"] == 7


def test_wrong_input() -> None:
    with pytest.raises(InputError, match="97 pairs of 96"):
        bound(images=97)
    with pytest.raises(InputError, match="fresh networks"):
        KRRST(images=4).bind(student=small(0), teacher=as_teacher(encoder()), train=data())
    with pytest.raises(InputError, match="needs a teacher"):
        KRRST(images=4).bind(student=small(0), fresh_student=small, train=data())
    with pytest.raises(InputError, match="distilled from one"):
        KRRST(images=4).bind(student=small(0), teacher=as_teacher(encoder()), fresh_student=small)
    with pytest.raises(InputError, match="life"):
        KRRST(life=0)
