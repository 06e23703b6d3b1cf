"""Which examples a step sees is a function of the step."""

import numpy as np
import pytest

from gemma_tune.data import TokenizedExample
from gemma_tune.data.mixture import EpochSampler
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


def mixture(seed=0):
    return EpochSampler(np.array([0] * 40 + [1] * 10), np.array([13, 23]), seed)


@pytest.mark.parametrize("packing", [True, False])
def test_steps_of_a_mixture_are_a_function_of_the_step(examples, packing):
    """Epochs have different numbers of steps; a run that begins anywhere sees what one from the start sees."""
    from_start = make(examples, packing=packing, num_epochs=5, sampler=mixture())
    resumed = make(examples, packing=packing, num_epochs=5, sampler=mixture())
    seen = [from_start.example_indices(step) for step in range(len(from_start))]
    for step in (len(seen) - 1, 7, 2, len(seen) // 2):
        assert resumed.example_indices(step) == seen[step]
    drawn = [sorted(mixture().indices(epoch).tolist()) for epoch in range(5)]
    assert sorted(i for step in seen for i in step) == sorted(i for epoch in drawn for i in epoch)
    counts = [int(from_start[step].loss_weights.sum()) for step in range(len(seen))]
    assert from_start.most_targets == max(counts)


def test_a_mixture_can_end_inside_an_epoch_or_go_on(examples):
    whole = make(examples, num_epochs=3, sampler=mixture())
    for num_steps in (3, len(whole) + 5):
        cut = make(examples, num_train_steps=num_steps, sampler=mixture())
        assert len(cut) == num_steps
        steps = range(min(num_steps, len(whole)))
        assert [cut.example_indices(step) for step in steps] == [whole.example_indices(step) for step in steps]


def test_no_heldout_batch_has_examples_of_two_groups(examples):
    groups = np.array([1, 0, 2, 0, 1] * 10)
    batches = HeldoutBatches(examples, 3, 64, packing=True, groups=groups)
    assert len(batches.group_of) == len(batches) and set(batches.group_of) == {0, 1, 2}
    for group in (0, 1, 2):
        found = [batches[i] for i in range(len(batches)) if batches.group_of[i] == group]
        wanted = [example for example, other in zip(examples, groups, strict=True) if other == group]
        assert sum(int(batch.loss_weights.sum()) for batch in found) == sum(int(e.is_target.sum()) for e in wanted)
        first_ids = {int(example.token_ids[0]) for example in wanted}
        assert {int(token) for batch in found for token in np.unique(batch.token_ids) if token} == first_ids
