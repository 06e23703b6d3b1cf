"""Names of a KerasHub Gemma's layers in Hugging Face's models, and so in PEFT's adapters."""

import re
from pathlib import Path

from gemma_tune.models.layers import linear_layers
from gemma_tune.runtime.backend import keras, keras_hub
from gemma_tune.runtime.json_files import read_json

HF_MODULES = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "attention_output": "self_attn.o_proj",
    "ffw_gating": "mlp.gate_proj",
    "ffw_gating_2": "mlp.up_proj",
    "ffw_linear": "mlp.down_proj",
}
EMBEDDING, LM_HEAD = "embed_tokens", "lm_head"
# Name in front of `layers`: in text-only models, in multimodal ones, and in multimodal ones of transformers 4.
TEXT_PREFIX, MULTIMODAL_PREFIX = "model.", "model.language_model."
MODULE_PREFIXES = (MULTIMODAL_PREFIX, "language_model.model.", TEXT_PREFIX)
_MULTIMODAL = re.compile(r"gemma-?3-(4|12|27)b|gemma-?3n|gemma-?4", re.IGNORECASE)
_GENERATION = re.compile(r"(?:^|[/_-])gemma[-_]?(?:(\d)(?=[-_n]|$)|(\d)b)", re.IGNORECASE)


def layers_by_module(backbone: keras_hub.models.Backbone) -> dict[str, keras.layers.Layer]:
    """Returns the linear layers and the embedding by their module name, such as `layers.0.self_attn.q_proj`."""
    found = {EMBEDDING: backbone.token_embedding}
    for index, block in enumerate(backbone.transformer_layers):
        for layer in linear_layers(block):
            if layer.name in HF_MODULES:
                found[f"layers.{index}.{HF_MODULES[layer.name]}"] = layer
    return found


def module_prefix(base_name: str) -> str:
    """Returns the name in front of `layers` in the model of a Hugging Face name or directory; '': a text-only model."""
    config = Path(base_name).expanduser() / "config.json"
    if base_name and config.is_file():
        return MULTIMODAL_PREFIX if "text_config" in read_json(config) else TEXT_PREFIX
    return MULTIMODAL_PREFIX if _MULTIMODAL.search(base_name) else TEXT_PREFIX


def family_in_name(base_name: str) -> str:
    """Returns the family in a base model's name, such as `gemma2` of `google/gemma-2-2b`, or ""."""
    match = _GENERATION.search(base_name)
    if not match:
        return ""
    if match[1]:
        return "gemma" if match[1] == "1" else f"gemma{match[1]}"
    return "gemma"  # google/gemma-2b, google/gemma-7b.
