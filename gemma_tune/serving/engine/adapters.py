"""Several LoRA adapters on one base model in one batch: each row has its own factors.

The factors of all adapters are stacked, those of the model as it was loaded first (zeros, if it has none), and each row
takes its own by an index. Smaller ranks are filled up with zeros, the scale is part of B, and where adapters have other
layouts (models/lora/factors.py), they are all of PEFT's.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma_tune.errors import ConfigError, ModelError
from gemma_tune.models.layers import iter_layers, lora_layers
from gemma_tune.models.linear import PlainEinsumDense
from gemma_tune.models.lora.adapter import load_adapter
from gemma_tune.models.lora.factors import LoraSpec, factor_letters, inner_letters, merged_norms
from gemma_tune.models.lora.layers import factors_of, float_kernel, lora_spec_of, remove_factors
from gemma_tune.models.lora.layouts import to_peft
from gemma_tune.runtime.backend import keras


class StackedFactors(NamedTuple):
    """Of one layer, for `n` adapters of a model.

    a, b: [n, …], of either layout. ratio: [n, outputs…], what DoRA multiplies the outputs with; None if no adapter is
        of DoRA.
    """

    a: Any
    b: Any
    ratio: Any = None


class _Own(NamedTuple):
    """One adapter's factors of one layer; the scale is part of b."""

    equation: str
    lora_spec: LoraSpec
    a: np.ndarray
    b: np.ndarray
    ratio: np.ndarray | None


def stacked_factors(model: keras.Model, adapters: Mapping[str, Path]) -> dict[str, StackedFactors]:
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


def apply_row_factors(
    equation: str, x: jax.Array, outputs: jax.Array, factors: StackedFactors, of_rows: jax.Array
) -> jax.Array:
    """Returns a layer's outputs with each row's own factors: (x·W + (x·A)·B), with DoRA times its ratio.

    Args:
        equation: Of the layer, such as `btd,ndh->btnh`.
        x: [B, T, …].
        outputs: x·W.
        factors: Of all adapters.
        of_rows: [B] int32, which is each row's.
    """
    row, kept = equation[0], equation.split("->")[1]
    a, b = (jnp.take(each, of_rows, axis=0).astype(x.dtype) for each in (factors.a, factors.b))
    letters, of_a, of_inner = inner_letters(equation, a.ndim - 1)
    inner = jnp.einsum(f"{letters},{row}{of_a}->{of_inner}", x, a)
    _, of_b, _ = factor_letters(equation, a.ndim - 1)  # Its first letter is the rank; here R, which no equation has.
    outputs = outputs + jnp.einsum(f"{of_inner[:-1]}R,{row}R{of_b[1:]}->{kept}", inner, b)
    if factors.ratio is None:
        return outputs
    ratio = jnp.take(factors.ratio, of_rows, axis=0).astype(outputs.dtype)
    return outputs * jnp.expand_dims(ratio, range(1, outputs.ndim - ratio.ndim + 1))


def _factors_of(model: keras.Model) -> dict[str, _Own]:
    found = {}
    for layer in lora_layers(model.backbone):
        if not hasattr(layer, "lora_kernel_a") or not hasattr(layer, "equation"):
            raise ModelError(
                f"{layer.path} has LoRA factors that can't be used row by row. Merge them into the base first "
                "(gemma-tune merge), and serve the merged model."
            )
        lora_spec, (a, b, *magnitude) = lora_spec_of(layer), (factor.value for factor in factors_of(layer))
        ratio = None
        for length in magnitude:
            ratio = np.asarray(length / merged_norms(layer.equation, lora_spec.scale, float_kernel(layer), a, b))
        scaled = np.asarray(b, np.float32) * lora_spec.scale
        found[layer.path] = _Own(layer.equation, lora_spec, np.asarray(a, np.float32), scaled, ratio)
    return found


def _take_away(model: keras.Model) -> None:
    for layer in lora_layers(model.backbone):
        remove_factors(layer)
        if type(layer) is keras.layers.EinsumDense:
            layer.__class__ = PlainEinsumDense
    for layer in iter_layers(model.backbone):
        layer.trainable = True


def _stack(found: list[_Own | None]) -> StackedFactors:
    there = [own for own in found if own is not None]
    if len({own.a.ndim for own in there}) > 1:
        found = [None if own is None else _in_pefts_layout(own) for own in found]
        there = [own for own in found if own is not None]
    rank = max(own.b.shape[0] for own in there)
    a_shape, b_shape = there[0].a.shape[:-1], there[0].b.shape[1:]
    a, b = np.zeros((len(found), *a_shape, rank), np.float32), np.zeros((len(found), rank, *b_shape), np.float32)
    ratios = [own.ratio for own in there if own.ratio is not None]
    ratio = np.ones((len(found), *ratios[0].shape), np.float32) if ratios else None
    for index, own in enumerate(found):
        if own is not None:
            a[index, ..., : own.b.shape[0]], b[index, : own.b.shape[0]] = own.a, own.b
            if ratio is not None and own.ratio is not None:
                ratio[index] = own.ratio
    return StackedFactors(jnp.asarray(a), jnp.asarray(b), None if ratio is None else jnp.asarray(ratio))


def _in_pefts_layout(own: _Own) -> _Own:
    lora_spec, a, b = to_peft(own.equation, own.lora_spec, own.a, own.b)
    return own._replace(lora_spec=lora_spec, a=a, b=b)
