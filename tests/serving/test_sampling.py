"""Sampling against the probabilities it should draw from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_tune.serving.sampling import Sampling, sample

LOGITS = jnp.log(jnp.asarray([0.4, 0.3, 0.15, 0.1, 0.05]))
NUM_DRAWS = 20_000


def frequencies(sampling):
    logits = jnp.broadcast_to(LOGITS, (NUM_DRAWS, 5))
    drawn = np.asarray(sample(logits, sampling, jax.random.key(0)))
    return np.bincount(drawn, minlength=5) / NUM_DRAWS


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
        (Sampling(), [1, 0, 0, 0, 0]),
    ],
)
def test_tokens_come_as_often_as_they_should(sampling, wanted):
    # Five standard deviations of a share of 20,000 draws: 0.018 at most.
    np.testing.assert_allclose(frequencies(sampling), wanted, atol=0.018)


def test_rows_are_drawn_independently():
    drawn = np.asarray(sample(jnp.zeros((64, 1000)), Sampling(temperature=1.0), jax.random.key(0)))
    assert len(set(drawn.tolist())) > 50
