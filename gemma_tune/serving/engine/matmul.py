"""Products of a few tokens with weights that are read from memory for each of them, in the forms that XLA on CPU does
fast.

A decoding step multiplies one token of each row with every weight, so that its time is that of reading them. Measured
on one core with a [65,536, 640] matrix, in GB/s of weights:

- one row: `x @ W.T` 27 in float32; with int8 weights the conversion is fused into the product, 20, but only with
  outputs as the first axis: the other way round it is 0.5. XLA computes it with one core, so the matrix is cut into
  parts.
- XLA also fuses what makes x into it, and then makes x anew for each few outputs: a feed-forward layer took three times
  as long. `materialized` keeps it from that.
- two to sixteen rows, float32: `W @ x.T` 19 to 25, `x @ W.T` 6 to 9. int8: blocks of up to 1,024 rows of W are made
  floats, which stay in the processor's cache, 6 to 9; all at once 0.8.
- bfloat16, where the processor multiplies it: one row `x @ W.T` 25; more rows `x @ W.T` with a float32 result 12. The
  other way round, each with the other's result, 1.3.

So weights are held [outputs, inputs] here. Other devices choose layouts by themselves.
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
from gemma_tune.models.quantized.fake_quant_layers import FakeQuantEinsumDense
from gemma_tune.models.quantized.layers import QuantizedEinsumDense, QuantizedEmbedding
from gemma_tune.runtime.backend import is_single_cpu, keras

_MOST_ROWS = 1024
_NUM_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class MatmulWeights(NamedTuple):
    """Weights of a product.

    values: [outputs, inputs], float or int8. scales: [outputs] float32 with int8, else None.
    """

    values: Any
    scales: Any = None


def matmul(x: jax.Array, matrix: MatmulWeights, one: jax.Array) -> jax.Array:
    """Returns x [M, inputs] times the matrix: [M, outputs], in x's dtype.

    Args:
        x: Inputs.
        matrix: Weights.
        one: int32 1, which the compiler must not know.
    """
    values, scales = matrix
    if x.shape[0] == 1:
        outputs = _by_parts(materialized(x, one), values)
    elif values.dtype == jnp.int8:
        outputs = _by_blocks(x, values)
    elif x.dtype == values.dtype == jnp.bfloat16 and multiplies_bfloat16():
        by_inputs = (((1,), (1,)), ((), ()))
        outputs = lax.dot_general(x, values, by_inputs, preferred_element_type=jnp.float32).astype(x.dtype)
    else:
        # Without the barrier XLA turns it into x @ values.T.
        outputs = lax.optimization_barrier(values.astype(x.dtype) @ x.T).T
    return outputs if scales is None else (outputs * scales).astype(x.dtype)


def lm_head_logits(embedding: Any, head: MatmulWeights | None, hidden: jax.Array, one: jax.Array) -> jax.Array:
    """Returns [B, V] float32.

    Args:
        embedding: The model's, tied.
        head: From `lm_head_matmul_weights`.
        hidden: [B, D] final hidden states.
        one: As for `matmul`.
    """
    if head is None:
        return embedding(hidden[:, None], reverse=True)[:, 0].astype(jnp.float32)
    logits = matmul(hidden.astype(embedding.reverse_dtype or embedding.compute_dtype), head, one)
    return apply_soft_cap(logits, embedding.logit_soft_cap).astype(jnp.float32)


def opaque_one(integers: jax.Array) -> jax.Array:
    """Returns int32 1 in a way that the compiler can't see, given [B] integers that are at least 0."""
    return (integers[0] >= 0).astype(jnp.int32)


def materialized(x: jax.Array, one: jax.Array) -> jax.Array:
    """Returns x, computed before it is used: XLA fuses nothing over the borders of a loop, once around though it is."""
    return lax.fori_loop(0, one, lambda _, zeros: zeros + x, jnp.zeros_like(x))


def _by_parts(x: jax.Array, values: jax.Array) -> jax.Array:
    num_parts = _NUM_CORES if values.shape[0] % _NUM_CORES == 0 else 1
    size = values.shape[0] // num_parts
    parts = [lax.slice_in_dim(values, index * size, (index + 1) * size) for index in range(num_parts)]
    return jnp.concatenate(lax.optimization_barrier([x @ part.astype(x.dtype).T for part in parts]), axis=1)


def _by_blocks(x: jax.Array, codes: jax.Array) -> jax.Array:
    block, transposed = _block_size(codes.shape[0]), x.T

    def of_block(index: Any) -> jax.Array:
        return lax.dynamic_slice_in_dim(codes, index * block, block).astype(x.dtype) @ transposed

    outputs = lax.map(of_block, jnp.arange(codes.shape[0] // block))
    return lax.optimization_barrier(outputs.reshape(codes.shape[0], -1)).T


@functools.cache
def _block_size(num_rows: int) -> int:
    """Returns the largest divisor that makes two blocks at least: of a single one XLA makes no loop."""
    return next(size for size in range(min(_MOST_ROWS, max(num_rows // 2, 1)), 0, -1) if num_rows % size == 0)


def kernel_matmul_weights(layer: Any, kernel: Any) -> MatmulWeights | None:
    """Returns a layer's kernel as it is multiplied with here, or None where the layer's own product is as good.

    Args:
        layer: An EinsumDense of a Gemma.
        kernel: Its floats; not read where they are quantized.
    """
    if not is_single_cpu() or not _is_known(layer.equation):
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
    """Returns the tied embedding as the matrix that makes logits, without a copy; None: its own product is as good."""
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
    """Returns what a layer with this equation and kernel returns for x [B, L, …], without bias and activation."""
    sizes = [kernel_shape[index] for index in parse_einsum(equation).kept_indices]
    return matmul(x.reshape(-1, matrix.values.shape[1]), matrix, one).reshape(*x.shape[:2], *sizes)


def _is_known(equation: str) -> bool:
    """Whether the kernel's inputs are the last of x, in their order, and its outputs the last of the result."""
    axes = parse_einsum(equation)
    rows = axes.inputs[:2]
    return axes.inputs == rows + axes.summed and axes.outputs == rows + axes.kept


def is_fake_quantized(layer: Any) -> bool:
    """Whether LoRA is part of what is rounded, so that the given kernel has it inside."""
    return isinstance(layer, FakeQuantEinsumDense)
