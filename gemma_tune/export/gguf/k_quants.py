"""Quantizes weights to llama.cpp's Q4_K and Q6_K, which the `gguf` package can read but not write.

The bytes are laid out as in ggml-common.h (block_q4_K, block_q6_K), 256 weights at a time. Q4_K divides these into 8
groups of 32, in which a weight is d·scale·code - dmin·lowest with codes 0…15 and a 6-bit scale and lowest; Q6_K into 16
groups of 16, in which it is d·scale·(code - 32) with codes 0…63 and an 8-bit scale. d and dmin are float16, one each
for the 256 weights. For each group several scales are tried, and the one with the smallest squared error is kept;
errors of larger weights count more, as in llama-quantize.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

_BLOCK = 256
_SINGULAR = 1e-4  # A float32 determinant this small relative to its terms counts as 0.
_TRIALS = 21  # Number of scales that are tried, around the one that just covers a group's range.


def to_q4_k(values: np.ndarray) -> np.ndarray:
    """Returns the Q4_K bytes, uint8 [rows, bytes], of float32 values [rows, columns], columns a multiple of 256."""
    blocks = np.ascontiguousarray(values, np.float32).reshape(-1, 8, 32)
    d, dmin, scales, lows, codes = (np.asarray(array) for array in _q4_k(blocks))
    low_nibbles, high_nibbles = codes.reshape(-1, 4, 2, 32).transpose(2, 0, 1, 3).reshape(2, -1, 128)
    packed_scales = [
        scales[:, :4] | (scales[:, 4:] >> 4) << 6,
        lows[:, :4] | (lows[:, 4:] >> 4) << 6,
        (scales[:, 4:] & 15) | (lows[:, 4:] & 15) << 4,
    ]
    parts = [_bytes_of(d), _bytes_of(dmin), *packed_scales, low_nibbles | high_nibbles << 4]
    return np.concatenate(parts, axis=1).reshape(len(values), -1)


def to_q6_k(values: np.ndarray) -> np.ndarray:
    """Returns the Q6_K bytes, uint8 [rows, bytes], of float32 values [rows, columns], columns a multiple of 256."""
    blocks = np.ascontiguousarray(values, np.float32).reshape(-1, 16, 16)
    d, scales, codes = (np.asarray(array) for array in _q6_k(blocks))
    halves = codes.reshape(-1, 2, 4, 32)  # Each half of a block: four runs of 32.
    low, high = halves & 15, halves >> 4
    low_bytes = (low[:, :, :2] | low[:, :, 2:] << 4).reshape(-1, 128)
    high_bytes = (high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6).reshape(-1, 64)
    return np.concatenate([low_bytes, high_bytes, scales.view(np.uint8), _bytes_of(d)], axis=1).reshape(len(values), -1)


K_QUANTIZERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"Q4_K": to_q4_k, "Q6_K": to_q6_k}


@jax.jit
def _q4_k(blocks: jax.Array) -> tuple[jax.Array, ...]:
    """[n, 8, 32] -> d [n], dmin [n], scales and lows [n, 8], codes [n, 256]."""
    scale, low = _affine(blocks)
    d, dmin = (jnp.max(array, axis=1) / 63 for array in (scale, low))
    d, dmin = d.astype(jnp.float16), dmin.astype(jnp.float16)
    coarse = [_divide(array, step.astype(jnp.float32)[:, None]) for array, step in ((scale, d), (low, dmin))]
    scale_codes, low_codes = (jnp.clip(jnp.round(array), 0, 63) for array in coarse)
    scale = scale_codes * d.astype(jnp.float32)[:, None]
    low = low_codes * dmin.astype(jnp.float32)[:, None]
    codes = jnp.clip(jnp.round(_divide(blocks + low[..., None], scale[..., None])), 0, 15)
    return d, dmin, scale_codes.astype(jnp.uint8), low_codes.astype(jnp.uint8), _flat(codes)


@jax.jit
def _q6_k(blocks: jax.Array) -> tuple[jax.Array, ...]:
    """[n, 16, 16] -> d [n], scales [n, 16] int8, codes [n, 256]."""
    scale = _symmetric(blocks)
    largest = jnp.take_along_axis(scale, jnp.argmax(jnp.abs(scale), axis=1, keepdims=True), axis=1)
    d = (largest[:, 0] / -128).astype(jnp.float16)
    scale_codes = jnp.clip(jnp.round(_divide(scale, d.astype(jnp.float32)[:, None])), -128, 127)
    scale = scale_codes * d.astype(jnp.float32)[:, None]
    codes = jnp.clip(jnp.round(_divide(blocks, scale[..., None])), -32, 31) + 32
    return d, scale_codes.astype(jnp.int8), _flat(codes)


def _affine(groups: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (scale, low), [n, g], such that scale·code - low is near groups [n, g, 32]; both at least 0."""
    lowest = jnp.minimum(jnp.min(groups, axis=-1), 0)
    span = jnp.max(groups, axis=-1) - lowest
    weights = jnp.sqrt(jnp.mean(groups**2, axis=-1, keepdims=True)) + jnp.abs(groups)

    def attempt(trial: jax.Array, best: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        steps = 15 + 0.1 * (trial - _TRIALS // 2)
        codes = jnp.clip(jnp.round(_divide((groups - lowest[..., None]) * steps, span[..., None])), 0, 15)
        # Least squares of groups = scale·codes + offset, under the weights.
        w, x, y = jnp.sum(weights, -1), jnp.sum(weights * codes, -1), jnp.sum(weights * groups, -1)
        xx, xy = jnp.sum(weights * codes**2, -1), jnp.sum(weights * codes * groups, -1)
        determinant = w * xx - x * x
        scale = _divide(w * xy - x * y, determinant)
        offset = _divide(xx * y - x * xy, determinant)
        # A positive offset can't be stored, and with equal codes scale and offset are not determined: then the offset
        # is 0, or, where all codes are 0, the scale is.
        through_zero = (offset > 0) | (determinant < _SINGULAR * w * xx)
        scale = jnp.where(through_zero, _divide(xy, xx), scale)
        offset = jnp.where(xx == 0, _divide(y, w), jnp.where(through_zero, 0, offset))
        offset = jnp.minimum(offset, 0)
        return _better(best, groups, weights, codes, jnp.maximum(scale, 0), offset)

    start = (span / 15, lowest, jnp.full(span.shape, jnp.inf))
    scale, offset, _ = jax.lax.fori_loop(0, _TRIALS, attempt, start)
    return scale, -offset


def _symmetric(groups: jax.Array) -> jax.Array:
    """Returns the scale, [n, g], of either sign, such that scale·code is near groups [n, g, 16], codes -32…31."""
    place = jnp.argmax(jnp.abs(groups), axis=-1, keepdims=True)
    extreme = jnp.take_along_axis(groups, place, axis=-1)
    weights = groups**2
    zero = jnp.zeros(extreme.shape[:-1])

    def attempt(trial: jax.Array, best: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        steps = -(32 + 0.1 * (trial - _TRIALS // 2))
        codes = jnp.clip(jnp.round(_divide(groups * steps, extreme)), -32, 31)
        scale = _divide(jnp.sum(weights * codes * groups, -1), jnp.sum(weights * codes**2, -1))
        return _better(best, groups, weights, codes, scale, zero)

    start = (extreme[..., 0] / -32, zero, jnp.full(zero.shape, jnp.inf))
    return jax.lax.fori_loop(0, _TRIALS, attempt, start)[0]


def _better(best: tuple[jax.Array, ...], groups, weights, codes, scale, offset) -> tuple[jax.Array, ...]:
    """Returns, group by group, the (scale, offset, error) with the smaller error."""
    error = jnp.sum(weights * (scale[..., None] * codes + offset[..., None] - groups) ** 2, axis=-1)
    return tuple(jnp.where(error < best[2], new, old) for new, old in zip((scale, offset, error), best, strict=True))


def _divide(dividend: jax.Array, divisor: jax.Array) -> jax.Array:
    """Returns the quotient, or 0 where the divisor is 0."""
    return jnp.where(divisor == 0, 0, dividend / jnp.where(divisor == 0, 1, divisor))


def _flat(codes: jax.Array) -> jax.Array:
    return codes.astype(jnp.uint8).reshape(-1, _BLOCK)


def _bytes_of(halves: np.ndarray) -> np.ndarray:
    """[n] float16 -> [n, 2] uint8."""
    return np.ascontiguousarray(halves, np.float16).view(np.uint8).reshape(-1, 2)
