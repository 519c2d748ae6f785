"""DMD2: every invariant of its sheet, what takes gradients and what does not, health, restarts, and that it learns."""

import copy
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from limbeck import seeds
from limbeck.contract import IGNORE, Batch, Clock, OptimiserSpec, Player, Update
from limbeck.data.arrays import ArrayData
from limbeck.diffusion.denoisers import Denoiser, Guided, MixtureDenoiser, NetworkDenoiser
from limbeck.diffusion.discriminator import discriminator_loss, generator_loss
from limbeck.diffusion.generator import Generator
from limbeck.diffusion.networks import MLPNetwork
from limbeck.diffusion.samplers import at
from limbeck.diffusion.schedules import make_schedule
from limbeck.errors import InputError, TrainingError
from limbeck.evaluate.samples import mmd2
from limbeck.methods.generators.denoising import Denoising
from limbeck.methods.generators.dmd2 import DMD2
from limbeck.train.config import TrainConfig
from limbeck.train.trainer import Trainer

NO_GAN = {"weight": 0.0}
ADAM = OptimiserSpec(name="adam", lr=2e-3)


def denoiser(schedule: str = "edm", classes: int = 0, widths: Sequence[int] = (16, 16), seed: int = 0) -> NetworkDenoiser:
    """A small network with an output that is not zero."""
    torch.manual_seed(seed)
    edm = schedule == "edm"
    network = MLPNetwork((2,), widths, num_classes=classes, zero_output=False, embedding="smooth" if edm else "positional")
    return NetworkDenoiser(network, make_schedule(schedule), prediction="x0" if edm else "eps", precondition="edm" if edm else "none")


def points(count: int = 64, classes: int = 0, seed: int = 5) -> ArrayData:
    """Four Gaussians of deviation 0.05 at (±0.5, ±0.5)."""
    draw = torch.Generator().manual_seed(seed)
    which = torch.randint(4, (count,), generator=draw)
    centres = torch.tensor([[-0.5, -0.5], [-0.5, 0.5], [0.5, -0.5], [0.5, 0.5]])
    x = centres[which] + 0.05 * torch.randn(count, 2, generator=draw)
    return ArrayData(x, which % classes if classes else None, [str(c) for c in range(classes)] if classes else None)


def bound(data: ArrayData | None = None, teacher: Denoiser | None = None, student: nn.Module | None = None, **knobs) -> DMD2:
    teacher = teacher or denoiser()
    return DMD2(**knobs).bind(student=student or copy.deepcopy(teacher), teacher=teacher, train=data)


def batch_of(data: ArrayData, count: int = 8) -> Batch:
    ids = torch.arange(count)
    raw, targets = data.fetch(ids)
    return Batch(data.prepare(raw), targets, ids)


def empty(count: int = 8) -> Batch:
    return Batch(torch.empty(count, 0))


def leaves(loss: Tensor) -> set[int]:
    """The ids of the tensors that a backward pass of this loss would reach."""
    found, seen, waiting = set(), set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        waiting += [n for n, _ in node.next_functions]
    return found


def ids_of(*modules: nn.Module) -> set[int]:
    return {id(p) for module in modules for p in module.parameters()}


def of(method: DMD2, player: str, batch: Batch, step: int = 0) -> Update:
    return next(update for update in method.updates(batch, Clock(step=step, steps=100)) if update.player == player)


class Point(nn.Module):
    """x = μ + s z, for closed forms."""

    shape = (2,)

    def __init__(self, mean: float = 0.0, std: float = 0.5) -> None:
        super().__init__()
        self.mean, self.std = nn.Parameter(torch.full((2,), mean)), nn.Parameter(torch.full((2,), std))

    def forward(self, noise: Tensor) -> Tensor:
        return self.mean + self.std * noise


def gaussian(mean: float, std: float) -> MixtureDenoiser:
    return MixtureDenoiser(make_schedule("edm"), torch.full((1, 2), mean), torch.tensor([std]))


class ExactCritic(DMD2):
    """Whose critic knows the student's law in closed form."""

    def make_critic(self):
        return gaussian(self.student.mean[0].item(), self.student.std[0].item())


# ---- L_DM ----------------------------------------------------------------------------------------------------------------


def test_gradient_in_x_is_g_over_bd_and_the_value_half_its_mean_square() -> None:
    method, clock = bound(gan=NO_GAN), Clock(steps=10)
    with torch.no_grad():  # a critic that differs from the teacher
        for p in method.critic.parameters():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    x = (0.5 * torch.randn(8, 2, generator=torch.Generator().manual_seed(2))).requires_grad_()
    update = method.generator_update(x, None, clock)
    draws = clock.generator("generator")
    t = method.config.levels.sample(method.guided.schedule, 8, draws)
    x_t = method.guided.schedule.add_noise(x, torch.randn(8, 2, generator=draws), t)
    with torch.no_grad():
        real, fake = method.teacher(x_t, t), method.critic(x_t, t)
        g = (fake - real) / ((x - real).abs().mean(1, keepdim=True) + 1e-6)
    torch.testing.assert_close(torch.autograd.grad(update.loss, x)[0], g / 16, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(update.loss.detach(), 0.5 * g.square().mean(), rtol=1e-4, atol=1e-7)
    grid = method.guided.schedule.grid(1000)
    assert float(t.min()) >= float(grid[20])
    assert float(t.max()) <= float(grid[980])


def test_g_has_no_dimension() -> None:
    """Space, levels and denoisers scaled by c: the same g."""
    found = []
    for c in (1.0, 10.0):
        schedule = make_schedule("edm", t_min=0.002 * c, t_max=80.0 * c)
        teacher, critic = (MixtureDenoiser(schedule, torch.full((1, 2), m * c), torch.tensor([0.5 * c])) for m in (1.0, 0.2))
        method = ExactCritic(gan=NO_GAN, start="fresh").bind(student=Point(0.2), teacher=teacher)
        method.critic = critic
        x = c * torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
        x.requires_grad_()
        found.append(torch.autograd.grad(method.generator_update(x, None, Clock()).loss, x)[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-2, atol=1e-6)


def test_a_critic_equal_to_the_teacher_gives_nothing() -> None:
    method = bound(gan=NO_GAN)
    update = of(method, "generator", empty())
    assert update.loss.item() == 0
    assert all(not g.any() for g in torch.autograd.grad(update.loss, list(method.student.parameters())) if g is not None)
    dropping = denoiser()  # also where the critic has dropout and trains
    dropping.network.dropout.p = 0.5
    method = bound(teacher=dropping.eval(), gan=NO_GAN)
    method.critic.train()
    method.student.eval()
    assert of(method, "generator", empty()).loss.item() == 0
    assert method.critic.training


def test_gaussian_closed_form() -> None:
    """D_φ − D_T = σ²(μ − μ_T)/(s² + σ²); as a score difference that is dKL/dμ; the step moves μ towards μ_T."""
    mean, wanted, std = 0.2, 1.0, 0.5
    method = ExactCritic(gan=NO_GAN, start="fresh").bind(student=Point(mean, std), teacher=gaussian(wanted, std))
    t = torch.tensor([0.01, 0.3, 2.0, 50.0], dtype=torch.float64)
    x_t = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * (std**2 + t[:, None] ** 2).sqrt()
    difference = method.critic(x_t, t) - method.teacher(x_t, t)
    expected = (t**2 * (mean - wanted) / (std**2 + t**2))[:, None].expand(4, 2)
    torch.testing.assert_close(difference, expected)
    mu = torch.full((4,), mean, dtype=torch.float64, requires_grad=True)
    kl = ((mu - wanted) ** 2 / (2 * (std**2 + t**2))).sum()
    torch.testing.assert_close(difference[:, 0] / t**2, torch.autograd.grad(kl, mu)[0])
    update = of(method, "generator", empty(64))
    assert bool((torch.autograd.grad(update.loss, method.student.mean)[0] < 0).all())


def test_guidance_is_the_teachers_alone_and_1_is_none() -> None:
    teacher, data = denoiser(classes=3), None
    plain, guided = (bound(data, teacher, gan=NO_GAN, guidance_scale=k) for k in (1.0, 2.5))
    assert isinstance(guided.guided, Guided)
    assert not isinstance(guided.critic, Guided)
    x_t, t, cond = torch.randn(5, 2), at(1.0, torch.empty(5, 2)), torch.tensor([0, 1, 2, 0, 1])
    torch.testing.assert_close(plain.guided(x_t, t, cond), teacher(x_t, t, cond))
    null = torch.full((5,), 3)
    torch.testing.assert_close(guided.guided(x_t, t, cond), teacher(x_t, t, null) + 2.5 * (teacher(x_t, t, cond) - teacher(x_t, t, null)))
    assert of(plain, "generator", empty()).loss.item() == 0  # the critic is given the same condition
    assert of(guided, "generator", empty()).loss.item() > 0


# ---- L_D and L_G -----------------------------------------------------------------------------------------------------------


def test_the_pair_of_softplus() -> None:
    zeros = torch.zeros(4, 2)
    assert discriminator_loss(zeros, zeros).item() == pytest.approx(2 * math.log(2))
    assert generator_loss(zeros).item() == pytest.approx(math.log(2))
    method = bound(points())
    for p in method.discriminator.heads.parameters():
        nn.init.zeros_(p)
    update = of(method, "critic", batch_of(points()))
    assert update.metrics["gan"].item() == pytest.approx(2 * math.log(2))
    assert of(method, "generator", batch_of(points())).metrics["gan"].item() == pytest.approx(math.log(2))


def test_the_best_logits_are_the_log_ratio() -> None:
    p, q = torch.tensor([0.7, 0.3]), torch.tensor([0.2, 0.8])
    logits = (p.log() - q.log()).requires_grad_()
    loss = (q * nn.functional.softplus(logits) + p * nn.functional.softplus(-logits)).sum()
    assert torch.autograd.grad(loss, logits)[0].abs().max() < 1e-6


@pytest.mark.parametrize("trunk", ["critic", "teacher", "own"])
def test_losses_reach_their_own_player_and_nothing_else(trunk) -> None:
    data = points()
    method = bound(data, gan={"trunk": trunk})
    players = method.players()
    assert set(players) == {"generator", "critic"} | ({"discriminator"} if trunk != "critic" else set())
    heads = method.discriminator.heads
    for step in (0, 1):
        for update in method.updates(batch_of(data), Clock(step=step)):
            reached = leaves(update.loss)
            assert reached <= ids_of(players[update.player].module), update.player
            assert not reached & ids_of(method.teacher)
            update.loss.backward()
            others = [p for name, player in players.items() if name != update.player for p in player.module.parameters()]
            assert all(p.grad is None for p in [*others, *method.teacher.parameters()])
            for p in players[update.player].module.parameters():
                p.grad = None
    critic = of(method, "critic", batch_of(data))
    assert leaves(critic.loss) >= ids_of(method.critic)  # all of the critic learns
    judge = of(method, "critic" if trunk == "critic" else "discriminator", batch_of(data))
    assert leaves(judge.loss) >= ids_of(heads)
    assert all(p.requires_grad for p in [*method.critic.parameters(), *heads.parameters()])  # as it was before


def test_the_gradient_of_l_g_passes_through_the_trunk_to_x() -> None:
    method = bound(points(), gan={"weight": 1.0})  # the critic equals the teacher: L_DM is nothing
    update = of(method, "generator", batch_of(points()))
    assert sum(g.abs().sum() for g in torch.autograd.grad(update.loss, list(method.student.parameters()), allow_unused=True) if g is not None) > 0


def test_w_d_weighs_the_discriminator_in_the_critics_loss() -> None:
    data = points()
    for weight in (0.0, 0.5):
        update = of(bound(data, gan={"discriminator_weight": weight}), "critic", batch_of(data))
        torch.testing.assert_close(update.loss, update.metrics["denoising"] + weight * update.metrics["gan"])


def counted(network: MLPNetwork, seen: list[tuple[str, int, bool]], name: str) -> None:
    """Note every pass of a network: whose, of how many samples, with a graph or without."""
    stages = network.stages

    def noting(x, time, cond):
        seen.append((name, len(x), torch.is_grad_enabled()))
        return stages(x, time, cond)

    network.stages = noting


def test_no_pass_is_made_twice() -> None:
    data = points()
    method = bound(data, ratio=2)
    seen: list[tuple[str, int, bool]] = []
    for name, module in (("G", method.student), ("T", method.teacher), ("C", method.critic)):
        counted(module.network, seen, name)
    list(method.updates(batch_of(data), Clock(step=0)))
    assert seen == [("G", 8, True), ("T", 8, False), ("C", 8, False), ("C", 8, True), ("C", 8, True), ("C", 16, True)]
    seen.clear()
    list(method.updates(batch_of(data), Clock(step=1)))
    assert seen == [("G", 8, False), ("C", 8, True), ("C", 16, True)]
    plain = bound(gan=NO_GAN, ratio=2)
    seen.clear()
    for name, module in (("G", plain.student), ("T", plain.teacher), ("C", plain.critic)):
        counted(module.network, seen, name)
    list(plain.updates(empty(), Clock(step=0)))
    assert seen == [("G", 8, True), ("T", 8, False), ("C", 8, False), ("C", 8, True)]


@pytest.mark.parametrize("trunk", ["critic", "teacher", "own"])
def test_the_generators_discriminator_drops_nothing(trunk) -> None:
    own = {"name": "mlp_denoiser", "args": {"widths": [16], "dropout": 0.5}}
    teacher = denoiser()
    teacher.network.dropout.p = 0.5
    method = bound(points(), teacher.eval(), gan={"trunk": trunk, "own_model": own})
    x, modules = torch.randn(8, 2), (method.critic, method.discriminator)
    for module in modules:
        module.train()
    found = [method.generator_update(x, None, Clock()).metrics["gan"] for _ in range(2)]
    assert torch.equal(*found)
    assert all(module.training for module in modules)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_answer_of_the_trunk_that_is_no_number_never_reaches_the_weights(bad) -> None:
    method = bound(points(), gan={"trunk": "teacher", "weight": 1.0})
    method.teacher.network.hidden[0].register_forward_hook(lambda _m, given, out: out + torch.where(given[0][:, :1] > 0, bad, 0.0))
    update = of(method, "generator", batch_of(points()))
    assert update.loss.isfinite()
    assert 0 < update.metrics["broken"] < 1
    found = torch.autograd.grad(update.metrics["gan"], list(method.student.parameters()))
    assert all(g.isfinite().all() for g in found)
    assert any(g.any() for g in found)  # the other samples' gradient arrives


# ---- two time scales -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "expected"),
    [("official", ["generator", "critic", "critic", "critic", "generator", "critic"]), ("alternate", ["generator", "critic", "critic", "generator"])],
)
def test_the_order_of_updates(order, expected) -> None:
    method = bound(gan=NO_GAN, ratio=3, order=order)
    assert [u.player for step in range(4) for u in method.updates(empty(), Clock(step=step))] == expected


def test_the_critic_sees_the_samples_that_the_generator_had_before_its_step() -> None:
    method = bound(gan=NO_GAN)
    found = []
    for touch in (False, True):
        running = method.updates(empty(), Clock())
        next(running)
        if touch:
            with torch.no_grad():
                for p in method.student.parameters():
                    p.zero_()
        found.append(next(running).loss.item())
    assert found[0] == found[1]


def test_without_real_data_nothing_is_fetched() -> None:
    data = points()
    assert [p.data_free for p in bound(data).phases()] == [False]
    assert [p.data_free for p in bound(data, gan=NO_GAN).phases()] == [True]
    assert [p.data_free for p in bound(None).phases()] == [True]
    assert [p.data_free for p in bound(data, gan=NO_GAN, steps=4, inputs="real").phases()] == [False]
    assert "discriminator" not in vars(bound(None))


def test_one_optimiser_for_all_unless_said() -> None:
    players = bound(points(), gan={"trunk": "own", "optimiser": {"lr": 0.3}}, critic_optimiser={"lr": 0.2}).players()
    assert players["generator"] == Player(players["generator"].module)
    assert [players[name].optimiser.lr for name in ("critic", "discriminator")] == [0.2, 0.3]


# ---- several steps ---------------------------------------------------------------------------------------------------------


def test_four_steps_are_999_749_499_249() -> None:
    assert [round(1000 * t) for t in bound(teacher=denoiser("vp"), gan=NO_GAN, steps=4).generator.times] == [999, 749, 499, 249]
    assert bound(teacher=denoiser("vp"), gan=NO_GAN, times=[0.399]).generator.times == (0.399,)


def test_one_step_is_one_call_at_the_top() -> None:
    method, clock = bound(gan=NO_GAN), Clock(step=3)
    noise, cond = method.draw(8, clock)
    assert torch.equal(method.generate(empty(), clock)[0], method.generator(noise, cond))
    assert torch.equal(method.generator.simulate(0, noise), 80.0 * noise)


@pytest.mark.parametrize("schedule", ["edm", "vp"])
def test_inputs_are_simulated_by_the_generator_itself_with_one_k_for_all(schedule, monkeypatch) -> None:
    method = bound(teacher=denoiser(schedule), gan=NO_GAN, steps=4)
    seen = []
    call = method.generator.call
    monkeypatch.setattr(method.generator, "call", lambda x_t, k, cond: (seen.append((k, x_t)), call(x_t, k, cond))[1])
    for step in range(24):
        first, second = Clock(step=step), Clock(step=step, micro=1, rank=1)
        method.generate(empty(), first)
        method.generate(empty(), second)
        (k, x_t), (k_again, x_again) = seen[-2:]
        assert k == k_again  # over micro-batches and processes
        assert not torch.equal(x_t, x_again)
        assert not x_t.requires_grad  # nothing goes back through the earlier calls
        noise, _ = method.draw(8, first)
        draws, x = first.generator("renoise"), method.generator.start(noise)
        for now, after in zip(method.generator.times[:k], method.generator.times[1 : k + 1], strict=True):
            x0 = method.student(x, at(now, x)).detach()
            x = method.student.schedule.add_noise(x0, torch.randn(8, 2, generator=draws), at(after, x))
        torch.testing.assert_close(x_t, x)
    assert {k for k, _ in seen} == {0, 1, 2, 3}


def test_real_inputs_are_noised_data_with_their_labels() -> None:
    data, teacher = points(classes=2), denoiser(classes=2)
    method = bound(data, teacher, gan=NO_GAN, steps=3, inputs="real")
    batch = batch_of(data)
    for step in range(12):
        clock = Clock(step=step)
        noise, _ = method.draw(8, clock)
        x, cond = method.generate(batch, clock)
        assert torch.equal(cond, batch.targets)
        k = seeds.derive(0, 0, step, "k") % 3
        t = at(method.generator.times[k], noise)
        x_t = method.generator.start(noise) if k == 0 else batch.inputs + method.generator.times[k] * noise
        torch.testing.assert_close(x, teacher(x_t, t, cond))


# ---- pairs -----------------------------------------------------------------------------------------------------------------


def test_regression_is_added_on_pairs_that_the_teacher_makes_once(monkeypatch) -> None:
    method = bound(gan=NO_GAN, regression={"weight": 0.25, "pairs": 40, "steps": 4})
    update = of(method, "generator", empty())
    pairs = method.pairs
    assert len(pairs.noise) == 40
    of(method, "generator", empty())
    assert method.pairs is pairs  # made once
    z, y, _ = pairs.draw(8, Clock(steps=100).generator("pairs"))
    torch.testing.assert_close(update.metrics["regression"], (method.generator(z) - y).square().mean())
    torch.testing.assert_close(update.loss, update.metrics["matching"] + 0.25 * update.metrics["regression"])
    again = bound(gan=NO_GAN, regression={"weight": 0.25, "pairs": 40, "steps": 4})
    again.load_state_dict(method.state_dict())
    assert "pairs" not in method.state_dict()  # a restart makes the same ones anew
    of(again, "generator", empty())
    assert torch.equal(again.pairs.samples, pairs.samples)


def test_a_warm_up_is_regression_alone() -> None:
    method = bound(points(), regression={"warm_up": 5, "pairs": 8, "steps": 2})
    warm_up, main = method.phases()
    assert (warm_up.steps, tuple(warm_up.trains), warm_up.data_free, main.data_free) == (5, ("generator",), True, False)
    (update,) = method.updates(empty(), Clock(phase="warm_up"))
    assert update.player == "generator"
    assert [u.player for u in method.updates(batch_of(points()), Clock())] == ["generator", "critic"]
    assert "regression" not in of(method, "generator", batch_of(points())).metrics


# ---- health ----------------------------------------------------------------------------------------------------------------


class Broken(Denoiser):
    """A teacher that answers something else for some samples."""

    def __init__(self, inner: Denoiser, answer) -> None:
        super().__init__(inner.schedule, inner.shape, inner.num_classes)
        self.inner, self.answer = inner, answer

    def x0(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.answer(self.inner(x_t, t, cond), x_t)


def trained(method: DMD2, data: ArrayData, folder=None, **config) -> Trainer:
    settings = {"steps": 40, "batch_size": 32, "log_every": 10, "optimiser": ADAM, "clip_norm": 10.0} | config
    return Trainer(method, data, TrainConfig(**settings), folder=folder, cpu=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_directions_that_are_no_numbers_never_reach_the_weights(bad) -> None:
    method = bound(gan=NO_GAN, ratio=1)
    method.guided.denoiser = Broken(method.teacher, lambda x0, x_t: torch.where(x_t[:, :1] > 0, bad, x0 + 0.1))
    result = trained(method, points()).fit()
    assert all(p.isfinite().all() for p in method.student.parameters())
    assert any("NaN" in note for note in result.notes)
    rows = [row for row in result.rows if "generator/broken" in row]
    assert all(0 < row["generator/broken"] < 1 for row in rows)
    assert all(math.isfinite(row["generator/matching"]) for row in rows)


def test_samples_that_are_no_numbers_stop_the_run() -> None:
    method = bound(gan=NO_GAN, ratio=1)
    with torch.no_grad():
        method.student.network.head.bias[0] = math.nan
    with pytest.raises(TrainingError, match="generator/loss is not finite"):
        trained(method, points()).fit()


def test_one_sample_has_no_spread() -> None:
    method = bound(points(512), gan=NO_GAN)
    assert "spread" not in method.watched(torch.zeros(1, 2))
    assert method.watched(torch.tensor([[0.0, 0.0], [2.0, 2.0]]))["spread"] == pytest.approx(2**0.5)
    for spread in (math.nan, math.inf):  # not known, or not small: no collapse
        assert not method.notice({"generator/spread": 0.5})
        assert not method.notice({"generator/spread": spread, "progress": 0.9})
    assert method.notice({"generator/spread": 1e-3, "progress": 0.9})
    assert bound(points(1), gan=NO_GAN).expected_spread() is None


def test_a_collapse_is_told() -> None:
    data = points(512)
    method = DMD2(gan=NO_GAN, start="fresh", ratio=1).bind(student=Point(), teacher=denoiser(), train=data)
    method.guided.denoiser = Broken(method.teacher, lambda x0, x_t: torch.zeros_like(x0))  # a single point is all that it knows
    result = trained(method, data, steps=300, optimiser=OptimiserSpec(name="adam", lr=5e-3)).fit()
    assert any("collapsed" in note for note in result.notes)


def test_a_critic_that_diverges_is_told() -> None:
    data = points(512)
    method = DMD2(gan=NO_GAN, start="fresh", ratio=1, critic_optimiser=ADAM).bind(student=Point(), teacher=denoiser(), train=data)
    method.guided.denoiser = Broken(method.teacher, lambda x0, x_t: x_t + 100.0)  # ever further away, and faster than the critic follows
    result = trained(method, data, steps=100, optimiser=OptimiserSpec(name="sgd", lr=2.0)).fit()
    assert any("critic has diverged" in note for note in result.notes)


def test_a_discriminator_that_is_certain_is_told() -> None:
    method = bound(points())
    assert not [s for s in method.notice({"critic/logit_real": 3.0, "critic/logit_fake": -3.0}) if "certain" in s]
    assert [s for s in method.notice({"critic/logit_real": 5.0, "critic/logit_fake": -5.0}) if "certain" in s]


# ---- as a whole ------------------------------------------------------------------------------------------------------------


def test_it_learns() -> None:
    """A teacher of four Gaussians in one call: far from the data at first, near them after."""
    torch.manual_seed(0)
    data, real = points(4096), points(1000, seed=6).inputs
    network = MLPNetwork((2,), (64, 64))
    teacher = NetworkDenoiser(network, make_schedule("edm"), precondition="edm")
    cosine = OptimiserSpec(name="adam", lr=3e-3, schedule={"name": "cosine"})
    trained(Denoising().bind(student=teacher, train=data), data, steps=600, batch_size=256, optimiser=cosine).fit()
    method = DMD2(ratio=2).bind(student=copy.deepcopy(teacher), teacher=teacher, train=data)
    before = mmd2(real, method.inference().sample(1000, seed=1))
    result = trained(method, data, steps=500, batch_size=128, optimiser=OptimiserSpec(name="adam", lr=1e-3, betas=(0.0, 0.99))).fit()
    after = mmd2(real, method.inference().sample(1000, seed=1))
    assert after < 0.1 * before, (before, after)
    assert method.inference().calls == 1
    assert not result.notes, result.notes


class Stop(Exception):
    pass


class Stopping(DMD2):
    """Falls over in the middle of a batch, once."""

    at: int | None = None

    def after_step(self, player: str, clock: Clock) -> None:
        if self.at is not None and (clock.phase, clock.step, player) == ("train", self.at, "generator"):
            raise Stop


@pytest.mark.parametrize("trunk", ["critic", "own"])
def test_a_run_that_was_killed_ends_as_one_that_was_not(trunk, tmp_path) -> None:
    knobs = {"gan": {"trunk": trunk}, "regression": {"weight": 0.1, "warm_up": 3, "pairs": 20, "steps": 2}, "ratio": 2}
    found = []
    for name, stops in (("whole", [None]), ("killed", [4, 8, None])):
        for stop in stops:
            data, teacher = points(classes=2), denoiser(classes=2)
            method = Stopping(**knobs).bind(student=copy.deepcopy(teacher), teacher=teacher, train=data)
            method.at = stop
            trainer = trained(method, data, tmp_path / name, steps=12, checkpoint_steps=3, log_every=4, ema=0.9)
            if stop is None:
                trainer.fit()
            else:
                with pytest.raises(Stop):
                    trainer.fit()
        found.append({f"{who}.{k}": v for who, p in method.players().items() for k, v in p.module.state_dict().items()} | {"pairs": method.pairs.samples})
    whole, killed = found
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[key], killed[key]) for key in whole)
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "killed/metrics.jsonl").read_bytes()


def test_nothing_is_read_on_the_host_in_a_step() -> None:
    """Any `.item()`, `bool()` or `float()` of a tensor calls this."""

    def refused(self):
        raise AssertionError("a tensor is read on the host")

    data = points()
    methods = [bound(data, gan={"trunk": trunk}, steps=2) for trunk in ("critic", "teacher", "own")]
    for method in methods:
        list(method.updates(batch_of(data), Clock()))  # tables that are made once
    with pytest.MonkeyPatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
            patch.setattr(Tensor, name, refused)
        for method in methods:
            for step in (0, 1):
                list(method.updates(batch_of(data), Clock(step=step)))


# ---- wrong input -----------------------------------------------------------------------------------------------------------


def other(name: str, value: object) -> NetworkDenoiser:
    """A student of the teacher's network that takes its weights to mean something else."""
    found = denoiser()
    setattr(found, name, value)
    return found


def test_wrong_input_is_named() -> None:
    unlabelled = points(classes=2)
    unlabelled._targets = torch.full((64,), IGNORE)
    for said, make in {
        "2 times are given": lambda: DMD2(times=[0.9, 0.5]),
        "never trained": lambda: DMD2(order="alternate", ratio=1),
        "one step": lambda: DMD2(steps=2, regression={"weight": 0.25}),
        "no denoiser": lambda: DMD2().bind(student=Point(), teacher=nn.Identity()),
        "is no network": lambda: DMD2(start="fresh").bind(student=Point(), teacher=gaussian(0, 1)),
        "no times to train at": lambda: DMD2(start="fresh", times=[0.5]).bind(student=Point(), teacher=denoiser()),
        "needs training data": lambda: bound(None, steps=2, inputs="real"),
        "give themselves away": lambda: bound(unlabelled, denoiser(classes=2)),
        "another schedule than": lambda: bound(student=denoiser("vp")),
        "another sigma_data": lambda: bound(student=other("sigma_data", 1.0)),
        "another prediction": lambda: bound(student=other("prediction", "eps")),
        "another precondition": lambda: bound(student=other("precondition", "none")),
        "of 2 calls already": lambda: bound(student=Generator(denoiser(), (80.0, 1.0)), start="fresh", steps=4),
        "no classes": lambda: bound(gan=NO_GAN, guidance_scale=2.0),
        "no network": lambda: DMD2(start="fresh").bind(student=denoiser(), teacher=gaussian(0, 1)),
        "no tap": lambda: bound(points(), gan={"taps": ["middle"]}),
        "unknown field": lambda: DMD2(gan={"wieght": 1}),
    }.items():
        with pytest.raises(InputError, match=said):
            make()
    with pytest.raises(InputError) as error:
        DMD2(start="fresh").bind(student=denoiser(), teacher=gaussian(0, 1))
    assert error.value.where == "teacher.model"


def test_what_comes_out_is_the_generator_with_its_times() -> None:
    method = bound(points(), steps=4)
    artefact = method.artefact()
    assert (artefact.kind, artefact.module) == ("generator", method.generator)
    assert method.facts() == {"times": list(method.generator.times), "ratio": 5, "trunk": "critic", "real_data": True}
    assert bound(None).facts()["trunk"] is None
