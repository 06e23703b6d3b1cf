"""Picks the next token from logits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

_NUCLEUS_CANDIDATES = 1024  # Sorting all 262,144 logits takes longer than computing them.


class Sampling(NamedTuple):
    """How to pick. temperature 0 is greedy; top_k 0 and top_p 1 leave all tokens in."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


GREEDY = Sampling()


def sample(logits: jax.Array, sampling: Sampling, key: jax.Array) -> jax.Array:
    """Returns [B] int32 token ids.

    Args:
        logits: [B, V].
        sampling: Static: each value compiles a program of its own. top_p (arXiv:1904.09751) looks among the 1,024
            likeliest tokens.
        key: Random key for this step.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits.astype(jnp.float32) / sampling.temperature
    if not sampling.top_k and sampling.top_p >= 1:
        return jax.random.categorical(key, logits).astype(jnp.int32)
    num_candidates = min(sampling.top_k or _NUCLEUS_CANDIDATES, logits.shape[-1])
    candidates, ids = lax.top_k(logits, num_candidates)
    if sampling.top_p < 1:
        probabilities = jnp.exp(candidates - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
        before = jnp.cumsum(probabilities, axis=-1) - probabilities  # What the likelier ones hold.
        candidates = jnp.where(before < sampling.top_p, candidates, -jnp.inf)
    chosen = jax.random.categorical(key, candidates)
    return jnp.take_along_axis(ids, chosen[:, None], axis=-1)[:, 0].astype(jnp.int32)
