"""Step 1: choose a model, load it from any source, and transform it.

Names are imported at first use, since importing Keras takes seconds.
"""

from gemma_tune.lazy_names import lazy_names

_PUBLIC = {
    "load_model": "gemma_tune.models.load",
    "load_adapter": "gemma_tune.models.lora.adapter",
    "save_adapter": "gemma_tune.models.lora.adapter",
    "read_adapter_metadata": "gemma_tune.models.lora.adapter",
    "enable_lora": "gemma_tune.models.lora.enable",
    "convert_layout": "gemma_tune.models.lora.layouts",
    "enable_packing": "gemma_tune.models.attention.packing_masks",
    "presets": "gemma_tune.models.sources.preset_catalog",
    "tokenizer_of": "gemma_tune.models.sources.tokenizer",
}

__all__ = list(_PUBLIC)
__getattr__ = lazy_names("gemma_tune.models", _PUBLIC)
