"""What the programs of an engine compute with: a model's arrays, some in another form, and how its layers take them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gemma_tune.errors import ModelError
from gemma_tune.models.blocks import replaced_calls
from gemma_tune.models.functional import hidden_states, parameters
from gemma_tune.models.layers import linear_layers
from gemma_tune.models.quantized.layers import QuantizedEinsumDense
from gemma_tune.models.quantized.product import quantized_product
from gemma_tune.models.quantized.qat import rounded_params
from gemma_tune.runtime.backend import keras
from gemma_tune.serving.engine.adapters import StackedFactors, apply_row_factors
from gemma_tune.serving.engine.matmul import (
    MatmulWeights,
    einsum_matmul,
    is_fake_quantized,
    kernel_matmul_weights,
    lm_head_matmul_weights,
)


class EngineParams(NamedTuple):
    """What the programs compute with.

    params: The model's arrays by variable path, but for kernels that are in `matrices`. matrices: Layer path -> the
        kernel as it is multiplied with. head: The same of the tied embedding, or None. factors: Layer path -> LoRA.
    """

    params: dict[str, Any]
    matrices: dict[str, MatmulWeights]
    head: MatmulWeights | None
    factors: dict[str, StackedFactors]


def called_linear_layers(model: keras.Model) -> dict[str, Any]:
    """Returns path -> linear layer of those that are called. Gemma 4's blocks take some layers' kernels instead."""
    called = {}

    def noticed(layer: Any) -> Callable:
        def call(inputs: Any, training: Any = None) -> Any:
            called[layer.path] = layer
            return type(layer).call(layer, inputs)

        return call

    tokens = jnp.ones((1, 2), jnp.int32)
    with replaced_calls([(layer, noticed(layer)) for layer in linear_layers(model.backbone)]):
        jax.eval_shape(lambda: hidden_states(model.backbone, tokens, tokens, tokens))
    return called


def linear_call(
    layer: Any, matrix: MatmulWeights | None, factors: StackedFactors | None, adapters: Any, one: Any
) -> Callable:
    """What a linear layer computes for rows of several adapters."""

    def call(inputs: Any, training: Any = None) -> Any:
        del training
        if matrix is not None:
            outputs = einsum_matmul(layer.equation, _kernel_shape(layer), inputs, matrix, one)
        elif isinstance(layer, QuantizedEinsumDense):
            quantized, shape = layer.quantized(), layer._float_kernel.shape
            outputs = quantized_product(layer.equation, shape, layer.scheme.rounds_inputs, inputs, quantized)
        else:
            outputs = jnp.einsum(layer.equation, inputs, jnp.asarray(layer._kernel.value, inputs.dtype))
        if factors is not None:
            outputs = apply_row_factors(layer.equation, inputs, outputs, factors, adapters)
        if layer.bias is not None:
            outputs = keras.ops.add(outputs, layer.bias)
        return outputs if layer.activation is None else layer.activation(outputs)

    return call


def _kernel_shape(layer: Any) -> tuple[int, ...]:
    return tuple(layer._float_kernel.shape if isinstance(layer, QuantizedEinsumDense) else layer._kernel.shape)


def engine_params(model: keras.Model, layers: dict[str, Any], factors: dict[str, StackedFactors]) -> EngineParams:
    """Returns what the programs compute with, for a model, its called layers, and the factors of its adapters."""
    groups = parameters(model)
    params = rounded_params(model, {**groups.trainable, **groups.frozen})
    matrices = {}
    for path, layer in layers.items():
        kernel = None if isinstance(layer, QuantizedEinsumDense) else params[layer._kernel.path]
        matrix = kernel_matmul_weights(layer, kernel)
        if matrix is not None:
            matrices[path] = matrix
    embedding = model.backbone.token_embedding
    head = lm_head_matmul_weights(embedding, params.get(embedding._embeddings.path))
    kept = {path: value for path, value in params.items() if not _is_elsewhere(path, layers, matrices)}
    by_row = {path: each for path, each in factors.items() if path in layers and not is_fake_quantized(layers[path])}
    inside = [path for path in factors if path not in layers and factors[path].a.shape[0] > 1]
    if inside:
        raise ModelError(
            f"An adapter has factors on {inside[0]}, which {type(model.backbone).__name__} computes with in a way that "
            "rows can't differ in. Merge it into the base (gemma-tune merge), and serve the merged model."
        )
    return EngineParams(kept, matrices, head, by_row)


def _is_elsewhere(path: str, layers: dict[str, Any], matrices: dict[str, MatmulWeights]) -> bool:
    layer = path.rsplit("/", 1)[0]
    return layer in matrices and layer in layers and not path.endswith("/bias")
