"""Views: the same pixels for the same (sample, view), in every subset, batch, worker and process."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.data import ArrayData, AugmentSpec, BatchPlan, Joined, Views, ViewSpec, draw_boxes, origins, resized_crop, root, stream, subset
from limbeck.data.augment import augment, flip
from limbeck.errors import InputError

BOXES = ViewSpec(kind="boxes", count=6, seed=3)


def images(count: int = 24, size: int = 12) -> ArrayData:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    return ArrayData(pixels, torch.arange(count) % 4, list("abcd"))


def test_the_whole_box_is_the_image_and_two_flips_are_none() -> None:
    data = images()
    whole = torch.tensor([[0.0, 0, 1, 1]]).expand(len(data), 4)
    assert torch.equal(resized_crop(data.inputs, whole, 12, 12), data.inputs)
    floats = data.inputs.float() / 7
    assert torch.equal(resized_crop(floats, whole, 12, 12), floats)
    everyone = torch.ones(len(data), dtype=torch.bool)
    assert torch.equal(flip(flip(data.inputs, everyone), everyone), data.inputs)


def test_a_box_on_pixel_borders_is_torchvisions_resized_crop() -> None:
    vision = pytest.importorskip("torchvision.transforms.functional")
    data = images(4)
    for top, left, height, width in ((0, 0, 6, 6), (3, 2, 6, 8), (5, 7, 7, 5), (0, 4, 12, 3)):
        box = torch.tensor([[top / 12, left / 12, height / 12, width / 12]]).expand(4, 4)
        wanted = vision.resized_crop(data.inputs.float(), top, left, height, width, [12, 12], antialias=False)
        assert torch.allclose(resized_crop(data.inputs.float(), box, 12, 12), wanted, atol=1e-3)
        assert (resized_crop(data.inputs, box, 12, 12).int() - wanted.round().int()).abs().max() <= 1
    larger = resized_crop(data.inputs.float(), torch.tensor([[0.25, 0.25, 0.5, 0.5]]).expand(4, 4), 20, 16)
    assert torch.allclose(larger, vision.resized_crop(data.inputs.float(), 3, 3, 6, 6, [20, 16], antialias=False), atol=1e-3)


@given(st.floats(0.05, 1), st.floats(0.05, 1), st.floats(0.3, 1), st.floats(1, 3), st.booleans())
@settings(max_examples=30, deadline=None)
def test_boxes_lie_inside_and_have_the_area_and_the_ratio_that_was_asked(a: float, b: float, low: float, high: float, flipped: bool) -> None:
    spec = ViewSpec(kind="boxes", count=3, scale=(min(a, b), max(a, b)), ratio=(low, high), flip=flipped)
    boxes, flips = draw_boxes(torch.arange(50).repeat(3), torch.arange(3).repeat_interleave(50), spec)
    top, left, height, width = boxes.double().unbind(1)
    assert (boxes >= 0).all()
    assert (top + height <= 1 + 1e-6).all()
    assert (left + width <= 1 + 1e-6).all()
    assert (width / height <= high * 1.001).all()
    assert (width / height >= low * 0.999).all()
    fallback = (height * width > max(a, b) * 1.001) | (height * width < min(a, b) * 0.999)  # the largest centred box
    assert torch.allclose(top[fallback], ((1 - height) / 2)[fallback], atol=1e-6)
    assert flipped or not flips.any()


def test_a_sample_looks_the_same_whatever_subset_and_batch_it_is_in() -> None:
    data = images()
    part = subset(data, torch.tensor([9, 2, 17, 5]))
    assert origins(part).tolist() == [9, 2, 17, 5]
    assert root(part) is data
    assert origins(subset(part, torch.tensor([3, 0]))).tolist() == [5, 9]
    for spec, policy in ((BOXES, AugmentSpec()), (ViewSpec(count=5, seed=1), AugmentSpec(crop=2, flip=True, noise=0.05, cutout=3))):
        whole, some = Views(spec, policy, data), Views(spec, policy, part)
        views = torch.tensor([[0, 3], [1, 1], [4, 2], [3, 0]])
        a = some.batch(torch.arange(4), views)
        b = whole.batch(torch.tensor([9, 2, 17, 5]), views)
        assert torch.equal(a.inputs, b.inputs)
        assert a.ids is not None
        assert a.ids.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        assert torch.equal(a.targets, b.targets)
        alone = torch.cat([some.batch(torch.tensor([i]), views[i : i + 1, j : j + 1]).inputs for i in range(4) for j in range(2)])
        assert torch.equal(a.inputs, alone)


def test_a_seeded_view_is_the_augmentation_of_that_epoch() -> None:
    data, spec = images(), AugmentSpec(crop=2, flip=True)
    ids = torch.tensor([3, 8, 1])
    shown = Views(ViewSpec(count=4, seed=11), spec, data).batch(ids, torch.full((3, 1), 2)).inputs
    assert torch.equal(shown, augment(data.inputs[ids], None, ids, spec=spec, seed=11, epoch=2, num_classes=4)[0])


def test_seeded_views_come_in_turn_and_boxes_without_replacement() -> None:
    data = images()
    turn = Views(ViewSpec(count=3), AugmentSpec(), data)
    assert [int(turn.draw(torch.tensor([5]), count=1, seed=0, epoch=e)) for e in range(5)] == [0, 1, 2, 0, 1]
    drawn = Views(BOXES, AugmentSpec(), data).draw(torch.arange(24), count=4, seed=0, epoch=0)
    assert all(len(set(row)) == 4 for row in drawn.tolist())
    assert not torch.equal(drawn, Views(BOXES, AugmentSpec(), data).draw(torch.arange(24), count=4, seed=1, epoch=0))


@given(st.integers(0, 2**31), st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_only_usable_views_are_drawn_and_none_twice_while_there_are_enough(seed: int, count: int) -> None:
    usable = torch.rand(24, 6, generator=torch.Generator().manual_seed(seed)) < 0.5
    usable[:, 0] |= ~usable.any(1)
    drawn = Views(BOXES, AugmentSpec(), images()).draw(torch.arange(24), count=count, seed=seed, epoch=1, usable=usable)
    assert drawn.shape == (24, count)
    assert usable.gather(1, drawn).all()
    for row, have in zip(drawn.tolist(), usable.sum(1).tolist(), strict=True):
        assert len(set(row)) == min(count, have)


def test_all_usable_is_the_same_as_no_choice() -> None:
    views = Views(BOXES, AugmentSpec(), images())
    everything = torch.ones(24, 6, dtype=torch.bool)
    assert torch.equal(views.draw(torch.arange(24), count=4, seed=2, epoch=3), views.draw(torch.arange(24), count=4, seed=2, epoch=3, usable=everything))


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_workers_and_restarts_show_the_same_views(workers: int) -> None:
    data = images()
    views = Views(BOXES, AugmentSpec(), data)

    def batches(**how: int) -> list[torch.Tensor]:
        plan = BatchPlan(24, 8, seed=5, views=4)
        shown = stream(data, plan, augment=None, stop=12, num_classes=4, views=views, **{"start": 0, "workers": workers, **how})
        return [torch.cat([torch.stack((b.ids, b.views), 1) for b in micros]) for micros in shown]

    whole = batches()
    assert all(torch.equal(a, b) for a, b in zip(whole[7:], batches(start=7), strict=True))
    both = [torch.cat(pair).tolist() for pair in zip(batches(rank=0, world=2), batches(rank=1, world=2), strict=True)]
    assert [sorted(rows.tolist()) for rows in whole] == [sorted(rows) for rows in both]
    assert all(len(set(rows[:, 0].tolist())) == 2 for rows in whole)  # 8 rows: 2 samples, 4 views of each


def test_the_last_passes_show_one_view_each() -> None:
    plan = BatchPlan(24, 8, seed=5, views=4)
    plan.end_single(2, 18)  # two passes of three batches of eight
    assert [len(plan.ids(step)[1]) for step in (0, 11, 12, 17)] == [2, 2, 8, 8]
    assert [plan.views_at(step) for step in (11, 12)] == [4, 1]
    assert [plan.epoch(step) for step in (0, 11, 12, 14, 15, 17)] == [0, 0, 1, 1, 2, 2]
    last = torch.cat([plan.ids(step)[1] for step in (12, 13, 14)])
    assert sorted(last.tolist()) == list(range(24))


def test_a_pool_stands_behind_the_data_without_labels() -> None:
    first, second = images(5), images(7)
    joined = Joined(first, second)
    assert len(joined) == 12
    assert joined.targets is not None
    assert joined.targets.tolist() == [0, 1, 2, 3, 0] + [-100] * 7
    raw, targets = joined.fetch(torch.tensor([6, 0, 11, 4]))
    assert torch.equal(raw, torch.stack((second.inputs[1], first.inputs[0], second.inputs[6], first.inputs[4])))
    assert targets is not None
    assert targets.tolist() == [-100, 0, -100, 0]
    with pytest.raises(InputError, match="its inputs are"):
        Joined(first, images(3, size=8))


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: Views(ViewSpec(count=2), AugmentSpec(mixup=1.0), images()), "cannot be mixed"),
        (lambda: Views(BOXES, AugmentSpec(flip=True), images()), "all that is done"),
        (lambda: Views(BOXES, AugmentSpec(), ArrayData(torch.zeros(4, 3))).batch(torch.arange(4), torch.zeros(4, 1, dtype=torch.int64)), "boxes need images"),
        (lambda: BatchPlan(24, 10, seed=0, views=4), "cannot hold 4 views"),
    ],
)
def test_what_cannot_be_is_said(build, said: str) -> None:
    with pytest.raises(InputError, match=said):
        build()
