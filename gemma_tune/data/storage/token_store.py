"""Tokenized examples as a sequence of views into a few long arrays, in memory or mapped from disk."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gemma_tune.data.example import TokenizedExample
from gemma_tune.data.storage.array_files import OffsetWriter, offsets_of, read_array
from gemma_tune.data.storage.lazy_sequence import LazySequence


class TokenCounts(NamedTuple):
    """What plans need of n examples. num_tokens: [n] int64 tokens; num_targets: [n] int64 tokens to learn."""

    num_tokens: np.ndarray
    num_targets: np.ndarray


class TokenStore(LazySequence[TokenizedExample]):
    """n tokenized examples, T tokens together.

    Args:
        token_ids: [T] int32, one example behind the other.
        is_target: [T] bool.
        offsets: [n + 1] where each example begins.
        num_targets: [n] tokens to learn in each.
        owner: Kept as long as this is, such as the temporary folder of mapped files.
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
        """Maps what a TokenWriter wrote."""
        return TokenStore(
            read_array(folder / f"{name}.ids", np.int32),
            read_array(folder / f"{name}.targets", np.bool_),
            read_array(folder / f"{name}.offsets", np.int64),
            read_array(folder / f"{name}.num_targets", np.int32),
            owner,
        )

    @staticmethod
    def of(examples: Sequence[TokenizedExample]) -> "TokenStore":
        """Returns examples as a store; copies them unless they are one."""
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
        """Returns views of one example's tokens."""
        here = slice(self._offsets[index], self._offsets[index + 1])
        return TokenizedExample(self._token_ids[here], self._is_target[here])


class TokenWriter(contextlib.ExitStack):
    """Writes tokenized examples into files of a folder, a chunk at a time. Use as a context manager.

    Args:
        folder: Where.
        name: How the files' names begin.
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
        """Adds n examples: [T] int32 and [T] bool, all in one; [n] tokens and targets of each."""
        self._ids.write(token_ids.astype(np.int32).data)
        self._targets.write(is_target.astype(bool).data)
        self._offsets.append(num_tokens)
        self._num_targets.write(num_targets.astype(np.int32).data)
