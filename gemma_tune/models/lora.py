"""LoRA on KerasHub layers: which layers, enabling it, and a faster way through the factors.

A linear layer with kernel W computes x·W + (alpha/rank)·(x·A)·B (arXiv:2106.09685, equation 3). A and B are Keras's own
variables, `lora_kernel_a` and `lora_kernel_b`, in Keras's layout: A has W's shape with its last axis replaced by rank,
B is [rank, last axis].
"""

import functools
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from keras import ops
from keras.src.initializers.random_initializers import compute_fans

from gemma_tune.errors import ModelError, did_you_mean
from gemma_tune.keras_runtime import keras, keras_hub
from gemma_tune.models.linear import PlainEinsumDense, einsum_product

GROUPS = {
    "attention": ("query", "key", "value", "attention_output"),
    "all-linear": ("query", "key", "value", "attention_output", "ffw_gating", "ffw_gating_2", "ffw_linear"),
}


class LowRankEinsumDense(keras.layers.EinsumDense):
    """An EinsumDense that sends its input through A and B instead of adding A·B to its kernel.

    Keras computes x·(W + s·A·B), so that the backward pass makes the gradient of a whole kernel first. Here no array of
    the kernel's size is made. It is given to layers that already exist by `layer.__class__ = LowRankEinsumDense`.
    """

    def call(self, inputs, training=None):
        kernel, *factors = (
            ops.cast(variable, inputs.dtype) for variable in (self._kernel, self.lora_kernel_a, self.lora_kernel_b)
        )
        outputs = einsum_product(self.equation, inputs, kernel)
        outputs = ops.add(outputs, low_rank_product(self.equation, self.lora_alpha / self.lora_rank, inputs, *factors))
        if self.bias is not None:
            outputs = ops.add(outputs, self.bias)
        return outputs if self.activation is None else self.activation(outputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def low_rank_product(equation: str, scale: float, x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns scale·(x·A)·B.

    Its gradients are those of the definition. They are written out, because the ones that JAX derives transpose the
    gradient of the outputs, which is the largest array here; these transpose arrays of width rank.

    Args:
        equation: Of the layer, such as `btd,ndh->btnh`: x·A replaces its last letter by the rank.
        scale: alpha / rank.
        x: Inputs, [B, L, …].
        a: The kernel's shape, with its last axis replaced by rank.
        b: [rank, last axis of the kernel].
    """
    return (scale * jnp.einsum(equation, x, a)) @ b


def _low_rank_forward(equation, scale, x, a, b):
    inner = scale * jnp.einsum(equation, x, a)
    return inner @ b, (x, a, b, inner)


def _low_rank_backward(equation, scale, saved, gradient):
    x, a, b, inner = saved
    inputs, kernel, outputs = equation.replace("->", ",").split(",")
    rank, width = b.shape
    b_gradient = inner.reshape(-1, rank).T @ gradient.reshape(-1, width)
    inner_gradient = scale * (gradient @ b.T)
    # The einsum's own gradients: in each, one operand and the output change places.
    x_gradient = jnp.einsum(f"{outputs},{kernel}->{inputs}", inner_gradient, a)
    rank_first = kernel[-1] + kernel[:-1]
    a_gradient = jnp.moveaxis(jnp.einsum(f"{outputs},{inputs}->{rank_first}", inner_gradient, x), 0, -1)
    return x_gradient, a_gradient, b_gradient


low_rank_product.defvjp(_low_rank_forward, _low_rank_backward)


def enable_lora(
    backbone: keras_hub.models.Backbone, rank: int, alpha: float, target_layers: Sequence[str], seed: int
) -> int:
    """Freezes the backbone and gives the named layers trainable factors; A random, B zero, so that nothing changes at
    first.

    Args:
        backbone: With its weights loaded, since loading afterwards would overwrite A and B with zeros.
        rank: Width of the factors.
        alpha: The update is scaled by alpha / rank.
        target_layers: Layer names, or a key of GROUPS.
        seed: Of A.

    Returns:
        Number of layers that got factors.

    Raises:
        ModelError: LoRA is on already, or no layer has one of the names; lists those there are.
    """
    names = {name for target in target_layers for name in GROUPS.get(target, (target,))}
    layers = [layer for layer in backbone._flatten_layers(include_self=False) if layer.weights]
    if any(getattr(layer, "lora_enabled", False) for layer in layers):
        raise ModelError("LoRA is already enabled on this model. Load the model anew for other factors.")
    available = sorted({layer.name for layer in layers if hasattr(layer, "enable_lora")})
    unknown = sorted(names - set(available)) if not set(target_layers) & set(GROUPS) else []
    chosen = [index for index, layer in enumerate(layers) if layer.name in names and hasattr(layer, "enable_lora")]
    if unknown or not chosen:
        wrong = unknown or sorted(names)
        raise ModelError(
            f"No layer matches lora.target_layers={','.join(wrong)}.{did_you_mean(wrong[0], [*available, *GROUPS])} "
            f"Layers: {', '.join(available)}. Groups: {', '.join(GROUPS)}."
        )
    enable_on_layers(backbone, chosen, rank, alpha, seed)
    return len(chosen)


def enable_on_layers(
    backbone: keras_hub.models.Backbone, indices: Sequence[int], rank: int, alpha: float, seed: int
) -> None:
    """Like `enable_lora`, for layers by their place among those with weights, as KerasHub's `.lora.h5` files count
    them.
    """
    layers = [layer for layer in backbone._flatten_layers(include_self=False) if layer.weights]
    backbone.trainable = True
    for layer in backbone._flatten_layers(include_self=False):
        layer.trainable = False
    for index in indices:
        layer = layers[index]
        if hasattr(layer, "quantized_scheme") and isinstance(layer, keras.layers.Embedding):
            raise ModelError(
                f"{layer.path} is quantized, and can't have LoRA factors. Leave it out of lora.target_layers."
            )
        layer.trainable = True
        seeds = [seed, zlib.crc32(layer.path.encode())]
        layer.enable_lora(rank, lora_alpha=alpha, a_initializer=functools.partial(_he_uniform, seeds))
        if type(layer) in (keras.layers.EinsumDense, PlainEinsumDense):
            layer.__class__ = LowRankEinsumDense
    # KerasHub's save_lora_weights reads these two.
    backbone._lora_enabled_layers = list(indices)
    backbone._lora_rank = rank


def _he_uniform(seeds: list[int], shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """As Keras's HeUniform (arXiv:1502.01852), by NumPy: JAX would compile a program for each shape."""
    fan_in, _ = compute_fans(shape)
    limit = (6.0 / max(fan_in, 1)) ** 0.5
    return np.random.default_rng(seeds).uniform(-limit, limit, shape).astype(dtype)


def lora_layers(backbone: keras_hub.models.Backbone) -> list[keras.layers.Layer]:
    """Returns the layers that have factors."""
    return [layer for layer in backbone._flatten_layers(include_self=False) if getattr(layer, "lora_enabled", False)]


def merge_lora(backbone: keras_hub.models.Backbone) -> None:
    """Adds each layer's (alpha/rank)·A·B to its kernel, in float32, and takes the factors away.

    The model computes the same as before.
    """
    for layer in lora_layers(backbone):
        if hasattr(layer, "quantized_scheme"):
            raise ModelError(
                f"LoRA can't be merged into {layer.path}, which is held in {layer.quantized_scheme}: rounding would "
                "lose it. Load the model without quantization, and merge there."
            )
        weights = layer._embeddings if hasattr(layer, "lora_embeddings_a") else layer._kernel
        update = lora_update(layer)
        weights.assign(ops.cast(ops.cast(weights.value, "float32") + update, weights.dtype))
        remove_factors(layer)
        if type(layer) is LowRankEinsumDense:
            layer.__class__ = keras.layers.EinsumDense
        weights.trainable = True
    for layer in backbone._flatten_layers(include_self=False):
        layer.trainable = True


def lora_update(layer: keras.layers.Layer) -> jax.Array:
    """Returns (alpha/rank)·A·B, of the kernel's shape."""
    return (layer.lora_alpha / layer.lora_rank) * ops.matmul(*(factor.value for factor in _factors(layer)))


def remove_factors(layer: keras.layers.Layer) -> None:
    """Takes a layer's factors away."""
    layer._tracker.unlock()
    for factor in _factors(layer):
        layer._untrack_variable(factor)
    layer._tracker.lock()
    layer.lora_enabled, layer.lora_rank = False, None


def _factors(layer: keras.layers.Layer) -> list[keras.Variable]:
    kind = "embeddings" if hasattr(layer, "lora_embeddings_a") else "kernel"
    return [getattr(layer, f"lora_{kind}_{letter}") for letter in "ab"]
