"""AWQ: weights of inputs with large activations get more of the grid (Lin et al., arXiv:2306.00978).

Weights are multiplied by a scale s for each input before they are rounded, and the inputs are divided by it, in the
layer before or at run time. Errors are taken over all inputs by their Hessian, so that no activation is kept.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from gemma_tune.quantization.codes import Quantized, dequantize, quantize
from gemma_tune.quantization.spec import QuantSpec
from gemma_tune.quantization.statistics import InputStatistics, check_fit, squared_error

_NUM_ALPHAS = 20  # From 0 on, in steps of 1/20, as the paper's code tries them.
_NUM_CLIPS = 10  # From 1 down, in steps of 1/20, likewise.
_SMALLEST = 1e-4  # Of a scale, before the division by the middle.


def awq_scale(values: Any, statistics: InputStatistics, quant_spec: QuantSpec) -> jax.Array:
    """Returns s [C] float32: mean|x|^alpha, divided by the geometric mean of its extremes (section 3.2, equation 5).

    The alpha is the one with the least squared error of the outputs. 0, which scales nothing, is one of them.

    Args:
        values: [P, C, Q], all P of the same inputs.
        statistics: Of these inputs.
        quant_spec: With a block size that divides C.

    Raises:
        ModelError: Shapes that don't belong together.
    """
    check_fit(values, statistics.hessian, quant_spec)
    return _search(jnp.asarray(values, jnp.float32), statistics, quant_spec)


def awq(values: Any, statistics: InputStatistics, quant_spec: QuantSpec) -> tuple[Quantized, jax.Array]:
    """Returns (values · s in few bits, s [C]). The kernel is what it dequantizes to, divided by s.

    Each group's largest weights are cut off where that makes less error of the outputs, as in the paper's code: a finer
    grid for all the others.

    Args:
        values: [P, C, Q].
        statistics: Of its inputs.
        quant_spec: With a block size that divides C.

    Raises:
        ModelError: Shapes that don't belong together.
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
    """An input that was never seen gets the least scale of those that were."""
    seen = mean > 0
    mean = jnp.where(seen, mean, jnp.min(jnp.where(seen, mean, jnp.inf)))
    scale = jnp.maximum(jnp.where(jnp.isfinite(mean), mean, 1) ** alpha, _SMALLEST)
    return scale / jnp.sqrt(jnp.max(scale) * jnp.min(scale))


@functools.partial(jax.jit, static_argnames="quant_spec")
def _clip(values: jax.Array, hessian: jax.Array, quant_spec: QuantSpec) -> jax.Array:
    """Returns [P, C, Q] with the groups cut off that are better so by their own inputs, if the whole is better too."""
    first, inputs, last = values.shape
    size = inputs if quant_spec.scheme == "int8" else quant_spec.block_size
    grouped = values.reshape(first, -1, size, last)
    places = jnp.arange(inputs).reshape(-1, size)
    of_groups = hessian[places[:, :, None], places[:, None, :]]
    largest = jnp.max(jnp.abs(grouped), axis=2, keepdims=True)

    def cut(part: jax.Array) -> jax.Array:
        return jnp.clip(grouped, -part * largest, part * largest).reshape(values.shape)

    def error(part: jax.Array) -> jax.Array:
        wrong = (values - dequantize(quantize(cut(part), quant_spec))).reshape(grouped.shape)
        seen = jnp.einsum("gcd,pgdq->pgcq", of_groups, wrong, precision=jax.lax.Precision.HIGHEST)
        return jnp.sum(wrong * seen, axis=2, keepdims=True)

    parts = 1 - jnp.arange(_NUM_CLIPS) / 20
    clipped = cut(parts[jnp.argmin(jax.lax.map(error, parts), axis=0)])
    before, after = (squared_error(values - dequantize(quantize(v, quant_spec)), hessian) for v in (values, clipped))
    return jnp.where(after < before, clipped, values)
