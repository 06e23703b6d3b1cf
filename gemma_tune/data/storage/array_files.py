"""Writes arrays to disk in pieces and reads them as memory maps. The files have no header; readers know the type."""

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np


def read_array(path: Path, dtype: type) -> np.ndarray:
    """Returns the [n] array in a file, read-only. The operating system loads the parts that are used, on demand."""
    if not path.stat().st_size:
        return np.empty(0, dtype)  # An empty file can't be mapped.
    return np.memmap(path, dtype, mode="r").view(np.ndarray)  # A plain view is cheaper to slice than a memmap.


def write_array(path: Path, values: np.ndarray) -> None:
    """Writes an array to a file."""
    path.write_bytes(np.ascontiguousarray(values).data)


def offsets_of(counts: np.ndarray) -> np.ndarray:
    """Returns where each of n consecutive pieces begins and the last one ends, [n + 1] int64, from [n] lengths."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


class OffsetWriter:
    """Writes the `offsets_of` pieces whose lengths arrive in chunks."""

    def __init__(self, file: BinaryIO):
        self._file, self._end = file, 0
        file.write(np.zeros(1, np.int64).data)

    def append(self, counts: Sequence[int] | np.ndarray) -> None:
        """Adds pieces, given their lengths."""
        ends = self._end + np.cumsum(counts, dtype=np.int64)
        if len(ends):
            self._end = int(ends[-1])
            self._file.write(ends.data)
