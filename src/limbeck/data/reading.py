"""Reading other people's files: every problem ends in an InputError that names the path."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from limbeck.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image


def shown(path: Path | str) -> str:
    """A path as printable text: bytes of a name that are no UTF-8 become '?'."""
    return str(path).encode(errors="replace").decode()


@contextmanager
def reading(path: Path | str, *, fix: str = "Is the file whole, and of the right kind?") -> Iterator[None]:
    """Turn whatever a reader of foreign bytes raises into an InputError with the path in front (decoders raise nearly anything)."""
    try:
        yield
    except InputError as error:
        raise error.at(shown(path)) from error
    except FileNotFoundError as error:
        raise InputError("there is no such file.", where=shown(path), fix="Check the path.") from error
    except Exception as error:
        message = shown(" ".join(str(error).split()))[:200]
        raise InputError(f"cannot be read ({type(error).__name__}: {message}).", where=shown(path), fix=fix) from error


def decoded(content: bytes) -> Image:
    """An image file's bytes as an RGB PIL image; raises whatever PIL does."""
    from PIL import Image

    return Image.open(io.BytesIO(content)).convert("RGB")


def fitted(image: Image, size: int) -> NDArray[np.uint8]:
    """The centred square of an RGB image, scaled bilinearly to [3, size, size] uint8 (= resize the short side, then centre crop)."""
    from PIL import Image

    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    square = image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


def parquet_rows(path: Path, columns: list[str], limit: int | None) -> Iterator[dict[str, Any]]:
    """The first `limit` rows (None: all) of a parquet file as dictionaries, read a few at a time. Raises InputError for a missing column."""
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        missing = sorted(set(columns) - set(file.schema_arrow.names))
        if missing:
            raise InputError(f"there is no column '{missing[0]}'.", fix=f"Its columns: {shown(', '.join(file.schema_arrow.names))}.")
        left = file.metadata.num_rows if limit is None else limit
        for batch in file.iter_batches(batch_size=16, columns=columns):
            yield from batch.to_pylist()[:left]
            left -= batch.num_rows
            if left <= 0:
                return
