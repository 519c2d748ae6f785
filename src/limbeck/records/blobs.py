"""Many strings of bytes as two arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Blobs:
    """B strings of bytes behind one another: data [T] uint8; string b is data[offsets[b] : offsets[b + 1]], offsets [B + 1] int64."""

    data: Array
    offsets: Array

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def of(cls, strings: Sequence[Array]) -> Blobs:
        """From uint8 arrays."""
        offsets = np.zeros(len(strings) + 1, np.int64)
        np.cumsum([len(one) for one in strings], out=offsets[1:])
        return cls(np.concatenate([np.zeros(0, np.uint8), *strings]), offsets)

    @classmethod
    def joined(cls, parts: Sequence[Blobs]) -> Blobs:
        """One behind another."""
        sizes = [np.diff(part.offsets) for part in parts]
        offsets = np.concatenate([[0], np.cumsum(np.concatenate([np.zeros(0, np.int64), *sizes]))]).astype(np.int64)
        return cls(np.concatenate([np.zeros(0, np.uint8), *(part.data for part in parts)]), offsets)

    def strings(self, places: Array) -> list[Array]:
        """Views of the strings at `places`, in that order."""
        return [self.data[self.offsets[place] : self.offsets[place + 1]] for place in places.tolist()]
