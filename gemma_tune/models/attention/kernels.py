"""Attention of packed rows, in three ways that come to the same.

`causal_attention` is plain products and runs everywhere. `cudnn_attention` (NVIDIA GPUs) and `splash_attention` (TPUs)
are flash attention (arXiv:2205.14135): scores stay on the chip, so that memory grows with T and not with T·T. Which
one a model trains with is decided in `attention_choice`.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from gemma_tune.models.lm_head import apply_soft_cap

_QUERY_TILE = 128  # Positions, at least. Smaller blocks skip more, and make products too small to be fast.
_NUM_BLOCKS = 4  # At most: beyond that, programs get long for little.
FUSED_TILE = 128  # The fused kernels take rows that are a multiple of this.
_SPLASH_TILES = (512, 256, FUSED_TILE)  # The largest that divides a row: fewer steps, all within a TPU's fast memory.


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

    The half of the scores that a causal mask throws away is never computed: queries are taken a block at a time, each
    against the keys up to its own last position, and from the first that its window reaches, in a layout that needs no
    transposition when all query heads share one key/value head.

    Args:
        q: [B, T, N, H]; every N / K query heads share a key/value head.
        k: [B, T, K, H].
        v: [B, T, K, H].
        mask: [B, T, T], true where a query (second axis) may look; nothing above the diagonal is read.
        scale: Of the scores.
        soft_cap: c of c·tanh(score / c) (Gemma 2, arXiv:2408.00118), or None.
        window: Positions that a query sees at most, its own included, as the mask has it too; None: all before it.

    Returns:
        [B, T, N, H] in v's dtype. The softmax is float32. Rows whose mask is all false are meaningless.
    """
    num_rows, length, num_heads, width = q.shape
    num_kv_heads = k.shape[2]
    q = (q * scale).reshape(num_rows, length, num_kv_heads, num_heads // num_kv_heads, width)
    blocks, size = [], max(_QUERY_TILE, -(-length // _NUM_BLOCKS))
    for start in range(0, length, size):
        stop = min(start + size, length)
        first = max(0, start - window + 1) if window else 0
        part = (q[:, start:stop], k[:, first:stop], v[:, first:stop], mask[:, start:stop, first:stop])
        blocks.append(masked_attention(*part, soft_cap))
    return jnp.concatenate(blocks, axis=1).reshape(num_rows, length, num_heads, width)


def masked_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, soft_cap: float | None = None
) -> jax.Array:
    """Returns softmax(cap(q·kᵀ))·v where the mask allows it, with all scores at once.

    Args:
        q: [B, T, K, G, H], scaled: G query heads for each key/value head.
        k, v: [B, S, K, H].
        mask: [B, T, S].
        soft_cap: As in `causal_attention`.

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
    """Like `causal_attention`, by cuDNN's flash attention. There is no soft cap.

    A sliding window belongs into the mask: cuDNN before 9.10.2 refuses a window of its own beside a mask.

    Args:
        q: [B, T, N, H] float16 or bfloat16.
        k, v: [B, T, K, H], of the same dtype.
        mask: [B, T, T] bool.
        scale: Of the scores.
        implementation: `xla` computes the same call without cuDNN, so that it can be tested anywhere.

    Returns:
        [B, T, N, H]. Rows whose mask is all false are meaningless.
    """
    # A row that may look nowhere has no finite sum of exponentials to divide by in the backward pass.
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
    """Causal attention within segments, by JAX's Pallas kernel for TPU. No mask is ever held.

    Blocks of scores above the diagonal and beyond the window are skipped.

    Args:
        q: [B, T, N, H]; T is a multiple of 128.
        k, v: [B, T, K, H].
        segment_ids: [B, T] int32. A query sees keys of its own segment; padding sees padding.
        scale: Of the scores.
        window: A query sees so many positions, its own included; None: all before it.
        soft_cap: As in `causal_attention`.
        interpret: Runs the kernel's program without a TPU, slowly.

    Returns:
        [B, T, N, H] in q's dtype.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # Costs a second, and only TPUs need it.

    length, num_heads = q.shape[1:3]
    # Positions before and after a query that it sees.
    head_mask = splash.LocalMask((length, length), (None if window is None else window - 1, 0), 0)
    block = next(size for size in _SPLASH_TILES if length % size == 0)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([head_mask] * num_heads),
        block_sizes=splash.BlockSizes(
            block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
        ),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=soft_cap,
        interpret=interpret,
    )
    heads_first = [jnp.swapaxes(array, 1, 2) for array in (q * scale, k, v)]
    attended = jax.vmap(kernel)(*heads_first, segment_ids=splash.SegmentIds(segment_ids, segment_ids))
    return jnp.swapaxes(attended, 1, 2)
