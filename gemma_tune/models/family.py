"""Lists the Gemma families with their KerasHub classes, and tells to which family a model or a config.json belongs."""

from typing import Any, NamedTuple

from gemma_tune.errors import ModelError
from gemma_tune.runtime.backend import keras_hub


class Family(NamedTuple):
    """The KerasHub classes of one Gemma family.

    Attributes:
        causal_lm: CausalLM class.
        tokenizer: Tokenizer class.
        tokenizer_arguments: Arguments that make the tokenizer a text-only one.
    """

    causal_lm: Any
    tokenizer: Any
    tokenizer_arguments: dict[str, bool]


_GEMMA = Family(keras_hub.models.GemmaCausalLM, keras_hub.models.GemmaTokenizer, {})
FAMILIES = {
    "gemma": _GEMMA,
    "gemma2": _GEMMA,
    "gemma3": Family(keras_hub.models.Gemma3CausalLM, keras_hub.models.Gemma3Tokenizer, {"has_vision_tokens": False}),
    "gemma4": Family(
        keras_hub.models.Gemma4CausalLM,
        keras_hub.models.Gemma4Tokenizer,
        {"has_vision_tokens": False, "has_audio_tokens": False, "has_video_tokens": False},
    ),
}
# What a Hugging Face config.json calls a family, or the text part of a multimodal model -> the family.
_FAMILY_OF_MODEL_TYPE = {
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "gemma4": "gemma4",
    "gemma4_text": "gemma4",
}


def family_of(model: Any) -> str:
    """Returns the name of the family of a KerasHub CausalLM or Backbone.

    Raises:
        ModelError: The model is not one of these Gemma families.
    """
    backbone = getattr(model, "backbone", model)
    name = type(backbone).__name__
    if name == "GemmaBackbone":
        return "gemma2" if backbone.use_post_ffw_norm else "gemma"
    for family, classes in FAMILIES.items():
        if classes.causal_lm.backbone_cls.__name__ == name:
            return family
    raise ModelError(f"{name} is not a Gemma that gemma_tune can train. Families: {', '.join(FAMILIES)}.")


def family_of_config(config: dict[str, Any], where: str) -> str:
    """Returns the name of the family that the `model_type` of a Hugging Face config.json means.

    Args:
        config: Contents of config.json.
        where: Place of the model, for the message.

    Raises:
        ModelError: The type is not one of a Gemma that gemma_tune can read.
    """
    model_type = config.get("model_type")
    if model_type not in _FAMILY_OF_MODEL_TYPE:
        raise ModelError(
            f"{where} holds a model of type {model_type!r}. Gemma types that can be read: "
            f"{', '.join(_FAMILY_OF_MODEL_TYPE)}."
        )
    return _FAMILY_OF_MODEL_TYPE[model_type]
