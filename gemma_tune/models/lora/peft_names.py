"""What the layers of a KerasHub Gemma are called in Hugging Face's models, and so in PEFT's adapters."""

import re
from pathlib import Path

from gemma_tune.models.layers import linear_layers
from gemma_tune.runtime.backend import keras, keras_hub
from gemma_tune.runtime.json_files import read_json

MODULES = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "attention_output": "self_attn.o_proj",
    "ffw_gating": "mlp.gate_proj",
    "ffw_gating_2": "mlp.up_proj",
    "ffw_linear": "mlp.down_proj",
}
EMBEDDING, HEAD = "embed_tokens", "lm_head"
# What stands before `layers`: in a model of text alone, in one that also sees, and there as transformers 4 called it.
TEXT, TEXT_OF_MANY = "model.", "model.language_model."
PREFIXES = (TEXT_OF_MANY, "language_model.model.", TEXT)
_MANY = re.compile(r"gemma-?3-(4|12|27)b|gemma-?3n|gemma-?4", re.IGNORECASE)
_GENERATION = re.compile(r"(?:^|[/_-])gemma[-_]?(?:(\d)(?=[-_n]|$)|(\d)b)", re.IGNORECASE)


def modules(backbone: keras_hub.models.Backbone) -> dict[str, keras.layers.Layer]:
    """Returns module -> layer of all linear layers and the embedding, as `layers.0.self_attn.q_proj`."""
    found = {EMBEDDING: backbone.token_embedding}
    for index, block in enumerate(backbone.transformer_layers):
        for layer in linear_layers(block):
            if layer.name in MODULES:
                found[f"layers.{index}.{MODULES[layer.name]}"] = layer
    return found


def prefix_of(base_name: str) -> str:
    """Returns what stands before `layers` in the model that a base's name or directory loads."""
    config = Path(base_name).expanduser() / "config.json"
    if config.is_file():
        return TEXT_OF_MANY if "text_config" in read_json(config) else TEXT
    return TEXT_OF_MANY if _MANY.search(base_name) else TEXT


def family_in_name(base_name: str) -> str:
    """Returns the family that a base's name says, such as `gemma2` for `google/gemma-2-2b`; "" where it says none."""
    match = _GENERATION.search(base_name)
    if not match:
        return ""
    if match[1]:
        return "gemma" if match[1] == "1" else f"gemma{match[1]}"
    return "gemma"  # google/gemma-2b, google/gemma-7b.
