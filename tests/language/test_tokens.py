"""Token batches: from the engine's tensors and back, valid positions, attention, annotations of positions and of rows."""

from dataclasses import replace

import pytest
import torch

from limbeck.contract import IGNORE, Batch
from limbeck.errors import InputError
from limbeck.language.tokens import PADDING, REPLAY, STUDENT, TokenBatch


def packed_rows() -> TokenBatch:
    """Two rows of 5: segments of 3 and 2; a segment of 2 (its prompt has no target) and padding."""
    ids = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 0, 0, 0]])
    targets = torch.tensor([[4, 5, IGNORE, 7, IGNORE], [9, IGNORE, IGNORE, IGNORE, IGNORE]])
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]])
    segments = torch.tensor([[0, 0, 0, 1, 1], [0, 0, PADDING, PADDING, PADDING]])
    return TokenBatch(ids, positions, segments, targets)


def test_whole_rows_from_text() -> None:
    tokens = TokenBatch.from_text(torch.arange(12).view(2, 6))
    assert tokens.input_ids.tolist() == [[0, 1, 2, 3, 4], [6, 7, 8, 9, 10]]
    assert tokens.targets.tolist() == [[1, 2, 3, 4, 5], [7, 8, 9, 10, 11]]
    assert tokens.positions.tolist() == [list(range(5))] * 2
    assert not tokens.segments.any()
    assert tokens.whole
    assert tokens.attention() is None
    assert tokens.packed().shape == (2, 2, 5)
    assert len(tokens.rows()) == 10


def test_the_engines_tensors_and_back() -> None:
    for tokens in (packed_rows(), TokenBatch.from_text(torch.arange(12).view(2, 6))):
        inputs = tokens.packed()
        assert inputs.shape == (2, 2 if tokens.whole else 4, 5)
        again = TokenBatch.of(Batch(inputs, recorded={"tokens/ids": torch.zeros(2, 5, 3)}))
        for name in ("input_ids", "targets", "positions", "segments"):
            assert torch.equal(getattr(again, name), getattr(tokens, name)), name
        assert again.whole == tokens.whole
        assert list(again.annotations) == ["tokens/ids"]
        assert torch.equal(again.packed(), inputs)


@pytest.mark.parametrize(
    "inputs", [torch.zeros(2, 2, 5), torch.zeros(2, 3, 5, dtype=torch.int64), torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 2, 5, dtype=torch.int32)]
)
def test_other_inputs_are_refused(inputs: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"\[B, 2, L\] or \[B, 4, L\]"):
        TokenBatch.of(Batch(inputs))


def test_rows_are_the_positions_with_a_target() -> None:
    tokens = replace(
        packed_rows(),
        weight=torch.arange(10.0).view(2, 5).double(),
        source=torch.tensor([STUDENT, REPLAY]),
        annotations={"at": torch.arange(20).view(2, 5, 2), "row": torch.tensor([[10.0], [20.0]]), "one": torch.tensor([1, 2])},
    )
    rows = tokens.rows()
    assert rows.where_N.tolist() == [0, 1, 3, 5]
    assert rows.targets_N.tolist() == [4, 5, 7, 9]
    assert rows.weight_N.tolist() == [0, 1, 3, 5]
    assert rows.weight_N.dtype == torch.float32
    assert rows.annotations["at"].tolist() == [[0, 1], [2, 3], [6, 7], [10, 11]]
    assert rows.annotations["row"].tolist() == [[10], [10], [10], [20]]
    assert rows.annotations["one"].tolist() == [1, 1, 1, 2]
    assert rows.annotations["source"].tolist() == [STUDENT, STUDENT, STUDENT, REPLAY]
    assert rows.where_N.tolist() == tokens.valid.flatten().nonzero()[:, 0].tolist()
    assert packed_rows().rows().weight_N.tolist() == [1, 1, 1, 1]
    assert "source" not in packed_rows().rows().annotations


def test_cuts_put_together_are_the_whole() -> None:
    rows = replace(packed_rows(), annotations={"at": torch.arange(20).view(2, 5, 2)}).rows()
    parts = [rows.cut(0, 1), rows.cut(1, 3), rows.cut(3, 9)]
    assert [len(part) for part in parts] == [1, 2, 1]
    for name in ("where_N", "targets_N", "weight_N"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(rows, name))
    assert torch.equal(torch.cat([part.annotations["at"] for part in parts]), rows.annotations["at"])


def test_gathering_is_differentiable() -> None:
    rows = packed_rows().rows()
    hidden_BLd = torch.arange(30.0).view(2, 5, 3).requires_grad_()
    found = rows.gather(hidden_BLd)
    assert found[:, 0].tolist() == [0, 3, 9, 15]
    found.sum().backward()
    assert hidden_BLd.grad[..., 0].flatten().nonzero()[:, 0].tolist() == rows.where_N.tolist()


def test_attention_is_causal_within_a_segment() -> None:
    mask = packed_rows().attention()
    assert mask.shape == (2, 1, 5, 5)
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    assert mask[1, 0].int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]
    whole = replace(TokenBatch.from_text(torch.arange(12).view(2, 6)), whole=False)
    assert torch.equal(whole.attention(), torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 1, 5, 5))


def test_a_batch_without_targets_has_no_rows() -> None:
    empty = replace(packed_rows(), targets=torch.full((2, 5), IGNORE))
    assert len(empty.rows()) == 0
    assert empty.rows().gather(torch.zeros(2, 5, 3)).shape == (0, 3)


def test_moving_takes_everything_along() -> None:
    tokens = replace(
        packed_rows(), weight=torch.ones(2, 5), source=torch.zeros(2, dtype=torch.int64), annotations={"a": torch.ones(2)}, extras={"image": torch.ones(2)}
    )
    moved = tokens.to(torch.device("meta"))
    told = [moved.input_ids, moved.positions, moved.segments, moved.targets, moved.weight, moved.source, moved.annotations["a"], moved.extras["image"]]
    assert all(tensor.device.type == "meta" for tensor in told)
    assert len(tokens) == 2
