"""Distiller: the loss is the sum that it says, one player trains everything, teachers live and recorded, refusals."""

from collections.abc import Mapping
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck import seeds
from limbeck.contract import Batch, Clock
from limbeck.errors import InputError
from limbeck.language.feature_losses import attention_mse, masked_cosine, masked_cross_entropy, masked_mse, pkd
from limbeck.language.layer_maps import transport_plan
from limbeck.language.mixup import draw_mix, mixed_embeddings
from limbeck.language.mutual_information import bound
from limbeck.methods.language.distiller import Distiller, prediction_loss
from limbeck.teachers import EnsembleTeacher, ModuleTeacher

V, C, L = 30, 5, 6
KINDS = ("mse", "ce", "cosine", "pkd", "attention", "mi", "infonce", "nwj", "tuba", "jsd")


class Small(nn.Module):
    """An encoder with `encode`: layers of attention over all tokens and a tanh; logits from the first token."""

    def __init__(self, layers: int, width: int, heads: int = 2, seed: int = 0, attention: bool = True) -> None:
        super().__init__()
        self.words, self.shows = nn.Embedding(V, width), attention
        self.positions = nn.Embedding(16, width)
        self.mixers = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(layers))
        self.maps = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.out, self.heads = nn.Linear(width, C), heads
        generator = seeds.generator(seed, "small")
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, 0.3, generator=generator)

    def encode(self, inputs: Tensor, *, attention: bool = False) -> SimpleNamespace:
        ids, mask = inputs.unbind(1)
        h = self.words(ids) + self.positions.weight[: ids.shape[1]]
        hidden, maps = [h], []
        for mixer, layer in zip(self.mixers, self.maps, strict=True):
            q, k = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in mixer(h).chunk(2, -1))
            a = (q @ k.transpose(-1, -2)).masked_fill(mask[:, None, None] == 0, -torch.inf).softmax(-1)
            h = h + torch.tanh(layer((a @ h[:, None]).mean(1)))
            hidden.append(h)
            maps.append(a)
        shown = tuple(maps) if attention and self.shows else None
        return SimpleNamespace(hidden=tuple(hidden), attention=shown, mask_BL=mask.bool(), logits_BC=self.out(h[:, 0]))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.encode(inputs).logits_BC


def a_batch(B: int = 6, seed: int = 0) -> Batch:
    generator = seeds.generator(seed, "batch")
    ids = torch.randint(0, V, (B, L), generator=generator)
    lengths = torch.randint(2, L + 1, (B,), generator=generator)
    mask = (torch.arange(L)[None] < lengths[:, None]).long()
    return Batch(torch.stack((ids, mask), 1), torch.randint(0, C, (B,), generator=generator), torch.arange(B))


def bound_method(student: nn.Module | None = None, teacher: object = None, **knobs: object) -> Distiller:
    student = Small(2, 8, seed=1) if student is None else student
    teacher = ModuleTeacher(Small(4, 12, seed=2)) if teacher is None else teacher
    return Distiller(**knobs).bind(student=student, teacher=teacher, num_classes=C)


def step(method: Distiller, batch: Batch | None = None) -> tuple[Tensor, Mapping[str, Tensor]]:
    (update,) = method.updates(a_batch() if batch is None else batch, Clock(seed=3))
    assert update.player == "student"
    return update.loss, update.metrics


def states(method: Distiller, batch: Batch) -> tuple[SimpleNamespace, SimpleNamespace]:
    return tuple(module.encode(batch.inputs, attention=True) for module in (method.student, method.teacher.members[0]))


@pytest.mark.parametrize("mapping", ["skip", "last", "emd"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_weighted_sum_over_the_matched_layers(kind: str, mapping: str) -> None:
    method = bound_method(intermediate=kind, mapping=mapping, alpha=0.5, w_kd=0.7, w_int=0.3, w_hard=0.2, critic_hidden=(9,), critic_out=4)
    batch, nets = a_batch(), method.bundle.matching
    s, t = states(method, batch)
    maps = kind == "attention"
    tables = {"skip": [(0, 1), (1, 3)] if maps else [(0, 0), (1, 2), (2, 4)], "last": [(0, 2), (1, 3)] if maps else [(0, 2), (1, 3), (2, 4)]}
    first = 0 if maps else 1
    tables["emd"] = [(n, m) for n in range(first, 2 + first) for m in range(first, 4 + first)] + ([] if maps else [(0, 0)])

    def between(i: int, n: int, m: int) -> Tensor:
        if maps:
            return attention_mse(s.attention[n], t.attention[m], s.mask_BL)
        x, y = s.hidden[n], t.hidden[m]
        if kind in ("mse", "ce", "cosine", "pkd"):
            x = nets.projections[i](x)
            return pkd(x, y) if kind == "pkd" else {"mse": masked_mse, "ce": masked_cross_entropy, "cosine": masked_cosine}[kind](x, y, s.mask_BL)
        j = i if mapping == "emd" else 0
        baseline = nets.baselines[j](y[:, 0]) if kind in ("mi", "tuba") else None
        return -bound(kind, nets.critics[j](x[:, 0], y[:, 0]), baseline, 0.5)

    losses = torch.stack([between(i, n, m) for i, (n, m) in enumerate(tables[mapping])])
    if mapping == "emd":
        body = (losses if maps else losses[:-1]).view(2, 4)
        expected = (transport_plan(body) * body).sum() + (0 if maps else losses[-1])
    else:
        expected = losses.sum()
    loss, metrics = step(method, batch)
    torch.testing.assert_close(metrics["intermediate"], expected)
    torch.testing.assert_close(loss, 0.7 * metrics["prediction"] + 0.3 * expected + 0.2 * F.cross_entropy(s.logits_BC, batch.targets))


def test_prediction_losses_have_no_factor_of_the_temperature() -> None:
    s, t = torch.randn(2, 4, C)
    p, q = (t / 3).softmax(-1), (s / 3).log_softmax(-1)
    torch.testing.assert_close(prediction_loss(s, t, "ce", 3.0), -(p * q).sum(-1).mean())
    torch.testing.assert_close(prediction_loss(s, t, "mse", 3.0), ((s - t) / 3).square().mean())
    loss, metrics = step(bound_method(intermediate="none", prediction="mse"))
    assert set(metrics) == {"prediction"}
    torch.testing.assert_close(loss, metrics["prediction"])


@pytest.mark.parametrize("kind", KINDS)
def test_one_player_trains_student_and_nets_and_the_teacher_gets_nothing(kind: str) -> None:
    method = bound_method(intermediate=kind)
    (player,) = method.players().values()
    trained = dict(player.module.named_parameters())
    assert {name for name, _ in method.student.named_parameters(prefix="student")} <= set(trained)
    nets = [name for name in trained if name.startswith("matching.")]
    assert bool(nets) == (kind != "attention")
    # the embeddings' pair: the first token's state does not depend on the sample where all begin alike, which these do not
    step(method)[0].backward()
    unused = {name for name, p in trained.items() if p.grad is None}
    assert not {name for name in unused if name.startswith("matching.")}
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    assert method.inference() is method.student
    assert not any("matching" in name or "projection" in name for name in method.artefact().module.state_dict())


def test_critics_are_shared_or_not() -> None:
    def count(mapping: str, nets: str) -> tuple[int, int]:
        matching = bound_method(intermediate="mi", mapping=mapping, nets=nets).bundle.matching
        return len(matching.critics), len(matching.baselines)

    assert count("skip", "mapping") == count("last", "mapping") == count("emd", "shared") == (1, 1)
    assert count("skip", "each") == (3, 3)
    assert count("emd", "mapping") == count("emd", "each") == (9, 9)
    assert len(bound_method(intermediate="infonce").bundle.matching.baselines) == 0


def test_projections_start_at_002_where_widths_differ_and_seeds_decide() -> None:
    method = bound_method(Small(2, 40), ModuleTeacher(Small(4, 60)), intermediate="mse")
    weights = torch.cat([p.weight.flatten() for p in method.bundle.matching.projections])
    assert len(method.bundle.matching.projections) == 3
    assert abs(float(weights.detach().std()) - 0.02) < 0.001
    assert all(not p.bias.any() for p in method.bundle.matching.projections)
    assert not bound_method(Small(2, 12), intermediate="mse").bundle.matching.projections
    assert not bound_method(intermediate="mi").bundle.matching.projections
    again = Distiller(intermediate="mse").bind(student=Small(2, 40), teacher=ModuleTeacher(Small(4, 60)), seed=0)
    other = Distiller(intermediate="mse").bind(student=Small(2, 40), teacher=ModuleTeacher(Small(4, 60)), seed=1)
    torch.testing.assert_close(again.bundle.matching.projections[0].weight, method.bundle.matching.projections[0].weight)
    assert (other.bundle.matching.projections[0].weight != method.bundle.matching.projections[0].weight).any()


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    student = Small(4, 12, seed=2)
    for kind in ("mse", "cosine", "pkd", "attention"):
        _, metrics = step(bound_method(student, intermediate=kind, prediction="mse"))
        assert metrics["intermediate"].abs() < 1e-6
        assert metrics["prediction"] == 0


def test_heads_may_be_compared_by_their_mean() -> None:
    student = Small(2, 9, heads=3)
    with pytest.raises(InputError, match="as many heads"):
        step(bound_method(student, intermediate="attention"))
    method, batch = bound_method(student, intermediate="attention", heads="mean"), a_batch()
    s, t = states(method, batch)
    expected = sum(attention_mse(s.attention[n].mean(1)[:, None], t.attention[m].mean(1)[:, None], s.mask_BL) for n, m in ((0, 1), (1, 3)))
    torch.testing.assert_close(step(method, batch)[1]["intermediate"], expected)


def test_bounds_may_read_the_mean_of_tokens() -> None:
    method, batch = bound_method(intermediate="infonce", vector="mean", rows="student"), a_batch()
    s, t = states(method, batch)
    mask = batch.inputs[:, 1, :, None].float()
    expected = torch.zeros(())
    for n, m in ((0, 0), (1, 2), (2, 4)):
        x, y = ((h * mask).sum(1) / mask.sum(1) for h in (s.hidden[n], t.hidden[m]))
        expected = expected - bound("infonce", method.bundle.matching.critics[0](x, y), rows="student")
    torch.testing.assert_close(step(method, batch)[1]["intermediate"], expected)


# ---- mixup -------------------------------------------------------------------------------------------------------------


def test_mixup_doubles_the_batch_for_both_and_leaves_the_labels_to_the_rows_that_have_them() -> None:
    method, batch = bound_method(intermediate="mse", mixup=0.4, w_hard=1.0), a_batch()
    mix = draw_mix(len(batch), Clock(seed=3).generator("mixup"), 0.4)

    student, teacher = method.student, method.teacher.members[0]
    rows: dict[str, Tensor] = {}
    for name, network in (("student", student), ("teacher", teacher)):
        mixed = mixed_embeddings(network.words(batch.inputs[:, 0]), mix)
        handle = network.words.register_forward_hook(lambda module, args, out, mixed=mixed: mixed)
        rows[name] = network(torch.cat((batch.inputs, batch.inputs)))
        handle.remove()
    _, metrics = step(method, batch)
    torch.testing.assert_close(metrics["prediction"], prediction_loss(rows["student"], rows["teacher"], "ce", 1.0))
    torch.testing.assert_close(metrics["hard"], F.cross_entropy(rows["student"][: len(batch)], batch.targets))


def test_an_ensemble_is_mixed_too() -> None:
    twins = EnsembleTeacher([Small(2, 8, seed=1), Small(2, 8, seed=1)])
    _, metrics = step(bound_method(Small(2, 8, seed=1), twins, intermediate="none", prediction="ce", mixup=0.4))
    logits = bound_method(Small(2, 8, seed=1), ModuleTeacher(Small(2, 8, seed=1)), intermediate="none", mixup=0.4)
    torch.testing.assert_close(metrics["prediction"], step(logits)[1]["prediction"])


# ---- records -----------------------------------------------------------------------------------------------------------


class Recorded:
    """What a record's teacher looks like to a method: answers come with the batch; `lookup` for their shapes."""

    def __init__(self, network: Small, batch: Batch, taps: tuple[str, ...]) -> None:
        with torch.no_grad():
            found = network.encode(batch.inputs)
        features = {f"features/{tap}": found.hidden[i] for i, tap in enumerate(taps) if tap}
        self.recorded = {"logits": found.logits_BC[:, None], **features}

    def lookup(self, ids_B: Tensor, views_B: Tensor) -> dict[str, Tensor]:
        return {name: value[ids_B] for name, value in self.recorded.items()}

    def logits(self, batch: Batch) -> Tensor:
        return batch.recorded["logits"][:, 0]


@pytest.mark.parametrize("kind", ["none", "mse", "mi"])
def test_a_record_teaches_what_the_network_would(kind: str) -> None:
    network, taps, batch = Small(4, 12, seed=2), ("h0", "", "h2", "", "h4"), a_batch()
    record = Recorded(network, batch, taps)
    replayed = Batch(batch.inputs, batch.targets, batch.ids, recorded=record.recorded)
    live, recorded = (bound_method(Small(2, 8, seed=1), teacher, intermediate=kind, taps=taps) for teacher in (ModuleTeacher(network), record))
    torch.testing.assert_close(step(recorded, replayed)[0], step(live, batch)[0])


def test_what_a_record_does_not_hold_is_said() -> None:
    network, batch = Small(4, 12, seed=2), a_batch()
    record = Recorded(network, batch, ("h0", "", "h2", "", "h4"))
    for knobs, told in (
        ({"intermediate": "mse"}, "'taps' names no"),
        ({"intermediate": "mse", "taps": ("h0", "h1", "h2", "", "h4")}, "no features 'h1'"),
        ({"intermediate": "attention"}, "attention maps"),
        ({"intermediate": "none", "mixup": 0.4}, "mixed embeddings"),
    ):
        with pytest.raises(InputError, match=told):
            bound_method(teacher=record, **knobs)
    method = bound_method(teacher=record, intermediate="mse", mapping="last", taps=("h0", "", "h2", "", "h4"))
    with pytest.raises(InputError, match="hidden state 3 is matched and not recorded"):
        step(method, Batch(batch.inputs, batch.targets, batch.ids, recorded=record.recorded))


# ---- the door ----------------------------------------------------------------------------------------------------------


def test_networks_that_do_not_show_their_states_are_refused() -> None:
    class Closed(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return torch.zeros(len(inputs), C)

    with pytest.raises(InputError, match="hidden states"):
        bound_method(Closed())
    with pytest.raises(InputError, match="hidden states"):
        bound_method(teacher=ModuleTeacher(Closed()))
    step(bound_method(teacher=ModuleTeacher(Closed()), intermediate="none"))
    with pytest.raises(InputError, match="one teacher's"):
        bound_method(teacher=EnsembleTeacher([Small(4, 12), Small(4, 12)]))
    with pytest.raises(InputError, match="attention maps"):
        bound_method(teacher=ModuleTeacher(Small(4, 12, attention=False)), intermediate="attention")
    with pytest.raises(InputError, match="4 layers cannot be matched"):
        bound_method(Small(4, 8), ModuleTeacher(Small(2, 12)))
    bound_method(Small(4, 8), ModuleTeacher(Small(2, 12)), mapping="emd")
    with pytest.raises(InputError, match="alpha"):
        Distiller(alpha=1.1)
    with pytest.raises(InputError, match="at least 3 pairs"):
        step(bound_method(), a_batch(2))


@pytest.mark.parametrize("kind", ["mse", "mi"])
def test_training_brings_both_terms_down(kind: str) -> None:
    method = bound_method(intermediate=kind)
    optimiser = torch.optim.Adam(method.players()["student"].module.parameters(), lr=5e-3)
    seen = []
    for i in range(60):
        loss, metrics = step(method, a_batch(16, i % 4))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        seen.append({name: float(value) for name, value in metrics.items()})
    for name in ("prediction", "intermediate"):
        assert sum(row[name] for row in seen[-4:]) < sum(row[name] for row in seen[:4])


def test_facts_say_what_is_matched() -> None:
    facts = bound_method(intermediate="mse").facts()
    assert facts["matched_layers"] == [[0, 0], [1, 2], [2, 4]]
    assert facts["matching_parameters"] == 3 * (8 * 12 + 12)
    assert bound_method(intermediate="none").facts() == {}
    assert bound_method(intermediate="mse", w_int=0.0).facts() == {}
