"""The preprocessor attached to a loaded model, for its own `generate` and `fit`: text only, and without TensorFlow."""

import types
from typing import Any

import numpy as np

from gemma_tune.runtime.backend import keras, keras_hub

_SEQUENCE_LENGTH = 1024


def text_preprocessor(tokenizer: Any, with_positions: bool) -> keras_hub.models.CausalLMPreprocessor:
    """Returns KerasHub's general CausalLMPreprocessor; those of Gemma 3 and 4 need TensorFlow, for images.

    Args:
        tokenizer: A KerasHub tokenizer.
        with_positions: Whether the model also asks for `position_ids`, as Gemma 4 does.
    """
    preprocessor = keras_hub.models.CausalLMPreprocessor(tokenizer, sequence_length=_SEQUENCE_LENGTH)
    if with_positions:
        # On the instance, not in a subclass: a saved preset then names KerasHub's class, which every KerasHub can load.
        object.__setattr__(preprocessor, "_call_python", types.MethodType(_call_with_positions, preprocessor))
    return preprocessor


def _call_with_positions(preprocessor: Any, *arguments: Any, **named: Any) -> Any:
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(
        type(preprocessor)._call_python(preprocessor, *arguments, **named)
    )
    x["position_ids"] = np.broadcast_to(np.arange(x["token_ids"].shape[-1], dtype="int32"), x["token_ids"].shape)
    return keras.utils.pack_x_y_sample_weight(x, y, sample_weight)
