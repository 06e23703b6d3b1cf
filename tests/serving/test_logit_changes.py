"""Penalties, bias and masks of logits, against their formulas."""

import jax.numpy as jnp
import numpy as np
import pytest

from gemma_tune.serving.logit_changes import NO_CHANGES, LogitChanges, changed_logits, no_row_changes, set_row

V = 70  # Not a whole number of words.
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(3, V)).astype(np.float32)
COUNTS = RNG.integers(0, 4, size=(5, V)).astype(np.int32)
COUNT_ROWS = np.array([4, 0, 2], np.int32)


def changed(rows):
    return np.asarray(changed_logits(jnp.asarray(LOGITS), rows, jnp.asarray(COUNTS), jnp.asarray(COUNT_ROWS)))


def test_without_changes_logits_stay_as_they_are():
    rows = no_row_changes(3, V)
    set_row(rows, 1, NO_CHANGES)
    np.testing.assert_array_equal(changed(rows), LOGITS)


def test_penalties_are_openai_s_formula():
    """mu[j] - c[j]·alpha_frequency - float(c[j] > 0)·alpha_presence, for each row with its own numbers."""
    rows, settings = no_row_changes(3, V), [(0.5, 0.25), (0.0, 0.0), (-1.0, 2.0)]
    for row, (presence, frequency) in enumerate(settings):
        set_row(rows, row, LogitChanges(presence, frequency))
    wanted = LOGITS.copy()
    for row, (presence, frequency) in enumerate(settings):
        for token in range(V):
            count = COUNTS[COUNT_ROWS[row], token]
            wanted[row, token] += -count * frequency - float(count > 0) * presence
    np.testing.assert_allclose(changed(rows), wanted, atol=1e-6)
    assert not np.allclose(changed(rows), LOGITS)


def test_bias_is_added_to_its_tokens_alone():
    rows = no_row_changes(3, V)
    set_row(rows, 0, LogitChanges(bias=((0, 7.0), (69, -100.0))))
    set_row(rows, 2, LogitChanges(bias=((5, 1.5),)))
    wanted = LOGITS.copy()
    wanted[0, 0] += 7
    wanted[0, 69] -= 100
    wanted[2, 5] += 1.5
    np.testing.assert_allclose(changed(rows), wanted, atol=1e-5)


@pytest.mark.parametrize("others", [False, True])
def test_a_mask_leaves_what_is_allowed_and_other_rows(others):
    rows = no_row_changes(3, V)
    allowed = RNG.random(V) < 0.5
    bits = np.zeros(96, bool)
    bits[:V] = allowed
    rows.allowed[1] = np.packbits(bits, bitorder="little").view(np.int32)
    rows.is_constrained[1] = True
    if others:
        set_row(rows, 1, LogitChanges(bias=((3, 9.0),)))
    wanted = LOGITS.copy()
    wanted[1, 3] += 9.0 * others
    wanted[1, ~allowed] = -np.inf
    np.testing.assert_allclose(changed(rows), wanted, atol=1e-6)
