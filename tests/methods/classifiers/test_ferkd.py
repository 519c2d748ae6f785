"""FerKD on a record in memory: FKD to the bit, label smoothing, regions, SelfMix, and no teacher in the training."""

import json
import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from limbeck import losses
from limbeck.contract import IGNORE, Batch, Clock, Update
from limbeck.data import ArrayData, AugmentSpec, Views, ViewSpec
from limbeck.errors import InputError
from limbeck.methods.classifiers import ferkd, ferkd_part
from limbeck.methods.classifiers.ferkd import FerKD
from limbeck.train import TrainConfig, Trainer

N, V, C = 40, 12, 10
SETTINGS = settings(deadline=None, max_examples=20)
SEEDS = st.integers(0, 2**31)
FKD = {"low": 0.0, "middle": 0.0, "top": 1.0}


@dataclass
class Record:
    """What a RecordTeacher offers to a method: rows to look up. [N, V, T, C] logits; asking it for logits is a fault here."""

    kept: Tensor
    is_record: bool = True
    largest: int = 0

    @property
    def num_views(self) -> int:
        return self.kept.shape[1]

    def lookup(self, ids_B: Tensor, views_B: Tensor) -> dict[str, Tensor]:
        self.largest = max(self.largest, len(ids_B))
        return {"logits": self.kept[ids_B, views_B]}

    def logits(self, batch: Batch) -> Tensor:
        raise AssertionError("the teacher was called")

    all_logits = logits


@dataclass
class Labels:
    targets: Tensor | None
    classes: tuple[str, ...] = ()
    count: int = N

    def __len__(self) -> int:
        return self.count if self.targets is None else len(self.targets)


class Bare(nn.Module):
    """Logits are the parameter and do not look at the inputs: gradients at the logits can be read off."""

    def __init__(self, logits_BC: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits_BC)
        self.shown: Tensor | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        self.shown = inputs
        return self.logits * 1.0


def noise(seed: int, *shape: int) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels(seed: int = 0) -> Labels:
    return Labels(torch.randint(C, (N,), generator=torch.Generator().manual_seed(seed)))


def bound(seed: int = 0, data: Labels | None = None, members: int = 1, **knobs) -> FerKD:
    data = data or labels(seed)
    return FerKD(**knobs).bind(student=Bare(noise(seed + 1, 8, C)), teacher=Record(noise(seed, len(data), V, members, C)), train=data, num_classes=C, seed=seed)


def batch_of(method: FerKD, images: int = 2, crops: int = 4) -> Batch:
    """The first usable crops of the first images, n side by side."""
    ids = torch.arange(images).repeat_interleave(crops)
    views = torch.cat([method.usable_NV[i].nonzero()[:, 0].repeat(crops)[:crops] for i in range(images)])
    targets = None if method.train_data.targets is None else method.train_data.targets[ids]
    return Batch(noise(99, len(ids), 3, 8, 8), targets, ids, views, method.teacher.lookup(ids, views))


def only(method: FerKD, batch: Batch, clock: Clock | None = None) -> Update:
    (update,) = method.updates(batch, clock or Clock())
    return update


# ---- the loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["quantile", "score"])
@given(seed=SEEDS, members=st.integers(1, 3))
@SETTINGS
def test_without_thresholds_it_is_fkd_to_the_bit(unit: str, seed: int, members: int) -> None:
    method = bound(seed, members=members, thresholds=unit, **FKD)
    assert method.usable_NV.all()
    assert (method.region_NV == ferkd_part.SOFT).all()
    batch, z = batch_of(method), method.student.logits
    q = torch.softmax(batch.recorded["logits"].transpose(0, 1), -1).mean(0)
    expected = losses.soft_cross_entropy(z, q)
    found = only(method, batch).loss
    assert torch.equal(found, expected)
    assert torch.equal(*(torch.autograd.grad(loss, z)[0] for loss in (found, expected)))


@given(SEEDS, st.floats(0, 0.9))
@SETTINGS
def test_with_everything_in_the_hard_region_it_is_label_smoothing(seed: int, epsilon: float) -> None:
    method = bound(seed, low=0.0, middle=1.1, top=1.0, thresholds="score", smoothing=epsilon)
    batch, z = batch_of(method), method.student.logits
    truth = F.one_hot(batch.targets, C).float()
    torch.testing.assert_close(only(method, batch).loss, losses.soft_cross_entropy(z, (1 - epsilon) * truth + epsilon / (C - 1) * (1 - truth)))


@given(SEEDS)
@SETTINGS
def test_the_gradient_is_student_minus_label_over_b_and_the_loss_is_at_least_the_entropy(seed: int) -> None:
    method = bound(seed)
    batch, z = batch_of(method), method.student.logits
    y, _ = method.labels(batch)
    update = only(method, batch)
    torch.testing.assert_close(torch.autograd.grad(update.loss, z)[0], (torch.softmax(z, -1) - y) / len(batch), rtol=1e-4, atol=1e-6)
    divergence = F.kl_div(torch.log_softmax(z, -1), y, reduction="batchmean")
    torch.testing.assert_close(update.loss - torch.special.entr(y).sum(-1).mean(), divergence, rtol=1e-4, atol=1e-5)
    assert divergence >= 0


def test_the_temperature_divides_the_students_logits_alone() -> None:
    method = bound(temperature=2.0, **FKD)
    batch = batch_of(method)
    q = torch.softmax(batch.recorded["logits"][:, 0], -1)
    torch.testing.assert_close(only(method, batch).loss, losses.soft_cross_entropy(method.student.logits / 2, q))


@pytest.mark.parametrize("label_type", ["hard", "smoothing", "marginal_smoothing", "marginal_renorm"])
def test_recorded_labels_can_be_quantised_further_and_keep_their_regions(label_type: str) -> None:
    method, plain = bound(label_type=label_type, k=3, **FKD), bound(**FKD)
    batch = batch_of(method)
    q = torch.softmax(batch.recorded["logits"][:, 0], -1)
    found, _ = method.labels(batch)
    assert torch.equal(found, ferkd_part.recover(ferkd_part.quantise(q, label_type, 3), label_type, C))
    assert not torch.equal(found, q)
    assert method.facts() == plain.facts()


# ---- the regions ---------------------------------------------------------------------------------------------------------


def test_defaults_are_quantiles_and_the_regions_follow_the_recorded_scores() -> None:
    method = bound()
    s = torch.softmax(method.teacher.kept[:, :, 0], -1).amax(-1)
    ordered = s.flatten().sort().values
    low, middle, top = (float(ordered[round(share * (N * V - 1))]) for share in (0.05, 0.2, 0.99))
    assert (method.low, method.middle, method.top) == pytest.approx((low, middle, top), abs=1e-7)
    expected = torch.where((s < low) | (s > top), ferkd_part.DISCARD, torch.where(s < middle, ferkd_part.HARD, ferkd_part.SOFT))
    assert torch.equal(method.region_NV.long(), expected)
    assert torch.equal(method.usable_NV, expected != ferkd_part.DISCARD)
    facts = method.facts()
    assert facts["shares"]["discarded_hard"] == pytest.approx(0.05, abs=0.003)
    assert facts["shares"]["discarded_easy"] == pytest.approx(0.01, abs=0.003)
    assert sum(facts["shares"].values()) == pytest.approx(1)
    assert facts["mean_score"] == pytest.approx(float(s.mean()))
    assert facts["images_without_usable_crop"] == 0
    assert facts["views"] == V


def test_the_phase_shows_n_usable_views_of_a_sample() -> None:
    method = bound(crops=3)
    (phase,) = method.phases()
    assert phase.views_per_sample == 3
    assert torch.equal(phase.usable, method.usable_NV)
    assert phase.usable.shape == (N, V)


def test_single_crops_come_last_unless_told_otherwise() -> None:
    assert [next(iter(bound(**knobs).phases())).single_last for knobs in ({}, {"crops": 3}, {"crops": 1}, {"single_last": False})] == [4, 3, 0, 0]


def test_a_batch_takes_its_labels_by_region() -> None:
    method = bound()
    ids, views = (method.region_NV != ferkd_part.DISCARD).nonzero().T
    batch = Batch(torch.zeros(len(ids), 1), method.train_data.targets[ids], ids, views, method.teacher.lookup(ids, views))
    found, region = method.labels(batch)
    hard = region == ferkd_part.HARD
    assert 0 < hard.sum() < len(ids)
    assert torch.equal(found[~hard], torch.softmax(batch.recorded["logits"][:, 0], -1)[~hard])
    assert torch.equal(found[hard], ferkd_part.smoothed_truth(batch.targets[hard], C, 0.1))
    method.student = Bare(noise(5, len(ids), C))
    torch.testing.assert_close(only(method, batch).metrics["truth_share"], hard.float().mean())


def test_the_score_can_be_the_labels_probability() -> None:
    method = bound(score="label", thresholds="score", low=0.01, middle=0.1, top=1.0)
    q = torch.softmax(method.teacher.kept[:, :, 0], -1)
    s = q.gather(-1, method.train_data.targets[:, None, None].expand(N, V, 1))[..., 0]
    rows = (s >= 0.01).any(1)
    assert torch.equal(method.usable_NV[rows], (s >= 0.01)[rows])
    assert (method.region_NV[s >= 0.1] == ferkd_part.SOFT).all()


def test_the_record_is_read_in_pieces_and_the_pieces_do_not_matter(monkeypatch) -> None:
    whole = bound()
    monkeypatch.setattr(ferkd, "_ROWS", 50)
    pieces = bound()
    assert pieces.teacher.largest == 48
    assert torch.equal(pieces.region_NV, whole.region_NV)
    assert pieces.facts() == whole.facts()


def test_images_without_a_usable_crop_keep_their_best_with_the_truth() -> None:
    kept = noise(0, N, V, 1, C)
    kept[3] = 0.01 * noise(1, V, 1, C)  # the teacher knows nothing about image 3
    method = FerKD(low=0.3, middle=0.3, top=1.0, thresholds="score").bind(student=Bare(noise(2, 8, C)), teacher=Record(kept), train=labels())
    best = int(torch.softmax(kept[3, :, 0], -1).amax(-1).argmax())
    assert method.usable_NV[3].nonzero().flatten().tolist() == [best]
    assert method.region_NV[3, best] == ferkd_part.HARD
    assert method.usable_NV.any(1).all()
    assert method.facts()["images_without_usable_crop"] == 1


def test_unlabelled_images_lose_their_hard_crops_and_need_no_label() -> None:
    data = labels()
    data.targets[::2] = IGNORE
    method = bound(data=data)
    assert not (method.region_NV[::2] == ferkd_part.HARD).any()
    assert (method.region_NV[1::2] == ferkd_part.HARD).any()
    assert method.usable_NV.any(1).all()
    shares = method.facts()["shares"]
    assert sum(shares.values()) < 1  # the hard crops of the unlabelled images are neither too hard nor too easy
    batch = batch_of(method)
    assert torch.isfinite(only(method, batch).loss)


def test_fkd_needs_no_labels_and_ferkd_does() -> None:
    method = bound(data=Labels(None), **FKD)
    batch = batch_of(method)
    assert batch.targets is None
    assert torch.isfinite(only(method, batch).loss)
    bound(data=Labels(None), low=0.05, middle=0.05, top=0.99)  # leaving crops out takes no labels
    for knobs in ({}, {**FKD, "score": "label"}):
        with pytest.raises(InputError, match="learns from labels"):
            bound(data=Labels(None), **knobs)


# ---- SelfMix -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", ["mixup", "cutmix", "both"])
def test_lone_crops_are_not_mixed(mix: str) -> None:
    method = bound(mix=mix, crops=1)
    batch = batch_of(method, images=8, crops=1)
    x, y = method.mixed(batch, method.labels(batch)[0], Clock())
    assert torch.equal(x, batch.inputs)
    assert torch.equal(y, method.labels(batch)[0])


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_crops_are_mixed_with_the_next_of_their_image_and_the_labels_after_recovery(mix: str) -> None:
    method = bound(mix=mix, label_type="hard", **FKD)
    batch = batch_of(method)
    y, _ = method.labels(batch)
    mates = torch.tensor([1, 2, 3, 0, 5, 6, 7, 4])
    x, mixed = method.mixed(batch, y, Clock(step=3))
    moved = (y != y[mates]).any(-1)
    keep = ((mixed - y[mates]) / (y - y[mates]))[(y != y[mates])]
    assert moved.any()
    assert torch.allclose(keep, keep[0].expand_as(keep), atol=1e-5)
    if mix == "mixup":
        torch.testing.assert_close(x, keep[0] * batch.inputs + (1 - keep[0]) * batch.inputs[mates], rtol=1e-4, atol=1e-4)
    else:
        assert ((x == batch.inputs) | (x == batch.inputs[mates])).all()
        torch.testing.assert_close((x == batch.inputs).float().mean(), keep[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed.sum(-1), torch.ones(8))
    only(method, batch, Clock(step=3))
    assert torch.equal(method.student.shown, x)  # the student sees the mixture


def test_both_takes_each_half_of_the_time_and_follows_the_clock_alone() -> None:
    method = bound(mix="both", **FKD)
    batch = batch_of(method)
    y, _ = method.labels(batch)
    mates = ferkd_part.same_image_mates(batch.ids)
    kinds = []
    for step in range(200):
        x, mixed = method.mixed(batch, y, Clock(step=step))
        again = method.mixed(batch, y, Clock(step=step))
        assert torch.equal(x, again[0])
        assert torch.equal(mixed, again[1])
        kinds.append(bool(((x == batch.inputs) | (x == batch.inputs[mates])).all()))
    assert 70 < sum(kinds) < 130
    assert not torch.equal(method.mixed(batch, y, Clock(step=0, seed=1))[0], method.mixed(batch, y, Clock(step=0))[0])


def test_ordinary_mixing_crosses_the_images() -> None:
    method = bound(mix="mixup", mates="other_images", **FKD)
    batch = batch_of(method)
    y, _ = method.labels(batch)
    x, mixed = method.mixed(batch, y, Clock(step=1))
    keep = float(((mixed - y.roll(4, 0)) / (y - y.roll(4, 0))).median())
    torch.testing.assert_close(x, keep * batch.inputs + (1 - keep) * batch.inputs.roll(4, 0), rtol=1e-3, atol=1e-3)


# ---- in the engine -------------------------------------------------------------------------------------------------------


class Noting(FerKD):
    """Notes which crops it was shown."""

    def updates(self, batch: Batch, clock: Clock):
        self.seen.append((batch.ids, batch.views))
        yield from super().updates(batch, clock)


def test_the_engine_shows_n_usable_crops_of_an_image_and_single_ones_at_the_end() -> None:
    images = ArrayData(
        torch.randint(0, 256, (N, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8), labels().targets, tuple("abcdefghij")
    )
    record = Record(noise(0, N, V, 1, C))
    record.boxes = lambda ids_B, views_B: None
    method = Noting(low=0.3, middle=0.5, top=0.95).bind(student=nn.Sequential(nn.Flatten(), nn.Linear(192, C)), teacher=record, train=images, num_classes=C)
    method.seen = []
    views = Views(ViewSpec(kind="boxes", count=V), AugmentSpec(), images, record)
    trained = Trainer(method, images, TrainConfig(steps=30, batch_size=16), views=views, num_classes=C, cpu=True).fit()
    assert trained.steps == len(method.seen) == 30
    for step, (ids, shown) in enumerate(method.seen):
        assert method.usable_NV[ids, shown].all()
        groups = ids.view(-1, 4) if step < 18 else ids[:, None]  # 4 passes of ceil(40 / 16) batches with single crops
        assert (groups == groups[:, :1]).all()
        assert len(groups[:, 0].unique()) == len(groups)


# ---- the teacher, and wrong inputs -----------------------------------------------------------------------------------------


def test_training_never_asks_the_teacher() -> None:
    method = bound(mix="both")
    batch, looked = batch_of(method), method.teacher.largest
    method.teacher = None
    update = only(method, batch)
    assert torch.isfinite(update.loss)
    assert looked
    assert set(method.players()) == {"student"}
    assert method.frozen() == []
    assert method.state_dict() == {}
    json.dumps(method.facts(), allow_nan=False)


def test_facts_are_json_where_everything_is_hard() -> None:
    facts = bound(low=0.0, middle=1.5, top=1.0).facts()
    assert facts["shares"]["truth"] == 1
    assert math.isfinite(json.loads(json.dumps(facts))["thresholds"]["middle"])


def test_a_live_teacher_is_refused_with_the_way_out() -> None:
    class Live:
        def logits(self, batch: Batch) -> Tensor:
            return torch.zeros(len(batch), C)

    with pytest.raises(InputError, match="live") as caught:
        FerKD().bind(student=nn.Identity(), teacher=Live(), train=labels())
    assert "limbeck record" in caught.value.fix
    assert caught.value.where == "teacher"


def test_a_record_with_too_few_views_or_no_data_is_refused() -> None:
    with pytest.raises(InputError, match="5 crops of each image, and the record has 2 views"):
        FerKD(crops=5).bind(student=nn.Identity(), teacher=Record(noise(0, N, 2, 1, C)), train=labels())
    with pytest.raises(InputError, match="takes the training data"):
        FerKD().bind(student=nn.Identity(), teacher=Record(noise(0, N, V, 1, C)))
    with pytest.raises(InputError, match="largest of 10 classes"):
        bound(label_type="marginal_renorm", k=11)


def test_a_batch_without_recorded_labels_is_refused() -> None:
    method = bound()
    with pytest.raises(InputError, match="carries no recorded labels"):
        only(method, Batch(torch.zeros(8, 1), torch.zeros(8, dtype=torch.int64), torch.arange(8)))


@pytest.mark.parametrize("knobs", [{"low": 0.9, "top": 0.1}, {"smoothing": 1.0}, {"crops": 0}, {"mix": "everything"}, {"k": 0}, {"temperature": 0}])
def test_impossible_knobs_are_refused(knobs: dict) -> None:
    with pytest.raises(InputError):
        FerKD(**knobs)


def test_a_bare_off_in_yaml_means_off() -> None:
    assert FerKD(**yaml.safe_load("{mix: off}")).config.mix == "off"
