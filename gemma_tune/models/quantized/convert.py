"""Gives a backbone's layers quantized kernels: before a checkpoint is read into them, or from the floats they hold."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from gemma_tune.errors import ModelError
from gemma_tune.models.einsum import parse_einsum
from gemma_tune.models.layers import is_quantized, quantizable_layers, quantized_layers
from gemma_tune.models.linear import fitting_spec
from gemma_tune.models.quantized.layers import QuantizedEinsumDense, QuantizedEmbedding
from gemma_tune.quantization.spec import LayerScheme, QuantSpec
from gemma_tune.runtime.backend import keras, keras_hub


def quantize_layers(
    backbone: keras_hub.models.Backbone, quant_spec: QuantSpec, rounds_inputs: bool = False
) -> dict[str, LayerScheme]:
    """Gives all linear layers of the decoder blocks, and the tied embedding, kernels in few bits.

    In a skeleton their values come later, from the checkpoint, and are quantized as they are read. Otherwise those that
    are there are quantized, layer by layer.

    Args:
        backbone: Before LoRA is enabled.
        quant_spec: How.
        rounds_inputs: Linear layers round their inputs too, to int8, token by token.

    Returns:
        How each layer is held, by its path.

    Raises:
        ModelError: As `schemes_for`.
    """
    schemes = schemes_for(backbone, quant_spec)
    if rounds_inputs:
        embedding = backbone.token_embedding.path
        schemes = {path: one._replace(rounds_inputs=path != embedding) for path, one in schemes.items()}
    apply_schemes(backbone, schemes)
    return schemes


def schemes_for(backbone: keras_hub.models.Backbone, quant_spec: QuantSpec) -> dict[str, LayerScheme]:
    """Returns how each linear layer and the tied embedding would be held, by path.

    Raises:
        ModelError: A layer is quantized or has LoRA factors already, or its inputs can't be cut into groups of
            `block_size` and the grid doesn't allow int8 there.
    """
    schemes = {}
    for layer in _checked_layers(backbone):
        if is_quantized(layer):
            raise ModelError(
                f"{layer.path} is held in {layer.quantized_scheme} already. Quantize the float model that it was made "
                "from."
            )
        if getattr(layer, "lora_enabled", False):
            raise ModelError(f"{layer.path} has LoRA factors already. Quantize first, then enable LoRA.")
        schemes[layer.path] = LayerScheme(fitting_spec(layer.path, matrix_shape(layer)[1], quant_spec))
    return schemes


def apply_schemes(backbone: keras_hub.models.Backbone, schemes: Mapping[str, LayerScheme]) -> None:
    """Quantizes the layers of these paths.

    Raises:
        ModelError: A path is of no layer that can be quantized.
    """
    layers = {layer.path: layer for layer in _checked_layers(backbone)}
    if unknown := sorted(set(schemes) - set(layers)):
        raise ModelError(f"The model has no layer {unknown[0]} that could be quantized.")
    for path, scheme in schemes.items():
        quantize_layer(layers[path], scheme)


def quantize_layer(layer: keras.layers.Layer, scheme: LayerScheme) -> None:
    """Quantizes an EinsumDense or a tied ReversibleEmbedding in its place, rounding to the nearest code."""
    is_embedding = isinstance(layer, keras.layers.ReversibleEmbedding)
    name = "embeddings" if is_embedding else "kernel"
    variable, shape = getattr(layer, f"_{name}"), matrix_shape(layer)
    value = variable._value
    layer.__class__ = QuantizedEmbedding if is_embedding else QuantizedEinsumDense
    layer.take_scheme(name, variable, shape, scheme)
    if value is not None:
        values = np.asarray(value, np.float32)
        layer._float_kernel.fill(lambda start, stop: values[start:stop])


def _checked_layers(backbone: keras_hub.models.Backbone) -> list[Any]:
    """Returns the layers that can be quantized.

    Raises:
        ModelError: One of them is of a kind that can't be quantized.
    """
    layers = quantizable_layers(backbone)
    for layer in layers:
        if not is_quantized(layer) and layer.quantization_mode is not None:
            raise ModelError(f"{layer.path} is quantized by Keras itself ({layer.quantization_mode}).")
    return layers


def num_weights(model: Any) -> int:
    """Returns how many numbers a CausalLM's weights stand for, quantized or not."""
    layers = quantized_layers(model.backbone)
    codes = {id(variable) for layer in layers for variable in layer._code_variables}
    others = sum(math.prod(variable.shape) for variable in model.backbone.weights if id(variable) not in codes)
    return others + sum(layer.num_weights for layer in layers)


def matrix_shape(layer: Any) -> tuple[int, int, int]:
    """Returns a kernel's shape as [P, C, Q], where products sum over C."""
    if isinstance(layer, keras.layers.ReversibleEmbedding):
        return (layer.input_dim, layer.output_dim, 1)
    summed = parse_einsum(layer.equation).summed_indices
    sizes = tuple(layer._float_kernel.shape if is_quantized(layer) else layer._kernel.shape)
    first, last = summed[0], summed[-1] + 1
    return math.prod(sizes[:first]), math.prod(sizes[first:last]), math.prod(sizes[last:])
