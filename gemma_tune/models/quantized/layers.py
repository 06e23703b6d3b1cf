"""Layers whose frozen kernel is held in few bits: QLoRA (arXiv:2305.14314) on KerasHub's layers.

A layer is given another class, and its float variable makes place for those of `quantization.grids.Quantized`, under
names like Keras's: `kernel` for the codes, `kernel_scale`, `kernel_zero`, and `kernel_scale_step` and
`kernel_scale_lowest` where the scales are quantized too. Products take the kernel apart when they need it and forget it
again: forward and backward each make one layer's floats, and the head those of a block of the vocabulary. Activations
stay float (Keras's int8 rounds those of the head too, and its gradient is lost in it), except where a scheme says so.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_tune.errors import ModelError
from gemma_tune.models.einsum import parse_einsum
from gemma_tune.models.linear import einsum_product
from gemma_tune.models.lm_head import apply_soft_cap
from gemma_tune.models.lora.layers import merged_kernel, with_factors
from gemma_tune.models.sharding.placement import put_sharded
from gemma_tune.quantization.codes import Quantized, Scales, dequantize, quantize, rows_of, shapes_of, take_rows
from gemma_tune.quantization.smoothquant import dynamic_product, quantize_activations
from gemma_tune.quantization.spec import LayerScheme
from gemma_tune.runtime.backend import keras

_ROWS_AT_ONCE = 4096  # Of an embedding, while it is read and in the head.
NUM_FIRST = 256  # Values of a float kernel that are remembered, so that an adapter knows its base.
_FIRST_KEY = "first_floats"
_quantize = jax.jit(quantize, static_argnames="quant_spec")  # NumPy takes forty times as long for NF4.


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QuantizedKernel:
    """What a quantized layer shows in the place of its float kernel: filled like a variable, it quantizes; in a product
    of JAX's it is the float kernel with LoRA's update, as Keras's `kernel` is (Gemma 4's blocks multiply so).

    layer: Quantized. path: Of the variable that it stands for. shape: Of the float kernel. sharding: Of the kernel as
        it is quantized, [P, C, Q], on a mesh.
    """

    layer: Any
    path: str
    shape: tuple[int, ...]
    sharding: Any = None

    def __jax_array__(self) -> jax.Array:
        layer = self.layer
        floats = dequantize(layer.quantized()).reshape(self.shape)
        if getattr(layer, "lora_enabled", False):
            floats = merged_kernel(layer, floats)
        return floats.astype(layer.compute_dtype)

    def fill(self, read_rows: Callable[[int, int], np.ndarray]) -> None:
        """Quantizes what a checkpoint holds. An embedding is read some rows at a time.

        Args:
            read_rows: Called with (start, stop) of the first axis; returns these rows in any float dtype.
        """
        quant_spec, shape, sharding = self.layer.scheme.quant_spec, self.layer._matrix_shape, self.sharding
        num_rows = self.shape[0]
        step = _ROWS_AT_ONCE if num_rows == shape[0] else num_rows
        parts = []
        for start in range(0, num_rows, step):
            rows = np.asarray(read_rows(start, min(start + step, num_rows)), np.float32)
            if rows.shape[1:] != self.shape[1:]:
                raise ModelError(
                    f"{self.path} has shape {self.shape}, but the checkpoint's rows have {rows.shape[1:]}."
                )
            if not start:
                object.__setattr__(self.layer, "_first_floats", rows.ravel()[:NUM_FIRST].copy())
            matrix = rows.reshape(-1, *shape[1:])
            if sharding is not None and step == num_rows:
                parts.append(_quantize(put_sharded(matrix, sharding), quant_spec))  # Each device its part.
            else:
                parts.append(jax.tree.map(np.asarray, _quantize(matrix, quant_spec)))
        arrays = jax.tree.map(lambda *pieces: pieces[0] if len(pieces) == 1 else np.concatenate(pieces), *parts)
        if self.layer.scheme.has_input_scale:
            arrays = arrays._replace(input_scale=np.ones((1, shape[1], 1), np.float32))
        self.layer.assign_quantized(arrays)


class _QuantizedLayer:
    """What both kinds of layers share. The class of a layer is changed by `quantize.quantize_layer`."""

    def take_scheme(self: Any, name: str, variable: keras.Variable, matrix_shape: tuple, scheme: LayerScheme) -> None:
        """Replaces a float variable by those of its codes, still without values in a skeleton.

        Args:
            name: `kernel` or `embeddings`.
            variable: The float one.
            matrix_shape: Its shape as [P, C, Q].
            scheme: How.
        """
        shapes = shapes_of(matrix_shape, scheme.quant_spec)
        if scheme.has_input_scale:
            shapes = shapes._replace(input_scale=jax.ShapeDtypeStruct((1, matrix_shape[1], 1), jnp.float32))
        self._tracker.unlock()
        self._untrack_variable(variable)
        scales = Scales(f"{name}_scale", f"{name}_scale_step", f"{name}_scale_lowest")
        names = Quantized(name, scales, f"{name}_zero", f"{name}_input_scale")
        found, tree = jax.tree.flatten(shapes)
        variables = [
            self.add_weight(
                name=one, shape=leaf.shape, dtype=str(leaf.dtype), initializer="zeros", trainable=False, autocast=False
            )
            for one, leaf in zip(_names_of(names, shapes), found, strict=True)
        ]
        setattr(self, f"_{name}", variables[0])  # Keras's enable_lora freezes it.
        self._tracker.lock()
        kernel = QuantizedKernel(self, variable.path, tuple(variable.shape))
        for attribute, value in {
            "scheme": scheme,
            "_matrix_shape": matrix_shape,
            "_float_kernel": kernel,
            "_code_tree": tree,
            "_code_variables": variables,
        }.items():
            object.__setattr__(self, attribute, value)  # Keras would look for layers and variables in them.

    def quantized(self: Any) -> Quantized:
        """Returns the arrays, as the scope around has them."""
        values = [keras.ops.convert_to_tensor(variable) for variable in self._code_variables]
        return jax.tree.unflatten(self._code_tree, values)

    def assign_quantized(self: Any, quantized: Quantized) -> None:
        """Puts other codes and scales, of the layer's own scheme, in the place of those there are."""
        leaves, tree = jax.tree.flatten(quantized)
        if tree != self._code_tree:
            raise ValueError(f"{self.path} holds {self._code_tree}, not {tree}.")
        for variable, value in zip(self._code_variables, leaves, strict=True):
            variable.assign(put_sharded(value, variable._layout))

    def save_own_variables(self: Any, store: Any) -> None:
        """Writes codes and scales as they are.

        Raises:
            ModelError: LoRA factors would be lost.
        """
        if getattr(self, "lora_enabled", False):
            raise ModelError(f"{self.path} has LoRA factors beside its codes. Save these with save_adapter.")
        values = [*self._code_variables, *([self.bias] if getattr(self, "bias", None) is not None else [])]
        for index, variable in enumerate(values):
            store[str(index)] = np.asarray(variable.value)
        store[_FIRST_KEY] = self._first_floats

    def load_own_variables(self: Any, store: Any) -> None:
        """Reads what `save_own_variables` wrote; the float kernel of any other Keras preset it quantizes."""
        names = list(store.keys())
        if _FIRST_KEY in names:
            object.__setattr__(self, "_first_floats", np.asarray(store[_FIRST_KEY]))
            for index, variable in enumerate(self._code_variables):
                variable.assign(put_sharded(np.asarray(store[str(index)]), variable._layout))
            bias = str(len(self._code_variables))
        else:
            self._float_kernel.fill(lambda start, stop: store["0"][start:stop])
            bias = "1"
        if getattr(self, "bias", None) is not None:
            self.bias.assign(store[bias])

    @property
    def quantized_scheme(self: Any) -> str:
        """`int8`, `int4` or `nf4`."""
        return self.scheme.quant_spec.scheme

    @property
    def num_weights(self: Any) -> int:
        """How many numbers the codes stand for."""
        return math.prod(self._matrix_shape)


class QuantizedEinsumDense(_QuantizedLayer, keras.layers.EinsumDense):
    """An EinsumDense with a quantized kernel, and LoRA's factors in float beside it."""

    @property
    def kernel(self) -> QuantizedKernel:
        """Stands for the floats, which are made in products only."""
        return self._float_kernel

    def dequantized(self) -> jax.Array:
        """Returns the floats that the codes stand for, in float32 and the kernel's shape."""
        return dequantize(self.quantized()).reshape(self._float_kernel.shape)

    def call(self, inputs: Any, training: Any = None) -> Any:
        quantized, shape = self.quantized(), self._float_kernel.shape
        outputs = quantized_product(self.equation, shape, self.scheme.rounds_inputs, inputs, quantized)
        if self.lora_enabled:
            outputs = with_factors(self, inputs, outputs)
        if self.bias is not None:
            outputs = keras.ops.add(outputs, self.bias)
        return outputs if self.activation is None else self.activation(outputs)


class QuantizedEmbedding(_QuantizedLayer, keras.layers.ReversibleEmbedding):
    """A tied embedding with quantized rows."""

    @property
    def embeddings(self) -> QuantizedKernel:
        """Stands for the floats. `quantized` has the arrays."""
        return self._float_kernel

    def head(self) -> Quantized:
        """Returns the rows as the loss takes them, [V, D, 1]."""
        return self.quantized()

    def call(self, inputs: Any, reverse: bool = False) -> Any:
        quantized = self.quantized()
        if not reverse:
            rows = take_rows(quantized, jnp.asarray(inputs, jnp.int32).ravel())
            return rows.reshape(*inputs.shape, -1).astype(self.compute_dtype)
        dtype = self.reverse_dtype or self.compute_dtype
        logits = _logits(jnp.asarray(inputs, dtype), quantized)
        return apply_soft_cap(logits, self.logit_soft_cap)


# Keras finds the saved weights of a layer in a list by the name of its class.
QuantizedEmbedding.__name__ = keras.layers.ReversibleEmbedding.__name__


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def quantized_product(
    equation: str, shape: tuple[int, ...], rounds_inputs: bool, x: jax.Array, kernel: Quantized
) -> jax.Array:
    """Returns jnp.einsum(equation, x, the dequantized kernel). Only x gets a gradient, and only codes are kept for it.

    Args:
        equation: Of the layer.
        shape: Of the float kernel.
        rounds_inputs: x is rounded to int8 first, with a scale for each token; its gradient passes straight through.
        x: Inputs, [B, L, …].
        kernel: Quantized.
    """
    if rounds_inputs:
        return _rounded_product(equation, shape, x, kernel)
    return einsum_product(equation, x, dequantize(kernel, x.dtype).reshape(shape))


def _product_forward(equation, shape, rounds_inputs, x, kernel):
    return quantized_product(equation, shape, rounds_inputs, x, kernel), kernel


def _product_backward(equation, shape, rounds_inputs, kernel, gradient):
    axes = parse_einsum(equation)
    sizes = dict(zip(axes.kernel + axes.outputs, (*shape, *gradient.shape), strict=True))
    anywhere = jnp.zeros(tuple(sizes[letter] for letter in axes.inputs), gradient.dtype)  # The product is linear in x.
    floats = dequantize(kernel, gradient.dtype).reshape(shape)
    _, pullback = jax.vjp(lambda x: einsum_product(equation, x, floats), anywhere)
    return *pullback(gradient), None


quantized_product.defvjp(_product_forward, _product_backward)


def _rounded_product(equation: str, shape: tuple[int, ...], x: jax.Array, kernel: Quantized) -> jax.Array:
    """Multiplies integers where hardware does that fast. XLA on CPU doesn't: there the same integers are multiplied as
    floats.
    """
    axes = parse_einsum(equation)
    outer = x.shape[: len(axes.batch)]
    flat = x.reshape(*outer, -1).astype(jnp.float32)
    if kernel.input_scale is not None:
        flat *= kernel.input_scale[0, :, 0]
        kernel = kernel._replace(input_scale=None)
    if jax.default_backend() != "cpu":
        sizes = [shape[index] for index in axes.kept_indices]
        return dynamic_product(flat, kernel).reshape(*outer, *sizes).astype(x.dtype)
    codes, step = quantize_activations(flat)
    rounded = (codes * step).reshape(x.shape).astype(x.dtype)
    return einsum_product(equation, rounded, dequantize(kernel, x.dtype).reshape(shape))


def _names_of(names: Quantized, shapes: Quantized) -> list[str]:
    """The names whose places in the tree hold an array."""
    flat_names, flat_shapes = (jax.tree.leaves(tree, is_leaf=lambda leaf: leaf is None) for tree in (names, shapes))
    present = [shape is not None for shape in flat_shapes]
    return [name for name, there in zip(flat_names[: len(present)], present, strict=True) if there]


def _logits(x: jax.Array, head: Quantized) -> jax.Array:
    """Returns [..., V]: x [..., D] times the rows, of which only a block is float at a time."""
    vocabulary, width = head.codes.shape[0], x.shape[-1]

    def product(start: Any, count: int) -> jax.Array:
        return x @ dequantize(rows_of(head, start, count), x.dtype).reshape(count, width).T

    whole = vocabulary // _ROWS_AT_ONCE
    parts = []
    if whole:
        blocks = jax.lax.map(lambda index: product(index * _ROWS_AT_ONCE, _ROWS_AT_ONCE), jnp.arange(whole))
        parts.append(jnp.moveaxis(blocks, 0, -2).reshape(*x.shape[:-1], -1))
    if vocabulary % _ROWS_AT_ONCE:
        parts.append(product(whole * _ROWS_AT_ONCE, vocabulary % _ROWS_AT_ONCE))
    return jnp.concatenate(parts, axis=-1)
