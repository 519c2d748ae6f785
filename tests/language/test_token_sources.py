"""Where tokens come from: the rules of GKD and DistiLLM, replay that survives a restart, and rows of different lengths in one batch."""

from types import SimpleNamespace

import pytest
import torch

from limbeck.contract import IGNORE, Clock
from limbeck.errors import InputError
from limbeck.language.decoder import Decoder, decoder
from limbeck.language.rollout import Sampler
from limbeck.language.token_sources import (
    AdaptiveThreshold,
    DistiLLMSource,
    Draws,
    GKDSource,
    PromptSpec,
    ReplayBuffer,
    distillm_origins,
    gkd_origins,
    joined,
    live_model,
    rows_of,
    stopping,
)  # fmt: skip
from limbeck.language.tokens import DATA, PADDING, REPLAY, STUDENT, TEACHER, TokenBatch

V = 7


def model(seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    return decoder(V, (2, 8), layers=1, width=8, heads=2)


def text(rows: int = 4, length: int = 6) -> TokenBatch:
    return TokenBatch.from_text(torch.randint(V, (rows, length + 1), generator=torch.Generator().manual_seed(1)))


def draws(step: int = 0, micro: int = 0, each: str = "batch", steps: int = 10) -> Draws:
    return Draws.at(Clock(5, step=step, steps=steps, micro=micro), each)  # type: ignore[arg-type]


SAMPLER, PROMPTS = Sampler(max_new=4), PromptSpec(kind="prefix", length=2)


def test_gkd_takes_the_student_with_probability_lambda_and_else_the_rest() -> None:
    r = torch.tensor([0.0, 0.29, 0.3, 0.9], dtype=torch.float64)
    assert gkd_origins(r, 0.3, "data").tolist() == [STUDENT, STUDENT, DATA, DATA]
    assert gkd_origins(r, 0.3, "teacher").tolist() == [STUDENT, STUDENT, TEACHER, TEACHER]
    assert (gkd_origins(torch.rand(100), 0.0, "data") == DATA).all()
    assert (gkd_origins(torch.rand(100), 1.0, "data") == STUDENT).all()


def test_distillm_generates_below_psi_replays_up_to_phi_and_takes_data_beyond() -> None:
    r = torch.tensor([0.0, 0.19, 0.2, 0.39, 0.4, 0.9], dtype=torch.float64)
    assert distillm_origins(r, 0.4, 0.5).tolist() == [STUDENT, STUDENT, REPLAY, REPLAY, DATA, DATA]
    assert distillm_origins(r, 0.4, 0.0).tolist() == [STUDENT] * 4 + [DATA] * 2
    assert (distillm_origins(r, 0.0, 0.0) == DATA).all()


@pytest.mark.parametrize(("reference", "values"), [("previous", [0, 0, 0.1, 0.1, 0.1, 0.2]), ("last_rise", [0, 0, 0.1, 0.1, 0.2, 0.3])])
def test_the_threshold_rises_where_a_validation_is_worse_by_the_tolerance(reference: str, values: list[float]) -> None:
    threshold = AdaptiveThreshold(reference=reference)  # type: ignore[arg-type]
    seen = []
    for loss in (2.0, 2.0625, 2.1625, 2.2, 2.2875, 2.4):  # "last_rise" compares with 2, 2, 2, 2.1625, 2.1625, 2.2875
        threshold.observe(loss)
        seen.append(threshold.value)
    assert seen == pytest.approx(values)
    again = AdaptiveThreshold(reference=reference)  # type: ignore[arg-type]
    again.load_state_dict(threshold.state_dict())
    assert (again.value, again.compared) == (threshold.value, threshold.compared)
    for step in range(20):
        threshold.observe(3.0 + step)
    assert threshold.value == 1.0


def test_replay_keeps_the_newest_rows_of_any_length_and_comes_back_after_a_restart() -> None:
    buffer = ReplayBuffer(5)
    with pytest.raises(InputError, match="nothing is kept"):
        buffer.draw(1, torch.Generator())
    rows = [TokenBatch.from_text(torch.full((2, length + 1), number)) for number, length in enumerate((3, 5, 4))]
    for part in rows:
        buffer.push(part)
    assert len(buffer) == 5  # of six the first is gone
    drawn = buffer.draw(5, torch.Generator().manual_seed(0))
    assert sorted(drawn.input_ids[:, 0].tolist()) == [0, 1, 1, 2, 2]
    for row in range(5):
        number = int(drawn.input_ids[row, 0])
        length = (3, 5, 4)[number]
        assert drawn.input_ids[row, :length].tolist() == [number] * length
        assert drawn.valid[row].tolist() == [True] * length + [False] * (5 - length)
        assert drawn.segments[row].tolist() == [0] * length + [PADDING] * (5 - length)
    assert drawn.source is not None
    assert drawn.source.unique().tolist() == [REPLAY]
    assert len(buffer.draw(12, torch.Generator().manual_seed(0))) == 12

    state = buffer.state_dict()
    other = ReplayBuffer(5)
    other.load_state_dict(state)
    for part in (rows[2], rows[0]):
        buffer.push(part)
        other.push(part)
    a, b = (x.draw(4, torch.Generator().manual_seed(9)).packed() for x in (buffer, other))
    assert torch.equal(a, b)
    again = ReplayBuffer(5)
    again.load_state_dict(state)  # pushes have not changed what was saved
    assert sorted(again.draw(5, torch.Generator()).input_ids[:, 0].tolist()) == [0, 1, 1, 2, 2]
    with pytest.raises(InputError, match="holds 2"):
        ReplayBuffer(2).load_state_dict(state)
    buffer.push(TokenBatch.from_text(torch.arange(9)[:, None].expand(9, 4) % V))
    assert len(buffer) == 5
    assert sorted(buffer.draw(5, torch.Generator()).input_ids[:, 0].tolist()) == sorted([4, 5, 6, 0, 1])


def test_a_choice_a_batch_is_the_same_for_all_micro_batches_and_one_a_row_is_not() -> None:
    student, tokens = model(), text()
    source = GKDSource(student, None, SAMPLER, PROMPTS, 0.5)
    origins = []
    for step in range(12):
        found = [source.next(tokens, draws(step, micro)) for micro in (0, 1)]
        kinds = [part.source.unique().tolist() for part in found if part.source is not None]
        assert kinds[0] == kinds[1]
        assert len(kinds[0]) == 1
        if kinds[0] == [STUDENT]:
            assert not torch.equal(found[0].targets, found[1].targets)
        else:
            assert torch.equal(found[0].input_ids, tokens.input_ids)
        origins += kinds[0]
    assert set(origins) == {DATA, STUDENT}
    rows = GKDSource(student, model(1), SAMPLER, PROMPTS, 0.5, "teacher", "row")
    mixed = rows.next(tokens, draws(3, each="row"))
    assert mixed.source is not None
    assert mixed.source.unique().tolist() == [TEACHER, STUDENT]
    assert len(mixed) == 4


def test_rows_of_data_and_drawn_ones_stand_in_one_batch() -> None:
    tokens = text(rows=6, length=9)
    tokens = TokenBatch(tokens.input_ids, tokens.positions, tokens.segments, tokens.targets, annotations={"score": torch.arange(6.0)}, whole=True)
    found = GKDSource(model(), None, SAMPLER, PROMPTS, 0.5, each="row").next(tokens, draws(1, each="row"))
    assert found.source is not None
    assert found.source.unique().tolist() == [DATA, STUDENT]
    ours = found.source == DATA
    assert found.valid[ours].all()
    assert (found.valid[~ours].sum(1) == 4).all()
    assert found.input_ids.shape[1] == 9
    # the drawn rows go on from the prompts of the rows that they stand for
    theirs = {tuple(row) for row in tokens.input_ids[:, :2].tolist()}
    assert all(tuple(row) in theirs for row in found.input_ids[~ours, :2].tolist())
    assert "score" not in found.annotations  # drawn rows have none


def test_distillm_draws_where_nothing_is_kept_and_replays_afterwards() -> None:
    threshold, buffer = AdaptiveThreshold(), ReplayBuffer(8)
    threshold.value = 1.0
    source = DistiLLMSource(model(), SAMPLER, PROMPTS, threshold, buffer)
    late = Draws(torch.Generator().manual_seed(0), torch.Generator().manual_seed(0), torch.Generator().manual_seed(0), progress=1.0)  # ψ = 0: replay always
    first = source.next(text(), late)
    assert first.source is not None
    assert first.source.unique().tolist() == [STUDENT]
    assert len(buffer) == 4
    second = source.next(text(), late)
    assert second.source is not None
    assert second.source.unique().tolist() == [REPLAY]
    assert sorted(map(tuple, second.packed()[:, 1].tolist())) == sorted(map(tuple, first.packed()[:, 1].tolist()))
    assert len(buffer) == 4
    r = torch.tensor([0.5])
    assert source.choose(r, 1.0).tolist() == [REPLAY]
    assert DistiLLMSource(model(), SAMPLER, PROMPTS, threshold, buffer, "generate").choose(r, 1.0).tolist() == [STUDENT]  # the buffer is not full
    threshold.value = 0.0
    assert source.next(text(), late).source.unique().tolist() == [DATA]  # type: ignore[union-attr]


def test_joining_pads_and_picking_keeps_everything() -> None:
    a, b = text(2, 3), text(2, 5)
    both = joined([a, b])
    assert both.input_ids.shape == (4, 5)
    assert not both.whole
    assert (both.targets[:2, 3:] == IGNORE).all()
    assert (both.segments[:2, 3:] == PADDING).all()
    assert joined([a, a]).whole
    scored = TokenBatch(b.input_ids, b.positions, b.segments, b.targets, weight=torch.rand(2, 5), annotations={"x": torch.rand(2, 5, 3), "y": torch.rand(2)})
    narrow = TokenBatch(a.input_ids, a.positions, a.segments, a.targets, annotations={"x": torch.rand(2, 3, 3), "y": torch.rand(2), "z": torch.rand(2)})
    told = joined([narrow, scored])
    assert told.weight is not None
    torch.testing.assert_close(told.weight[:2, :3], torch.ones(2, 3))
    assert set(told.annotations) == {"x", "y"}
    assert told.annotations["x"].shape == (4, 5, 3)
    picked = rows_of(told, torch.tensor([3, 0]))
    torch.testing.assert_close(picked.annotations["y"], told.annotations["y"][[3, 0]])
    with pytest.raises(InputError, match="no rows"):
        joined([])


def test_teachers_that_cannot_draw_are_refused_and_texts_end_where_the_tokenizer_says() -> None:
    from limbeck.language.sources import ModelSource

    one = model()
    assert live_model(ModelSource([one]), "this") is one
    with pytest.raises(InputError, match="an ensemble"):
        live_model(ModelSource([model(), model(1)]), "this")
    with pytest.raises(InputError, match="a record"):
        live_model(object(), "this")
    with pytest.raises(InputError, match="can draw"):
        GKDSource(one, None, SAMPLER, PROMPTS, rest="teacher")
    data = SimpleNamespace(tokenizer=SimpleNamespace(eos=3))
    assert stopping(SAMPLER, data).stop == (3,)  # type: ignore[arg-type]
    assert stopping(Sampler(stop=(1,)), data).stop == (1,)  # type: ignore[arg-type]
    assert stopping(SAMPLER, None) == SAMPLER
