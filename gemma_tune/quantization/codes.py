"""From floats to codes of eight or four bits and back: int8, int4 and NF4.

All of them quantize weights alone, along the axis that a product sums over: int8 with a scale for each channel of
outputs, int4 and NF4 with one for each group of `block_size` inputs. Arrays are taken as [P, C, Q], C being what is
summed over: a kernel [D, F] is [1, D, F], a query kernel [N, D, H] is [N, D, H], an attention output [N, H, D] is
[1, N·H, D], and an embedding [V, D] is [V, D, 1].

- int8: codes −127…127 of value / scale; scale is the largest magnitude / 127.
- int4: codes 0…15 of value / scale + zero, where the group's values, and 0 too, go from code 0 to 15.
- nf4: the nearest of 16 quantiles of a normal distribution, times the group's largest magnitude (QLoRA,
  arXiv:2305.14314, appendix E).

Two codes of four bits share a byte: the i-th of a group with the (i + block_size / 2)-th, so that taking them apart
makes two pieces that lie one behind the other.
"""

import functools
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma_tune.quantization.spec import QuantSpec

# To multiply with: as `_inverse`.
_PART_OF_127, _PART_OF_15, _PART_OF_255 = (np.float32(1 / parts) for parts in (127, 15, 255))
_SCALES_IN_BLOCK = 256  # Of double quantization, as in QLoRA.

# Ascending; equal areas under the normal curve, with an exact zero and an exact ±1.
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
NF4_BORDERS = (NF4_LEVELS[1:] + NF4_LEVELS[:-1]) / 2


class Scales(NamedTuple):
    """Scales of groups, [P, G, 1, Q] float32, or doubly quantized: uint8 of that shape, times `step`, plus `lowest`,
    both [number of blocks, 1] float32 over 256 scales in memory order.
    """

    values: Any
    step: Any = None
    lowest: Any = None


class Quantized(NamedTuple):
    """An array in few bits.

    codes: int8: [P, C, Q] int8. Otherwise [P, C / block_size, block_size / 2, Q] uint8, two codes in each.
    scales: int8: [P, 1, 1, Q].
    zeros: int4: [P, C / block_size, 1, Q] uint8, the code of 0. Otherwise None.
    input_scale: [1, C, 1] float32, by which the array was divided before it was rounded, and by which the inputs of a
        product are multiplied (AWQ, SmoothQuant); or None.
    """

    codes: Any
    scales: Scales
    zeros: Any = None
    input_scale: Any = None


def quantize(values: Any, quant_spec: QuantSpec) -> Quantized:
    """Rounds to the nearest code.

    Args:
        values: [P, C, Q] float32; NumPy's arrays are computed with by NumPy, JAX's by JAX.
        quant_spec: With a block size that divides C.
    """
    xp: Any = _namespace(values)
    if quant_spec.scheme == "int8":
        scale = xp.max(xp.abs(values), axis=1, keepdims=True) * _PART_OF_127
        codes = xp.clip(xp.round(values * _inverse(xp, scale)), -127, 127).astype(xp.int8)
        return Quantized(codes, Scales(scale[:, None]))
    first, inputs, last = values.shape
    grouped = values.reshape(first, inputs // quant_spec.block_size, quant_spec.block_size, last)
    if quant_spec.scheme == "nf4":
        scales = _scales(xp, xp.max(xp.abs(grouped), axis=2, keepdims=True), quant_spec)
        relative = grouped * _inverse(xp, scale_values(xp, scales))
        return Quantized(pack(xp, _nearest_nf4(xp, relative)), scales)
    low = xp.minimum(xp.min(grouped, axis=2, keepdims=True), 0)
    high = xp.maximum(xp.max(grouped, axis=2, keepdims=True), 0)
    scales = _scales(xp, (high - low) * _PART_OF_15, quant_spec)
    inverse = _inverse(xp, scale_values(xp, scales))
    zeros = xp.clip(xp.round(-low * inverse), 0, 15)
    codes = xp.clip(xp.round(grouped * inverse) + zeros, 0, 15)
    return Quantized(pack(xp, codes), scales, zeros.astype(xp.uint8))


def dequantize(quantized: Quantized, dtype: Any = np.float32) -> Any:
    """Returns [P, C, Q] in a float dtype; computed in float32. How it was quantized shows in the arrays."""
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
    first, groups, block, last = values.shape
    return values.reshape(first, groups * block, last).astype(dtype)


def rows_of(quantized: Quantized, start: Any, count: int) -> Quantized:
    """Returns some of P, where `start` may be known at run time only.

    With doubly quantized scales, start must be a multiple of 256, and count too unless the rows are the last.
    """

    def some(array: Any, start: Any = start, count: int = count) -> Any:
        return jax.lax.dynamic_slice_in_dim(array, start, count, 0)

    scales = quantized.scales
    if scales.step is None:
        scales = Scales(some(scales.values))
    else:
        in_row = scales.values[0].size
        blocks = start * in_row // _SCALES_IN_BLOCK, -(-count * in_row // _SCALES_IN_BLOCK)
        scales = Scales(some(scales.values), some(scales.step, *blocks), some(scales.lowest, *blocks))
    return Quantized(some(quantized.codes), scales, None if quantized.zeros is None else some(quantized.zeros))


def take_rows(quantized: Quantized, indices: jax.Array) -> jax.Array:
    """Returns some of P by their indices, dequantized: [n, C, Q] float32 for indices [n]."""
    values = scale_values(jnp, quantized.scales)
    zeros = None if quantized.zeros is None else quantized.zeros[indices]
    return dequantize(Quantized(quantized.codes[indices], Scales(values[indices]), zeros))


def shapes_of(shape: tuple[int, int, int], quant_spec: QuantSpec) -> Quantized:
    """Returns the shapes and dtypes of what quantizing an array of this shape gives."""
    return jax.eval_shape(lambda values: quantize(values, quant_spec), jax.ShapeDtypeStruct(shape, jnp.float32))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def fake_quantize(values: jax.Array, quant_spec: QuantSpec) -> jax.Array:
    """Returns what dequantizing gives, bit for bit without `double`; its gradient is that of the values (straight
    through, arXiv:1308.3432).

    No codes are packed on the way: the few elementwise operations are fused to two passes over the values.

    Args:
        values: [P, C, Q].
        quant_spec: That of the conversion afterwards.
    """
    x = values.astype(jnp.float32)
    if quant_spec.scheme == "int8":
        scale = jnp.max(jnp.abs(x), axis=1, keepdims=True) * _PART_OF_127
        return (jnp.clip(jnp.round(x * _inverse(jnp, scale)), -127, 127) * scale).astype(values.dtype)
    grouped = x.reshape(x.shape[0], x.shape[1] // quant_spec.block_size, quant_spec.block_size, x.shape[2])
    if quant_spec.scheme == "nf4":
        scale = scale_values(jnp, _scales(jnp, jnp.max(jnp.abs(grouped), axis=2, keepdims=True), quant_spec))
        relative, rounded = grouped * _inverse(jnp, scale), jnp.full_like(grouped, NF4_LEVELS[0])
        for border, level in zip(NF4_BORDERS, NF4_LEVELS[1:], strict=True):
            rounded = jnp.where(relative > border, level, rounded)
    else:
        low = jnp.minimum(jnp.min(grouped, axis=2, keepdims=True), 0)
        high = jnp.maximum(jnp.max(grouped, axis=2, keepdims=True), 0)
        scale = scale_values(jnp, _scales(jnp, (high - low) * _PART_OF_15, quant_spec))
        inverse = _inverse(jnp, scale)
        zeros = jnp.clip(jnp.round(-low * inverse), 0, 15)
        rounded = jnp.clip(jnp.round(grouped * inverse) + zeros, 0, 15) - zeros
    return (rounded * scale).reshape(values.shape).astype(values.dtype)


@fake_quantize.defjvp
def _straight_through(quant_spec: QuantSpec, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    return fake_quantize(*primals, quant_spec), tangents[0]


def quantized_num_bytes(quantized: Quantized) -> int:
    """Returns the bytes of all arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(quantized))


def _namespace(array: Any) -> ModuleType:
    return np if isinstance(array, np.ndarray) else jnp


def _as(xp: Any, table: np.ndarray) -> Any:
    return xp.asarray(table)


def _inverse(xp: Any, scale: Any) -> Any:
    """What to multiply with: XLA makes that of a division by one scale for many values, and NumPy doesn't. A group of
    zeros has the scale 0, and any other makes its codes.
    """
    return 1 / xp.where(scale == 0, 1, scale)


def _nearest_nf4(xp: Any, values: Any) -> Any:
    if xp is np:
        return np.searchsorted(NF4_BORDERS, values)
    return jnp.searchsorted(jnp.asarray(NF4_BORDERS), values, method="compare_all")


def pack(xp: Any, codes: Any) -> Any:
    """Returns [P, G, block / 2, Q] uint8 of codes [P, G, block, Q] below 16. xp: NumPy or JAX's."""
    codes = codes.astype(xp.uint8)
    half = codes.shape[2] // 2
    return codes[:, :, :half] | (codes[:, :, half:] << 4)


def _scales(xp: Any, values: Any, quant_spec: QuantSpec) -> Scales:
    """values: [P, G, 1, Q]. The last block of a doubly quantized array may be shorter."""
    values = values.astype(xp.float32)
    if not quant_spec.double:
        return Scales(values)
    flat = _blocks_of(xp, values)
    lowest, highest = (f(flat, axis=1, keepdims=True) for f in (xp.min, xp.max))
    step = (highest - lowest) * _PART_OF_255
    codes = xp.round((flat - lowest) * _inverse(xp, step)).astype(xp.uint8)
    return Scales(codes.reshape(-1)[: values.size].reshape(values.shape), step, lowest)


def scale_values(xp: Any, scales: Scales) -> Any:
    """Returns [P, G, 1, Q] float32, doubly quantized or not. xp: NumPy or JAX's."""
    if scales.step is None:
        return scales.values
    flat = _blocks_of(xp, scales.values).astype(xp.float32) * scales.step + scales.lowest
    return flat.reshape(-1)[: scales.values.size].reshape(scales.values.shape)


def _blocks_of(xp: Any, array: Any) -> Any:
    """[number of blocks, 256], filled up with copies of the last."""
    flat = array.reshape(-1)
    missing = -flat.size % _SCALES_IN_BLOCK
    if missing:
        flat = xp.concatenate([flat, xp.broadcast_to(flat[-1:], (missing,))])
    return flat.reshape(-1, _SCALES_IN_BLOCK)
