"""f-distill: DMD2 where h is 1, weights that are the sheet's, who is trained when on what, restarts, an analytic teacher."""

import copy
import math

import pytest
import torch
from torch import Tensor

from limbeck.claims.studies.f_distill import KnownModes, exact_grid_denoiser, grid_corner
from limbeck.contract import IGNORE, Batch, Clock
from limbeck.data.arrays import ArrayData
from limbeck.data.points import gaussian_grid, network_mixture_of
from limbeck.diffusion.build import mixture_denoiser, mlp_denoiser, unet_denoiser
from limbeck.diffusion.discriminator import generator_loss
from limbeck.diffusion.distribution import inject, normal, score_direction
from limbeck.diffusion.f_divergences import DIVERGENCES
from limbeck.diffusion.ratio import density_ratio, noise_bins
from limbeck.diffusion.schedules import EDM
from limbeck.errors import InputError
from limbeck.evaluate.samples import energy_distance
from limbeck.methods.generators.f_distill import FDistill
from limbeck.train.config import TrainConfig
from limbeck.train.trainer import Trainer

B = 24
MIXTURE = {"means": [[-0.5, 0.0], [0.5, 0.0], [0.0, 0.6]], "std": 0.1, "weights": [3.0, 2.0, 1.0]}


def network(seed: int, num_classes: int = 0, schedule: str = "edm", widths: tuple[int, ...] = (12, 12)):
    """A denoiser whose output is not 0."""
    torch.manual_seed(seed)
    found = mlp_denoiser((2,), num_classes, widths=widths, schedule=schedule)
    for p in found.parameters():
        p.data += 0.2 * torch.randn(p.shape)
    return found


def bound(num_classes: int = 0, schedule: str = "edm", teacher=None, **knobs) -> FDistill:
    knobs = {"start": "fresh", "taps": ("hidden1", "bottleneck")} | knobs
    method = FDistill(**knobs)
    method.bind(student=network(1, num_classes, schedule), teacher=teacher or network(0, num_classes, schedule), seed=3)
    if method.critic is not None:  # else the first direction is 0
        for p in method.critic.parameters():
            p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(7))
    return method


def batch(count: int = B, num_classes: int = 0) -> Batch:
    draw = torch.Generator().manual_seed(11)
    return Batch(torch.randn(count, 2, generator=draw), torch.arange(count) % num_classes if num_classes else None, torch.arange(count))


def step(method: FDistill, at: int, num_classes: int = 0, of: int = 100):
    clock = Clock(seed=5, step=at, steps=of)
    return list(method.updates(batch(num_classes=num_classes), clock)), clock


def replayed(method: FDistill, clock: Clock) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """x, cond, t, noise, x_t of the generator's update at this clock."""
    noise, cond = method.draw(B, clock)
    x, draw = method.generator(noise, cond), clock.generator("generator")
    t = method.config.levels.sample(method.schedule, B, draw)
    eps = normal(B, method.generator.shape, draw)
    return x, cond, t, eps, method.schedule.add_noise(x, eps, t)


def gradients(loss: Tensor, module: torch.nn.Module) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, list(module.parameters()), retain_graph=True, allow_unused=True))


# ---- the generator's loss ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("discriminator", ["teacher", "critic", "own"])
@pytest.mark.parametrize(("classes", "kappa"), [(0, 1.0), (3, 1.0), (3, 2.0)])
@pytest.mark.parametrize("knobs", [{"divergence": "reverse_kl"}, {"divergence": "forward_kl", "warmup": 1.0}])
def test_reverse_kl_and_warming_up_are_dmd2(discriminator, classes, kappa, knobs) -> None:
    method = bound(classes, guidance_scale=kappa, adversarial_weight=0.7, discriminator=discriminator, **knobs)
    (update,), clock = step(method, 0, classes)
    x, cond, t, noise, x_t = replayed(method, clock)
    direction = score_direction(x, method.guided, method.critic, t, noise, cond)
    expected = inject(x, direction.g) + 0.7 * generator_loss(method.discriminator(x_t, t, cond))
    torch.testing.assert_close(update.loss, expected, rtol=1e-6, atol=0)
    for ours, theirs in zip(gradients(update.loss, method.student), gradients(expected, method.student), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("schedule", ["edm", "flow"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_weights_are_those_of_the_sheet_at_the_very_x_t(divergence, schedule) -> None:
    method = bound(schedule=schedule, divergence=divergence, adversarial_weight=0.3)
    method.discriminator.heads.heads["bottleneck"].layers[2].weight.data *= 20
    (update,), clock = step(method, 0)
    x, cond, t, noise, x_t = replayed(method, clock)
    logits = method.discriminator(x_t, t, cond)
    r = density_ratio(logits).value
    bins = noise_bins(method.schedule, t, 10)
    tilde = r / (torch.stack([r[bins == b].mean() for b in bins]) + 1e-6)
    h = DIVERGENCES[divergence].h(tilde)
    h = h / (h.mean() + 1e-6)
    g = score_direction(x, method.guided, method.critic, t, noise, cond, factor=h).g
    torch.testing.assert_close(update.loss, inject(x, g) + 0.3 * generator_loss(logits), rtol=1e-5, atol=0)
    if divergence not in ("reverse_kl",):
        assert float(h.detach().std()) > 0.01  # there was something to see
        torch.testing.assert_close(update.metrics["weight_max"], h.max(), rtol=1e-4, atol=0)
        torch.testing.assert_close(update.metrics["weight_mean"], torch.tensor(1.0), rtol=1e-5, atol=0)


def test_equal_ratios_make_every_divergence_the_reverse_kl() -> None:
    losses = []
    for divergence in DIVERGENCES:
        method = bound(divergence=divergence, adversarial_weight=0.0 if divergence == "reverse_kl" else 1e-30)
        if method.discriminator is not None:
            for p in method.discriminator.parameters():
                torch.nn.init.zeros_(p)
        losses.append(step(method, 0)[0][0].loss)
    torch.testing.assert_close(torch.stack(losses), losses[0].expand(len(losses)), rtol=1e-4, atol=0)


def test_nobody_but_the_generator_gets_a_gradient_from_its_loss() -> None:
    for discriminator in ("teacher", "critic", "own"):
        method = bound(discriminator=discriminator, adversarial_weight=1.0, divergence="jeffreys")
        (update,), _ = step(method, 0)
        update.loss.backward()
        assert all(p.grad is not None for p in method.student.parameters())
        for other in (method.teacher, method.critic, method.discriminator):
            assert all(p.grad is None and p.requires_grad for p in other.parameters())


def test_the_adversarial_term_alone() -> None:
    method = bound(matching_weight=0.0, adversarial_weight=0.5)
    assert set(method.players()) == {"generator", "discriminator"}
    (update,), clock = step(method, 0)
    _, cond, t, _, x_t = replayed(method, clock)
    torch.testing.assert_close(update.loss, 0.5 * generator_loss(method.discriminator(x_t, t, cond)))
    assert [u.player for u in step(method, 1)[0]] == ["discriminator"]


def test_a_broken_direction_is_left_out() -> None:
    method = bound(adversarial_weight=0.0)
    method.critic.network.head.bias.data[0] = math.nan
    (update,), _ = step(method, 0)
    assert update.metrics["broken"] == 1
    assert float(update.loss.detach()) == 0


@pytest.mark.parametrize("discriminator", ["teacher", "critic", "own"])
def test_a_critic_equal_to_the_teacher_gives_nothing_in_training_with_dropout(discriminator) -> None:
    teacher = network(0)
    teacher.network.dropout.p = 0.5
    method = bound(teacher=teacher.eval(), discriminator=discriminator, adversarial_weight=0.0)
    method.critic.load_state_dict(teacher.state_dict())
    for player in method.players().values():
        player.module.train()
    (update,), _ = step(method, 0)
    assert update.metrics["direction"] == 0
    assert method.critic.network.dropout.training


def test_ratios_alone_make_no_graph() -> None:
    traced = []
    for weight in (0.0, 1e-3):
        method = bound(adversarial_weight=weight)
        method.teacher.network.hidden[0].register_forward_hook(lambda _m, _i, out: traced.append(out.requires_grad))
        (update,), _ = step(method, 0)
        assert ("adversarial" in update.metrics) == bool(weight)
    assert traced == [False, True]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_broken_answer_of_the_teacher_spoils_nothing(bad) -> None:
    method = bound(divergence="forward_kl", adversarial_weight=1.0)
    method.teacher.network.hidden[0].register_forward_hook(lambda _m, given, out: out + torch.where(given[0][:, :1] > 1, bad, 0.0))
    (update,), _ = step(method, 0)
    assert 0 < update.metrics["broken"] < 1
    assert all(value.isfinite().all() for value in (update.loss, *update.metrics.values(), method.ratio_weights.bins.means_N))
    for loss in (update.loss, update.metrics["adversarial"]):
        found = gradients(loss, method.student)
        assert all(g.isfinite().all() for g in found)
        assert any(g.any() for g in found)  # the other samples' gradient arrives


def test_weights_of_several_processes_refuse_batches_in_parts() -> None:
    second = Clock(micro=1, world=2)
    with pytest.raises(InputError, match="cut into parts"):
        list(bound().updates(batch(), second))
    for knobs in ({"normalise": "none"}, {"divergence": "reverse_kl"}):  # nothing is summed
        assert len(list(bound(**knobs).updates(batch(), second))) == 1


def test_samples_that_are_no_numbers_are_not_hidden() -> None:
    method = bound(matching_weight=0.0, adversarial_weight=1.0)
    method.student.network.head.bias.data[0] = math.nan
    assert step(method, 0)[0][0].loss.isnan()


# ---- critic and discriminator ----------------------------------------------------------------------------------------------


def test_who_is_trained_when() -> None:
    method = bound(ratio=3)
    found = [[u.player for u in step(method, i)[0]] for i in range(7)]
    others = ["critic", "discriminator"]
    assert found == [["generator"], others, others, ["generator"], others, others, ["generator"]]
    assert set(method.players()) == {"generator", "critic", "discriminator"}
    assert not next(iter(method.phases())).data_free


def test_plain_reverse_kl_needs_no_discriminator_and_no_data() -> None:
    method = bound(divergence="reverse_kl", adversarial_weight=0.0)
    assert set(method.players()) == {"generator", "critic"}
    assert next(iter(method.phases())).data_free
    blank = Batch(torch.empty(B, 0), None, torch.arange(B))
    assert [u.player for u in method.updates(blank, Clock(step=1))] == ["critic"]


@pytest.mark.parametrize("discriminator", ["teacher", "critic", "own"])
def test_gradients_of_critic_and_discriminator_stay_with_them(discriminator) -> None:
    method = bound(discriminator=discriminator)
    critic, judge = step(method, 1)[0]
    assert all(g is not None for g in gradients(critic.loss, method.critic))
    critic.loss.backward(retain_graph=True)
    judge.loss.backward()
    assert all(p.grad is None for p in (*method.student.parameters(), *method.teacher.parameters()))
    assert all(p.grad is not None for p in method.discriminator.heads.parameters())
    if discriminator == "own":
        assert method.discriminator.trunk.network.hidden[0].weight.grad is not None


def test_the_critics_trunk_may_learn_from_the_discriminators_loss() -> None:
    plain, joint = bound(discriminator="critic"), bound(discriminator="critic", trunk_weight=0.01)
    (critic, judge), (critic_too, judge_too) = step(plain, 1)[0], step(joint, 1)[0]
    torch.testing.assert_close(judge.loss, judge_too.loss)
    torch.testing.assert_close(critic_too.loss, critic.loss + 0.01 * judge.loss)
    judge_too.loss.backward(retain_graph=True)
    assert all(p.grad is None for p in joint.critic.parameters())  # the heads' own step leaves the trunk alone
    heads = [p.grad.clone() for p in joint.discriminator.parameters()]
    critic_too.loss.backward()
    assert all(p.grad is not None for p in joint.critic.parameters())
    for before_it, p in zip(heads, joint.discriminator.parameters(), strict=True):
        assert torch.equal(before_it, p.grad)  # nor does the critic's step touch the heads
    before = gradients(critic.loss, plain.critic)[0]
    assert not torch.allclose(before, next(iter(joint.critic.parameters())).grad)


def test_r1_is_added_with_its_weight() -> None:
    plain, one, ten = (step(bound(r1_weight=w), 1)[0][1].loss for w in (0.0, 1.0, 10.0))
    assert one > plain
    torch.testing.assert_close((ten - plain), 10 * (one - plain), rtol=1e-3, atol=1e-7)


def test_real_samples_are_judged_with_their_own_labels() -> None:
    seen = []
    method = bound(3)
    inner = method.discriminator.features
    method.discriminator.features = lambda x, t, cond=None: seen.append(cond) or inner(x, t, cond)
    labelled = Batch(torch.randn(4, 2), torch.tensor([2, 1, 0, 1]), torch.arange(4))
    list(method.updates(labelled, Clock(step=1)))
    assert seen[0][4:].tolist() == [2, 1, 0, 1]


def test_fake_and_real_get_times_of_their_own() -> None:
    seen = []
    method = bound(r1_weight=1.0)
    inner = method.discriminator.features
    method.discriminator.features = lambda x, t, cond=None: seen.append(t) or inner(x, t, cond)
    step(method, 1)
    fake, real, moved = seen[0].chunk(3)
    assert not torch.equal(fake, real)
    assert torch.equal(real, moved)


def test_several_calls_are_trained_one_at_a_time_on_simulated_inputs() -> None:
    method = bound(steps=3)
    assert method.generator.calls == 3
    used, inner = [], method.generator.call
    method.generator.call = lambda x, k, cond=None: used.append((k, float(x.std()))) or inner(x, k, cond)
    for i in range(40):
        method.generated(B, Clock(seed=1, step=i))
    assert {k for k, _ in used} == {0, 1, 2}
    assert all(spread < 30 for k, spread in used if k)  # only the first call is given noise of 80
    (update,), _ = step(method, 0)
    update.loss.backward()
    assert all(p.grad is not None for p in method.student.parameters())


# ---- an analytic teacher, whole runs ---------------------------------------------------------------------------------------


def test_without_a_network_in_the_teacher_critic_and_discriminator_are_asked_for() -> None:
    exact = mixture_denoiser(**MIXTURE)
    with pytest.raises(InputError, match="no network"):
        bound(teacher=exact)
    with pytest.raises(InputError, match="own"):
        bound(teacher=exact, critic="student")
    method = bound(teacher=exact, critic="student", discriminator="own", taps=("bottleneck",))
    assert [u.player for u in step(method, 1)[0]] == ["critic", "discriminator"]
    fresh = FDistill(start="fresh", critic="student", discriminator="own").bind(student=network(1), teacher=exact)
    for ours, theirs in zip(fresh.critic.parameters(), fresh.student.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours is not theirs


def trained(folder, steps: int, **knobs):
    """On one Gaussian, N(0, 0.3²), whose denoiser is exact."""
    splits = gaussian_grid(side=1, std=0.3, count=400, test=100, scale=None)
    settings = {"start": "fresh", "critic": "student", "discriminator": "own", "divergence": "forward_kl", "bin_decay": 0.5, "ratio": 3}
    method = FDistill(**settings | knobs)
    method.bind(student=network(1, widths=(24, 24)), teacher=mixture_denoiser([[0.0, 0.0]], 0.3), train=splits.train, seed=0)
    config = TrainConfig(
        steps=steps, batch_size=64, optimiser={"name": "adam", "lr": 4e-3, "schedule": {"name": "cosine"}}, ema=0.9, checkpoint_steps=20, log_every=20
    )
    return method, Trainer(method, splits.train, config, seed=0, folder=folder, cpu=True)


def test_a_small_run_reaches_the_teachers_distribution() -> None:
    method, trainer = trained(None, 800)
    before = method.generator.sample(2000, seed=1)
    found = trainer.fit()
    x = method.generator.sample(2000, seed=1)
    real = 0.3 * torch.randn(2000, 2, generator=torch.Generator().manual_seed(5))
    assert energy_distance(real, x) < 0.1 * energy_distance(real, before)
    assert x.mean(0).tolist() == pytest.approx([0.0, 0.0], abs=0.1)
    assert x.std(0).tolist() == pytest.approx([0.3, 0.3], abs=0.15)
    metrics = method.facts()["metrics"]
    assert set(metrics) == {"clipped", "weight_cv", "direction_cv"}
    assert 0 <= metrics["clipped"] < 0.5
    assert metrics["weight_cv"] > 0
    last = [row for row in found.rows if "generator/weight_mean" in row][-1]
    assert last["generator/weight_mean"] == pytest.approx(1, abs=1e-4)


def test_a_restart_goes_on_bit_for_bit(tmp_path) -> None:
    whole, trainer = trained(tmp_path / "whole", 40)
    trainer.fit()
    _, trainer = trained(tmp_path / "cut", 40)
    trainer.fit()
    again, trainer = trained(tmp_path / "cut", 40)
    trainer.resume_from = "step-20"
    trainer.fit()
    for a, b in zip(whole.student.state_dict().values(), again.student.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(whole.ratio_weights.bins.means_N, again.ratio_weights.bins.means_N)
    assert not torch.equal(whole.ratio_weights.bins.means_N, torch.ones(10))
    assert whole.facts() == again.facts()


def test_state_goes_round() -> None:
    one, other = bound(divergence="forward_kl", bin_decay=0.9), bound(divergence="forward_kl", bin_decay=0.9)
    step(one, 0)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    torch.testing.assert_close(step(one, 5)[0][0].loss, step(other, 5)[0][0].loss, rtol=0, atol=0)
    with pytest.raises(InputError, match="bins"):
        bound(bins=3).load_state_dict(one.state_dict())


def test_images_and_the_teachers_start() -> None:
    torch.manual_seed(0)
    teacher = unet_denoiser((1, 8, 8), 4, width=4)
    method = FDistill(taps=("down1", "bottleneck"), guidance_scale=1.5).bind(student=unet_denoiser((1, 8, 8), 4, width=4), teacher=teacher)
    for ours, theirs in zip(method.student.parameters(), teacher.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    images = Batch(torch.randn(6, 1, 8, 8), torch.arange(6) % 4, torch.arange(6))
    (update,) = method.updates(images, Clock())
    assert [u.player for u in method.updates(images, Clock(step=1))] == ["critic", "discriminator"]
    assert update.loss.isfinite()


# ---- what is said ----------------------------------------------------------------------------------------------------------


def test_saturated_ratios_are_told() -> None:
    method = bound()
    assert not method.notice({"generator/clipped": 0.5})
    assert "reverse KL" in " ".join(method.notice({"generator/clipped": 0.95}))
    assert method.facts() == {"divergence": "jensen_shannon", "metrics": {}}
    for p in method.discriminator.parameters():
        torch.nn.init.zeros_(p)
    method.discriminator.heads.heads["bottleneck"].layers[2].bias.data += 50
    method.discriminator.heads.heads["hidden1"].layers[2].bias.data += 50
    (update,), _ = step(method, 0)
    assert update.metrics["clipped"] == 1
    assert method.facts()["metrics"]["clipped"] == 1


def test_wrong_input_is_named() -> None:
    with pytest.raises(InputError, match="weights are 0"):
        bound(matching_weight=0.0, adversarial_weight=0.0)
    with pytest.raises(InputError, match="guidance"):
        bound(guidance_scale=2.0)
    with pytest.raises(InputError, match="critic"):
        bound(matching_weight=0.0, discriminator="critic")
    with pytest.raises(InputError, match="another schedule"):
        bound(teacher=mixture_denoiser(**MIXTURE, schedule="flow"), critic="student", discriminator="own", taps=("bottleneck",))
    for targets in (None, torch.full((8,), IGNORE)):
        data = ArrayData(torch.zeros(8, 2), targets, ["a", "b", "c"])
        with pytest.raises(InputError, match="give themselves away"):
            FDistill(start="fresh").bind(student=network(1, 3), teacher=network(0, 3), train=data)
    with pytest.raises(InputError, match="hidden7"):
        bound(taps=("hidden7",))
    for knobs in ({"divergence": "total_variation"}, {"ratio": 1}, {"bin_decay": 1.0}, {"ratio_low": 2.0}, {"bin_axis": "sigma"}):
        with pytest.raises(InputError, match=next(iter(knobs))):
            FDistill(**knobs)


def test_times_are_the_published_part_of_the_list() -> None:
    t = FDistill().config.levels.sample(EDM(), 5000, torch.Generator().manual_seed(0))
    grid = EDM().grid(1000)
    assert t.min() >= grid[2]
    assert t.max() <= grid[998]


# ---- what the claim trains on ----------------------------------------------------------------------------------------------

GRID = {"side": 3, "spacing": 1.0, "std": 0.1, "weights_ratio": 4.0, "count": 2000, "test": 500}


def test_the_claims_teacher_is_exact_in_network_units() -> None:
    teacher = exact_grid_denoiser(GRID)
    law = network_mixture_of(gaussian_grid(**GRID).train)
    x = law.means_KD.float()
    t = torch.full((9,), 1e-3, dtype=torch.float64)
    torch.testing.assert_close(teacher(x, t), x, atol=1e-4, rtol=0)
    far = teacher(torch.zeros(1, 2), torch.tensor([500.0], dtype=torch.float64))[0]
    torch.testing.assert_close(far, (law.weights_K @ law.means_KD).float(), atol=2e-3, rtol=0)
    assert (law.weights_K.max() / law.weights_K.min()).item() == pytest.approx(4)
    torch.testing.assert_close(teacher.log_weights.exp(), law.weights_K)


def test_a_corner_has_the_chosen_gaussians_in_the_units_of_the_whole() -> None:
    whole, corner = gaussian_grid(**GRID), grid_corner(GRID, [0, 1, 3])
    law = network_mixture_of(corner.train)
    expected = network_mixture_of(whole.train).means_KD[[0, 1, 3]]
    torch.testing.assert_close(law.means_KD, expected)
    assert float(law.weights_K.sum()) == pytest.approx(1)
    for part in (corner.train, corner.test):
        x = part.prepare(part.fetch(torch.arange(len(part)))[0]).double()
        assert torch.cdist(x, expected).min(1).values.max() < 6 * law.std
    assert len(corner.train) < len(whole.train)
    for modes in ([], [9]):
        with pytest.raises(InputError, match="modes"):
            grid_corner(GRID, modes)


def test_the_first_fit_learns_both_trades() -> None:
    corner = grid_corner(GRID, [0, 1, 3])
    method = KnownModes(pairs=256).bind(student=network(1, widths=(24, 24)), train=corner.train, seed=0)
    assert torch.cdist(method.target.double(), network_mixture_of(corner.train).means_KD).min(1).values.mean() < 0.12  # its samples are of the corner
    optimiser = torch.optim.Adam(method.student.parameters(), 5e-3)
    x = corner.train.prepare(corner.train.fetch(torch.arange(64))[0])
    losses = []
    for i in range(60):
        (update,) = method.updates(Batch(x), Clock(step=i))
        optimiser.zero_grad()
        update.loss.backward()
        optimiser.step()
        losses.append(update.loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
