"""Makes the tokenizer and the preprocessor of a loaded model, which Keras's own `generate` and `fit` use.

Both are for text only, and need no TensorFlow.
"""

import types
from typing import Any

import numpy as np

from gemma_tune.models.family import FAMILIES
from gemma_tune.runtime.backend import keras, keras_hub

_SEQUENCE_LENGTH = 1024


def keras_tokenizer(family: str, proto: bytes) -> keras_hub.tokenizers.Tokenizer:
    """Returns the KerasHub tokenizer of a family.

    Args:
        family: Name of the family.
        proto: Serialized SentencePiece model.
    """
    from keras.src.utils.tracking import DotNotTrackScope

    classes = FAMILIES[family]
    with DotNotTrackScope():  # Without it Keras copies the 262,144 pieces, twice, to look for variables among them.
        return classes.tokenizer(proto, **classes.tokenizer_arguments)


def text_preprocessor(tokenizer: Any, with_positions: bool) -> keras_hub.models.CausalLMPreprocessor:
    """Returns KerasHub's general CausalLMPreprocessor; those of Gemma 3 and 4 need TensorFlow, for images.

    Args:
        tokenizer: KerasHub tokenizer.
        with_positions: Whether the model also takes `position_ids`, as Gemma 4 does.
    """
    preprocessor = keras_hub.models.CausalLMPreprocessor(tokenizer, sequence_length=_SEQUENCE_LENGTH)
    if with_positions:
        # Set on the instance, not in a subclass: a saved preset then names a class that KerasHub can load.
        object.__setattr__(preprocessor, "_call_python", types.MethodType(_call_with_positions, preprocessor))
    return preprocessor


def _call_with_positions(preprocessor: Any, *arguments: Any, **named: Any) -> Any:
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(
        type(preprocessor)._call_python(preprocessor, *arguments, **named)
    )
    x["position_ids"] = np.broadcast_to(np.arange(x["token_ids"].shape[-1], dtype="int32"), x["token_ids"].shape)
    return keras.utils.pack_x_y_sample_weight(x, y, sample_weight)
