"""The signal of a path: its step is DDIM's, exact paths are fixed points, a copied student meets the boundary, whatever the teacher predicts."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from limbeck.diffusion import samplers, signal
from limbeck.diffusion.denoisers import MixtureDenoiser, NetworkDenoiser
from limbeck.diffusion.networks import MLPNetwork, UNetNetwork
from limbeck.diffusion.schedules import SCHEDULES, NoiseSchedule, make_schedule
from limbeck.errors import InputError

SETTINGS = settings(deadline=None, max_examples=20)
SEEDS = st.integers(0, 2**31)
NAMES = sorted(SCHEDULES)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def times(seed: int, schedule: NoiseSchedule, count: int = 6) -> tuple[Tensor, Tensor]:
    """t and s < t, away from the ends, where dividing by α or σ loses digits (training never does)."""
    places = torch.rand(2, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.85 + 0.05
    high, low = places.max(0).values, places.min(0).values
    return signal.time_at(schedule, high), signal.time_at(schedule, low)


def gaussian(schedule: NoiseSchedule, mean: float = 0.7, std: float = 0.4) -> MixtureDenoiser:
    return MixtureDenoiser(schedule, torch.full((1, 2), mean), torch.tensor([std]))


def mixture(schedule: NoiseSchedule) -> MixtureDenoiser:
    return MixtureDenoiser(schedule, torch.tensor([[0.8, 0.0], [-0.5, 0.6], [0.0, -0.9]]), torch.tensor([0.1, 0.2, 0.15]))


# ---- the path -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@given(SEEDS)
@SETTINGS
def test_a_signal_step_is_ddims(name: str, seed: int) -> None:
    """(DDIM_s(x_t) − σ_s ε)/α_s = (1 − k) y_t + k f for any y, f, ε."""
    schedule = make_schedule(name)
    y, f, noise = (drawn(seed + i, 6, 3) for i in range(3))
    t, s = times(seed, schedule)
    x_t = signal.noisy(schedule, y, noise, t)
    x_s = samplers.ddim_step(schedule, x_t, f, t, s)
    k = signal.signal_rate(schedule, t, s)
    torch.testing.assert_close(signal.signal_of(schedule, x_s, noise, s), signal.signal_step(y, f, k), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(signal.path_step(schedule, x_t, f, t, s, "noisy"), x_s, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(signal.signal_of(schedule, x_t, noise, t), y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
@given(SEEDS)
@SETTINGS
def test_rates_stay_below_one_and_steps_compose(name: str, seed: int) -> None:
    schedule = make_schedule(name)
    y, f = drawn(seed, 6, 3), drawn(seed + 1, 6, 3)
    t, s = times(seed, schedule)
    r = signal.time_at(schedule, torch.zeros(6))
    k = signal.signal_rate(schedule, t, s)
    assert bool(((k >= 0) & (k < 1)).all())
    torch.testing.assert_close(k, 1 - schedule.level(s) / schedule.level(t))
    assert signal.signal_rate(schedule, t, t).abs().max() == 0
    assert torch.equal(signal.signal_step(y, f, signal.signal_rate(schedule, t, t)), y)
    torch.testing.assert_close(signal.log_level(schedule, t), -schedule.log_snr(t))
    there = signal.path_step(schedule, y, f, t, s)
    torch.testing.assert_close(signal.path_step(schedule, there, f, s, r), signal.path_step(schedule, y, f, t, r), rtol=1e-9, atol=1e-9)


def test_rates_of_the_flow_and_of_the_sheet() -> None:
    flow, cosine = make_schedule("flow"), make_schedule("cosine")
    t, s = torch.tensor([0.7, 0.999]), torch.tensor([0.66, 0.9])
    torch.testing.assert_close(signal.signal_rate(flow, t, s), (1 - s * (1 - t) / (t * (1 - s))).double())
    assert float(signal.signal_rate(cosine, torch.tensor([0.5]), torch.tensor([0.46]))) == pytest.approx(0.12, abs=0.005)
    assert float(signal.signal_rate(cosine, torch.tensor([0.999]), torch.tensor([0.959]))) == pytest.approx(0.98, abs=0.005)


@pytest.mark.parametrize("name", NAMES)
def test_an_exact_discrete_path_is_a_fixed_point(name: str) -> None:
    schedule = make_schedule(name)
    teacher, noise, grid = mixture(schedule), drawn(3, 5, 2), signal.time_at(schedule, torch.linspace(0.95, 0, 20))
    x, path = schedule.start(noise, grid[:1].expand(5)), []
    for now, after in itertools.pairwise([*grid, None]):
        t = now.expand(5)
        path.append((t, signal.signal_of(schedule, x, noise, t)))
        x = x if after is None else samplers.ddim_step(schedule, x, teacher(x, t), t, after.expand(5))
    for (t, y), (s, wanted) in itertools.pairwise(path):
        f = teacher(signal.noisy(schedule, y, noise, t), t)
        target = signal.bootstrap_target(teacher, schedule, y, f, noise, t, s)
        loss = signal.bootstrap_loss(wanted, target, signal.loss_weight(signal.signal_rate(schedule, t, s), 0.05))
        assert float(loss) < 1e-15
        assert float(signal.bootstrap_loss(wanted + 0.1, target, torch.ones(5))) == pytest.approx(0.01)


def walk(teacher: MixtureDenoiser, noise: Tensor, count: int, solver: signal.Solver = "euler") -> Tensor:
    """The signal at t_min, in `count` steps from what the boundary asks for at t_max."""
    schedule = teacher.schedule
    grid = [t.expand(len(noise)) for t in signal.time_at(schedule, torch.linspace(1, 0, count + 1, dtype=torch.float64))]
    y = teacher(schedule.start(noise, grid[0]), grid[0])
    for t, s in itertools.pairwise(grid):
        f = teacher(signal.noisy(schedule, y, noise, t), t)
        y = signal.bootstrap_target(teacher, schedule, y, f, noise, t, s, solver)
    return y


def test_gaussian_data_have_a_path_in_closed_form() -> None:
    """x_T = ε and α_T → 0: y_t = μ + ε (√(α²v + σ²) − σ)/α, from the mean at the top to μ + √v ε at 0."""
    schedule, mean, std = make_schedule("cosine"), 0.7, 0.4
    teacher, noise = gaussian(schedule, mean, std), drawn(4, 50, 2)

    def closed(t: Tensor) -> Tensor:
        alpha, sigma = schedule.alpha(t)[0], schedule.sigma(t)[0]
        return mean + noise * ((alpha**2 * std**2 + sigma**2).sqrt() - sigma) / alpha

    top, middle, bottom = (torch.full((50,), t, dtype=torch.float64) for t in (schedule.t_max, 0.6, schedule.t_min))
    assert (teacher(noise, top) - mean).abs().max() < 2e-3  # y_T = f(ε, T)
    assert (closed(torch.zeros(50)) - (mean + std * noise)).abs().max() < 1e-12
    assert (walk(teacher, noise, 3000) - closed(bottom)).square().mean().sqrt() < 1e-3
    y, later = closed(middle), middle - 1e-5
    moved = signal.path_step(schedule, y, teacher(signal.noisy(schedule, y, noise, middle), middle), middle, later)
    torch.testing.assert_close((moved - y) / 1e-5, (closed(later) - y) / 1e-5, rtol=1e-3, atol=1e-3)  # the signal-ODE


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_the_solvers(solver: signal.Solver, order: int) -> None:
    schedule = make_schedule("cosine", t_min=0.2, t_max=0.8)  # away from the ends, where α/σ is steep
    teacher, noise = gaussian(schedule), drawn(5, 40, 2)
    best = walk(teacher, noise, 512, "heun")
    coarse, fine = ((walk(teacher, noise, n, solver) - best).abs().mean() for n in (32, 64))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


def test_heun_takes_the_mean_of_both_ends() -> None:
    schedule, asked = make_schedule("cosine"), []
    y, noise, t, s = drawn(0, 2, 3), drawn(1, 2, 3), torch.full((2,), 0.6), torch.full((2,), 0.5)

    def predict(x: Tensor, time: Tensor) -> Tensor:
        asked.append((x, time))
        return torch.full_like(x, 3.0)

    found = signal.bootstrap_target(predict, schedule, y, torch.full_like(y, 1.0), noise, t, s, "heun")
    k = signal.signal_rate(schedule, t, s)
    torch.testing.assert_close(found, signal.signal_step(y, torch.full_like(y, 2.0), k))
    ((x, time),) = asked
    torch.testing.assert_close(x, schedule.add_noise(signal.signal_step(y, torch.full_like(y, 1.0), k), noise, s))
    assert torch.equal(time, s)


# ---- loss and times -------------------------------------------------------------------------------------------------------


def test_weights_are_capped_and_the_loss_is_a_mean() -> None:
    k = torch.tensor([0.001, 0.05, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(signal.loss_weight(k, 0.04, "inverse_k", 0.05), torch.tensor([400.0, 400.0, 4.0, 1.0], dtype=torch.float64))
    assert signal.loss_weight(k, 0.04, "inverse_delta").tolist() == pytest.approx([625.0] * 4)
    assert signal.loss_weight(k, 0.04, "unit").tolist() == [1.0] * 4
    g, target = torch.zeros(4, 1, 2, requires_grad=True), torch.ones(4, 1, 2, requires_grad=True)
    loss = signal.bootstrap_loss(g, target, torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert loss.item() == 3.0
    assert torch.autograd.grad(loss, [g, target], allow_unused=True)[1] is None
    assert torch.autograd.grad(signal.boundary_loss(g, target), [g, target], allow_unused=True)[1] is None


def test_residual_over_k_is_the_denoisers() -> None:
    y, f, g, k = drawn(0, 3, 2), drawn(1, 3, 2), drawn(2, 3, 2), torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    plain = ((g - y) / k[:, None] - (f - y)).square().mean()
    torch.testing.assert_close(signal.bootstrap_loss(g, signal.signal_step(y, f, k), signal.loss_weight(k, 1.0, "inverse_k")), plain)


@given(SEEDS, st.floats(0.01, 0.3), st.integers(0, 9))
@SETTINGS
def test_places_are_a_step_apart_and_the_first_end_at_the_bottom(seed: int, delta: float, ended: int) -> None:
    t, s = signal.draw_places(9, delta, ended, torch.Generator().manual_seed(seed))
    assert t.dtype == torch.float64
    torch.testing.assert_close(t - s, torch.full_like(t, delta))
    assert bool((s[:ended] == 0).all())
    assert bool((s[ended:] > 0).all())
    assert bool((t <= 1).all())


@pytest.mark.parametrize("name", NAMES)
def test_places_become_times(name: str) -> None:
    schedule = make_schedule(name)
    t = signal.time_at(schedule, torch.linspace(0, 1, 500, dtype=torch.float64))
    assert (float(t[0]), float(t[-1])) == (schedule.t_min, schedule.t_max)
    assert bool((t.diff() > 0).all())
    straight = torch.linspace(schedule.t_min, schedule.t_max, 500, dtype=torch.float64)
    assert ((t - straight).abs().max() < 1e-9) == (name != "edm")


def test_delta_anneals_geometrically() -> None:
    assert signal.annealed(0.04, None, 0.7) == 0.04
    assert [signal.annealed(0.04, 0.01, p) for p in (0, 0.5, 1)] == pytest.approx([0.04, 0.02, 0.01])


# ---- the student ----------------------------------------------------------------------------------------------------------

KINDS = [
    ("cosine", "x0", "none"), ("cosine", "eps", "none"), ("cosine", "v", "none"), ("cosine", "velocity", "none"), ("cosine", "x0", "edm"),
    ("vp", "eps", "none"), ("vp", "v", "none"), ("flow", "velocity", "none"), ("flow", "x0", "edm"), ("edm", "x0", "edm"),
    ("edm", "x0", "consistency"), ("edm", "eps", "none"), ("trig", "v", "none"), ("cosine", "score", "none"),
]  # fmt: skip


def denoiser(schedule: str, prediction: str = "x0", precondition: str = "none", classes: int = 3, seed: int = 0) -> NetworkDenoiser:
    torch.manual_seed(seed)
    network = MLPNetwork((2,), [16, 16], num_classes=classes, zero_output=False, embedding="positional" if precondition == "none" else "smooth")
    return NetworkDenoiser(network, make_schedule(schedule), prediction=prediction, precondition=precondition)  # type: ignore[arg-type]


@pytest.mark.parametrize(("schedule", "prediction", "precondition"), KINDS)
def test_a_copy_of_the_teacher_meets_the_boundary(schedule: str, prediction: str, precondition: str) -> None:
    teacher = denoiser(schedule, prediction, precondition)
    student, noise, cond = signal.SignalGenerator(denoiser(schedule, prediction, precondition, seed=1)), drawn(0, 7, 2).float(), torch.arange(7) % 4
    student.denoiser.load_state_dict(teacher.state_dict())
    top = torch.full((7,), teacher.schedule.t_max, dtype=torch.float64)
    f = teacher(student.start(noise), top, cond)
    assert signal.boundary_loss(student.signal(noise, top, cond), f).item() == 0
    lower = top / 2
    x = student.start(noise)  # of all that depends on time the network's own time alone moves
    raw = teacher.network(teacher.inputs(x, top)[0], teacher.inputs(x, lower)[1], cond)
    assert torch.equal(student.signal(noise, lower, cond), teacher.outputs(x, top, raw, "x0"))
    assert not torch.equal(student.signal(noise, lower, cond), f)


def test_an_x0_network_is_called_plainly() -> None:
    student, noise, t = signal.SignalGenerator(denoiser("cosine")), drawn(0, 4, 2).float(), torch.full((4,), 0.3, dtype=torch.float64)
    assert torch.equal(student.signal(noise, t), student.denoiser.network(noise, 1000 * t.float(), None))
    assert torch.equal(student(noise), student.denoiser.network(noise, torch.full((4,), 1.0), None))  # t_min = 0.001
    assert student.calls == 1


@pytest.mark.parametrize(
    ("kind", "wanted"), [(("cosine", "x0", "none"), 1.0), (("cosine", "eps", "none"), 636.6), (("cosine", "v", "none"), 1.0), (("edm", "x0", "edm"), 0.5)]
)
def test_how_much_the_networks_errors_are_magnified(kind: tuple[str, str, str], wanted: float) -> None:
    assert signal.SignalGenerator(denoiser(*kind)).magnification == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("network", ["mlp", "unet"])
def test_a_scale_embedding_of_zeros_changes_nothing_and_learns(network: str) -> None:
    if network == "mlp":
        inner = denoiser("cosine")
    else:
        inner = NetworkDenoiser(UNetNetwork((1, 8, 8), width=8, num_classes=3, zero_output=False), make_schedule("cosine"))
    plain, told = signal.SignalGenerator(inner), signal.SignalGenerator(inner, guidance_range=(1, 4), guidance_scale=2)
    noise, cond = drawn(0, 5, *inner.shape).float(), torch.arange(5) % 3
    t, scale = torch.full((5,), 0.4, dtype=torch.float64), torch.linspace(1, 4, 5, dtype=torch.float64)
    assert torch.equal(plain.signal(noise, t, cond), told.signal(noise, t, cond, scale))
    told.signal(noise, t, cond, scale).square().sum().backward()
    assert told.guidance is not None
    assert told.guidance.project.weight.grad.abs().max() > 0
    torch.nn.init.normal_(told.guidance.project.weight, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(plain.signal(noise, t, cond), told.signal(noise, t, cond, scale))
    assert torch.equal(plain.signal(noise, t, cond), inner.network(noise, 1000 * t.float(), cond))  # the hook is gone
    assert torch.equal(told(noise, cond), told.signal(noise, torch.full_like(t, 0.001), cond, torch.full_like(t, 2)))
    assert torch.equal(told.with_guidance(3)(noise, cond), told.signal(noise, torch.full_like(t, 0.001), cond, torch.full_like(t, 3)))


def test_what_a_generator_refuses() -> None:
    inner = denoiser("cosine")
    with pytest.raises(InputError, match="rise"):
        signal.SignalGenerator(inner, guidance_range=(4, 1))
    with pytest.raises(InputError, match="not within 1 and 4"):
        signal.SignalGenerator(inner, guidance_range=(1, 4), guidance_scale=5)
    with pytest.raises(InputError, match="not within 1 and 4"):
        signal.SignalGenerator(inner, guidance_range=(1, 4)).with_guidance(0)
    with pytest.raises(InputError, match="one guidance scale"):
        signal.SignalGenerator(inner).with_guidance(2)
    with pytest.raises(InputError, match="space"):
        signal.SignalGenerator(inner, space="else")  # type: ignore[arg-type]
    bare = NetworkDenoiser(nn.Identity(), make_schedule("cosine"), shape=(2,), num_classes=0)
    with pytest.raises(InputError, match="no time embedding"):
        signal.SignalGenerator(bare, guidance_range=(1, 4))
    assert signal.SignalGenerator(bare).calls == 1
    with pytest.raises(InputError, match="no component"):
        signal.signal_generator({"names": "x"}, 0, (2,))
    with pytest.raises(InputError, match="no network"):
        signal.signal_generator({"name": "mixture_denoiser", "means": [[0.0, 0.0]], "std": 1.0}, 0, (2,))


def test_a_generator_is_built_again_from_its_arguments() -> None:
    args = {"name": "mlp_denoiser", "args": {"widths": [8], "schedule": "cosine", "precondition": "none"}}
    first = signal.signal_generator(args, 3, (2,), guidance_range=(1, 4), guidance_scale=2, scale={"mean": [1.0], "std": [2.0]})
    for parameter in first.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    again = signal.signal_generator(args, 3, (2,), **first.arguments)
    again.load_state_dict(first.state_dict())
    assert torch.equal(first.sample(6, seed=3), again.sample(6, seed=3))
    assert again.arguments == first.arguments
