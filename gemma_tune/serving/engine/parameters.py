"""Prepares a model's arrays for the engine's programs, and computes linear layers with them row by row."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gemma_tune.errors import ModelError
from gemma_tune.models.blocks import replaced_calls
from gemma_tune.models.functional import hidden_states, parameters
from gemma_tune.models.layers import linear_layers
from gemma_tune.models.quantized.fake_quant_layers import FakeQuantEinsumDense
from gemma_tune.models.quantized.layers import QuantizedEinsumDense
from gemma_tune.models.quantized.product import quantized_product
from gemma_tune.models.quantized.qat import rounded_params
from gemma_tune.runtime.backend import keras
from gemma_tune.serving.engine.adapters import StackedFactors, apply_row_factors
from gemma_tune.serving.engine.matmul import (
    MatmulWeights,
    einsum_matmul,
    kernel_matmul_weights,
    lm_head_matmul_weights,
)


class EngineParams(NamedTuple):
    """The arrays that the programs take as arguments.

    Attributes:
        variables: Variable path -> array of the model, without the kernels that are in `matrices`.
        matrices: Layer path -> kernel in the form that `matmul` multiplies with.
        lm_head: Tied embedding in that form; None: its own product is used.
        factors: Layer path -> LoRA factors of all adapters.
    """

    variables: dict[str, Any]
    matrices: dict[str, MatmulWeights]
    lm_head: MatmulWeights | None
    factors: dict[str, StackedFactors]


def called_linear_layers(model: keras.Model) -> dict[str, Any]:
    """Returns path -> linear layer that a forward pass calls. Of some layers, Gemma 4 uses only the kernel."""
    called = {}

    def recording(layer: Any) -> Callable:
        def call(inputs: Any, training: Any = None) -> Any:
            called[layer.path] = layer
            return type(layer).call(layer, inputs)

        return call

    tokens = jnp.ones((1, 2), jnp.int32)
    with replaced_calls([(layer, recording(layer)) for layer in linear_layers(model.backbone)]):
        jax.eval_shape(lambda: hidden_states(model.backbone, tokens, tokens, tokens))
    return called


def linear_call(
    layer: Any, matrix: MatmulWeights | None, factors: StackedFactors | None, adapters: Any, one: Any
) -> Callable:
    """Returns the `call` of a linear layer for rows with different adapters.

    Args:
        layer: An EinsumDense.
        matrix: Its kernel from `EngineParams.matrices`; None: the layer's own is used.
        factors: LoRA factors of all adapters on the layer, or None.
        adapters: [B] int32, index of each row's adapter.
        one: int32 1 that the compiler doesn't know, as for `matmul`.
    """

    def call(inputs: Any, training: Any = None) -> Any:
        del training
        if matrix is not None:
            outputs = einsum_matmul(layer.equation, _kernel_shape(layer), inputs, matrix, one)
        elif isinstance(layer, QuantizedEinsumDense):
            quantized, shape = layer.quantized(), layer.float_kernel.shape
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
    return tuple(layer.float_kernel.shape if isinstance(layer, QuantizedEinsumDense) else layer._kernel.shape)


def engine_params(model: keras.Model, layers: dict[str, Any], factors: dict[str, StackedFactors]) -> EngineParams:
    """Returns the arrays of a model as the programs take them.

    Args:
        model: A CausalLM.
        layers: Its linear layers, from `called_linear_layers`.
        factors: Layer path -> LoRA factors of all adapters.

    Raises:
        ModelError: An adapter has factors on a kernel that can't differ between rows.
    """
    groups = parameters(model)
    variables = rounded_params(model, {**groups.trainable, **groups.frozen})
    matrices = {}
    for path, layer in layers.items():
        kernel = None if isinstance(layer, QuantizedEinsumDense) else variables[layer._kernel.path]
        matrix = kernel_matmul_weights(layer, kernel)
        if matrix is not None:
            matrices[path] = matrix
    embedding = model.backbone.token_embedding
    lm_head = lm_head_matmul_weights(embedding, variables.get(embedding._embeddings.path))
    kept = {path: value for path, value in variables.items() if not _is_replaced(path, layers, matrices)}
    # Fake-quantized kernels have LoRA inside: it is part of what is rounded.
    by_row = {
        path: each
        for path, each in factors.items()
        if path in layers and not isinstance(layers[path], FakeQuantEinsumDense)
    }
    not_by_row = [path for path in factors if path not in layers and factors[path].a.shape[0] > 1]
    if not_by_row:
        raise ModelError(
            f"An adapter has factors on {not_by_row[0]}, whose kernel {type(model.backbone).__name__} uses in a way "
            "that can't differ between requests. Merge the adapter into the base (gemma-tune merge), and serve the "
            "merged model."
        )
    return EngineParams(kept, matrices, lm_head, by_row)


def _is_replaced(path: str, layers: dict[str, Any], matrices: dict[str, MatmulWeights]) -> bool:
    """Whether a variable is a kernel that is among the matrices."""
    layer = path.rsplit("/", 1)[0]
    return layer in matrices and layer in layers and not path.endswith("/bias")
