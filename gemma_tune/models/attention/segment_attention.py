"""Attention of packed rows that computes few more scores than their segments need, for CPUs.

In a row of 1,024 tokens with examples of 300, two thirds of the scores below the diagonal are between examples that
don't see each other. Where the segments are is known only when the program runs, while a compiled product has a fixed
shape. So the queries of a row are cut into tiles. A tile needs the keys from the first that one of its queries sees up
to its own end. For each of a few numbers of keys (spans) there is a loop, and each tile is computed in the loop of the
shortest span that is long enough. How often a loop runs depends on the batch. On a CPU that costs nothing; a GPU or
TPU would have to wait for the host.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gemma_tune.models.attention.kernels import masked_attention

QUERY_TILE = 128  # Queries in a tile, at most.


def segment_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    *,
    scale: float,
    soft_cap: float | None = None,
    window: int | None = None,
) -> jax.Array:
    """Returns softmax(cap(q·kᵀ·scale))·v, where no query sees a later position, as `causal_attention` does.

    Args:
        q: [B, T, N, H] queries; every N / K query heads share a key/value head.
        k: [B, T, K, H] keys.
        v: [B, T, K, H] values.
        mask: [B, T, T] bool, true where a query (second axis) sees a key; false above the diagonal.
        scale: Factor of the scores.
        soft_cap: Soft cap of the scores (`apply_soft_cap`), or None.
        window: Number of positions that a query sees, its own included, or None for all before it. The mask is cut to
            the window already.

    Returns:
        [B, T, N, H] in v's dtype. The softmax is float32. Rows whose mask is all false are meaningless.
    """
    num_rows, length, num_heads, width = q.shape
    num_tiles = -(-length // QUERY_TILE)
    tile = -(-length // num_tiles)
    missing = num_tiles * tile - length
    q = (q * scale).reshape(num_rows, length, k.shape[2], num_heads // k.shape[2], width)
    if missing:
        q, k, v = (jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2)) for x in (q, k, v))
        mask = jnp.pad(mask, ((0, 0), (0, missing), (0, missing)))
    longest = min(num_tiles * tile, window + tile - 1 if window else num_tiles * tile)
    attended = _attention(soft_cap, tile, key_spans(tile, longest), q, k, v, mask)
    return attended[:, :length].reshape(num_rows, length, num_heads, width)


def key_spans(tile: int, longest: int) -> tuple[int, ...]:
    """Returns the numbers of keys that there are loops for, ascending. Each is half as long again, or one tile longer.

    Args:
        tile: Number of queries in a tile.
        longest: Number of keys that a tile needs at most.
    """
    spans = [min(tile, longest)]
    while spans[-1] < longest:
        spans.append(min(longest, spans[-1] + max(1, spans[-1] // (2 * tile)) * tile))
    return tuple(spans)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(soft_cap, tile, spans, q, k, v, mask) -> jax.Array:
    """Returns the attention of scaled queries q [B, T, K, G, H], in that shape. T is a multiple of the tile."""

    def visit(span: int, row, first_query, first_key, attended):
        queries, tile_mask = _slice(q, row, first_query, tile), _mask(mask, row, first_query, first_key, tile, span)
        keys, values = (_slice(x, row, first_key, span) for x in (k, v))
        return _update(attended, masked_attention(queries, keys, values, tile_mask, soft_cap), row, first_query)

    return _visit_tiles(mask, tile, spans, visit, jnp.zeros(q.shape, v.dtype))


def _attention_forward(soft_cap, tile, spans, q, k, v, mask) -> tuple[jax.Array, tuple]:
    return _attention(soft_cap, tile, spans, q, k, v, mask), (q, k, v, mask)


def _attention_backward(soft_cap, tile, spans, residuals: tuple, gradient: jax.Array) -> tuple:
    """Computes the scores of each tile again, so that no [T, T] array is kept."""
    q, k, v, mask = residuals

    def visit(span: int, row, first_query, first_key, gradients):
        of_q, of_k, of_v = gradients
        tile_mask = _mask(mask, row, first_query, first_key, tile, span)
        _, pullback = jax.vjp(
            lambda q, k, v: masked_attention(q, k, v, tile_mask, soft_cap),
            _slice(q, row, first_query, tile),
            _slice(k, row, first_key, span),
            _slice(v, row, first_key, span),
        )
        of_queries, of_keys, of_values = pullback(_slice(gradient, row, first_query, tile))
        return (
            _update(of_q, of_queries, row, first_query),
            _update(of_k, _slice(of_k, row, first_key, span) + of_keys, row, first_key),
            _update(of_v, _slice(of_v, row, first_key, span) + of_values, row, first_key),
        )

    # Gradients of keys and values are sums over tiles, so they are float32 whatever the dtype.
    zeros = (jnp.zeros(q.shape, q.dtype), *(jnp.zeros(x.shape, jnp.float32) for x in (k, v)))
    of_q, of_k, of_v = _visit_tiles(mask, tile, spans, visit, zeros)
    return of_q, of_k.astype(k.dtype), of_v.astype(v.dtype), None


_attention.defvjp(_attention_forward, _attention_backward)


def _visit_tiles(mask: jax.Array, tile: int, spans: tuple[int, ...], visit: Callable, carry: Any) -> Any:
    """Runs carry = visit(span, row, first query, first key, carry) for each tile of queries of each row."""
    num_rows, length, _ = mask.shape
    num_tiles = length // tile
    # [B, num_tiles, T]: which keys a tile's queries see; then the number of keys from the first of these to its end.
    is_seen = mask.reshape(num_rows, num_tiles, tile, length).any(2)
    ends = jnp.arange(1, num_tiles + 1) * tile
    needed = jnp.where(is_seen.any(2), ends - jnp.argmax(is_seen, 2), 1).ravel()
    which = jnp.searchsorted(jnp.asarray(spans), needed)
    order = jnp.argsort(which)
    stops = jnp.searchsorted(which[order], np.arange(len(spans)), side="right").astype(jnp.int32)
    start = jnp.int32(0)
    for span, stop in zip(spans, stops, strict=True):

        def step(place, carry, span=span):
            row, index = order[place] // num_tiles, order[place] % num_tiles
            first_key = jnp.maximum((index + 1) * tile - span, 0)
            return visit(span, row, index * tile, first_key, carry)

        carry = lax.fori_loop(start, stop, step, carry)
        start = stop
    return carry


def _slice(array: jax.Array, row, start, count: int) -> jax.Array:
    """Returns `count` positions of one row of an array, [1, count, …]."""
    zeros = (0,) * (array.ndim - 2)
    return lax.dynamic_slice(array, (row, start, *zeros), (1, count, *array.shape[2:]))


def _update(array: jax.Array, part: jax.Array, row, start) -> jax.Array:
    """Returns an array with positions of one row, [1, count, …], replaced."""
    return lax.dynamic_update_slice(array, part.astype(array.dtype), (row, start, *(0,) * (array.ndim - 2)))


def _mask(mask: jax.Array, row, first_query, first_key, tile: int, span: int) -> jax.Array:
    return lax.dynamic_slice(mask, (row, first_query, first_key), (1, tile, span))
