"""Which examples a step sees is a function of the step."""

import numpy as np
import pytest

from gemma_tune.data import TokenizedExample
from gemma_tune.training.batches import HeldoutBatches, TrainingBatches, most_targets


@pytest.fixture
def examples(rng):
    return [
        TokenizedExample(np.full(n, i + 10, np.int32), np.arange(n) > 2) for i, n in enumerate(rng.integers(5, 60, 50))
    ]


def make(examples, **changes):
    return TrainingBatches(
        examples, **{"batch_size": 3, "row_length": 64, "packing": True, "seed": 0, "num_epochs": 2, **changes}
    )


@pytest.mark.parametrize("packing", [True, False])
def test_each_epoch_holds_every_example_once(examples, packing):
    batches = make(examples, packing=packing)
    per_epoch = len(batches) // 2
    for epoch in range(2):
        seen = [i for step in range(epoch * per_epoch, (epoch + 1) * per_epoch) for i in batches.example_indices(step)]
        assert sorted(seen) == list(range(50))
    tokens = sum(int((batches[step].segment_ids > 0).sum()) for step in range(len(batches)))
    assert tokens == 2 * sum(len(example.token_ids) - 1 for example in examples)


def test_the_same_step_gives_the_same_batch(examples):
    one, other = make(examples), make(examples)
    for step in (3, 0, 5):
        for ours, theirs in zip(one[step], other[step], strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_num_train_steps_repeats_or_cuts(examples):
    assert len(make(examples, num_train_steps=2)) == 2
    cut = make(examples, num_train_steps=2)
    assert cut.most_targets == max(int(cut[step].loss_weights.sum()) for step in range(2))
    assert len(make(examples, num_train_steps=100)) == 100
    assert make(examples, num_train_steps=100)[99].token_ids.shape == (3, 64)


def test_shapes_are_the_same_throughout_and_targets_fit(examples):
    batches = make(examples)
    assert {batches[step].token_ids.shape for step in range(len(batches))} == {(3, 64)}
    counts = sorted(int(batches[step].loss_weights.sum()) for step in range(len(batches)))
    assert batches.most_targets == counts[-1]
    assert set(batches.target_sizes) <= set(counts)


def test_heldout_batches_hold_all_in_order(examples):
    batches = HeldoutBatches(examples, 3, 64, packing=True)
    assert sum(int(batch.loss_weights.sum()) for batch in batches) == sum(
        int(example.is_target.sum()) for example in examples
    )
    assert {batch.token_ids.shape for batch in batches} == {(3, 64)}
    assert most_targets(batches) >= 1 and most_targets([]) == 1
