"""The formats that a model can be exported to."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from gemma_tune.errors import ConfigError, did_you_mean
from gemma_tune.export.options import Options
from gemma_tune.models.quantize import quantized_layers


class Format(NamedTuple):
    """One format.

    Attributes:
        what: What it holds, and who reads it.
        writer: `module:function` in this package; imported when it is needed. It is called with (model, an empty
            folder, Options) and returns what is to be said of the result, as sentences.
        lora: `merged`: it holds weights alone. `either`. `alone`: it holds nothing but LoRA factors.
        estimate: Of a model and Options, about how many bytes it takes.
        library: The model card's `library_name`.
    """

    what: str
    writer: str
    lora: str
    estimate: Callable[[Any, Options], int]
    library: str

    def write(self, model: Any, folder: Path, options: Options) -> list[str]:
        """Writes a model."""
        module, function = self.writer.split(":")
        return getattr(importlib.import_module(f"gemma_tune.export.{module}"), function)(model, folder, options)


def _held_bytes(model: Any, options: Options) -> int:
    """What the model's arrays take now."""
    del options
    return sum(variable.value.nbytes for variable in model.backbone.variables)


def _float_bytes(model: Any, options: Options) -> int:
    """What all weights take as floats of `dtype`."""
    layers = quantized_layers(model.backbone)
    codes = {id(variable) for layer in layers for variable in layer._code_variables}
    others = sum(variable.value.size for variable in model.backbone.variables if id(variable) not in codes)
    return (4 if options.dtype == "float32" else 2) * (others + sum(layer.num_weights for layer in layers))


FORMATS = {
    "keras": Format("KerasHub preset, for Keras", "keras_preset:write_keras", "either", _held_bytes, "keras-hub"),
    "hf": Format(
        "safetensors with config and tokenizer, for transformers and vLLM", "hf_directory:write_hf", "merged",
        _float_bytes, "transformers",
    ),
}  # fmt: skip


def find_format(name: str) -> Format:
    """Returns a format by its name.

    Raises:
        ConfigError: There is none; suggests the nearest.
    """
    if name not in FORMATS:
        raise ConfigError(f"format must be one of {', '.join(FORMATS)}; got {name!r}.{did_you_mean(name, FORMATS)}")
    return FORMATS[name]
