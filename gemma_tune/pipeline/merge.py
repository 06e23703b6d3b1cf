"""Merges LoRA into the weights of its base model, and saves the result as a preset."""

from pathlib import Path

from gemma_tune.config import Config
from gemma_tune.errors import ConfigError, ModelError
from gemma_tune.models.layers import lora_layers
from gemma_tune.models.load import load_model
from gemma_tune.models.lora.enable import merge_lora
from gemma_tune.models.preset import save_preset
from gemma_tune.models.quantized.merge import MergeError, merge_into_codes
from gemma_tune.runtime.atomic_files import disk_errors_as
from gemma_tune.runtime.atomic_folder import check_output


def merge_model(
    config: Config, output: str, *, adapter: str = "", into: str = "floats"
) -> tuple[Path, list[MergeError]]:
    """Merges the LoRA of a run or of an adapter into its base, and saves a preset.

    Args:
        config: Settings; `model` names the model.
        output: Folder for the preset; must not exist, or be empty.
        adapter: Path of a LoRA adapter for the model, or ''.
        into: `floats` is exact; a base that was quantized for training is read again as floats. `codes` merges into
            quantized weights, which are rounded again.

    Returns:
        The folder, and the error that rounding makes in each layer.

    Raises:
        ConfigError: The model has no LoRA.
        ModelError: The output exists or can't be written, or there are no quantized layers.
    """
    path = check_output(output)
    settings = config.model
    model = load_model(
        settings.source,
        precision=settings.precision,
        quant_spec=config.quant_spec if into == "codes" else None,
        as_trained=into == "codes",
        adapter=adapter,
        seed=config.seed,
    )
    if not lora_layers(model.backbone):
        raise ConfigError(f"{settings.source} has no LoRA to merge. Name a run, or an --adapter.")
    errors = []
    if into == "codes":
        errors = merge_into_codes(model.backbone)
    else:
        merge_lora(model.backbone)
    with disk_errors_as(ModelError, path):
        save_preset(model, path)
    return path, errors
