"""Attention for training on CPU: the half of the scores that a causal mask throws away is never computed.

KerasHub computes all T·T scores of a row, with transpositions before and after each product. Here queries are taken a
block at a time, each against the keys up to its own last position, in a layout that needs no transposition when all
query heads share one key/value head. On GPU and TPU KerasHub calls fused kernels where they fit, so there it keeps its
own.
"""

import types
from typing import Any

import jax
import jax.numpy as jnp

from gemma_tune.keras_runtime import keras_hub

_QUERY_BLOCK = 128  # Positions, at least. Smaller blocks skip more, and make products too small to be fast.
_NUM_BLOCKS = 4  # At most: beyond that, programs get long for little.


def causal_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, *, scale: float, soft_cap: float | None = None
) -> jax.Array:
    """Returns softmax(cap(q·kᵀ·scale))·v, where no query sees a later position.

    Args:
        q: [B, T, N, H]; every N / K query heads share a key/value head.
        k: [B, T, K, H].
        v: [B, T, K, H].
        mask: [B, T, T], true where a query (second axis) may look; nothing above the diagonal is read.
        scale: Of the scores.
        soft_cap: c of c·tanh(score / c) (Gemma 2, arXiv:2408.00118), or None.

    Returns:
        [B, T, N, H] in v's dtype. The softmax is float32. Rows whose mask is all false are meaningless.
    """
    num_rows, length, num_heads, width = q.shape
    num_kv_heads = k.shape[2]
    q = (q * scale).reshape(num_rows, length, num_kv_heads, num_heads // num_kv_heads, width)
    blocks, size = [], max(_QUERY_BLOCK, -(-length // _NUM_BLOCKS))
    for start in range(0, length, size):
        stop = min(start + size, length)
        scores = jnp.einsum("btkgh,bskh->bktgs", q[:, start:stop], k[:, :stop], preferred_element_type=jnp.float32)
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        visible = mask[:, None, start:stop, None, :stop]
        probabilities = jax.nn.softmax(jnp.where(visible, scores, -1e30), axis=-1).astype(v.dtype)
        blocks.append(jnp.einsum("bktgs,bskh->btkgh", probabilities, v[:, :stop]))
    return jnp.concatenate(blocks, axis=1).reshape(num_rows, length, num_heads, width)


def use_causal_attention(backbone: keras_hub.models.Backbone) -> None:
    """Swaps the attention of the decoder blocks in training, on CPU; decoding with a cache keeps KerasHub's.

    Models with attention in both directions, or with dropout in it, stay as they are.
    """
    for block in getattr(backbone, "transformer_layers", []):
        attention = block.attention
        both_ways = getattr(attention, "use_bidirectional_attention", False)
        if jax.default_backend() == "cpu" and not both_ways and not attention.dropout:
            object.__setattr__(attention, "_all_scores", attention._compute_attention)
            object.__setattr__(attention, "_compute_attention", types.MethodType(_compute_attention, attention))


def _compute_attention(
    attention: Any, q: Any, k: Any, v: Any, attention_mask: Any, training: bool = False, cache_update_index: Any = 0
) -> Any:
    is_training_row = q.shape[1] == k.shape[1] and attention_mask is not None and attention_mask.ndim == 3
    if not is_training_row or not (isinstance(cache_update_index, int) and cache_update_index == 0):
        return attention._all_scores(q, k, v, attention_mask, training=training, cache_update_index=cache_update_index)
    if getattr(attention, "use_sliding_window_attention", False) and _is_windowed_here(attention):
        attention_mask = attention._mask_sliding_window(attention_mask, cache_update_index=0)
    mask = jnp.broadcast_to(attention_mask.astype(bool), (q.shape[0], q.shape[1], q.shape[1]))
    return causal_attention(q, k, v, mask, scale=_scale(attention), soft_cap=attention.logit_soft_cap)


def _is_windowed_here(attention: Any) -> bool:
    """Gemma 4's blocks put the window into the mask themselves."""
    return hasattr(attention, "query_head_dim_normalize")


def _scale(attention: Any) -> float:
    """Returns what scores are multiplied with: Gemma 4 norms its queries and keys instead."""
    if not hasattr(attention, "query_head_dim_normalize"):
        return 1.0
    if attention.query_head_dim_normalize:
        return attention.head_dim**-0.5
    return (attention.hidden_dim // attention.num_query_heads) ** -0.5
