"""Reads rows of an LM head: the [V, D] matrix that turns hidden states into logits, and embeds tokens.

The head is held as floats, in few bits, or as floats that count as rounded (quantization-aware training). What follows
takes all three, so that a loss or an embedding lookup needn't know which it is.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gemma_tune.models.cpu.bfloat16 import cpu_slice_rows
from gemma_tune.quantization.codes import Quantized, dequantize, slice_rows, take_rows
from gemma_tune.quantization.fake import FakeQuantized
from gemma_tune.quantization.scales import Scales, scale_values

LMHead = jax.Array | Quantized | FakeQuantized  # V rows of width D.


def num_rows(head: LMHead) -> int:
    """Returns the number of rows of a head: V, or a device's part of it."""
    return jax.tree.leaves(head)[0].shape[0]


def slice_lm_head_rows(head: LMHead, start: Any, count: int, dtype: Any) -> jax.Array:
    """Returns consecutive rows of a head as floats. They can't be differentiated.

    Args:
        head: LM head.
        start: Index of the first row; may be a traced value.
        count: Number of rows.
        dtype: Dtype of the result.

    Returns:
        [count, D] rows.
    """
    if isinstance(head, Quantized):
        return dequantize(slice_rows(head, start, count), dtype)[..., 0]
    if isinstance(head, FakeQuantized):
        return head.rows(start, count).astype(dtype)
    return cpu_slice_rows(head, start, count).astype(dtype)


def gather_lm_head_rows(head: LMHead, indices: jax.Array) -> jax.Array:
    """Returns the rows of a head with the given indices, [n, D] for indices [n]."""
    if isinstance(head, Quantized):
        return take_rows(head, indices)[..., 0]
    return head.take(indices) if isinstance(head, FakeQuantized) else head[indices]


def over_vocabulary_tiles(num_rows: int, tile: int, carry: Any, visit: Callable[[Any, Any, int], Any]) -> Any:
    """Runs a function on one tile of a head's rows after the other.

    Args:
        num_rows: Number of rows of the head.
        tile: Number of rows in a tile; the last tile may have fewer.
        carry: First value of the carry, a tree of arrays.
        visit: (carry, index of the tile's first row, number of rows) -> next carry.

    Returns:
        The last carry.
    """
    num_whole = num_rows // tile
    if num_whole:
        carry = lax.fori_loop(0, num_whole, lambda index, carry: visit(carry, index * tile, tile), carry)
    if num_rows % tile:
        carry = visit(carry, num_whole * tile, num_rows % tile)
    return carry


def with_dequantized_scales(head: LMHead) -> LMHead:
    """Returns the head with float scales in place of doubly quantized ones.

    256 scales share a scale of their own, and those don't line up with the parts that a mesh cuts the head into.
    """
    if isinstance(head, Quantized) and head.scales.step is not None:
        return head._replace(scales=Scales(scale_values(jnp, head.scales)))
    return head


def apply_soft_cap(values: jax.Array, cap: float | None) -> jax.Array:
    """Returns c·tanh(x / c) of logits or attention scores x (Gemma 2, arXiv:2408.00118); without a cap c, x itself."""
    return cap * jnp.tanh(values / cap) if cap else values
