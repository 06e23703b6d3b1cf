"""Sampling against the probabilities it should draw from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_tune.serving.sampling import Sampling, log_probabilities, sample, tiled_argmax, uniform_rows

LOGITS = jnp.log(jnp.asarray([0.4, 0.3, 0.15, 0.1, 0.05]))
NUM_DRAWS = 20_000
_sample = jax.jit(sample)


def draw(logits, sampling, seen=None, seed=0):
    seen = jnp.zeros(logits.shape, bool) if seen is None else seen
    return np.asarray(_sample(logits, uniform_rows(sampling, logits.shape[0], seed), seen))


def frequencies(sampling, **named):
    return np.bincount(draw(jnp.broadcast_to(LOGITS, (NUM_DRAWS, 5)), sampling, **named), minlength=5) / NUM_DRAWS


def normalized(weights):
    return np.asarray(weights) / np.sum(weights)


@pytest.mark.parametrize(
    ("sampling", "wanted"),
    [
        (Sampling(temperature=1.0), [0.4, 0.3, 0.15, 0.1, 0.05]),
        (Sampling(temperature=0.5), normalized(np.square([0.4, 0.3, 0.15, 0.1, 0.05]))),
        (Sampling(temperature=1.0, top_k=2), normalized([0.4, 0.3, 0, 0, 0])),
        (Sampling(temperature=1.0, top_p=0.75), normalized([0.4, 0.3, 0.15, 0, 0])),
        (Sampling(temperature=1.0, top_p=0.39), [1, 0, 0, 0, 0]),
        (Sampling(temperature=1.0, top_k=4, top_p=0.8), normalized([0.4, 0.3, 0.15, 0, 0])),
        (Sampling(temperature=1.0, min_p=0.3), normalized([0.4, 0.3, 0.15, 0, 0])),
        (Sampling(temperature=1.0, top_k=4, min_p=0.5), normalized([0.4, 0.3, 0, 0, 0])),
        (Sampling(), [1, 0, 0, 0, 0]),
    ],
)
def test_tokens_come_as_often_as_they_should(sampling, wanted):
    # Five standard deviations of a share of 20,000 draws: 0.018 at most.
    np.testing.assert_allclose(frequencies(sampling), wanted, atol=0.018)


def test_a_large_vocabulary_is_drawn_from_as_a_small_one():
    """Across the borders of tiles, with most tokens impossible."""
    logits = jnp.full((NUM_DRAWS, 1300), -jnp.inf).at[:, jnp.array([3, 600, 601, 1100, 1299])].set(LOGITS)
    drawn = draw(logits, Sampling(temperature=1.0))
    shares = [np.mean(drawn == token) for token in (3, 600, 601, 1100, 1299)]
    np.testing.assert_allclose(shares, [0.4, 0.3, 0.15, 0.1, 0.05], atol=0.018)


def test_rows_are_drawn_independently():
    drawn = draw(jnp.zeros((NUM_DRAWS, 1300)), Sampling(temperature=1.0))
    assert len(set(drawn.tolist())) > 1000


def test_a_row_draws_the_same_in_any_company(rng):
    """Its own settings, seed and index decide, not the rows beside it."""
    logits = jnp.asarray(rng.standard_normal((6, 700)), jnp.float32)
    settings = [
        Sampling(1.0), Sampling(), Sampling(0.7, top_k=5), Sampling(1.2, top_p=0.8), Sampling(1.0, min_p=0.1),
        Sampling(0.9, repetition_penalty=1.3),
    ]  # fmt: skip
    alone = [uniform_rows(each, 1, seed=index, index=index) for index, each in enumerate(settings)]
    together = jax.tree.map(lambda *rows: np.concatenate(rows), *alone)
    seen = jnp.asarray(rng.random((6, 700)) < 0.5)
    drawn = np.asarray(_sample(logits, together, seen))
    for index, rows in enumerate(alone):
        assert drawn[index] == np.asarray(_sample(logits[index : index + 1], rows, seen[index : index + 1]))[0]


def test_seen_tokens_are_penalized_as_the_formula_says():
    def rows(values):
        return jnp.broadcast_to(jnp.asarray(values), (NUM_DRAWS, 5))

    logits = rows([2.0, 1.9, -1.0, -1.1, -jnp.inf])
    greedy = draw(logits, Sampling(repetition_penalty=2.0), rows([True, False, False, False, False]))
    assert (greedy == 1).all()
    # Positive logits are divided, negative ones multiplied: exp(1), exp(1.9), exp(-2), exp(-1.1).
    wanted = normalized([*np.exp([1.0, 1.9, -2.0, -1.1]), 0])
    drawn = draw(logits, Sampling(1.0, repetition_penalty=2.0), rows([True, False, True, False, False]))
    np.testing.assert_allclose(np.bincount(drawn, minlength=5) / NUM_DRAWS, wanted, atol=0.018)


def test_tiled_argmax_is_argmax(rng):
    for width in (5, 512, 1300):
        logits = rng.integers(0, 4, (7, width)).astype(np.float32)  # With many ties.
        np.testing.assert_array_equal(tiled_argmax(jnp.asarray(logits)), np.argmax(logits, axis=-1))


def test_log_probabilities_are_those_of_softmax(rng):
    logits = rng.standard_normal((3, 50)).astype(np.float32)
    wanted = np.log(np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True))
    found = log_probabilities(jnp.asarray(logits), jnp.asarray([4, 0, 49]))
    np.testing.assert_allclose(found.chosen, wanted[[0, 1, 2], [4, 0, 49]], rtol=1e-5)
    np.testing.assert_array_equal(found.top_ids, np.argsort(-logits, axis=-1)[:, :20])
    np.testing.assert_allclose(found.top, -np.sort(-wanted, axis=-1)[:, :20], rtol=1e-5)
