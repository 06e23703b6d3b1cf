"""Writes a model for LiteRT (TensorFlow Lite): `model.tflite`, its tokenizer, and `litert.json` with its lengths.

The file has two signatures, with names and shapes as in Google's litert-torch, which run KerasHub's own layers:

    prefill_P: tokens [1, P], input_pos [P], kv_cache_k_0 [1, C, K, H], kv_cache_v_0, … -> kv_cache_k_0, …
    decode: tokens [1, 1], input_pos [1], kv_cache_k_0, … -> logits [1, 1, V], kv_cache_k_0, …

input_pos counts from 0. All tokens of a prompt but the last go to `prefill_P`, P at a time; the padding of its last
call can be any token, since decoding overwrites it in the cache. The prompt's last token goes to `decode`, whose logits
predict the first token of the answer. Positions must be below C.

JAX lowers the model to StableHLO, and TensorFlow's converter turns that into a flatbuffer. No other module imports
TensorFlow.
"""

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
from gemma_tune.export.litert.cache_arrays import CacheParts, cache_parts
from gemma_tune.models.family import family_of
from gemma_tune.models.functional import parameters, params_scope
from gemma_tune.models.layers import lora_layers, quantized_layers
from gemma_tune.models.lora.enable import merge_lora
from gemma_tune.models.quantized.convert import num_weights
from gemma_tune.models.shared_copy import shared_copy
from gemma_tune.models.sources.tokenizer import tokenizer_of
from gemma_tune.runtime.atomic_files import write_json

MODEL_FILE, TOKENIZER_FILE, SETTINGS_FILE = "model.tflite", "tokenizer.model", "litert.json"
WEIGHT_FORMATS = ("float32", "int8")
# A flatbuffer's offsets have 31 bits, and the converter makes one with floats before it rounds them.
MAX_FLATBUFFER_BYTES = 2**31 - 2**24
_NUM_COPIES = 2  # On the disk during the conversion: TensorFlow's variables, and the file.


class Lengths(NamedTuple):
    """Lengths that are fixed in a .tflite file.

    Attributes:
        prefill: Number of tokens that a call of `prefill_P` reads, P.
        cache: Most tokens of a conversation, C.
    """

    prefill: int = 64
    cache: int = 1024


DEFAULT_LENGTHS = Lengths()


def write_litert(
    model: Any, directory: str | os.PathLike, *, lengths: Lengths = DEFAULT_LENGTHS, weight_format: str = "float32"
) -> Path:
    """Writes a model for LiteRT.

    Args:
        model: CausalLM in float32 with its tokenizer. LoRA is written merged; the model itself isn't changed.
        directory: Existing directory. Files of the same names in it are overwritten.
        lengths: Number of tokens in a call and in a conversation.
        weight_format: `float32`; or `int8`, LiteRT's dynamic range quantization: weights in 8 bits with a scale for
            each channel, multiplied with inputs that are rounded to 8 bits too.

    Returns:
        The path of the .tflite file.

    Raises:
        ModelError: The model is too large for a flatbuffer, quantized, or not in float32; or an argument is invalid.
    """
    check_litert(model, lengths, weight_format)
    if lora_layers(model.backbone):
        model = shared_copy(model)
        merge_lora(model.backbone)
    folder = Path(directory)
    path = folder / MODEL_FILE
    path.write_bytes(_convert(model, lengths, weight_format, folder))
    tokenizer, family = tokenizer_of(model), family_of(model)
    (folder / TOKENIZER_FILE).write_bytes(tokenizer.proto)
    settings = {
        "family": family,
        "weights": weight_format,
        "prefill_length": lengths.prefill,
        "cache_length": lengths.cache,
        "bos_id": tokenizer.bos_id,
        "stop_ids": [tokenizer.id_of(template_for(family).end_of_turn), tokenizer.eos_id],
    }
    write_json(folder / SETTINGS_FILE, settings)
    return path


def estimate_litert(model: Any) -> int:
    """Returns the approximate disk space in bytes that the conversion needs."""
    return _NUM_COPIES * 4 * num_weights(model)


def check_litert(model: Any, lengths: Lengths, weight_format: str) -> None:
    """Raises the ModelError that `write_litert` would raise for these arguments."""
    if weight_format not in WEIGHT_FORMATS:
        raise ModelError(f"LiteRT weights must be one of {', '.join(WEIGHT_FORMATS)}; got {weight_format!r}.")
    if not 1 <= lengths.prefill < lengths.cache:
        raise ModelError(f"LiteRT lengths: prefill must be at least 1 and below cache; got {lengths}.")
    if quantized_layers(model.backbone):
        raise ModelError(
            "A quantized model can't be exported to LiteRT. Export the float model, with LiteRT's own --scheme=int8."
        )
    if model.backbone.compute_dtype != "float32" or model.backbone.variable_dtype != "float32":
        raise ModelError(
            f"LiteRT export needs a model in float32, but this one is in {model.backbone.dtype_policy.name}. Load it "
            "with --precision=float32."
        )
    num_bytes = 4 * num_weights(model)
    if num_bytes > MAX_FLATBUFFER_BYTES:
        raise ModelError(
            f"The model has {num_bytes / 1e9:.1f} GB of float32 weights, but a .tflite file holds 2 GB at most, and "
            "int8 weights are made from such a file. Use --format=gguf, or export a Gemma 3 270M."
        )


def _convert(model: Any, lengths: Lengths, weight_format: str, folder: Path) -> bytes:
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")  # Nothing is computed here, and JAX has reserved the GPU's memory.
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
        if weight_format == "int8":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        return converter.convert()


def _step(model: Any, paths: list[str], parts: CacheParts, with_logits: bool) -> Callable[..., dict[str, jax.Array]]:
    """Returns a JAX function of (values, tokens, input_pos, cache by name) that runs the model."""

    def step(values: Any, tokens: jax.Array, input_pos: jax.Array, named: dict[str, jax.Array]) -> dict[str, jax.Array]:
        with params_scope(model, dict(zip(paths, values, strict=True))):
            logits, _, cache = model.call_with_cache(tokens, parts.join(named), input_pos[0])
        outputs = parts.split(cache)
        return outputs | {"logits": logits.astype(jnp.float32)} if with_logits else outputs

    return step


def _signature(tf: Any, values: list[Any], step: Callable[..., Any], parts: CacheParts, length: int) -> Any:
    """Returns the TensorFlow function of a step that reads `length` tokens."""
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
