"""Importance of units, the table of p', what is kept, sorting and cutting (sheet `capacity_gap`, invariants 2 to 5 and 7)."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck import seeds
from limbeck.errors import InputError
from limbeck.language.decoder import Decoder, DecoderShape, Masks, decoder
from limbeck.language.importance import Importance, importance, mask_gradients, ones, random_importance
from limbeck.language.pruning import component_sparsity, cut, global_shape, nearest_shape, reordered, uniform_shape, whole_percent
from limbeck.language.tokens import TokenBatch

V = 29


def model(seed: int = 0, **args: Any) -> Decoder:
    """Untied, three layers of 6 query heads in 3 groups, 20 neurons and 24 channels; norms and weights far from symmetric."""
    generator = seeds.generator(seed)
    made = decoder(V, (2, 10), **{"layers": 3, "width": 24, "heads": 6, "kv_heads": 3, "ffn": 20, "tied": False, **args})
    with torch.no_grad():
        for parameter in made.parameters():
            centre = 1.0 if parameter.dim() == 1 else 0.0
            parameter.copy_(centre + 0.3 * torch.randn(parameter.shape, generator=generator))
    return made


def text(rows: int = 4, seed: int = 1) -> TokenBatch:
    return TokenBatch.from_text(torch.randint(0, V, (rows, 11), generator=seeds.generator(seed)))


def loss(net: Decoder, tokens: TokenBatch) -> Tensor:
    return F.cross_entropy(net(tokens.packed()).flatten(0, 1), tokens.targets.flatten())


def scores(net: Decoder) -> Importance:
    return importance(net, [text(seed=seed) for seed in range(3)])


# ---- (5) ----------------------------------------------------------------------------------------------------------------


def test_component_sparsity() -> None:
    table = {10: 5, 20: 11, 30: 16, 40: 23, 50: 29, 60: 37, 70: 45, 80: 55, 90: 68, 0: 0, 100: 100}
    assert {p: round(100 * whole_percent(component_sparsity(p / 100))) for p in table} == table
    for p in (0.0, 0.13, 0.6, 0.99, 1.0):
        assert (1 - component_sparsity(p)) ** 2 == pytest.approx(1 - p, abs=1e-12)
    with pytest.raises(InputError, match="between 0 and 1"):
        component_sparsity(1.2)


# ---- (3) and (4) --------------------------------------------------------------------------------------------------------


def test_mask_gradients_are_gradient_times_value_of_what_a_unit_gives() -> None:
    net, tokens = model().double(), text()
    found = mask_gradients(net, tokens)
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(_module: Any, inputs: tuple[Tensor, ...]) -> None:
            inputs[0].retain_grad()
            seen[name] = inputs[0]

        return hook

    for index, layer in enumerate(net.stack):
        assert layer.attention is not None
        assert layer.ffn is not None
        layer.attention.out.register_forward_pre_hook(watch(f"heads {index}"))
        layer.ffn.down.register_forward_pre_hook(watch(f"neurons {index}"))
    loss(net, tokens).backward()
    for index in range(3):
        heads, neurons = seen[f"heads {index}"], seen[f"neurons {index}"]
        assert heads.grad is not None
        assert neurons.grad is not None
        torch.testing.assert_close(found.heads[index], (heads * heads.grad).sum((0, 1)).view(3, 2 * 4).sum(1))
        torch.testing.assert_close(found.neurons[index], (neurons * neurons.grad).sum((0, 1)))


def test_gradients_of_channels_are_those_of_one_shared_vector() -> None:
    net, tokens = model().double(), text()
    found, at = mask_gradients(net, tokens), ones(net)

    def shifted(by: float) -> float:
        channels = torch.ones(24, dtype=torch.float64)
        channels[7] += by
        hidden = net.hidden(tokens, Masks(at.heads, at.neurons, channels)).detach()
        return float(F.cross_entropy(net.head().detach().logits(hidden.flatten(0, 1)), tokens.targets.flatten()))

    assert float(found.channels[7]) == pytest.approx((shifted(1e-5) - shifted(-1e-5)) / 2e-5, rel=1e-5)


def test_importance_takes_absolute_values_before_the_mean() -> None:
    net = model().double()
    batches = [text(seed=seed) for seed in range(5)]
    found = importance(net, batches)
    each = [mask_gradients(net, tokens).neurons[1] for tokens in batches]
    torch.testing.assert_close(found.neurons[1], torch.stack(each).abs().mean(0))
    assert float((found.neurons[1] - torch.stack(each).mean(0).abs()).abs().max()) > 1e-6  # another thing, on these batches
    assert not any(p.grad is not None for p in net.parameters())
    with pytest.raises(InputError, match="at least one batch"):
        importance(net, [])


def test_normalised_scores_have_norm_one_in_every_layer() -> None:
    found = scores(model())
    unit = found.normalised()
    for own in (*unit.heads, *unit.neurons, unit.channels):
        assert float(own.norm()) == pytest.approx(1)
    torch.testing.assert_close(unit.heads[2] * found.heads[2].norm(), found.heads[2])
    nothing = Importance((torch.zeros(3),), (torch.zeros(4),), torch.zeros(5)).normalised()
    assert bool((nothing.neurons[0] == 0).all())


def test_a_unit_without_outgoing_weights_has_no_importance_and_goes_first() -> None:
    net = model()
    with torch.no_grad():
        net.stack[1].ffn.down.weight[:, 13] = 0  # type: ignore[union-attr]
        net.stack[2].attention.out.weight[:, 8:16] = 0  # type: ignore[union-attr]  # group 1: query heads 2 and 3, four channels each
    found = scores(net)
    assert float(found.neurons[1][13]) == 0
    assert float(found.heads[2][1]) == 0
    assert sum(int((own == 0).sum()) for own in (*found.heads, *found.neurons, found.channels)) == 2
    left = global_shape(net.shape, found, 1.2 / 9, multiple=1)  # one group of nine; 8 of 60 neurons
    assert left.layers[2].kv_heads == 2
    assert sum(layer.kv_heads for layer in left.layers) == 8
    sorted_net = reordered(net, found)
    assert bool((sorted_net.stack[1].ffn.down.weight[:, -1] == 0).all())  # type: ignore[union-attr]
    assert bool((sorted_net.stack[2].attention.out.weight[:, -8:] == 0).all())  # type: ignore[union-attr]
    without = list(net.shape.layers)
    without[1] = without[1]._replace(ffn=19)
    small = cut(sorted_net, net.shape.model_copy(update={"layers": tuple(without)}))
    torch.testing.assert_close(small(text().packed()), net(text().packed()), rtol=1e-4, atol=1e-4)  # neuron 13 of layer 1 was for nothing


def test_zero_gradients_where_nothing_depends_on_a_unit() -> None:
    net = model()
    with torch.no_grad():
        net.output.weight.zero_()  # type: ignore[union-attr]
    found = scores(net)
    assert float(found.channels.max()) == float(max(own.max() for own in found.neurons)) == 0


# ---- (6) ----------------------------------------------------------------------------------------------------------------


def made_up(heads: list[list[float]], neurons: list[list[float]], channels: int) -> Importance:
    return Importance(tuple(map(torch.tensor, heads)), tuple(map(torch.tensor, neurons)), torch.arange(1.0, channels + 1))


def test_global_ranking_is_over_all_layers_of_normalised_scores() -> None:
    shape = DecoderShape.model_validate({"vocabulary": 5, "width": 10, "head_dim": 2, "layers": [[2, 2, 4], [2, 2, 4]]})
    # Layer 1's raw scores are a hundred times smaller; normalised, its unimportant units stand below layer 0's even ones.
    given = made_up([[5.0, 5.0], [0.01, 0.05]], [[3.0, 3.0, 3.0, 3.0], [0.05, 0.0001, 0.0002, 0.0003]], 10)
    left = global_shape(shape, given, 0.3, multiple=1)
    assert left.layers == ((2, 2, 4), (1, 1, 2))  # 1 head of 4 (1.2 rounded), 2 neurons of 8 (2.4), 3 channels
    assert left.width == 7
    raw = global_shape(shape, made_up([[5.0, 5.0], [5.0, 5.0]], [[3.0] * 4, [3.0] * 4], 10), 0.5, multiple=1)
    assert sum(layer.ffn for layer in raw.layers) == 4


def test_above_ninety_per_cent_neurons_go_in_place_of_heads() -> None:
    shape = DecoderShape.model_validate({"vocabulary": 5, "width": 100, "head_dim": 6, "layers": [[50, 50, 2000], [50, 50, 2000]]})
    given = random_importance(shape, seeds.generator(0))
    left = global_shape(shape, given, 0.95, multiple=1)
    assert sum(layer.kv_heads for layer in left.layers) == 10
    extra = 0.05 * 100 * 6 * 4 / 3
    assert sum(layer.ffn for layer in left.layers) == round(4000 * 0.05 - extra)
    assert left.width == 5
    whole = shape.model_copy(update={"layers": tuple(o._replace(query_heads=2 * o.query_heads) for o in shape.layers)})
    grouped = global_shape(whole, given, 0.95, multiple=1)
    assert sum(layer.ffn for layer in grouped.layers) == round(4000 * 0.05 - 0.05 * 100 * 6 * 3 * 2 / 3)


@pytest.mark.parametrize("removed", [0.05, 0.29, 0.37, 0.68, 0.94])
def test_sizes_are_multiples_of_eight_where_anything_is_cut(removed: float) -> None:
    shape = DecoderShape.model_validate({"vocabulary": 5, "width": 100, "head_dim": 6, "layers": [[5, 5, 210], [5, 5, 210], [5, 5, 210]]})
    left = global_shape(shape, random_importance(shape, seeds.generator(1)), removed)
    assert left.width % 8 == 0
    assert left.width >= 8
    assert abs(left.width - (1 - removed) * 100) <= 4.5 or left.width == 8
    assert all(layer.ffn % 8 == 0 or layer.ffn == 210 for layer in left.layers)


def test_the_share_of_weights_that_stays_is_about_what_was_asked_for() -> None:
    shape = decoder(50, (2, 64), width=128, layers=4, heads=8).shape
    given = random_importance(shape, seeds.generator(2))
    for p in (0.1, 0.3, 0.5, 0.7, 0.9):
        left = global_shape(shape, given, whole_percent(component_sparsity(p)))
        assert left.layer_parameters / shape.layer_parameters == pytest.approx(1 - p, abs=0.04)
    assert global_shape(shape, given, 0.0) == shape


def test_the_uniform_cut_keeps_the_middle_layers_and_the_same_of_each() -> None:
    llama = DecoderShape(vocabulary=32000, width=4096, head_dim=128, layers=((32, 32, 11008),) * 32, tied=False)  # type: ignore[arg-type]
    left, stay = uniform_shape(llama, 0.25, layers=24)
    assert stay == tuple(range(4, 28))
    assert set(left.layers) == {(24, 24, 8256)}
    assert left.width == 3072
    assert uniform_shape(llama, 0.0) == (llama, tuple(range(32)))
    assert uniform_shape(llama, 0.0, layers=29)[1] == tuple(range(1, 30))
    grouped = DecoderShape(vocabulary=9, width=24, head_dim=4, layers=((6, 2, 40),) * 2)  # type: ignore[arg-type]
    assert uniform_shape(grouped, 0.9)[0].layers == ((3, 1, 8),) * 2
    assert uniform_shape(grouped, 0.9, multiple=1)[0].layers == ((3, 1, 4),) * 2


def test_nearest_shape_comes_as_near_as_shapes_allow() -> None:
    net = model()
    given = scores(net)
    sizes = sorted({global_shape(net.shape, given, p / 500, multiple=1).layer_parameters for p in range(500)})
    for wanted in (sizes[0] + 3, 2500, 5000, net.shape.layer_parameters):
        found = nearest_shape(lambda removed: global_shape(net.shape, given, removed, multiple=1), wanted).layer_parameters
        assert abs(found - wanted) <= min(abs(size - wanted) for size in sizes)


@pytest.mark.parametrize("removed", [-0.1, 1.0])
def test_wrong_shares_are_refused(removed: float) -> None:
    net = model()
    with pytest.raises(InputError, match="cannot be removed"):
        global_shape(net.shape, random_importance(net.shape, seeds.generator(0)), removed)
    with pytest.raises(InputError, match="multiples of 0"):
        uniform_shape(net.shape, 0.5, multiple=0)
    with pytest.raises(InputError, match="3 layers"):
        uniform_shape(net.shape, 0.5, layers=4)


# ---- sorting and cutting ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_sorting_units_leaves_the_logits_unchanged(tied: bool) -> None:
    net, tokens = model(tied=tied), text()
    given = random_importance(net.shape, seeds.generator(9))
    before = copy.deepcopy(net.state_dict())
    found = reordered(net, given)
    torch.testing.assert_close(found(tokens.packed()), net(tokens.packed()), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert not torch.equal(found.embedding.weight, net.embedding.weight)
    order = given.channels.argsort(descending=True)
    torch.testing.assert_close(found.embedding.weight, net.embedding.weight[:, order], rtol=0, atol=0)
    again = scores(found)
    for now, then, by in zip(again.neurons, scores(net).neurons, given.neurons, strict=True):
        torch.testing.assert_close(now, then[by.argsort(descending=True)], rtol=1e-3, atol=1e-6)


def test_a_cut_keeps_the_most_important_units_of_every_layer() -> None:
    net = model()
    given = scores(net)
    left = global_shape(net.shape, given, 0.4, multiple=1)
    small = cut(reordered(net, given), left)
    assert small.shape == left
    assert sum(p.numel() for p in small.parameters()) == left.parameters < net.shape.parameters
    channels = given.channels.argsort(descending=True)[: left.width]
    torch.testing.assert_close(small.embedding.weight, net.embedding.weight[:, channels], rtol=0, atol=0)
    torch.testing.assert_close(small.output.weight, net.output.weight[:, channels], rtol=0, atol=0)  # type: ignore[union-attr]
    for index, own in enumerate(left.layers):
        theirs, ours = net.stack[index], small.stack[index]
        neurons = given.neurons[index].argsort(descending=True)[: own.ffn]
        if own.ffn:
            torch.testing.assert_close(ours.ffn.down.weight, theirs.ffn.down.weight[channels][:, neurons], rtol=0, atol=0)  # type: ignore[union-attr]
            up = theirs.ffn.gate_up.weight[20:][neurons][:, channels]  # type: ignore[union-attr]
            torch.testing.assert_close(ours.ffn.gate_up.weight[own.ffn :], up, rtol=0, atol=0)  # type: ignore[union-attr]
        if own.kv_heads:
            groups = given.heads[index].argsort(descending=True)[: own.kv_heads]
            qkv, D = theirs.attention.qkv.weight.unflatten(0, (12, 4)), 4  # type: ignore[union-attr]
            queries = qkv[:6].unflatten(0, (3, 2))[groups].flatten(0, 2)[:, channels]
            mine = ours.attention.qkv.weight  # type: ignore[union-attr]
            torch.testing.assert_close(mine[: own.query_heads * D], queries, rtol=0, atol=0)
            values = qkv[9:][groups].flatten(0, 1)[:, channels]
            torch.testing.assert_close(mine[-own.kv_heads * D :], values, rtol=0, atol=0)


def test_one_sort_serves_every_sparsity() -> None:
    net = model()
    given = scores(net)
    whole = reordered(net, given)
    half, tenth = (global_shape(net.shape, given, removed, multiple=1) for removed in (0.3, 0.7))
    twice = cut(cut(whole, half), tenth)
    once = cut(whole, tenth)
    assert all(torch.equal(a, b) for a, b in zip(twice.state_dict().values(), once.state_dict().values(), strict=True))


def test_cutting_heads_alone_is_switching_them_off() -> None:
    net, tokens = model(), text()
    given = scores(net)
    whole = reordered(net, given)
    left = net.shape.model_copy(update={"layers": tuple(o._replace(query_heads=2, kv_heads=1, ffn=12) for o in net.shape.layers)})
    small, off = cut(whole, left), copy.deepcopy(whole)
    with torch.no_grad():
        for layer in off.stack:
            layer.attention.out.weight[:, 8:] = 0  # type: ignore[union-attr]
            layer.ffn.down.weight[:, 12:] = 0  # type: ignore[union-attr]
    torch.testing.assert_close(small(tokens.packed()), off(tokens.packed()), rtol=1e-4, atol=1e-4)


def test_sparsity_zero_gives_the_teacher_back() -> None:
    net, tokens = model(), text()
    given = scores(net)
    same = cut(reordered(net, given), global_shape(net.shape, given, component_sparsity(0.0)))
    assert same.shape == net.shape
    torch.testing.assert_close(same(tokens.packed()), net(tokens.packed()), rtol=1e-4, atol=1e-4)


def test_layers_that_go_and_branches_without_units() -> None:
    net, tokens = model(), text()
    left, stay = uniform_shape(net.shape, 0.0, layers=1)
    assert stay == (1,)
    middle = cut(net, left, stay)
    torch.testing.assert_close(middle.stack[0].ffn.down.weight, net.stack[1].ffn.down.weight, rtol=0, atol=0)  # type: ignore[union-attr]
    bare = net.shape.model_copy(update={"layers": tuple(o._replace(query_heads=0, kv_heads=0, ffn=0) for o in net.shape.layers), "width": 8})
    empty = cut(net, bare)
    assert empty.shape.layer_parameters == 8
    assert bool(empty(tokens.packed()).isfinite().all())
    empty_scores = importance(empty, [tokens])
    assert [len(own) for own in empty_scores.heads] == [0, 0, 0]
    assert reordered(empty, empty_scores).shape == bare


@pytest.mark.parametrize(
    "changed", [{"width": 32}, {"vocabulary": 30}, {"layers": ((6, 3, 20),) * 2}, {"layers": ((6, 3, 21),) * 3}, {"layers": ((3, 3, 20),) * 3}, {"head_dim": 2}]
)
def test_shapes_that_are_no_part_of_the_model_are_refused(changed: dict[str, Any]) -> None:
    net = model()
    with pytest.raises(InputError, match="no part of the model"):
        cut(net, DecoderShape.model_validate({**net.shape.model_dump(), **changed}))


def test_random_scores_depend_on_the_generator_alone() -> None:
    shape = model().shape
    a, b = random_importance(shape, seeds.generator(1)), random_importance(shape, seeds.generator(1))
    assert torch.equal(a.neurons[2], b.neurons[2])
    assert not torch.equal(a.neurons[2], a.neurons[1])
