"""Packs examples of different lengths into rows of one length, and rows into batches.

Best-fit decreasing (Johnson 1973): examples are placed from the longest to the shortest, each into the row with the
least room that still holds it. Examples share a row without seeing each other: the model's attention mask goes by
segment ids.
"""

from collections.abc import Sequence

import numpy as np

from gemma_tune.data.example import Batch, TokenizedExample


def num_positions(example: TokenizedExample) -> int:
    """Positions that an example takes in a row: its last token is only predicted, never read."""
    return len(example.token_ids) - 1


def plan_rows(lengths: Sequence[int], row_length: int, packing: bool = True) -> list[list[int]]:
    """Returns, for each row, the indices of the examples in it.

    Args:
        lengths: Positions of each example, at most row_length.
        row_length: Positions in a row.
        packing: False puts each example into a row of its own.
    """
    if not packing:
        return [[index] for index in range(len(lengths))]
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(row_length + 1)]  # Room -> rows that have just so much.
    rooms = 0  # Bit r is set when with_room[r] is not empty: the best fit is the lowest bit at or above a length.
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = row_length, len(rows)
            rows.append([])
        rows[row].append(index)
        with_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return rows


def plan_epoch(lengths: Sequence[int], row_length: int, packing: bool, seed: int, epoch: int) -> list[list[int]]:
    """Returns the rows of one epoch in the order of training.

    They are the same for the same seed and epoch, else shuffled anew.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    rows = plan_rows([lengths[i] for i in order], row_length, packing)
    return [[int(order[i]) for i in rows[row]] for row in rng.permutation(len(rows))]


def make_batch(rows: Sequence[Sequence[TokenizedExample]], num_rows: int, row_length: int) -> Batch:
    """Lays out rows of examples as a Batch of [num_rows, row_length]; rows that are not given stay padding."""
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
