"""Reads the sines and cosines of rotary positions (arXiv:2104.09864) from tables, in training on a CPU.

KerasHub's blocks compute them from the positions whenever they rotate queries or keys. XLA on CPU fuses that into the
rotation, so that they are computed again for every head: 4 % of a training step of Gemma 3 270M. Rows begin at position
0, so the tables are constants of the program. On GPU and TPU there is nothing to gain.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from gemma_tune.models.layers import iter_layers
from gemma_tune.runtime.backend import is_single_cpu, keras_hub

MAX_TABLE_ENTRIES = 2**21  # 8,192 positions of width 256. In longer rows attention takes most of the time.
Tables = dict[tuple, tuple[np.ndarray, np.ndarray]]


def use_rotary_tables(backbone: keras_hub.models.Backbone) -> None:
    """Makes the rotary layers of a backbone use tables, on a CPU. Called with positions, they compute as before."""
    if not is_single_cpu():
        return
    tables: Tables = {}
    for layer in iter_layers(backbone, keras_hub.layers.RotaryEmbedding):
        object.__setattr__(layer, "_compute_cos_sin_embedding", functools.partial(_cos_sin, layer, tables))


def _cos_sin(layer: Any, tables: Tables, inputs: Any, start_index: Any = 0, positions: Any = None) -> Any:
    """Returns the cosines and sines, [1, L, …, H] each, for inputs [B, L, …, H]."""
    length, width = inputs.shape[1], inputs.shape[-1]
    is_constant = positions is None and isinstance(start_index, int)
    if not is_constant or layer.rope_type != "linear" or length * width > MAX_TABLE_ENTRIES:
        return type(layer)._compute_cos_sin_embedding(layer, inputs, start_index, positions)
    settings = layer.max_wavelength, layer.scaling_factor, layer.denominator_dim, layer.compute_dtype
    key = *settings, start_index, length, width, inputs.ndim
    if key not in tables:
        tables[key] = _table(layer, start_index, length, width, inputs.ndim)
    return tables[key]


def _table(layer: Any, start_index: int, length: int, width: int, num_axes: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the cosines and sines of consecutive positions, computed in float32 as the layer does.

    By NumPy, since JAX would compile each operation first.
    """
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(layer.denominator_dim or width)
    frequencies = np.float32(layer.max_wavelength) ** -exponents / np.float32(layer.scaling_factor)
    angles = np.outer(np.arange(start_index, start_index + length, dtype=np.float32), frequencies)
    angles = np.concatenate([angles, angles], axis=1).reshape(1, length, *[1] * (num_axes - 3), width)
    dtype = jnp.dtype(layer.compute_dtype)
    return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)
