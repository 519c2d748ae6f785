"""Teachers of another tokenizer: losses of merged rows by definition, and what the teacher is asked about the student's text."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from limbeck.contract import IGNORE
from limbeck.errors import InputError
from limbeck.language.alignment import NONE
from limbeck.language.cross_tokenizer import (
    GOLD,
    ULD,
    CrossLosses,
    CrossTokenizerSource,
    MergedLoss,
    crop_vocabulary,
    cross_tokenizer_loss,
    matched_divergence,
    matching,
    sorted_distance,
)  # fmt: skip
from limbeck.language.decoder import Decoder, decoder
from limbeck.language.tokenizers import Bytes, Characters, Spans
from limbeck.language.tokens import PADDING, TokenBatch

SEEDS = st.integers(0, 2**31)


class Greedy:
    """A tokenizer of given pieces, the longest first, with an end and, if wanted, a start."""

    name = "greedy"
    cls: int | None = None
    sep: int | None = None
    template: str | None = None

    def __init__(self, pieces: Sequence[str], *, start: bool = False) -> None:
        self._pieces = [piece.encode() for piece in pieces] + [b""] * (2 if start else 1)
        self.vocabulary = len(self._pieces)
        self.eos: int | None = len(pieces)
        self.bos: int | None = len(pieces) + 1 if start else None
        self.pad = len(pieces)
        self.start = self.bos
        self.fingerprint = repr(self._pieces)

    def encode(self, text: str) -> list[int]:
        raw, found = text.encode(), []
        while raw:
            fits = [i for i, piece in enumerate(self._pieces) if piece and raw.startswith(piece)]
            if not fits:
                raise InputError("no piece fits.")
            best = max(fits, key=lambda i: len(self._pieces[i]))
            found.append(best)
            raw = raw[len(self._pieces[best]) :]
        return found

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.pieces(ids)).decode()

    def byte_spans(self, text: str) -> Spans:
        ids = self.encode(text)
        ends = np.cumsum([len(self._pieces[i]) for i in ids], dtype=np.int64).reshape(-1)
        starts = np.concatenate(([0], ends[:-1])) if len(ids) else ends
        return Spans(np.array(ids, np.int32), np.stack((starts, ends), 1))

    def pieces(self, ids: Sequence[int]) -> list[bytes]:
        return [self._pieces[i] for i in ids]

    def token_strings(self) -> list[str]:
        return [piece.decode() for piece in self._pieces]

    def chat(self, messages: Sequence[Mapping[str, str]], *, ask: bool = False) -> str:
        raise InputError("none")


WORDS = ["a", "b", "c", " ", "ab", " c", "bc", "abc"]
LETTERS = Characters("abc ", end=True)


def model(vocabulary: int, seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    found = decoder(vocabulary, (2, 8), layers=1, width=16, heads=2)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return found.double()


def simplex(seed: int, rows: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(rows, size, generator=generator, dtype=torch.float64)).softmax(1)


def gjsd(p: torch.Tensor, q: torch.Tensor, beta: float) -> torch.Tensor:
    if beta == 0:
        return (p * (p / q).log()).sum(1)
    if beta == 1:
        return (q * (q / p).log()).sum(1)
    m = beta * p + (1 - beta) * q
    return (beta * p * (p / m).log() + (1 - beta) * q * (q / m).log()).sum(1)


# ---- losses ----------------------------------------------------------------------------------------------------------


@given(SEEDS)
def test_uld_is_zero_for_permuted_vocabularies_and_symmetric_and_pads_with_zeros(seed: int) -> None:
    """Invariant (ix)."""
    p, q = simplex(seed, 4, 7), simplex(seed + 1, 4, 5)
    permuted = p[:, torch.randperm(7, generator=torch.Generator().manual_seed(seed))]
    torch.testing.assert_close(sorted_distance(p, permuted), torch.zeros(4, dtype=torch.float64))
    padded = torch.cat((q, torch.zeros(4, 2, dtype=torch.float64)), 1)
    expected = (p.sort(1).values - padded.sort(1).values).abs().sum(1)
    torch.testing.assert_close(sorted_distance(p, q), expected)
    torch.testing.assert_close(sorted_distance(q, p), expected)
    assert (expected <= 2).all()


@given(SEEDS, st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
def test_the_matched_divergence_is_gjsd_on_whole_rows_and_never_negative_on_parts(seed: int, beta: float) -> None:
    p, q = simplex(seed, 6, 9), simplex(seed + 1, 6, 9)
    torch.testing.assert_close(matched_divergence(p, q, beta), gjsd(p, q, beta), atol=1e-6, rtol=1e-5)
    assert (matched_divergence(p[:, :4], q[:, :4], beta) >= 0).all()
    torch.testing.assert_close(matched_divergence(p[:, :4], p[:, :4], beta), torch.zeros(6, dtype=torch.float64))


def test_gold_adds_up_its_parts_with_fixed_or_adaptive_weights() -> None:
    p, q = simplex(0, 3, 9), simplex(1, 3, 5)
    student, teacher = Greedy(["a", "b", " c", "x"]), Greedy(WORDS)
    ids = matching(student, teacher)
    pairs = dict(zip(ids.student.tolist(), ids.teacher.tolist(), strict=True))
    assert pairs == {0: 0, 1: 1, 2: 5, 4: 8}  # the ends of text too
    assert ids.student_rest.tolist() == [3]
    assert ids.teacher_rest.tolist() == [2, 3, 4, 6, 7]
    assert ids.share == pytest.approx(4 / 9)
    matched, rest = gjsd(p[:, [0, 1, 5, 8]], q[:, [0, 1, 2, 4]], 0.3), sorted_distance(p[:, [2, 3, 4, 6, 7]], q[:, [3]])
    ell, parts = GOLD(ids, 0.3)(p, q)
    torch.testing.assert_close(parts["matched"], matched, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(parts["rest"], rest)
    torch.testing.assert_close(ell, 4 / 9 * parts["matched"] + 5 / 9 * rest)
    torch.testing.assert_close(GOLD(ids, 0.3, (2.0, 0.5))(p, q)[0], 2 * parts["matched"] + 0.5 * rest)


def test_matching_reads_marks_as_bytes_takes_the_last_of_equal_pieces_and_equal_tokenizers_id_for_id() -> None:
    double = Greedy(["a", "b", "a"])
    assert matching(double, Greedy(["a", "a"])).teacher.tolist() == [1, 2]
    assert matching(double, double).student.tolist() == [0, 1, 2, 3]
    assert matching(double, double).teacher_rest.tolist() == []
    wide = matching(Bytes(), LETTERS, (300, 9))  # heads longer than their tokenizers
    assert sorted(wide.student.tolist()) == sorted([ord(c) for c in "abc "] + [256])
    assert len(wide.student_rest) == 295
    assert len(wide.teacher_rest) == 4


def test_cropping_cuts_both_to_the_smaller_vocabulary() -> None:
    a, b = torch.randn(3, 5), torch.randn(3, 7)
    for one, other in (crop_vocabulary(a, b), reversed(crop_vocabulary(b, a))):
        assert torch.equal(one, a)
        assert torch.equal(other, b[:, :5])


# ---- what the teacher is asked ---------------------------------------------------------------------------------------


def written(text: str, tokenizer: object = LETTERS, *, end: bool = False) -> TokenBatch:
    ids = tokenizer.encode(text) + ([tokenizer.eos] if end else [])  # type: ignore[attr-defined]
    return TokenBatch.from_text(torch.tensor([ids]))


def test_one_tokenizer_on_both_sides_gives_the_teachers_own_rows_and_gjsd() -> None:
    """Invariant (viii)."""
    V = LETTERS.vocabulary
    teacher, student = model(V), model(V, 1)
    ids = torch.randint(4, (3, 13), generator=torch.Generator().manual_seed(0))
    tokens = TokenBatch.from_text(ids)
    source = CrossTokenizerSource(teacher, LETTERS, LETTERS)
    pair = source.pair(tokens)
    assert pair.groups.student.group_N.tolist() == list(range(36))
    assert pair.groups.teacher.group_N.tolist() == list(range(36))
    own = teacher(tokens.packed()).log_softmax(-1).flatten(0, 1)
    signal = source.get(tokens)
    torch.testing.assert_close(signal.rows_GV, own.exp())
    assert signal.groups.tolist() == [[n, n + 1, n, n + 1] for n in range(36)]
    found = loss_of(student, tokens, pair, GOLD(matching(LETTERS, LETTERS), 0.5), chunk=5)
    q = student(tokens.packed()).softmax(-1).flatten(0, 1)
    torch.testing.assert_close(found.loss, gjsd(own.exp(), q, 0.5).mean(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.parts["rest"], torch.zeros((), dtype=torch.float64))


def loss_of(student: Decoder, tokens: TokenBatch, pair: object, objective: MergedLoss, *, chunk: int = 128, strategy: str = "first") -> CrossLosses:
    rows = tokens.rows()
    return cross_tokenizer_loss(rows.gather(student.hidden(tokens)), student.head(), rows.targets_N, pair, objective, chunk=chunk, strategy=strategy)  # type: ignore[arg-type]


@pytest.mark.parametrize("start", [False, True])
def test_groups_of_letters_and_words_hold_the_joint_probabilities_of_what_was_written(start: bool) -> None:
    words = Greedy(WORDS, start=start)
    teacher = model(words.vocabulary)
    tokens = written("abcab cbcc", end=True)  # letters; the first is given, so the teacher reads "a" and then "bc|ab| c|bc|c" and the end
    source = CrossTokenizerSource(teacher, words, LETTERS)
    pair = source.pair(tokens)
    assert pair.groups.student.group_N.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 5]
    assert pair.groups.teacher.group_N.tolist() == [0, 1, 2, 3, 4, 5]
    theirs = [*([words.start] if start else []), 0, 6, 4, 5, 6, 2, words.eos]
    logp = teacher(TokenBatch.from_text(torch.tensor([theirs])).packed())[0].log_softmax(-1)[-6:]
    torch.testing.assert_close(pair.merged(0, 6, "first"), logp)
    assert pair.targets_M.tolist() == [6, 4, 5, 6, 2, words.eos]
    # and the other way round: words are the student's, letters the teacher's
    other = CrossTokenizerSource(model(LETTERS.vocabulary), LETTERS, words).pair(written("abcab cbcc", words, end=True))  # abc|ab| c|bc|c and the end
    assert other.groups.teacher.group_N.tolist() == [0, 0, 1, 1, 2, 2, 3, 4]
    logp = model(LETTERS.vocabulary)(written("abcab cbcc", end=True).packed())[0].log_softmax(-1)[2:]  # the given "abc" is not predicted
    y = other.targets_M
    for strategy, at, factor in (("first", 0, logp[1, y[1]]), ("last", 1, logp[0, y[0]])):
        torch.testing.assert_close(other.merged(0, 5, strategy)[0], logp[at] + factor)  # type: ignore[arg-type]
        torch.testing.assert_close(other.merged(0, 5, strategy)[0, y[at]], logp[0, y[0]] + logp[1, y[1]])  # type: ignore[arg-type]


def test_prompts_are_read_and_not_compared_and_packed_segments_are_read_apart() -> None:
    words = Greedy(WORDS)
    teacher = model(words.vocabulary)
    source = CrossTokenizerSource(teacher, words, LETTERS)
    ids = torch.tensor([[*LETTERS.encode("ab cab abc"), 0]])
    targets = torch.full_like(ids, IGNORE)
    targets[0, 3:5] = torch.tensor(LETTERS.encode("ab"))  # "ab c" is given, "ab" predicted
    targets[0, 7:9] = torch.tensor(LETTERS.encode("bc"))  # the second text: "a" given, "bc" predicted
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 0]])
    segments = torch.tensor([[0] * 7 + [1] * 3 + [PADDING]])
    tokens = TokenBatch(ids, positions, segments, targets)
    pair = source.pair(tokens)
    assert pair.groups.student.group_N.tolist() == [0, 0, 1, 1]
    assert pair.targets_M.tolist() == [4, 6]
    first = teacher(TokenBatch.from_text(torch.tensor([words.encode("ab") + words.encode(" c") + words.encode("ab")])).packed())[0, -1]
    second = teacher(TokenBatch.from_text(torch.tensor([[0, 6]])).packed())[0, -1]
    torch.testing.assert_close(pair.merged(0, 2, "first"), torch.stack((first, second)).log_softmax(-1))


def test_characters_that_are_cut_are_shown_as_question_marks_and_left_out() -> None:
    text = Bytes().encode("aé")[:2] + Bytes().encode("b é") + Bytes().encode("c")
    tokens = TokenBatch.from_text(torch.tensor([text]))  # a, half of é | b, space, é (two bytes), c
    letters = Characters("abcé ?", end=True)
    pair = CrossTokenizerSource(model(letters.vocabulary), letters, Bytes()).pair(tokens)
    assert pair.groups.student.group_N.tolist() == [NONE, 0, 1, 2, 2, 3]
    assert pair.groups.teacher.group_N.tolist() == [NONE, 0, 1, 2, 3]
    assert [letters.alphabet[i] for i in pair.targets_M] == ["?", "b", " ", "é", "c"]


def test_the_papers_alignment_compares_place_by_place() -> None:
    words = Greedy(WORDS)
    pair = CrossTokenizerSource(model(words.vocabulary), words, LETTERS, alignment="positions").pair(written("abcab cbcc", end=True))
    assert pair.groups.student.group_N.tolist() == [0, 1, 2, 3, 4, NONE, NONE, NONE, NONE, 5]
    assert pair.groups.teacher.group_N.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("strategy", ["first", "last"])
@pytest.mark.parametrize("which", ["uld", "gold"])
def test_parts_change_neither_the_loss_nor_its_gradient_and_it_is_its_definition(which: str, strategy: str) -> None:
    words = Greedy(WORDS, start=True)
    student, teacher = model(LETTERS.vocabulary, 1), model(words.vocabulary)
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(4, (3, 20), generator=generator)
    tokens = TokenBatch.from_text(text)
    weight = torch.rand(3, 19, generator=generator)
    tokens = TokenBatch(tokens.input_ids, tokens.positions, tokens.segments, tokens.targets, weight=weight, whole=True)
    pair = CrossTokenizerSource(teacher, words, LETTERS).pair(tokens)
    objective = ULD() if which == "uld" else GOLD(matching(LETTERS, words), 0.5)
    whole = loss_of(student, tokens, pair, objective, strategy=strategy)
    slopes = torch.autograd.grad(whole.loss, list(student.parameters()), allow_unused=True)
    small = loss_of(student, tokens, pair, objective, chunk=2, strategy=strategy)
    torch.testing.assert_close(small.loss, whole.loss)
    for a, b in zip(torch.autograd.grad(small.loss, list(student.parameters()), allow_unused=True), slopes, strict=True):
        torch.testing.assert_close(a, b)
    for name in whole.parts:
        torch.testing.assert_close(small.parts[name], whole.parts[name])
    # by definition, group by group
    logq = student(tokens.packed()).log_softmax(-1).flatten(0, 1)
    y, w = tokens.targets.flatten(), weight.flatten()
    p_GW = pair.merged(0, len(pair.groups), strategy).exp()  # type: ignore[arg-type]
    total, mass = torch.zeros((), dtype=torch.float64), 0.0
    for g in range(len(pair.groups)):
        places = (pair.groups.student.group_N == g).nonzero()[:, 0].tolist()
        kept = places[0] if strategy == "first" else places[-1]
        row = logq[kept] + sum(logq[n, y[n]] for n in places if n != kept)
        total = total + float(w[places].mean()) * objective(p_GW[g : g + 1], row.exp()[None])[0][0]
        mass += float(w[places].mean())
    torch.testing.assert_close(whole.loss, total / mass, atol=1e-6, rtol=1e-5)


def test_no_target_gives_zero_with_a_graph_and_wrong_input_is_refused() -> None:
    words = Greedy(WORDS)
    student = model(LETTERS.vocabulary)
    blank = TokenBatch.from_inputs(torch.stack((torch.zeros(2, 4, dtype=torch.int64), torch.full((2, 4), IGNORE)), 1))
    source = CrossTokenizerSource(model(words.vocabulary), words, LETTERS)
    pair = source.pair(blank)
    found = loss_of(student, blank, pair, ULD())
    assert float(found.loss) == 0
    found.loss.backward()
    assert source.get(blank).rows_GV.shape == (0, words.vocabulary)

    class Lossy(Greedy):
        def encode(self, text: str) -> list[int]:
            return super().encode("".join(c for c in text if c in "abc "))

    with pytest.raises(InputError, match="do not spell"):
        CrossTokenizerSource(model(words.vocabulary), words, Lossy(WORDS))
    tokens = written("abc")
    with pytest.raises(InputError, match="chunk of 0"):
        loss_of(student, tokens, source.pair(tokens), ULD(), chunk=0)
    with pytest.raises(InputError, match="groups are of"):
        loss_of(student, written("abca"), source.pair(tokens), ULD())
    with pytest.raises(InputError, match="beta"):
        matched_divergence(torch.rand(1, 2), torch.rand(1, 2), 2.0)
