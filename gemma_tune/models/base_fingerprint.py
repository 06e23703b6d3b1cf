"""Computes a fingerprint of a model's weights, by which an adapter recognizes its base."""

import hashlib
import math
from typing import Any

import numpy as np

from gemma_tune.models.functional import variables_by_path
from gemma_tune.models.layers import quantized_layers
from gemma_tune.runtime.backend import keras
from gemma_tune.runtime.processes import fetch_to_host

# First values of a weight that count. A quantized layer keeps those of its float kernel.
NUM_FINGERPRINT_VALUES = 256
_NUM_COMPARED_VALUES = 4
_NO_WEIGHTS = ("factor_scale", "dropout_rate", "dropout_key")  # Numbers that LoRA's programs take as inputs.


def fingerprint(model: keras.Model) -> str:
    """Returns 16 hexadecimal digits that depend on the path, the shape and the first values of every base weight.

    Values count in bfloat16, so that a base has the same fingerprint in float32 and in bfloat16. A quantized layer
    counts with the float values that it was quantized from. LoRA factors and their numbers don't count.
    """
    digest = hashlib.sha256()
    bfloat16 = np.dtype("bfloat16")
    for path, shape, sample in _samples(model):
        digest.update(f"{path}{shape}".encode())
        digest.update(sample.astype(np.float32).astype(bfloat16).tobytes())
    return digest.hexdigest()[:16]


def sample_values(model: keras.Model) -> dict[str, Any]:
    """Returns the first few values of every base weight and the dtype of the weights, as a JSON-compatible dict.

    They compare bases of different rounding, such as float16 and bfloat16.
    """
    samples = _samples(model)
    paths = hashlib.sha256("".join(f"{path}{shape}" for path, shape, _ in samples).encode())
    firsts = [sample[:_NUM_COMPARED_VALUES].astype(np.float32) for _, _, sample in samples]
    return {
        "dtype": str(model.backbone.token_embedding.variable_dtype),
        "paths": paths.hexdigest()[:16],
        "values": [float(f"{value:.4g}") for value in np.concatenate(firsts)],
    }


def _samples(model: keras.Model) -> list[tuple[str, tuple[int, ...], np.ndarray]]:
    """Returns (path, shape, first values) of every base weight, sorted by path; of a quantized kernel, its floats."""
    quantized = quantized_layers(model.backbone)
    codes = {variable.path for layer in quantized for variable in layer.code_variables}
    samples = [(layer.float_kernel.path, layer.float_kernel.shape, layer.first_floats) for layer in quantized]
    for path, variable in variables_by_path(model).items():
        name = path.rsplit("/", 1)[-1]
        if "lora_" not in name and name not in _NO_WEIGHTS and path not in codes:
            shape = tuple(variable.shape)
            num_rows = -(-NUM_FINGERPRINT_VALUES // max(1, math.prod(shape[1:])))
            first_rows = variable.value[:num_rows] if shape else variable.value  # On a mesh, only these are gathered.
            samples.append((path, shape, fetch_to_host(first_rows).reshape(-1)[:NUM_FINGERPRINT_VALUES]))
    return sorted(samples, key=lambda sample: sample[0])
