"""Lists the formats to which a model can be exported."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from gemma_tune.errors import ConfigError, did_you_mean
from gemma_tune.export.options import ExportOptions, WrittenExport


class ExportFormat(NamedTuple):
    """An export format.

    Attributes:
        writer: `module:function` in this package, imported when needed. The function is called with the model, an empty
            folder and the options, and returns WrittenExport.
        lora: `merged`: it holds weights only. `either`. `alone`: it holds LoRA factors only.
        estimator: `module:function` in this package. The function is called with the model and the options, and returns
            the approximate size in bytes.
        library: `library_name` in the model card's metadata.
    """

    writer: str
    lora: str
    estimator: str
    library: str

    def write(self, model: Any, folder: Path, options: ExportOptions) -> WrittenExport:
        """Writes a model into an empty folder."""
        return _function(self.writer)(model, folder, options)

    def estimate_bytes(self, model: Any, options: ExportOptions) -> int:
        """Returns the approximate size of the export.

        Raises:
            ModelError: The format can't hold the model, as far as is known before it is written.
        """
        return _function(self.estimator)(model, options)


def _function(place: str) -> Callable[..., Any]:
    module, name = place.split(":")
    return getattr(importlib.import_module(f"gemma_tune.export.{module}"), name)


EXPORT_FORMATS = {
    # A KerasHub preset, for Keras.
    "keras": ExportFormat("keras_preset:write_keras", "either", "keras_preset:keras_bytes", "keras-hub"),
    # safetensors with config and tokenizer, for transformers and vLLM.
    "hf": ExportFormat("hf.directory:write_hf", "merged", "hf.directory:hf_bytes", "transformers"),
    # LoRA factors alone, for PEFT and vLLM.
    "peft": ExportFormat("writers:write_peft", "alone", "writers:peft_bytes", "peft"),
    # One file, for llama.cpp, Ollama and LM Studio.
    "gguf": ExportFormat("writers:write_gguf_folder", "merged", "writers:gguf_bytes", "gguf"),
    # TensorFlow Lite, for phones.
    "litert": ExportFormat("writers:write_litert_folder", "merged", "writers:litert_bytes", "litert"),
}


def find_format(name: str) -> ExportFormat:
    """Returns a format by its name.

    Raises:
        ConfigError: The name is unknown; suggests the nearest.
    """
    if name not in EXPORT_FORMATS:
        raise ConfigError(
            f"format must be one of {', '.join(EXPORT_FORMATS)}; got {name!r}.{did_you_mean(name, EXPORT_FORMATS)}"
        )
    return EXPORT_FORMATS[name]
