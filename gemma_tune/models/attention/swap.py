"""Swaps KerasHub's attention for one of the kernels of gemma_tune, in training.

KerasHub computes all T·T scores of a row where it can't use a fused kernel: on CPU, on a GPU with soft caps or wide
heads, and on TPU under jit, where its mask is no constant. Decoding with a KV cache keeps KerasHub's attention.
"""

import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gemma_tune.models.attention.kernels import FUSED_TILE, causal_attention, cudnn_attention, splash_attention
from gemma_tune.models.attention.segment_attention import QUERY_TILE, segment_attention
from gemma_tune.models.attention.sharded import shard_map_attention
from gemma_tune.models.attention.shared_prefixes import current_prefix_trees, prefix_tree_window
from gemma_tune.runtime.backend import is_single_cpu, keras_hub


class AttentionShape(NamedTuple):
    """The sizes and settings that decide what an attention layer computes.

    Attributes:
        num_heads: Number of query heads, N.
        num_kv_heads: Number of key/value heads, K.
        head_width: Width of a head, H.
        dtype: Compute dtype.
        scale: Factor of the scores.
        soft_cap: Soft cap of the scores, or None.
        window: Number of positions that a query sees, its own included, or None for all before it.
    """

    num_heads: int
    num_kv_heads: int
    head_width: int
    dtype: str
    scale: float
    soft_cap: float | None
    window: int | None


def attention_shape_of(attention: Any) -> AttentionShape:
    """Returns the sizes and settings of a KerasHub attention layer of any Gemma family."""
    is_local = attention.use_sliding_window_attention and not getattr(attention, "is_global_attention", False)
    return AttentionShape(
        num_heads=attention.num_query_heads,
        num_kv_heads=getattr(attention, "effective_num_kv_heads", attention.num_key_value_heads),
        head_width=attention.head_dim,
        dtype=attention.compute_dtype,
        scale=_scale(attention),
        soft_cap=attention.logit_soft_cap or None,
        window=attention.sliding_window_size if is_local else None,
    )


def use_attention_kernel(backbone: keras_hub.models.Backbone, kernel: str) -> None:
    """Makes the attention layers of the decoder blocks train with a kernel.

    Args:
        backbone: Backbone. For `splash`, packing must be enabled, since the segment ids come that way.
        kernel: `xla`, `cudnn`, `splash`, or `keras` for KerasHub's own attention; from `choose_attention`.
    """
    for block in getattr(backbone, "transformer_layers", []):
        attention: Any = getattr(block, "attention", None)
        if kernel != "keras" and not hasattr(attention, "_keras_attention"):
            object.__setattr__(attention, "_keras_attention", attention._compute_attention)
            object.__setattr__(attention, "_compute_attention", types.MethodType(_compute_attention, attention))
        if hasattr(attention, "_keras_attention"):
            object.__setattr__(attention, "_attention_kernel", kernel)


def takes_segment_ids(attention: Any, length: int) -> bool:
    """Returns whether an attention layer takes [B, L, 1] segment ids in place of a [B, L, L] mask."""
    return getattr(attention, "_attention_kernel", "keras") == "splash" and length % FUSED_TILE == 0


def run_kernel(
    kernel: str, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, shape: AttentionShape
) -> jax.Array:
    """Runs an attention kernel on one device, or leaves it to XLA how to partition it.

    Args:
        kernel: `xla`, `cudnn` or `splash`.
        q: [B, T, N, H] queries.
        k, v: [B, T, K, H] keys and values.
        mask: [B, T, T] bool, cut to the window; for `splash` [B, T, 1] int32 segment ids.
        shape: Sizes and settings of the layer.

    Returns:
        [B, T, N, H] outputs.
    """
    if kernel == "splash":
        return splash_attention(
            q,
            k,
            v,
            mask[:, :, 0],
            scale=shape.scale,
            window=shape.window,
            soft_cap=shape.soft_cap,
            interpret=jax.default_backend() != "tpu",
        )
    if kernel == "cudnn":
        return cudnn_attention(q, k, v, mask, scale=shape.scale)
    is_long = q.shape[1] > 2 * QUERY_TILE  # Shorter rows have too little to skip.
    attention = segment_attention if is_long and is_single_cpu() else causal_attention
    return attention(q, k, v, mask, scale=shape.scale, soft_cap=shape.soft_cap, window=shape.window)


def _compute_attention(
    attention: Any, q: Any, k: Any, v: Any, attention_mask: Any, training: bool = False, cache_update_index: Any = 0
) -> Any:
    kernel, length = attention._attention_kernel, q.shape[1]
    is_training_row = length == k.shape[1] and attention_mask is not None and attention_mask.ndim == 3
    if kernel == "keras" or not is_training_row or not (isinstance(cache_update_index, int) and not cache_update_index):
        return attention._keras_attention(
            q, k, v, attention_mask, training=training, cache_update_index=cache_update_index
        )
    shape = attention_shape_of(attention)
    if attention_mask.shape[2] == 1 < length:
        return _run_kernel_on_mesh(attention, "splash", q, k, v, attention_mask, shape)
    if trees := current_prefix_trees():  # Windows are cut by positions, of which a kernel knows nothing.
        if shape.window:
            attention_mask = attention_mask & prefix_tree_window(trees, shape.window)
        shape = shape._replace(window=None)
    elif attention.use_sliding_window_attention and _cuts_mask_itself(attention):
        attention_mask = attention._mask_sliding_window(attention_mask, cache_update_index=0)
    mask = jnp.broadcast_to(attention_mask.astype(bool), (q.shape[0], length, length))
    # A row of a length that the model wasn't prepared for, such as a prompt, needs the kernel that takes any length.
    kernel = "cudnn" if kernel == "cudnn" and length % FUSED_TILE == 0 else "xla"
    return _run_kernel_on_mesh(attention, kernel, q, k, v, mask, shape)


def _run_kernel_on_mesh(attention: Any, kernel: str, q: Any, k: Any, v: Any, mask: Any, shape: AttentionShape) -> Any:
    """Runs an attention kernel; on a mesh, one that isn't XLA's own runs on each device's part."""
    sharding = getattr(attention, "_mesh_sharding", None)
    if sharding is None or kernel == "xla":
        return run_kernel(kernel, q, k, v, mask, shape)
    return shard_map_attention(sharding, lambda q, k, v, mask: run_kernel(kernel, q, k, v, mask, shape), q, k, v, mask)


def _cuts_mask_itself(attention: Any) -> bool:
    """Returns whether an attention layer cuts its mask to the window itself. Gemma 4's blocks do it for theirs."""
    return hasattr(attention, "query_head_dim_normalize")


def _scale(attention: Any) -> float:
    """Returns the factor of the scores. Gemma 4 has none: it normalizes its queries and keys instead."""
    if not hasattr(attention, "query_head_dim_normalize"):
        return 1.0
    if attention.query_head_dim_normalize:
        return attention.head_dim**-0.5
    return (attention.hidden_dim // attention.num_query_heads) ** -0.5
