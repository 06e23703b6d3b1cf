"""Makes a second model on the same arrays, for work that would change the layers of the first."""

import tempfile
from typing import Any

from gemma_tune.models.family import FAMILIES, family_of
from gemma_tune.models.functional import variables_by_path
from gemma_tune.models.layers import lora_layers, quantized_layers
from gemma_tune.models.load import correct_query_scale
from gemma_tune.models.lora.adapter import load_adapter, save_adapter
from gemma_tune.models.quantized.convert import apply_schemes
from gemma_tune.models.sources.lazy_initialization import check_filled, lazy_initialization
from gemma_tune.models.sources.preprocessor import text_preprocessor
from gemma_tune.models.sources.tokenizer import tokenizer_of
from gemma_tune.runtime.backend import keras, without_tensorflow


def shared_copy(model: keras.Model, with_lora: bool = True) -> keras.Model:
    """Returns a CausalLM that computes the same with KerasHub's own layers, without the parts that training swapped in.

    JAX's arrays are immutable, so both models share them, and the copy takes no memory until one of the two gets new
    arrays.

    Args:
        model: CausalLM, quantized or not, with or without LoRA.
        with_lora: Whether the copy has the model's LoRA factors, which are copied.

    Raises:
        ModelError: The model has no preprocessor.
    """
    tokenizer_of(model)
    backbone = model.backbone
    with lazy_initialization(), without_tensorflow():
        copy: Any = type(backbone).from_config(backbone.get_config())
        apply_schemes(copy, {layer.path: layer.scheme for layer in quantized_layers(backbone)})
    values = variables_by_path(model)
    for variable in copy.variables:
        variable._value = values[variable.path].value
    for layer, original in zip(quantized_layers(copy), quantized_layers(backbone), strict=True):
        object.__setattr__(layer, "first_floats", original.first_floats)
    check_filled(copy)
    correct_query_scale(copy)
    preprocessor = text_preprocessor(model.preprocessor.tokenizer, with_positions="position_ids" in copy.input)
    copied = FAMILIES[family_of(copy)].causal_lm(preprocessor=preprocessor, backbone=copy)
    if with_lora and lora_layers(backbone):
        with tempfile.TemporaryDirectory(prefix="gemma_tune-") as folder:
            load_adapter(copied, save_adapter(model, folder))
    return copied
