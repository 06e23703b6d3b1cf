"""Writes a model as a KerasHub preset, with LoRA factors beside it if they aren't merged."""

from pathlib import Path
from typing import Any

from gemma_tune.export.options import Options
from gemma_tune.files import seal
from gemma_tune.models.adapter import save_adapter
from gemma_tune.models.lora import lora_layers
from gemma_tune.models.preset import save_preset
from gemma_tune.models.quantize import quantized_layers
from gemma_tune.models.shared_copy import shared_copy

ADAPTER = "adapter"
CARD = "README.md"


def write_keras(model: Any, folder: Path, options: Options) -> list[str]:
    """Writes a preset that `gemma_tune.load_model` reads back array by array; if it isn't quantized, KerasHub does too.

    Args:
        model: A CausalLM. If it has LoRA factors, the base goes to the folder and the factors into its `adapter/`.
        folder: Empty.
        options: base_name is used.

    Returns:
        What is to be said of it.
    """
    notes = []
    base = model
    if lora_layers(model.backbone):
        base = shared_copy(model, with_lora=False)
        notes.append(f"LoRA isn't merged: it is in {ADAPTER}/, and the weights are the base's.")
    save_preset(base, folder)
    if base is not model:
        save_adapter(model, folder / ADAPTER, base_model=options.base_name)
    seal(folder, leave_out=(CARD,))
    if quantized_layers(base.backbone):
        notes.append("Weights stay quantized: gemma_tune reads them, plain KerasHub doesn't.")
    return notes
