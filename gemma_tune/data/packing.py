"""Packs examples of different lengths into rows of one length, and rows into batches.

The method is best-fit decreasing (Johnson 1973): examples are placed from the longest to the shortest, each into the
row with the least room that is still enough. Examples in one row don't see each other: attention is masked by segment
ids.
"""

import dataclasses
from array import array
from collections.abc import Iterator, Sequence

import numpy as np

from gemma_tune.data.example import Batch, TokenizedExample
from gemma_tune.data.mixture import EpochSampler
from gemma_tune.data.storage.array_files import offsets_of


@dataclasses.dataclass(frozen=True)
class Rows:
    """The assignment of examples to rows, as arrays instead of a Python object for each row.

    Attributes:
        indices: [n] indices of examples, row after row.
        starts: [rows + 1] positions in `indices` where each row begins.
    """

    indices: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        index = range(len(self))[row]
        return self.indices[self.starts[index] : self.starts[index + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[row] for row in range(len(self)))

    def in_order(self, order: np.ndarray) -> "Rows":
        """Returns the rows in another order, [rows]."""
        counts = np.diff(self.starts)[order]
        starts = offsets_of(counts)
        places = np.repeat(self.starts[:-1][order] - starts[:-1], counts) + np.arange(starts[-1])
        return Rows(self.indices[places], starts)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Returns [rows] sums, over the examples in each row, of [n] values."""
        return np.diff(offsets_of(values[self.indices])[self.starts])


class EpochPlan:
    """The rows of each epoch in the order of training, which depends on the seed and the epoch alone.

    An epoch shuffles the examples and places them by length. Examples of one length swap their places, but the k-th
    longest example is in the same row in each epoch, so the places are searched for only once. A mixture has other
    examples in each epoch, and maybe another number of rows.

    Args:
        lengths: [n] number of positions of each example, at most row_length.
        row_length: Number of positions in a row.
        packing: Whether examples may share a row.
        seed: Random seed of the order.
        sampler: Sampler that draws the examples of each epoch; None: an epoch has each example once.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        row_length: int,
        packing: bool,
        seed: int,
        sampler: EpochSampler | None = None,
    ):
        self._lengths, self._row_length = np.asarray(lengths, np.int64), row_length
        self._packing, self._seed, self._sampler = packing, seed, sampler
        self._same_rows = None if sampler else self._placed(self._lengths)

    def rows(self, epoch: int) -> Rows:
        """Returns the rows of an epoch, counted from 0."""
        rng = np.random.default_rng([self._seed, epoch])
        chosen = self._sampler.indices(epoch) if self._sampler else np.arange(len(self._lengths))
        order = chosen[rng.permutation(len(chosen))]
        if self._packing:
            order = order[_longest_first(self._lengths[order])]
        rows = self._same_rows or self._placed(self._lengths[order])
        return Rows(order[rows.indices], rows.starts).in_order(rng.permutation(len(rows)))

    def _placed(self, lengths: np.ndarray) -> Rows:
        """Returns the rows of examples that are numbered from the longest to the shortest."""
        return _fitted(np.sort(lengths)[::-1], self._row_length) if self._packing else _one_each(len(lengths))


def num_positions(example: TokenizedExample) -> int:
    """Returns how many positions an example takes in a row. Its last token is only predicted, never read."""
    return len(example.token_ids) - 1


def plan_rows(lengths: Sequence[int] | np.ndarray, row_length: int, packing: bool = True) -> Rows:
    """Returns rows of examples, without shuffling them. Arguments as in `EpochPlan`."""
    if not packing:
        return _one_each(len(lengths))
    order = _longest_first(np.asarray(lengths, np.int64))
    rows = _fitted(np.asarray(lengths, np.int64)[order], row_length)
    return Rows(order[rows.indices], rows.starts)


def _one_each(num_examples: int) -> Rows:
    return Rows(np.arange(num_examples), np.arange(num_examples + 1))


def _longest_first(lengths: np.ndarray) -> np.ndarray:
    return np.argsort(-lengths, kind="stable")


def _fitted(lengths: np.ndarray, row_length: int) -> Rows:
    """Places examples, longest first, each into the row with the least room that is still enough."""
    row_of = array("q")
    num_rows = 0
    with_room: list[list[int]] = [[] for _ in range(row_length + 1)]  # Rows by their room.
    rooms = 0  # Bit r is set if with_room[r] is not empty. The best fit is the lowest set bit at or above a length.
    for length in lengths.tolist():
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = row_length, num_rows
            num_rows += 1
        row_of.append(row)
        with_room[room - length].append(row)
        rooms |= 1 << (room - length)
    places = np.array(row_of, np.int64)
    return Rows(np.argsort(places, kind="stable"), offsets_of(np.bincount(places, minlength=num_rows)))


def make_batch(rows: Sequence[Sequence[TokenizedExample]], num_rows: int, row_length: int) -> Batch:
    """Returns rows of examples as a Batch.

    Args:
        rows: Examples of each row, at most `num_rows`.
        num_rows: Number of rows in the batch; those that are not given are padding.
        row_length: Number of positions in a row.
    """
    token_ids, segment_ids, positions, target_ids = np.zeros((4, num_rows, row_length), np.int32)
    batch = Batch(token_ids, segment_ids, positions, target_ids, np.zeros((num_rows, row_length), np.float32))
    for row, examples in enumerate(rows):
        start = 0
        for segment, example in enumerate(examples, 1):
            here = np.s_[row, start : start + num_positions(example)]
            batch.token_ids[here] = example.token_ids[:-1]
            batch.segment_ids[here] = segment
            batch.positions[here] = np.arange(num_positions(example))
            batch.target_ids[here] = example.token_ids[1:]
            batch.loss_weights[here] = example.is_target[1:]
            start += num_positions(example)
    return batch
