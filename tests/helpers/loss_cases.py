"""Inputs of losses."""

import jax.numpy as jnp


def random_case(rng, num_tokens, vocabulary, width=24):
    return (
        jnp.asarray(rng.normal(size=(num_tokens, width)), jnp.float32),
        jnp.asarray(rng.normal(size=(vocabulary, width)), jnp.float32),
        jnp.asarray(rng.integers(0, vocabulary, num_tokens), jnp.int32),
        jnp.asarray([1.0, *rng.choice([0.0, 1.0, 0.5], num_tokens - 1)], jnp.float32),  # One token has a weight.
    )
