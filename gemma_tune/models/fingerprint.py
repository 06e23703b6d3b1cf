"""A short name for a model's weights, by which an adapter knows its base."""

import hashlib

import numpy as np

from gemma_tune.keras_runtime import keras
from gemma_tune.models.functional import variables_by_path
from gemma_tune.models.quantize import first_floats
from gemma_tune.models.quantized import NUM_FIRST


def fingerprint(model: keras.Model) -> str:
    """Returns 16 hexadecimal digits that depend on every base variable's path and shape, and on a sample of its values.

    The values are compared in bfloat16, so that a base loaded in float32 and in bfloat16 has the same fingerprint; of a
    quantized layer they are those before. LoRA factors don't count.
    """
    digest = hashlib.sha256()
    bfloat16 = np.dtype("bfloat16")
    samples, quantized = first_floats(model.backbone)
    for path, variable in variables_by_path(model).items():
        if "lora_" not in path.rsplit("/", 1)[-1] and path not in quantized:
            samples[path] = tuple(variable.shape), np.asarray(variable.value.reshape(-1)[:NUM_FIRST])
    for path, (shape, sample) in sorted(samples.items()):
        digest.update(f"{path}{shape}".encode())
        digest.update(sample.astype(np.float32).astype(bfloat16).tobytes())
    return digest.hexdigest()[:16]
