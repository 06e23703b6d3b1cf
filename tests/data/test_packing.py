"""Packing: every example once, rows full, the same each time."""

import numpy as np
import pytest

from gemma_tune.data import EpochPlan, TokenizedExample, make_batch, num_positions, plan_rows


def lengths_of(rng, count, longest):
    return rng.integers(1, longest + 1, count).tolist()


def to_lists(rows):
    return [row.tolist() for row in rows]


@pytest.mark.parametrize("row_length", [16, 512])
def test_every_example_has_one_place_and_no_row_overflows(rng, row_length):
    lengths = lengths_of(rng, 500, row_length)
    rows = plan_rows(lengths, row_length)
    assert sorted(index for row in rows for index in row) == list(range(500))
    assert all(sum(lengths[index] for index in row) <= row_length for row in rows)


def test_each_example_goes_where_it_fits_best(rng):
    """Against best-fit decreasing by its definition, looking through all rows each time."""
    lengths = lengths_of(rng, 300, 100)
    rooms, wanted = [], []
    for index in sorted(range(300), key=lambda i: -lengths[i]):
        fitting = [row for row, room in enumerate(rooms) if room >= lengths[index]]
        if not fitting:
            rooms.append(100)
            wanted.append([])
            fitting = [len(rooms) - 1]
        best = min(fitting, key=lambda row: rooms[row])
        rooms[best] -= lengths[index]
        wanted[best].append(index)
    assert sorted(rooms) == sorted(100 - sum(lengths[i] for i in row) for row in plan_rows(lengths, 100))


def test_a_thousand_mixed_examples_fill_95_percent(rng):
    lengths = np.clip(np.exp(rng.normal(4, 1, 1000)), 5, 512).astype(int).tolist()
    rows = plan_rows(lengths, 512)
    assert sum(lengths) / (len(rows) * 512) >= 0.95


def test_epochs_differ_and_repeat_by_seed(rng):
    lengths = lengths_of(rng, 100, 50)
    first, again, other_epoch, other_seed = (
        to_lists(EpochPlan(lengths, 64, True, seed).rows(epoch)) for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))
    )
    assert first == again
    assert first != other_epoch and first != other_seed
    assert sorted(i for row in other_epoch for i in row) == list(range(100))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("epoch", [0, 3])
def test_an_epoch_shuffles_then_places_then_shuffles_the_rows(rng, packing, epoch):
    """Against the definition, which looks for places anew in each epoch."""
    lengths = lengths_of(rng, 400, 40)  # Many of the same length.
    draw = np.random.default_rng([7, epoch])
    order = draw.permutation(400)
    placed = to_lists(plan_rows([lengths[i] for i in order], 64, packing))
    wanted = [[order[i] for i in placed[row]] for row in draw.permutation(len(placed))]
    plan = EpochPlan(lengths, 64, packing, seed=7)
    assert to_lists(plan.rows(epoch)) == wanted
    assert plan.rows(epoch).sums(np.array(lengths)).tolist() == [sum(lengths[i] for i in row) for row in wanted]


def test_without_packing_each_example_has_a_row():
    assert to_lists(plan_rows([3, 4, 5], 8, packing=False)) == [[0], [1], [2]]


def test_batch_layout():
    first = TokenizedExample(np.array([2, 11, 12, 13], np.int32), np.array([False, False, True, True]))
    second = TokenizedExample(np.array([2, 21], np.int32), np.array([False, True]))
    batch = make_batch([[first, second]], num_rows=2, row_length=6)
    assert [num_positions(example) for example in (first, second)] == [3, 1]
    assert batch.token_ids.tolist() == [[2, 11, 12, 2, 0, 0], [0] * 6]
    assert batch.target_ids.tolist()[0] == [11, 12, 13, 21, 0, 0]
    assert batch.segment_ids.tolist()[0] == [1, 1, 1, 2, 0, 0]
    assert batch.positions.tolist()[0] == [0, 1, 2, 0, 0, 0]
    assert batch.loss_weights.tolist()[0] == [0, 1, 1, 1, 0, 0]
    assert batch.loss_weights.dtype == np.float32 and batch.token_ids.dtype == np.int32
