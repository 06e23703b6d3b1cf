"""A short name for a model's weights, by which an adapter knows its base."""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from gemma_tune.keras_runtime import keras
from gemma_tune.models.functional import variables_by_path

_SAMPLE = 256
_FEW = 4


def fingerprint(model: keras.Model) -> str:
    """Returns 16 hexadecimal digits that depend on every base variable's path and shape, and on a sample of its values.

    The values are compared in bfloat16, so that a base loaded in float32 and in bfloat16 has the same fingerprint. LoRA
    factors don't count.
    """
    digest = hashlib.sha256()
    bfloat16 = np.dtype("bfloat16")
    for path, variable in _base_variables(model):
        sample = np.asarray(variable.value.reshape(-1)[:_SAMPLE])
        digest.update(f"{path}{tuple(variable.shape)}".encode())
        digest.update(sample.astype(np.float32).astype(bfloat16).tobytes())
    return digest.hexdigest()[:16]


def some_values(model: keras.Model) -> dict[str, Any]:
    """Returns the first few values of every base variable, and the dtype of the weights, as JSON takes them.

    For comparing bases whose rounding differs, as float16's does.
    """
    variables = list(_base_variables(model))
    firsts = [np.asarray(variable.value.reshape(-1)[:_FEW], np.float32) for _, variable in variables]
    paths = hashlib.sha256("".join(f"{path}{tuple(variable.shape)}" for path, variable in variables).encode())
    return {
        "dtype": str(model.backbone.token_embedding.variable_dtype),
        "paths": paths.hexdigest()[:16],
        "values": [float(f"{value:.4g}") for value in np.concatenate(firsts)],
    }


def _base_variables(model: keras.Model) -> Iterator[tuple[str, keras.Variable]]:
    for path, variable in sorted(variables_by_path(model).items()):
        if "lora_" not in path.rsplit("/", 1)[-1]:
            yield path, variable
