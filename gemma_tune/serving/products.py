"""Products of a few tokens with weights that are read from memory for each of them, in the forms that XLA on CPU does
fast.

A decoding step multiplies one token of each row with every weight, so that its time is that of reading them. Measured
on two cores with a [65,536, 640] matrix, in GB/s of weights:

- one row, float32: `x @ W.T` 25. int8: the same with the conversion inside, which XLA fuses into the product, 30; with
  the matrix the other way round it is not fused, 0.5.
- two to sixteen rows, float32: `W @ x.T` 19 to 25, `x @ W.T` 6 to 9. int8: blocks of 1,024 rows of W are made floats,
  which stay in the cache, 6 to 9; all at once 0.8.

So weights are held [outputs, inputs] here. Other devices choose layouts by themselves.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gemma_tune.keras_runtime import keras, on_one_cpu
from gemma_tune.models.qat import FakeQuantEinsumDense
from gemma_tune.models.quantized import QuantizedEinsumDense, QuantizedEmbedding

_BLOCK = 1024


class Matrix(NamedTuple):
    """Weights of a product.

    values: [outputs, inputs], float or int8. scales: [outputs] float32 with int8, else None.
    """

    values: Any
    scales: Any = None


def product(x: jax.Array, matrix: Matrix) -> jax.Array:
    """Returns x [M, inputs] times the matrix: [M, outputs], in x's dtype."""
    values, scales = matrix
    if x.shape[0] == 1:
        outputs = x @ values.astype(x.dtype).T
    elif values.dtype == jnp.int8:
        outputs = _by_blocks(x, values)
    else:
        outputs = (values.astype(x.dtype) @ x.T).T
    return outputs if scales is None else (outputs * scales).astype(x.dtype)


def _by_blocks(x: jax.Array, codes: jax.Array) -> jax.Array:
    num_blocks, transposed = codes.shape[0] // _BLOCK, x.T

    def of_block(index: Any) -> jax.Array:
        return lax.dynamic_slice_in_dim(codes, index * _BLOCK, _BLOCK).astype(x.dtype) @ transposed

    parts = []
    if num_blocks:
        parts.append(lax.map(of_block, jnp.arange(num_blocks)).reshape(num_blocks * _BLOCK, -1))
    if codes.shape[0] % _BLOCK:
        parts.append(codes[num_blocks * _BLOCK :].astype(x.dtype) @ transposed)
    return jnp.concatenate(parts).T


def matrix_of(layer: Any, kernel: Any) -> Matrix | None:
    """Returns a layer's kernel as it is multiplied with here, or None where the layer's own product is as good.

    Args:
        layer: An EinsumDense of a Gemma.
        kernel: Its floats; not read where they are quantized.
    """
    if not on_one_cpu() or not _is_known(layer.equation):
        return None
    if isinstance(layer, QuantizedEinsumDense):
        quantized = layer.quantized()
        plain = quantized.codes.dtype == jnp.int8 and quantized.input_scale is None and not layer.scheme.rounds_inputs
        if not plain:
            return None
        codes = jnp.swapaxes(quantized.codes, 1, 2)  # [P, Q, C]: outputs before inputs.
        scales = jnp.broadcast_to(quantized.scales.values[:, 0, 0], codes.shape[:2])
        return Matrix(codes.reshape(-1, codes.shape[2]), scales.reshape(-1))
    if type(layer).call is not keras.layers.EinsumDense.call and layer.quantization_mode is not None:
        return None
    _, axes, outputs = layer.equation.replace("->", ",").split(",")
    inner = [index for index, axis in enumerate(axes) if axis not in outputs]
    outer = [index for index, axis in enumerate(axes) if axis in outputs]
    num_inputs = math.prod(kernel.shape[index] for index in inner)
    return Matrix(jnp.transpose(kernel, (*outer, *inner)).reshape(-1, num_inputs))


def head_of(embedding: Any, rows: Any) -> Matrix | None:
    """Returns the tied embedding as the matrix that makes logits, without a copy; None: its own product is as good."""
    if not on_one_cpu() or getattr(embedding, "lora_enabled", False):
        return None
    if isinstance(embedding, QuantizedEmbedding):
        quantized = embedding.quantized()
        if quantized.codes.dtype != jnp.int8:
            return None
        return Matrix(quantized.codes.reshape(quantized.codes.shape[:2]), quantized.scales.values.reshape(-1))
    return Matrix(rows) if embedding.quantization_mode is None else None


def apply(equation: str, kernel_shape: tuple[int, ...], x: jax.Array, matrix: Matrix) -> jax.Array:
    """Returns what a layer with this equation and kernel returns for x [B, L, …], without bias and activation."""
    _, axes, outputs = equation.replace("->", ",").split(",")
    sizes = [size for size, axis in zip(kernel_shape, axes, strict=True) if axis in outputs]
    return product(x.reshape(-1, matrix.values.shape[1]), matrix).reshape(*x.shape[:2], *sizes)


def _is_known(equation: str) -> bool:
    """Whether the kernel's inputs are the last of x, in their order, and its outputs the last of the result."""
    inputs, axes, outputs = equation.replace("->", ",").split(",")
    inner = "".join(axis for axis in axes if axis not in outputs)
    outer = "".join(axis for axis in axes if axis in outputs)
    return inputs == inputs[:2] + inner and outputs == inputs[:2] + outer


def is_fake_quantized(layer: Any) -> bool:
    """Whether LoRA is part of what is rounded, so that the given kernel has it inside."""
    return isinstance(layer, FakeQuantEinsumDense)
