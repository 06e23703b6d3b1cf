"""Packed rows give what the same examples give in rows of their own."""

import numpy as np
import pytest

from gemma_tune.data import TokenizedExample, make_batch
from gemma_tune.errors import ModelError
from gemma_tune.models.attention.packing_masks import enable_packing
from gemma_tune.models.functional import hidden_states


def random_examples(rng, lengths, vocabulary=1024):
    return [TokenizedExample(rng.integers(10, vocabulary, n).astype(np.int32), np.ones(n, bool)) for n in lengths]


def run(model, batch):
    return np.asarray(hidden_states(model.backbone, batch.token_ids, batch.segment_ids, batch.positions))


def test_packed_equals_separate(tiny, some_family, rng):
    model = tiny(some_family)
    lengths = (24, 9, 30)  # Longer than the sliding window of 16.
    examples = random_examples(rng, lengths)
    separate = run(model, make_batch([[example] for example in examples], 3, 64))  # KerasHub's own masks.
    enable_packing(model.backbone)
    packed = run(model, make_batch([examples], 1, 64))
    start = 0
    for row, length in enumerate(lengths):
        # Rotary angles of other positions round differently: float32 to 1e-4 on values of order 1.
        np.testing.assert_allclose(packed[0, start : start + length - 1], separate[row, : length - 1], atol=2e-4)
        start += length - 1


def test_without_packing_examples_see_each_other(tiny, rng):
    """Negative control: with KerasHub's own mask, the second example of the same packed row sees the first."""
    model = tiny("gemma3")
    examples = random_examples(rng, (24, 9))
    separate = run(model, make_batch([[example] for example in examples], 2, 64))
    packed = run(model, make_batch([examples], 1, 64))
    assert np.abs(packed[0, 23:31] - separate[1, :8]).max() > 0.1


def test_a_plain_padding_mask_means_what_it_meant(tiny, family, rng):
    model = tiny(family)
    batch = make_batch([random_examples(rng, (20,))], 1, 32)
    before = run(model, batch)[0, :19]
    enable_packing(model.backbone)
    enable_packing(model.backbone)  # Twice changes nothing.
    np.testing.assert_array_equal(run(model, batch)[0, :19], before)


def test_a_model_without_known_masks_is_named():
    class Unknown:
        transformer_layers = ()

    with pytest.raises(ModelError, match=r"Unknown .* data.packing=false"):
        enable_packing(Unknown())
