"""Layers whose frozen kernel is held in few bits: QLoRA (arXiv:2305.14314) on KerasHub's layers.

A layer is given another class, and its float variable makes place for those of `quantization.grids.Quantized`, under
names like Keras's: `kernel` for the codes, `kernel_scale`, `kernel_zero`, and `kernel_scale_step` and
`kernel_scale_lowest` where the scales are quantized too. Products take the kernel apart when they need it and forget it
again: forward and backward each make one layer's floats, and the head those of a block of the vocabulary. Activations
stay float (Keras's int8 rounds those of the head too, and its gradient is lost in it).
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma_tune.errors import ModelError
from gemma_tune.keras_runtime import keras, keras_hub
from gemma_tune.models.linear import einsum_product
from gemma_tune.models.lora import low_rank_product
from gemma_tune.quantization.grids import Quantized, Scales, dequantize, quantize, rows_of, shapes_of, take_rows
from gemma_tune.quantization.scheme import Grid, why_not

_ROWS_AT_ONCE = 4096  # Of an embedding, while it is read and in the head.
NUM_FIRST = 256  # Values of a float kernel that are remembered, so that an adapter knows its base.


class QuantizedKernel(NamedTuple):
    """What a quantized layer shows in the place of its float kernel: filled like a variable, it quantizes.

    layer: Quantized. path: Of the variable that it stands for. shape: Of the float kernel.
    """

    layer: Any
    path: str
    shape: tuple[int, ...]

    def fill(self, read_rows: Callable[[int, int], np.ndarray]) -> None:
        """Quantizes what a checkpoint holds. An embedding is read some rows at a time.

        Args:
            read_rows: Called with (start, stop) of the first axis; returns these rows in any float dtype.
        """
        grid, shape = self.layer._grid, self.layer._matrix_shape
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
            parts.append(quantize(rows.reshape(-1, *shape[1:]), grid))
        arrays = jax.tree.map(lambda *pieces: jnp.asarray(np.concatenate(pieces)), *parts)
        for variable, value in zip(self.layer._code_variables, jax.tree.leaves(arrays), strict=True):
            variable.assign(value)


class _QuantizedLayer:
    """What both kinds of layers share. The class of `layer` is changed by `quantize_layer`."""

    def _take_quantized(self: Any, name: str, variable: keras.Variable, matrix_shape: tuple, grid: Grid) -> None:
        """Replaces a float variable by those of its codes, still without values in a skeleton."""
        shapes = shapes_of(matrix_shape, grid)
        self._tracker.unlock()
        self._untrack_variable(variable)
        names = Quantized(name, Scales(f"{name}_scale", f"{name}_scale_step", f"{name}_scale_lowest"), f"{name}_zero")
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
            "_grid": grid,
            "_matrix_shape": matrix_shape,
            "_float_kernel": kernel,
            "_code_tree": tree,
            "_code_variables": variables,
        }.items():
            object.__setattr__(self, attribute, value)  # Keras would look for layers and variables in them.

    def _quantized(self: Any) -> Quantized:
        """The arrays, as the scope around has them."""
        values = [keras.ops.convert_to_tensor(variable) for variable in self._code_variables]
        return jax.tree.unflatten(self._code_tree, values)

    def load_own_variables(self: Any, store: Any) -> None:
        """Reads the float kernel of a Keras preset, and quantizes it."""
        self._float_kernel.fill(lambda start, stop: store["0"][start:stop])
        if getattr(self, "bias", None) is not None:
            self.bias.assign(store["1"])

    @property
    def quantized_scheme(self: Any) -> str:
        """`int8`, `int4` or `nf4`."""
        return self._grid.scheme


class QuantizedEinsumDense(_QuantizedLayer, keras.layers.EinsumDense):
    """An EinsumDense with a quantized kernel, and LoRA's factors in float beside it."""

    @property
    def kernel(self) -> QuantizedKernel:
        """Not the floats: these are made in products only. `dequantized_kernel` makes them."""
        return self._float_kernel

    def dequantized_kernel(self) -> jax.Array:
        """Returns the float kernel, in its own shape, without LoRA."""
        return dequantize(self._quantized()).reshape(self._float_kernel.shape)

    def call(self, inputs: Any, training: Any = None) -> Any:
        outputs = quantized_product(self.equation, self._float_kernel.shape, inputs, self._quantized())
        if self.lora_enabled:
            factors = (keras.ops.cast(factor, inputs.dtype) for factor in (self.lora_kernel_a, self.lora_kernel_b))
            outputs += low_rank_product(self.equation, self.lora_alpha / self.lora_rank, inputs, *factors)
        if self.bias is not None:
            outputs = keras.ops.add(outputs, self.bias)
        return outputs if self.activation is None else self.activation(outputs)


class QuantizedEmbedding(_QuantizedLayer, keras.layers.ReversibleEmbedding):
    """A tied embedding with quantized rows."""

    @property
    def embeddings(self) -> QuantizedKernel:
        """Not the floats. `head` has the arrays."""
        return self._float_kernel

    def head(self) -> Quantized:
        """Returns the rows as the loss takes them, [V, D, 1]."""
        return self._quantized()

    def call(self, inputs: Any, reverse: bool = False) -> Any:
        quantized = self._quantized()
        if not reverse:
            rows = take_rows(quantized, jnp.asarray(inputs, jnp.int32).ravel())
            return rows.reshape(*inputs.shape, -1).astype(self.compute_dtype)
        dtype = self.reverse_dtype or self.compute_dtype
        logits = _logits(jnp.asarray(inputs, dtype), quantized)
        if self.logit_soft_cap is not None:
            logits = self.logit_soft_cap * jnp.tanh(logits / self.logit_soft_cap)
        return logits


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def quantized_product(equation: str, shape: tuple[int, ...], x: jax.Array, kernel: Quantized) -> jax.Array:
    """Returns jnp.einsum(equation, x, the dequantized kernel). Only x gets a gradient, and only codes are kept for it.

    Args:
        equation: Of the layer.
        shape: Of the float kernel.
        x: Inputs, [B, L, …].
        kernel: Quantized.
    """
    return einsum_product(equation, x, dequantize(kernel, x.dtype).reshape(shape))


def _product_forward(equation, shape, x, kernel):
    return einsum_product(equation, x, dequantize(kernel, x.dtype).reshape(shape)), kernel


def _product_backward(equation, shape, kernel, gradient):
    inputs, axes, outputs = equation.replace("->", ",").split(",")
    sizes = dict(zip(axes + outputs, (*shape, *gradient.shape), strict=True))
    x = jax.ShapeDtypeStruct(tuple(sizes[axis] for axis in inputs), gradient.dtype)
    floats = dequantize(kernel, gradient.dtype).reshape(shape)
    (of_x,) = jax.linear_transpose(lambda x: einsum_product(equation, x, floats), x)(gradient)
    return of_x, None


quantized_product.defvjp(_product_forward, _product_backward)


def quantize_layers(backbone: keras_hub.models.Backbone, grid: Grid) -> int:
    """Gives all linear layers of the decoder blocks, and the tied embedding, kernels in few bits.

    In a skeleton their values come later, from the checkpoint, and are quantized as they are read. Otherwise those that
    are there are quantized, layer by layer.

    Args:
        backbone: Before LoRA is enabled.
        grid: How.

    Returns:
        Number of layers.

    Raises:
        ModelError: LoRA is enabled already, or a layer's inputs can't be cut into groups of `block_size`.
    """
    layers = list(_linear_layers(backbone))
    for layer in layers:
        if getattr(layer, "lora_enabled", False):
            raise ModelError(f"{layer.path} has LoRA factors already. Quantize first, then enable LoRA.")
        problem = why_not(grid, matrix_shape(layer)[1])
        if problem:
            raise ModelError(
                f"{layer.path} can't be quantized to {grid.scheme}: {problem}. Take another of --block_size=32, 64, "
                "128 or 256, or --quantize=int8, which has a scale for each channel."
            )
    for layer in layers:
        quantize_layer(layer, grid)
    return len(layers)


def quantize_layer(layer: keras.layers.Layer, grid: Grid) -> None:
    """Quantizes an EinsumDense or a tied ReversibleEmbedding in its place."""
    is_embedding = isinstance(layer, keras.layers.ReversibleEmbedding)
    name = "embeddings" if is_embedding else "kernel"
    variable, shape = getattr(layer, f"_{name}"), matrix_shape(layer)
    value = variable._value
    layer.__class__ = QuantizedEmbedding if is_embedding else QuantizedEinsumDense
    layer._take_quantized(name, variable, shape, grid)
    if value is not None:
        values = np.asarray(value, np.float32)
        layer._float_kernel.fill(lambda start, stop: values[start:stop])


def matrix_shape(layer: Any) -> tuple[int, int, int]:
    """Returns a kernel's shape as [P, C, Q], where products sum over C."""
    if isinstance(layer, keras.layers.ReversibleEmbedding):
        return (layer.input_dim, layer.output_dim, 1)
    inputs, axes, _ = layer.equation.replace("->", ",").split(",")
    summed = [place for place, letter in enumerate(axes) if letter in inputs]
    sizes = tuple(layer._kernel.shape)
    first, last = summed[0], summed[-1] + 1
    return tuple(int(np.prod(part, dtype=np.int64)) for part in (sizes[:first], sizes[first:last], sizes[last:]))


def first_floats(backbone: Any) -> tuple[dict[str, tuple[tuple[int, ...], np.ndarray]], set[str]]:
    """Returns (path -> shape and first values of each quantized kernel as it was, paths of all codes and scales)."""
    layers = [layer for layer in backbone._flatten_layers() if isinstance(layer, _QuantizedLayer)]
    kernels = {layer._float_kernel.path: (layer._float_kernel.shape, layer._first_floats) for layer in layers}
    return kernels, {variable.path for layer in layers for variable in layer._code_variables}


def _linear_layers(backbone: Any) -> Iterator[Any]:
    for layer in backbone._flatten_layers(include_self=False):
        if isinstance(layer, keras.layers.EinsumDense) or layer is backbone.token_embedding:
            if type(layer) not in (keras.layers.EinsumDense, keras.layers.ReversibleEmbedding):
                raise ModelError(f"{layer.path} can't be quantized: it is a {type(layer).__name__}.")
            yield layer


def _names_of(names: Quantized, shapes: Quantized) -> list[str]:
    """The names whose places in the tree hold an array."""
    flat_names, flat_shapes = (jax.tree.leaves(tree, is_leaf=lambda leaf: leaf is None) for tree in (names, shapes))
    return [name for name, shape in zip(flat_names, flat_shapes, strict=True) if shape is not None]


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
