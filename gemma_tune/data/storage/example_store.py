"""Stores examples on disk and reads them back as a sequence, of which only the items in use are in memory."""

import contextlib
import json
import mmap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gemma_tune.data.example import Example, Turn
from gemma_tune.data.storage.array_files import OffsetWriter, read_array
from gemma_tune.data.storage.lazy_sequence import LazySequence

_TEXT, _OFFSETS = "examples.jsonl", "examples.offsets"
_FORGET_EVERY_BYTES = 16 << 20


class ExampleWriter(contextlib.ExitStack):
    """Writes examples to a folder, as lines `["origin", [["role", "content", true], …]]`. Use as a context manager."""

    def __init__(self, folder: Path):
        super().__init__()
        text, offsets = (self.enter_context((folder / name).open("wb")) for name in (_TEXT, _OFFSETS))
        self._text, self._offsets = text, OffsetWriter(offsets)

    def append(self, examples: Iterable[Example]) -> None:
        """Appends examples."""
        lines = [_to_line(example) for example in examples]
        self._text.write(b"".join(lines))
        self._offsets.append([len(line) for line in lines])


class ExampleStore(LazySequence[Example]):
    """A sequence of n examples, out of m that an ExampleWriter wrote.

    Args:
        text: Lines of all examples.
        offsets: [m + 1] positions in `text` where each line begins, and where the last one ends.
        indices: [n] indices of the examples in this sequence, in order.
        owner: Object to keep alive as long as the store, such as the temporary folder of its files.
    """

    def __init__(self, text: mmap.mmap | bytes, offsets: np.ndarray, indices: np.ndarray, owner: Any = None):
        self._text, self._offsets, self._indices, self._owner = text, offsets, indices, owner
        self._last = -1, Example(())  # The pieces of a document follow each other, and share it.

    @staticmethod
    def open(folder: Path, owner: Any = None) -> "ExampleStore":
        """Opens what an ExampleWriter wrote to a folder."""
        offsets = read_array(folder / _OFFSETS, np.int64)
        text: mmap.mmap | bytes = b""  # An empty file can't be mapped.
        if len(offsets) > 1:
            with (folder / _TEXT).open("rb") as file:
                text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return ExampleStore(text, offsets, np.arange(len(offsets) - 1), owner)

    def select(self, places: np.ndarray) -> "ExampleStore":
        """Returns the examples at the given positions of this sequence."""
        return ExampleStore(self._text, self._offsets, self._indices[places], self._owner)

    def __len__(self) -> int:
        return len(self._indices)

    def item(self, index: int) -> Example:
        """Returns one example."""
        line, last = int(self._indices[index]), self._last
        if line != last[0]:  # Other threads may change self._last meanwhile.
            last = self._last = line, _from_line(self._text[self._offsets[line] : self._offsets[line + 1]])
        return last[1]

    def __iter__(self) -> Iterator[Example]:
        last = 0
        for place in range(len(self)):
            yield self[place]
            offset = int(self._offsets[self._indices[place]])
            if offset - last > _FORGET_EVERY_BYTES and isinstance(self._text, mmap.mmap):
                last = offset
                if hasattr(mmap, "MADV_DONTNEED"):  # Otherwise what was read counts as memory of this process.
                    self._text.madvise(mmap.MADV_DONTNEED)


def _to_line(example: Example) -> bytes:
    text = json.dumps([example.origin, example.turns], ensure_ascii=False, separators=(",", ":")) + "\n"
    return text.encode("utf-8", errors="surrogatepass")  # JSON can spell lone surrogates.


def _from_line(line: bytes) -> Example:
    origin, turns = json.loads(line.decode("utf-8", errors="surrogatepass"))
    return Example(tuple(Turn(*turn) for turn in turns), origin)
