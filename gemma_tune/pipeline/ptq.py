"""Post-training quantization: quantizes a trained model, with calibration data if the scheme needs some."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gemma_tune.config import Config
from gemma_tune.data import Batch, Splits, TokenizedExample
from gemma_tune.errors import DataError, ModelError
from gemma_tune.models.layers import quantized_layers
from gemma_tune.models.load import load_model
from gemma_tune.models.lora.enable import merge_lora
from gemma_tune.models.preset import save_preset
from gemma_tune.models.quantized.convert import quantize_layers
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

FEWEST_TOKENS = 512  # Fewer say nothing about a layer with as many inputs.


@dataclasses.dataclass
class QuantizationResult:
    """The result of quantizing a model.

    Attributes:
        output: Folder of the preset.
        scheme: Key of PTQ_SCHEMES.
        num_tokens: Number of calibration tokens; 0 without calibration.
        float_bytes: Bytes of all weights in float32.
        bytes: Bytes of all arrays of the quantized model.
        num_int8: Number of layers that were quantized to int8 because the block size doesn't fit them.
        errors: Errors of the calibrated layers.
        seconds: Duration.
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


class _Calibration(NamedTuple):
    """Result of a calibration: number of its tokens, and the error of each layer."""

    num_tokens: int
    errors: list[LayerError]


def quantize_model(
    config: Config, scheme: str, output: str, *, adapter: str = "", calibration_tokens: int = 32_768
) -> QuantizationResult:
    """Quantizes a trained model and saves it as a preset.

    LoRA, of a run or of an adapter, is merged first, in floats.

    Args:
        config: Settings. `model` names the model, its block size and its options; `data` the calibration data.
        scheme: Key of PTQ_SCHEMES.
        output: Folder for the preset; must not exist, or be empty.
        adapter: Path of a LoRA adapter for the model, or ''.
        calibration_tokens: Number of tokens that calibrate, or more to complete a row.

    Raises:
        ConfigError: There is no such scheme.
        DataError: The calibration data has too few tokens.
        ModelError: The output exists or can't be written, or a layer doesn't fit the scheme.
    """
    start = time.perf_counter()
    path = check_output(output)
    ptq, settings = PTQ_SCHEMES[scheme], config.model
    quant_spec = QuantSpec(ptq.scheme, settings.block_size, settings.double_quant, settings.or_int8)
    splits = read_splits(config) if ptq.method else None
    has_lora = bool(adapter) or parse_source(settings.source).kind in ("run", "peft")
    while_reading = not (has_lora or ptq.method or ptq.rounds_inputs)
    model = load_model(
        settings.source,
        precision=settings.precision,
        quant_spec=quant_spec if while_reading else None,
        as_trained=False,
        adapter=adapter,
        seed=config.seed,
    )
    merge_lora(model.backbone)
    calibration = _Calibration(0, [])
    if splits:
        calibration = _calibrate(config, model, splits, ptq.method, quant_spec, calibration_tokens)
    elif not while_reading:
        quantize_layers(model.backbone, quant_spec, ptq.rounds_inputs)
    with disk_errors_as(ModelError, path):
        save_preset(model, path)
    float_bytes, num_bytes = _sizes(model)
    return QuantizationResult(
        output=path,
        scheme=scheme,
        num_tokens=calibration.num_tokens,
        float_bytes=float_bytes,
        bytes=num_bytes,
        num_int8=sum(layer.scheme.quant_spec.scheme != ptq.scheme for layer in quantized_layers(model.backbone)),
        errors=calibration.errors,
        seconds=time.perf_counter() - start,
    )


def _calibrate(
    config: Config, model: keras.Model, splits: Splits, method: str, quant_spec: QuantSpec, num_tokens: int
) -> _Calibration:
    """Quantizes the model's blocks by what the training split gives to their layers."""
    examples = prepare_data(config, splits, model).train
    batches, num_tokens = _calibration_batches(config, examples, num_tokens)
    with progress.track_progress("quantized blocks", len(model.backbone.transformer_layers)) as advance:
        transform_for_training(model, None, packing=True, remat="none", row_length=config.row_length)
        return _Calibration(num_tokens, quantize_calibrated(model, batches, method, quant_spec, advance))


def _calibration_batches(
    config: Config, examples: Sequence[TokenizedExample], num_tokens: int
) -> tuple[list[Batch], int]:
    batches, count = calibration_batches(examples, config.row_length, num_tokens, config.seed)
    if count < FEWEST_TOKENS:
        raise DataError(
            f"{config.data.source} has {count} tokens for calibration; at least {FEWEST_TOKENS} are needed. Give more "
            "--calibration data."
        )
    return batches, count


def _sizes(model: keras.Model) -> tuple[int, int]:
    """Returns the bytes of all weights in float32, and the bytes of all arrays as they are held."""
    layers = quantized_layers(model.backbone)
    codes = {variable.path for layer in layers for variable in layer.code_variables}
    others = [variable for variable in model.backbone.variables if variable.path not in codes]
    held = sum(variable.value.nbytes for variable in others)
    held += sum(quantized_num_bytes(layer.quantized()) for layer in layers)
    num_weights = sum(variable.value.size for variable in others) + sum(layer.num_weights for layer in layers)
    return 4 * num_weights, held
