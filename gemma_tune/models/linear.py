"""Computes KerasHub's linear layers as plain matrix products on a CPU, and chooses the quantization of a layer.

Kernels with several heads are stored as [N, D, H]. XLA on CPU transposes such a kernel again in every step, forward and
backward, which takes an eighth of a step's time for Gemma 3 270M. Here each kernel is used as it lies in memory: one
head after the other, or with two axes joined to one. XLA on GPU and TPU chooses the memory order itself, so that the
einsum stays there.
"""

from typing import Any

import jax
import jax.numpy as jnp

from gemma_tune.errors import ModelError
from gemma_tune.models.cpu.bfloat16 import cpu_matmul
from gemma_tune.models.einsum import parse_einsum
from gemma_tune.models.layers import linear_layers
from gemma_tune.quantization.spec import QuantSpec, block_size_problem
from gemma_tune.runtime.backend import is_single_cpu, keras, keras_hub

_MAX_HEADS = 32  # With more products than that, one transposition costs less.


def einsum_product(equation: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns jnp.einsum(equation, x, kernel).

    Args:
        equation: Einsum equation of a linear layer. Those of Gemma layers are fast on a CPU: `btd,df->btf`,
            `btnh,nhd->btd`, `btd,ndh->btnh`, and the same with other letters.
        x: Inputs, [B, L, …].
        kernel: [D, F], [F, D], [N, H, D], or [N, D, H] array.
    """
    if not is_single_cpu():
        return jnp.einsum(equation, x, kernel)
    axes = parse_einsum(equation)
    if len(axes.kernel) == 2 and axes.inputs[-1] == axes.kernel[0]:
        return cpu_matmul(x, kernel)
    if len(axes.kernel) == 3 and axes.inputs[-2:] == axes.kernel[:2]:
        return cpu_matmul(x.reshape(*x.shape[:-2], -1), kernel.reshape(-1, kernel.shape[-1]))
    if len(axes.kernel) == 3 and axes.inputs[-1] == axes.kernel[1] and kernel.shape[0] <= _MAX_HEADS:
        return jnp.stack([cpu_matmul(x, kernel[head]) for head in range(kernel.shape[0])], axis=-2)
    return jnp.einsum(equation, x, kernel)


class PlainEinsumDense(keras.layers.EinsumDense):
    """An EinsumDense that computes by `einsum_product`.

    Existing layers become one by `layer.__class__ = PlainEinsumDense`.
    """

    def call(self, inputs: Any, training: Any = None) -> Any:
        outputs = einsum_product(self.equation, inputs, keras.ops.cast(self.kernel, inputs.dtype))
        if self.bias is not None:
            outputs = keras.ops.add(outputs, self.bias)
        return outputs if self.activation is None else self.activation(outputs)


def use_plain_products(backbone: keras_hub.models.Backbone) -> None:
    """Makes the float linear layers of a backbone compute by `einsum_product`. Quantized layers and those with LoRA do
    so already, and stay as they are.
    """
    for layer in linear_layers(backbone):
        if type(layer) is keras.layers.EinsumDense and layer.quantization_mode is None and not layer.lora_enabled:
            layer.__class__ = PlainEinsumDense


def fitting_spec(path: str, num_inputs: int, quant_spec: QuantSpec) -> QuantSpec:
    """Returns the quantization spec of one layer: the model's, or int8 where that doesn't fit and `or_int8` is set.

    Args:
        path: Path of the layer.
        num_inputs: Number of inputs that the layer's products sum over.
        quant_spec: Quantization spec of the model.

    Raises:
        ModelError: `block_size` doesn't divide the inputs, and `or_int8` is not set.
    """
    problem = block_size_problem(quant_spec, num_inputs)
    if not problem:
        return quant_spec
    if quant_spec.or_int8:
        return QuantSpec("int8")
    raise ModelError(
        f"{path} can't be quantized to {quant_spec.scheme}: {problem}. Choose another --block_size (32, 64, 128 or "
        "256); int8, which has a scale for each output channel; or --or_int8, which quantizes only such layers to int8."
    )
