"""How the logits of a row are stored: fixed-width arrays, the way back, and what the way costs.

Legend: R rows of C classes; p = softmax(logits), q what is decoded. A *gap* is log p − log p_max ≤ 0: the largest entry is stored without error, and float16
and 8-bit levels are finest where the probability is. Everything is a pure function of the row: the same bytes whatever is encoded beside it. Logits are finite.
Stored soft labels with a few classes a view: FKD (2112.01528), FerKD (2312.17473). The 8-bit levels, the gaps and the measured errors are ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, ClassVar, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from limbeck.errors import InputError, suggestion

Array = NDArray[Any]
Layout = dict[str, tuple[np.dtype[Any], int]]
"""The arrays of a row: name to dtype and number of entries."""

T = TypeVar("T")

Levels = Literal["quadratic", "linear"]
Tail = Literal["spread", "renormalise"]

ABSENT = -1e4
"""The logarithm that stands for probability 0: exp gives 0, and float16 holds it."""

_LOST = 1e-37  # what a class must have at least for its loss to count: below, float32 holds no ordinary numbers
_TOP_LEVEL = 255


@dataclass(frozen=True)
class Codec:
    """One way to store a row of logits. Subclasses are frozen; `spec` and `codec_from` turn them into plain values and back."""

    name: ClassVar[str]

    def spec(self) -> dict[str, Any]:
        """Plain values, JSON's, that `codec_from` takes."""
        return {"name": self.name, **asdict(self)}

    def check(self, classes: int) -> None:
        """Raises InputError where this codec cannot hold rows of so many classes."""
        if classes < 1:
            raise InputError(f"a row of {classes} classes cannot be stored.", where="classes", fix="There must be at least one class.")

    def layout(self, classes: int) -> Layout:
        """The arrays of a row."""
        raise NotImplementedError

    def encode(self, logits_RC: Array) -> dict[str, Array]:
        """Finite float32 logits [R, C] to the arrays of `layout`, each [R, entries]."""
        raise NotImplementedError

    def decode(self, arrays: Mapping[str, Array], classes: int) -> Array:
        """Arrays [R, entries] to float32 log-probabilities [R, C] (`full`: the logits themselves)."""
        raise NotImplementedError

    def bytes_per_row(self, classes: int) -> int:
        """Bytes that one row of one network takes."""
        return sum(dtype.itemsize * entries for dtype, entries in self.layout(classes).values())

    def kl_outcomes(self, logits_RC: Array, arrays: Mapping[str, Array]) -> Array | None:
        """KL [R], float64, over what is kept apart: the k classes and the tail as one. None: every class is kept."""
        return None


@dataclass(frozen=True)
class Full(Codec):
    """float32 logits, bit for bit."""

    name: ClassVar[str] = "full"

    def layout(self, classes: int) -> Layout:
        """C float32 numbers."""
        return {"logits": (np.dtype(np.float32), classes)}

    def encode(self, logits_RC: Array) -> dict[str, Array]:
        """The logits."""
        return {"logits": np.ascontiguousarray(logits_RC, np.float32)}

    def decode(self, arrays: Mapping[str, Array], classes: int) -> Array:
        """The logits, not normalised."""
        return np.array(arrays["logits"], np.float32)


@dataclass(frozen=True)
class Half(Codec):
    """float16 gaps of all classes: softmax does not see the shift, nothing overflows, and the top is finest. Gaps past 65,504 nats stop there."""

    name: ClassVar[str] = "half"

    def layout(self, classes: int) -> Layout:
        """C float16 numbers."""
        return {"gap": (np.dtype(np.float16), classes)}

    def encode(self, logits_RC: Array) -> dict[str, Array]:
        """Each row less its largest entry."""
        return {"gap": np.maximum(_shifted(logits_RC), -65504).astype(np.float16)}

    def decode(self, arrays: Mapping[str, Array], classes: int) -> Array:
        """Normalised again."""
        return _normalised(np.asarray(arrays["gap"], np.float32))


@dataclass(frozen=True)
class Log8(Codec):
    """8-bit log-probabilities of all classes, with one float32 scale a row: the row's widest gap G, at most `nats`.

    With errors δ of the stored log-probabilities, KL(p ‖ q) = ½ Var_p(δ) to second order (normalising takes the mean away). An entry within a step s_i
    has an error of variance s_i²/12, the largest has none, so the expected error is Σ_i p_i (1 − p_i) s_i² / 24. Levels l = 0 … 255 at gaps G l/255 (`linear`)
    have one step, G/255, and a KL of up to G²/(24·255²); at G (l/255)² (`quadratic`) the step at gap g is 2 √(G g)/255, and the KL is at most
    G E_p[g]/(6·255²), E_p[g] the mean gap under p. The quadratic rule wins where 4 E_p[g] < G: always but for flat rows,
    whose G, and so error, is small by either rule. It is the default.
    Gaps past `nats` are stored as `nats`, which costs at most C e^(−nats) more.

    Args:
        levels: the rule. nats: the widest gap that is told from wider ones, in (0, 10,000].
    """

    levels: Levels = "quadratic"
    nats: float = 20.0
    name: ClassVar[str] = "log8"

    def __post_init__(self) -> None:
        _check_choice("levels", self.levels, get_args(Levels))
        if isinstance(self.nats, bool) or not isinstance(self.nats, int | float) or not 0 < self.nats <= -ABSENT:
            raise InputError(f"'nats' is {self.nats!r}.", where="nats", fix="Give a number above 0, at most 10000.")

    def layout(self, classes: int) -> Layout:
        """C bytes and a scale."""
        return {"level": (np.dtype(np.uint8), classes), "scale": (np.dtype(np.float32), 1)}

    def encode(self, logits_RC: Array) -> dict[str, Array]:
        """Levels and scale."""
        level_RC, scale_R1 = _quantised(np.minimum(-_shifted(logits_RC), np.float32(self.nats)), self.levels)
        return {"level": level_RC, "scale": scale_R1}

    def decode(self, arrays: Mapping[str, Array], classes: int) -> Array:
        """Normalised again."""
        return _normalised(_gaps(arrays["level"], arrays["scale"], self.levels))

    def expected_kl(self, logits_RC: Array) -> Array:
        """The derived error, Σ p_i (1 − p_i) s_i² / 24, [R] float64; what the cap costs is not in it."""
        gap_RC = np.minimum(-_shifted(logits_RC), np.float32(self.nats)).astype(np.float64)
        p_RC = np.exp(log_softmax(logits_RC))
        widest_R1 = gap_RC.max(axis=1, keepdims=True)
        step_RC = (2 * np.sqrt(widest_R1 * gap_RC) if self.levels == "quadratic" else np.where(gap_RC > 0, widest_R1, 0.0)) / _TOP_LEVEL
        return (p_RC * (1 - p_RC) * step_RC**2).sum(axis=1) / 24


@dataclass(frozen=True)
class TopK(Codec):
    """The k largest entries, descending (ties: the lower class first): classes in the smallest unsigned integers that hold C,
    float16 gaps, and the tail's mass.

    Decoding gives the k classes the mass 1 − tail, shared by their gaps, and the others what `tail` says: "spread", the tail evenly over the C − k others;
    "renormalise", nothing (`ABSENT`), and the k classes all.

    Args:
        k: at least 1, at most the number of classes. tail: the rule.
    """

    k: int
    tail: Tail = "spread"
    name: ClassVar[str] = "topk"

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise InputError(f"'k' is {self.k!r}.", where="k", fix="Give a whole number, at least 1.")
        _check_choice("tail", self.tail, get_args(Tail))

    def check(self, classes: int) -> None:
        """Raises InputError: k is above the number of classes."""
        super().check(classes)
        if self.k > classes:
            raise InputError(f"'k' is {self.k}, and there are {classes} classes.", where="k", fix=f"Give at most {classes}.")

    def layout(self, classes: int) -> Layout:
        """k classes, k gaps and the tail."""
        index = np.dtype(np.uint8 if classes <= 2**8 else np.uint16 if classes <= 2**16 else np.uint32)
        return {"index": (index, self.k), **self._gap_layout(), "tail": (np.dtype(np.float32), 1)}

    def encode(self, logits_RC: Array) -> dict[str, Array]:
        """Classes, gaps and tail."""
        logits_RC = np.ascontiguousarray(logits_RC, np.float32)
        classes = logits_RC.shape[1]
        self.check(classes)
        index_RK = _largest(logits_RC, self.k)
        shifted_RC = _shifted(logits_RC)
        gap_RK = np.maximum(np.take_along_axis(shifted_RC, index_RK, axis=1), np.float32(ABSENT))
        mass_RC = np.exp(shifted_RC)
        total_R1 = mass_RC.sum(axis=1, keepdims=True, dtype=np.float64)
        np.put_along_axis(mass_RC, index_RK, 0, axis=1)
        tail_R1 = (mass_RC.sum(axis=1, keepdims=True, dtype=np.float64) / total_R1).astype(np.float32)
        return {"index": index_RK.astype(self.layout(classes)["index"][0]), **self._store(gap_RK), "tail": tail_R1}

    def decode(self, arrays: Mapping[str, Array], classes: int) -> Array:
        """By the rule of `tail`."""
        index_RK = arrays["index"]
        rows = len(index_RK)
        log_p_RK, tail_R1 = self._kept(arrays)
        decoded_RC = np.empty((rows, classes), np.float32)
        if self.tail == "renormalise" or self.k == classes:
            decoded_RC.fill(ABSENT)
        else:
            log_p_RK += np.log1p(-tail_R1)
            with np.errstate(divide="ignore"):
                decoded_RC[:] = np.maximum(np.log(tail_R1 / (classes - self.k)), ABSENT)
        place_RK = index_RK + (np.arange(rows) * classes)[:, None]
        decoded_RC.reshape(-1)[place_RK] = np.maximum(log_p_RK, ABSENT)
        return decoded_RC

    def kl_outcomes(self, logits_RC: Array, arrays: Mapping[str, Array]) -> Array:
        """KL [R], float64, over k + 1 outcomes: each of the k classes, and the tail as one. It does not depend on the rule of `tail`."""
        log_p_RC = log_softmax(logits_RC)
        top_RK = np.take_along_axis(log_p_RC, arrays["index"].astype(np.int64), axis=1)
        rest_RC = np.exp(log_p_RC)
        np.put_along_axis(rest_RC, arrays["index"].astype(np.int64), 0, axis=1)
        rest_R = rest_RC.sum(axis=1)
        log_q_RK, tail_R1 = self._kept(arrays)
        kept_R = np.where(top_RK > ABSENT, np.exp(top_RK) * (top_RK - log_q_RK - np.log1p(-tail_R1)), 0.0).sum(axis=1)
        tiny = 1e-46  # below float32's smallest: what is stored as 0 was less
        return np.maximum(kept_R + rest_R * (np.log(np.maximum(rest_R, tiny)) - np.log(np.maximum(tail_R1[:, 0], tiny))), 0.0)

    def _kept(self, arrays: Mapping[str, Array]) -> tuple[Array, Array]:
        """Log-probabilities among the k classes, [R, k], and the tail's mass, [R, 1], float64."""
        gap_RK = self._restore(arrays)
        return gap_RK - np.log(np.exp(gap_RK).sum(axis=1, keepdims=True)), np.asarray(arrays["tail"], np.float64)

    def _gap_layout(self) -> Layout:
        return {"gap": (np.dtype(np.float16), self.k)}

    def _store(self, gap_RK: Array) -> dict[str, Array]:
        return {"gap": gap_RK.astype(np.float16)}

    def _restore(self, arrays: Mapping[str, Array]) -> Array:
        return arrays["gap"].astype(np.float64)


@dataclass(frozen=True)
class TopK8(TopK):
    """`TopK` with 8-bit gaps by the rule of `Log8` and one float32 scale a row, the gap of the k-th entry.

    Args:
        levels: the rule.
    """

    levels: Levels = "quadratic"
    name: ClassVar[str] = "topk8"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice("levels", self.levels, get_args(Levels))

    def _gap_layout(self) -> Layout:
        return {"level": (np.dtype(np.uint8), self.k), "scale": (np.dtype(np.float32), 1)}

    def _store(self, gap_RK: Array) -> dict[str, Array]:
        level_RK, scale_R1 = _quantised(-gap_RK, self.levels)
        return {"level": level_RK, "scale": scale_R1}

    def _restore(self, arrays: Mapping[str, Array]) -> Array:
        return _gaps(arrays["level"], arrays["scale"], self.levels).astype(np.float64)


CODECS: dict[str, type[Codec]] = {codec.name: codec for codec in (Full, Half, Log8, TopK, TopK8)}


def codec_from(spec: Mapping[str, Any], *, where: str = "codec") -> Codec:
    """The codec that plain values describe: {"name": "topk", "k": 5, "tail": "spread"}.

    Raises:
        InputError: an unknown name or field, a field missing or out of range; `where` is the field's path below the given one.
    """
    return built(spec, CODECS, "codec", where)


def built(spec: Mapping[str, Any], known: Mapping[str, type[T]], what: str, where: str) -> T:
    """The dataclass of `known` that plain values name and fill. what: what it is, for errors. Raises InputError as `codec_from`."""
    values = dict(spec)
    name = values.pop("name", None)
    found: Any = known.get(name) if isinstance(name, str) else None
    if found is None:
        raise InputError(f"there is no {what} '{name}'.", where=f"{where}.name", fix=suggestion(str(name), known))
    known_fields = {field.name: field for field in fields(found)}
    for key in values:
        if key not in known_fields:
            fix = suggestion(key, known_fields) or "It has no fields."
            raise InputError(f"the codec '{name}' has no field '{key}'.", where=f"{where}.{key}", fix=fix)
    for key, field in known_fields.items():
        if key not in values and field.default is MISSING:
            raise InputError(f"the codec '{name}' needs '{key}'.", where=f"{where}.{key}", fix=f"Give it: {{name: {name}, {key}: …}}.")
    try:
        return found(**values)
    except InputError as error:
        raise error.at(where) from None


def describe(codec: Codec, classes: int, members: int = 1) -> dict[str, Any]:
    """What a row costs: {"bytes_per_row", "raw_bytes_per_row" (float32 logits), "ratio" (raw over stored)}. Raises InputError: k above the classes."""
    codec.check(classes)
    stored, raw = members * codec.bytes_per_row(classes), members * 4 * classes
    return {"bytes_per_row": stored, "raw_bytes_per_row": raw, "ratio": raw / stored}


def kl_error(logits_RC: Array, decoded_RC: Array) -> Array:
    """KL(softmax(logits) ‖ softmax(decoded)) of each row, [R] float64 nats; infinite where a class of the exact row (≥ 1e-37) was decoded as `ABSENT`."""
    log_p_RC, log_q_RC = log_softmax(logits_RC), log_softmax(decoded_RC)
    p_RC = np.exp(log_p_RC)
    kl_R = np.maximum(np.where(p_RC > 0, p_RC * (log_p_RC - log_q_RC), 0.0).sum(axis=1), 0.0)
    lost_R = ((np.asarray(decoded_RC) <= ABSENT) & (log_q_RC <= ABSENT / 2) & (p_RC >= _LOST)).any(axis=1)
    return np.where(lost_R, math.inf, kl_R)


def log_softmax(logits_RC: Array) -> Array:
    """Log-probabilities [R, C] in float64."""
    shifted_RC = np.asarray(logits_RC, np.float64)
    shifted_RC = shifted_RC - shifted_RC.max(axis=1, keepdims=True)
    return shifted_RC - np.log(np.exp(shifted_RC).sum(axis=1, keepdims=True))


def _shifted(logits_RC: Array) -> Array:
    """Each row less its largest entry, float32; −inf where that overflows."""
    logits_RC = np.asarray(logits_RC, np.float32)
    with np.errstate(over="ignore"):
        return logits_RC - logits_RC.max(axis=1, keepdims=True)


def _normalised(gap_RC: Array) -> Array:
    """Gaps to log-probabilities, float32."""
    total_R1 = np.exp(gap_RC).sum(axis=1, keepdims=True, dtype=np.float64)
    return gap_RC - np.log(total_R1).astype(np.float32)


def _largest(logits_RC: Array, k: int) -> Array:
    """The classes of the k largest entries, [R, k] int64, descending; ties: the lower class first.

    An entry becomes one integer, its value's bits (made monotonic) above its class counted from the end: all differ, and any selection gives the same k.
    """
    classes = logits_RC.shape[1]
    bits_RC = (logits_RC + np.float32(0)).view(np.int32)  # + 0: −0 is 0
    bits_RC ^= (bits_RC >> 31) & np.int32(0x7FFFFFFF)
    key_RC = (bits_RC.astype(np.int64) << 32) | (0xFFFFFFFF - np.arange(classes))
    if k < classes:
        key_RC = np.partition(key_RC, classes - k, axis=1)[:, classes - k :]
    key_RC = np.sort(key_RC, axis=1)[:, ::-1]
    return 0xFFFFFFFF - (key_RC & 0xFFFFFFFF)


def _quantised(gap_RN: Array, levels: Levels) -> tuple[Array, Array]:
    """Gaps ≥ 0 to the nearest levels, [R, N] uint8, and the scale, [R, 1] float32."""
    scale_R1 = gap_RN.max(axis=1, keepdims=True).astype(np.float32)
    share_RN = gap_RN / np.where(scale_R1 > 0, scale_R1, np.float32(1))
    place_RN = share_RN * np.float32(_TOP_LEVEL)
    if levels == "quadratic":  # half-way between levels l and l + 1 lies l² + l + ½ = (l + ½)² + ¼
        place_RN = np.sqrt(np.maximum(place_RN * np.float32(_TOP_LEVEL) - np.float32(0.25), 0))
    return np.minimum(np.rint(place_RN), _TOP_LEVEL).astype(np.uint8), scale_R1


_PLACES: dict[str, Array] = {
    "linear": (np.arange(_TOP_LEVEL + 1) / _TOP_LEVEL).astype(np.float32),
    "quadratic": ((np.arange(_TOP_LEVEL + 1) / _TOP_LEVEL) ** 2).astype(np.float32),
}


def _gaps(level_RN: Array, scale_R1: Array, levels: Levels) -> Array:
    """Levels back to gaps ≤ 0, float32."""
    return _PLACES[levels][level_RN] * -np.asarray(scale_R1, np.float32)


def _check_choice(field: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"'{field}' is {value!r}.", where=field, fix=f"Give {' or '.join(choices)}.")
