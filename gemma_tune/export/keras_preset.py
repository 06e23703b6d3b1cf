"""Writes a model as a KerasHub preset, and LoRA factors that aren't merged as an adapter beside it."""

from pathlib import Path
from typing import Any

from gemma_tune.export.options import ExportOptions, WrittenExport
from gemma_tune.models.layers import lora_layers, quantized_layers
from gemma_tune.models.lora.adapter import save_adapter
from gemma_tune.models.preset import save_preset
from gemma_tune.models.shared_copy import shared_copy

ADAPTER_FOLDER = "adapter"


def write_keras(model: Any, folder: Path, options: ExportOptions) -> WrittenExport:
    """Writes a preset that `gemma_tune.load_model` and, unless it is quantized, KerasHub load with equal arrays.

    Args:
        model: CausalLM. The factors of a model with LoRA are written into `adapter/`, and its base into the folder.
        folder: Empty folder.
        options: Export options, of which base_name is used.
    """
    notes, usage = [], "keras"
    base = model
    if lora_layers(model.backbone):
        base, usage = shared_copy(model, with_lora=False), "keras, with an adapter"
        notes.append(f"LoRA isn't merged: {ADAPTER_FOLDER}/ holds it, and the weights are those of the base model.")
    save_preset(base, folder)
    if base is not model:
        save_adapter(model, folder / ADAPTER_FOLDER, base_model=options.base_name)
    if quantized_layers(base.backbone):
        usage = usage if base is not model else "keras, quantized"
        notes.append("The weights are quantized: gemma_tune loads them, KerasHub alone doesn't.")
    # The class itself, since keras_hub.models.CausalLM takes Gemma 4's preset for that of its assistant and fails.
    return WrittenExport(notes, usage, {"CAUSAL_LM": type(model).__name__})


def keras_bytes(model: Any, options: ExportOptions) -> int:
    """Returns the size of the model's arrays in bytes."""
    del options
    return sum(variable.value.nbytes for variable in model.backbone.variables)
