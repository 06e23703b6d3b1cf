"""A layer's weights as floats: codes taken apart and LoRA added, without changing the layer."""

from collections.abc import Callable
from typing import Any

import numpy as np

from gemma_tune.models.lora import lora_update
from gemma_tune.models.quantize import is_quantized
from gemma_tune.quantization.grids import dequantize, rows_of

ROWS_AT_ONCE = 4096  # Of an embedding; a multiple of 256, as doubly quantized scales ask for.


def float_kernel(layer: Any) -> np.ndarray:
    """Returns an EinsumDense layer's kernel in its own shape, float32."""
    if is_quantized(layer):
        kernel = np.asarray(dequantize(layer.quantized()), np.float32).reshape(layer._float_kernel.shape)
    else:
        kernel = np.asarray(layer._kernel.value, np.float32)
    return kernel + np.asarray(lora_update(layer), np.float32) if layer.lora_enabled else kernel


def embedding_rows(layer: Any) -> Callable[[int, int], np.ndarray]:
    """Returns a function of (start, stop) that gives rows of a tied embedding, float32.

    start must be a multiple of ROWS_AT_ONCE, and stop at most that much further.
    """
    update = np.asarray(lora_update(layer), np.float32) if layer.lora_enabled else None

    def rows(start: int, stop: int) -> np.ndarray:
        if is_quantized(layer):
            values = np.asarray(dequantize(rows_of(layer.quantized(), start, stop - start)), np.float32)[..., 0]
        else:
            values = np.asarray(layer._embeddings.value[start:stop], np.float32)
        return values if update is None else values + update[start:stop]

    return rows
