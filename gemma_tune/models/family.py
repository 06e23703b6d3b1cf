"""The Gemma families: which KerasHub classes belong to each, and how to tell which one a model is."""

from typing import Any, NamedTuple

from gemma_tune.errors import ModelError
from gemma_tune.runtime.backend import keras_hub


class Family(NamedTuple):
    """One family's KerasHub classes, and the arguments that make its tokenizer a text-only one."""

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


def family_of(model: Any) -> str:
    """Returns the family's name of a KerasHub CausalLM or Backbone.

    Raises:
        ModelError: It is no Gemma that gemma_tune knows.
    """
    backbone = getattr(model, "backbone", model)
    name = type(backbone).__name__
    if name == "GemmaBackbone":
        return "gemma2" if backbone.use_post_ffw_norm else "gemma"
    for family, classes in FAMILIES.items():
        if classes.causal_lm.backbone_cls.__name__ == name:
            return family
    raise ModelError(f"{name} is no Gemma that gemma_tune can train. Families: {', '.join(FAMILIES)}.")
