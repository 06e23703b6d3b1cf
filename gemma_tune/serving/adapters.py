"""Several LoRA adapters on one base model in one batch: each row has its own factors.

The factors of all adapters are stacked, those of the model as it was loaded first (zeros, if it has none), and each row
takes its own by an index. Smaller ranks are filled up with zeros, and alpha / rank is part of B.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma_tune.errors import ConfigError, ModelError
from gemma_tune.keras_runtime import keras
from gemma_tune.models.adapter import load_adapter
from gemma_tune.models.linear import PlainEinsumDense
from gemma_tune.models.lora import LowRankEinsumDense, lora_layers, remove_factors


class Factors(NamedTuple):
    """Of one layer, for `n` adapters of a model.

    a: [n, *the kernel's shape with its last axis replaced by R]. b: [n, R, last axis of the kernel].
    """

    a: Any
    b: Any


def stacked_factors(model: keras.Model, adapters: Mapping[str, Path]) -> dict[str, Factors]:
    """Returns layer path -> factors of the model's own LoRA, index 0, and of each adapter, from 1 on, in their order.

    The model is as before afterwards.

    Args:
        model: A CausalLM.
        adapters: Name -> what `save_adapter` wrote.

    Raises:
        ConfigError: The model has LoRA factors itself and there are other adapters.
        ModelError: No adapter there, for another base, or of a kind that can't be used row by row.
    """
    own = _factors_of(model)
    if own and adapters:
        raise ConfigError(
            "The model has LoRA factors of its own, so that adapters don't fit on it. Load its base, and name its "
            "adapter like the others."
        )
    found = [own]
    for path in adapters.values():
        load_adapter(model, path)
        try:
            found.append(_factors_of(model))
        finally:
            _take_away(model)
    paths = {path for factors in found for path in factors}
    return {path: _stack([factors.get(path) for factors in found]) for path in sorted(paths)}


def low_rank_rows(equation: str, x: jax.Array, factors: Factors, of_rows: jax.Array) -> jax.Array:
    """Returns (x·A)·B for each row with its own adapter's factors.

    Args:
        equation: Of the layer, such as `btd,ndh->btnh`.
        x: [B, T, …].
        factors: Of all adapters.
        of_rows: [B] int32, which is each row's.
    """
    inputs, axes, outputs = equation.replace("->", ",").split(",")
    a, b = (jnp.take(each, of_rows, axis=0).astype(x.dtype) for each in factors)
    row = inputs[0]
    inner = jnp.einsum(f"{inputs},{row}{axes[:-1]}R->{outputs[:-1]}R", x, a)
    return jnp.einsum(f"{outputs[:-1]}R,{row}R{outputs[-1]}->{outputs}", inner, b)


def _factors_of(model: keras.Model) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    found = {}
    for layer in lora_layers(model.backbone):
        if not hasattr(layer, "lora_kernel_a") or not hasattr(layer, "equation"):
            raise ModelError(
                f"{layer.path} has LoRA factors that can't be used row by row. Merge them into the base first "
                "(gemma-tune merge), and serve the merged model."
            )
        a, b = (np.asarray(factor.value, np.float32) for factor in (layer.lora_kernel_a, layer.lora_kernel_b))
        found[layer.path] = a, b * (layer.lora_alpha / layer.lora_rank)
    return found


def _take_away(model: keras.Model) -> None:
    for layer in lora_layers(model.backbone):
        remove_factors(layer)
        if type(layer) is LowRankEinsumDense:
            layer.__class__ = PlainEinsumDense
    for layer in model.backbone._flatten_layers(include_self=False):
        layer.trainable = True


def _stack(found: list[tuple[np.ndarray, np.ndarray] | None]) -> Factors:
    rank = max(b.shape[0] for _, b in filter(None, found))
    a_shape, b_shape = next((a.shape[:-1], b.shape[1:]) for a, b in filter(None, found))
    a, b = np.zeros((len(found), *a_shape, rank), np.float32), np.zeros((len(found), rank, *b_shape), np.float32)
    for index, factors in enumerate(found):
        if factors is not None:
            own = factors[1].shape[0]
            a[index, ..., :own], b[index, :own] = factors
    return Factors(jnp.asarray(a), jnp.asarray(b))
