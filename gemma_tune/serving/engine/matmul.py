"""Matrix products of a few tokens with weights that are read from memory for each of them, in forms that XLA on CPU
compiles to fast code.

A decode step multiplies one token of each row with every weight, so its time is that of reading the weights. Measured
on one core with a [65,536, 640] matrix, in GB/s of weights:

- One row: `x @ W.T` 27 in float32. With int8 weights the conversion is fused into the product, 20, but only with
  outputs as the first axis: the other way round it is 0.5. XLA computes it on one core, so the matrix is cut into
  parts.
- XLA also fuses the computation of x into the product, and then repeats it for each few outputs: a feed-forward layer
  took three times as long. `materialized` keeps it from that.
- Two to sixteen rows, float32: `W @ x.T` 19 to 25, `x @ W.T` 6 to 9. int8: tiles of up to 1,024 rows of W are
  converted to floats, which stay in the processor's cache, 6 to 9; all of W at once 0.8.
- bfloat16, where the processor multiplies it: one row `x @ W.T` 25; more rows `x @ W.T` with a float32 result 12. With
  the result types exchanged, 1.3.

So the weights are held as [outputs, inputs] here. XLA chooses memory orders by itself on other devices.
"""

import functools
import math
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gemma_tune.models.cpu.bfloat16 import multiplies_bfloat16
from gemma_tune.models.einsum import parse_einsum
from gemma_tune.models.lm_head import apply_soft_cap
from gemma_tune.models.quantized.layers import QuantizedEinsumDense, QuantizedEmbedding
from gemma_tune.runtime.backend import is_single_cpu, keras

_MAX_TILE_ROWS = 1024
_NUM_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class MatmulWeights(NamedTuple):
    """The weights of a matrix product.

    Attributes:
        values: [outputs, inputs], float or int8.
        scales: [outputs] float32 if the values are int8, else None.
    """

    values: Any
    scales: Any = None


def matmul(x: jax.Array, matrix: MatmulWeights, one: jax.Array) -> jax.Array:
    """Returns the product [M, outputs] of inputs and a matrix, in the inputs' dtype.

    Args:
        x: [M, inputs] array.
        matrix: Weights.
        one: int32 1 that the compiler doesn't know, from `opaque_one`.
    """
    values, scales = matrix
    if x.shape[0] == 1:
        outputs = _by_parts(materialized(x, one), values)
    elif values.dtype == jnp.int8:
        outputs = _by_tiles(x, values)
    elif x.dtype == values.dtype == jnp.bfloat16 and multiplies_bfloat16():
        by_inputs = (((1,), (1,)), ((), ()))
        outputs = lax.dot_general(x, values, by_inputs, preferred_element_type=jnp.float32).astype(x.dtype)
    else:
        # Without the barrier XLA rewrites it as x @ values.T.
        outputs = lax.optimization_barrier(values.astype(x.dtype) @ x.T).T
    return outputs if scales is None else (outputs * scales).astype(x.dtype)


def lm_head_logits(embedding: Any, matrix: MatmulWeights | None, hidden: jax.Array, one: jax.Array) -> jax.Array:
    """Returns the logits [B, V] in float32.

    Args:
        embedding: The model's tied embedding.
        matrix: The embedding from `lm_head_matmul_weights`; None: its own product is used.
        hidden: [B, D] final hidden states.
        one: int32 1 that the compiler doesn't know, as for `matmul`.
    """
    if matrix is None:
        return embedding(hidden[:, None], reverse=True)[:, 0].astype(jnp.float32)
    logits = matmul(hidden.astype(embedding.reverse_dtype or embedding.compute_dtype), matrix, one)
    return apply_soft_cap(logits, embedding.logit_soft_cap).astype(jnp.float32)


def opaque_one(integers: jax.Array) -> jax.Array:
    """Returns an int32 1 that the compiler doesn't know, given [B] integers that are at least 0."""
    return (integers[0] >= 0).astype(jnp.int32)


def materialized(x: jax.Array, one: jax.Array) -> jax.Array:
    """Returns x, computed before it is used: XLA fuses nothing across a loop, even one with a single iteration."""
    return lax.fori_loop(0, one, lambda _, zeros: zeros + x, jnp.zeros_like(x))


def _by_parts(x: jax.Array, values: jax.Array) -> jax.Array:
    """Returns the product of one row, with the matrix cut into a part for each core."""
    num_parts = _NUM_CORES if values.shape[0] % _NUM_CORES == 0 else 1
    size = values.shape[0] // num_parts
    parts = [lax.slice_in_dim(values, index * size, (index + 1) * size) for index in range(num_parts)]
    return jnp.concatenate(lax.optimization_barrier([x @ part.astype(x.dtype).T for part in parts]), axis=1)


def _by_tiles(x: jax.Array, codes: jax.Array) -> jax.Array:
    """Returns the product of several rows with int8 weights, which are converted to floats a tile at a time."""
    tile_rows, transposed = _tile_rows(codes.shape[0]), x.T

    def one_tile(index: Any) -> jax.Array:
        return lax.dynamic_slice_in_dim(codes, index * tile_rows, tile_rows).astype(x.dtype) @ transposed

    outputs = lax.map(one_tile, jnp.arange(codes.shape[0] // tile_rows))
    return lax.optimization_barrier(outputs.reshape(codes.shape[0], -1)).T


@functools.cache
def _tile_rows(num_rows: int) -> int:
    """Returns the largest divisor that gives at least two tiles: a loop over a single one would be removed by XLA."""
    return next(size for size in range(min(_MAX_TILE_ROWS, max(num_rows // 2, 1)), 0, -1) if num_rows % size == 0)


def kernel_matmul_weights(layer: Any, kernel: Any) -> MatmulWeights | None:
    """Returns a layer's kernel as the weights of a `matmul`, or None where the layer's own product is as fast.

    Args:
        layer: An EinsumDense of a Gemma model.
        kernel: Its float kernel; not read if the layer is quantized.
    """
    if not is_single_cpu() or not _is_plain_matmul(layer.equation):
        return None
    if isinstance(layer, QuantizedEinsumDense):
        quantized = layer.quantized()
        plain = quantized.codes.dtype == jnp.int8 and quantized.input_scale is None and not layer.scheme.rounds_inputs
        if not plain:
            return None
        codes = jnp.swapaxes(quantized.codes, 1, 2)  # [P, Q, C]: outputs before inputs.
        scales = jnp.broadcast_to(quantized.scales.values[:, 0, 0], codes.shape[:2])
        return MatmulWeights(codes.reshape(-1, codes.shape[2]), scales.reshape(-1))
    if type(layer).call is not keras.layers.EinsumDense.call and layer.quantization_mode is not None:
        return None
    axes = parse_einsum(layer.equation)
    num_inputs = math.prod(kernel.shape[index] for index in axes.summed_indices)
    return MatmulWeights(jnp.transpose(kernel, axes.kept_indices + axes.summed_indices).reshape(-1, num_inputs))


def lm_head_matmul_weights(embedding: Any, rows: Any) -> MatmulWeights | None:
    """Returns the tied embedding as the weights of a `matmul`, without a copy; None: its own product is as fast."""
    if not is_single_cpu() or getattr(embedding, "lora_enabled", False):
        return None
    if isinstance(embedding, QuantizedEmbedding):
        quantized = embedding.quantized()
        if quantized.codes.dtype != jnp.int8:
            return None
        return MatmulWeights(quantized.codes.reshape(quantized.codes.shape[:2]), quantized.scales.values.reshape(-1))
    return MatmulWeights(rows) if embedding.quantization_mode is None else None


def einsum_matmul(
    equation: str, kernel_shape: tuple[int, ...], x: jax.Array, matrix: MatmulWeights, one: jax.Array
) -> jax.Array:
    """Returns the output of an EinsumDense layer for x [B, L, …], before bias and activation."""
    sizes = [kernel_shape[index] for index in parse_einsum(equation).kept_indices]
    return matmul(x.reshape(-1, matrix.values.shape[1]), matrix, one).reshape(*x.shape[:2], *sizes)


def _is_plain_matmul(equation: str) -> bool:
    """Whether the summed axes are the last of x, in the kernel's order, and the kept ones the last of the result."""
    axes = parse_einsum(equation)
    rows = axes.inputs[:2]
    return axes.inputs == rows + axes.summed and axes.outputs == rows + axes.kept
