"""Packs contexts and their continuations into batches of few shapes.

Texts share rows, as held-out examples do. Those that begin alike share their beginning too, as a tree of tokens: the
choices of a question are read after one context, and questions after the same examples read these once.
"""

import heapq
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from gemma_tune.data import plan_rows
from gemma_tune.errors import DataError

Pair = tuple[Sequence[int], Sequence[int]]  # Token ids of a context and of its continuation.

_MIN_ROW_LENGTH, _ROW_LENGTH, _MAX_SHARED_ROW_LENGTH = 64, 512, 4096
_TARGET_BUCKET = 64
_MIN_SHARE = 4  # A text joins a tree if that saves at least this part of it: small trees fill rows better.


class ContinuationBatch(NamedTuple):
    """Packed rows, and the positions in them that predict a token of a continuation.

    Attributes:
        token_ids: [B, L] int32.
        positions, ends: [B, L] int32, as in `PrefixTrees`.
        places, target_ids: [P, T] int32, as in `sharded_target_scores`; P is 1 without a mesh.
    """

    token_ids: Any
    positions: Any
    ends: Any
    places: Any
    target_ids: Any


class _Tree(NamedTuple):
    """Texts with a common beginning, and their targets.

    Attributes:
        token_ids, positions, ends: [n] tokens, their positions in their texts, and the ends of their branches.
        places, target_ids, pairs: [t] places in the tree, tokens to predict there, and pairs that they belong to.
    """

    token_ids: np.ndarray
    positions: np.ndarray
    ends: np.ndarray
    places: np.ndarray
    target_ids: np.ndarray
    pairs: np.ndarray


class _GrowingTree:
    """A tree to which texts are added in ascending order."""

    def __init__(self, room: int):
        self.room = room  # Most tokens.
        self.last: tuple[int, ...] = ()  # Text that was added last.
        self._path: list[int] = []  # Places of its tokens.
        self._token_ids: list[int] = []
        self._positions: list[int] = []
        self._ends: list[int] = []
        self._targets: list[tuple[list[int], Sequence[int], int]] = []

    def size_with(self, text: tuple[int, ...], num_shared: int) -> int:
        """Returns the number of tokens after adding a text that begins as the last one does."""
        return len(self._token_ids) + len(text) - num_shared

    def add(self, text: tuple[int, ...], num_shared: int, continuation: Sequence[int], pair: int) -> None:
        """Adds a text, whose end predicts a continuation."""
        self._end_branches(num_shared)
        start = len(self._token_ids)
        self._token_ids += text[num_shared:]
        self._positions += range(num_shared, len(text))
        self._ends += [0] * (len(text) - num_shared)
        self._path = self._path[:num_shared] + list(range(start, len(self._token_ids)))
        self._targets.append((self._path[-len(continuation) :], continuation, pair))
        self.last = text

    def finished(self) -> _Tree:
        """Returns the tree as arrays."""
        self._end_branches(0)
        places, target_ids, pairs = zip(*self._targets, strict=True)
        return _Tree(
            np.array(self._token_ids, np.int32),
            np.array(self._positions, np.int32),
            np.array(self._ends, np.int32),
            places=np.concatenate([np.asarray(each, np.int32) for each in places]),
            target_ids=np.concatenate([np.asarray(each, np.int32) for each in target_ids]),
            pairs=np.repeat(pairs, [len(each) for each in places]),
        )

    def _end_branches(self, num_shared: int) -> None:
        for place in self._path[num_shared:]:
            self._ends[place] = len(self._token_ids)


def continuation_batches(
    pairs: Sequence[Pair], max_length: int, num_parts: int, part_tokens: int, shares_prefixes: bool = True
) -> Iterator[tuple[ContinuationBatch, np.ndarray]]:
    """Yields batches, and the number of the pair that each of their targets belongs to, [P, T]; -1 for padding.

    Args:
        pairs: Contexts and continuations.
        max_length: Most tokens that predict one; longer contexts lose their beginning.
        num_parts: Number P of parts of a batch's rows, each of which is computed on its own.
        part_tokens: Most positions in a part, unless a single row has more.
        shares_prefixes: Whether texts that begin alike share it. If not, only a text that is the beginning of another
            is read with it, and no branch ends before the tree.

    Raises:
        DataError: A context or a continuation is empty, or a continuation is longer than max_length.
    """
    texts = [_read_text(pair, number, max_length) for number, pair in enumerate(pairs)]
    for length, trees in _by_row_length(_trees(texts, pairs, shares_prefixes), num_parts * part_tokens):
        planned = plan_rows([len(tree.token_ids) for tree in trees], length)
        rows = [[trees[i] for i in row] for row in planned]
        length = _rounded_length(max(sum(len(tree.token_ids) for tree in row) for row in rows))
        num_batches = -(-len(rows) // (num_parts * max(1, part_tokens // length)))
        rows_of_part = -(-len(rows) // (num_batches * num_parts))
        parts = _dealt(rows, num_batches * num_parts, rows_of_part)
        num_targets = _bucket(max(map(_num_targets, parts)))
        for start in range(0, len(parts), num_parts):
            yield _filled(parts[start : start + num_parts], rows_of_part, length, num_targets)


def _read_text(pair: Pair, number: int, max_length: int) -> tuple[int, ...]:
    """Returns the tokens that the model reads to predict a continuation."""
    context, continuation = pair
    if not len(context) or not len(continuation):
        what = "continuation" if len(context) else "context"
        raise DataError(f"Pair {number}: the {what} has no token. A context has at least <bos>.")
    if len(continuation) > max_length:
        raise DataError(
            f"Pair {number}: the continuation has {len(continuation)} tokens; max_length is {max_length}. Raise it, or "
            "score the text in windows (score_rolling)."
        )
    return (*context, *continuation)[-(max_length + 1) : -1]


def _trees(texts: Sequence[tuple[int, ...]], pairs: Sequence[Pair], shares_prefixes: bool) -> dict[int, list[_Tree]]:
    """Returns room of a row -> trees that are made for it.

    With causal attention a beginning has the same hidden states whatever follows it.
    """
    found: dict[int, list[_Tree]] = {}
    tree = _GrowingTree(0)
    for number in sorted(range(len(texts)), key=texts.__getitem__):  # Texts that begin alike are neighbours.
        text, room = texts[number], _room_for(len(texts[number]))
        num_shared = _num_shared(tree.last, text)
        is_worth_it = shares_prefixes and num_shared * _MIN_SHARE >= len(text)
        room_of_both = max(tree.room, room)
        fits = tree.size_with(text, num_shared) <= room_of_both
        if not (tree.last and fits and (is_worth_it or num_shared == len(tree.last))):
            if tree.last:
                found.setdefault(tree.room, []).append(tree.finished())
            tree, num_shared, room_of_both = _GrowingTree(room), 0, room
        tree.room = room_of_both
        tree.add(text, num_shared, pairs[number][1], number)
    if tree.last:
        found.setdefault(tree.room, []).append(tree.finished())
    return found


def _num_shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Returns the number of tokens that two texts begin with alike."""
    differs = (i for i, (one, other) in enumerate(zip(first, second, strict=False)) if one != other)
    return next(differs, min(len(first), len(second)))


def _room_for(length: int) -> int:
    """Returns the length of the row for a text: 512, 1024, 2048 … Up to 4096, two texts of a length fit into a row."""
    wanted = max(length, min(2 * length, _MAX_SHARED_ROW_LENGTH))
    return max(_ROW_LENGTH, 1 << (wanted - 1).bit_length())


def _by_row_length(trees: dict[int, list[_Tree]], batch_tokens: int) -> list[tuple[int, list[_Tree]]]:
    """Returns (length of rows, their trees). Trees that don't fill a batch go into the next longer rows, if any."""
    found: list[tuple[int, list[_Tree]]] = []
    waiting: list[_Tree] = []
    for room in sorted(trees):
        waiting += trees[room]
        if room == max(trees) or sum(len(tree.token_ids) for tree in waiting) >= batch_tokens:
            found.append((room, waiting))
            waiting = []
    return found


def _rounded_length(length: int) -> int:
    """Returns a length rounded up to 64, 128, 256, 384, 512, 768, 1024, 1536 …"""
    power = max(_MIN_ROW_LENGTH, 1 << (length - 1).bit_length())
    return power * 3 // 4 if power > 4 * _MIN_ROW_LENGTH and length <= power * 3 // 4 else power


def _dealt(rows: Sequence[list[_Tree]], num_parts: int, most_rows: int) -> list[list[list[_Tree]]]:
    """Deals out rows so that parts have about as many targets: the largest number in a part is computed in all."""
    parts: list[list[list[_Tree]]] = [[] for _ in range(num_parts)]
    heap = [(0, part) for part in range(num_parts)]
    for row in sorted(rows, key=lambda row: -_num_targets([row])):
        num_targets, part = heapq.heappop(heap)
        parts[part].append(row)
        if len(parts[part]) < most_rows:
            heapq.heappush(heap, (num_targets + _num_targets([row]), part))
    return parts


def _num_targets(rows: Sequence[list[_Tree]]) -> int:
    return sum(len(tree.places) for row in rows for tree in row)


def _bucket(count: int) -> int:
    """Returns a count rounded up by at most a 16th or to a multiple of 64, so that there are few shapes."""
    step = max(_TARGET_BUCKET, 1 << max(0, count.bit_length() - 5))
    return -(-count // step) * step


def _filled(
    parts: Sequence[Sequence[list[_Tree]]], rows_of_part: int, length: int, num_targets: int
) -> tuple[ContinuationBatch, np.ndarray]:
    """Returns a batch of rows, and the pair of each target."""
    batch = ContinuationBatch(
        *np.zeros((3, len(parts) * rows_of_part, length), np.int32),
        *np.zeros((2, len(parts), num_targets), np.int32),
    )
    of_pairs = np.full((len(parts), num_targets), -1)
    for part, rows in enumerate(parts):
        filled = 0
        for row, trees in enumerate(rows):
            start = 0
            for tree in trees:
                here = np.s_[part * rows_of_part + row, start : start + len(tree.token_ids)]
                batch.token_ids[here], batch.positions[here] = tree.token_ids, tree.positions
                batch.ends[here] = start + tree.ends
                targets = np.s_[part, filled : filled + len(tree.places)]
                batch.places[targets] = row * length + start + tree.places
                batch.target_ids[targets], of_pairs[targets] = tree.target_ids, tree.pairs
                start, filled = start + len(tree.token_ids), filled + len(tree.places)
    return batch, of_pairs
