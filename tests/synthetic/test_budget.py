"""Bytes, and how many real images a budget leaves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.errors import InputError
from limbeck.synthetic.budget import Budget, compensated_groups, compensated_images_per_class, image_bytes, index_bytes, label_bytes


@pytest.mark.parametrize(
    ("classes", "teachers", "per_class", "groups", "patterns", "samples"),
    [(100, 4, 10, 9, 36, 45), (100, 4, 50, 48, 192, 240), (10, 4, 10, 7, 28, 35), (1000, 3, 10, 9, 27, 36), (100, 2, 5, 4, 8, 12)],
)
def test_the_published_table_of_groups(classes: int, teachers: int, per_class: int, groups: int, patterns: int, samples: int) -> None:
    found = compensated_groups(per_class, teachers, classes)
    assert (found, found * teachers, found * (teachers + 1)) == (groups, patterns, samples)


@given(st.integers(1, 500), st.integers(0, 20), st.integers(1, 2000))
def test_groups_are_the_most_that_the_budget_pays_for(per_class: int, teachers: int, classes: int) -> None:
    try:
        found = compensated_groups(per_class, teachers, classes)
    except InputError:
        found = 0
    assert found * (classes + teachers) <= per_class * classes < (found + 1) * (classes + teachers)  # exact: K (1 + M/C) ≤ ipc < (K + 1)(1 + M/C)
    assert compensated_images_per_class(found, teachers, classes) <= per_class * (1 + 1e-12)


def test_too_small_a_budget_says_what_would_do() -> None:
    with pytest.raises(InputError, match="Use 2 or more") as caught:
        compensated_groups(1, 2, 10)
    assert compensated_groups(2, 2, 10) == 1
    assert caught.value.where == "images_per_class"


@pytest.mark.parametrize(("size", "expected"), [(1, 0), (2, 1), (10, 1), (256, 1), (257, 2), (1000, 2), (65536, 2), (65537, 3)])
def test_an_index_takes_the_least_whole_bytes(size: int, expected: int) -> None:
    assert index_bytes(size) == expected


def test_label_bytes_by_policy() -> None:
    assert label_bytes(50, 10) == 50
    assert label_bytes(50, 1000) == 100
    assert label_bytes(50, 10, "static") == label_bytes(50, 10, "dynamic") == 50 * 10 * 4  # of one epoch
    assert label_bytes(50, 10, "dynamic", epochs=7, number_bytes=2) == 7 * 50 * 10 * 2
    assert label_bytes(50, 10, "static", epochs=7) == label_bytes(50, 10, "static")  # an epoch count changes nothing there


@given(st.integers(1, 1000), st.integers(2, 1000), st.integers(2, 300))
def test_static_labels_are_smaller_than_dynamic_ones(count: int, classes: int, epochs: int) -> None:
    assert label_bytes(count, classes, "static") < label_bytes(count, classes, "dynamic", epochs=epochs)


def test_images_and_totals() -> None:
    assert image_bytes(10, (3, 32, 32)) == 10 * 3072 * 4
    assert image_bytes(10, (3, 32, 32), "uint8") == 10 * 3072
    whole = Budget(image_bytes(10, (1, 8, 8)), label_bytes(10, 10), shared=640, teachers=1000)
    assert whole.total == 2560 + 10 + 640 + 1000
    assert whole.compression(42_100) == 0.1
    with pytest.raises(InputError):
        whole.compression(0)
    with pytest.raises(InputError, match="count"):
        image_bytes(0, (3, 32, 32))


def test_the_printed_shares_of_imagenet() -> None:
    """10 images a class: 0.78 % with hard labels, 0.81 with static, 4.53 with dynamic; ours: that these take 160 GB, and 300 epochs in float16."""
    real, images = 160_000_000_000, round(160_000_000_000 * 10_000 / 1_281_167)

    def share(labels: int) -> float:
        return 100 * Budget(images, labels).compression(real)

    assert share(label_bytes(10_000, 1000)) == pytest.approx(0.78, abs=0.005)
    assert share(label_bytes(10_000, 1000, "static")) == pytest.approx(0.81, abs=0.005)
    assert share(label_bytes(10_000, 1000, "dynamic", epochs=300, number_bytes=2)) == pytest.approx(4.53, abs=0.005)
