"""Attention kernels for packed rows. All of them compute the same.

`causal_attention` consists of plain products, and runs on every device. `cudnn_attention` (NVIDIA GPUs) and
`splash_attention` (TPUs) are flash attention (arXiv:2205.14135): scores stay on the chip, so that memory grows with T
and not with T·T. `choice.py` decides which one a model trains with.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from gemma_tune.models.lm_head import apply_soft_cap

_MIN_QUERY_TILE = 128  # Smaller tiles skip more scores, but their products are too small to be fast.
_MAX_NUM_TILES = 4  # More tiles make the program longer and gain little.
FUSED_TILE = 128  # The fused kernels take rows whose length is a multiple of this.
_SPLASH_TILES = (512, 256, FUSED_TILE)  # The largest that divides a row is used: all fit into a TPU's fast memory.


def causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    *,
    scale: float,
    soft_cap: float | None = None,
    window: int | None = None,
) -> jax.Array:
    """Returns softmax(cap(q·kᵀ·scale))·v, where no query sees a later position.

    Most of the scores that a causal mask would hide are never computed. Queries are taken one tile at a time, with the
    keys from the first that the tile's window reaches up to its own end. The order of axes needs no transposition when
    all query heads share one key/value head.

    Args:
        q: [B, T, N, H] queries; every N / K query heads share a key/value head.
        k: [B, T, K, H] keys.
        v: [B, T, K, H] values.
        mask: [B, T, T] bool, true where a query (second axis) sees a key; nothing above the diagonal is read.
        scale: Factor of the scores.
        soft_cap: Soft cap of the scores (`apply_soft_cap`), or None.
        window: Number of positions that a query sees, its own included, or None for all before it. The mask is cut to
            the window already.

    Returns:
        [B, T, N, H] in v's dtype. The softmax is float32. Rows whose mask is all false are meaningless.
    """
    num_rows, length, num_heads, width = q.shape
    num_kv_heads = k.shape[2]
    q = (q * scale).reshape(num_rows, length, num_kv_heads, num_heads // num_kv_heads, width)
    tiles, tile = [], max(_MIN_QUERY_TILE, -(-length // _MAX_NUM_TILES))
    for start in range(0, length, tile):
        stop = min(start + tile, length)
        first = max(0, start - window + 1) if window else 0
        part = (q[:, start:stop], k[:, first:stop], v[:, first:stop], mask[:, start:stop, first:stop])
        tiles.append(masked_attention(*part, soft_cap))
    return jnp.concatenate(tiles, axis=1).reshape(num_rows, length, num_heads, width)


def masked_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, soft_cap: float | None = None
) -> jax.Array:
    """Returns softmax(cap(q·kᵀ))·v over the keys that the mask allows, computing all scores at once.

    Args:
        q: [B, T, K, G, H] queries, scaled, with G query heads for each key/value head.
        k, v: [B, S, K, H] keys and values.
        mask: [B, T, S] bool, true where a query sees a key.
        soft_cap: Soft cap of the scores, or None.

    Returns:
        [B, T, K, G, H] in v's dtype.
    """
    scores = jnp.einsum("btkgh,bskh->bktgs", q, k, preferred_element_type=jnp.float32)
    scores = apply_soft_cap(scores, soft_cap)
    probabilities = jax.nn.softmax(jnp.where(mask[:, None, :, None], scores, -1e30), axis=-1)
    return jnp.einsum("bktgs,bskh->btkgh", probabilities.astype(v.dtype), v)


def cudnn_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    *,
    scale: float,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """Computes what `causal_attention` does by cuDNN's flash attention, which has no soft cap.

    A sliding window must be part of the mask: cuDNN before 9.10.2 refuses a window of its own beside a mask.

    Args:
        q: [B, T, N, H] queries, float16 or bfloat16.
        k, v: [B, T, K, H] keys and values of the same dtype.
        mask: [B, T, T] bool, true where a query sees a key.
        scale: Factor of the scores.
        implementation: `cudnn`, or `xla` to compute the same call without cuDNN, for tests.

    Returns:
        [B, T, N, H]. Rows whose mask is all false are meaningless.
    """
    # Each query sees itself: without any key, the backward pass would divide by a sum of exponentials that is 0.
    mask = mask | jnp.eye(q.shape[1], dtype=bool)
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask[:, None], scale=scale, is_causal=True, implementation=implementation
    )


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Computes causal attention within segments by JAX's Pallas kernel for TPU, without making a mask.

    Tiles of scores above the diagonal or beyond the window are skipped.

    Args:
        q: [B, T, N, H] queries; T is a multiple of 128.
        k, v: [B, T, K, H] keys and values.
        segment_ids: [B, T] int32. A query sees keys of its own segment; padding sees padding.
        scale: Factor of the scores.
        window: Number of positions that a query sees, its own included, or None for all before it.
        soft_cap: Soft cap of the scores, or None.
        interpret: Whether to interpret the kernel, slowly, on a device that is no TPU.

    Returns:
        [B, T, N, H] in q's dtype.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # Costs a second, and only TPUs need it.

    length, num_heads = q.shape[1:3]
    # (Positions before a query, positions after it) that it sees.
    head_mask = splash.LocalMask((length, length), (None if window is None else window - 1, 0), 0)
    tile = next(size for size in _SPLASH_TILES if length % size == 0)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([head_mask] * num_heads),
        block_sizes=splash.BlockSizes(
            block_q=tile, block_kv=tile, block_q_dkv=tile, block_kv_dkv=tile, block_q_dq=tile, block_kv_dq=tile
        ),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=soft_cap,
        interpret=interpret,
    )
    heads_first = [jnp.swapaxes(array, 1, 2) for array in (q * scale, k, v)]
    attended = jax.vmap(kernel)(*heads_first, segment_ids=splash.SegmentIds(segment_ids, segment_ids))
    return jnp.swapaxes(attended, 1, 2)
