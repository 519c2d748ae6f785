"""Trajectories on disk: opening, reading, refusing."""

import numpy as np
import pytest
import torch

from limbeck.errors import InputError
from limbeck.synthetic.trajectories import MANIFEST, Trajectories, checksum, expert_file, write_manifest

SIZE, EPOCHS = 5, 3


def snapshot(expert: int, epoch: int) -> torch.Tensor:
    return torch.arange(SIZE, dtype=torch.float32) + 10 * epoch + 100 * expert


def written(folder, experts=(0, 1)):
    found = {}
    folder.mkdir(exist_ok=True)
    for number in experts:
        path = expert_file(folder, number)
        path.write_bytes(torch.stack([snapshot(number, epoch) for epoch in range(EPOCHS + 1)]).numpy().astype("<f4").tobytes())
        found[number] = {"sha256": checksum(path), "losses": [3.0, 2.0, 1.0 + number], "accuracy": 0.5 + 0.25 * number}
    write_manifest(folder, {"seed": 7}, SIZE, EPOCHS, found)
    return folder


def test_what_was_written_is_read(tmp_path) -> None:
    found = Trajectories.open(written(tmp_path))
    assert (found.count, found.epochs, found.size, found.identity) == (2, EPOCHS, SIZE, {"seed": 7})
    for expert in range(2):
        for epoch in range(EPOCHS + 1):
            weights = found.weights(expert, epoch)
            assert weights.dtype == torch.float32
            assert torch.equal(weights, snapshot(expert, epoch))
    assert torch.equal(found.path(1), torch.stack([snapshot(1, epoch) for epoch in range(EPOCHS + 1)]))
    start, target = found.segment(1, 1, 2)
    assert torch.equal(start, snapshot(1, 1))
    assert torch.equal(target, snapshot(1, 3))
    assert found.accuracy == (0.5, 0.75)
    assert found.facts == {
        "experts": 2, "epochs": 3, "parameters": 5, "bytes": 160, "accuracy": 0.625, "accuracies": [0.5, 0.75], "losses": [[3.0, 2.0, 1.0], [3.0, 2.0, 2.0]],
    }  # fmt: skip
    found.verify()


def test_what_is_handed_out_is_a_copy(tmp_path) -> None:
    found = Trajectories.open(written(tmp_path))
    found.weights(0, 1).zero_()
    found.path(0).zero_()
    assert torch.equal(found.weights(0, 1), snapshot(0, 1))
    found.verify()


def test_beyond_what_is_stored(tmp_path) -> None:
    found = Trajectories.open(written(tmp_path))
    for expert, epoch, words in ((2, 0, "no expert 2"), (-1, 0, "no expert"), (0, 4, "from 0 to 3"), (0, -1, "from 0 to 3")):
        with pytest.raises(InputError, match=words):
            found.weights(expert, epoch)
    with pytest.raises(InputError, match="from 0 to 3"):
        found.segment(0, 2, 2)
    with pytest.raises(InputError, match="no length"):
        found.segment(0, 2, 0)


def test_the_first_so_many(tmp_path) -> None:
    folder = written(tmp_path, (0, 1, 3))  # 2 is not whole
    assert Trajectories.open(folder).count == 2
    one = Trajectories.open(folder, 1)
    assert one.count == 1
    assert one.facts["experts"] == 1
    with pytest.raises(InputError, match="no expert 1"):
        one.weights(1, 0)
    with pytest.raises(InputError, match="2 whole experts, 3 are needed"):
        Trajectories.open(folder, 3)
    with pytest.raises(InputError, match="0 whole experts, 1 are needed"):
        Trajectories.open(written(tmp_path / "none", ()))


def test_damage(tmp_path) -> None:
    with pytest.raises(InputError, match="no expert trajectories"):
        Trajectories.open(tmp_path / "nowhere")
    folder = written(tmp_path / "a")
    content = bytearray(expert_file(folder, 1).read_bytes())
    content[7] ^= 1
    expert_file(folder, 1).write_bytes(content)
    with pytest.raises(InputError, match="checksum"):
        Trajectories.open(folder).verify()
    expert_file(folder, 1).write_bytes(content[:-4])
    with pytest.raises(InputError, match="expert 1"):
        Trajectories.open(folder)
    expert_file(folder, 1).unlink()
    with pytest.raises(InputError, match="expert 1"):
        Trajectories.open(folder)
    manifest = folder / MANIFEST
    manifest.write_text(manifest.read_text().replace('"seed": 7', '"seed": 8'))
    with pytest.raises(InputError, match="damaged"):
        Trajectories.open(folder)


def test_opening_reads_no_weights(tmp_path) -> None:
    """A hundred experts as large as a ConvNet-3's, as sparse files: opened and read from in far less than it takes to read them."""
    size, epochs = 320_010, 50
    folder = tmp_path
    for number in range(100):
        with expert_file(folder, number).open("wb") as handle:
            handle.truncate((epochs + 1) * size * 4)
    with expert_file(folder, 42).open("r+b") as handle:
        handle.seek(50 * size * 4)
        handle.write(np.full(size, 2.5, dtype="<f4").tobytes())
    write_manifest(folder, {}, size, epochs, {number: {"sha256": "", "losses": [], "accuracy": 0.0} for number in range(100)})
    found = Trajectories.open(folder)
    assert found.facts["bytes"] == 100 * 51 * 320_010 * 4
    assert found.weights(42, 50).unique().tolist() == [2.5]
