"""Picks the next token of each row from its logits.

How to pick is data and not part of a program: every row has its own settings, so that none compiles anything, and what
a row draws depends on its own logits, seed and number of tokens alone.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gemma_tune.config_checks import MOST_CANDIDATES

MAX_LOGPROBS = 20
_BLOCK = 512


class Sampling(NamedTuple):
    """How to pick. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 leave all tokens in; repetition_penalty 1
    changes nothing. As in `config.GenerationConfig`.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


GREEDY = Sampling()


class RowSampling(NamedTuple):
    """The same for each of B rows, as arrays [B].

    seed: uint32. index: int32, how many tokens the row has drawn before this one. The others: as in Sampling.
    """

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    repetition_penalty: Any
    seed: Any
    index: Any


class Logprobs(NamedTuple):
    """Log-probabilities before temperature and filters.

    chosen: [B], of the picked tokens. top_ids, top: [B, 20], the likeliest.
    """

    chosen: Any
    top_ids: Any
    top: Any


def uniform_rows(sampling: Sampling, num_rows: int, seed: int = 0, index: int = 0) -> RowSampling:
    """Returns one Sampling for all rows; each draws with a seed of its own."""
    floats = {
        name: np.full(num_rows, getattr(sampling, name), np.float32)
        for name in ("temperature", "top_p", "min_p", "repetition_penalty")
    }
    seeds = (seed + np.arange(num_rows, dtype=np.int64)) & 0xFFFFFFFF
    return RowSampling(
        **floats,
        top_k=np.full(num_rows, sampling.top_k, np.int32),
        seed=seeds.astype(np.uint32),
        index=np.full(num_rows, index, np.int32),
    )


def sample(logits: jax.Array, rows: RowSampling, seen: jax.Array) -> jax.Array:
    """Returns [B] int32 token ids.

    Args:
        logits: [B, V] float32.
        rows: The settings. top_k and top_p (arXiv:1904.09751) look among the 1,024 likeliest tokens; min_p
            (arXiv:2407.01082) leaves tokens out that are less than this times as likely as the likeliest.
        seen: [B, V] bool, the tokens that repetition_penalty (arXiv:1909.05858, section 4.1) makes less likely.
    """
    is_plain = jnp.all((rows.temperature == 0) & (rows.repetition_penalty == 1))
    return lax.cond(is_plain, lambda: tiled_argmax(logits), lambda: _sample(logits, rows, seen))


def _sample(logits: jax.Array, rows: RowSampling, seen: jax.Array) -> jax.Array:
    logits = lax.cond(
        jnp.any(rows.repetition_penalty != 1), lambda: _penalized(logits, rows.repetition_penalty, seen), lambda: logits
    )
    greedy = tiled_argmax(logits)
    draws = rows.temperature > 0
    filters = draws & ((rows.top_k > 0) | (rows.top_p < 1))

    def drawn() -> jax.Array:
        scaled = logits / jnp.where(draws, rows.temperature, 1)[:, None]
        uniform = jax.vmap(_uniform)(rows.seed, rows.index)
        free = lax.cond(jnp.any(draws & ~filters), lambda: _from_all(scaled, rows, uniform), lambda: greedy)
        filtered = lax.cond(jnp.any(filters), lambda: _from_candidates(scaled, rows, uniform), lambda: greedy)
        return jnp.where(filters, filtered, free)

    return jnp.where(draws, lax.cond(jnp.any(draws), drawn, lambda: greedy), greedy)


def tiled_argmax(logits: jax.Array) -> jax.Array:
    """Returns [B] int32, jnp.argmax of each row; that takes XLA on CPU twelve times as long for 262,144 logits."""
    num_rows, vocabulary = logits.shape
    missing = ((0, 0), (0, -vocabulary % _BLOCK))
    blocks = jnp.pad(logits, missing, constant_values=-jnp.inf).reshape(num_rows, -1, _BLOCK)
    block = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1)
    in_block = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return (block * _BLOCK + jnp.argmax(in_block, axis=-1)).astype(jnp.int32)


def log_probabilities(logits: jax.Array, tokens: jax.Array) -> Logprobs:
    """Returns those of tokens [B] under logits [B, V], and of the likeliest."""
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    values, ids = lax.top_k(logits, min(MAX_LOGPROBS, logits.shape[-1]))
    missing = ((0, 0), (0, MAX_LOGPROBS - values.shape[-1]))
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1) - total
    top = jnp.pad(values - total, missing, constant_values=-jnp.inf)
    return Logprobs(chosen[:, 0], jnp.pad(ids, missing), top)


def _penalized(logits: jax.Array, penalty: jax.Array, seen: jax.Array) -> jax.Array:
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def _uniform(seed: jax.Array, index: jax.Array) -> jax.Array:
    return jax.random.uniform(jax.random.fold_in(jax.random.key(seed), index))


def _from_candidates(scaled: jax.Array, rows: RowSampling, uniform: jax.Array) -> jax.Array:
    """Draws from the likeliest tokens, in the order of their likelihood."""
    candidates, ids = lax.top_k(scaled, min(MOST_CANDIDATES, scaled.shape[-1]))
    probabilities = jnp.exp(candidates - jax.nn.logsumexp(scaled, axis=-1, keepdims=True))
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # What the likelier ones hold.
    rank = jnp.arange(candidates.shape[-1])
    kept = (before < rows.top_p[:, None]) & (probabilities >= rows.min_p[:, None] * probabilities[:, :1])
    kept &= (rows.top_k[:, None] == 0) | (rank < rows.top_k[:, None])
    chosen = _pick(jnp.where(kept, probabilities, 0), uniform)
    return jnp.take_along_axis(ids, chosen[:, None], axis=-1)[:, 0].astype(jnp.int32)


def _from_all(scaled: jax.Array, rows: RowSampling, uniform: jax.Array) -> jax.Array:
    """Draws from the whole vocabulary: first a block of it, then a token in the block."""
    weights = jnp.exp(scaled - jnp.max(scaled, axis=-1, keepdims=True))
    weights = jnp.where(weights >= rows.min_p[:, None], weights, 0)
    num_rows, vocabulary = weights.shape
    weights = jnp.pad(weights, ((0, 0), (0, -vocabulary % _BLOCK))).reshape(num_rows, -1, _BLOCK)
    of_blocks = jnp.sum(weights, axis=-1)
    block = _pick(of_blocks, uniform)
    before = jnp.where(jnp.arange(of_blocks.shape[-1]) < block[:, None], of_blocks, 0).sum(axis=-1)
    in_block = jnp.take_along_axis(weights, block[:, None, None], axis=1)[:, 0]
    rest = uniform * of_blocks.sum(axis=-1) - before
    return (block * _BLOCK + _pick(in_block, rest / in_block.sum(axis=-1))).astype(jnp.int32)


def _pick(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """Returns [B], the index at which the running sum of weights [B, n] passes this share of their total, [B]. Never
    one of weight 0, whatever rounding does.
    """
    running = jnp.cumsum(weights, axis=-1)
    passed = (running > uniform[:, None] * running[:, -1:]) & (weights > 0)
    last = weights.shape[-1] - 1 - jnp.argmax(weights[:, ::-1] > 0, axis=-1)
    return jnp.where(passed.any(axis=-1), jnp.argmax(passed, axis=-1), last)
