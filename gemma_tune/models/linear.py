"""KerasHub's linear layers as plain matrix products.

Kernels of several heads are stored (heads, width, head width), and XLA on CPU transposes such a kernel anew in every
step, forward and backward: an eighth of a step's time for Gemma 3 270M. Here each is used as it lies in memory: head by
head, or with two axes joined to one. XLA on GPU and TPU chooses layouts by itself, so there the einsum stays.
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

_MOST_HEADS = 32  # Beyond that many products, one transposition costs less.


def einsum_product(equation: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns jnp.einsum(equation, x, kernel) for the equations of KerasHub's Gemma layers.

    Args:
        equation: `btd,df->btf`, `btf,fd->btd`, `btnh,nhd->btd`, or `btd,ndh->btnh` and its like with other letters.
        x: Inputs, [B, L, …].
        kernel: [D, F], [F, D], [N, H, D], or [N, D, H].
    """
    if not is_single_cpu():
        return jnp.einsum(equation, x, kernel)
    axes = parse_einsum(equation)
    if len(axes.kernel) == 2 and axes.inputs[-1] == axes.kernel[0]:
        return cpu_matmul(x, kernel)
    if len(axes.kernel) == 3 and axes.inputs[-2:] == axes.kernel[:2]:
        return cpu_matmul(x.reshape(*x.shape[:-2], -1), kernel.reshape(-1, kernel.shape[-1]))
    if len(axes.kernel) == 3 and axes.inputs[-1] == axes.kernel[1] and kernel.shape[0] <= _MOST_HEADS:
        return jnp.stack([cpu_matmul(x, kernel[head]) for head in range(kernel.shape[0])], axis=-2)
    return jnp.einsum(equation, x, kernel)


class PlainEinsumDense(keras.layers.EinsumDense):
    """An EinsumDense that computes by `einsum_product`.

    Given to existing layers by `layer.__class__ = PlainEinsumDense`.
    """

    def call(self, inputs: Any, training: Any = None) -> Any:
        outputs = einsum_product(self.equation, inputs, keras.ops.cast(self.kernel, inputs.dtype))
        if self.bias is not None:
            outputs = keras.ops.add(outputs, self.bias)
        return outputs if self.activation is None else self.activation(outputs)


def use_plain_products(backbone: keras_hub.models.Backbone) -> None:
    """Swaps the float EinsumDense layers of a backbone; quantized ones and those with LoRA stay as they are."""
    for layer in linear_layers(backbone):
        if type(layer) is keras.layers.EinsumDense and layer.quantization_mode is None and not layer.lora_enabled:
            layer.__class__ = PlainEinsumDense


def fitting_spec(path: str, num_inputs: int, quant_spec: QuantSpec) -> QuantSpec:
    """Returns the grid that a layer is quantized to: the given one, or int8 where that doesn't fit and it allows it.

    Args:
        path: Of the layer.
        num_inputs: What its products sum over.
        quant_spec: How the model is to be quantized.

    Raises:
        ModelError: The inputs can't be cut into groups of `block_size`.
    """
    problem = block_size_problem(quant_spec, num_inputs)
    if not problem:
        return quant_spec
    if quant_spec.or_int8:
        return QuantSpec("int8")
    raise ModelError(
        f"{path} can't be quantized to {quant_spec.scheme}: {problem}. Take another of --block_size=32, 64, 128 or 256; "
        "int8, which has a scale for each channel; or --or_int8, which takes int8 for such layers alone."
    )
