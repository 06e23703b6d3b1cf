"""Statistics of a layer's inputs for calibration, and the error of a quantized kernel on these inputs.

The squared error of a product over all inputs x is tr(Eᵀ H E), where E is the error of the kernel and H = Σ x xᵀ. So
GPTQ and AWQ need only H [C, C], however many inputs there are: activations aren't stored.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gemma_tune.errors import ModelError
from gemma_tune.quantization.spec import QuantSpec, block_size_problem


class InputStatistics(NamedTuple):
    """Statistics of a layer's inputs x [C], all in float32.

    Attributes:
        hessian: [C, C], Σ x xᵀ.
        magnitude: [C], Σ |x|.
        largest: [C], max |x|.
        count: [], number of inputs.
    """

    hessian: Any
    magnitude: Any
    largest: Any
    count: Any


def observe(x: Any, weights: Any = None) -> InputStatistics:
    """Returns the statistics of some inputs.

    Args:
        x: [..., C] inputs in any float dtype.
        weights: [...] weight of each input; 0 leaves it out, also if it is NaN. None for equal weights of 1.
    """
    flat = jnp.asarray(x, jnp.float32).reshape(-1, x.shape[-1])
    if weights is None:
        weights = jnp.ones(flat.shape[0])
    weights = jnp.asarray(weights, jnp.float32).reshape(-1, 1)
    flat = jnp.where(weights > 0, flat, 0)  # Padding may be NaN.
    sizes = jnp.abs(flat)
    hessian = jnp.matmul((flat * weights).T, flat, precision=jax.lax.Precision.HIGHEST)
    return InputStatistics(hessian, jnp.sum(sizes * weights, axis=0), jnp.max(sizes, axis=0), jnp.sum(weights))


def add_statistics(a: InputStatistics, b: InputStatistics) -> InputStatistics:
    """Returns the statistics of the inputs of a and b together."""
    return InputStatistics(
        a.hessian + b.hessian, a.magnitude + b.magnitude, jnp.maximum(a.largest, b.largest), a.count + b.count
    )


def squared_error(error: jax.Array, hessian: jax.Array) -> jax.Array:
    """Returns tr(Eᵀ H E) [], the squared error of the outputs summed over all inputs.

    Args:
        error: [P, C, Q] error of the kernel, E.
        hessian: [C, C], `hessian` of `InputStatistics`.
    """
    seen = jnp.einsum("cd,pdq->pcq", hessian, error, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(error * seen)


def output_error(values: Any, dequantized: Any, hessian: Any) -> jax.Array:
    """Returns the relative squared error of the outputs, [] float32: their squared error by their sum of squares.

    Args:
        values: [P, C, Q] kernel.
        dequantized: [P, C, Q] quantized kernel as floats.
        hessian: [C, C], `hessian` of `InputStatistics`.
    """
    values, dequantized, hessian = (jnp.asarray(array, jnp.float32) for array in (values, dequantized, hessian))
    whole = squared_error(values, hessian)
    return squared_error(values - dequantized, hessian) / jnp.where(whole > 0, whole, 1)


def check_fit(values: Any, hessian: Any, quant_spec: QuantSpec) -> None:
    """Raises ModelError unless the shapes of a kernel [P, C, Q] and a Hessian [C, C], and the block size, fit."""
    inputs = values.shape[1] if len(values.shape) == 3 else -1
    if tuple(hessian.shape) != (inputs, inputs):
        raise ModelError(
            f"A kernel [P, C, Q] needs a Hessian [C, C] of its inputs, but the kernel has shape {tuple(values.shape)} "
            f"and the Hessian {tuple(hessian.shape)}."
        )
    problem = block_size_problem(quant_spec, inputs)
    if problem:
        raise ModelError(
            f"A kernel of shape {tuple(values.shape)} can't be quantized to {quant_spec.scheme}: {problem}."
        )
