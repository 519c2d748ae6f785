from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from limbeck.errors import InputError
from limbeck.models import fingerprint, load_weights
from limbeck.models.resnet_cifar import resnet
from limbeck.models.small import cnn, mlp


def small(num_classes: int = 10) -> nn.Module:
    return cnn([3], num_classes, (1, 4, 4))


def saved(state: dict, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in state.items()}, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_come_back_from_both_formats(tmp_path: Path, name: str, prefix: str) -> None:
    source, target = small(), small()
    assert fingerprint(source) != fingerprint(target)
    load_weights(target, saved({prefix + k: v for k, v in source.state_dict().items()}, tmp_path / name))
    assert fingerprint(source) == fingerprint(target)


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_a_checkpoint_around_the_state_dict_is_opened(tmp_path: Path, key: str) -> None:
    source, target = small(), small()
    load_weights(target, saved({key: source.state_dict(), "best": 91.7}, tmp_path / "w.th"))
    assert fingerprint(source) == fingerprint(target)


def test_a_module_called_module_keeps_its_name(tmp_path: Path) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)

    source, target = Wrapped(), Wrapped()
    load_weights(target, saved(source.state_dict(), tmp_path / "w.pt"))
    assert fingerprint(source) == fingerprint(target)


def test_only_num_batches_tracked_may_be_missing(tmp_path: Path) -> None:
    source, target = small(), small()
    state = {k: v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert len(state) < len(source.state_dict())
    load_weights(target, saved(state, tmp_path / "w.safetensors"))
    assert torch.equal(source.head.weight, target.head.weight)
    del state["features.1.running_mean"]
    with pytest.raises(InputError, match=r"1 missing \(features.1.running_mean \(3,\)\)"):
        load_weights(target, saved(state, tmp_path / "v.safetensors"))


def test_a_head_of_other_classes_is_said_so_and_nothing_is_loaded(tmp_path: Path) -> None:
    target = small(10)
    before = fingerprint(target)
    path = saved(small(100).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(InputError) as caught:
        load_weights(target, path)
    assert caught.value.where == str(path)
    assert "head.weight (100, 12) in the file, (10, 12) in the model" in str(caught.value)
    assert "head has 100 classes, the model's 10" in caught.value.fix
    assert fingerprint(target) == before


def test_another_depth_and_another_width_get_their_own_hints(tmp_path: Path) -> None:
    path = saved(resnet(14, width=2).state_dict(), tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"36 unexpected.*depth"):
        load_weights(resnet(8, width=2), path)
    with pytest.raises(InputError, match=r"of another shape.*width"):
        load_weights(resnet(14, width=4), path)
    with pytest.raises(InputError, match=r"missing.*unexpected"):
        load_weights(mlp([4], 10, (3,)), path)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("kept", [0, 7, 0.5])
def test_damaged_files_are_named(tmp_path: Path, name: str, kept: float) -> None:
    path = saved(small().state_dict(), tmp_path / name)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if kept < 1 else kept])
    with pytest.raises(InputError, match=name) as caught:
        load_weights(small(), path)
    assert "cannot read the weights" in caught.value.what


class Harmful:
    def __reduce__(self):
        return (Path.touch, (Path("harm"),))


def test_pickled_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"head.weight": Harmful()}, "w.pt")
    with pytest.raises(InputError, match=r"w\.pt"):
        load_weights(small(), "w.pt")
    assert not Path("harm").exists()


@pytest.mark.parametrize("content", [[1, 2], {}, {"a": 1}, torch.zeros(3)])
def test_files_without_a_state_dict_are_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(InputError, match="state dict"):
        load_weights(small(), tmp_path / "w.pt")


def test_a_missing_file_or_a_folder_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pt", tmp_path, "x" * 5000):
        with pytest.raises(InputError, match="no such file"):
            load_weights(small(), path)


class Bag(nn.Module):
    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(-100, 100), min_size=1, max_size=6), st.data())
def test_fingerprint_sees_every_value_type_shape_and_name(values: list[int], data: st.DataObject) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    other = x.clone()
    other[data.draw(st.integers(0, len(values) - 1))] += 1
    base = fingerprint(Bag({"a": x, "b": torch.tensor(3)}))
    assert base == fingerprint(Bag({"b": torch.tensor(3), "a": x.clone()}))
    changed = [
        Bag({"a": other, "b": torch.tensor(3)}),
        Bag({"a": x.double(), "b": torch.tensor(3)}),
        Bag({"a": x.view(torch.int32), "b": torch.tensor(3)}),
        Bag({"a": x[None], "b": torch.tensor(3)}),
        Bag({"a": x, "c": torch.tensor(3)}),
        Bag({"a": x}),
    ]
    prints = [base, *map(fingerprint, changed)]
    assert len(set(prints)) == len(prints)
    assert all(len(p) == 64 for p in prints)


def test_fingerprint_takes_bfloat16_bool_empty_and_strided_tensors() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    assert fingerprint(Bag({"a": x.t()})) == fingerprint(Bag({"a": x.t().contiguous()})) != fingerprint(Bag({"a": x.reshape(3, 2)}))
    odd = Bag({"a": x.bfloat16(), "b": x > 2, "c": torch.zeros(0, 3)})
    assert fingerprint(odd) == fingerprint(Bag({"a": x.bfloat16(), "b": x > 2, "c": torch.zeros(0, 3)}))
