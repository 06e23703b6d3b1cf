"""AWQ (Lin et al., arXiv:2306.00978): weights of inputs with large activations are rounded more finely.

Weights are multiplied by a scale s for each input before they are rounded, and the inputs are divided by s, in the
layer before or at run time. Errors over all inputs come from the Hessian, so that activations aren't stored.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from gemma_tune.quantization.codes import Quantized, dequantize, quantize
from gemma_tune.quantization.spec import QuantSpec
from gemma_tune.quantization.statistics import InputStatistics, check_fit, squared_error

_NUM_ALPHAS = 20  # Alphas from 0 upwards in steps of 1/20, as in the paper's code.
_NUM_CLIPS = 10  # Clipping factors from 1 downwards in steps of 1/20, as in the paper's code.
_MIN_SCALE = 1e-4  # Before the division by the geometric mean.


def awq_scale(values: Any, statistics: InputStatistics, quant_spec: QuantSpec) -> jax.Array:
    """Returns s [C] float32: mean|x|^alpha, divided by the geometric mean of its extremes (section 3.2, equation 5).

    The alpha is the one with the smallest squared error of the outputs. 0, which scales nothing, is among those tried.

    Args:
        values: [P, C, Q] kernel, all P of the same inputs.
        statistics: Statistics of these inputs.
        quant_spec: Quantization spec, whose block size divides C.

    Raises:
        ModelError: The shapes don't fit together.
    """
    check_fit(values, statistics.hessian, quant_spec)
    return _search(jnp.asarray(values, jnp.float32), statistics, quant_spec)


def awq(values: Any, statistics: InputStatistics, quant_spec: QuantSpec) -> tuple[Quantized, jax.Array]:
    """Returns (values · s quantized, s [C]). Dequantized and divided by s, they are the quantized kernel.

    As in the paper's code, each group's largest weights are clipped where that reduces the error of the outputs, since
    the group's other weights then get a smaller scale.

    Args:
        values: [P, C, Q] kernel.
        statistics: Statistics of its inputs.
        quant_spec: Quantization spec, whose block size divides C.

    Raises:
        ModelError: The shapes don't fit together.
    """
    scale = awq_scale(values, statistics, quant_spec)
    scaled = jnp.asarray(values, jnp.float32) * scale[:, None]
    return quantize(_clip(scaled, statistics.hessian / (scale[:, None] * scale), quant_spec), quant_spec), scale


@functools.partial(jax.jit, static_argnames="quant_spec")
def _search(values: jax.Array, statistics: InputStatistics, quant_spec: QuantSpec) -> jax.Array:
    mean = statistics.magnitude / jnp.maximum(statistics.count, 1)

    def error(alpha: jax.Array) -> jax.Array:
        scale = _scale_of(mean, alpha)[:, None]
        rounded = dequantize(quantize(values * scale, quant_spec)) / scale
        return squared_error(values - rounded, statistics.hessian)

    alphas = jnp.arange(_NUM_ALPHAS) / _NUM_ALPHAS
    errors = jax.lax.map(error, alphas)
    return _scale_of(mean, alphas[jnp.argmin(jnp.where(jnp.isnan(errors), jnp.inf, errors))])


def _scale_of(mean: jax.Array, alpha: jax.Array) -> jax.Array:
    """Returns s [C]. An input that was always 0 gets the smallest scale of the others."""
    is_used = mean > 0
    mean = jnp.where(is_used, mean, jnp.min(jnp.where(is_used, mean, jnp.inf)))
    scale = jnp.maximum(jnp.where(jnp.isfinite(mean), mean, 1) ** alpha, _MIN_SCALE)
    return scale / jnp.sqrt(jnp.max(scale) * jnp.min(scale))


@functools.partial(jax.jit, static_argnames="quant_spec")
def _clip(values: jax.Array, hessian: jax.Array, quant_spec: QuantSpec) -> jax.Array:
    """Returns [P, C, Q] with each group clipped as suits its own inputs best, if that also reduces the whole error."""
    first, inputs, last = values.shape
    size = inputs if quant_spec.scheme == "int8" else quant_spec.block_size
    grouped = values.reshape(first, -1, size, last)
    indices = jnp.arange(inputs).reshape(-1, size)
    group_hessians = hessian[indices[:, :, None], indices[:, None, :]]
    largest = jnp.max(jnp.abs(grouped), axis=2, keepdims=True)

    def clip(factor: jax.Array) -> jax.Array:
        return jnp.clip(grouped, -factor * largest, factor * largest).reshape(values.shape)

    def group_errors(factor: jax.Array) -> jax.Array:
        error = (values - dequantize(quantize(clip(factor), quant_spec))).reshape(grouped.shape)
        product = jnp.einsum("gcd,pgdq->pgcq", group_hessians, error, precision=jax.lax.Precision.HIGHEST)
        return jnp.sum(error * product, axis=2, keepdims=True)

    factors = 1 - jnp.arange(_NUM_CLIPS) / 20
    clipped = clip(factors[jnp.argmin(jax.lax.map(group_errors, factors), axis=0)])
    before, after = (squared_error(values - dequantize(quantize(v, quant_spec)), hessian) for v in (values, clipped))
    return jnp.where(after < before, clipped, values)
