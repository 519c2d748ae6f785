"""Feature extractors: trained once, kept, found again, and refused where they do not fit."""

import json
import os

import pytest
import torch
from torch import Tensor, nn

from limbeck.contract import IGNORE, validated
from limbeck.data import ArrayData, subset, with_targets
from limbeck.errors import InputError
from limbeck.evaluate import features
from limbeck.evaluate.features import FeatureSpec, extractor
from limbeck.evaluate.samples import fid, mmd2
from limbeck.models.weights import fingerprint

QUICK = FeatureSpec(width=16, steps=60)
TINY = FeatureSpec(width=8, steps=2)


def images(count: int = 400, channels: int = 1, side: int = 8, seed: int = 0) -> ArrayData:
    """Four classes, each a bright quarter on noise; uint8, to [−1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    pictures = torch.randint(0, 120, (count, channels, side, side), generator=generator, dtype=torch.uint8)
    half = side // 2
    for k in range(4):
        rows, columns = k // 2 * half, k % 2 * half
        pictures[labels == k, :, rows : rows + half, columns : columns + half] += 100
    return ArrayData(pictures, labels, mean=(0.5,), std=(0.5,))


def prepared(data: ArrayData) -> Tensor:
    return data.prepare(data.inputs)


@pytest.fixture(scope="module")
def data() -> ArrayData:
    return images()


@pytest.fixture(scope="module")
def quick(data):
    return extractor(QUICK, data)


@pytest.fixture
def training(monkeypatch) -> list[int]:
    """Counts trainings: one entry each."""
    seen, original = [], features._train
    monkeypatch.setattr(features, "_train", lambda *arguments: seen.append(1) or original(*arguments))
    return seen


# ---- the classifier --------------------------------------------------------------------------------------------------------


def test_it_learns_the_classes_and_says_how_well(data, quick) -> None:
    assert quick.facts == {"accuracy": 1.0, "held_out": 40, "trained_steps": 60}
    assert (quick.name, quick.dimension, quick.input_shape) == ("classifier-16", 16, (1, 8, 8))
    noise = with_targets(data, torch.randint(0, 4, (400,), generator=torch.Generator().manual_seed(0)))
    assert extractor(QUICK, noise).facts["accuracy"] < 0.6  # on what it was not trained on


def test_the_accuracy_is_of_samples_it_was_not_trained_on(data, monkeypatch) -> None:
    fetched, held = set(), set()
    original = features.hold_out

    def watched(whole, count, seed):
        train, rest = original(whole, count, seed)
        fetch = train.fetch
        train.fetch = lambda ids, **seeds: fetched.update(train.origins[ids].tolist()) or fetch(ids, **seeds)
        held.update(rest.origins.tolist())
        return train, rest

    monkeypatch.setattr(features, "hold_out", watched)
    extractor(QUICK, data)
    assert len(held) == 40
    assert len(fetched) > 300
    assert not fetched & held


def test_features_are_the_penultimate_layer_in_eval_mode_and_float64_on_the_cpu(data, quick) -> None:
    inputs = prepared(data)
    found = quick.features(inputs)
    assert (found.shape, found.dtype, found.device.type, found.requires_grad) == ((400, 16), torch.float64, "cpu", False)
    assert bool((found >= 0).all())  # behind the ReLU
    with torch.no_grad():
        torch.testing.assert_close(found, quick.module.eval()(inputs).double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(quick.features(inputs, batch_size=7), found, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(quick.features(inputs.double().requires_grad_()), found, rtol=1e-5, atol=1e-5)
    assert not any(p.requires_grad for p in quick.module.parameters())


def test_the_training_mode_comes_back_and_batch_statistics_do_not_move(data, quick) -> None:
    before = fingerprint(quick.module)
    quick.module.train()
    first = quick.features(prepared(data))
    assert quick.module.training
    quick.module.eval()
    assert torch.equal(quick.features(prepared(data)), first)
    assert fingerprint(quick.module) == before == quick.fingerprint


def test_training_is_a_function_of_data_and_spec_alone(data, quick) -> None:
    torch.manual_seed(5)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        again = extractor(QUICK, images())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert again.fingerprint == quick.fingerprint
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():  # as a caller may have it
        assert extractor(QUICK, data).fingerprint == quick.fingerprint
    assert extractor(QUICK.model_copy(update={"seed": 1}), data).fingerprint != quick.fingerprint


def test_worse_samples_are_farther_away(data, quick) -> None:
    real, other = quick.features(prepared(data)), images(seed=1)
    found = []
    for noise in (0.0, 0.3, 1.0):
        fake = prepared(other) + noise * torch.randn(400, 1, 8, 8, generator=torch.Generator().manual_seed(2))
        found.append((fid(real, quick.features(fake)), mmd2(real, quick.features(fake))))
    assert found == sorted(found)
    assert found[2][0] > 10 * found[0][0]
    one_class = quick.features(prepared(other)[other.targets == 0])
    assert fid(real, one_class) > 10 * found[0][0]


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 2), (3, 5, 9), (2, 14, 14), (1, 28, 28), (3, 64, 48)])
def test_images_of_any_size_have_features(shape) -> None:
    real = ArrayData(torch.randint(0, 256, (20, *shape), dtype=torch.uint8), torch.arange(20) % 2)
    made = extractor(FeatureSpec(width=5, steps=1), real)
    assert made.features(prepared(real)).shape == (20, 5)
    assert sum(p.numel() for p in made.module.parameters()) < 200_000


def test_unlabelled_samples_are_left_out(data) -> None:
    targets = data.targets.clone()
    targets[100:] = IGNORE
    assert extractor(QUICK, with_targets(data, targets)).facts["held_out"] == 10
    for wrong in (ArrayData(data.inputs), with_targets(data, torch.zeros(400, dtype=torch.int64)), with_targets(data, torch.full((400,), IGNORE))):
        with pytest.raises(InputError, match=r"labels of two classes.*pixels"):
            extractor(QUICK, wrong)
    with pytest.raises(InputError, match=r"images.*\[5\].*pixels"):
        extractor(QUICK, ArrayData(torch.randn(30, 5), torch.arange(30) % 2))


def test_small_data_get_enough_steps_and_large_data_no_more_than_allowed(monkeypatch, data) -> None:
    monkeypatch.setattr(features, "LEAST_STEPS", 12)
    monkeypatch.setattr(features, "BATCH", 60)
    for spec, steps in ((FeatureSpec(epochs=1), 12), (FeatureSpec(epochs=3), 18), (FeatureSpec(epochs=3, steps=15), 15), (FeatureSpec(steps=4), 4)):
        assert extractor(spec, data).facts["trained_steps"] == steps  # 360 samples: 6 steps an epoch


# ---- kept in a folder ------------------------------------------------------------------------------------------------------


def test_it_is_trained_once_and_found_again(data, quick, tmp_path, training) -> None:
    folder = tmp_path / "new" / "features"
    first = extractor(QUICK, data, folder)
    names = sorted(path.name for path in folder.iterdir())
    assert [name.partition(".")[2] for name in names] == ["json", "safetensors"]  # nothing temporary is left
    again = extractor(QUICK, images(), folder)
    assert len(training) == 1
    assert (again.fingerprint, again.facts, again.name) == (first.fingerprint, first.facts, first.name)
    assert first.fingerprint == quick.fingerprint
    assert torch.equal(again.features(prepared(data)), first.features(prepared(data)))
    assert not any(p.requires_grad for p in again.module.parameters())
    about = json.loads((folder / names[0]).read_text())
    assert about["fingerprint"] == first.fingerprint
    assert about["trained_on"]["inputs"] == data.inputs_fingerprint
    assert about["accuracy"] == first.facts["accuracy"]


def test_other_data_labels_or_spec_are_another_classifier(data, tmp_path, training) -> None:
    relabelled = data.targets.clone()
    relabelled[0] = 3
    other = [
        (TINY, data),
        (TINY, subset(data, torch.arange(399))),  # of the same whole: the inputs' fingerprint is the same
        (TINY, subset(data, torch.arange(399).flip(0))),
        (TINY, with_targets(data, relabelled)),
        (TINY, ArrayData(data.inputs, data.targets, mean=(0.4,), std=(0.5,))),
        *((TINY.model_copy(update=change), data) for change in ({"width": 9}, {"epochs": 4}, {"steps": 3}, {"seed": 1})),
    ]
    for spec, real in other:
        extractor(spec, real, tmp_path)
    assert len(training) == len(other) == len(list(tmp_path.glob("*.json")))
    for spec, real in other:
        extractor(spec, real, tmp_path)
    assert len(training) == len(other)


def test_a_kill_between_the_two_files_costs_a_training_and_nothing_else(data, tmp_path, training, monkeypatch) -> None:
    def killed(*arguments) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(features, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            extractor(TINY, data, tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
    assert extractor(TINY, data, tmp_path).fingerprint == extractor(TINY, data).fingerprint
    assert len(training) == 3


def test_damaged_files_are_refused_and_the_fix_works(data, tmp_path, training) -> None:
    first = extractor(TINY, data, tmp_path)
    about, weights = next(tmp_path.glob("*.json")), next(tmp_path.glob("*.safetensors"))
    whole, described = weights.read_bytes(), about.read_text()
    broken = [
        (weights, whole[:-4] + b"\x00\x00\x80?", "not those that the .json"),  # another number
        (weights, whole[:100], "cannot read"),
        (about, described.encode()[:50], "does not describe"),
        (about, b"[]", "does not describe"),
        (about, json.dumps(json.loads(described) | {"trained_on": {}}).encode(), "other data"),
        (about, described.replace(first.fingerprint, "0" * 64).encode(), "not those"),
    ]
    for path, content, message in broken:
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            extractor(TINY, data, tmp_path)
        weights.write_bytes(whole)
        about.write_text(described)
    weights.unlink()
    with pytest.raises(InputError, match="no such file"):
        extractor(TINY, data, tmp_path)
    about.unlink()
    assert extractor(TINY, data, tmp_path).fingerprint == first.fingerprint
    assert len(training) == 2


# ---- pixels ----------------------------------------------------------------------------------------------------------------


def test_pixels_are_the_inputs_flattened_for_images_and_points(data) -> None:
    made = extractor(FeatureSpec(kind="pixels"), ArrayData(data.inputs, mean=(0.5,), std=(0.5,)))
    assert (made.name, made.dimension) == ("pixels", 64)
    assert torch.equal(made.features(prepared(data), batch_size=33), prepared(data).flatten(1).double())
    points = ArrayData(torch.randn(9, 2))
    flat = extractor(FeatureSpec(kind="pixels"), points)
    assert torch.equal(flat.features(points.inputs), points.inputs.double())
    assert flat.dimension == 2
    assert flat.fingerprint != made.fingerprint == extractor(FeatureSpec(kind="pixels"), data).fingerprint


def test_wrong_inputs_are_named(quick, data) -> None:
    inputs = prepared(data)
    for wrong in (inputs[:, :, :7], inputs[:0], inputs[0], inputs[0, 0, 0, 0]):
        with pytest.raises(InputError, match=r"\[N, 1, 8, 8\]"):
            quick.features(wrong)
    for value in (float("nan"), float("inf")):
        bad = inputs.clone()
        bad[-1, 0, 0, 0] = value
        with pytest.raises(InputError, match="NaN"):
            quick.features(bad)
    with pytest.raises(InputError, match="batch_size"):
        quick.features(inputs, batch_size=0)
    with pytest.raises(InputError, match="empty"):
        extractor(QUICK, subset(data, torch.arange(0)))
    with pytest.raises(InputError, match="weights"):
        extractor(FeatureSpec(weights="x.pth"), data)
    for knobs in ({"kind": "vgg"}, {"width": 1}, {"epochs": 0}, {"steps": 0}, {"seed": -1}, {"widht": 3}):
        with pytest.raises(InputError, match=next(iter(knobs))):
            validated(FeatureSpec, knobs)


# ---- Inception -------------------------------------------------------------------------------------------------------------


class Echo(nn.Module):
    """In Inception's place: what it was given."""

    def forward(self, pixels: Tensor) -> tuple[Tensor]:
        assert pixels.dtype == torch.uint8
        return (pixels.flatten(1).float(),)


@pytest.mark.parametrize(("channels", "mean", "std"), [(1, (0.5,), (0.5,)), (3, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)), (1, (), ())])
def test_inception_is_shown_the_bytes_of_the_images(channels, mean, std, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(features, "_inception_network", lambda path: Echo())
    (tmp_path / "w.pth").touch()
    raw = images(6, channels).inputs
    for real in (ArrayData(raw, mean=mean, std=std), ArrayData(raw.float() / 255, mean=mean, std=std)):
        made = extractor(FeatureSpec(kind="inception", weights=str(tmp_path / "w.pth")), real)
        assert torch.equal(made.features(prepared(real)), raw.expand(-1, 3, -1, -1).flatten(1).double())
        beyond = torch.cat([prepared(real) - 100, prepared(real) + 100])
        assert made.features(beyond).unique().tolist() == [0, 255]  # clipped, not wrapped round


def test_inception_refuses_what_is_no_image_or_cannot_be_undone(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(features, "_inception_network", lambda path: Echo())
    (tmp_path / "w.pth").touch()
    spec = FeatureSpec(kind="inception", weights=str(tmp_path / "w.pth"))

    class Squared(ArrayData):
        def prepare(self, raw: Tensor) -> Tensor:
            return super().prepare(raw) ** 2

    raw = images(6).inputs
    for real, message in (
        (ArrayData(torch.randn(5, 4)), "grey or RGB"),
        (ArrayData(raw.expand(-1, 2, -1, -1)), "grey or RGB"),
        (ArrayData(raw.float() / 127.5 - 1), "which value is black"),
        (ArrayData(raw.float()), "which value is black"),
        (Squared(raw), "cannot be undone"),
    ):
        with pytest.raises(InputError, match=message):
            extractor(spec, real)


def test_inception_without_weights_says_where_to_get_them_and_fetches_nothing(data, tmp_path, monkeypatch) -> None:
    def fetched(*arguments, **more) -> None:
        raise AssertionError("something was fetched")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetched)
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetched)
    with pytest.raises(InputError, match=r"fetches none.*pt_inception"):
        extractor(FeatureSpec(kind="inception"), data)
    with pytest.raises(InputError, match=r"no weights at.*pt_inception"):
        extractor(FeatureSpec(kind="inception", weights=str(tmp_path / "none.pth")), data)


class Trap:
    """What a pickle may do when it is read."""

    def __reduce__(self):
        return os.mkdir, (os.environ["LIMBECK_TRAP"],)


def test_inceptions_file_is_read_as_tensors_alone(data, tmp_path, monkeypatch) -> None:
    pytest.importorskip("torch_fidelity")
    monkeypatch.setenv("LIMBECK_TRAP", str(tmp_path / "sprung"))
    for content in ({"trap": Trap()}, {"weight": torch.zeros(3)}, [1, 2]):
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(InputError, match="no weights of FID's Inception"):
            extractor(FeatureSpec(kind="inception", weights=str(tmp_path / "w.pth")), data)
    assert not (tmp_path / "sprung").exists()


def test_inception_is_torch_fidelitys_network(tmp_path) -> None:
    """With random weights, for the real ones are not here: the same 2048 numbers as its own class gives for the bytes."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    class Random(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            """Keep the first weights."""

    empty = tmp_path / "empty.pth"
    torch.save({}, empty)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = Random("random", ["2048"], feature_extractor_weights_path=str(empty))
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    real = images(2, 3, 16)
    before = torch.get_rng_state()
    made = extractor(FeatureSpec(kind="inception", weights=str(tmp_path / "w.pth")), real)
    assert torch.equal(torch.get_rng_state(), before)
    assert (made.name, made.dimension, made.fingerprint) == ("inception-2048", 2048, fingerprint(theirs))
    with torch.no_grad():
        torch.testing.assert_close(made.features(prepared(real)), theirs(real.inputs)[0].double())
