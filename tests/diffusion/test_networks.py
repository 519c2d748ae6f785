"""The two networks of the diffusion methods, without any schedule: shapes, taps, conditions, starts, gradients."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from limbeck.diffusion.networks import AttentionBlock, DenoisingNetwork, MLPNetwork, ResidualBlock, TimeFeatures, UNetNetwork
from limbeck.errors import InputError
from limbeck.models.fresh import reinitialise

MAKERS: dict[str, Callable[[], DenoisingNetwork]] = {
    "mlp": lambda: MLPNetwork((2,), (12, 16, 10), num_classes=3, zero_output=False),
    "mlp, residual, of images": lambda: MLPNetwork((1, 4, 4), (16, 16), num_classes=3, residual=True, embedding="fourier", zero_output=False),
    "unet": lambda: UNetNetwork((1, 7, 7), width=8, num_classes=3, zero_output=False),
    "unet, deep": lambda: UNetNetwork((3, 9, 6), width=4, multipliers=(1, 2, 3), blocks=2, num_classes=3, attention=[5, 3], zero_output=False),
    "unet without attention": lambda: UNetNetwork((1, 6, 6), width=8, num_classes=3, attention=[], embedding="positional", zero_output=False),
}
SMALL = settings(max_examples=15, deadline=None)


@pytest.fixture(params=MAKERS)
def network(request: pytest.FixtureRequest) -> DenoisingNetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MAKERS[request.param]()


def inputs(network: DenoisingNetwork, count: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x, time = torch.randn(count, *network.shape, generator=draw), 2 * torch.rand(count, generator=draw) - 1
    return x, time, torch.randint(max(1, network.num_classes), (count,), generator=draw)


@contextmanager
def calls(network: nn.Module) -> Iterator[list[str]]:
    """The names of the submodules as they run."""
    ran: list[str] = []
    hooks = [part.register_forward_hook(lambda *_, name=name: ran.append(name)) for name, part in network.named_modules() if name]
    try:
        yield ran
    finally:
        for hook in hooks:
            hook.remove()


# Shapes


@SMALL
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.integers(0, 3),
    st.integers(1, 4),
    st.booleans(),
)
def test_mlp_keeps_the_shape_of_its_inputs(shape: list[int], widths: list[int], classes: int, count: int, residual: bool) -> None:
    network = MLPNetwork(shape, widths, num_classes=classes, residual=residual, zero_output=False)
    x, time, cond = inputs(network, count)
    out, features = network.forward_with(x, time, cond if classes else None, list(network.taps))
    assert out.shape == x.shape
    assert {name: tuple(value.shape) for name, value in features.items()} == {name: (count, width) for name, width in network.taps.items()}


@SMALL
@given(
    st.integers(1, 3),
    st.integers(4, 17),
    st.integers(4, 17),
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
    st.integers(1, 2),
    st.integers(1, 7),
    st.integers(0, 2),
)
def test_unet_keeps_the_shape_of_its_inputs(colours: int, height: int, width: int, multipliers: list[int], blocks: int, channels: int, classes: int) -> None:
    network = UNetNetwork((colours, height, width), width=channels, multipliers=multipliers, blocks=blocks, num_classes=classes, zero_output=False)
    x, time, cond = inputs(network, 2)
    out, features = network.forward_with(x, time, cond if classes else None, list(network.taps))
    assert out.shape == x.shape
    assert {name: value.shape[1] for name, value in features.items()} == network.taps
    sides = [(-(-height // 2**level), -(-width // 2**level)) for level in range(len(multipliers))]
    for level, side in enumerate(sides, 1):
        assert features[f"down{level}"].shape[2:] == side
        assert features[f"up{len(sides) + 1 - level}"].shape[2:] == side
    assert features["bottleneck"].shape[2:] == sides[-1]


@pytest.mark.parametrize("shape", [(1, 28, 28), (1, 14, 14), (3, 32, 32), (1, 8, 8)])
def test_unet_takes_the_sizes_of_our_data(shape: tuple[int, int, int]) -> None:
    network = UNetNetwork(shape, width=8, zero_output=False)
    x, time, _ = inputs(network, 2)
    assert network(x, time).shape == x.shape
    assert network.features(x, time, None, ["bottleneck"])["bottleneck"].shape == (2, 16, shape[1] // 2, shape[2] // 2)


def test_samples_do_not_see_one_another(network: DenoisingNetwork) -> None:
    x, time, cond = inputs(network)
    together = network(x, time, cond)
    for i in range(len(x)):
        torch.testing.assert_close(network(x[i : i + 1], time[i : i + 1], cond[i : i + 1])[0], together[i], rtol=1e-4, atol=1e-5)


def test_times_may_be_float64_or_one_for_all(network: DenoisingNetwork) -> None:
    x, time, cond = inputs(network)
    out = network(x, time, cond)
    assert out.dtype == torch.float32
    assert torch.equal(network(x, time.double(), cond), out)
    alike = network(x, torch.full((len(x),), 0.3), cond)
    torch.testing.assert_close(network(x, torch.tensor(0.3, dtype=torch.float64), cond), alike)
    torch.testing.assert_close(network(x, torch.tensor(0.3)), network(x, torch.full((len(x),), 0.3)))


# Taps


def test_taps_are_those_of_the_whole_pass_bit_for_bit(network: DenoisingNetwork) -> None:
    x, time, cond = inputs(network)
    names = list(network.taps)
    out, features = network.forward_with(x, time, cond, names)
    assert list(features) == names
    assert torch.equal(out, network(x, time, cond))
    assert torch.equal(out, network.forward_with(x, time, cond, [])[0])
    for name in names:
        alone = network.features(x, time, cond, [name])
        assert list(alone) == [name]
        assert torch.equal(alone[name], features[name])
        assert features[name].abs().max() > 0
    both = network.features(x, time, cond, [names[-1], names[0], names[0]])
    assert torch.equal(both[names[-1]], features[names[-1]])
    assert torch.equal(both[names[0]], features[names[0]])


def test_features_run_nothing_deeper_than_the_deepest_tap(network: DenoisingNetwork) -> None:
    x, time, cond = inputs(network)
    with calls(network) as whole:
        network(x, time, cond)
    lengths = []
    for name in network.taps:
        with calls(network) as ran:
            network.features(x, time, cond, [name])
        assert ran == whole[: len(ran)]
        assert "head" not in ran
        lengths.append(len(ran))
        with calls(network) as mixed:
            network.features(x, time, cond, [name, next(iter(network.taps))])
        assert mixed == ran
    strictly = lengths[:-1] if isinstance(network, MLPNetwork) else lengths  # the perceptron's bottleneck is its last hidden layer
    assert strictly == sorted(set(strictly))
    with calls(network) as nothing:
        assert network.features(x, time, cond, []) == {}
    assert nothing == []


def test_a_cut_pass_says_the_same_and_its_graph_ends_at_the_deepest_tap(network: DenoisingNetwork) -> None:
    x, time, cond = inputs(network)
    x.requires_grad_()
    for wanted in ([], list(network.taps)[:1], ["bottleneck"], list(network.taps)):
        whole, features = network.forward_with(x, time, cond, wanted)
        found, cut = network.forward_to_taps(x, time, cond, wanted)
        assert torch.equal(found, whole)
        assert cut.keys() == features.keys()
        assert whole.requires_grad
        assert not found.requires_grad
        for name in wanted:
            torch.testing.assert_close(
                torch.autograd.grad(cut[name].sum(), x, retain_graph=True), torch.autograd.grad(features[name].sum(), x, retain_graph=True)
            )
    with torch.no_grad():
        assert not network.forward_to_taps(x, time, cond, ["bottleneck"])[1]["bottleneck"].requires_grad


def test_the_perceptrons_bottleneck_is_its_last_hidden_layer() -> None:
    network = MLPNetwork((2,), (5, 6))
    assert network.taps == {"hidden1": 5, "hidden2": 6, "bottleneck": 6}
    features = network.features(*inputs(network)[:2], None, ["hidden2", "bottleneck"])
    assert features["hidden2"] is features["bottleneck"]


def test_later_layers_leave_the_features_alone_and_gradients_flow_through_them(network: DenoisingNetwork) -> None:
    x, time, cond = inputs(network)
    x.requires_grad_()
    for name, value in network.forward_with(x, time, cond, list(network.taps))[1].items():
        assert value._version == 0, name
        (grad,) = torch.autograd.grad(value.square().mean(), x, retain_graph=True)
        assert grad.abs().max() > 0, name


def test_features_take_a_gradient_penalty(network: DenoisingNetwork) -> None:
    x, time, cond = inputs(network)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(network.features(x, time, cond, ["bottleneck"])["bottleneck"].square().sum(), x, create_graph=True)
    network.zero_grad()
    grad.square().sum().backward()
    assert next(network.embed.parameters()).grad.abs().max() > 0


# What is computed


@pytest.mark.parametrize("residual", [False, True])
def test_the_perceptron_is_the_formula_of_its_docstring(residual: bool) -> None:
    network = MLPNetwork((2, 2), (4, 6, 6), num_classes=3, residual=residual, zero_output=False)
    x, time, cond = inputs(network)
    angles = time[:, None] * torch.linspace(math.pi / 4, 2 * math.pi, 8)
    shift = torch.cat([angles.sin(), angles.cos()], dim=1) @ network.embed.weight.T + network.embed.bias + network.classes.weight[cond]
    h1 = F.silu(x.flatten(1) @ network.hidden[0].weight.T + shift[:, :4])
    h1 = h1 + x.flatten(1) if residual else h1
    h2 = F.silu(h1 @ network.hidden[1].weight.T + shift[:, 4:10])
    h3 = F.silu(h2 @ network.hidden[2].weight.T + shift[:, 10:])
    h3 = h3 + h2 if residual else h3
    out, features = network.forward_with(x, time, cond, ["hidden1", "hidden2", "hidden3"])
    torch.testing.assert_close(list(features.values()), [h1, h2, h3])
    torch.testing.assert_close(out, (h3 @ network.head.weight.T + network.head.bias).view(x.shape))


def test_attention_is_torchs_own() -> None:
    block, x = AttentionBlock(8), torch.randn(2, 8, 3, 5, generator=torch.Generator().manual_seed(0))
    q, k, v = block.qkv(block.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=2)
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).view(x.shape)
    torch.testing.assert_close(block(x), (x + block.proj(attended)) / math.sqrt(2))


def test_the_residual_block_is_the_formula_of_its_docstring() -> None:
    draw = torch.Generator().manual_seed(0)
    block, x, scale_shift = ResidualBlock(4, 8, 0.0), torch.randn(2, 4, 5, 5, generator=draw), torch.randn(2, 16, generator=draw)
    inner = block.conv1(F.silu(block.norm1(x)))
    grouped = inner.view(2, 2, -1)
    normed = ((grouped - grouped.mean(2, keepdim=True)) / (grouped.var(2, keepdim=True, unbiased=False) + 1e-5).sqrt()).view(inner.shape)
    adapted = (1 + scale_shift[:, :8, None, None]) * normed + scale_shift[:, 8:, None, None]
    torch.testing.assert_close(block(x, scale_shift), (block.shortcut(x) + block.conv2(F.silu(adapted))) / math.sqrt(2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("attention", "expected"),
    [
        (None, ["middle.attention.0"]),
        ([], []),
        ([4], ["down.1.attention.0", "down.1.attention.1", "middle.attention.0", "up.0.attention.0", "up.0.attention.1"]),
        ([7], ["down.0.attention.0", "down.0.attention.1", "up.1.attention.0", "up.1.attention.1"]),
    ],
)
def test_the_levels_asked_for_attend(attention: list[int] | None, expected: list[str]) -> None:
    network = UNetNetwork((1, 7, 6), width=4, blocks=2, attention=attention)
    assert sorted(name for name, part in network.named_modules() if isinstance(part, AttentionBlock)) == sorted(expected)
    with calls(network) as ran:
        network(*inputs(network)[:2])
    assert [name for name in ran if name in expected] == expected


def test_every_block_on_the_way_up_gets_the_output_of_its_mirror_image() -> None:
    network = UNetNetwork((1, 7, 6), width=4, blocks=2, zero_output=False)
    x, time, _ = inputs(network)
    outputs: list[list[Tensor]] = []
    got: list[list[Tensor]] = []
    for level in network.down:
        level.register_forward_hook(lambda _m, _a, out: outputs.append(out))
    for level in network.up:
        level.register_forward_pre_hook(lambda _m, args: got.append(args[2]))
    network(x, time)
    assert [list(map(id, level)) for level in got] == [list(map(id, level)) for level in reversed(outputs)]
    seen: list[Tensor] = []
    for block in network.up[0].blocks:
        block.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    bottleneck = network.features(x, time, None, ["bottleneck"])["bottleneck"]
    network(x, time)
    torch.testing.assert_close(seen[0], (bottleneck + outputs[-1][1]) / math.sqrt(2))


def test_odd_sides_are_averaged_over_the_pixels_there_are_and_come_back_doubled_and_cut() -> None:
    network = UNetNetwork((1, 7, 5), width=4, zero_output=False)
    x, time, _ = inputs(network)
    seen: dict[str, Tensor] = {}
    network.down[1].register_forward_pre_hook(lambda _m, args: seen.update(down=args[0]))
    network.up[1].register_forward_pre_hook(lambda _m, args: seen.update(up=args[0]))
    features = network.forward_with(x, time, None, ["down1", "up1"])[1]
    fine, down = features["down1"], seen["down"]
    assert down.shape[2:] == (4, 3)
    torch.testing.assert_close(down[:, :, 0, 0], fine[:, :, :2, :2].mean((2, 3)))
    torch.testing.assert_close(down[:, :, 3, 1], fine[:, :, 6, 2:4].mean(2))
    torch.testing.assert_close(down[:, :, 3, 2], fine[:, :, 6, 4])
    doubled = network.narrow[1](features["up1"]).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(seen["up"], doubled[:, :, :7, :5])


# Conditions


def test_the_null_class_is_no_condition(network: DenoisingNetwork) -> None:
    x, time, cond = inputs(network)
    null = torch.full_like(cond, network.num_classes)
    assert torch.equal(network(x, time, null), network(x, time))
    mixed = torch.where(torch.arange(len(x)) % 2 == 0, null, cond)
    torch.testing.assert_close(network(x, time, mixed)[::2], network(x, time)[::2])
    torch.testing.assert_close(network(x, time, mixed)[1::2], network(x, time, cond)[1::2])


def test_class_and_time_change_the_answer(network: DenoisingNetwork) -> None:
    x, time, cond = inputs(network)
    answers = [network(x, time, torch.full_like(cond, label)) for label in range(network.num_classes + 1)]
    for i, one in enumerate(answers):
        assert all((one - other).flatten(1).abs().amax(dim=1).min() > 1e-4 for other in answers[:i])
    assert (network(x, time + 0.5, cond) - network(x, time, cond)).flatten(1).abs().amax(dim=1).min() > 1e-4


def test_null_trains_only_the_null_row(network: DenoisingNetwork) -> None:
    x, time, _ = inputs(network)
    network(x, time).square().sum().backward()
    assert isinstance(network.classes, nn.Embedding)
    grad = network.classes.weight.grad
    assert grad is not None
    assert (grad[:-1] == 0).all()
    assert grad[-1].abs().max() > 0


@pytest.mark.parametrize("make", [MLPNetwork, lambda: UNetNetwork((1, 6, 6), width=4)])
def test_without_classes_there_is_no_condition(make: Callable[[], DenoisingNetwork]) -> None:
    network = make()
    x, time, cond = inputs(network)
    assert network.num_classes == 0
    assert network(x, time).shape == x.shape
    assert not any(isinstance(part, nn.Embedding) for part in network.modules())
    with pytest.raises(InputError, match="num_classes") as caught:
        network(x, time, cond)
    assert caught.value.where == "cond"


# Starts


@pytest.mark.parametrize("make", [lambda zero: MLPNetwork(zero_output=zero), lambda zero: UNetNetwork((1, 6, 6), width=4, zero_output=zero)])
def test_a_fresh_network_answers_zero_unless_told_otherwise(make: Callable[[bool], DenoisingNetwork]) -> None:
    x, time, _ = inputs(make(True))
    assert (make(True)(x, time) == 0).all()
    assert make(True).features(x, time, None, ["bottleneck"])["bottleneck"].abs().max() > 0
    assert (make(False)(x, time) != 0).all()
    assert (reinitialise(make(True), 1)(x, time) == 0).all()


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_weights_depend_on_the_seed_alone(make: Callable[[], DenoisingNetwork]) -> None:
    with torch.random.fork_rng(devices=[]):
        built = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            built.append(make())
    x, time, cond = inputs(built[0])
    one, same, other = (network(x, time, cond) for network in built)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_reinitialise_draws_every_weight_afresh_from_its_seed(network: DenoisingNetwork) -> None:
    one, same, other = reinitialise(network, 1), reinitialise(network, 1), reinitialise(network, 2)
    for name, value in network.state_dict().items():
        assert torch.equal(one.state_dict()[name], same.state_dict()[name]), name
        constant = "norm" in name
        assert torch.equal(one.state_dict()[name], other.state_dict()[name]) == constant, name
        assert torch.equal(one.state_dict()[name], value) == constant, name
    ones = copy.deepcopy(network)
    for weight in ones.parameters():
        nn.init.ones_(weight)
    x, time, cond = inputs(network)
    assert torch.equal(reinitialise(ones, 1)(x, time, cond), one(x, time, cond))


def test_a_copy_is_independent(network: DenoisingNetwork) -> None:
    x, time, cond = inputs(network)
    before, twin = network(x, time, cond), copy.deepcopy(network)
    assert torch.equal(twin(x, time, cond), before)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.add_(0.1)
    assert torch.equal(network(x, time, cond), before)
    assert not torch.equal(twin(x, time, cond), before)


def test_a_saved_network_comes_back(network: DenoisingNetwork) -> None:
    x, time, cond = inputs(network)
    other = reinitialise(network, 5)
    other.load_state_dict(network.state_dict())
    assert torch.equal(other(x, time, cond), network(x, time, cond))


# Gradients, precision, dropout


def test_gradients_reach_every_parameter(network: DenoisingNetwork) -> None:
    x, time, _ = inputs(network)
    every = torch.arange(len(x)) % (network.num_classes + 1)
    network(x, time, every).square().mean().backward()
    for name, weight in network.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.abs().max() > 0, name
    assert (network.classes.weight.grad.abs().amax(dim=1) > 0).all()


def test_double_precision_agrees_with_single_and_with_finite_differences(network: DenoisingNetwork) -> None:
    x, time, cond = inputs(network, 2)
    double = copy.deepcopy(network).double()
    out = double(x.double(), time.double(), cond)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out.float(), network(x, time, cond), rtol=1e-3, atol=1e-4)
    x64 = x.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda inner, when: double(inner, when, cond), (x64, time.double().requires_grad_()), fast_mode=True)


def test_mixed_precision_stays_near_single(network: DenoisingNetwork) -> None:
    x, time, cond = inputs(network)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = network(x, time, cond)
    torch.testing.assert_close(mixed.float(), network(x, time, cond), rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    "make", [lambda: MLPNetwork((2,), (64, 64), dropout=0.5, zero_output=False), lambda: UNetNetwork((1, 6, 6), width=8, dropout=0.5, zero_output=False)]
)
def test_dropout_works_in_training_alone_and_repeats_with_the_random_state(make: Callable[[], DenoisingNetwork]) -> None:
    network = make()
    x, time, _ = inputs(network)
    with torch.random.fork_rng(devices=[]):
        masked = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            masked.append(network(x, time))
    assert torch.equal(masked[0], masked[1])
    assert not torch.equal(masked[0], masked[2])
    network.eval()
    assert torch.equal(network(x, time), network(x, time))


# The embedding of time


def largest_slope(features: TimeFeatures, low: float, high: float, step: float = 1e-4) -> float:
    """max |∂ feature / ∂ time| by central differences."""
    time = torch.linspace(low, high, 2001, dtype=torch.float64)
    return ((features(time + step) - features(time - step)) / (2 * step)).abs().max().item()


@pytest.mark.parametrize("count", [1, 8, 32])
def test_the_smooth_embedding_is_smooth_whatever_its_size(count: int) -> None:
    features = TimeFeatures(count, "smooth").double()
    time = torch.linspace(-1.56, 1.1, 2001, dtype=torch.float64)
    assert features(time).shape == (2001, 2 * count)
    assert largest_slope(features, -1.56, 1.1) <= 2 * math.pi * (1 + 1e-6)
    assert features.frequencies.min().item() == pytest.approx(math.pi / 4)  # more than half a turn over all noise levels, and less than a whole one
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rough = TimeFeatures(32, "fourier", 16.0).double()
    assert largest_slope(rough, -1.56, 1.1) > 16 * 2 * math.pi


@SMALL
@given(st.floats(-1.55, 1.1), st.floats(1e-3, 0.1))
def test_a_network_with_the_smooth_embedding_moves_no_faster_than_its_weights_allow(when: float, gap: float) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = MLPNetwork((2,), (16, 16), zero_output=False).double()
    x, time = torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), torch.full((8,), when, dtype=torch.float64)
    moved = (network(x, time + gap) - network(x, time)).norm(dim=1).max().item()
    lipschitz = 1.1  # of SiLU
    norm = lambda weight: torch.linalg.matrix_norm(weight, 2).item()  # noqa: E731
    first, second = network.embed.weight.split(16)
    slope = 2 * math.pi * math.sqrt(8) * norm(network.head.weight) * lipschitz * (norm(second) + norm(network.hidden[1].weight) * lipschitz * norm(first))
    assert 0 < moved <= slope * gap


def test_the_smooth_embedding_tells_all_noise_levels_apart() -> None:
    sigma = torch.logspace(math.log10(0.002), math.log10(80), 400, dtype=torch.float64)
    features = TimeFeatures(8, "smooth").double()(sigma.log() / 4)
    distances = torch.cdist(features, features)
    neighbours = distances.diagonal(1)
    far = (torch.arange(400)[:, None] - torch.arange(400)).abs() >= 20
    assert 0.05 < neighbours.min() <= neighbours.max() < 0.1
    assert distances[far].min() > 1


def test_the_positional_embedding_spans_a_thousand_steps() -> None:
    features = TimeFeatures(16, "positional")
    frequencies = features.frequencies[:16].double()
    assert frequencies[0] == 1
    torch.testing.assert_close(frequencies[8].item(), 0.01, rtol=1e-5, atol=0.0)
    time = torch.arange(1001, dtype=torch.float64)
    torch.testing.assert_close(features(time)[:, :16].double(), torch.sin(time[:, None] * frequencies), rtol=0, atol=2e-4)
    distances = torch.cdist(features(time), features(time)) + 10 * torch.eye(1001)
    assert distances.min() > 0.5


def test_the_fourier_embedding_has_random_frequencies_that_are_saved() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        features = TimeFeatures(4000, "fourier", 0.5)
    assert features.frequencies.std().item() == pytest.approx(math.pi, rel=0.05)
    assert "frequencies" in features.state_dict()
    assert TimeFeatures(4, "smooth").state_dict() == {}
    assert torch.equal(*TimeFeatures(3, "fourier").frequencies.chunk(2))


# Wrong arguments


@pytest.mark.parametrize(
    ("build", "where", "says"),
    [
        (lambda: MLPNetwork(()), "shape", "no dimension"),
        (lambda: MLPNetwork((2, 0)), "shape", "0"),
        (lambda: MLPNetwork((2,), ()), "widths", "no hidden layer"),
        (lambda: MLPNetwork((2,), "64"), "widths", "list"),
        (lambda: MLPNetwork((2,), (8, -1)), "widths", "-1"),
        (lambda: MLPNetwork(num_classes=-1), "num_classes", "-1"),
        (lambda: MLPNetwork(dropout=1.0), "dropout", "probability"),
        (lambda: MLPNetwork(dropout=-0.1), "dropout", "probability"),
        (lambda: MLPNetwork(dropout="0.1"), "dropout", "probability"),
        (lambda: MLPNetwork(dropout=math.nan), "dropout", "probability"),
        (lambda: MLPNetwork(time_frequencies=0), "time_frequencies", "0"),
        (lambda: MLPNetwork(embedding="smoth"), "embedding", "Did you mean 'smooth'"),
        (lambda: MLPNetwork(embedding=["smooth"]), "embedding", "unknown"),
        (lambda: MLPNetwork(embedding="fourier", fourier_scale=0.0), "fourier_scale", "positive"),
        (lambda: MLPNetwork(embedding="fourier", fourier_scale=math.inf), "fourier_scale", "positive"),
        (lambda: MLPNetwork(embedding="smooth", fourier_scale=16.0), "fourier_scale", "fourier"),
        (lambda: MLPNetwork(residual="no"), "residual", "neither"),
        (lambda: MLPNetwork(zero_output=1), "zero_output", "neither"),
        (lambda: UNetNetwork((64,)), "shape", "MLPNetwork"),
        (lambda: UNetNetwork((1, 8, 8), width=0), "width", "0"),
        (lambda: UNetNetwork((1, 8, 8), multipliers=()), "multipliers", "no level"),
        (lambda: UNetNetwork((1, 8, 8), multipliers=(1, 0)), "multipliers", "0"),
        (lambda: UNetNetwork((1, 8, 3), multipliers=(1, 1, 1)), "multipliers", "halved 2 times"),
        (lambda: UNetNetwork((1, 8, 8), blocks=0), "blocks", "0"),
        (lambda: UNetNetwork((1, 8, 8), blocks=1.5), "blocks", "1.5"),
        (lambda: UNetNetwork((1, 14, 14), attention=[8]), "attention", "The levels have 14, 7"),
        (lambda: UNetNetwork((1, 14, 14), attention=7), "attention", "list"),
        (lambda: UNetNetwork((1, 8, 8), dropout=2), "dropout", "probability"),
        (lambda: UNetNetwork((1, 8, 8), zero_output="yes"), "zero_output", "neither"),
    ],
)
def test_wrong_arguments_are_named(build: Callable[[], DenoisingNetwork], where: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        build()
    assert caught.value.where == where
    assert says in str(caught.value)


def test_wrong_calls_are_named(network: DenoisingNetwork) -> None:
    x, time, cond = inputs(network)
    with pytest.raises(InputError, match=r"^x: ") as caught:
        network(x[..., :1] if x.shape[-1] > 1 else x, time, cond)
    assert "shape" in str(caught.value)
    for ask in (network.features, network.forward_with):
        with pytest.raises(InputError, match="Did you mean 'bottleneck'") as caught:
            ask(x, time, cond, ["botleneck"])
        assert caught.value.where == "taps"
