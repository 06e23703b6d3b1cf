"""LoRA merged into quantized weights, where it must be rounded, and what that costs."""

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
    """What rounding did to a layer's kernel with its LoRA update.

    of_weights: norm of the error / norm of the merged weights. of_update: norm of the error / norm of the update; at 1
    and above, the rounding is as large as what was learnt.
    """

    path: str
    of_weights: float
    of_update: float


def merge_into_codes(backbone: keras_hub.models.Backbone) -> list[MergeError]:
    """Adds each quantized layer's LoRA update to its dequantized kernel, rounds that to the layer's own grid again, and
    takes the factors away. Float layers are merged exactly.

    Args:
        backbone: With LoRA on quantized layers.

    Returns:
        The errors, layer by layer.

    Raises:
        ModelError: There are no factors on quantized layers, or a layer has a scale for its inputs, which came from
            calibration.
    """
    layers = [layer for layer in lora_layers(backbone) if is_quantized(layer)]
    if not layers:
        raise ModelError("There are no LoRA factors on quantized layers to be merged.")
    for layer in layers:
        if layer.scheme.has_input_scale:
            raise ModelError(
                f"{layer.path} was calibrated: its codes can't be made anew without the data. Merge into floats, and "
                "quantize these."
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
