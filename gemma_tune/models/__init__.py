"""Step 1: choose a model, load it from any source, and transform it.

Names are imported at first use, since importing Keras takes seconds.
"""

import importlib

_PUBLIC = {
    "load_model": "load",
    "load_adapter": "lora.adapter",
    "save_adapter": "lora.adapter",
    "read_adapter_metadata": "lora.adapter",
    "enable_lora": "lora.enable",
    "convert_layout": "lora.layouts",
    "enable_packing": "attention.packing_masks",
    "presets": "sources.preset_catalog",
    "tokenizer_of": "sources.tokenizer",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'gemma_tune.models' has no attribute {name!r}")
    return getattr(importlib.import_module(f"gemma_tune.models.{_PUBLIC[name]}"), name)
