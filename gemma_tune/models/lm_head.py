"""The rows of a head, of whatever kind: floats, codes, or floats that count as rounded."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gemma_tune.models.cpu.bfloat16 import cpu_slice_rows
from gemma_tune.quantization.codes import Quantized, Scales, dequantize, rows_of, scale_values, take_rows
from gemma_tune.quantization.fake import FakeQuantized

LMHead = jax.Array | Quantized | FakeQuantized  # Of V rows.


def num_rows(head: LMHead) -> int:
    """Returns V."""
    return jax.tree.leaves(head)[0].shape[0]


def slice_lm_head_rows(head: LMHead, start: Any, count: int, dtype: Any) -> jax.Array:
    """Returns [count, D] rows in the given dtype; start may be known at run time only. Not to be
    differentiated."""
    if isinstance(head, Quantized):
        return dequantize(rows_of(head, start, count), dtype)[..., 0]
    if isinstance(head, FakeQuantized):
        return head.rows(start, count).astype(dtype)
    return cpu_slice_rows(head, start, count).astype(dtype)


def gather_lm_head_rows(head: LMHead, indices: jax.Array) -> jax.Array:
    """Returns [n, D] rows by their indices [n]."""
    if isinstance(head, Quantized):
        return take_rows(head, indices)[..., 0]
    return head.take(indices) if isinstance(head, FakeQuantized) else head[indices]


def over_vocabulary_tiles(num_rows: int, block: int, carry: Any, visit: Callable[[Any, Any, int], Any]) -> Any:
    """Runs carry = visit(carry, first row's index, number of rows) over all blocks; the last may be shorter."""
    num_whole = num_rows // block
    if num_whole:
        carry = lax.fori_loop(0, num_whole, lambda index, carry: visit(carry, index * block, block), carry)
    if num_rows % block:
        carry = visit(carry, num_whole * block, num_rows % block)
    return carry


def with_dequantized_scales(head: LMHead) -> LMHead:
    """Takes scales that are quantized themselves apart: 256 of them belong together, wherever the head is cut."""
    if isinstance(head, Quantized) and head.scales.step is not None:
        return head._replace(scales=Scales(scale_values(jnp, head.scales)))
    return head
