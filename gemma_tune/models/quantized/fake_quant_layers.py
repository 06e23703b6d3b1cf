"""Layers of quantization-aware training: they compute with rounded weights, and learn the floats behind them.

The forward pass uses each kernel as converting it would leave it. The gradient of the rounded kernel is given to the
floats unchanged, as if nothing had been rounded: the straight-through estimator (arXiv:1308.3432), with weights as in
arXiv:1712.05877, section 3. Rounding is that of `quantization/codes.py`, in float32 whatever the precision, so that
`models/quantized/convert.py` makes the same weights of the trained ones. With LoRA the sum W + s·A·B is rounded, since
merging and converting gives that; W stays frozen.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gemma_tune.models.linear import einsum_product
from gemma_tune.models.lm_head import apply_soft_cap
from gemma_tune.models.lora.factors import kernel_update, low_rank_product
from gemma_tune.quantization.codes import fake_quantize
from gemma_tune.quantization.fake import FakeQuantized
from gemma_tune.quantization.spec import QuantSpec
from gemma_tune.runtime.backend import keras

_ARE_ROUNDED: contextvars.ContextVar[bool] = contextvars.ContextVar("weights_are_rounded", default=False)


class Rounding(NamedTuple):
    """How a float kernel becomes the rounded one that its layer computes with.

    Attributes:
        quant_spec: Quantization spec of the later conversion.
        matrix_shape: Shape of the kernel as [P, C, Q], where products sum over C.
        lora_scale: Factor s of LoRA's update s·A·B; 0 without LoRA.
        equation: Einsum equation of the layer; empty for an embedding.
    """

    quant_spec: QuantSpec
    matrix_shape: tuple[int, int, int]
    lora_scale: float
    equation: str


def rounded_kernel(rounding: Rounding, kernel: jax.Array, factors: tuple[jax.Array, ...]) -> jax.Array:
    """Returns a kernel with LoRA's update merged as `merge_lora` does, rounded, in float32 and the kernel's shape.

    Gradients pass straight through the rounding.

    Args:
        rounding: Rounding of the layer.
        kernel: Float kernel in its own shape and dtype. Merging rounds to this dtype too.
        factors: () or (A, B).
    """
    matrix = merged_kernel_of(rounding, kernel, factors).astype(jnp.float32).reshape(rounding.matrix_shape)
    return fake_quantize(matrix, rounding.quant_spec).reshape(kernel.shape)


def merged_kernel_of(rounding: Rounding, kernel: jax.Array, factors: tuple[jax.Array, ...]) -> jax.Array:
    """Returns a kernel with LoRA's update, not rounded, in its own dtype. Arguments as of `rounded_kernel`."""
    if not factors:
        return kernel
    update = kernel_update(rounding.equation, rounding.lora_scale, *factors)
    return (kernel.astype(jnp.float32) + update).astype(kernel.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def fake_quantized_product(
    equation: str, rounding: Rounding, x: jax.Array, kernel: jax.Array, factors: tuple[jax.Array, ...]
) -> jax.Array:
    """Returns einsum(equation, x, rounded kernel). The backward pass rounds again, so that no rounded kernel is kept.

    With G the gradient of the rounded kernel, the kernel's gradient is G. With LoRA it has none; that of A is s·G·Bᵀ
    and that of B is s·Aᵀ·G.

    Args:
        equation: Einsum equation of the layer, as `einsum_product` takes it.
        rounding: Rounding of the layer.
        x: Inputs, [B, L, …].
        kernel: Float kernel in its own shape and dtype.
        factors: () or (A, B).
    """
    return einsum_product(equation, x, rounded_kernel(rounding, kernel, factors).astype(x.dtype))


def _product_forward(
    equation: str, rounding: Rounding, x: jax.Array, kernel: jax.Array, factors: tuple[jax.Array, ...]
) -> tuple[jax.Array, tuple]:
    return fake_quantized_product(equation, rounding, x, kernel, factors), (x, kernel, factors)


def _product_backward(equation: str, rounding: Rounding, saved: tuple, gradient: jax.Array) -> tuple:
    x, kernel, factors = saved
    rounded = rounded_kernel(rounding, kernel, factors).astype(x.dtype)
    of_x, of_kernel = jax.vjp(functools.partial(einsum_product, equation), x, rounded)[1](gradient)
    if not factors:
        return of_x, of_kernel.astype(kernel.dtype), ()

    def update_product(*factors: jax.Array) -> jax.Array:
        return low_rank_product(equation, rounding.lora_scale, x, *(factor.astype(x.dtype) for factor in factors))

    # By way of x·A·B no array of the kernel's size is made for the factors.
    return of_x, None, jax.vjp(update_product, *factors)[1](gradient)


fake_quantized_product.defvjp(_product_forward, _product_backward)


@contextlib.contextmanager
def weights_are_rounded() -> Iterator[None]:
    """A context in which layers of quantization-aware training take their kernels to be rounded already, as
    `qat.rounded_params` makes them.
    """
    token = _ARE_ROUNDED.set(True)
    try:
        yield
    finally:
        _ARE_ROUNDED.reset(token)


class FakeQuantLayer:
    """The part that both kinds of layers of quantization-aware training share. `enable_qat` gives a layer its class
    and its `rounding`.

    Attributes:
        rounding: Rounding of the kernel.
    """

    rounding: Rounding

    def variables_to_round(self: Any) -> list[keras.Variable]:
        """Returns the variables of the kernel and of LoRA's factors."""
        kind = "embeddings" if isinstance(self, keras.layers.Embedding) else "kernel"
        names = [f"_{kind}", *((f"lora_{kind}_a", f"lora_{kind}_b") if self.lora_enabled else ())]
        return [getattr(self, name) for name in names]

    def float_arrays(self: Any) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Returns the float kernel and the factors, those of the stateless scope if it is within one."""
        kernel, *factors = (variable.value for variable in self.variables_to_round())
        return kernel, tuple(factors)

    def rounded(self: Any) -> jax.Array:
        """Returns the rounded kernel, in float."""
        kernel, factors = self.float_arrays()
        return kernel if _ARE_ROUNDED.get() else rounded_kernel(self.rounding, kernel, factors)


class FakeQuantEinsumDense(FakeQuantLayer, keras.layers.EinsumDense):
    """An EinsumDense that computes with its kernel, LoRA's update included, rounded.

    Existing layers become one by `layer.__class__ = FakeQuantEinsumDense`.
    """

    @property
    def kernel(self) -> jax.Array:
        """Rounded kernel, with which Gemma 4's blocks multiply. The variable `_kernel` has the floats."""
        return self.rounded().astype(self.compute_dtype)

    def call(self, inputs: Any, training: Any = None) -> Any:
        if _ARE_ROUNDED.get():
            outputs = einsum_product(self.equation, inputs, self.rounded().astype(inputs.dtype))
        else:
            outputs = fake_quantized_product(self.equation, self.rounding, inputs, *self.float_arrays())
        if self.bias is not None:
            outputs = keras.ops.add(outputs, self.bias)
        return outputs if self.activation is None else self.activation(outputs)

    def save_own_variables(self, store: Any) -> None:
        """Writes the floats, with LoRA's update merged, as an EinsumDense does."""
        store["0"] = merged_kernel_of(self.rounding, *self.float_arrays())
        if self.bias is not None:
            store["1"] = self.bias


class FakeQuantEmbedding(FakeQuantLayer, keras.layers.ReversibleEmbedding):
    """A tied embedding whose rows are rounded where they are used. `embeddings` has the floats."""

    def lm_head(self) -> FakeQuantized:
        """Returns the rows, from which the loss makes logits."""
        return FakeQuantized(merged_kernel_of(self.rounding, *self.float_arrays()), self.rounding.quant_spec)

    def call(self, inputs: Any, reverse: bool = False) -> Any:
        if not reverse:
            return self._look_up(jnp.asarray(inputs, jnp.int32))
        dtype = self.reverse_dtype or self.compute_dtype
        logits = jnp.asarray(inputs, dtype) @ self.rounded().astype(dtype).T
        return apply_soft_cap(logits, self.logit_soft_cap)

    def _look_up(self, token_ids: jax.Array) -> jax.Array:
        """Rounds the rows of these tokens alone."""
        embeddings, factors = self.float_arrays()
        rows = embeddings[token_ids.ravel()]
        if not _ARE_ROUNDED.get():
            factors = (factors[0][token_ids.ravel()], factors[1]) if factors else ()
            rows = rounded_kernel(self.rounding, rows, factors)
        return rows.reshape(*token_ids.shape, -1).astype(self.compute_dtype)


# Keras finds the saved weights of a layer in a list by the name of its class.
FakeQuantEmbedding.__name__ = keras.layers.ReversibleEmbedding.__name__
