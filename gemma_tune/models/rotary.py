"""Sines and cosines of rotary positions (arXiv:2104.09864) from tables, in training on a CPU.

KerasHub's blocks compute them from the positions whenever they rotate queries or keys, and XLA on CPU merges that into
the rotation, so that every head has its own: 4 % of a Gemma 3 270M's step. Rows begin at position 0, so the tables are
constants of the program. XLA on GPU and TPU loses nothing there.
"""

import functools
from typing import Any

import jax

from gemma_tune.keras_runtime import keras_hub, on_one_cpu

_MOST_ENTRIES = 2**21  # 8,192 positions of width 256. Longer rows have other things to wait for.
Tables = dict[str, tuple[jax.Array, jax.Array]]


def use_rotary_tables(backbone: keras_hub.models.Backbone) -> None:
    """Gives the rotary layers of a backbone tables, on a CPU. Where positions are given, they compute as before."""
    if not on_one_cpu():
        return
    tables: Tables = {}
    for layer in backbone._flatten_layers(include_self=False):
        if isinstance(layer, keras_hub.layers.RotaryEmbedding):
            object.__setattr__(layer, "_compute_cos_sin_embedding", functools.partial(_cos_sin, layer, tables))


def _cos_sin(layer: Any, tables: Tables, inputs: Any, start_index: Any = 0, positions: Any = None) -> Any:
    """Returns cosines and sines, [1, L, …, H] each, for inputs [B, L, …, H]."""
    computed = type(layer)._compute_cos_sin_embedding
    length, width = inputs.shape[1], inputs.shape[-1]
    is_constant = positions is None and isinstance(start_index, int)
    if not is_constant or length * width > _MOST_ENTRIES:
        return computed(layer, inputs, start_index, positions)
    key = repr((_settings(layer), layer.compute_dtype, length, width, inputs.ndim, start_index))
    if key not in tables:
        with jax.ensure_compile_time_eval():
            tables[key] = computed(layer, inputs, start_index)
    return tables[key]


def _settings(layer: Any) -> dict[str, Any]:
    """Wavelength, scaling and so on: layers that have them in common share their tables."""
    plain = {name: value for name, value in vars(layer).items() if isinstance(value, (int, float, str))}
    return {name: value for name, value in plain.items() if name != "name" and not name.startswith("_")}
