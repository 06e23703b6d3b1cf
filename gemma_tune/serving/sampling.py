"""Samples the next token of each row from its logits.

The settings are data and not part of the compiled program: every row has its own, none of them compiles anything, and
what a row draws depends only on its own logits, seed and number of tokens.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gemma_tune.config_checks import MAX_TOP_K

MAX_LOGPROBS = 20
_TILE = 512


class Sampling(NamedTuple):
    """Sampling settings, as in `config.GenerationConfig`.

    Attributes:
        temperature: Divisor of the logits; 0: greedy, the most likely token.
        top_k: Number of most likely tokens to draw from; 0: all.
        top_p: Probability that the most likely tokens to draw from must reach together; 1: all tokens.
        min_p: Least probability of a token to draw, as a share of the most likely token's; 0: all tokens.
        repetition_penalty: Divisor of the logits of tokens that occurred before; 1: none.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


GREEDY = Sampling()


class RowSampling(NamedTuple):
    """The sampling settings of B rows, as arrays [B].

    Attributes:
        temperature, top_k, top_p, min_p, repetition_penalty: Settings as in Sampling; top_k int32, the others float32.
        seed: Random seeds, uint32.
        index: Numbers of tokens that the rows have drawn before, int32.
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

    Attributes:
        chosen: [B] log-probabilities of the sampled tokens.
        top_ids: [B, 20] ids of the most likely tokens.
        top: [B, 20] log-probabilities of the most likely tokens.
    """

    chosen: Any
    top_ids: Any
    top: Any


def uniform_rows(sampling: Sampling, num_rows: int, seed: int = 0, index: int = 0) -> RowSampling:
    """Returns the same settings for all rows, with seeds that count up from `seed`."""
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


def sample(
    logits: jax.Array,
    rows: RowSampling,
    seen: jax.Array,
    is_changed: Any = False,
    change: Callable[[jax.Array], jax.Array] = lambda logits: logits,
) -> jax.Array:
    """Returns the next token ids, [B] int32.

    Args:
        logits: [B, V] float32.
        rows: Settings of the rows. top_k and top_p (arXiv:1904.09751) choose among the 1,024 most likely tokens; min_p
            (arXiv:2407.01082) leaves out tokens whose probability is below this share of the most likely token's.
        seen: [B, V] bool, tokens that repetition_penalty (arXiv:1909.05858, section 4.1) makes less likely.
        is_changed: [] bool, whether the logits are changed first.
        change: Function that changes them. It runs only where it is needed, since a copy of all logits takes a while.
    """
    is_plain = jnp.all((rows.temperature == 0) & (rows.repetition_penalty == 1)) & ~jnp.asarray(is_changed)

    def sampled() -> jax.Array:
        changed = lax.cond(jnp.asarray(is_changed), lambda: change(logits), lambda: logits)
        return _sample(changed, rows, seen)

    return lax.cond(is_plain, lambda: tiled_argmax(logits), sampled)


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
    """Returns jnp.argmax of each row, [B] int32, which takes XLA on CPU twelve times as long for 262,144 logits."""
    num_rows, vocabulary = logits.shape
    missing = ((0, 0), (0, -vocabulary % _TILE))
    tiles = jnp.pad(logits, missing, constant_values=-jnp.inf).reshape(num_rows, -1, _TILE)
    tile = jnp.argmax(jnp.max(tiles, axis=-1), axis=-1)
    in_tile = jnp.take_along_axis(tiles, tile[:, None, None], axis=1)[:, 0]
    return (tile * _TILE + jnp.argmax(in_tile, axis=-1)).astype(jnp.int32)


def log_probabilities(logits: jax.Array, tokens: jax.Array) -> Logprobs:
    """Returns the log-probabilities of tokens [B] under logits [B, V], and those of the most likely tokens."""
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
    """Draws from the most likely tokens, which stand in the order of their probability."""
    candidates, ids = lax.top_k(scaled, min(MAX_TOP_K, scaled.shape[-1]))
    probabilities = jnp.exp(candidates - jax.nn.logsumexp(scaled, axis=-1, keepdims=True))
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # Of the more likely tokens together.
    rank = jnp.arange(candidates.shape[-1])
    kept = (before < rows.top_p[:, None]) & (probabilities >= rows.min_p[:, None] * probabilities[:, :1])
    kept &= (rows.top_k[:, None] == 0) | (rank < rows.top_k[:, None])
    chosen = _pick(jnp.where(kept, probabilities, 0), uniform)
    return jnp.take_along_axis(ids, chosen[:, None], axis=-1)[:, 0].astype(jnp.int32)


def _from_all(scaled: jax.Array, rows: RowSampling, uniform: jax.Array) -> jax.Array:
    """Draws from the whole vocabulary: first a tile of it, then a token in the tile."""
    weights = jnp.exp(scaled - jnp.max(scaled, axis=-1, keepdims=True))
    weights = jnp.where(weights >= rows.min_p[:, None], weights, 0)
    num_rows, vocabulary = weights.shape
    weights = jnp.pad(weights, ((0, 0), (0, -vocabulary % _TILE))).reshape(num_rows, -1, _TILE)
    tile_sums = jnp.sum(weights, axis=-1)
    tile = _pick(tile_sums, uniform)
    before = jnp.where(jnp.arange(tile_sums.shape[-1]) < tile[:, None], tile_sums, 0).sum(axis=-1)
    in_tile = jnp.take_along_axis(weights, tile[:, None, None], axis=1)[:, 0]
    rest = uniform * tile_sums.sum(axis=-1) - before
    return (tile * _TILE + _pick(in_tile, rest / in_tile.sum(axis=-1))).astype(jnp.int32)


def _pick(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """Returns the index [B] at which the running sum of weights [B, n] passes a share [B] of their total. It never has
    weight 0, whatever rounding does.
    """
    running = jnp.cumsum(weights, axis=-1)
    passed = (running > uniform[:, None] * running[:, -1:]) & (weights > 0)
    last = weights.shape[-1] - 1 - jnp.argmax(weights[:, ::-1] > 0, axis=-1)
    return jnp.where(passed.any(axis=-1), jnp.argmax(passed, axis=-1), last)
