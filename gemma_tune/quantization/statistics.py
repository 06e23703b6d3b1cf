"""What calibration keeps of a layer's inputs, and the error that a quantized kernel makes on them.

A product's squared error on all inputs x is tr(Eᵀ H E), E being the error of its kernel and H = Σ x xᵀ. So H [C, C] is
all that GPTQ and AWQ need, however many inputs there were: no activation is kept.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gemma_tune.errors import ModelError
from gemma_tune.quantization.spec import QuantSpec, block_size_problem


class InputStatistics(NamedTuple):
    """Of the inputs x [C] that a layer was given; all float32.

    hessian: [C, C], Σ x xᵀ. magnitude: [C], Σ |x|. largest: [C], max |x|. count: [], the number of inputs.
    """

    hessian: Any
    magnitude: Any
    largest: Any
    count: Any


def observe(x: Any, weights: Any = None) -> InputStatistics:
    """Returns the statistics of some inputs.

    Args:
        x: [..., C] in any float dtype.
        weights: [...]; 0 leaves an input out, whatever it is, as padding must be. None counts each once.
    """
    flat = jnp.asarray(x, jnp.float32).reshape(-1, x.shape[-1])
    if weights is None:
        weights = jnp.ones(flat.shape[0])
    weights = jnp.asarray(weights, jnp.float32).reshape(-1, 1)
    flat = jnp.where(weights > 0, flat, 0)  # Padding may even be NaN.
    sizes = jnp.abs(flat)
    hessian = jnp.matmul((flat * weights).T, flat, precision=jax.lax.Precision.HIGHEST)
    return InputStatistics(hessian, jnp.sum(sizes * weights, axis=0), jnp.max(sizes, axis=0), jnp.sum(weights))


def add(a: InputStatistics, b: InputStatistics) -> InputStatistics:
    """Returns the statistics of the inputs of both."""
    return InputStatistics(
        a.hessian + b.hessian, a.magnitude + b.magnitude, jnp.maximum(a.largest, b.largest), a.count + b.count
    )


def squared_error(error: jax.Array, hessian: jax.Array) -> jax.Array:
    """Returns tr(Eᵀ H E) [], the squared error of the outputs summed over all inputs.

    Args:
        error: [P, C, Q], of the kernel.
        hessian: [C, C].
    """
    seen = jnp.einsum("cd,pdq->pcq", hessian, error, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(error * seen)


def output_error(values: Any, dequantized: Any, hessian: Any) -> jax.Array:
    """Returns the squared error of the outputs, divided by the outputs' own squares; [] float32.

    Args:
        values: [P, C, Q], the kernel.
        dequantized: [P, C, Q], what stands for it.
        hessian: [C, C] of `InputStatistics`.
    """
    values, dequantized, hessian = (jnp.asarray(array, jnp.float32) for array in (values, dequantized, hessian))
    whole = squared_error(values, hessian)
    return squared_error(values - dequantized, hessian) / jnp.where(whole > 0, whole, 1)


def check_fit(values: Any, hessian: Any, quant_spec: QuantSpec) -> None:
    """Raises ModelError when the shapes of a kernel [P, C, Q], a Hessian [C, C] and a grid don't belong together."""
    inputs = values.shape[1] if len(values.shape) == 3 else -1
    if tuple(hessian.shape) != (inputs, inputs):
        raise ModelError(
            f"A kernel [P, C, Q] needs a Hessian [C, C] of its own inputs, but they have shapes {tuple(values.shape)} "
            f"and {tuple(hessian.shape)}."
        )
    problem = block_size_problem(quant_spec, inputs)
    if problem:
        raise ModelError(
            f"A kernel of shape {tuple(values.shape)} can't be quantized to {quant_spec.scheme}: {problem}."
        )
