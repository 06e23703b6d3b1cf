"""Computes several LoRA adapters of one base model in one batch, in which each row has its own factors.

The factors of all adapters are stacked, those that the model was loaded with first (zeros if it has none), and each row
takes its own by an index. Smaller ranks are padded with zeros, the scale is part of B, and where adapters have
different layouts (models/lora/factors.py), all are converted to PEFT's.
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
    """The LoRA factors of one layer, of `n` adapters.

    Attributes:
        a, b: [n, …] arrays, all in one layout.
        ratio: [n, outputs…] factors that DoRA multiplies the outputs with; None if no adapter uses DoRA.
    """

    a: Any
    b: Any
    ratio: Any = None


class _LayerFactors(NamedTuple):
    """One adapter's factors of one layer. The scale is part of b."""

    equation: str
    lora_spec: LoraSpec
    a: np.ndarray
    b: np.ndarray
    ratio: np.ndarray | None


def stacked_factors(model: keras.Model, adapters: Mapping[str, Path]) -> dict[str, StackedFactors]:
    """Returns layer path -> factors of the model's own LoRA at index 0, and of the adapters from index 1 on.

    The model is left as it was.

    Args:
        model: A CausalLM.
        adapters: Name -> folder that `save_adapter` wrote.

    Raises:
        ConfigError: The model has LoRA factors of its own, and adapters are given.
        ModelError: A folder has no adapter, or one that is for another base or that can't differ between requests.
    """
    own = _factors_of(model)
    if own and adapters:
        raise ConfigError(
            "The model has LoRA factors of its own, so no other adapter can be used with it. Load its base model, and "
            "give its adapter like the others."
        )
    found = [own]
    for path in adapters.values():
        load_adapter(model, path)
        try:
            found.append(_factors_of(model))
        finally:
            _remove_all_factors(model)
    paths = {path for factors in found for path in factors}
    return {path: _stack([factors.get(path) for factors in found]) for path in sorted(paths)}


def apply_row_factors(
    equation: str, x: jax.Array, outputs: jax.Array, factors: StackedFactors, adapters: jax.Array
) -> jax.Array:
    """Returns a layer's outputs with each row's own factors: x·W + (x·A)·B, with DoRA times its ratio.

    Args:
        equation: Einsum equation of the layer, such as `btd,ndh->btnh`.
        x: [B, T, …] inputs.
        outputs: [B, T, …] outputs without factors, x·W.
        factors: Factors of all adapters.
        adapters: [B] int32, index of each row's adapter.
    """
    row, kept = equation[0], equation.split("->")[1]
    a, b = (jnp.take(each, adapters, axis=0).astype(x.dtype) for each in (factors.a, factors.b))
    letters, of_a, of_inner = inner_letters(equation, a.ndim - 1)
    inner = jnp.einsum(f"{letters},{row}{of_a}->{of_inner}", x, a)
    _, of_b, _ = factor_letters(equation, a.ndim - 1)  # Its first letter is the rank: here R, which no equation has.
    outputs = outputs + jnp.einsum(f"{of_inner[:-1]}R,{row}R{of_b[1:]}->{kept}", inner, b)
    if factors.ratio is None:
        return outputs
    ratio = jnp.take(factors.ratio, adapters, axis=0).astype(outputs.dtype)
    return outputs * jnp.expand_dims(ratio, range(1, outputs.ndim - ratio.ndim + 1))


def _factors_of(model: keras.Model) -> dict[str, _LayerFactors]:
    """Returns layer path -> factors of the adapter that is loaded."""
    found = {}
    for layer in lora_layers(model.backbone):
        if not hasattr(layer, "lora_kernel_a") or not hasattr(layer, "equation"):
            raise ModelError(
                f"{layer.path} has LoRA factors that can't differ between requests. Merge them into the base first "
                "(gemma-tune merge), and serve the merged model."
            )
        lora_spec, (a, b, *magnitude) = lora_spec_of(layer), (factor.value for factor in factors_of(layer))
        ratio = None
        for length in magnitude:
            ratio = np.asarray(length / merged_norms(layer.equation, lora_spec.scale, float_kernel(layer), a, b))
        scaled = np.asarray(b, np.float32) * lora_spec.scale
        found[layer.path] = _LayerFactors(layer.equation, lora_spec, np.asarray(a, np.float32), scaled, ratio)
    return found


def _remove_all_factors(model: keras.Model) -> None:
    """Makes the model as it was before an adapter was loaded."""
    for layer in lora_layers(model.backbone):
        remove_factors(layer)
        if type(layer) is keras.layers.EinsumDense:
            layer.__class__ = PlainEinsumDense
    for layer in iter_layers(model.backbone):
        layer.trainable = True


def _stack(found: list[_LayerFactors | None]) -> StackedFactors:
    """Returns one layer's factors of all adapters; zeros for those that leave the layer as it is."""
    there = [own for own in found if own is not None]
    if len({own.a.ndim for own in there}) > 1:
        found = [None if own is None else _in_peft_layout(own) for own in found]
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


def _in_peft_layout(own: _LayerFactors) -> _LayerFactors:
    lora_spec, a, b = to_peft(own.equation, own.lora_spec, own.a, own.b)
    return own._replace(lora_spec=lora_spec, a=a, b=b)
