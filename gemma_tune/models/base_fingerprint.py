"""A short name for a model's weights, by which an adapter knows its base."""

import hashlib
import math
from typing import Any

import numpy as np

from gemma_tune.models.functional import variables_by_path
from gemma_tune.models.quantized.convert import first_floats
from gemma_tune.models.quantized.layers import NUM_FIRST
from gemma_tune.runtime.backend import keras
from gemma_tune.runtime.processes import fetch_to_host

_FEW = 4


def fingerprint(model: keras.Model) -> str:
    """Returns 16 hexadecimal digits that depend on every base variable's path and shape, and on a sample of its values.

    The values are compared in bfloat16, so that a base loaded in float32 and in bfloat16 has the same fingerprint; of a
    quantized layer they are those before. LoRA factors don't count.
    """
    digest = hashlib.sha256()
    bfloat16 = np.dtype("bfloat16")
    for path, shape, sample in _samples(model):
        digest.update(f"{path}{shape}".encode())
        digest.update(sample.astype(np.float32).astype(bfloat16).tobytes())
    return digest.hexdigest()[:16]


def some_values(model: keras.Model) -> dict[str, Any]:
    """Returns the first few values of every base variable, and the dtype of the weights, as JSON takes them.

    For comparing bases whose rounding differs, as float16's does.
    """
    samples = _samples(model)
    paths = hashlib.sha256("".join(f"{path}{shape}" for path, shape, _ in samples).encode())
    firsts = [sample[:_FEW].astype(np.float32) for _, _, sample in samples]
    return {
        "dtype": str(model.backbone.token_embedding.variable_dtype),
        "paths": paths.hexdigest()[:16],
        "values": [float(f"{value:.4g}") for value in np.concatenate(firsts)],
    }


def _samples(model: keras.Model) -> list[tuple[str, tuple[int, ...], np.ndarray]]:
    """Path, shape and first values of every float variable of the base; of quantized kernels as they were."""
    quantized, codes = first_floats(model.backbone)
    samples = [(path, *sample) for path, sample in quantized.items()]
    for path, variable in variables_by_path(model).items():
        if "lora_" not in path.rsplit("/", 1)[-1] and path not in codes:
            shape = tuple(variable.shape)
            num_rows = -(-NUM_FIRST // max(1, math.prod(shape[1:])))
            first_rows = variable.value[:num_rows] if shape else variable.value  # Of a mesh, only these are gathered.
            samples.append((path, shape, fetch_to_host(first_rows).reshape(-1)[:NUM_FIRST]))
    return sorted(samples, key=lambda sample: sample[0])
