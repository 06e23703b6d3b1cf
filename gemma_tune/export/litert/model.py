"""Writes a Gemma for LiteRT (TensorFlow Lite): `model.tflite`, its tokenizer, and `litert.json`, which says lengths.

The file has two signatures, named and shaped as those of Google's litert-torch, with KerasHub's own layers in them:

    prefill_P: tokens [1, P], input_pos [P], kv_cache_k_0 [1, C, K, H], kv_cache_v_0, … -> kv_cache_k_0, …
    decode: tokens [1, 1], input_pos [1], kv_cache_k_0, … -> logits [1, 1, V], kv_cache_k_0, …

input_pos counts from 0. A prompt's last token goes to `decode`, whose logits are those of the answer's first. The
others go to `prefill_P`, P at a time; what fills up the last of these doesn't matter, since decoding writes over it. No
position may reach C.

JAX makes StableHLO of the model, and TensorFlow's converter a flatbuffer of that. TensorFlow is imported here alone.
"""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma_tune.data.chat_template import template_for
from gemma_tune.errors import ModelError
from gemma_tune.export.litert.cache_layout import CacheParts, cache_parts
from gemma_tune.models.family import family_of
from gemma_tune.models.functional import parameters, params_scope
from gemma_tune.models.layers import lora_layers, quantized_layers
from gemma_tune.models.lora.enable import merge_lora
from gemma_tune.models.quantized.convert import num_weights
from gemma_tune.models.shared_copy import shared_copy
from gemma_tune.models.sources.tokenizer import tokenizer_of

MODEL_FILE, TOKENIZER_FILE, SETTINGS_FILE = "model.tflite", "tokenizer.model", "litert.json"
WEIGHTS = ("float32", "int8")
# A flatbuffer's offsets have 31 bits, and the converter makes one of floats before it rounds.
_MOST_BYTES = 2**31 - 2**24
_COPIES = 2  # On the disk while converting: TensorFlow's variables, and the file.


class Lengths(NamedTuple):
    """prefill: Tokens that one call reads, P. cache: Tokens that a conversation may have, C."""

    prefill: int = 64
    cache: int = 1024


DEFAULT_LENGTHS = Lengths()


def write_litert(
    model: Any, directory: str | os.PathLike, *, lengths: Lengths = DEFAULT_LENGTHS, weights: str = "float32"
) -> Path:
    """Writes a model for LiteRT.

    Args:
        model: A CausalLM in float32 with its tokenizer. LoRA counts as merged; the model stays as it is.
        directory: Exists. Files of these names in it are overwritten.
        lengths: What one call reads, and what a conversation may have.
        weights: `float32`; or `int8`: products take weights in 8 bits, with a scale for each channel, and round their
            inputs too (LiteRT's dynamic range quantization).

    Returns:
        The .tflite file.

    Raises:
        ModelError: The file would be larger than a flatbuffer can be, the model is quantized or not in float32, or the
            lengths make no sense.
    """
    check_litert(model, lengths, weights)
    if lora_layers(model.backbone):
        model = shared_copy(model)
        merge_lora(model.backbone)
    folder = Path(directory)
    path = folder / MODEL_FILE
    path.write_bytes(_convert(model, lengths, weights, folder))
    tokenizer, family = tokenizer_of(model), family_of(model)
    (folder / TOKENIZER_FILE).write_bytes(tokenizer.proto)
    settings = {
        "family": family,
        "weights": weights,
        "prefill_length": lengths.prefill,
        "cache_length": lengths.cache,
        "bos_id": tokenizer.bos_id,
        "stop_ids": [tokenizer.id_of(template_for(family).end_of_turn), tokenizer.eos_id],
    }
    (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return path


def estimate_litert(model: Any) -> int:
    """Returns about how many bytes converting takes on the disk."""
    return _COPIES * 4 * num_weights(model)


def check_litert(model: Any, lengths: Lengths, weights: str) -> None:
    """Raises what `write_litert` would, before anything is made."""
    if weights not in WEIGHTS:
        raise ModelError(f"LiteRT weights must be one of {', '.join(WEIGHTS)}; got {weights!r}.")
    if not 1 <= lengths.prefill < lengths.cache:
        raise ModelError(f"LiteRT lengths: prefill must be at least 1 and below cache; got {lengths}.")
    if quantized_layers(model.backbone):
        raise ModelError("A quantized model can't be exported to LiteRT. Take the float model, with LiteRT's own int8.")
    if model.backbone.compute_dtype != "float32" or model.backbone.variable_dtype != "float32":
        raise ModelError(
            f"LiteRT export takes a model in float32; this is in {model.backbone.dtype_policy.name}. Load it with "
            "--precision=float32."
        )
    size = 4 * num_weights(model)
    if size > _MOST_BYTES:
        raise ModelError(
            f"The model takes {size / 1e9:.1f} GB in float32, and a .tflite file holds 2 GB at most, also while int8 "
            "is made of it. Export to --format=gguf, or take a Gemma 3 270M."
        )


def _convert(model: Any, lengths: Lengths, weights: str, folder: Path) -> bytes:
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")  # Nothing is computed here, and JAX has it.
    groups = parameters(model)
    params = {**groups.trainable, **groups.frozen}
    module = tf.Module()
    module.values = [tf.Variable(np.asarray(value), trainable=False) for value in params.values()]
    parts = cache_parts(model, lengths.cache)
    steps = {
        f"prefill_{lengths.prefill}": (lengths.prefill, False),
        "decode": (1, True),
    }
    signatures = {
        name: _signature(tf, module.values, _step(model, list(params), parts, with_logits), parts, length)
        for name, (length, with_logits) in steps.items()
    }
    with tempfile.TemporaryDirectory(prefix=".converting-", dir=folder) as saved:
        tf.saved_model.save(module, saved, signatures=signatures)
        converter = tf.lite.TFLiteConverter.from_saved_model(saved, signature_keys=list(signatures))
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
        if weights == "int8":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        return converter.convert()


def _step(model: Any, paths: list[str], parts: CacheParts, with_logits: bool) -> Callable[..., dict[str, jax.Array]]:
    """Returns f(values, tokens, input_pos, cache by name) in JAX."""

    def step(values: Any, tokens: jax.Array, input_pos: jax.Array, named: dict[str, jax.Array]) -> dict[str, jax.Array]:
        with params_scope(model, dict(zip(paths, values, strict=True))):
            logits, _, cache = model.call_with_cache(tokens, parts.join(named), input_pos[0])
        outputs = parts.split(cache)
        return outputs | {"logits": logits.astype(jnp.float32)} if with_logits else outputs

    return step


def _signature(tf: Any, values: list[Any], step: Callable[..., Any], parts: CacheParts, length: int) -> Any:
    """Returns TensorFlow's function of a step for so many tokens."""
    from jax.experimental import jax2tf

    converted = jax2tf.convert(step, with_gradient=False)

    def signature(tokens: Any, input_pos: Any, **named: Any) -> Any:
        return converted(values, tokens, input_pos, named)

    specs = {name: tf.TensorSpec(shape, tf.float32, name=name) for name, shape in parts.shapes.items()}
    return tf.function(signature, autograph=False).get_concrete_function(
        tf.TensorSpec((1, length), tf.int32, name="tokens"),
        tf.TensorSpec((length,), tf.int32, name="input_pos"),
        **specs,
    )
