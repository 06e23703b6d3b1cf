"""Attention of packed rows that computes hardly more scores than their segments need.

In a row of 1,024 tokens with examples of 300, two thirds of the scores below the diagonal lie between examples that
don't see each other. Where the segments are is known only when the program runs, and a compiled product has a fixed
shape. So a row is cut into blocks of queries, each of which needs the keys from the first that one of its queries sees
up to its own last; there is one loop for each of a few spans of keys, and each block is visited by the loop of the
shortest span that reaches far enough. How often a loop runs depends on the batch. On CPU that costs nothing; a GPU or
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

QUERY_TILE = 128  # Positions, at most.


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
        q: [B, T, N, H]; every N / K query heads share a key/value head.
        k: [B, T, K, H].
        v: [B, T, K, H].
        mask: [B, T, T], true where a query (second axis) may look; false above the diagonal.
        scale: Of the scores.
        soft_cap: c of c·tanh(score / c) (Gemma 2, arXiv:2408.00118), or None.
        window: Positions that a query sees at most, its own included, as the mask has it too; None: all before it.

    Returns:
        [B, T, N, H] in v's dtype. The softmax is float32. Rows whose mask is all false are meaningless.
    """
    num_rows, length, num_heads, width = q.shape
    num_blocks = -(-length // QUERY_TILE)
    block = -(-length // num_blocks)
    missing = num_blocks * block - length
    q = (q * scale).reshape(num_rows, length, k.shape[2], num_heads // k.shape[2], width)
    if missing:
        q, k, v = (jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2)) for x in (q, k, v))
        mask = jnp.pad(mask, ((0, 0), (0, missing), (0, missing)))
    longest = min(num_blocks * block, window + block - 1 if window else num_blocks * block)
    attended = _attention(soft_cap, block, key_spans(block, longest), q, k, v, mask)
    return attended[:, :length].reshape(num_rows, length, num_heads, width)


def key_spans(block: int, longest: int) -> tuple[int, ...]:
    """Returns the numbers of keys that a block of queries may be given, ascending: each a block or half more."""
    spans = [min(block, longest)]
    while spans[-1] < longest:
        spans.append(min(longest, spans[-1] + max(1, spans[-1] // (2 * block)) * block))
    return tuple(spans)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(soft_cap, block, spans, q, k, v, mask) -> jax.Array:
    """q: [B, T, K, G, H], scaled; T a multiple of block. Returns the same shape."""

    def visit(span: int, row, first_query, first_key, attended):
        queries, mask_there = _rows(q, row, first_query, block), _mask(mask, row, first_query, first_key, block, span)
        keys, values = (_rows(x, row, first_key, span) for x in (k, v))
        return _put(attended, masked_attention(queries, keys, values, mask_there, soft_cap), row, first_query)

    return _visit_all(mask, block, spans, visit, jnp.zeros(q.shape, v.dtype))


def _attention_forward(soft_cap, block, spans, q, k, v, mask) -> tuple[jax.Array, tuple]:
    return _attention(soft_cap, block, spans, q, k, v, mask), (q, k, v, mask)


def _attention_backward(soft_cap, block, spans, residuals: tuple, gradient: jax.Array) -> tuple:
    """Computes each block's scores anew, so that nothing of T·T is kept."""
    q, k, v, mask = residuals

    def visit(span: int, row, first_query, first_key, gradients):
        of_q, of_k, of_v = gradients
        mask_there = _mask(mask, row, first_query, first_key, block, span)
        _, pullback = jax.vjp(
            lambda q, k, v: masked_attention(q, k, v, mask_there, soft_cap),
            _rows(q, row, first_query, block),
            _rows(k, row, first_key, span),
            _rows(v, row, first_key, span),
        )
        of_queries, of_keys, of_values = pullback(_rows(gradient, row, first_query, block))
        return (
            _put(of_q, of_queries, row, first_query),
            _put(of_k, _rows(of_k, row, first_key, span) + of_keys, row, first_key),
            _put(of_v, _rows(of_v, row, first_key, span) + of_values, row, first_key),
        )

    # Keys get sums over blocks: in float32, whatever their dtype.
    zeros = (jnp.zeros(q.shape, q.dtype), *(jnp.zeros(x.shape, jnp.float32) for x in (k, v)))
    of_q, of_k, of_v = _visit_all(mask, block, spans, visit, zeros)
    return of_q, of_k.astype(k.dtype), of_v.astype(v.dtype), None


_attention.defvjp(_attention_forward, _attention_backward)


def _visit_all(mask: jax.Array, block: int, spans: tuple[int, ...], visit: Callable, carry: Any) -> Any:
    """Runs carry = visit(span, row, first query, first key, carry) for each block of queries of each row."""
    num_rows, length, _ = mask.shape
    num_blocks = length // block
    # [B, num_blocks, T]: the keys that a block's queries see, and how many there are from the first to the block's end.
    is_seen = mask.reshape(num_rows, num_blocks, block, length).any(2)
    ends = jnp.arange(1, num_blocks + 1) * block
    needed = jnp.where(is_seen.any(2), ends - jnp.argmax(is_seen, 2), 1).ravel()
    which = jnp.searchsorted(jnp.asarray(spans), needed)
    order = jnp.argsort(which)
    stops = jnp.searchsorted(which[order], np.arange(len(spans)), side="right").astype(jnp.int32)
    start = jnp.int32(0)
    for span, stop in zip(spans, stops, strict=True):

        def step(place, carry, span=span):
            row, index = order[place] // num_blocks, order[place] % num_blocks
            first_key = jnp.maximum((index + 1) * block - span, 0)
            return visit(span, row, index * block, first_key, carry)

        carry = lax.fori_loop(start, stop, step, carry)
        start = stop
    return carry


def _rows(array: jax.Array, row, start, count: int) -> jax.Array:
    """Returns `count` positions of one row, [1, count, …]."""
    zeros = (0,) * (array.ndim - 2)
    return lax.dynamic_slice(array, (row, start, *zeros), (1, count, *array.shape[2:]))


def _put(array: jax.Array, part: jax.Array, row, start) -> jax.Array:
    return lax.dynamic_update_slice(array, part.astype(array.dtype), (row, start, *(0,) * (array.ndim - 2)))


def _mask(mask: jax.Array, row, first_query, first_key, block: int, span: int) -> jax.Array:
    return lax.dynamic_slice(mask, (row, first_query, first_key), (1, block, span))
