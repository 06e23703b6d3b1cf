"""Writes a model as a KerasHub preset, with LoRA factors beside it if they aren't merged."""

from pathlib import Path
from typing import Any

from gemma_tune.export.options import ExportOptions, WrittenExport
from gemma_tune.models.layers import lora_layers, quantized_layers
from gemma_tune.models.lora.adapter import save_adapter
from gemma_tune.models.preset import save_preset
from gemma_tune.models.shared_copy import shared_copy

ADAPTER_FOLDER = "adapter"


def write_keras(model: Any, folder: Path, options: ExportOptions) -> WrittenExport:
    """Writes a preset that `gemma_tune.load_model` reads back array by array; if it isn't quantized, KerasHub does too.

    Args:
        model: A CausalLM. If it has LoRA factors, the base goes to the folder and the factors into its `adapter/`.
        folder: Empty.
        options: base_name is used.

    Returns:
        What is to be said of it.
    """
    notes, kind = [], "keras"
    base = model
    if lora_layers(model.backbone):
        base, kind = shared_copy(model, with_lora=False), "keras, with an adapter"
        notes.append(f"LoRA isn't merged: it is in {ADAPTER_FOLDER}/, and the weights are the base's.")
    save_preset(base, folder)
    if base is not model:
        save_adapter(model, folder / ADAPTER_FOLDER, base_model=options.base_name)
    if quantized_layers(base.backbone):
        kind = kind if base is not model else "keras, quantized"
        notes.append("Weights are quantized: gemma_tune reads them, plain KerasHub doesn't.")
    # By the class itself: KerasHub's CausalLM takes Gemma 4's for that of its assistant, which it then can't make.
    return WrittenExport(notes, kind, {"CAUSAL_LM": type(model).__name__})


def held_bytes(model: Any, options: ExportOptions) -> int:
    """Returns what the model's arrays take now."""
    del options
    return sum(variable.value.nbytes for variable in model.backbone.variables)
