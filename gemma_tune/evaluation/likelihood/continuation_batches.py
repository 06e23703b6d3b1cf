"""Packs contexts and their continuations into batches of few shapes.

Texts share rows, as held-out examples do, and those that are the beginning of another text are read only once:
single-token choices after the same context, as in MMLU, take one text together.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from gemma_tune.data import plan_rows
from gemma_tune.errors import DataError

Pair = tuple[Sequence[int], Sequence[int]]  # Token ids of a context and of its continuation.

_BATCH_TOKENS = 2048  # Positions of a batch, unless a single row has more.
_ROW_LENGTH, _MIN_ROW_LENGTH = 512, 64
_TARGET_BUCKET = 64


class ContinuationBatch(NamedTuple):
    """Packed rows, and the positions in them that predict a token of a continuation.

    Attributes:
        token_ids, segment_ids, positions: [B, L] int32.
        places, target_ids: [P, T] int32, as in `sharded_target_scores`; P is 1 without a mesh.
    """

    token_ids: Any
    segment_ids: Any
    positions: Any
    places: Any
    target_ids: Any


class _Row(NamedTuple):
    """A packed row and its targets.

    Attributes:
        texts: Token ids of each segment.
        places, target_ids, pairs: [n] positions in the row, tokens to predict there, and pairs that they belong to.
    """

    texts: list[tuple[int, ...]]
    places: np.ndarray
    target_ids: np.ndarray
    pairs: np.ndarray


def continuation_batches(
    pairs: Sequence[Pair], max_length: int, num_parts: int
) -> Iterator[tuple[ContinuationBatch, np.ndarray]]:
    """Yields batches, and the number of the pair that each of their targets belongs to, [P, T]; -1 for padding.

    Args:
        pairs: Contexts and continuations.
        max_length: Most tokens that predict one; longer contexts lose their beginning.
        num_parts: Number P of parts of a batch's rows, each of which is computed on its own.

    Raises:
        DataError: A context or a continuation is empty, or a continuation is longer than max_length.
    """
    if not pairs:
        return
    read = [_read_text(pair, number, max_length) for number, pair in enumerate(pairs)]
    texts, number_of = _without_prefixes(read)
    pairs_of: list[list[int]] = [[] for _ in texts]
    for pair, number in enumerate(number_of):
        pairs_of[number].append(pair)
    lengths = np.array([len(text) for text in texts])
    row_lengths = _row_lengths(lengths)
    for row_length in np.unique(row_lengths)[::-1].tolist():
        members = np.flatnonzero(row_lengths == row_length)
        rows = [
            _packed_row([(texts[i], pairs_of[i]) for i in members[row]], pairs, read)
            for row in plan_rows(lengths[members], row_length)
        ]
        # Rows with many targets are dealt out evenly, since the largest number in a batch is that of all.
        rows.sort(key=lambda row: -len(row.places))
        num_batches = -(-len(rows) // max(1, _BATCH_TOKENS // row_length))
        size = -(-len(rows) // num_batches)
        size = -(-size // num_parts) * num_parts
        dealt = [rows[start::num_batches] for start in range(num_batches)]
        most = max(_num_targets(part) for batch in dealt for part in _parts(batch, size, num_parts))
        for batch in dealt:
            yield _filled(_parts(batch, size, num_parts), size // num_parts, row_length, _bucket(most))


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


def _without_prefixes(texts: Sequence[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """Returns the texts that are not the beginning of another one, and for each text the number of one it begins.

    With causal attention a beginning has the same hidden states wherever it is read.
    """
    kept: list[tuple[int, ...]] = []
    number_of = np.empty(len(texts), int)
    for i in sorted(range(len(texts)), key=texts.__getitem__, reverse=True):  # A text comes after those it begins.
        if not kept or kept[-1][: len(texts[i])] != texts[i]:
            kept.append(texts[i])
        number_of[i] = len(kept) - 1
    return kept, number_of


def _row_lengths(lengths: np.ndarray) -> np.ndarray:
    """Returns the length of the row for each text: 512, 768, 1024, 1536 …; less if all texts fit into one short row."""
    if lengths.sum() <= _ROW_LENGTH:
        return np.full(len(lengths), max(_MIN_ROW_LENGTH, 1 << (int(lengths.sum()) - 1).bit_length()))
    found = np.full(len(lengths), _ROW_LENGTH)
    size = _ROW_LENGTH
    while size < lengths.max():
        size += size // 2 if size & (size - 1) == 0 else size // 3
        found = np.where(lengths > found, size, found)
    return found


def _packed_row(
    segments: Sequence[tuple[tuple[int, ...], list[int]]], pairs: Sequence[Pair], read: Sequence[tuple[int, ...]]
) -> _Row:
    """Returns the row of some texts, each with the pairs that it is read for."""
    places, targets, numbers, start = [], [], [], 0
    for text, of_text in segments:
        for number in of_text:
            continuation = pairs[number][1]
            end = start + len(read[number])
            places.append(np.arange(end - len(continuation), end))
            targets.append(np.asarray(continuation))
            numbers.append(np.full(len(continuation), number))
        start += len(text)
    return _Row([text for text, _ in segments], *(np.concatenate(each) for each in (places, targets, numbers)))


def _parts(rows: Sequence[_Row], size: int, num_parts: int) -> list[Sequence[_Row]]:
    each = size // num_parts
    return [rows[part * each : (part + 1) * each] for part in range(num_parts)]


def _num_targets(rows: Sequence[_Row]) -> int:
    return sum(len(row.places) for row in rows)


def _bucket(count: int) -> int:
    """Returns a count rounded up by at most an eighth or to a multiple of 64, so that there are few shapes."""
    step = max(_TARGET_BUCKET, 1 << max(0, count.bit_length() - 4))
    return -(-count // step) * step


def _filled(
    parts: Sequence[Sequence[_Row]], rows_of_part: int, row_length: int, num_targets: int
) -> tuple[ContinuationBatch, np.ndarray]:
    """Returns a batch of rows, and the pair of each target."""
    batch = ContinuationBatch(
        *np.zeros((3, len(parts) * rows_of_part, row_length), np.int32),
        *np.zeros((2, len(parts), num_targets), np.int32),
    )
    of_pairs = np.full((len(parts), num_targets), -1)
    for part, rows in enumerate(parts):
        filled = 0
        for row, packed in enumerate(rows):
            start = 0
            for segment, text in enumerate(packed.texts, 1):
                here = np.s_[part * rows_of_part + row, start : start + len(text)]
                batch.token_ids[here], batch.segment_ids[here] = text, segment
                batch.positions[here] = np.arange(len(text))
                start += len(text)
            targets = np.s_[part, filled : filled + len(packed.places)]
            batch.places[targets] = row * row_length + packed.places
            batch.target_ids[targets], of_pairs[targets] = packed.target_ids, packed.pairs
            filled += len(packed.places)
    return batch, of_pairs
