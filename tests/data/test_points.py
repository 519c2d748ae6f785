import math

import pytest
import torch

from limbeck.components import Component, build
from limbeck.data import Joined, corrupt_labels, hide_labels, hold_out, stratified_subset, subset, with_targets
from limbeck.data.arrays import ArrayData
from limbeck.data.points import (
    Mixture,
    checkerboard,
    gaussian_grid,
    gaussian_ring,
    geometric_weights,
    mixture_of,
    network_mixture_of,
    two_moons,
)
from limbeck.data.splits import View
from limbeck.errors import InputError

SOURCES = [two_moons, gaussian_grid, gaussian_ring, checkerboard]
EVERY = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.__name__)


@EVERY
def test_points_are_drawn_by_the_seed_and_parts_differ(source):
    found = source(count=500, test=300, seed=3)
    assert (len(found.train), len(found.test), found.input_shape) == (500, 300, (2,))
    assert found.train.inputs.dtype == torch.float32
    assert found.train.fingerprint == source(count=500, test=300, seed=3).train.fingerprint
    assert found.train.fingerprint != source(count=500, test=300, seed=4).train.fingerprint
    assert not torch.equal(found.train.inputs[:300], found.test.inputs)


@EVERY
@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_network_units_have_the_deviation_asked_for_and_the_same_constants_for_every_sample(source, scale):
    found = source(count=60_000, test=10, seed=1, scale=scale)
    prepared = found.train.prepare(found.train.inputs).double()
    assert prepared.mean(0).abs().max() < 0.02 * scale
    assert math.sqrt(float(prepared.var(0).mean())) == pytest.approx(scale, rel=0.01)
    other = source(count=10, test=10, seed=2, scale=scale)
    assert (other.test.mean, other.test.std) == (found.train.mean, found.train.std)
    assert len(found.train.std) == 1  # round stays round
    back = prepared * found.train.std[0] + torch.tensor(found.train.mean)
    torch.testing.assert_close(back.float(), found.train.inputs, atol=1e-5, rtol=1e-5)


@EVERY
def test_without_a_scale_network_units_are_data_units(source):
    found = source(count=50, test=5, scale=None)
    assert torch.equal(found.train.prepare(found.train.inputs), found.train.inputs)


@EVERY
def test_labels_are_the_component_none_or_a_number_of_classes(source):
    named, bare, two = (source(count=2000, test=5, labels=labels) for labels in ("component", "none", 2))
    assert torch.equal(named.train.inputs, bare.train.inputs)
    assert bare.train.targets is None
    assert bare.train.classes == ()
    assert len(named.train.targets.unique()) == named.num_classes == len(named.train.classes)
    assert torch.equal(two.train.targets, named.train.targets % 2)
    assert two.train.classes == ("0", "1")


def test_the_grid_is_a_grid():
    train = gaussian_grid(side=3, spacing=2.0, std=0.01, count=9000, test=5).train
    means = torch.stack([train.inputs[train.targets == k].mean(0) for k in range(9)])
    expected = torch.tensor([[x, y] for y in (-2.0, 0.0, 2.0) for x in (-2.0, 0.0, 2.0)])
    torch.testing.assert_close(means, expected, atol=2e-3, rtol=0)
    spread = train.inputs - mixture_of(train).means_KD[train.targets].float()
    assert float(spread.std()) == pytest.approx(0.01, rel=0.05)
    assert torch.equal(mixture_of(train).means_KD.float(), expected)


def test_the_ring_is_a_ring_and_opposite_modes_can_form_a_class():
    train = gaussian_ring(modes=8, radius=4.0, std=0.15, count=20_000, test=5, labels=4).train
    law = mixture_of(train)
    torch.testing.assert_close(law.means_KD.norm(dim=1), torch.full((8,), 4.0, dtype=torch.float64))
    torch.testing.assert_close(law.means_KD[:4], -law.means_KD[4:])
    assert law.classes_K.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    nearest = torch.cdist(train.inputs.double(), law.means_KD).min(1)
    assert float((nearest.values > 4.5 * 0.15).double().mean()) < 1e-3
    assert torch.equal(train.targets, law.classes_K[nearest.indices])


def test_uneven_weights_are_geometric():
    weights = geometric_weights(25, 20.0)
    assert float(weights.sum()) == pytest.approx(1)
    assert float(weights[0] / weights[-1]) == pytest.approx(20)
    torch.testing.assert_close(weights[1:] / weights[:-1], torch.full((24,), 20 ** (-1 / 24), dtype=torch.float64))
    assert geometric_weights(1, 5.0).tolist() == [1.0]
    train = gaussian_grid(count=50_000, test=5, weights_ratio=20.0).train
    drawn = torch.bincount(train.targets, minlength=25) / 50_000
    assert float((drawn - weights).abs().max()) < 5e-3
    assert float(drawn[0] / drawn[-1]) > 10


def test_the_moons_are_half_circles():
    train = two_moons(count=4000, test=5, noise=0.0).train
    upper, lower = train.inputs[train.targets == 0], train.inputs[train.targets == 1]
    assert train.classes == ("upper", "lower")
    assert 1800 < len(upper) < 2200
    torch.testing.assert_close(upper.norm(dim=1), torch.ones(len(upper)))
    torch.testing.assert_close((lower - torch.tensor([1.0, 0.5])).norm(dim=1), torch.ones(len(lower)))
    assert upper[:, 1].min() >= 0
    assert lower[:, 1].max() <= 0.5
    assert mixture_of(train) is None
    assert network_mixture_of(train) is None


@pytest.mark.parametrize("side", [1, 2, 3, 4])
def test_the_board_has_its_dark_fields(side):
    width = 1.5
    train = checkerboard(side=side, width=width, count=5000, test=5).train
    field = (train.inputs / width + side / 2).floor().long()
    assert ((field >= 0) & (field < side)).all()
    assert (field.sum(1) % 2 == 0).all()
    dark = [(x, y) for y in range(side) for x in range(side) if (x + y) % 2 == 0]
    assert len(train.classes) == len(dark)
    assert [tuple(f) for f in field.tolist()] == [dark[k] for k in train.targets.tolist()]
    assert torch.bincount(train.targets).min() > 5000 / len(dark) * 0.8
    assert mixture_of(train) is None


def test_the_mixture_survives_what_is_done_to_data():
    found = gaussian_ring(count=200, test=50)
    law = mixture_of(found.train)
    rest, held = hold_out(found.train, 50, seed=0)
    derived = [
        stratified_subset(found.train, 40, seed=0),
        subset(found.train, torch.arange(5)),
        rest,
        stratified_subset(held, 10, seed=1),
        with_targets(found.train, torch.zeros(200, dtype=torch.int64)),
        hide_labels(found.train, 20, seed=0),
        corrupt_labels(rest, 0.3, seed=0),
        View(found.train, torch.arange(9)),
        Joined(found.train, found.test),
        View(Joined(found.train, found.test), torch.arange(9)),
    ]
    for data in derived:
        assert mixture_of(data) is law
        assert network_mixture_of(data) is not None
    assert mixture_of(ArrayData(torch.zeros(3, 2))) is None


def test_the_mixture_in_network_units_is_that_of_the_prepared_points():
    train = gaussian_grid(side=2, spacing=3.0, std=0.2, weights_ratio=5.0, count=40_000, test=5, scale=0.7).train
    law = network_mixture_of(train)
    prepared = train.prepare(train.inputs).double()
    for k in range(4):
        own = prepared[train.targets == k]
        torch.testing.assert_close(own.mean(0), law.means_KD[k], atol=4 * law.std / math.sqrt(len(own)), rtol=0)
        assert float((own - law.means_KD[k]).std()) == pytest.approx(law.std, rel=0.03)
    mean, deviation = law.moments()
    assert mean.abs().max() < 1e-12
    assert deviation == pytest.approx(0.7)
    plain = gaussian_grid(count=5, test=5, scale=None).train
    assert torch.equal(network_mixture_of(plain).means_KD, mixture_of(plain).means_KD)


def test_a_mixture_samples_itself():
    law = Mixture(torch.tensor([[0.0, 0.0], [10.0, 0.0]], dtype=torch.float64), 1.0, torch.tensor([0.25, 0.75], dtype=torch.float64))
    points, component = law.sample(40_000, torch.Generator().manual_seed(0))
    mean, deviation = law.moments()
    torch.testing.assert_close(points.mean(0), mean, atol=0.1, rtol=0)
    assert math.sqrt(float(points.var(0).mean())) == pytest.approx(deviation, rel=0.01)
    assert float((component == 1).double().mean()) == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        (two_moons, {"count": 0}),
        (two_moons, {"noise": -1.0}),
        (two_moons, {"labels": "class"}),
        (two_moons, {"labels": 3}),
        (two_moons, {"labels": True}),
        (gaussian_grid, {"side": 0}),
        (gaussian_grid, {"side": 2.5}),
        (gaussian_grid, {"std": 0.0}),
        (gaussian_grid, {"weights_ratio": 0.5}),
        (gaussian_grid, {"scale": 0.0}),
        (gaussian_ring, {"modes": -1}),
        (gaussian_ring, {"radius": math.nan}),
        (gaussian_ring, {"test": 0}),
        (checkerboard, {"width": 0.0}),
    ],
)
def test_what_is_not_possible_is_refused_by_name(source, wrong):
    with pytest.raises(InputError) as caught:
        build(Component(target=f"limbeck.data.points:{source.__name__}", args={"count": 10, "test": 5} | wrong), {}, "data source")
    assert caught.value.where == next(iter(wrong))
    assert caught.value.fix
