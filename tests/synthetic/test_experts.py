"""Training experts: the objective, independence, resuming, refusing."""

import hashlib
import json
import os
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from pydantic import ValidationError
from torch import nn

from limbeck.errors import InputError
from limbeck.files import write_atomic
from limbeck.lock import locked
from limbeck.models.convnet import convnet
from limbeck.seeds import derive, generator
from limbeck.synthetic import experts as module
from limbeck.synthetic.augment import DSASpec, dsa
from limbeck.synthetic.experts import ExpertSpec, GradientPenalty, LossRamp, RateDrop, expert_loss, gradients, input_gradient_penalty, train_experts
from limbeck.synthetic.flat import FlatNetwork
from limbeck.synthetic.sharpness import SharpnessSpec, gsam_direction, perturbation
from limbeck.synthetic.trajectories import MANIFEST, Trajectories

CLASSES, SIDE = 3, 4
SMALL = ExpertSpec(count=2, epochs=3, batch_size=8, lr=0.1)
FULL = ExpertSpec(
    count=2, epochs=4, batch_size=8, lr=0.05, momentum=0.9, weight_decay=1e-3, rate_drop=RateDrop(after=1), sharpness=SharpnessSpec(rho=0.05),
    loss_scale=LossRamp(), gradient_penalty=GradientPenalty(),
)  # fmt: skip


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def data(count: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(count) % CLASSES
    return drawn(0, count, 2, SIDE, SIDE) + 1.5 * drawn(1, CLASSES, 2, SIDE, SIDE)[labels], labels


def network(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**32)
        return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(4, 4), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, CLASSES))


def trained(folder, spec: ExpertSpec = SMALL, seed: int = 5, **other) -> Trajectories:
    inputs, labels = data()
    settings = {"identity": {"data": "blobs"}, **other}
    return train_experts(spec, network, inputs, labels, CLASSES, folder, seed=seed, **settings)


def contents(folder) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir()) if not path.name.startswith(".")}


# ---- the objective -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["per_pixel", "per_image"])
def test_the_penalty_of_a_linear_network_is_analytic(norm) -> None:
    """f(x) = Wx + b: h = Σ_k W_k whatever x is, so are the penalty and its gradient in W; the bias gets none."""
    net = FlatNetwork(nn.Sequential(nn.Flatten(), nn.Linear(3 * 2 * 2, 4)).double())
    theta = drawn(0, net.size, dtype=torch.float64).requires_grad_()
    found = input_gradient_penalty(net, theta, drawn(1, 5, 3, 2, 2, dtype=torch.float64), norm)
    other = input_gradient_penalty(net, theta, drawn(2, 2, 3, 2, 2, dtype=torch.float64), norm)
    torch.testing.assert_close(found, other)
    h = theta.detach()[:48].view(4, 12).sum(0).view(3, 2, 2)
    n = h.square().sum(0).sqrt() if norm == "per_pixel" else h.square().sum().sqrt()
    torch.testing.assert_close(found.detach(), (n - 1).square().mean())
    expected = (2 * (n - 1) / n * h / n.numel()).reshape(1, 12).expand(4, 12).reshape(-1)
    (g,) = torch.autograd.grad(found, theta)
    torch.testing.assert_close(g[:48], expected)
    assert not g[48:].any()


def test_the_penalty_is_0_where_every_pixels_norm_is_1_and_has_no_nan_where_it_is_0() -> None:
    net = FlatNetwork(nn.Sequential(nn.Flatten(), nn.Linear(12, 1, bias=False)))
    unit = nn.functional.normalize(drawn(3, 3, 2, 2), dim=0)
    assert float(input_gradient_penalty(net, unit.reshape(-1), drawn(1, 4, 3, 2, 2))) == pytest.approx(0, abs=1e-10)
    zero = torch.zeros(12, requires_grad=True)
    value = input_gradient_penalty(net, zero, drawn(1, 4, 3, 2, 2))
    assert float(value.detach()) == 1
    assert torch.autograd.grad(value, zero)[0].isfinite().all()


def test_the_ramp() -> None:
    assert [LossRamp().at(e) for e in (0, 1, 9, 10, 40)] == pytest.approx([0.5, 0.55, 0.95, 1.0, 1.0])
    net = FlatNetwork(network(0))
    x, y = data(6)
    theta = net.vector()
    plain = expert_loss(net, theta, x, x, y)
    torch.testing.assert_close(plain, nn.functional.cross_entropy(net(theta, x), y))
    torch.testing.assert_close(expert_loss(net, theta, x, x, y, scale=0.5), plain / 2)
    both = expert_loss(net, theta, x, 2 * x, y, scale=0.5, penalty=GradientPenalty(weight=3.0))
    torch.testing.assert_close(both, plain / 2 + 3 * input_gradient_penalty(net, theta, 2 * x))  # the scale is not on the penalty, which sees the clean images


@pytest.mark.parametrize("norm", ["per_pixel", "per_image"])
def test_the_gradient_of_the_whole_objective_agrees_with_differences(norm) -> None:
    net = FlatNetwork(network(1).double())
    x, y = (drawn(4, 6, 2, SIDE, SIDE, dtype=torch.float64), torch.arange(6) % CLASSES)
    theta = net.vector()

    def loss(at: torch.Tensor) -> torch.Tensor:
        return expert_loss(net, at, x.flip(0), x, y, scale=0.7, penalty=GradientPenalty(norm=norm))

    for v in (drawn(5, net.size, dtype=torch.float64), drawn(6, net.size, dtype=torch.float64)):
        at = theta.clone().requires_grad_()
        (g,) = torch.autograd.grad(loss(at), at)
        slope = (loss(theta + 1e-6 * v) - loss(theta - 1e-6 * v)) / 2e-6
        assert float(g @ v) == pytest.approx(float(slope), rel=1e-4)


@pytest.mark.parametrize("penalty", [None, GradientPenalty(), GradientPenalty(norm="per_image")])
def test_one_batched_pass_gives_what_passes_one_by_one_give(penalty) -> None:
    """On a ConvNet with instance norm, with the second-order penalty too."""
    net = FlatNetwork(convnet(CLASSES, (2, 8, 8), depth=2, width=4).double())
    theta = net.vector() + 0.1 * drawn(0, 3, net.size, dtype=torch.float64)
    clean, y = drawn(1, 3, 5, 2, 8, 8, dtype=torch.float64), torch.randint(CLASSES, (3, 5), generator=torch.Generator().manual_seed(0))
    augmented = clean.flip(-1)

    def loss(*of):
        return expert_loss(net, *of, scale=0.6, penalty=penalty)

    together = gradients(loss, theta, augmented, clean, y)
    rows = [gradients(loss, theta[k : k + 1], augmented[k : k + 1], clean[k : k + 1], y[k : k + 1]) for k in range(3)]
    for k in range(2):
        torch.testing.assert_close(together[k], torch.cat([row[k] for row in rows]), rtol=1e-10, atol=1e-12)
        assert not together[k].requires_grad


# ---- the steps ---------------------------------------------------------------------------------------------------------


def test_the_steps_are_torchs_sgd(tmp_path) -> None:
    """Plain MTT experts, momentum and decay and a rate drop with a fresh buffer included, against torch.optim.SGD on an ordinary module."""
    spec = SMALL.model_copy(update={"momentum": 0.9, "weight_decay": 0.01, "rate_drop": RateDrop(factor=0.5, after=0)})
    found = trained(tmp_path / "a", spec)
    inputs, labels = data()
    for expert in range(2):
        net = network(derive(5, "experts", "weights", expert))
        flat = FlatNetwork(net)
        assert torch.equal(found.weights(expert, 0), flat.vector())
        for epoch in range(spec.epochs):
            if epoch < 2:
                optimiser = torch.optim.SGD(net.parameters(), lr=0.1 if epoch == 0 else 0.05, momentum=0.9, weight_decay=0.01)
            order = torch.randperm(len(inputs), generator=generator(5, "experts", "order", expert, epoch))
            total = 0.0
            for step, rows in enumerate(order.split(8)):
                x = dsa(inputs[rows], spec.augment, generator(5, "experts", "augment", expert, epoch, step))
                loss = nn.functional.cross_entropy(net(x), labels[rows])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                total += float(loss.detach()) * len(rows)
            torch.testing.assert_close(found.weights(expert, epoch + 1), flat.vector(), rtol=1e-4, atol=1e-6)
            assert found.facts["losses"][expert][epoch] == pytest.approx(total / len(inputs), rel=1e-4)
        right = float((net(inputs).argmax(1) == labels).float().mean())
        assert found.accuracy[expert] == pytest.approx(right)


def test_where_the_rate_falls() -> None:
    spec = ExpertSpec(epochs=50, lr=0.01, rate_drop=RateDrop())
    assert [spec.rate(e) for e in (0, 26, 27, 49)] == pytest.approx([0.01, 0.01, 0.006, 0.006])
    assert [e for e in range(50) if spec.starts_afresh(e)] == [27]
    assert not any(SMALL.starts_afresh(e) for e in range(3))


@pytest.mark.parametrize("together", [1, 2])
def test_a_sharpness_aware_step_takes_two_passes_of_one_batch(tmp_path, monkeypatch, together: int) -> None:
    seen = []

    def counted(loss, theta_GP, **batch):
        found = gradients(loss, theta_GP, **batch)
        seen.append((theta_GP.clone(), batch, found[0]))
        return found

    monkeypatch.setattr(module, "gradients", counted)
    spec = SMALL.model_copy(update={"epochs": 1, "sharpness": SharpnessSpec(rho=0.1), "together": together})
    found = trained(tmp_path / "a", spec)
    assert len(seen) == 2 * 3 * 2 // together
    for (theta, batch, g), (ascended, same, g_p) in zip(seen[::2], seen[1::2], strict=True):
        assert all(batch[name] is same[name] for name in batch)
        torch.testing.assert_close(ascended, theta + perturbation(theta, g, 0.1, adaptive=True))
        d = gsam_direction(g, g_p, 0.4)
        following = [row for row, _, _ in seen[::2]]
        after = torch.cat([*following, torch.stack([found.weights(number, 1) for number in range(2)])])
        assert any(torch.equal(theta[0] - 0.1 * d[0], row) for row in after)  # from the weights themselves, not from the ascended ones


def test_without_an_ascent_the_expert_is_the_plain_one(tmp_path) -> None:
    plain = trained(tmp_path / "a")
    flat = trained(tmp_path / "b", SMALL.model_copy(update={"sharpness": SharpnessSpec(rho=0.0)}))
    torch.testing.assert_close(plain.path(0), flat.path(0), rtol=1e-4, atol=1e-6)
    ones = trained(tmp_path / "c", SMALL.model_copy(update={"loss_scale": LossRamp(start=1.0), "gradient_penalty": GradientPenalty(weight=0.0)}))
    torch.testing.assert_close(plain.path(0), ones.path(0), rtol=1e-4, atol=1e-6)


# ---- snapshots and independence ----------------------------------------------------------------------------------------


def test_snapshots_are_copies(tmp_path) -> None:
    """The stored epochs differ from each other: none is a view of weights that moved on."""
    for together in (1, 2):
        path = trained(tmp_path / str(together), SMALL.model_copy(update={"together": together})).path(1)
        assert (path.diff(dim=0).norm(dim=1) > 1e-3).all()
        assert torch.equal(path[0], FlatNetwork(network(derive(5, "experts", "weights", 1))).vector())


@pytest.mark.parametrize("spec", [SMALL, FULL])
def test_an_expert_depends_on_seed_and_number_alone(tmp_path, spec: ExpertSpec) -> None:
    three = trained(tmp_path / "three", spec.model_copy(update={"count": 3}))
    one = trained(tmp_path / "one", spec.model_copy(update={"count": 1}))
    assert torch.equal(one.path(0), three.path(0))
    for together in (2, 3):
        grouped = trained(tmp_path / f"by{together}", spec.model_copy(update={"count": 3, "together": together}))
        for expert in range(3):
            torch.testing.assert_close(grouped.path(expert), three.path(expert), rtol=1e-3, atol=1e-5)
    assert not torch.allclose(three.path(0), three.path(1))
    assert not torch.allclose(trained(tmp_path / "seed", spec, seed=6).path(0), three.path(0))


def test_the_global_generator_is_left_alone(tmp_path) -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    trained(tmp_path / "a")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_they_learn(tmp_path) -> None:
    found = trained(tmp_path / "a", SMALL.model_copy(update={"epochs": 12, "augment": None}))
    assert found.facts["accuracy"] > 0.9
    assert all(losses[-1] < losses[0] / 2 for losses in found.facts["losses"])
    found.verify()


# ---- resuming ----------------------------------------------------------------------------------------------------------


class _Killed(BaseException):
    pass


@pytest.mark.parametrize(("count", "together"), [(2, 1), (2, 2)])
def test_killed_at_any_moment_it_ends_with_the_same_bytes(tmp_path, monkeypatch, count: int, together: int) -> None:
    """Every durable act (a write, an fsync, a rename, a removal) is the last one once; then a second call goes on."""
    inputs, labels = data(8)
    spec = SMALL.model_copy(update={"epochs": 2, "count": count, "together": together, "momentum": 0.9})

    def trained(folder, spec: ExpertSpec) -> None:
        train_experts(spec, network, inputs, labels, CLASSES, folder, seed=5, identity={})

    trained(tmp_path / "whole", spec)
    whole = contents(tmp_path / "whole")
    assert sorted(whole) == [*(f"expert-0000{number}.f32" for number in range(count)), MANIFEST]
    acts, fatal = 0, -1

    def guarded(function):
        def act(*arguments, **named):
            nonlocal acts
            acts += 1
            if acts == fatal:
                raise _Killed
            return function(*arguments, **named)

        return act

    for name in ("write_atomic", "write_manifest", "sync_folder", "checksum"):
        monkeypatch.setattr(module, name, guarded(getattr(module, name)))
    monkeypatch.setattr(module.os, "fsync", guarded(lambda handle: None))  # no wait for the disk
    monkeypatch.setattr(module.Path, "replace", guarded(module.Path.replace))
    monkeypatch.setattr(module.Path, "unlink", guarded(module.Path.unlink))
    trained(tmp_path / "counted", spec)
    total = acts
    assert total > 20
    for fatal in range(1, total + 1):
        acts, folder = 0, tmp_path / f"killed-{fatal}"
        with pytest.raises(_Killed):
            trained(folder, spec)
        acts = total  # nothing is fatal any more
        trained(folder, spec)
        assert contents(folder) == whole


def test_it_goes_on_and_does_not_start_afresh(tmp_path, monkeypatch) -> None:
    class Stop:
        seen: list[int]

        def __init__(self, at: int) -> None:
            self.at, self.seen = at, []

        def start(self, label: str, steps: int, done: int, unit: str = "") -> None:
            self.started = (steps, done, unit)

        def advance(self, step: int, note: str = "") -> None:
            self.seen.append(step)
            if step == self.at:
                raise _Killed

        def stop(self) -> None:
            self.seen.append(-1)

    with pytest.raises(_Killed):
        trained(tmp_path / "a", progress=Stop(4))
    watch = Stop(-2)
    trained(tmp_path / "a", progress=watch)
    assert watch.started == (6, 3, "epochs")
    assert watch.seen == [5, 6, -1]
    monkeypatch.setattr(module, "gradients", None)  # nothing is left to train
    trained(tmp_path / "a")
    trained(tmp_path / "a", SMALL.model_copy(update={"count": 1, "together": 2}))


def test_a_larger_count_trains_the_missing_ones_alone(tmp_path) -> None:
    trained(tmp_path / "a")
    stamps = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "a").glob("*.f32")}
    four = trained(tmp_path / "a", SMALL.model_copy(update={"count": 4}))
    assert four.count == 4
    assert all((tmp_path / "a" / name).stat().st_mtime_ns == stamp for name, stamp in stamps.items())
    trained(tmp_path / "b", SMALL.model_copy(update={"count": 4}))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert trained(tmp_path / "a").count == 2


# ---- two processes, damage ---------------------------------------------------------------------------------------------


def interrupted(monkeypatch, folder, at: int, meanwhile) -> None:
    """Training that `meanwhile` breaks in upon after epoch `at` of the first group."""
    keep = module._Training._keep

    def kept(self, group) -> None:
        keep(self, group)
        if group.epoch == at and group.experts[0] == 0:
            with monkeypatch.context() as patch:
                patch.setattr(module._Training, "_keep", keep)
                meanwhile()

    with monkeypatch.context() as patch:
        patch.setattr(module._Training, "_keep", kept)
        trained(folder)


@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_second_process_is_refused_while_one_trains(tmp_path, monkeypatch, at: int) -> None:
    """The lock belongs to the open file, so that a second call within the process is like one in another."""
    whole = trained(tmp_path / "whole")
    refused = []

    def second() -> None:
        with pytest.raises(InputError, match=f"in use by process {os.getpid()} ") as caught:
            trained(tmp_path / "a")
        refused.append(caught.value)

    interrupted(monkeypatch, tmp_path / "a", at, second)
    (error,) = refused
    assert error.where == str(tmp_path / "a")
    assert "experts" in str(error)
    assert contents(tmp_path / "a") == contents(whole.folder)


def test_another_process_is_refused_too(tmp_path) -> None:
    script = "import pathlib, sys; from limbeck.lock import locked\nwith locked(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "a")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"the folder of experts is in use by process {process.pid} "):
            trained(tmp_path / "a")
    finally:
        process.communicate()
    assert trained(tmp_path / "a").count == 2


def test_whole_experts_are_opened_while_another_process_holds_the_folder(tmp_path) -> None:
    trained(tmp_path / "a")
    with locked(tmp_path / "a"):
        assert trained(tmp_path / "a").count == 2
        with pytest.raises(InputError, match="in use"):
            trained(tmp_path / "a", SMALL.model_copy(update={"count": 3}))


def removed(folder) -> None:
    (folder / "expert-00000.part").unlink()


def shortened(folder) -> None:
    path = folder / "expert-00000.part"
    path.write_bytes(path.read_bytes()[:-4])


@pytest.mark.parametrize("spoil", [removed, shortened])
def test_snapshots_that_go_in_the_middle_leave_no_holes(tmp_path, monkeypatch, spoil) -> None:
    with pytest.raises(InputError, match="weights of expert 0 after epoch 1 are gone") as caught:
        interrupted(monkeypatch, tmp_path / "a", 1, lambda: spoil(tmp_path / "a"))
    assert caught.value.where.endswith("expert-00000.part")


@pytest.mark.parametrize("spoil", [removed, shortened])
def test_snapshots_that_went_after_the_last_epoch(tmp_path, monkeypatch, spoil) -> None:
    with pytest.raises(InputError, match="after epoch 3 are gone"):
        interrupted(monkeypatch, tmp_path / "a", 3, lambda: spoil(tmp_path / "a"))
    assert not (tmp_path / "a" / "expert-00000.f32").exists()


def state(content: bytes):
    return lambda folder: (folder / "group.safetensors").write_bytes(content)


def of_another_network(folder) -> None:
    facts = {"facts": json.dumps({"experts": [0], "epoch": 2, "losses": [[1.0, 1.0]]})}
    state(safetensors.torch.save({"momentum": torch.zeros(1, 3)}, facts))(folder)


def with_other_facts(folder) -> None:
    state(safetensors.torch.save({"momentum": torch.zeros(1, 3)}, {"facts": "{}"}))(folder)


@pytest.mark.parametrize("spoil", [removed, shortened, state(b""), state(b"\xff" * 40), state(b"\2\0\0\0\0\0\0\0{}"), of_another_network, with_other_facts])
def test_a_damaged_folder_is_told_and_what_is_proposed_mends_it(tmp_path, monkeypatch, spoil) -> None:
    whole = trained(tmp_path / "whole")

    def kill() -> None:
        raise _Killed

    with pytest.raises(_Killed):
        interrupted(monkeypatch, tmp_path / "a", 2, kill)
    spoil(tmp_path / "a")
    with pytest.raises(InputError, match="begin again") as caught:
        trained(tmp_path / "a")
    assert "Remove" in caught.value.fix
    assert str(tmp_path / "a" / "group.safetensors") in str(caught.value)
    (tmp_path / "a" / "group.safetensors").unlink()
    trained(tmp_path / "a")
    assert contents(tmp_path / "a") == contents(whole.folder)


def test_a_whole_expert_that_is_damaged_is_found_when_the_folder_is_opened(tmp_path) -> None:
    trained(tmp_path / "a")
    path = tmp_path / "a" / "expert-00001.f32"
    content = bytearray(path.read_bytes())
    content[41] ^= 1
    path.write_bytes(content)
    for count in (2, 3):  # before anything is trained
        with pytest.raises(InputError, match="expert 1 is damaged"):
            trained(tmp_path / "a", SMALL.model_copy(update={"count": count}))
    assert sorted(contents(tmp_path / "a")) == ["expert-00000.f32", "expert-00001.f32", MANIFEST]
    assert trained(tmp_path / "a", SMALL.model_copy(update={"count": 1})).count == 1
    path.unlink()
    with pytest.raises(InputError, match="expert 1 is missing"):
        trained(tmp_path / "a", SMALL.model_copy(update={"count": 3}))


def test_a_network_that_draws_in_its_forward_is_refused(tmp_path) -> None:
    class Drops(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(nn.functional.dropout(x, 0.5, self.training))

    x, y = data()
    with pytest.raises(InputError, match="two answers"):
        train_experts(SMALL, lambda seed: Drops(*network(seed)), x, y, CLASSES, tmp_path / "a", seed=0, identity={})
    assert not (tmp_path / "a").exists()


# ---- refusing ----------------------------------------------------------------------------------------------------------


def test_a_folder_of_another_identity_is_refused(tmp_path) -> None:
    trained(tmp_path / "a")
    inputs, labels = data()
    cases = (
        ({"spec": SMALL.model_copy(update={"lr": 0.2})}, "experts.lr"),
        ({"spec": SMALL.model_copy(update={"epochs": 4})}, "experts.epochs"),
        ({"seed": 6}, "seed"),
        ({"identity": {"data": "rings"}}, "recipe.data"),
    )
    for changed, where in cases:
        with pytest.raises(InputError) as caught:
            trained(tmp_path / "a", **changed)
        assert caught.value.where.endswith(where)
    with pytest.raises(InputError) as caught:
        train_experts(SMALL, network, inputs + 1, labels, CLASSES, tmp_path / "a", seed=5, identity={"data": "blobs"})
    assert caught.value.where.endswith("data.sha256")
    with pytest.raises(InputError, match=r"the experts were made with .*this run has") as caught:
        train_experts(SMALL, lambda of: network(of + 1), inputs, labels, CLASSES, tmp_path / "a", seed=5, identity={"data": "blobs"})
    assert caught.value.where.endswith("network.first_weights")  # the same shapes, other first weights
    (tmp_path / "full").mkdir()
    write_atomic(tmp_path / "full" / "letter.txt", "mine")
    with pytest.raises(InputError, match="not empty"):
        trained(tmp_path / "full")


@pytest.mark.parametrize("together", [1, 2])
def test_weights_that_are_no_numbers_stop_it(tmp_path, together: int) -> None:
    wild = SMALL.model_copy(update={"lr": 1e30, "together": together, "augment": None})
    with pytest.raises(InputError, match=r"expert 0 became infinite or NaN in epoch \d"):
        trained(tmp_path / "a", wild)


def test_wrong_input(tmp_path) -> None:
    x, y = data()
    cases = [
        ((x.double(), y), "float32"),
        ((x[:, 0], y), "images"),
        ((x[:0], y[:0]), "images"),
        ((x, y[:-1]), "labels"),
        ((x, y.float()), "labels"),
        ((x, y - 1), "go from -1"),
        ((x, y + 1), "to 3"),
    ]
    for (inputs, labels), words in cases:
        with pytest.raises(InputError, match=words):
            train_experts(SMALL, network, inputs, labels, CLASSES, tmp_path / "a", seed=0, identity={})
    with pytest.raises(InputError, match=r"logits \[2, 2\]"):
        train_experts(SMALL, network, x, y % 2, 2, tmp_path / "a", seed=0, identity={})
    with pytest.raises(InputError, match="running statistics"):
        train_experts(SMALL, lambda seed: nn.Sequential(nn.BatchNorm2d(2), network(seed)), x, y, CLASSES, tmp_path / "a", seed=0, identity={})
    with pytest.raises(InputError, match="JSON"):
        trained(tmp_path / "a", identity={"x": float("nan")})
    assert not (tmp_path / "a").exists()
    for wrong in ({"count": 0}, {"lr": 0.0}, {"momentum": 1.0}, {"together": 0}, {"epoch": 3}, {"rate_drop": {"factor": 2.0}}, {"loss_scale": {"start": 0.0}}):
        with pytest.raises(ValidationError):
            ExpertSpec(**wrong)


def test_every_field_says_what_it_is() -> None:
    for spec in (ExpertSpec, RateDrop, LossRamp, GradientPenalty, SharpnessSpec):
        assert all(one.description for one in spec.model_fields.values())
    assert ExpertSpec().augment == DSASpec()
    assert ExpertSpec().at_once(torch.device("cpu")) == 1
    assert ExpertSpec().at_once(torch.device("meta")) == 8
    assert ExpertSpec(together=3).at_once(torch.device("cpu")) == 3
