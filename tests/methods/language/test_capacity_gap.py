"""MiniMA's loss (7), first weights out of the teacher, sizes, restarts, artefacts, and what is refused (sheet `capacity_gap`, invariants 4 and 6)."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import limbeck
from limbeck import seeds
from limbeck.components import Component
from limbeck.contract import Batch, Clock, OptimiserSpec, Phase, Update
from limbeck.errors import InputError, Interrupted
from limbeck.evaluate.language import evaluate_language
from limbeck.language.decoder import Decoder
from limbeck.language.importance import importance
from limbeck.language.models import LanguageModel
from limbeck.language.pruning import global_shape, reordered
from limbeck.language.signals import Head
from limbeck.language.sources import RECORDED_IDS, RECORDED_LOGP, ModelSource, recorded_signal
from limbeck.language.texts import TokenData, windows
from limbeck.language.tokenizers import tokenizer_from
from limbeck.language.tokens import TokenBatch
from limbeck.methods.language.capacity_gap import CapacityGap
from limbeck.methods.language.capacity_gap_part import PruningConfig, calibration, pruned, size
from limbeck.methods.language.next_token import NextToken
from limbeck.methods.language.token_kd import TokenKD
from limbeck.models.fresh import build_model
from limbeck.recipe import Recipe
from limbeck.train import TrainConfig, Trainer

V, L = 27, 12
WORDS = "the quick brown fox jumps over a lazy dog and sleeps under that old tree while two small birds watch him from above "


def text(count: int = 60) -> TokenData:
    """Rows of made-up sentences in 27 characters."""
    words = WORDS.split()
    draws = torch.randint(0, len(words), (count * 3,), generator=seeds.generator(5)).tolist()
    return windows([" ".join(words[n] for n in draws)], tokenizer_from({"name": "characters", "alphabet": " abcdefghijklmnopqrstuvwxyz"}), L)


def network(seed: int = 0, **args: Any) -> Decoder:
    made = build_model(Component(name="decoder", args={"layers": 2, "width": 32, "heads": 4, "ffn": 40, **args}), num_classes=V, input_shape=(2, L), seed=seed)
    assert isinstance(made, Decoder)
    return made


def small(seed: int = 1) -> Decoder:
    return network(seed, width=16, heads=2, ffn=24)


def batch(rows: int = 6) -> Batch:
    data = text()
    return Batch(data.prepare(data.fetch(torch.arange(rows))[0]))


class Bench:
    device = torch.device("cpu")


def entered(teacher: LanguageModel | None = None, student: LanguageModel | None = None, seed: int = 0, **knobs: Any) -> CapacityGap:
    """Bound to a teacher and, as the engine does at the start of training, entered."""
    source = ModelSource([network() if teacher is None else teacher])
    made = CapacityGap(**knobs).bind(student=small() if student is None else student, teacher=source, train=text(), num_classes=V, seed=seed)
    made.enter(Phase(), Clock(), Bench())  # type: ignore[arg-type]
    return made


def only(updates: Iterator[Update]) -> Update:
    (found,) = updates
    return found


# ---- (7) ----------------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_sheets_and_so_is_its_gradient() -> None:
    method, rows = entered(initialise="student"), batch()
    update = only(method.updates(rows, Clock()))
    z, u = method.student(rows.inputs).flatten(0, 1), method.teacher.models[0](rows.inputs).flatten(0, 1).detach()  # type: ignore[attr-defined]
    y, p = rows.inputs[:, 1].flatten(), u.softmax(-1)
    hard, soft = F.cross_entropy(z, y), -(p * z.log_softmax(-1)).sum(-1).mean()
    entropy = -(p * u.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(update.loss, 0.5 * hard + 0.5 * (soft - entropy))
    torch.testing.assert_close(update.metrics["cross_entropy"], hard.detach())
    torch.testing.assert_close(update.metrics["forward_kl"], (soft - entropy).detach())
    wanted = torch.autograd.grad(0.5 * hard + 0.5 * soft, list(method.student.parameters()))
    found = torch.autograd.grad(update.loss, list(method.student.parameters()))
    torch.testing.assert_close(list(found), list(wanted), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("soft", "hard"), [(1.0, 0.0), (0.0, 1.0), (0.5, 0.0)])
def test_with_one_half_alone_it_is_distillation_or_language_modelling(soft: float, hard: float) -> None:
    teacher, student, rows = network(), small(), batch()
    own = CapacityGap(initialise="student", soft=soft, hard=hard).bind(student=student, teacher=ModelSource([teacher]), num_classes=V)
    other = TokenKD(soft=soft).bind(student=student, teacher=ModelSource([teacher])) if soft else NextToken().bind(student=student)
    torch.testing.assert_close(only(own.updates(rows, Clock())).loss, only(other.updates(rows, Clock())).loss)


def test_at_sparsity_zero_the_student_is_the_teacher_and_only_the_text_pulls() -> None:
    teacher = network()
    method, rows = entered(teacher, sparsity=0.0), batch()
    torch.testing.assert_close(method.student(rows.inputs), teacher(rows.inputs), rtol=1e-4, atol=1e-5)
    update = only(method.updates(rows, Clock()))
    assert abs(float(update.metrics["forward_kl"])) < 1e-6
    with torch.no_grad():
        p = teacher(rows.inputs).flatten(0, 1).softmax(-1)
    y = F.one_hot(rows.inputs[:, 1].flatten(), V)
    z = method.student(rows.inputs).flatten(0, 1)
    wanted = torch.autograd.grad(z, list(method.student.parameters()), grad_outputs=0.5 * (p - y) / len(y))  # ∂L/∂z = ½ (p − e_y) / N
    found = torch.autograd.grad(update.loss, list(method.student.parameters()))
    torch.testing.assert_close(list(found), list(wanted), rtol=1e-3, atol=1e-5)


# ---- first weights ------------------------------------------------------------------------------------------------------


def test_the_student_is_what_importance_leaves_of_the_teacher() -> None:
    teacher = network()
    before = copy.deepcopy(teacher.state_dict())
    method = entered(teacher, sparsity=0.5, multiple=4)
    assert isinstance(method.student, Decoder)
    batches = list(calibration(text(), PruningConfig(), 0, torch.device("cpu")))
    assert [len(tokens) for tokens in batches] == [8] * (len(text()) // 8) + [len(text()) % 8]
    scores = importance(teacher, batches)
    assert method.student.shape == global_shape(teacher.shape, scores, 0.29, multiple=4)
    sorted_teacher = reordered(teacher, scores)
    torch.testing.assert_close(method.student.embedding.weight, sorted_teacher.embedding.weight[:, : method.student.shape.width])
    assert all(p.requires_grad for p in method.student.parameters())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def test_the_report_is_told_real_sizes() -> None:
    facts = entered(sparsity=0.5).facts()
    shape = network().shape
    assert facts["teacher_parameters"] == shape.parameters
    assert facts["teacher_parameters_without_embeddings"] == shape.parameters - V * 32
    assert facts["student_parameters"] - facts["student_parameters_without_embeddings"] == V * facts["width"]
    assert facts["sparsity"] == pytest.approx(0.5, abs=0.1)
    assert facts["teacher_to_student"] == pytest.approx(1 / (1 - facts["sparsity"]), abs=0.01)
    assert entered(initialise="student").facts() == {}


@pytest.mark.parametrize("cut", ["global", "uniform"])
def test_without_a_sparsity_it_is_as_large_as_the_recipes_student_or_as_said(cut: str) -> None:
    wanted = small().shape.layer_parameters
    assert size(small()) == wanted
    assert size(entered(cut=cut, multiple=1).student) == pytest.approx(wanted, rel=0.05)
    assert size(entered(cut=cut, multiple=1, parameters=6000).student) == pytest.approx(6000, rel=0.08)


def test_the_uniform_cut_takes_layers_away() -> None:
    method = entered(network(layers=4), cut="uniform", layers=2, sparsity=0.3)
    assert isinstance(method.student, Decoder)
    assert len(set(method.student.shape.layers)) == 1
    assert len(method.student.shape.layers) == 2
    assert entered(network(layers=4), cut="uniform", layers=2, parameters=3000).facts()["student_parameters_without_embeddings"] < 4000


def test_calibration_depends_on_the_seed_alone_and_random_cuts_too() -> None:
    for scores in ("importance", "random"):
        knobs = {"sparsity": 0.6, "scores": scores, "calibration_batches": 2}
        a, b, c = (entered(seed=seed, **knobs).student for seed in (0, 0, 1))
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
        assert not torch.equal(a(batch().inputs), c(batch().inputs))


def test_cutting_by_importance_hurts_a_trained_teacher_less_than_cutting_by_lot() -> None:
    teacher, data = network(), text(400)
    optimiser = OptimiserSpec(name="adamw", lr=0.01)
    Trainer(NextToken().bind(student=teacher, train=data), data, TrainConfig(steps=150, batch_size=32, optimiser=optimiser)).fit()
    lost = {}
    for scores in ("importance", "random"):
        found = [evaluate_language(pruned(teacher, data, PruningConfig(scores=scores, multiple=1), 10000, seed), data, None).nll for seed in range(3)]
        lost[scores] = sum(found) / 3 - evaluate_language(teacher, data, None).nll
    assert 0 < lost["importance"] < 0.8 * lost["random"]


def test_a_llama_of_transformers_is_converted_and_cut() -> None:
    transformers = pytest.importorskip("transformers")
    from limbeck.language.huggingface import CausalLM

    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64
    )
    teacher = CausalLM(transformers.LlamaForCausalLM(config))
    whole = entered(teacher, sparsity=0.0)
    torch.testing.assert_close(whole.student(batch().inputs), teacher(batch().inputs), rtol=1e-4, atol=1e-5)
    assert size(teacher) == size(whole.student)
    method = entered(teacher, sparsity=0.6)
    assert only(method.updates(batch(), Clock())).loss.isfinite()
    assert method.facts()["sparsity"] > 0.4


# ---- teachers that are records ------------------------------------------------------------------------------------------


class Recorded:
    """Stands for a record: what it says came with the batch."""

    def get(self, tokens: TokenBatch) -> Any:
        return recorded_signal(tokens)


def test_a_given_student_learns_from_a_record_too() -> None:
    rows, teacher = batch(), network()
    with torch.no_grad():
        logp, ids = teacher(rows.inputs).log_softmax(-1).sort(-1, descending=True)
    recorded = Batch(rows.inputs, recorded={RECORDED_IDS: ids, RECORDED_LOGP: logp})
    own = CapacityGap(initialise="student").bind(student=small(), teacher=Recorded(), num_classes=V)  # type: ignore[arg-type]
    live = entered(teacher, initialise="student")
    torch.testing.assert_close(only(own.updates(recorded, Clock())).loss, only(live.updates(rows, Clock())).loss)


# ---- in the engine ------------------------------------------------------------------------------------------------------


def trained(folder: Path, stop_at: int | None = None) -> CapacityGap:
    """Six steps with a checkpoint after every second; `stop_at`: a signal comes in that step."""
    data = text()
    made = CapacityGap(sparsity=0.5, calibration_batches=2).bind(student=small(), teacher=ModelSource([network()]), train=data, num_classes=V, seed=3)
    config = TrainConfig(steps=6, batch_size=8, log_every=2, checkpoint_steps=2, accumulate=2, optimiser=OptimiserSpec(name="adamw", lr=0.01))
    trainer, inner = Trainer(made, data, config, folder=folder, seed=3), made.updates

    def stopping(rows: Batch, clock: Clock) -> Iterator[Update]:
        trainer._signal = 15 if clock.step == stop_at else trainer._signal
        yield from inner(rows, clock)

    made.updates = stopping  # type: ignore[method-assign]
    trainer.fit()
    return made


def test_a_training_that_was_stopped_ends_as_one_that_was_not(tmp_path: Path) -> None:
    whole = trained(tmp_path / "a")
    with pytest.raises(Interrupted):
        trained(tmp_path / "b", stop_at=3)
    again = trained(tmp_path / "b")
    assert again.shape == whole.shape != small().shape
    for name, value in whole.student.state_dict().items():
        assert torch.equal(value, again.student.state_dict()[name]), name
    assert not torch.equal(whole.student.state_dict()["norm.weight"], torch.ones(whole.facts()["width"]))


def test_a_run_keeps_a_student_of_its_own_shape_and_loads_it_again(tmp_path: Path) -> None:
    optimiser = {"name": "adamw", "lr": 0.01}
    recipe = {
        "name": "tiny", "method": {"name": "capacity_gap", "parameters": 1200, "calibration_batches": 2, "multiple": 4},
        "teacher": {"model": {"name": "decoder", "layers": 2, "width": 16, "heads": 2}, "train": {"steps": 10, "batch_size": 16, "optimiser": optimiser}},
        "student": {"model": {"name": "decoder", "layers": 1, "width": 8, "heads": 1}},
        "data": {"source": {"name": "python_manual", "tokenizer": "bytes", "length": 24}, "train_size": 96, "test_size": 24},
        "train": {"steps": 8, "batch_size": 16, "optimiser": optimiser, "log_every": 4},
        "evaluate": {"batch_size": 8, "latency": False}, "threads": 1, "device": "cpu",
    }  # fmt: skip
    found = limbeck.distill(Recipe.parse(recipe), run=tmp_path / "run")
    assert isinstance(found.student, Decoder)
    assert found.student.shape.layer_parameters == pytest.approx(1200, rel=0.15)
    again = limbeck.load(tmp_path / "run")
    assert isinstance(again, Decoder)
    assert again.shape == found.student.shape
    rows = torch.randint(0, 256, (2, 2, 24), generator=seeds.generator(0))
    torch.testing.assert_close(again(rows), found.student(rows))
    assert found.summary.facts["student_parameters_without_embeddings"] == found.student.shape.layer_parameters
    assert {arm.role for arm in found.summary.arms} == {"teacher", "alone", "distilled"}


# ---- what is refused ----------------------------------------------------------------------------------------------------


class Foreign(LanguageModel):
    """A language model that nobody can prune."""

    def __init__(self) -> None:
        super().__init__()
        self.vocabulary, self.embedding = V, nn.Embedding(V, 4)

    def hidden(self, tokens: TokenBatch) -> Tensor:
        return self.embedding(tokens.input_ids)

    def head(self) -> Any:
        return Head(self.embedding.weight)


@pytest.mark.parametrize(
    ("teacher", "knobs", "what"),
    [
        (Recorded(), {}, "no weights to start from"),
        (ModelSource([network(), network(1)]), {}, "2 teachers"),
        (ModelSource([Foreign()]), {}, "no LlamaForCausalLM"),
        (ModelSource([network()]), {"parameters": 10**6}, "cannot be cut out"),
        (ModelSource([small()]), {"parameters": size(small()) + 1}, "cannot be cut out"),
        (ModelSource([network()]), {"soft": 0.0, "hard": 0.0}, "nothing to learn"),
    ],
)
def test_what_cannot_be_pruned_is_refused_before_training(teacher: Any, knobs: dict[str, Any], what: str) -> None:
    with pytest.raises(InputError, match=what):
        CapacityGap(**knobs).bind(student=small(), teacher=teacher, train=text(), num_classes=V)


@pytest.mark.parametrize(
    ("knobs", "what"),
    [
        ({"sparsity": 0.5, "parameters": 100}, "leave one out"),
        ({"layers": 2}, "uniform"),
        ({"sparsity": 1.0}, "less than 1"),
        ({"multiple": 0}, "greater than or equal to 1"),
        ({"scores": "magnitude"}, "importance"),
    ],
)
def test_knobs_that_do_not_fit(knobs: dict[str, Any], what: str) -> None:
    with pytest.raises(InputError, match=what):
        CapacityGap(**knobs)


def test_a_teacher_that_cuts_to_the_size_of_its_own_student_stays_whole() -> None:
    assert entered(network(), network(3), multiple=1).facts()["sparsity"] == 0
    assert size(Foreign()) == 0
