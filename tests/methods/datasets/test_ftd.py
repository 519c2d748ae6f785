"""FTD: the images' average, MTT as its special case, the experts that the paper means, and what it tells."""

import pytest
import torch
from torch import Tensor, nn

from limbeck.contract import Batch, Clock, OptimiserSpec
from limbeck.data.arrays import ArrayData
from limbeck.errors import InputError
from limbeck.methods.datasets.ftd import FTD
from limbeck.synthetic.flat import FlatNetwork
from limbeck.train.config import TrainConfig
from limbeck.train.trainer import Trainer


def network(seed: int) -> nn.Module:
    """A linear layer on 1 × 4 × 4 images."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 2))


class Experts:
    """One expert that goes straight on, half a unit of random direction an epoch."""

    count, epochs, size = 1, 4, 34

    def weights(self, expert: int, epoch: int) -> Tensor:
        step = torch.randn(34, generator=torch.Generator().manual_seed(1))
        return FlatNetwork(network(3)).vector() + epoch * 0.5 * step / step.norm()


def bound(**knobs) -> FTD:
    draw = torch.Generator().manual_seed(0)
    data = ArrayData(torch.randn(40, 1, 4, 4, generator=draw), torch.arange(40) % 2)
    knobs = {"steps": 3, "expert_epochs": 1, "latest_start": 3, "step_size": 0.1, "augment": None, **knobs}
    return FTD(**knobs).bind(student=network(0), teacher=Experts(), train=data, num_classes=2)


def trained(method: FTD, steps: int, folder=None) -> tuple[list[Tensor], list[str]]:
    """The images after every outer step, and what was told."""
    seen: list[Tensor] = []
    after = method.after_step

    def watched(player: str, clock: Clock) -> None:
        after(player, clock)
        if player == "images":
            seen.append(method.synthetic.images.detach().clone())

    method.after_step = watched  # type: ignore[method-assign]
    config = TrainConfig(steps=steps, optimiser=OptimiserSpec(name="sgd", lr=2.0, momentum=0.5), batch_size=1, log_every=5)
    return seen, Trainer(method, method.data, config, folder=folder, cpu=True).fit().notes


def test_what_comes_out_is_the_average_of_all_steps() -> None:
    method = bound(image_ema=0.8)
    seen, _ = trained(method, 12)
    average = seen[0]
    for images in seen[1:]:
        average = 0.8 * average + 0.2 * images  # (11)
    torch.testing.assert_close(method.synthetic.images.detach(), average)
    assert not torch.allclose(average, seen[-1], atol=1e-4)
    torch.testing.assert_close(method.artefact().module.images.detach(), average)


def test_without_an_average_it_is_mtt_and_the_last_images_come_out() -> None:
    method, averaged = bound(image_ema=0.0), bound(image_ema=0.8)
    assert method.players()["images"].ema is None
    assert averaged.players()["images"].ema == 0.8
    assert averaged.players()["step_size"].ema is None
    seen, _ = trained(method, 6)
    assert torch.equal(method.synthetic.images.detach(), seen[-1])
    assert all(torch.equal(a, b) for a, b in zip(seen, trained(averaged, 6)[0], strict=True)), "the average does not feed back"


def test_the_step_size_is_the_last_one_not_averaged() -> None:
    method, plain = bound(image_ema=0.9), bound(image_ema=0.0)
    trained(method, 6)
    trained(plain, 6)
    assert method.facts()["step_size"] == plain.facts()["step_size"] != pytest.approx(0.1, abs=1e-9)


def test_an_average_of_the_first_images_is_told() -> None:
    (told,) = [note for note in trained(bound(image_ema=0.999), 20)[1] if "average" in note]
    assert "98% of the first" in told
    assert "image_ema" in told
    assert not any("average" in note for kappa in (0.8, 0.0) for note in trained(bound(image_ema=kappa), 20)[1])


def test_nothing_is_told_before_the_end() -> None:
    method = bound(image_ema=0.999)
    list(method.updates(Batch(torch.empty(1, 0)), Clock(steps=20)))
    assert method.notice({"progress": 0.5}) == []
    assert len(method.notice({"progress": 1.0})) == 1


def test_a_restart_goes_on_with_the_average(tmp_path) -> None:
    whole, first, second = bound(image_ema=0.8), bound(image_ema=0.8), bound(image_ema=0.8)
    trained(whole, 8, tmp_path / "whole")
    optimiser = OptimiserSpec(name="sgd", lr=2.0, momentum=0.5)
    config = TrainConfig(steps=8, optimiser=optimiser, batch_size=1, log_every=5, checkpoint_steps=3, keep=9)
    Trainer(first, first.data, config, folder=tmp_path / "cut", cpu=True).fit()
    for later in ("step-6", "step-8"):
        (tmp_path / "cut" / "checkpoints" / later).rename(tmp_path / later)
    Trainer(second, second.data, config, folder=tmp_path / "cut", cpu=True).fit()
    assert torch.equal(whole.synthetic.images, second.synthetic.images)
    assert torch.equal(whole.synthetic.step_size, second.synthetic.step_size)


def test_the_knob_is_bounded() -> None:
    with pytest.raises(InputError, match="less than 1"):
        FTD(image_ema=1.0)
