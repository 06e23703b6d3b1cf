"""What is done to a trained model's weights: quantizing them, and merging LoRA into them."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemma_tune.config import Config
from gemma_tune.data import Batch, TokenizedExample
from gemma_tune.errors import ConfigError, DataError, ModelError
from gemma_tune.models.layers import lora_layers, quantized_layers
from gemma_tune.models.load import load_model
from gemma_tune.models.lora.enable import merge_lora
from gemma_tune.models.preset import save_preset
from gemma_tune.models.quantized.convert import quantize_layers
from gemma_tune.models.quantized.merge import MergeError, merge_into_codes
from gemma_tune.models.sources.source import parse_source
from gemma_tune.models.transforms import transform_for_training
from gemma_tune.pipeline.setup import prepare_data, read_splits
from gemma_tune.quantization.codes import quantized_num_bytes
from gemma_tune.quantization.spec import PTQ_SCHEMES, QuantSpec
from gemma_tune.runtime import progress
from gemma_tune.runtime.atomic_files import disk_errors_as
from gemma_tune.runtime.atomic_folder import check_output
from gemma_tune.runtime.backend import keras
from gemma_tune.training.calibration import LayerError, calibration_batches, quantize_calibrated

FEWEST_TOKENS = 512  # Fewer say nothing of a layer with as many inputs.


@dataclasses.dataclass
class Quantization:
    """What quantizing a model came to.

    Attributes:
        output: The preset.
        scheme: Its name.
        num_tokens: Of the calibration data; 0 without.
        float_bytes: Of all weights in float32. bytes: Of all arrays now.
        num_int8: Layers that took int8 because the grid didn't fit.
        errors: Of the calibrated layers.
        seconds: It took.
    """

    output: Path
    scheme: str
    num_tokens: int
    float_bytes: int
    bytes: int
    num_int8: int
    errors: list[LayerError]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for `--json`."""
        errors = [error._asdict() for error in self.errors]
        return {**dataclasses.asdict(self), "output": str(self.output), "errors": errors}


def quantize_model(
    config: Config, scheme: str, output: str, *, adapter: str = "", calibration_tokens: int = 32_768
) -> Quantization:
    """Quantizes a trained model and saves it as a preset.

    LoRA, of a run or of an adapter, is merged first, in floats.

    Args:
        config: `model` says which and the grid; `data`, for calibrated schemes, with what.
        scheme: A key of PTQ_SCHEMES.
        output: Folder for the preset; must not exist, or be empty.
        adapter: A LoRA adapter to put on the model.
        calibration_tokens: As many tokens of the data flow through the model.

    Raises:
        ConfigError: No such scheme.
        DataError: The calibration data has too few tokens.
        ModelError: The output exists, or a layer can't take the scheme.
    """
    start = time.perf_counter()
    path = check_output(output)
    way, settings = PTQ_SCHEMES[scheme], config.model
    quant_spec = QuantSpec(way.scheme, settings.block_size, settings.double_quant, settings.or_int8)
    splits = read_splits(config) if way.method else None
    has_lora = bool(adapter) or parse_source(settings.source).kind in ("run", "peft")
    as_read = not (has_lora or way.method or way.rounds_inputs)
    model = load_model(
        settings.source,
        precision=settings.precision,
        quant_spec=quant_spec if as_read else None,
        as_trained=False,
        adapter=adapter,
        seed=config.seed,
    )
    merge_lora(model.backbone)
    errors: list[LayerError] = []
    num_tokens = 0
    if splits:
        batches, num_tokens = _calibration_batches(
            config, prepare_data(config, splits, model).train, calibration_tokens
        )
        with progress.track_progress("quantized blocks", len(model.backbone.transformer_layers)) as advance:
            transform_for_training(model, None, packing=True, remat="none", row_length=config.row_length)
            errors = quantize_calibrated(model, batches, way.method, quant_spec, advance)
    elif not as_read:
        quantize_layers(model.backbone, quant_spec, way.rounds_inputs)
    with disk_errors_as(ModelError, path):
        save_preset(model, path)
    num_int8 = sum(layer.scheme.quant_spec.scheme != way.scheme for layer in quantized_layers(model.backbone))
    return Quantization(
        path, scheme, num_tokens, *_bytes(model), num_int8=num_int8, errors=errors, seconds=time.perf_counter() - start
    )


def merge(config: Config, output: str, *, adapter: str = "", into: str = "floats") -> tuple[Path, list[MergeError]]:
    """Merges a run's or an adapter's LoRA into its base, and saves a preset.

    Args:
        config: `model` says which.
        output: Folder for the preset; must not exist, or be empty.
        adapter: A LoRA adapter to put on the model.
        into: `floats`: exact; a base that was quantized for training is read again as it was. `codes`: into quantized
            weights, which are rounded again.

    Returns:
        The folder, and what rounding did to each layer.

    Raises:
        ConfigError: The model has no LoRA.
        ModelError: The output exists, or there are no quantized layers.
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


def _calibration_batches(
    config: Config, examples: Sequence[TokenizedExample], num_tokens: int
) -> tuple[list[Batch], int]:
    batches, count = calibration_batches(examples, config.row_length, num_tokens, config.seed)
    if count < FEWEST_TOKENS:
        raise DataError(
            f"{config.data.source} has {count} tokens to calibrate with, and {FEWEST_TOKENS} are the fewest that say "
            "something. Give more --calibration data."
        )
    return batches, count


def _bytes(model: keras.Model) -> tuple[int, int]:
    """Returns (bytes of all weights in float32, bytes of all arrays)."""
    layers = quantized_layers(model.backbone)
    codes = {variable.path for layer in layers for variable in layer._code_variables}
    others = [variable for variable in model.backbone.variables if variable.path not in codes]
    held = sum(variable.value.nbytes for variable in others) + sum(quantized_num_bytes(layer.quantized()) for layer in layers)
    floats = sum(variable.value.size for variable in others) + sum(layer.num_weights for layer in layers)
    return 4 * floats, held
