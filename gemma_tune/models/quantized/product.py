"""Products with kernels that are held in few bits.

The kernel is dequantized where it is multiplied and dropped again, in the forward and in the backward pass: at most one
layer's floats exist at a time, and of an LM head those of one tile of the vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from gemma_tune.models.einsum import parse_einsum
from gemma_tune.models.linear import einsum_product
from gemma_tune.models.lm_head import slice_lm_head_rows
from gemma_tune.quantization.codes import Quantized, dequantize
from gemma_tune.quantization.smoothquant import dynamic_product, quantize_activations

# Rows of an embedding that are float at a time. Double quantization needs a multiple of 256.
VOCABULARY_TILE = 4096


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def quantized_product(
    equation: str, shape: tuple[int, ...], rounds_inputs: bool, x: jax.Array, kernel: Quantized
) -> jax.Array:
    """Returns einsum(equation, x, dequantized kernel). Only x has a gradient, and only the codes are kept for it.

    Args:
        equation: Einsum equation of the layer.
        shape: Shape of the float kernel.
        rounds_inputs: Whether x is rounded to int8 first, with a scale for each token. The gradient passes straight
            through the rounding.
        x: Inputs, [B, L, …].
        kernel: Quantized kernel.
    """
    if rounds_inputs:
        return _rounded_product(equation, shape, x, kernel)
    return einsum_product(equation, x, dequantize(kernel, x.dtype).reshape(shape))


def _product_forward(
    equation: str, shape: tuple[int, ...], rounds_inputs: bool, x: jax.Array, kernel: Quantized
) -> tuple[jax.Array, Quantized]:
    return quantized_product(equation, shape, rounds_inputs, x, kernel), kernel


def _product_backward(
    equation: str, shape: tuple[int, ...], rounds_inputs: bool, kernel: Quantized, gradient: jax.Array
) -> tuple[jax.Array, None]:
    axes = parse_einsum(equation)
    sizes = dict(zip(axes.kernel + axes.outputs, (*shape, *gradient.shape), strict=True))
    # The product is linear in x, so that its gradient is the same at any x.
    any_x = jnp.zeros(tuple(sizes[letter] for letter in axes.inputs), gradient.dtype)
    floats = dequantize(kernel, gradient.dtype).reshape(shape)
    _, pullback = jax.vjp(lambda x: einsum_product(equation, x, floats), any_x)
    return *pullback(gradient), None


quantized_product.defvjp(_product_forward, _product_backward)


def _rounded_product(equation: str, shape: tuple[int, ...], x: jax.Array, kernel: Quantized) -> jax.Array:
    """Multiplies inputs that are rounded to int8 with the kernel.

    GPUs and TPUs multiply the integers. XLA on CPU is slow at that, and gets the same numbers as floats.
    """
    axes = parse_einsum(equation)
    outer = x.shape[: x.ndim - len(axes.summed)]
    flat = x.reshape(*outer, -1).astype(jnp.float32)
    if kernel.input_scale is not None:
        flat *= kernel.input_scale[0, :, 0]
        kernel = kernel._replace(input_scale=None)
    if jax.default_backend() != "cpu":
        sizes = [shape[index] for index in axes.kept_indices]
        return dynamic_product(flat, kernel).reshape(*outer, *sizes).astype(x.dtype)
    codes, step = quantize_activations(flat)
    rounded = (codes * step).reshape(x.shape).astype(x.dtype)
    return einsum_product(equation, rounded, dequantize(kernel, x.dtype).reshape(shape))


def quantized_logits(x: jax.Array, head: Quantized) -> jax.Array:
    """Returns the logits of hidden states, [..., V] in x's dtype, with one tile of the vocabulary in float at a time.

    Args:
        x: [..., D] hidden states.
        head: Quantized LM head, [V, D, 1].
    """
    vocabulary = head.codes.shape[0]

    def tile_logits(start: Any, count: int) -> jax.Array:
        return x @ slice_lm_head_rows(head, start, count, x.dtype).T

    num_whole = vocabulary // VOCABULARY_TILE
    parts = []
    if num_whole:
        starts = VOCABULARY_TILE * jnp.arange(num_whole)
        tiles = jax.lax.map(lambda start: tile_logits(start, VOCABULARY_TILE), starts)
        parts.append(jnp.moveaxis(tiles, 0, -2).reshape(*x.shape[:-1], -1))
    if vocabulary % VOCABULARY_TILE:
        parts.append(tile_logits(num_whole * VOCABULARY_TILE, vocabulary % VOCABULARY_TILE))
    return jnp.concatenate(parts, axis=-1)
