"""Stores tokenized examples in a few long arrays, in memory or on disk, and reads them as a sequence of views."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gemma_tune.data.example import TokenizedExample
from gemma_tune.data.storage.array_files import OffsetWriter, offsets_of, read_array
from gemma_tune.data.storage.lazy_sequence import LazySequence


class TokenCounts(NamedTuple):
    """The sizes of n examples.

    Attributes:
        num_tokens: [n] int64 number of tokens of each example.
        num_targets: [n] int64 number of tokens to learn of each example.
    """

    num_tokens: np.ndarray
    num_targets: np.ndarray


class TokenStore(LazySequence[TokenizedExample]):
    """A sequence of n tokenized examples, with T tokens together.

    Args:
        token_ids: [T] int32 token ids, example after example.
        is_target: [T] bool, true for tokens that the model learns.
        offsets: [n + 1] positions where each example begins, and where the last one ends.
        num_targets: [n] number of tokens to learn of each example.
        owner: Object to keep alive as long as the store, such as the temporary folder of its files.

    Attributes:
        counts: Sizes of the examples.
    """

    def __init__(
        self,
        token_ids: np.ndarray,
        is_target: np.ndarray,
        offsets: np.ndarray,
        num_targets: np.ndarray,
        owner: Any = None,
    ):
        self._token_ids, self._is_target, self._offsets, self._owner = token_ids, is_target, offsets, owner
        self.counts = TokenCounts(np.diff(offsets), num_targets.astype(np.int64))

    @staticmethod
    def open(folder: Path, name: str, owner: Any = None) -> "TokenStore":
        """Opens what a TokenWriter wrote to a folder under a name."""
        return TokenStore(
            read_array(folder / f"{name}.ids", np.int32),
            read_array(folder / f"{name}.targets", np.bool_),
            read_array(folder / f"{name}.offsets", np.int64),
            read_array(folder / f"{name}.num_targets", np.int32),
            owner,
        )

    @staticmethod
    def of(examples: Sequence[TokenizedExample]) -> "TokenStore":
        """Returns examples as a store, which is a copy unless they are one already."""
        if isinstance(examples, TokenStore):
            return examples
        ids = [np.asarray(example.token_ids, np.int32) for example in examples]
        targets = [np.asarray(example.is_target, bool) for example in examples]
        return TokenStore(
            np.concatenate([np.empty(0, np.int32), *ids]),
            np.concatenate([np.empty(0, bool), *targets]),
            offsets_of(np.array([len(part) for part in ids], np.int64)),
            np.array([part.sum() for part in targets], np.int64),
        )

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def item(self, index: int) -> TokenizedExample:
        """Returns one example, as views of the arrays."""
        here = slice(self._offsets[index], self._offsets[index + 1])
        return TokenizedExample(self._token_ids[here], self._is_target[here])


class TokenWriter(contextlib.ExitStack):
    """Writes tokenized examples to a folder, in chunks. Use as a context manager.

    Args:
        folder: Folder for the files.
        name: Prefix of their names.
    """

    def __init__(self, folder: Path, name: str):
        super().__init__()
        self._ids, self._targets, offsets, self._num_targets = (
            self.enter_context((folder / f"{name}.{part}").open("wb"))
            for part in ("ids", "targets", "offsets", "num_targets")
        )
        self._offsets = OffsetWriter(offsets)

    def append(
        self, token_ids: np.ndarray, is_target: np.ndarray, num_tokens: np.ndarray, num_targets: np.ndarray
    ) -> None:
        """Appends a chunk of examples. Arguments as the fields of `TokenizedChunk`."""
        self._ids.write(token_ids.astype(np.int32).data)
        self._targets.write(is_target.astype(bool).data)
        self._offsets.append(num_tokens)
        self._num_targets.write(num_targets.astype(np.int32).data)
