"""Merges LoRA factors into quantized weights, and measures what the rounding loses."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from gemma_tune.errors import ModelError
from gemma_tune.models.layers import is_quantized, lora_layers
from gemma_tune.models.lora.enable import merge_lora
from gemma_tune.models.lora.layers import merged_kernel, remove_factors
from gemma_tune.models.quantized.convert import matrix_shape
from gemma_tune.quantization.codes import dequantize, quantize
from gemma_tune.runtime.backend import jax, keras_hub


class MergeError(NamedTuple):
    """The rounding error of one layer's merged kernel.

    Attributes:
        path: Path of the layer.
        of_weights: Norm of the error / norm of the merged weights.
        of_update: Norm of the error / norm of the LoRA update. From 1 on, the error is as large as what was learnt.
    """

    path: str
    of_weights: float
    of_update: float


def merge_into_codes(backbone: keras_hub.models.Backbone) -> list[MergeError]:
    """Merges LoRA factors into quantized layers: dequantizes each kernel, adds the update, rounds the sum to the
    layer's own scheme, and removes the factors. Float layers are merged exactly.

    Args:
        backbone: Backbone with LoRA on quantized layers.

    Returns:
        Rounding error of each quantized layer.

    Raises:
        ModelError: No quantized layer has factors, or a layer has an input scale, which came from calibration.
    """
    layers = [layer for layer in lora_layers(backbone) if is_quantized(layer)]
    if not layers:
        raise ModelError("No quantized layer has LoRA factors that could be merged.")
    for layer in layers:
        if layer.scheme.has_input_scale:
            raise ModelError(
                f"{layer.path} was quantized with calibration data, without which its codes can't be made again. Merge "
                "into the float model, and quantize that."
            )
    errors = []
    for layer in layers:
        before = layer.dequantized()
        sums = merged_kernel(layer, before)
        update, merged = sums - before, np.asarray(sums.reshape(matrix_shape(layer)), np.float32)
        rounded = quantize(merged, layer.scheme.quant_spec)
        layer.assign_quantized(jax.tree.map(jnp.asarray, rounded))
        remove_factors(layer)
        error = float(np.linalg.norm(dequantize(rounded) - merged))
        of_all, of_update = (float(np.linalg.norm(np.asarray(one))) for one in (merged, update))
        errors.append(MergeError(layer.path, error / of_all, error / of_update if of_update else 0.0))
    merge_lora(backbone)
    return errors
