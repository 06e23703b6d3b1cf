"""The formats that a model can be exported to."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from gemma_tune.errors import ConfigError, did_you_mean
from gemma_tune.export.options import Options, Written
from gemma_tune.models.quantize import num_weights


class Format(NamedTuple):
    """One format.

    Attributes:
        what: What it holds, and who reads it.
        writer: `module:function` in this package; imported when it is needed. It is called with (model, an empty
            folder, Options) and returns Written.
        lora: `merged`: it holds weights alone. `either`. `alone`: it holds nothing but LoRA factors.
        estimate: Of a model and Options, about how many bytes it takes.
        library: The model card's `library_name`.
    """

    what: str
    writer: str
    lora: str
    estimate: Callable[[Any, Options], int]
    library: str

    def write(self, model: Any, folder: Path, options: Options) -> Written:
        """Writes a model."""
        module, function = self.writer.split(":")
        return getattr(importlib.import_module(f"gemma_tune.export.{module}"), function)(model, folder, options)


def _held_bytes(model: Any, options: Options) -> int:
    """What the model's arrays take now."""
    del options
    return sum(variable.value.nbytes for variable in model.backbone.variables)


def _float_bytes(model: Any, options: Options) -> int:
    """What all weights take as floats of `dtype`."""
    return (4 if options.dtype == "float32" else 2) * num_weights(model)


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
