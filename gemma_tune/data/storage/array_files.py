"""Arrays on disk, written piece by piece and read as memory maps: no header, the type is known by the reader."""

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np


def read_array(path: Path, dtype: type) -> np.ndarray:
    """Returns the [n] array in a file, read-only; the system reads what is looked at, and may forget it again."""
    if not path.stat().st_size:
        return np.empty(0, dtype)  # An empty file can't be mapped.
    return np.memmap(path, dtype, mode="r").view(np.ndarray)  # A plain view is cheaper to slice than a memmap.


def write_array(path: Path, values: np.ndarray) -> None:
    """Writes a whole array."""
    path.write_bytes(np.ascontiguousarray(values).data)


def offsets_of(counts: np.ndarray) -> np.ndarray:
    """Returns where each of consecutive pieces begins, and where the last one ends: [n + 1] int64 for [n] counts."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


class OffsetWriter:
    """Appends to a file with `offsets_of` pieces whose counts come a chunk at a time."""

    def __init__(self, file: BinaryIO):
        self._file, self._end = file, 0
        file.write(np.zeros(1, np.int64).data)

    def append(self, counts: Sequence[int] | np.ndarray) -> None:
        """Adds pieces of these lengths."""
        ends = self._end + np.cumsum(counts, dtype=np.int64)
        if len(ends):
            self._end = int(ends[-1])
            self._file.write(ends.data)
