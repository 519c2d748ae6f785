"""How well a language model predicts text: likelihood, accuracy, calibration, and how closely it follows its teacher (engine sheet §9).

Legend: B rows of L positions, N positions that count, n of a chunk, V vocabulary, k kept entries, M bins; y the target, p the teacher, q the model, both at
temperature 1. A position whose logits are no distribution (NaN, +inf, or −inf only) counts as a wrong answer and makes the averages over it undefined.
Only n·V numbers are held at a time; nothing is read from the device before the end (but how many positions of a batch have a target).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from limbeck.contract import IGNORE, Batch, Data
from limbeck.data import evaluation_batches
from limbeck.data.splits import origins, root
from limbeck.errors import InputError
from limbeck.evaluate.classifier import calibration
from limbeck.evaluate.predict import device_of
from limbeck.evaluate.statistics import Bin
from limbeck.language.calibration import BINS, answer_positions, trust_score
from limbeck.language.models import LanguageModel
from limbeck.language.signals import ABSENT, DenseLike, Head, SignalSource, TeacherSignal, TopKSignal
from limbeck.language.tokens import TokenBatch
from limbeck.modes import evaluating

CHUNK_FLOATS = 1 << 24
"""About how many logits are held at a time."""


@dataclass(frozen=True)
class LanguageMetrics:
    """What is reported of a language model. Every value is JSON-safe: None where it is undefined or not a finite number.

    tokens: positions that count. nll: nats a token. perplexity: e^nll. bits_per_byte: Σ nll / (ln 2 · bytes of the targets), None where the data do not say.
    accuracy: fraction of targets that are the most likely token. ece: in [0, 1], of the most likely token's probability over the whole vocabulary.
    Against the teacher, None without one: agreement (same most likely token, of the teacher's kept ones where it keeps k), kl_to_teacher: KL(p‖q), nats,
    acceptance: Σ_v min(p_v, q_v) in [0, 1], the rate at which speculative decoding keeps a token (2211.17192). kl_to_teacher_kept: KL over k + 1 outcomes, the
    kept tokens and all others as one (at the record's temperature), where the teacher keeps k: never above KL(p‖q), and not to be compared with it.
    nonfinite: positions whose logits are no distribution.
    """

    tokens: int
    nll: float | None
    perplexity: float | None
    bits_per_byte: float | None
    accuracy: float
    ece: float | None
    bins: tuple[Bin, ...]
    kl_to_teacher: float | None = None
    kl_to_teacher_kept: float | None = None
    agreement: float | None = None
    acceptance: float | None = None
    nonfinite: int = 0

    @property
    def trust(self) -> float | None:
        """Accuracy − ECE: one number, higher is better (FIRST, eq. 8 of our sheet)."""
        return None if self.ece is None else trust_score(self.accuracy, self.ece)


def evaluate_language(
    model: LanguageModel,
    data: Data,
    source: SignalSource | None = None,
    *,
    batch_size: int = 16,
    device: torch.device | None = None,
    indices: Tensor | None = None,
    answers_only: bool = False,
    bins: int = BINS,
) -> LanguageMetrics:
    """A language model's metrics over rows of tokens, in order, in eval mode, without gradient.

    Args:
        model: the model; it is left in the mode it was in. data: its inputs are int64 [B, 2 | 4, L] (`TokenBatch.of`).
        source: the teacher, or a record whose ids are positions in `data`; None: none.
        batch_size: rows a call. device: where the rows go; None: where the model is.
        indices: [M] which rows; None: all. answers_only: count only the first target of every segment: the answer, where an example is prompt and answer.

    Raises:
        InputError: no position counts, the inputs are no rows of tokens, or model and teacher differ in vocabulary.
    """
    place = device_of(model) if device is None else device
    found: dict[str, list[Tensor]] = {}
    with torch.no_grad(), ExitStack() as modes:
        modes.enter_context(evaluating(model))
        if isinstance(source, nn.Module):
            modes.enter_context(evaluating(source))
        head = model.head()
        for inputs, _, ids_B in evaluation_batches(data, batch_size, indices):
            tokens = TokenBatch.of(Batch(inputs.to(place), None, ids_B, recorded=_recorded(source, ids_B))).to(place)
            if answers_only:
                tokens = replace(tokens, targets=tokens.targets.masked_fill(~answer_positions(tokens), IGNORE))
            rows = tokens.rows()
            if len(rows) == 0:
                continue
            hidden_Nd = rows.gather(model.hidden(tokens))
            signal = None if source is None else source.get(tokens)
            for scores in _chunks(hidden_Nd, head, rows.targets_N, signal):
                for name, values_n in scores.items():
                    found.setdefault(name, []).append(values_n)
    if not found:
        raise InputError("there is no token to evaluate on.", where="data", fix="Give rows that have targets.")
    counted = None if answers_only else target_bytes(data, indices)
    return _summary({name: torch.cat(parts).cpu().double() for name, parts in found.items()}, counted, bins)


def _recorded(source: SignalSource | None, ids_B: Tensor) -> dict[str, Tensor]:
    """What a record holds for these rows (its first view); nothing of a teacher that answers itself."""
    lookup = getattr(source, "lookup", None)
    return {} if lookup is None else lookup(ids_B, torch.zeros_like(ids_B))


def _chunks(hidden_Nd: Tensor, head: Head, targets_N: Tensor, signal: TeacherSignal | None) -> Iterator[dict[str, Tensor]]:
    """The scores of every position, some rows of logits at a time: name → [n]."""
    step = max(1, min(1024, CHUNK_FLOATS // len(head.weight_Vd)))
    for start in range(0, len(hidden_Nd), step):
        stop = min(start + step, len(hidden_Nd))
        logits_nV = head.logits(hidden_Nd[start:stop]).float()
        scores, logq_nV = token_scores(logits_nV, targets_N[start:stop])
        if isinstance(signal, TopKSignal):
            kept = signal.cut(start, stop)
            if kept.temperature != 1.0:
                logq_nV = torch.log_softmax(logits_nV / kept.temperature, -1)
            scores |= kept_scores(logq_nV, kept.ids_Nk, kept.logp_Nk)
        elif isinstance(signal, DenseLike):
            logp_nV = signal.log_probs(start, stop)
            if logp_nV.shape != logq_nV.shape:
                raise InputError(
                    f"the teacher's vocabulary has {logp_nV.shape[1]} entries, the model's {logq_nV.shape[1]}.",
                    where="teacher",
                    fix="Compare models that share a tokenizer.",
                )
            scores |= teacher_scores(logq_nV, logp_nV)
        yield scores


def token_scores(logits_nV: Tensor, targets_n: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What a model says of its targets: {"nll", "confidence", "correct", "nonfinite"}, [n] each, and log q [n, V].

    Args:
        logits_nV: [n, V] float32. targets_n: [n] int64 in [0, V).

    confidence is the largest probability; of equals the first counts as the guess; a row that is no distribution guesses nothing.
    """
    lse_n1 = torch.logsumexp(logits_nV, -1, keepdim=True)
    broken_n = ~torch.isfinite(lse_n1[:, 0])
    logq_nV = logits_nV - lse_n1
    nll_n = -logq_nV.gather(1, targets_n[:, None])[:, 0]
    best_n, guess_n = logq_nV.max(-1)
    correct_n = (guess_n == targets_n) & ~broken_n
    confidence_n = best_n.exp().masked_fill(broken_n, torch.nan)
    return {"nll": nll_n, "confidence": confidence_n, "correct": correct_n.float(), "nonfinite": broken_n.float()}, logq_nV


def teacher_scores(logq_nV: Tensor, logp_nV: Tensor) -> dict[str, Tensor]:
    """A model against a teacher that says everything: {"kl": KL(p‖q) in nats, "agreement", "acceptance": Σ min(p, q)}, [n] each.

    Args:
        logq_nV, logp_nV: [n, V] log-probabilities of model and teacher; entries of −inf have probability 0.
    """
    p_nV = logp_nV.exp()
    terms_nV = torch.where(logp_nV == -torch.inf, 0.0, p_nV * (logp_nV - logq_nV))
    acceptance_n = torch.minimum(p_nV, logq_nV.exp()).sum(-1)
    return {"kl": terms_nV.sum(-1), "agreement": _agrees(logq_nV, logp_nV.argmax(-1)), "acceptance": acceptance_n}


def kept_scores(logq_nV: Tensor, ids_nk: Tensor, logp_nk: Tensor) -> dict[str, Tensor]:
    """A model against a teacher that keeps k entries: {"kl_kept", "agreement"}, [n] each.

    Args:
        logq_nV: [n, V] log-probabilities of the model. ids_nk: [n, k] int64, different within a row, or ABSENT (−1). logp_nk: [n, k] theirs.

    kl_kept = Σ_S p log(p/q) + p_r log(p_r/q_r), where r is everything that is not kept (policy "tail", §4 of the engine sheet). 0 ≤ kl_kept ≤ KL(p‖q).
    """
    absent_nk = ids_nk == ABSENT
    logq_nk = logq_nV.gather(1, ids_nk.clamp(min=0)).masked_fill(absent_nk, -torch.inf)
    logp_nk = logp_nk.masked_fill(absent_nk, -torch.inf)
    rest_p_n, rest_q_n = _log_rest(logp_nk), _log_rest(logq_nk)
    terms_nk = torch.where(logp_nk == -torch.inf, 0.0, logp_nk.exp() * (logp_nk - logq_nk))
    best_n = ids_nk.gather(1, logp_nk.argmax(-1, keepdim=True))[:, 0]
    return {"kl_kept": terms_nk.sum(-1) + rest_p_n.exp() * (rest_p_n - rest_q_n), "agreement": _agrees(logq_nV, best_n)}


def _agrees(logq_nV: Tensor, best_n: Tensor) -> Tensor:
    """[n] 0 or 1: whether the model's most likely token is this one; a row that is no distribution agrees with nothing."""
    largest_n, guess_n = logq_nV.max(-1)
    return ((guess_n == best_n) & ~largest_n.isnan()).float()


def _log_rest(log_nk: Tensor) -> Tensor:
    """[n]: log(1 − Σ_S e^log), the sum clamped to at most 1 − 1e-7."""
    return torch.log(-torch.expm1(torch.logsumexp(log_nk, -1).clamp(max=-1e-7)))


def target_bytes(data: Data, indices: Tensor | None = None) -> int | None:
    """UTF-8 bytes of the targets of these rows, by the data's `bytes_per_row` (an int64 [R] over the whole data set); None where it has none."""
    per_row = getattr(root(data), "bytes_per_row", None)
    if not isinstance(per_row, Tensor):
        return None
    rows_M = origins(data) if indices is None else origins(data).index_select(0, indices)
    return int(per_row.index_select(0, rows_M).sum())


def exposure(on_text: LanguageMetrics, on_samples: LanguageMetrics) -> float | None:
    """How much farther, in nats a token, a model is from its teacher on its own continuations than on text; None where either has no dense teacher."""
    if on_text.kl_to_teacher is None or on_samples.kl_to_teacher is None:
        return None
    return on_samples.kl_to_teacher - on_text.kl_to_teacher


def _summary(found: dict[str, Tensor], counted: int | None, bins: int) -> LanguageMetrics:
    """Scores of all positions ([N] float64 on the CPU each) to the metrics."""
    correct_N, nll = found["correct"], found["nll"].mean().item()
    # calibration's case of two classes: the guess, which is right (0) or wrong (1)
    guess_N2 = torch.stack((found["confidence"], torch.zeros_like(correct_N)), 1)
    ece, table = calibration(guess_N2, 1 - correct_N.long(), bins)

    def mean(name: str) -> float | None:
        return _finite(found[name].mean().item()) if name in found else None

    return LanguageMetrics(
        tokens=len(correct_N),
        nll=_finite(nll),
        perplexity=_finite(math.exp(nll)) if nll < 700 else None,
        bits_per_byte=_finite(found["nll"].sum().item() / (math.log(2) * counted)) if counted else None,
        accuracy=correct_N.mean().item(),
        ece=_finite(ece),
        bins=table,
        kl_to_teacher=mean("kl"),
        kl_to_teacher_kept=mean("kl_kept"),
        agreement=mean("agreement"),
        acceptance=mean("acceptance"),
        nonfinite=int(found["nonfinite"].sum()),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
