"""Quantization-aware training: layers that compute with rounded weights, and learn the floats behind them.

The forward pass sees each kernel as converting it would leave it. The gradient in the rounded kernel is given to the
floats as it is, as if nothing had been rounded: the straight-through estimator (arXiv:1308.3432), with weights as in
arXiv:1712.05877, section 3. Rounding is that of `quantization.grids`, in float32 whatever the precision, so that
`models.quantized` makes the same weights of the trained ones. With LoRA it is the sum W + s·A·B that is
rounded, since that is what merging and converting gives; W stays frozen.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gemma_tune.errors import ModelError
from gemma_tune.models.functional import Params
from gemma_tune.models.layers import iter_layers, quantizable_layers
from gemma_tune.models.linear import einsum_product, fitting_spec
from gemma_tune.models.lm_head import apply_soft_cap
from gemma_tune.models.lora.factors import kernel_update, low_rank_product
from gemma_tune.models.lora.layers import equation_of, lora_spec_of
from gemma_tune.models.quantized.convert import matrix_shape
from gemma_tune.quantization.codes import fake_quantize
from gemma_tune.quantization.fake import FakeQuantized
from gemma_tune.quantization.spec import QuantSpec
from gemma_tune.runtime.backend import keras, keras_hub

_ARE_ROUNDED: contextvars.ContextVar[bool] = contextvars.ContextVar("weights_are_rounded", default=False)


class Rounding(NamedTuple):
    """How a kernel becomes what its layer computes with.

    quant_spec: Of the conversion. matrix_shape: The kernel as [P, C, Q], where products sum over C. lora_scale: s; 0 without
    factors. equation: Of the layer; empty for an embedding.
    """

    quant_spec: QuantSpec
    matrix_shape: tuple[int, int, int]
    lora_scale: float
    equation: str


def rounded_kernel(rounding: Rounding, kernel: jax.Array, factors: tuple[jax.Array, ...]) -> jax.Array:
    """Returns the kernel in float32, with LoRA's update merged as `merge_lora` does, and rounded.

    Gradients go straight through.

    Args:
        rounding: How.
        kernel: In its own shape and dtype, which merging rounds to.
        factors: () or (A, B).
    """
    return fake_quantize(
        _merged(rounding, kernel, factors).astype(jnp.float32).reshape(rounding.matrix_shape), rounding.quant_spec
    ).reshape(kernel.shape)


def _merged(rounding: Rounding, kernel: jax.Array, factors: tuple[jax.Array, ...]) -> jax.Array:
    if not factors:
        return kernel
    update = kernel_update(rounding.equation, rounding.lora_scale, *factors)
    return (kernel.astype(jnp.float32) + update).astype(kernel.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def fake_quantized_product(
    equation: str, rounding: Rounding, x: jax.Array, kernel: jax.Array, factors: tuple[jax.Array, ...]
) -> jax.Array:
    """Returns jnp.einsum(equation, x, the rounded kernel). The backward pass rounds again instead of keeping it.

    With K the rounded kernel and G its gradient, that of the kernel is G, or with factors that of A is
    s·G·Bᵀ, that of B s·Aᵀ·G, and the kernel has none.

    Args:
        equation: Of the layer, as `einsum_product` takes it.
        rounding: How.
        x: Inputs, [B, L, …].
        kernel: In its own shape and dtype.
        factors: () or (A, B).
    """
    return einsum_product(equation, x, rounded_kernel(rounding, kernel, factors).astype(x.dtype))


def _product_forward(equation, rounding, x, kernel, factors):
    return fake_quantized_product(equation, rounding, x, kernel, factors), (x, kernel, factors)


def _product_backward(equation, rounding, saved, gradient):
    x, kernel, factors = saved
    rounded = rounded_kernel(rounding, kernel, factors).astype(x.dtype)
    of_x, of_kernel = jax.vjp(functools.partial(einsum_product, equation), x, rounded)[1](gradient)
    if not factors:
        return of_x, of_kernel.astype(kernel.dtype), ()

    def product(*factors):
        return low_rank_product(equation, rounding.lora_scale, x, *(factor.astype(x.dtype) for factor in factors))

    return of_x, None, jax.vjp(product, *factors)[1](gradient)  # No array of the kernel's size is made for these.


fake_quantized_product.defvjp(_product_forward, _product_backward)


class _FakeQuantLayer:
    """What both kinds of layers share. The class of a layer is changed by `enable_qat`."""

    def _variables_to_round(self: Any) -> list[keras.Variable]:
        """The kernel, and LoRA's factors."""
        kind = "embeddings" if isinstance(self, keras.layers.Embedding) else "kernel"
        names = [f"_{kind}", *((f"lora_{kind}_a", f"lora_{kind}_b") if self.lora_enabled else ())]
        return [getattr(self, name) for name in names]

    def _arrays(self: Any) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Returns the kernel's floats and the factors, as the scope around has them."""
        kernel, *factors = (variable.value for variable in self._variables_to_round())
        return kernel, tuple(factors)

    def rounded(self: Any) -> jax.Array:
        """Returns what products are computed with, in float."""
        kernel, factors = self._arrays()
        return kernel if _ARE_ROUNDED.get() else rounded_kernel(self._rounding, kernel, factors)


class FakeQuantEinsumDense(_FakeQuantLayer, keras.layers.EinsumDense):
    """An EinsumDense that computes with its kernel, LoRA's update included, rounded to a grid.

    Given to existing layers by `layer.__class__ = FakeQuantEinsumDense`.
    """

    @property
    def kernel(self) -> jax.Array:
        """The rounded kernel, as Gemma 4's blocks multiply with it. `_kernel` has the floats."""
        return self.rounded().astype(self.compute_dtype)

    def call(self, inputs: Any, training: Any = None) -> Any:
        if _ARE_ROUNDED.get():
            outputs = einsum_product(self.equation, inputs, self.rounded().astype(inputs.dtype))
        else:
            outputs = fake_quantized_product(self.equation, self._rounding, inputs, *self._arrays())
        if self.bias is not None:
            outputs = keras.ops.add(outputs, self.bias)
        return outputs if self.activation is None else self.activation(outputs)

    def save_own_variables(self, store: Any) -> None:
        """Writes the floats, with LoRA's update, as an EinsumDense does."""
        store["0"] = _merged(self._rounding, *self._arrays())
        if self.bias is not None:
            store["1"] = self.bias


class FakeQuantEmbedding(_FakeQuantLayer, keras.layers.ReversibleEmbedding):
    """A tied embedding whose rows are rounded where they are used; `embeddings` has the floats."""

    def head(self) -> FakeQuantized:
        """Returns the rows as the loss takes them."""
        return FakeQuantized(_merged(self._rounding, *self._arrays()), self._rounding.quant_spec)

    def call(self, inputs: Any, reverse: bool = False) -> Any:
        if not reverse:
            return self._look_up(jnp.asarray(inputs, jnp.int32))
        dtype = self.reverse_dtype or self.compute_dtype
        logits = jnp.asarray(inputs, dtype) @ self.rounded().astype(dtype).T
        return apply_soft_cap(logits, self.logit_soft_cap)

    def _look_up(self, token_ids: jax.Array) -> jax.Array:
        """Rounds the rows of these tokens alone."""
        embeddings, factors = self._arrays()
        rows = embeddings[token_ids.ravel()]
        if not _ARE_ROUNDED.get():
            factors = (factors[0][token_ids.ravel()], factors[1]) if factors else ()
            rows = rounded_kernel(self._rounding, rows, factors)
        return rows.reshape(*token_ids.shape, -1).astype(self.compute_dtype)


# Keras finds the saved weights of a layer in a list by the name of its class.
FakeQuantEmbedding.__name__ = keras.layers.ReversibleEmbedding.__name__


def enable_qat(backbone: keras_hub.models.Backbone, quant_spec: QuantSpec) -> int:
    """Makes all linear layers of the decoder blocks, and the tied embedding, compute with rounded weights: those that
    `quantize_layers` quantizes.

    Args:
        backbone: After LoRA is enabled, if it is to be.
        quant_spec: That of the conversion afterwards, without double quantization.

    Returns:
        Number of layers.

    Raises:
        ModelError: The weights are quantized already, a layer's inputs can't be cut into groups of `block_size`, or its
            factors are DoRA's.
    """
    layers = quantizable_layers(backbone)
    for layer in layers:
        if hasattr(layer, "quantized_scheme"):
            raise ModelError(
                f"{layer.path} is held in {layer.quantized_scheme}: its floats are gone. Load the model without "
                "quantization for training.qat."
            )
        if layer.lora_enabled and lora_spec_of(layer).use_dora:
            raise ModelError(f"{layer.path} has DoRA factors, which training.qat can't round. Set lora.use_dora=false.")
    grids = [fitting_spec(layer.path, matrix_shape(layer)[1], quant_spec) for layer in layers]
    for layer, own in zip(layers, grids, strict=True):
        rows, inputs, outputs = matrix_shape(layer)
        is_embedding = layer is backbone.token_embedding
        scale = lora_spec_of(layer).scale if layer.lora_enabled else 0.0
        layer.__class__ = FakeQuantEmbedding if is_embedding else FakeQuantEinsumDense
        # Of an embedding any number of rows is rounded at a time. Keras would look for variables in the tuple.
        shape = (-1 if is_embedding else rows, inputs, outputs)
        object.__setattr__(layer, "_rounding", Rounding(own, shape, scale, equation_of(layer)))
        for variable in layer._variables_to_round():
            variable._autocast = False  # Else mixed precision would round the floats to bfloat16 first.
    return len(layers)


def disable_qat(backbone: keras_hub.models.Backbone) -> None:
    """Makes layers compute with their floats again. LoRA must be merged."""
    for layer in iter_layers(backbone, _FakeQuantLayer):
        for variable in layer._variables_to_round():
            variable._autocast = True
        is_embedding = layer is backbone.token_embedding
        layer.__class__ = keras.layers.ReversibleEmbedding if is_embedding else keras.layers.EinsumDense


def rounded_params(model: keras.Model, params: Params) -> Params:
    """Rounds all weights once, for many calls within `weights_are_rounded`.

    Args:
        model: A CausalLM.
        params: All its arrays by variable path.

    Returns:
        The same; where QAT is on, kernels are rounded with LoRA's updates merged, and there are no factors.
    """
    changed = dict(params)
    for layer in iter_layers(model.backbone, _FakeQuantLayer):
        paths = [variable.path for variable in layer._variables_to_round()]
        kernel, *factors = (changed.pop(path) for path in paths)
        changed[paths[0]] = _rounded_kernel(layer._rounding, kernel, tuple(factors))
    return changed


@contextlib.contextmanager
def weights_are_rounded() -> Iterator[None]:
    """Within it, layers of quantization-aware training take their arrays to be those of `rounded_params`."""
    token = _ARE_ROUNDED.set(True)
    try:
        yield
    finally:
        _ARE_ROUNDED.reset(token)


_rounded_kernel = jax.jit(rounded_kernel, static_argnums=0)


