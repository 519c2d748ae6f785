"""Denoisers and generators by name: what recipes and artefacts build, and what they are told when it cannot be."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from limbeck.components import Component, build
from limbeck.diffusion.build import direct_generator, generator, mixture_denoiser, mlp_denoiser, mlp_generator, schedule_of, unet_denoiser
from limbeck.diffusion.denoisers import NetworkDenoiser
from limbeck.diffusion.generator import DirectGenerator, Generator
from limbeck.diffusion.schedules import EDM, SCHEDULES
from limbeck.errors import InputError
from limbeck.models import CATALOGUE

INNER: dict[str, Any] = {"name": "mlp_denoiser", "args": {"widths": [8]}}


def test_schedules_by_name_or_with_options() -> None:
    for name in SCHEDULES:
        assert schedule_of(name).name == name
        assert schedule_of({"name": name}).name == name
    assert schedule_of({"name": "edm", "t_max": 10}).t_max == 10


@pytest.mark.parametrize("schedule", [*sorted(SCHEDULES), {"name": "edm", "t_max": 10.0}])
@pytest.mark.parametrize(
    "settings", [{}, {"prediction": "eps", "precondition": "none"}, {"prediction": "velocity", "precondition": "none"}, {"precondition": "consistency"}]
)
def test_perceptrons_of_every_schedule_answer(schedule: Any, settings: dict[str, Any]) -> None:
    made = mlp_denoiser((2,), 3, [8], schedule=schedule, **settings)
    t = torch.tensor([made.schedule.t_min, made.schedule.t_max], dtype=torch.float64)
    for cond in (None, torch.tensor([0, 3])):
        x = made(torch.randn(2, 2), t, cond)
        assert x.shape == (2, 2)
        assert x.isfinite().all()
    assert (made.shape, made.num_classes) == ((2,), 3)


def test_u_nets_and_what_is_passed_on() -> None:
    made = unet_denoiser((1, 8, 8), 10, width=8, schedule="flow", prediction="velocity", precondition="none", conditional=False, sigma_data=0.4)
    assert made(torch.randn(2, 1, 8, 8), torch.tensor([0.1, 0.9], dtype=torch.float64)).shape == (2, 1, 8, 8)
    assert (made.num_classes, made.prediction, made.precondition, made.sigma_data) == (0, "velocity", "none", 0.4)
    assert mlp_denoiser((2,), 4, [8], conditional=False).num_classes == 0


@pytest.mark.parametrize(
    ("schedule", "precondition", "expected"),
    [("vp", "none", "positional"), ("flow", "none", "positional"), ("edm", "none", "smooth"), ("trig", "none", "smooth"), ("vp", "edm", "smooth")],
)
def test_the_embedding_suits_the_time_that_the_network_is_given(schedule: str, precondition: Any, expected: str) -> None:
    made = mlp_denoiser((2,), 0, [8], schedule=schedule, precondition=precondition)
    assert made.network.time.embedding == expected  # type: ignore[union-attr]
    assert mlp_denoiser((2,), 0, [8], schedule=schedule, precondition=precondition, embedding="fourier").network.time.embedding == "fourier"  # type: ignore[union-attr]


def test_mixtures() -> None:
    made = mixture_denoiser([[0.0, 1.0], [2.0, 3.0]], 0.1, [1.0, 3.0], [0, 1], schedule="flow")
    assert made.stds.tolist() == pytest.approx([0.1, 0.1])
    assert made.log_weights.exp().tolist() == pytest.approx([0.25, 0.75])
    assert (made.num_classes, made.shape, made.schedule.name) == (2, (2,), "flow")
    assert mixture_denoiser([[0.0], [1.0]], [0.1, 0.2]).stds.tolist() == pytest.approx([0.1, 0.2])
    assert mixture_denoiser([[0.0], [1.0]], 1).num_classes == 0


def test_a_map_from_noise_starts_at_its_offset() -> None:
    made = mlp_generator((2,), 0, [8], offset=[3.0, -1.0])
    plain = mlp_generator((2,), 0, [8])
    plain.load_state_dict(made.state_dict() | {"offset": torch.zeros(2)})
    z = torch.randn(4, 2)
    torch.testing.assert_close(made(z), plain(z) + torch.tensor([3.0, -1.0]))
    assert made.offset.requires_grad
    image = mlp_generator((3, 4, 4), 2, [8], offset=[1.0, 2.0, 3.0])
    assert image(torch.randn(5, 3, 4, 4), torch.tensor([0, 1, 0, 1, 2])).shape == (5, 3, 4, 4)


def test_components_of_the_catalogue_build_generators_and_give_equal_samples() -> None:
    made = build(Component(name="generator", args={"denoiser": INNER, "times": [80.0, 1.0]}), CATALOGUE, "model", num_classes=2, input_shape=(2,))
    assert isinstance(made, Generator)
    torch.nn.init.normal_(made.denoiser.network.head.weight)  # type: ignore[union-attr,arg-type]
    again = build(Component(name="generator", args={"denoiser": INNER, **made.arguments}), CATALOGUE, "model", num_classes=2, input_shape=(2,))
    again.load_state_dict(made.state_dict())
    assert torch.equal(made.sample(6, seed=2), again.sample(6, seed=2))

    inner = {"name": "mlp_generator", "args": {"widths": [8]}}
    scale = {"mean": [0.5, 0.5], "std": [2.0, 2.0], "bounded": False}
    direct = build(Component(name="direct_generator", args={"module": inner, "scale": scale}), CATALOGUE, "model", num_classes=2, input_shape=(2,))
    assert isinstance(direct, DirectGenerator)
    assert direct.num_classes == 2
    other = build(Component(name="direct_generator", args={"module": inner, **direct.arguments}), CATALOGUE, "model", num_classes=2, input_shape=(2,))
    other.load_state_dict(direct.state_dict())
    assert torch.equal(direct.sample(6, seed=2), other.sample(6, seed=2))


CASES: list[tuple[Callable[[], object], str]] = [
    (lambda: schedule_of("edn"), "schedule"),
    (lambda: schedule_of({"t_max": 1.0}), "schedule"),
    (lambda: schedule_of(3), "schedule"),  # type: ignore[arg-type]
    (lambda: schedule_of({"name": "edm", "beta": 1}), "schedule"),
    (lambda: mlp_denoiser((2,), 0, []), "widths"),
    (lambda: mlp_denoiser((2,), 0, [8], prediction="v", precondition="none"), "prediction"),
    (lambda: mlp_denoiser((2,), 0, [8], prediction="eps"), "prediction"),
    (lambda: mlp_denoiser((2,), 0, [8], sigma_data=-1.0), "sigma_data"),
    (lambda: unet_denoiser((2,), 0), "shape"),
    (lambda: mixture_denoiser([[0.0], [1.0, 2.0]], 0.1), "means"),
    (lambda: mixture_denoiser([], 0.1), "means"),
    (lambda: mixture_denoiser([[0.0], [1.0]], [0.1]), "means"),
    (lambda: mixture_denoiser([[0.0], [1.0]], -0.1), "means"),
    (lambda: mixture_denoiser([[0.0], [1.0]], 0.1, [1.0]), "weights"),
    (lambda: mixture_denoiser([[0.0], [1.0]], 0.1, None, [0]), "classes"),
    (lambda: mixture_denoiser([[0.0], [1.0]], 0.1, None, [0, 2]), "classes"),
    (lambda: mlp_generator((2,), 0, [8], offset=[1.0]), "offset"),
    (lambda: generator(INNER, [1.0, 2.0], 0, (2,)), "levels"),
    (lambda: generator(INNER, [100.0], 0, (2,)), "times"),
    (lambda: generator(INNER, [1.0], 0, (2,), mode="heun"), "mode"),  # type: ignore[arg-type]
    (lambda: generator(INNER, [1.0], 0, (2,), scale={"mena": [1.0]}), "scale"),
    (lambda: generator({"target": "limbeck.diffusion.build:mlp_generator"}, [1.0], 2, (2,)), "denoiser"),
    (lambda: generator({"args": {}}, [1.0], 2, (2,)), "denoiser"),
    (lambda: generator({"name": "mlp_denoizer"}, [1.0], 2, (2,)), "denoiser.name"),
    (lambda: generator({"name": "mlp_denoiser", "args": {"width": 3}}, [1.0], 2, (2,)), "denoiser.args.width"),
    (lambda: direct_generator({"target": "limbeck.diffusion.build:schedule_of", "args": {"schedule": "edm"}}, 2, (2,)), "module"),
    (lambda: direct_generator({"name": "mlp_generator"}, 0, (2,), scale={"x": 1}), "scale"),
]


@pytest.mark.parametrize(("call", "where"), CASES)
def test_what_cannot_be_built_is_told(call: Callable[[], object], where: str) -> None:
    with pytest.raises(InputError) as caught:
        call()
    assert caught.value.where == where
    assert isinstance(mlp_denoiser((2,), 0, [8]), NetworkDenoiser)
    assert isinstance(mlp_denoiser((2,), 0, [8]).schedule, EDM)
