"""SmoothQuant (Xiao et al., arXiv:2211.10438): products of eight-bit integers.

Activations are rounded at run time, with a scale for each token. A few of their channels are far larger than the rest
and leave few codes for the others. So a part of their magnitude is moved into the weights, once and beforehand.
"""

from typing import Any

import jax
import jax.numpy as jnp

from gemma_tune.errors import ConfigError, ModelError
from gemma_tune.quantization.codes import Quantized


def smooth_scale(values: Any, largest: Any, alpha: float = 0.5) -> jax.Array:
    """Returns s [C] of equation 4: inputs divided by s and weights multiplied by s give the same product.

    s = largest^alpha / (largest weight of the input)^(1 − alpha). It is 1 for inputs that were always 0 or have only
    weights of 0.

    Args:
        values: [P, C, Q] kernel. Several kernels with the same inputs are joined along Q.
        largest: [C], `largest` of `InputStatistics`.
        alpha: Weight of the activations' magnitude, from 0 (the weights alone count) to 1 (the activations alone).

    Raises:
        ConfigError: `alpha` is not from 0 to 1.
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"The alpha of SmoothQuant must be from 0 to 1, got {alpha}.")
    weights = jnp.max(jnp.abs(values), axis=(0, 2))
    usable = (weights > 0) & (largest > 0)
    weights, largest = (jnp.where(usable, sizes, 1) for sizes in (weights, largest))
    return largest**alpha / weights ** (1 - alpha)


def quantize_activations(x: Any) -> tuple[jax.Array, jax.Array]:
    """Quantizes x [..., C] token by token, to (codes [..., C] int8 from −127 to 127, scales [..., 1] float32)."""
    x = jnp.asarray(x, jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127
    codes = jnp.clip(jnp.round(x / jnp.where(scale == 0, 1, scale)), -127, 127)
    return codes.astype(jnp.int8), scale


def dynamic_product(x: Any, kernel: Quantized) -> jax.Array:
    """Returns the product of rounded inputs and a quantized kernel, [..., P, Q] float32. It has no useful gradient.

    Codes are multiplied as integers and summed in int32, which can't overflow for C up to 133,000.

    Args:
        x: [..., C] inputs in any float dtype.
        kernel: Quantized [P, C, Q] kernel, int8.

    Raises:
        ModelError: The kernel has another scheme.
    """
    if kernel.codes.dtype != jnp.int8:
        raise ModelError(f"Integer products need an int8 kernel, but its codes are {kernel.codes.dtype}.")
    codes, scale = quantize_activations(x)
    summed = (((codes.ndim - 1,), (1,)), ((), ()))
    sums = jax.lax.dot_general(codes, jnp.asarray(kernel.codes), summed, preferred_element_type=jnp.int32)
    return sums.astype(jnp.float32) * scale[..., None] * kernel.scales.values[:, 0, 0]
