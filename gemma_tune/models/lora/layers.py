"""Adds LoRA factors to a layer, computes with them beside its frozen kernel, and merges them into the kernel.

The factors are Keras's own variables, `lora_kernel_a` and `lora_kernel_b`, and, for DoRA, `lora_kernel_magnitude`
beside them. Keras multiplies A·B by `lora_alpha / lora_rank`. `lora_alpha` is set so that this is the scale, also for
rsLoRA; the alpha that the user set is in `lora_spec_of`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from keras import ops
from keras.src.initializers.random_initializers import compute_fans

from gemma_tune.errors import ModelError
from gemma_tune.models.functional import value_in_scope
from gemma_tune.models.linear import PlainEinsumDense, einsum_product
from gemma_tune.models.lora.dropout import drop_out, has_dropout, remove_dropout
from gemma_tune.models.lora.factors import (
    LoraSpec,
    expand_over_inputs,
    factor_shapes,
    kernel_norms,
    kernel_update,
    low_rank_product,
    merged_norms,
)
from gemma_tune.runtime.backend import keras

_Seeds = list[int]


class LoraEinsumDense(keras.layers.EinsumDense):
    """An EinsumDense that multiplies its input by A and B instead of adding A·B to its kernel.

    Keras computes x·(W + s·A·B), whose backward pass makes the gradient of a whole kernel first. Here, no array of the
    kernel's size is made. Existing layers become such ones by `layer.__class__ = LoraEinsumDense`.
    """

    @property
    def kernel(self) -> jax.Array:
        """Returns the merged kernel, which Gemma 4's blocks multiply by themselves. `_kernel` is the frozen one.

        Raises:
            ModelError: The layer has dropout, which a merged kernel can't have.
        """
        if has_dropout(self):
            raise ModelError(
                f"{self.path} can't have lora.dropout: its block multiplies W + A·B by the input itself. Set "
                "lora.dropout=0, or leave the layer out of lora.target_layers."
            )
        return merged_kernel(self, value_in_scope(self._kernel)).astype(self.compute_dtype)

    def call(self, inputs: Any, training: Any = None) -> Any:
        outputs = einsum_product(self.equation, inputs, ops.cast(self._kernel, inputs.dtype))
        outputs = with_factors(self, inputs, outputs)
        if self.bias is not None:
            outputs = ops.add(outputs, self.bias)
        return outputs if self.activation is None else self.activation(outputs)


def with_factors(layer: Any, inputs: jax.Array, outputs: jax.Array) -> jax.Array:
    """Returns a layer's outputs with its LoRA factors.

    Args:
        layer: Layer with factors.
        inputs: x, [B, L, …].
        outputs: Outputs of the frozen kernel alone, x·W, [B, L, outputs…].
    """
    scale, (a, b) = scale_of(layer), (value_in_scope(factor) for factor in factors_of(layer)[:2])
    casted = (drop_out(layer, inputs), a.astype(inputs.dtype), b.astype(inputs.dtype))
    outputs = outputs + low_rank_product(layer.equation, scale, *casted)
    if not lora_spec_of(layer).use_dora:
        return outputs
    frozen = jax.lax.stop_gradient((float_kernel(layer), a, b))
    ratio = value_in_scope(layer.lora_kernel_magnitude) / merged_norms(layer.equation, scale, *frozen)
    return outputs * ratio.astype(outputs.dtype)


def merged_kernel(layer: Any, kernel: jax.Array) -> jax.Array:
    """Returns W + s·A·B in float32, with DoRA scaled to the layer's magnitudes.

    Args:
        layer: Layer with factors.
        kernel: W, in its own shape.
    """
    a, b, *magnitude = (value_in_scope(factor) for factor in factors_of(layer))
    equation = equation_of(layer)
    merged = kernel.astype(jnp.float32) + kernel_update(equation, scale_of(layer), a, b)
    for length in magnitude:
        norms = jax.lax.stop_gradient(kernel_norms(equation, merged))  # Constants for the gradient (factors.py).
        merged = merged * expand_over_inputs(equation, length / norms)
    return merged


def neutral_factors(layer: Any) -> dict[str, jax.Array]:
    """Returns values of some of a layer's factors, by path, with which it computes as without factors."""
    _, b, *magnitude = factors_of(layer)
    changed = {b.path: jnp.zeros(b.shape, b.dtype)}
    return changed | {one.path: kernel_norms(layer.equation, float_kernel(layer)) for one in magnitude}


def add_factors(layer: Any, lora_spec: LoraSpec, seeds: _Seeds) -> None:
    """Freezes a layer and adds trainable factors, A random and B zero, so that it computes as before.

    Args:
        layer: EinsumDense, quantized or not, or Embedding. An Embedding's factors have Keras's layout.
        lora_spec: Kind of factors.
        seeds: Random seeds of A.
    """
    layer.trainable = True
    alpha = lora_spec.scale * lora_spec.rank
    if isinstance(layer, keras.layers.Embedding):
        layer.enable_lora(lora_spec.rank, lora_alpha=alpha, a_initializer=_Random(seeds, "keras"))
    else:
        shapes = factor_shapes(layer.equation, tuple(layer.kernel.shape), lora_spec.layout, lora_spec.rank)
        layer._tracker.unlock()
        layer.lora_kernel_a = _add(layer, "lora_kernel_a", shapes.a, _Random(seeds, lora_spec.layout))
        layer.lora_kernel_b = _add(layer, "lora_kernel_b", shapes.b, "zeros")
        if lora_spec.use_dora:
            layer.lora_kernel_magnitude = _add(
                layer, "lora_kernel_magnitude", shapes.magnitude, lambda *_, **__: _initial_magnitude(layer)
            )
        layer._kernel.trainable = False
        layer._tracker.lock()
        layer.lora_enabled, layer.lora_rank, layer.lora_alpha = True, lora_spec.rank, alpha
    if type(layer) in (keras.layers.EinsumDense, PlainEinsumDense):
        layer.__class__ = LoraEinsumDense
    # Past Keras's `__setattr__`, which would look for layers and variables in it.
    object.__setattr__(layer, "_lora_spec", lora_spec)


def initial_values(layer: Any, seeds: _Seeds) -> dict[str, jax.Array | np.ndarray]:
    """Returns the values of a layer's factors, by path, that `add_factors` gives them with these seeds."""
    a, b, *magnitude = factors_of(layer)
    layout = lora_spec_of(layer).layout
    values = {a.path: _Random(seeds, layout)(tuple(a.shape), a.dtype), b.path: np.zeros(b.shape, b.dtype)}
    return values | {one.path: _initial_magnitude(layer) for one in magnitude}


def make_scale_an_input(layer: Any) -> None:
    """Makes the scale of a layer's factors a variable, so that programs take it as an input and not as a constant."""
    layer._tracker.unlock()
    layer.factor_scale = layer.add_weight(
        name="factor_scale", shape=(), initializer="ones", dtype="float32", trainable=False, autocast=False
    )
    layer._tracker.lock()
    layer.factor_scale.assign(lora_spec_of(layer).scale)


def set_alpha(layer: Any, alpha: float) -> None:
    """Sets the alpha of a layer's factors. Programs notice if the scale is their input (`make_scale_an_input`)."""
    lora_spec = lora_spec_of(layer)._replace(alpha=alpha)
    layer.lora_alpha = lora_spec.scale * lora_spec.rank
    object.__setattr__(layer, "_lora_spec", lora_spec)
    scale = getattr(layer, "factor_scale", None)
    if scale is not None:
        scale.assign(lora_spec.scale)


def remove_factors(layer: Any) -> None:
    """Removes a layer's factors."""
    remove_dropout(layer)
    layer._tracker.unlock()
    for factor in factors_of(layer):
        layer._untrack_variable(factor)
    scale = layer.__dict__.pop("factor_scale", None)
    if scale is not None:
        layer._untrack_variable(scale)
    layer._tracker.lock()
    layer.lora_enabled, layer.lora_rank = False, None
    layer.__dict__.pop("_lora_spec", None)
    if type(layer) is LoraEinsumDense:
        layer.__class__ = keras.layers.EinsumDense


def factors_of(layer: Any) -> list[keras.Variable]:
    """Returns a layer's factors: A, B and, with DoRA, the magnitude."""
    if isinstance(layer, keras.layers.Embedding):
        return [layer.lora_embeddings_a, layer.lora_embeddings_b]
    factors = [layer.lora_kernel_a, layer.lora_kernel_b]
    return [*factors, layer.lora_kernel_magnitude] if lora_spec_of(layer).use_dora else factors


def lora_spec_of(layer: Any) -> LoraSpec:
    """Returns the kind of a layer's factors. Those that Keras's own `enable_lora` added have Keras's layout."""
    found = layer.__dict__.get("_lora_spec")
    return found or LoraSpec("keras", layer.lora_rank, float(layer.lora_alpha))


def scale_of(layer: Any) -> float | jax.Array:
    """Returns the scale of a layer's factors, s: a constant, or a [] array if it is an input of programs."""
    scale = getattr(layer, "factor_scale", None)
    return lora_spec_of(layer).scale if scale is None else value_in_scope(scale)


def equation_of(layer: Any) -> str:
    """Returns the einsum equation of a layer, or "" for an embedding."""
    return "" if isinstance(layer, keras.layers.Embedding) else layer.equation


def _add(layer: Any, name: str, shape: tuple[int, ...], initializer: Any) -> keras.Variable:
    """Adds a factor in float32, whatever the precision. It is cast where it is used, except for DoRA's norms."""
    return layer.add_weight(name=name, shape=shape, initializer=initializer, dtype="float32", autocast=False)


def _initial_magnitude(layer: Any) -> jax.Array:
    return kernel_norms(layer.equation, float_kernel(layer))


def float_kernel(layer: Any) -> jax.Array:
    """Returns a layer's frozen kernel in float32, dequantized if necessary."""
    kernel = layer.dequantized() if hasattr(layer, "dequantized") else value_in_scope(layer._kernel)
    return kernel.astype(jnp.float32)


class _Random:
    """An initializer of A that uses NumPy, since JAX would compile a program for each shape.

    Keras's layout gets Keras's HeUniform (arXiv:1502.01852), PEFT's layout PEFT's, uniform within ±1/sqrt(inputs).
    """

    def __init__(self, seeds: _Seeds, layout: str):
        self._seeds, self._gain = seeds, 6.0 if layout == "keras" else 1.0

    def __call__(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        fan_in, _ = compute_fans(shape)
        limit = (self._gain / max(fan_in, 1)) ** 0.5
        return np.random.default_rng(self._seeds).uniform(-limit, limit, shape).astype(dtype)
