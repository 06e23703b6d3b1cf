"""Calibrated quantization by GPTQ, AWQ and SmoothQuant, one decoder block after the other.

Each block's inputs are the outputs of the blocks before it once these are quantized. So only one block's statistics are
in memory, and the hidden states of the calibration data.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gemma_tune.data import Batch, TokenizedExample
from gemma_tune.errors import ModelError
from gemma_tune.models.blocks import block_inputs, block_signature, blocks_are_sequential, replaced_calls, run_block
from gemma_tune.models.functional import parameters, params_scope
from gemma_tune.models.layers import linear_layers
from gemma_tune.models.quantized.convert import matrix_shape, quantize_layer, schemes_for
from gemma_tune.quantization.awq import awq
from gemma_tune.quantization.codes import Quantized, dequantize, quantize
from gemma_tune.quantization.gptq import gptq
from gemma_tune.quantization.smoothquant import smooth_scale
from gemma_tune.quantization.spec import LayerScheme, QuantSpec
from gemma_tune.quantization.statistics import InputStatistics, add_statistics, observe, output_error
from gemma_tune.runtime.backend import keras
from gemma_tune.training.batches import TrainingBatches


class LayerError(NamedTuple):
    """Relative error of a layer's outputs on the calibration data: mean squared error divided by mean square.

    Attributes:
        path: Path of the layer.
        error: Error with calibration.
        error_of_rounding: Error with rounding to the nearest code, by the same quantization spec.
    """

    path: str
    error: float
    error_of_rounding: float


def quantize_calibrated(
    model: keras.Model,
    batches: Sequence[Batch],
    method: str,
    quant_spec: QuantSpec,
    advance: Callable[[int], None] = lambda count: None,
) -> list[LayerError]:
    """Quantizes the decoder blocks with calibration data; the tied embedding is rounded to the nearest code.

    Args:
        model: A float CausalLM without LoRA, with packing enabled.
        batches: Batches of calibration data, of one shape.
        method: `gptq`, `awq` or `smoothquant`; the last needs int8.
        quant_spec: Quantization spec of the codes.
        advance: Called with 1 after each block.

    Returns:
        The errors by layer.

    Raises:
        ModelError: A layer doesn't fit the quantization spec, the model's blocks are not sequential, or hidden states
            are not finite.
    """
    backbone = model.backbone
    if not blocks_are_sequential(backbone):
        raise ModelError(
            f"The blocks of {type(backbone).__name__} are not a plain sequence, so {method} can't quantize them "
            "one by one. Choose --scheme=int4, nf4 or int8."
        )
    schemes = schemes_for(backbone, quant_spec)
    quantize_layer(backbone.token_embedding, schemes[backbone.token_embedding.path])
    groups = parameters(model)
    states = [_first_inputs(model, groups.trainable | groups.frozen, batch) for batch in batches]
    observers: dict[str, Any] = {}
    runners: dict[str, Any] = {}
    errors = []
    for block in backbone.transformer_layers:
        layers = linear_layers(block)
        observer = observers.setdefault(block_signature(block), jax.jit(functools.partial(_observe, block)))
        total = None
        for (x, named), batch in zip(states, batches, strict=True):
            one = observer(_values(block), x, named, batch.segment_ids > 0)
            total = one if total is None else jax.tree.map(add_statistics, total, one, is_leaf=_is_statistics)
        for layer, statistics in zip(layers, total or [], strict=True):
            errors.append(_quantize_one(layer, statistics, method, schemes[layer.path].quant_spec))
        runner = runners.setdefault(block_signature(block), jax.jit(functools.partial(run_block, block)))
        states = [(runner(_values(block), x, named), named) for x, named in states]
        advance(1)
    return errors


def calibration_batches(
    examples: Sequence[TokenizedExample], row_length: int, num_tokens: int, seed: int = 0
) -> tuple[list[Batch], int]:
    """Makes batches of one packed row each until they hold enough tokens.

    Args:
        examples: Tokenized examples.
        row_length: Positions of a row.
        num_tokens: Number of tokens to reach; fewer if the examples have no more.
        seed: Random seed of the order.

    Returns:
        The batches, and their number of tokens.
    """
    rows = TrainingBatches(examples, batch_size=1, row_length=row_length, packing=True, seed=seed, num_epochs=1)
    batches, count = [], 0
    for index in range(len(rows)):
        if count >= num_tokens:
            break
        batches.append(rows[index])
        count += int((batches[-1].segment_ids > 0).sum())
    return batches, count


def _first_inputs(model: keras.Model, params: dict[str, jax.Array], batch: Batch) -> tuple[jax.Array, dict[str, Any]]:
    with params_scope(model, params):
        return block_inputs(model.backbone, batch.token_ids, batch.segment_ids, batch.positions)


def _values(block: Any) -> list[jax.Array]:
    return [variable.value for variable in block.variables]


def _is_statistics(value: Any) -> bool:
    return isinstance(value, InputStatistics)


def _observe(block: Any, values: list[jax.Array], x: jax.Array, named: dict[str, Any], mask: Any) -> list[Any]:
    """Runs a block, and returns the statistics of its linear layers' inputs."""
    found: dict[int, InputStatistics] = {}

    def tap(layer: Any) -> Callable:
        def call(inputs: jax.Array, training: Any = None) -> jax.Array:
            flat = inputs.reshape(*mask.shape, matrix_shape(layer)[1])
            found[id(layer)] = observe(flat, mask)
            return type(layer).call(layer, inputs)

        return call

    layers = linear_layers(block)
    with replaced_calls([(layer, tap(layer)) for layer in layers]):
        run_block(block, values, x, named)
    return [found[id(layer)] for layer in layers]


def _quantize_one(layer: Any, statistics: InputStatistics, method: str, quant_spec: QuantSpec) -> LayerError:
    values = jnp.asarray(layer._kernel.value, jnp.float32).reshape(matrix_shape(layer))
    quantized, scheme = _calibrated(values, statistics, method, quant_spec)
    quantize_layer(layer, scheme)
    layer.assign_quantized(quantized)
    error, of_rounding = (
        float(output_error(values, dequantize(one), statistics.hessian))
        for one in (quantized, jax.tree.map(jnp.asarray, quantize(values, quant_spec)))
    )
    return LayerError(layer.path, error, of_rounding)


def _calibrated(
    values: jax.Array, statistics: InputStatistics, method: str, quant_spec: QuantSpec
) -> tuple[Quantized, LayerScheme]:
    if method == "gptq":
        quantized, damping = gptq(values, statistics.hessian, quant_spec)
        if math.isinf(damping):
            raise ModelError("The model's hidden states are not finite. Try --precision=float32.")
        return quantized, LayerScheme(quant_spec)
    if method == "awq":
        quantized, scale = awq(values, statistics, quant_spec)
    else:
        scale = smooth_scale(values, statistics.largest)
        quantized = quantize(values * scale[:, None], quant_spec)
    return (
        quantized._replace(input_scale=(1 / scale)[None, :, None]),
        LayerScheme(quant_spec, has_input_scale=True, rounds_inputs=method == "smoothquant"),
    )
