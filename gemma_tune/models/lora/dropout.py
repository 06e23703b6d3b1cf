"""Dropout on the input of LoRA's first factor (arXiv:1207.0580), as in PEFT: in training alone.

A layer's rate and random key are variables, which are zero: the layer then computes without dropout. A training step
puts others in their place. The key follows from the seed of the run, the step, the micro-batch and the layer's path, so
that a resumed run draws the same masks, and so does a program that computes a block a second time.
"""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_tune.models.functional import value_in_scope
from gemma_tune.models.layers import lora_layers
from gemma_tune.runtime.backend import keras, keras_hub

DropoutValues = Callable[[Any, Any, Any, Any], dict[str, jax.Array]]


def enable_dropout(backbone: keras_hub.models.Backbone) -> None:
    """Gives the linear layers with LoRA factors a rate and a key. The backbone computes the same until they change.

    The factors of an embedding have no dropout, as in PEFT.
    """
    for layer in lora_layers(backbone):
        if isinstance(layer, keras.layers.Embedding):
            continue
        constant = {"initializer": "zeros", "trainable": False, "autocast": False}
        layer._tracker.unlock()
        layer.dropout_rate = layer.add_weight(name="dropout_rate", shape=(), dtype="float32", **constant)
        layer.dropout_key = layer.add_weight(name="dropout_key", shape=(2,), dtype="uint32", **constant)
        layer._tracker.lock()


def has_dropout(layer: Any) -> bool:
    """Returns whether a layer has a rate and a key."""
    return getattr(layer, "dropout_rate", None) is not None


def remove_dropout(layer: Any) -> None:
    """Removes a layer's rate and key, if it has them."""
    if has_dropout(layer):
        layer._tracker.unlock()
        for name in ("dropout_rate", "dropout_key"):
            layer._untrack_variable(layer.__dict__.pop(name))
        layer._tracker.lock()


def drop_out(layer: Any, inputs: jax.Array) -> jax.Array:
    """Returns inputs of which some are zero, by the layer's rate and key, and the others are larger instead."""
    if not has_dropout(layer):
        return inputs
    rate, key = value_in_scope(layer.dropout_rate), value_in_scope(layer.dropout_key)

    def dropped(inputs: jax.Array) -> jax.Array:
        is_kept = jax.random.bernoulli(jax.random.wrap_key_data(key, impl="threefry2x32"), 1 - rate, inputs.shape)
        return jnp.where(is_kept, inputs / (1 - rate).astype(inputs.dtype), 0)

    # A branch, so that evaluation, which shares programs with training, draws no random numbers.
    return jax.lax.cond(rate > 0, dropped, lambda inputs: inputs, inputs)


def make_dropout_values(backbone: keras_hub.models.Backbone) -> DropoutValues | None:
    """Returns (rate, seed, step, micro-batch) -> values of all rates and keys by path; None without dropout.

    Args:
        backbone: Backbone, with `enable_dropout` or without.
    """
    layers = [layer for layer in lora_layers(backbone) if has_dropout(layer)]
    if not layers:
        return None
    numbers = np.array([zlib.crc32(layer.path.encode()) for layer in layers], np.uint32)
    rates, keys = [layer.dropout_rate.path for layer in layers], [layer.dropout_key.path for layer in layers]

    def values(rate: Any, seed: Any, step: Any, micro_batch: Any) -> dict[str, jax.Array]:
        key = jax.random.key(seed, impl="threefry2x32")
        key = jax.random.fold_in(jax.random.fold_in(key, step), micro_batch)
        by_layer = jax.random.key_data(jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers))
        return dict.fromkeys(rates, rate) | dict(zip(keys, by_layer, strict=True))

    return values
