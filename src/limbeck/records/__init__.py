"""Recorded teachers on disk: what a teacher said about each sample and view, written once and read as often as one likes.

numpy, pyarrow and the standard library only (fsspec for remote addresses): a reader in a worker process does not import torch.
"""

from limbeck.records.codecs import CODECS, Codec, Full, Half, Log8, TopK, TopK8, codec_from, describe, kl_error
from limbeck.records.compact import CompactCodec
from limbeck.records.manifest import Field, Part, check_identity
from limbeck.records.reader import Record, RecordPart
from limbeck.records.token_codecs import TOKEN_CODECS, PlainTopK, TokenCodec, TopRows, outcomes_kl, token_codec, token_codec_from
from limbeck.records.writer import RecordWriter, Task

__all__ = [
    "CODECS",
    "TOKEN_CODECS",
    "Codec",
    "CompactCodec",
    "Field",
    "Full",
    "Half",
    "Log8",
    "Part",
    "PlainTopK",
    "Record",
    "RecordPart",
    "RecordWriter",
    "Task",
    "TokenCodec",
    "TopK",
    "TopK8",
    "TopRows",
    "check_identity",
    "codec_from",
    "describe",
    "kl_error",
    "outcomes_kl",
    "token_codec",
    "token_codec_from",
]
