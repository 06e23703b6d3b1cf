"""Finds layers inside a KerasHub backbone, by what they are.

This is the only place that calls Keras's private `_flatten_layers`. Layers come in the order in which Keras counts
them, which files and seeds depend on.
"""

from collections.abc import Iterator
from typing import Any

from gemma_tune.runtime.backend import keras, keras_hub


def iter_layers(parent: keras.layers.Layer, kind: type = keras.layers.Layer) -> Iterator[Any]:
    """Yields the layers inside a backbone, a decoder block or another layer, at any depth, without that layer itself.

    Args:
        parent: Layer to look into.
        kind: Class of the layers that are yielded.
    """
    for layer in parent._flatten_layers(include_self=False):
        if isinstance(layer, kind):
            yield layer


def linear_layers(parent: keras.layers.Layer) -> list[Any]:
    """Returns the linear (EinsumDense) layers of a backbone or a decoder block."""
    return list(iter_layers(parent, keras.layers.EinsumDense))


def quantizable_layers(backbone: keras_hub.models.Backbone) -> list[Any]:
    """Returns the layers whose weights can be quantized: the linear layers and the tied embedding."""
    embedding = backbone.token_embedding
    return [
        layer for layer in iter_layers(backbone) if layer is embedding or isinstance(layer, keras.layers.EinsumDense)
    ]


def is_quantized(layer: Any) -> bool:
    """Returns whether a layer holds its kernel in few bits, as `models.quantized` does."""
    return hasattr(layer, "quantized_scheme")


def quantized_layers(backbone: keras_hub.models.Backbone) -> list[Any]:
    """Returns the layers that hold their kernel in few bits."""
    return [layer for layer in iter_layers(backbone) if is_quantized(layer)]


def lora_layers(backbone: keras_hub.models.Backbone) -> list[Any]:
    """Returns the layers that have LoRA factors."""
    return [layer for layer in iter_layers(backbone) if getattr(layer, "lora_enabled", False)]
