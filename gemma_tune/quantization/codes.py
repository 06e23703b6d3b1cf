"""Quantizes float weights to codes of eight or four bits (int8, int4 and NF4), and dequantizes them.

Weights are quantized along the axis that a product sums over: int8 with a scale for each output channel, int4 and NF4
with a scale for each group of `block_size` inputs. Arrays have the shape [P, C, Q], where products sum over C: a kernel
[D, F] is [1, D, F], a query kernel [N, D, H] is [N, D, H], an attention output kernel [N, H, D] is [1, N·H, D], and an
embedding [V, D] is [V, D, 1].

- int8: codes −127…127 of value / scale, where the scale is the largest magnitude / 127.
- int4: codes 0…15 of value / scale + zero point, which span the range of the group's values and 0.
- nf4: the nearest of 16 quantiles of a normal distribution, times the group's largest magnitude (QLoRA,
  arXiv:2305.14314, appendix E).

Two codes of four bits share a byte: the i-th of a group and the (i + block_size / 2)-th. Unpacked, they are two
contiguous halves of the group.
"""

import functools
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma_tune.quantization.scales import DOUBLE_QUANT_GROUP, Scales, make_scales, reciprocal, scale_values
from gemma_tune.quantization.spec import QuantSpec

# Reciprocals, since XLA turns such divisions into products and NumPy doesn't (as in `reciprocal`).
_PART_OF_127, _PART_OF_15 = (np.float32(1 / parts) for parts in (127, 15))

# Ascending, with equal areas under the normal curve between them, an exact 0 and an exact ±1.
NF4_LEVELS = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
NF4_BOUNDARIES = (NF4_LEVELS[1:] + NF4_LEVELS[:-1]) / 2


class Quantized(NamedTuple):
    """A quantized array.

    Attributes:
        codes: [P, C, Q] int8, or for four bits [P, C / block_size, block_size / 2, Q] uint8 with two codes in each.
        scales: Scales, of shape [P, 1, 1, Q] for int8.
        zeros: [P, C / block_size, 1, Q] uint8 zero points of int4, the codes of 0; else None.
        input_scale: [1, C, 1] float32, by which the array was divided before rounding, and by which the inputs of a
            product are multiplied (AWQ, SmoothQuant); or None.
    """

    codes: Any
    scales: Scales
    zeros: Any = None
    input_scale: Any = None


def quantize(values: Any, quant_spec: QuantSpec) -> Quantized:
    """Quantizes an array, rounding to the nearest code.

    Args:
        values: [P, C, Q] float32. NumPy computes NumPy arrays, JAX those of JAX.
        quant_spec: Quantization spec, whose block size divides C.
    """
    xp: Any = _namespace(values)
    if quant_spec.scheme == "int8":
        scale = xp.max(xp.abs(values), axis=1, keepdims=True) * _PART_OF_127
        codes = xp.clip(xp.round(values * reciprocal(xp, scale)), -127, 127).astype(xp.int8)
        return Quantized(codes, Scales(scale[:, None]))
    first, inputs, last = values.shape
    grouped = values.reshape(first, inputs // quant_spec.block_size, quant_spec.block_size, last)
    if quant_spec.scheme == "nf4":
        scales = make_scales(xp, xp.max(xp.abs(grouped), axis=2, keepdims=True), quant_spec)
        relative = grouped * reciprocal(xp, scale_values(xp, scales))
        return Quantized(pack_codes(xp, _nearest_nf4(xp, relative)), scales)
    low = xp.minimum(xp.min(grouped, axis=2, keepdims=True), 0)
    high = xp.maximum(xp.max(grouped, axis=2, keepdims=True), 0)
    scales = make_scales(xp, (high - low) * _PART_OF_15, quant_spec)
    inverse = reciprocal(xp, scale_values(xp, scales))
    zeros = xp.clip(xp.round(-low * inverse), 0, 15)
    codes = xp.clip(xp.round(grouped * inverse) + zeros, 0, 15)
    return Quantized(pack_codes(xp, codes), scales, zeros.astype(xp.uint8))


def dequantize(quantized: Quantized, dtype: Any = np.float32) -> Any:
    """Returns the values [P, C, Q] of a quantized array in a float dtype, computed in float32."""
    xp: Any = _namespace(quantized.codes)
    if quantized.input_scale is not None:
        values = dequantize(quantized._replace(input_scale=None))
        return (values * quantized.input_scale).astype(dtype)
    if quantized.codes.dtype == xp.int8:
        return (quantized.codes.astype(xp.float32) * quantized.scales.values[:, 0]).astype(dtype)
    codes = xp.concatenate([quantized.codes & 15, quantized.codes >> 4], axis=2)
    scale = scale_values(xp, quantized.scales)
    if quantized.zeros is None:
        values = xp.take(_as(xp, NF4_LEVELS), codes) * scale
    else:
        values = (codes.astype(xp.float32) - quantized.zeros.astype(xp.float32)) * scale
    first, groups, size, last = values.shape
    return values.reshape(first, groups * size, last).astype(dtype)


def slice_rows(quantized: Quantized, start: Any, count: int) -> Quantized:
    """Returns consecutive rows, a slice of the axis P.

    With double quantization, `start` must be a multiple of 256, and so must `count`, unless the last row is in it.

    Args:
        quantized: Quantized array.
        start: Index of the first row, which may be a traced value.
        count: Number of rows.
    """

    def some(array: Any, start: Any = start, count: int = count) -> Any:
        return jax.lax.dynamic_slice_in_dim(array, start, count, 0)

    scales = quantized.scales
    if scales.step is None:
        scales = Scales(some(scales.values))
    else:
        per_row = scales.values[0].size
        groups = start * per_row // DOUBLE_QUANT_GROUP, -(-count * per_row // DOUBLE_QUANT_GROUP)
        scales = Scales(some(scales.values), some(scales.step, *groups), some(scales.lowest, *groups))
    return Quantized(some(quantized.codes), scales, None if quantized.zeros is None else some(quantized.zeros))


def take_rows(quantized: Quantized, indices: jax.Array) -> jax.Array:
    """Returns the dequantized rows of some indices of the axis P: [n, C, Q] float32 for indices [n]."""
    values = scale_values(jnp, quantized.scales)
    zeros = None if quantized.zeros is None else quantized.zeros[indices]
    return dequantize(Quantized(quantized.codes[indices], Scales(values[indices]), zeros))


def quantized_shapes(shape: tuple[int, int, int], quant_spec: QuantSpec) -> Quantized:
    """Returns the shapes and dtypes that quantizing an array of some shape gives."""
    return jax.eval_shape(lambda values: quantize(values, quant_spec), jax.ShapeDtypeStruct(shape, jnp.float32))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def fake_quantize(values: jax.Array, quant_spec: QuantSpec) -> jax.Array:
    """Returns the values rounded as by quantizing and dequantizing, bit for bit so without double quantization.

    The gradient passes straight through (arXiv:1308.3432). Codes aren't packed, so that XLA fuses the elementwise
    operations into two passes over the values.

    Args:
        values: [P, C, Q].
        quant_spec: Quantization spec, whose block size divides C.
    """
    x = values.astype(jnp.float32)
    if quant_spec.scheme == "int8":
        scale = jnp.max(jnp.abs(x), axis=1, keepdims=True) * _PART_OF_127
        return (jnp.clip(jnp.round(x * reciprocal(jnp, scale)), -127, 127) * scale).astype(values.dtype)
    grouped = x.reshape(x.shape[0], x.shape[1] // quant_spec.block_size, quant_spec.block_size, x.shape[2])
    if quant_spec.scheme == "nf4":
        scale = scale_values(jnp, make_scales(jnp, jnp.max(jnp.abs(grouped), axis=2, keepdims=True), quant_spec))
        relative, rounded = grouped * reciprocal(jnp, scale), jnp.full_like(grouped, NF4_LEVELS[0])
        for boundary, level in zip(NF4_BOUNDARIES, NF4_LEVELS[1:], strict=True):
            rounded = jnp.where(relative > boundary, level, rounded)
    else:
        low = jnp.minimum(jnp.min(grouped, axis=2, keepdims=True), 0)
        high = jnp.maximum(jnp.max(grouped, axis=2, keepdims=True), 0)
        scale = scale_values(jnp, make_scales(jnp, (high - low) * _PART_OF_15, quant_spec))
        inverse = reciprocal(jnp, scale)
        zeros = jnp.clip(jnp.round(-low * inverse), 0, 15)
        rounded = jnp.clip(jnp.round(grouped * inverse) + zeros, 0, 15) - zeros
    return (rounded * scale).reshape(values.shape).astype(values.dtype)


@fake_quantize.defjvp
def _straight_through(quant_spec: QuantSpec, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    return fake_quantize(*primals, quant_spec), tangents[0]


def quantized_num_bytes(quantized: Quantized) -> int:
    """Returns the bytes of a quantized array's parts together."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(quantized))


def _namespace(array: Any) -> ModuleType:
    return np if isinstance(array, np.ndarray) else jnp


def _as(xp: Any, table: np.ndarray) -> Any:
    return xp.asarray(table)


def _nearest_nf4(xp: Any, values: Any) -> Any:
    if xp is np:
        return np.searchsorted(NF4_BOUNDARIES, values)
    return jnp.searchsorted(jnp.asarray(NF4_BOUNDARIES), values, method="compare_all")


def pack_codes(xp: Any, codes: Any) -> Any:
    """Returns codes [P, G, block_size, Q] below 16 as [P, G, block_size / 2, Q] uint8, two in each byte.

    Args:
        xp: `numpy` or `jax.numpy`.
        codes: Codes from 0 to 15.
    """
    codes = codes.astype(xp.uint8)
    half = codes.shape[2] // 2
    return codes[:, :, :half] | (codes[:, :, half:] << 4)
