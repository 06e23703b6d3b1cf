"""Quantizes a backbone's layers, before a checkpoint is read into them or from the floats that they hold."""

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
    """Quantizes the linear layers of a backbone and its tied embedding.

    In lazy initialization the layers have no values yet: these are quantized as they are read from the checkpoint.
    Otherwise the present values are quantized, layer by layer.

    Args:
        backbone: Backbone without LoRA.
        quant_spec: Quantization spec.
        rounds_inputs: Whether linear layers round their inputs too, to int8 with a scale for each token.

    Returns:
        Path -> scheme of each quantized layer.

    Raises:
        ModelError: A layer can't be quantized; see `schemes_for`.
    """
    schemes = schemes_for(backbone, quant_spec)
    if rounds_inputs:
        embedding = backbone.token_embedding.path
        schemes = {path: one._replace(rounds_inputs=path != embedding) for path, one in schemes.items()}
    apply_schemes(backbone, schemes)
    return schemes


def schemes_for(backbone: keras_hub.models.Backbone, quant_spec: QuantSpec) -> dict[str, LayerScheme]:
    """Returns the scheme that each linear layer and the tied embedding would get, by path.

    Raises:
        ModelError: A layer is quantized or has LoRA factors already, or `block_size` doesn't divide its inputs and the
            spec doesn't allow int8 there.
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
    """Quantizes layers, each to its own scheme.

    Args:
        backbone: Backbone without LoRA.
        schemes: Path -> scheme.

    Raises:
        ModelError: A path names no layer that can be quantized.
    """
    layers = {layer.path: layer for layer in _checked_layers(backbone)}
    if unknown := sorted(set(schemes) - set(layers)):
        raise ModelError(f"The model has no layer {unknown[0]} that could be quantized.")
    for path, scheme in schemes.items():
        quantize_layer(layers[path], scheme)


def quantize_layer(layer: keras.layers.Layer, scheme: LayerScheme) -> None:
    """Quantizes an EinsumDense or a tied ReversibleEmbedding in place, rounding to the nearest code."""
    is_embedding = isinstance(layer, keras.layers.ReversibleEmbedding)
    name = "embeddings" if is_embedding else "kernel"
    variable, shape = getattr(layer, f"_{name}"), matrix_shape(layer)
    value = variable._value
    layer.__class__ = QuantizedEmbedding if is_embedding else QuantizedEinsumDense
    layer.take_scheme(name, variable, shape, scheme)
    if value is not None:
        values = np.asarray(value, np.float32)
        layer.float_kernel.fill(lambda start, stop: values[start:stop])


def _checked_layers(backbone: keras_hub.models.Backbone) -> list[Any]:
    """Returns the linear layers and the tied embedding.

    Raises:
        ModelError: Keras's own quantization holds one of them.
    """
    layers = quantizable_layers(backbone)
    for layer in layers:
        if not is_quantized(layer) and layer.quantization_mode is not None:
            raise ModelError(f"{layer.path} is quantized by Keras itself ({layer.quantization_mode}).")
    return layers


def num_weights(model: Any) -> int:
    """Returns the number of weights of a CausalLM, each counted once whether it is quantized or not."""
    layers = quantized_layers(model.backbone)
    codes = {id(variable) for layer in layers for variable in layer.code_variables}
    others = sum(math.prod(variable.shape) for variable in model.backbone.weights if id(variable) not in codes)
    return others + sum(layer.num_weights for layer in layers)


def matrix_shape(layer: Any) -> tuple[int, int, int]:
    """Returns the shape of a layer's kernel as the [P, C, Q] of `quantization/codes.py`; products sum over C."""
    if isinstance(layer, keras.layers.ReversibleEmbedding):
        return (layer.input_dim, layer.output_dim, 1)
    summed = parse_einsum(layer.equation).summed_indices
    sizes = tuple(layer.float_kernel.shape if is_quantized(layer) else layer._kernel.shape)
    first, last = summed[0], summed[-1] + 1
    return math.prod(sizes[:first]), math.prod(sizes[first:last]), math.prod(sizes[last:])
