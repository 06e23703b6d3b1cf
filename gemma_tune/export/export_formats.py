"""The formats that a model can be exported to."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from gemma_tune.errors import ConfigError, did_you_mean
from gemma_tune.export.options import ExportOptions, WrittenExport


class ExportFormat(NamedTuple):
    """One format.

    Attributes:
        what: What it holds, and who reads it.
        writer: `module:function` in this package; imported when it is needed. It is called with (model, an empty
            folder, Options) and returns Written.
        lora: `merged`: it holds weights alone. `either`. `alone`: it holds nothing but LoRA factors.
        estimate: As writer; of (model, Options), about how many bytes it takes.
        library: The model card's `library_name`.
    """

    what: str
    writer: str
    lora: str
    estimate: str
    library: str

    def write(self, model: Any, folder: Path, options: ExportOptions) -> WrittenExport:
        """Writes a model."""
        return _function(self.writer)(model, folder, options)

    def num_bytes(self, model: Any, options: ExportOptions) -> int:
        """Returns about how many bytes it will take; raises what writing would, as far as that is known before."""
        return _function(self.estimate)(model, options)


def _function(place: str) -> Callable[..., Any]:
    module, name = place.split(":")
    return getattr(importlib.import_module(f"gemma_tune.export.{module}"), name)


EXPORT_FORMATS = {
    "keras": ExportFormat("KerasHub preset, for Keras", "keras_preset:write_keras", "either", "keras_preset:held_bytes",
        "keras-hub",),
    "hf": ExportFormat(
        "safetensors with config and tokenizer, for transformers and vLLM", "hf.directory:write_hf", "merged",
        "hf.directory:float_bytes", "transformers",
    ),
    "peft": ExportFormat(
        "LoRA factors alone, for peft and vLLM", "writers:write_peft", "alone", "writers:peft_bytes", "peft",
    ),
    "gguf": ExportFormat(
        "one file, for llama.cpp, Ollama and LM Studio", "writers:write_gguf_folder", "merged", "writers:gguf_bytes",
        "gguf",
    ),
    "litert": ExportFormat(
        "TensorFlow Lite, for phones", "writers:write_litert_folder", "merged", "writers:litert_bytes", "litert",
    ),
}  # fmt: skip


def find_format(name: str) -> ExportFormat:
    """Returns a format by its name.

    Raises:
        ConfigError: There is none; suggests the nearest.
    """
    if name not in EXPORT_FORMATS:
        raise ConfigError(
            f"format must be one of {', '.join(EXPORT_FORMATS)}; got {name!r}.{did_you_mean(name, EXPORT_FORMATS)}"
        )
    return EXPORT_FORMATS[name]
