"""Attention of new tokens to what a cache holds of their own row, in the place of KerasHub's.

KerasHub's cache is one array for each batch and its index one number, so that all rows are at the same position. Here
all rows share one row of positions, in which each has a region of its own (`regions`), and each is where it is.
KerasHub's layers are called without a cache: they make queries, keys and values of the new tokens, and
`_compute_attention`, which gets them, writes to the cache and reads from it.
"""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gemma_tune.models.attention.swap import AttentionShape, attention_shape_of
from gemma_tune.models.lm_head import apply_soft_cap
from gemma_tune.runtime.backend import is_single_cpu, keras_hub


class LayerCache(NamedTuple):
    """keys, values: [positions, K, H] of one decoder block."""

    keys: Any
    values: Any


class CacheIndex(NamedTuple):
    """Where B rows of T new tokens stand.

    starts: [B] int32, of each row's region. firsts: [B] int32, of the first new token, counted from there. lengths: How
    many positions attention may look at, ascending; the least that reaches a row's last token is taken.
    """

    starts: Any
    firsts: Any
    lengths: tuple[int, ...]


def empty_cache(backbone: keras_hub.models.Backbone, num_positions: int) -> list[LayerCache]:
    """Returns a cache of zeros, in the dtype in which each block computes."""
    caches = []
    for block in backbone.transformer_layers:
        shape = attention_shape_of(block.attention)
        size = (num_positions, shape.num_kv_heads, shape.head_width)
        caches.append(LayerCache(jnp.zeros(size, shape.dtype), jnp.zeros(size, shape.dtype)))
    return caches


@contextlib.contextmanager
def attention_over_cache(
    cache: Sequence[LayerCache], backbone: keras_hub.models.Backbone, place: CacheIndex
) -> Iterator[list]:
    """Within it, the backbone's blocks attend to a cache; yields the list that has the new cache afterwards."""
    updated: list[LayerCache] = list(cache)
    attentions = [block.attention for block in backbone.transformer_layers]
    names = ("_compute_attention", "_apply_rope")
    before = [{name: attention.__dict__.get(name) for name in names} for attention in attentions]
    try:
        for index, attention in enumerate(attentions):
            object.__setattr__(attention, "_apply_rope", _rope(attention, place))
            object.__setattr__(attention, "_compute_attention", _attention(attention, index, updated, place))
        yield updated
    finally:
        for attention, originals in zip(attentions, before, strict=True):
            for name, original in originals.items():
                if original is None:
                    object.__delattr__(attention, name)
                else:
                    object.__setattr__(attention, name, original)


def _rope(attention: Any, place: CacheIndex) -> Any:
    """Rotates by each row's own positions. Gemma 3's `_apply_rope` takes none, but its layer does."""
    original = type(attention)._apply_rope
    takes_positions = "positions" in inspect.signature(original).parameters

    def apply_rope(x: jax.Array, start_index: Any = 0, positions: Any = None) -> jax.Array:
        del start_index, positions
        here = place.firsts[:, None] + jnp.arange(x.shape[1])
        if takes_positions:
            return original(attention, x, 0, positions=here)
        return attention.rope_layer(x, positions=here)

    return apply_rope


def _attention(attention: Any, index: int, caches: list[LayerCache], place: CacheIndex) -> Any:
    shape = attention_shape_of(attention)

    def compute_attention(q: Any, k: Any, v: Any, attention_mask: Any, **named: Any) -> jax.Array:
        del attention_mask, named
        caches[index] = LayerCache(
            *(write_to_cache(old, new, place) for old, new in zip(caches[index], (k, v), strict=True))
        )
        return attend_to_cache(q * jnp.asarray(shape.scale, q.dtype), caches[index], shape, place)

    return compute_attention


def write_to_cache(cache: jax.Array, new: jax.Array, place: CacheIndex) -> jax.Array:
    """Puts [B, T, K, H] at their places. Row by row, so that XLA does it in place."""
    for row in range(new.shape[0]):
        cache = lax.dynamic_update_slice(cache, new[row], (place.starts[row] + place.firsts[row], 0, 0))
    return cache


def attend_to_cache(q: jax.Array, cache: LayerCache, shape: AttentionShape, place: CacheIndex) -> jax.Array:
    """Returns [B, T, N, H] for scaled queries of the same shape. A row's result depends on nothing of other rows."""
    last_of_rows = place.firsts + q.shape[1]

    def one_row(q: jax.Array, start: Any, first: Any, branch: Any) -> jax.Array:
        branches = [_attend_within(length, shape, cache) for length in lengths]
        return lax.switch(branch, branches, q, start, first)

    lengths = _lengths(place.lengths, shape.window, q.shape[1])
    branches = jnp.searchsorted(jnp.asarray(lengths[:-1], jnp.int32), last_of_rows)
    if q.shape[0] == 1:
        return one_row(q[0], place.starts[0], place.firsts[0], branches[0])[None]
    if is_single_cpu():
        return lax.map(lambda row: one_row(*row), (q, place.starts, place.firsts, branches))
    # Where rows are computed at once, all take the length of the longest.
    return jax.vmap(one_row, in_axes=(0, 0, 0, None))(q, place.starts, place.firsts, jnp.max(branches))


def _lengths(lengths: tuple[int, ...], window: int | None, num_new: int) -> tuple[int, ...]:
    """A window needs no more than itself and the new tokens."""
    if window is None:
        return lengths
    most = min(lengths[-1], -(-(window + num_new) // 64) * 64)
    return (*(length for length in lengths if length < most), most)


def _attend_within(length: int, shape: AttentionShape, cache: LayerCache) -> Any:
    def attend_row(q: jax.Array, start: Any, first: Any) -> jax.Array:
        num_new, groups = q.shape[0], shape.num_heads // shape.num_kv_heads
        offset = jnp.maximum(first + num_new - length, 0)  # Not 0 with a window only.
        k, v = (lax.dynamic_slice_in_dim(each, start + offset, length) for each in cache)
        grouped = q.reshape(num_new, shape.num_kv_heads, groups, shape.head_width)
        scores = apply_soft_cap(_scores(grouped, k), shape.soft_cap)
        of_query, of_key = (first + jnp.arange(num_new))[:, None], (offset + jnp.arange(length))[None]
        visible = of_key <= of_query
        if shape.window is not None:
            visible &= of_key > of_query - shape.window
        weights = jax.nn.softmax(jnp.where(visible, scores.astype(jnp.float32), -jnp.inf), axis=-1)
        return _outputs(weights.astype(scores.dtype), v).reshape(num_new, shape.num_heads, shape.head_width)

    return attend_row


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """Returns [K, G, T, length] of queries [T, K, G, H] and keys [length, K, H]."""
    num_new, num_kv_heads, groups, _ = q.shape
    if num_new > 1 or not is_single_cpu():
        return jnp.einsum("tkgh,skh->kgts", q, k)
    # Head by head, keys first: else XLA transposes all keys. The barrier keeps it from changing their order back.
    heads = [lax.optimization_barrier(k[:, head] @ q[0, head].T).T for head in range(num_kv_heads)]
    return jnp.stack(heads).reshape(num_kv_heads, groups, 1, -1)


def _outputs(weights: jax.Array, v: jax.Array) -> jax.Array:
    """Returns [T, K, G, H] of weights [K, G, T, length] and values [length, K, H]."""
    if weights.shape[2] > 1 or not is_single_cpu():
        return jnp.einsum("kgts,skh->tkgh", weights, v)
    # As for the scores.
    return jnp.stack([lax.optimization_barrier(weights[head, :, 0] @ v[:, head]) for head in range(v.shape[1])])[None]
