"""What INFER is compared with: how many images, which labels, which noise, and that SRe2L's images learn under the same objective."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.claims.studies.infer import NoiseCompensators, SoftReal, SRe2L, noise_of_norm
from limbeck.contract import Batch, Clock
from limbeck.data.arrays import ArrayData
from limbeck.errors import InputError
from limbeck.methods.datasets.infer import INFER
from limbeck.models.outputs import mean_logits
from limbeck.synthetic.batch_statistics import matching_loss, tapped
from limbeck.teachers.module import EnsembleTeacher
from limbeck.train.config import TrainConfig
from limbeck.train.trainer import Trainer

C, SHAPE = 5, (1, 4, 6)


class Net(nn.Module):
    """A convolution, a norm, a linear head."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4 * 24, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.softplus(self.norm(self.conv(x))).flatten(1))


def made(kind: type[INFER], steps: int = 5, **knobs) -> INFER:
    images = torch.rand(60, *SHAPE, generator=torch.Generator().manual_seed(3))
    data = ArrayData(images, torch.arange(60) % C, mean=(0.5,), std=(0.2,))
    method = kind(**knobs).bind(student=Net(9), teacher=EnsembleTeacher([Net(1), Net(2)]), train=data, num_classes=C, seed=0)
    Trainer(method, data, TrainConfig(steps=steps), seed=0, cpu=True).fit()
    return method


def test_noise_has_the_norms_that_were_learned_and_is_labelled_as_noise():
    infer, noise = made(INFER, images_per_class=4), made(NoiseCompensators, images_per_class=4)
    learned, random = (method.synthetic.patterns.detach().flatten(1) for method in (infer, noise))
    torch.testing.assert_close(random.norm(dim=1), learned.norm(dim=1))
    assert torch.cosine_similarity(random, learned).abs().max() < 0.7
    assert torch.equal(noise.synthetic.images, infer.synthetic.images)
    images, targets = noise.synthetic.expanded()
    torch.testing.assert_close(targets, mean_logits(noise.members, images), rtol=1e-4, atol=1e-5)


def test_noise_of_a_norm_is_gaussian():
    found = noise_of_norm(torch.ones(3, 40, 50), torch.Generator().manual_seed(0))
    assert found.std().item() == pytest.approx(1, abs=0.03)
    assert found.mean().item() == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize(("extra", "classes"), [(0, []), (2, [0, 2]), (5, [0, 1, 2, 3, 4])])
def test_real_images_with_soft_labels(extra, classes):
    method = made(SoftReal, images_per_class=3, extra_images=extra)
    images, targets = method.synthetic.expanded()
    known = {image.numpy().tobytes(): int(label) for image, label in zip(method.data.prepare(method.data.inputs), method.labels, strict=True)}
    assert [known[image.numpy().tobytes()] for image in images.detach()] == list(range(C)) * 3 + classes
    assert len({image.numpy().tobytes() for image in images.detach()}) == len(images)
    torch.testing.assert_close(targets, mean_logits(method.members, images).detach(), rtol=1e-4, atol=1e-5)


def test_the_groups_of_infer_are_among_the_real_images_of_as_many():
    infer, real = made(INFER, images_per_class=4), made(SoftReal, images_per_class=2)
    assert torch.equal(infer.synthetic.images, real.synthetic.images)


def test_more_extra_images_than_classes_are_refused():
    with pytest.raises(InputError, match="extra"):
        made(SoftReal, images_per_class=3, extra_images=6)


def test_the_gradient_of_sre2l_is_that_of_each_group_alone():
    method = made(SRe2L, steps=0, images_per_class=3, shift=1)
    (update,) = method.updates(Batch(torch.empty(4, 0)), Clock(step=2))
    found = torch.autograd.grad(update.loss, method.synthetic.images)[0].view(3, C, *SHAPE)
    for k, m in ((0, 0), (1, 1), (2, 0)):
        own = method.synthetic.images.detach().view(3, C, *SHAPE)[k].clone().requires_grad_()
        with tapped(method.members[m]) as fired:
            logits = method.members[m](own.roll(method.shifts(k, m, Clock(step=2)), (2, 3)))
        loss = F.cross_entropy(logits, torch.arange(C)) + matching_loss(fired).sum()
        torch.testing.assert_close(found[k], torch.autograd.grad(loss, own)[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("start", ["noise", "real"])
def test_sre2ls_images_are_learned_within_the_pixels_range_and_labelled(start):
    before, after = (made(SRe2L, steps=steps, images_per_class=2, shift=0, start=start, statistics_weight=0.0) for steps in (0, 60))
    entropy = []
    for method in (before, after):
        (update,) = method.updates(Batch(torch.empty(4, 0)), Clock())
        entropy.append(float(update.metrics["cross_entropy"].detach()))
    assert entropy[1] < 0.8 * entropy[0]
    pixels = after.synthetic.images.detach() * 0.2 + 0.5
    assert pixels.min() >= -1e-6
    assert pixels.max() <= 1 + 1e-6
    images, targets = after.synthetic.expanded()
    assert images.shape == (2 * C, *SHAPE)
    torch.testing.assert_close(targets, mean_logits(after.members, images).detach(), rtol=1e-4, atol=1e-5)
