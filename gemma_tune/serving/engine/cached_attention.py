"""Attention of new tokens to their own slot of the KV cache, in place of KerasHub's attention.

KerasHub's cache is one array for a batch and its index one number, so that all rows stand at the same position. Here
all rows share one row of positions, in which each has a slot of its own (`kv_cache`) and stands where it is. KerasHub's
layers are called without a cache: they make queries, keys and values of the new tokens, and the replaced
`_compute_attention`, which receives them, writes to the cache and reads from it.
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
    """The KV cache of one decoder block.

    Attributes:
        keys, values: [positions, K, H] arrays.
    """

    keys: Any
    values: Any


class CacheIndex(NamedTuple):
    """Where the T new tokens of B rows stand in the cache.

    Attributes:
        slot_starts: [B] int32, first position of each row's slot.
        first_positions: [B] int32, position of the first new token in its slot.
        attention_lengths: Numbers of positions that attention may read, ascending. The smallest that reaches a row's
            last token is used.
    """

    slot_starts: Any
    first_positions: Any
    attention_lengths: tuple[int, ...]


def empty_cache(backbone: keras_hub.models.Backbone, num_positions: int) -> list[LayerCache]:
    """Returns a cache of zeros, in the compute dtype of each decoder block."""
    caches = []
    for block in backbone.transformer_layers:
        shape = attention_shape_of(block.attention)
        size = (num_positions, shape.num_kv_heads, shape.head_width)
        caches.append(LayerCache(jnp.zeros(size, shape.dtype), jnp.zeros(size, shape.dtype)))
    return caches


@contextlib.contextmanager
def attention_over_cache(
    cache: Sequence[LayerCache], backbone: keras_hub.models.Backbone, index: CacheIndex
) -> Iterator[list[LayerCache]]:
    """A context in which decoder blocks attend to a cache. Yields the list that becomes the new cache."""
    updated: list[LayerCache] = list(cache)
    attentions = [block.attention for block in backbone.transformer_layers]
    names = ("_compute_attention", "_apply_rope")
    before = [{name: attention.__dict__.get(name) for name in names} for attention in attentions]
    try:
        for place, attention in enumerate(attentions):
            object.__setattr__(attention, "_apply_rope", _rope(attention, index))
            object.__setattr__(attention, "_compute_attention", _attention(attention, place, updated, index))
        yield updated
    finally:
        for attention, originals in zip(attentions, before, strict=True):
            for name, original in originals.items():
                if original is None:
                    object.__delattr__(attention, name)
                else:
                    object.__setattr__(attention, name, original)


def _rope(attention: Any, index: CacheIndex) -> Any:
    """Returns an `_apply_rope` with each row's own positions. Gemma 3's takes none, but its rotary layer does."""
    original = type(attention)._apply_rope
    takes_positions = "positions" in inspect.signature(original).parameters

    def apply_rope(x: jax.Array, start_index: Any = 0, positions: Any = None) -> jax.Array:
        del start_index, positions
        own_positions = index.first_positions[:, None] + jnp.arange(x.shape[1])
        if takes_positions:
            return original(attention, x, 0, positions=own_positions)
        return attention.rope_layer(x, positions=own_positions)

    return apply_rope


def _attention(attention: Any, place: int, caches: list[LayerCache], index: CacheIndex) -> Any:
    """Returns a `_compute_attention` that updates `caches[place]` and attends to it."""
    shape = attention_shape_of(attention)

    def compute_attention(q: Any, k: Any, v: Any, attention_mask: Any, **named: Any) -> jax.Array:
        del attention_mask, named
        caches[place] = LayerCache(
            *(write_to_cache(old, new, index) for old, new in zip(caches[place], (k, v), strict=True))
        )
        return attend_to_cache(q * jnp.asarray(shape.scale, q.dtype), caches[place], shape, index)

    return compute_attention


def write_to_cache(cache: jax.Array, new: jax.Array, index: CacheIndex) -> jax.Array:
    """Returns the cache with new keys or values [B, T, K, H], written row by row, so that XLA does it in place."""
    for row in range(new.shape[0]):
        start = index.slot_starts[row] + index.first_positions[row]
        cache = lax.dynamic_update_slice(cache, new[row], (start, 0, 0))
    return cache


def attend_to_cache(q: jax.Array, cache: LayerCache, shape: AttentionShape, index: CacheIndex) -> jax.Array:
    """Returns [B, T, N, H] for scaled queries of the same shape. No row's result depends on another row."""
    ends = index.first_positions + q.shape[1]
    lengths = _lengths_within(index.attention_lengths, shape.window, q.shape[1])
    branches = jnp.searchsorted(jnp.asarray(lengths[:-1], jnp.int32), ends)

    def one_row(q: jax.Array, start: Any, first: Any, branch: Any) -> jax.Array:
        return lax.switch(branch, [_attend_over(length, shape, cache) for length in lengths], q, start, first)

    if q.shape[0] == 1:
        return one_row(q[0], index.slot_starts[0], index.first_positions[0], branches[0])[None]
    rows = q, index.slot_starts, index.first_positions
    if is_single_cpu():
        return lax.map(lambda row: one_row(*row), (*rows, branches))
    # Rows that are computed at once all take the longest one's length.
    return jax.vmap(one_row, in_axes=(0, 0, 0, None))(*rows, jnp.max(branches))


def _lengths_within(lengths: tuple[int, ...], window: int | None, num_new: int) -> tuple[int, ...]:
    """Returns the lengths that sliding-window attention needs: no more than the window and the new tokens."""
    if window is None:
        return lengths
    longest = min(lengths[-1], -(-(window + num_new) // 64) * 64)
    return (*(length for length in lengths if length < longest), longest)


def _attend_over(length: int, shape: AttentionShape, cache: LayerCache) -> Any:
    """Returns the attention of one row over `length` positions of its slot."""

    def attend_row(q: jax.Array, start: Any, first: Any) -> jax.Array:
        num_new, groups = q.shape[0], shape.num_heads // shape.num_kv_heads
        offset = jnp.maximum(first + num_new - length, 0)  # Above 0 only with a sliding window.
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
    """Returns scores [K, G, T, length] of queries [T, K, G, H] and keys [length, K, H]."""
    num_new, num_kv_heads, groups, _ = q.shape
    if num_new > 1 or not is_single_cpu():
        return jnp.einsum("tkgh,skh->kgts", q, k)
    # Head by head with the keys first: otherwise XLA transposes all keys. The barrier keeps it from changing the order.
    heads = [lax.optimization_barrier(k[:, head] @ q[0, head].T).T for head in range(num_kv_heads)]
    return jnp.stack(heads).reshape(num_kv_heads, groups, 1, -1)


def _outputs(weights: jax.Array, v: jax.Array) -> jax.Array:
    """Returns outputs [T, K, G, H] of weights [K, G, T, length] and values [length, K, H]."""
    if weights.shape[2] > 1 or not is_single_cpu():
        return jnp.einsum("kgts,skh->tkgh", weights, v)
    # Head by head, for the same reason.
    return jnp.stack([lax.optimization_barrier(weights[head, :, 0] @ v[:, head]) for head in range(v.shape[1])])[None]
