"""Layers whose frozen kernel is held in few bits: QLoRA (arXiv:2305.14314) on KerasHub's layers.

A layer is given another class, and its float variable is replaced by variables for the arrays of `Quantized`
(quantization/codes.py), named as Keras would: `kernel` for the codes, `kernel_scale`, `kernel_zero`, and with double
quantization `kernel_scale_step` and `kernel_scale_lowest`. Activations stay float, except where a layer's scheme says
that it rounds its inputs. Keras's own int8 rounds the inputs of the LM head too, and loses its gradient there.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_tune.errors import ModelError
from gemma_tune.models.base_fingerprint import NUM_FINGERPRINT_VALUES
from gemma_tune.models.lm_head import apply_soft_cap
from gemma_tune.models.lora.layers import merged_kernel, with_factors
from gemma_tune.models.quantized.product import VOCABULARY_TILE, quantized_logits, quantized_product
from gemma_tune.models.sharding.placement import put_sharded
from gemma_tune.quantization.codes import Quantized, dequantize, quantize, quantized_shapes, take_rows
from gemma_tune.quantization.scales import Scales
from gemma_tune.quantization.spec import LayerScheme
from gemma_tune.runtime.backend import keras

_FIRST_KEY = "first_floats"
_quantize = jax.jit(quantize, static_argnames="quant_spec")  # NumPy takes forty times as long for NF4.


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QuantizedKernel:
    """Stands for the float kernel of a quantized layer.

    It is filled like a variable, and quantizes what it is filled with. In a product of JAX's it is the float kernel
    with LoRA's update, as Keras's `kernel` is: Gemma 4's blocks multiply with the kernels of some layers themselves.

    Attributes:
        layer: Quantized layer.
        path: Path of the float variable that it stands for.
        shape: Shape of the float kernel.
        sharding: Sharding of the kernel as it is quantized, [P, C, Q], on a mesh; else None.
    """

    layer: Any
    path: str
    shape: tuple[int, ...]
    sharding: jax.sharding.NamedSharding | None = None

    def __jax_array__(self) -> jax.Array:
        layer = self.layer
        floats = dequantize(layer.quantized()).reshape(self.shape)
        if getattr(layer, "lora_enabled", False):
            floats = merged_kernel(layer, floats)
        return floats.astype(layer.compute_dtype)

    def fill(self, read_rows: Callable[[int, int], np.ndarray]) -> None:
        """Quantizes what a checkpoint holds. An embedding is read and quantized one tile of rows at a time.

        Args:
            read_rows: (start, stop) of the first axis -> these rows in any float dtype.

        Raises:
            ModelError: The checkpoint's rows have another shape.
        """
        quant_spec, matrix_shape = self.layer.scheme.quant_spec, self.layer.matrix_shape
        num_rows = self.shape[0]
        tile = VOCABULARY_TILE if num_rows == matrix_shape[0] else num_rows
        parts = []
        for start in range(0, num_rows, tile):
            rows = np.asarray(read_rows(start, min(start + tile, num_rows)), np.float32)
            if rows.shape[1:] != self.shape[1:]:
                raise ModelError(
                    f"{self.path} has shape {self.shape}, but the checkpoint's rows have {rows.shape[1:]}."
                )
            if not start:
                object.__setattr__(self.layer, "first_floats", rows.ravel()[:NUM_FINGERPRINT_VALUES].copy())
            matrix = rows.reshape(-1, *matrix_shape[1:])
            if self.sharding is not None and tile == num_rows:
                parts.append(_quantize(put_sharded(matrix, self.sharding), quant_spec))  # Each device quantizes a part.
            else:
                parts.append(jax.tree.map(np.asarray, _quantize(matrix, quant_spec)))
        arrays = jax.tree.map(lambda *pieces: pieces[0] if len(pieces) == 1 else np.concatenate(pieces), *parts)
        if self.layer.scheme.has_input_scale:
            arrays = arrays._replace(input_scale=np.ones((1, matrix_shape[1], 1), np.float32))
        self.layer.assign_quantized(arrays)


class _QuantizedLayer:
    """The part that both kinds of quantized layers share. `convert.quantize_layer` gives a layer its new class."""

    def take_scheme(self: Any, name: str, variable: keras.Variable, matrix_shape: tuple, scheme: LayerScheme) -> None:
        """Replaces a float variable by variables for its codes and scales. They have no values yet in lazy
        initialization, else zeros.

        Args:
            name: `kernel` or `embeddings`.
            variable: Float variable.
            matrix_shape: Shape of the kernel as [P, C, Q].
            scheme: Scheme of the layer.
        """
        shapes = quantized_shapes(matrix_shape, scheme.quant_spec)
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
            "matrix_shape": matrix_shape,
            "float_kernel": kernel,
            "_code_tree": tree,
            "code_variables": variables,
        }.items():
            object.__setattr__(self, attribute, value)  # Keras would look for layers and variables in them.

    def quantized(self: Any) -> Quantized:
        """Returns the layer's codes and scales, those of the stateless scope if it is within one."""
        values = [keras.ops.convert_to_tensor(variable) for variable in self.code_variables]
        return jax.tree.unflatten(self._code_tree, values)

    def assign_quantized(self: Any, quantized: Quantized) -> None:
        """Replaces the layer's codes and scales by others of the same scheme."""
        leaves, tree = jax.tree.flatten(quantized)
        if tree != self._code_tree:
            raise ValueError(f"{self.path} holds {self._code_tree}, not {tree}.")
        for variable, value in zip(self.code_variables, leaves, strict=True):
            variable.assign(put_sharded(value, variable._layout))

    def save_own_variables(self: Any, store: Any) -> None:
        """Writes the codes and scales as they are.

        Raises:
            ModelError: The layer has LoRA factors, which would be lost.
        """
        if getattr(self, "lora_enabled", False):
            raise ModelError(f"{self.path} has LoRA factors beside its codes. Save these with save_adapter.")
        values = [*self.code_variables, *([self.bias] if getattr(self, "bias", None) is not None else [])]
        for index, variable in enumerate(values):
            store[str(index)] = np.asarray(variable.value)
        store[_FIRST_KEY] = self.first_floats

    def load_own_variables(self: Any, store: Any) -> None:
        """Reads what `save_own_variables` wrote. If the store is another Keras preset's, its float kernel is
        quantized.
        """
        names = list(store.keys())
        if _FIRST_KEY in names:
            object.__setattr__(self, "first_floats", np.asarray(store[_FIRST_KEY]))
            for index, variable in enumerate(self.code_variables):
                variable.assign(put_sharded(np.asarray(store[str(index)]), variable._layout))
            bias = str(len(self.code_variables))
        else:
            self.float_kernel.fill(lambda start, stop: store["0"][start:stop])
            bias = "1"
        if getattr(self, "bias", None) is not None:
            self.bias.assign(store[bias])

    @property
    def quantized_scheme(self: Any) -> str:
        """Number format of the codes: `int8`, `int4` or `nf4`."""
        return self.scheme.quant_spec.scheme

    @property
    def num_weights(self: Any) -> int:
        """Number of weights that the codes stand for."""
        return math.prod(self.matrix_shape)


class QuantizedEinsumDense(_QuantizedLayer, keras.layers.EinsumDense):
    """An EinsumDense with a quantized kernel. LoRA factors stand beside it in float."""

    @property
    def kernel(self) -> QuantizedKernel:
        """Stand-in for the float kernel, which exists within products only."""
        return self.float_kernel

    def dequantized(self) -> jax.Array:
        """Returns the kernel as float32, in its own shape and without LoRA."""
        return dequantize(self.quantized()).reshape(self.float_kernel.shape)

    def call(self, inputs: Any, training: Any = None) -> Any:
        quantized, shape = self.quantized(), self.float_kernel.shape
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
        """Stand-in for the float rows. `quantized` has the arrays."""
        return self.float_kernel

    def lm_head(self) -> Quantized:
        """Returns the quantized rows, [V, D, 1], from which the loss makes logits."""
        return self.quantized()

    def call(self, inputs: Any, reverse: bool = False) -> Any:
        quantized = self.quantized()
        if not reverse:
            rows = take_rows(quantized, jnp.asarray(inputs, jnp.int32).ravel())
            return rows.reshape(*inputs.shape, -1).astype(self.compute_dtype)
        dtype = self.reverse_dtype or self.compute_dtype
        return apply_soft_cap(quantized_logits(jnp.asarray(inputs, dtype), quantized), self.logit_soft_cap)


# Keras finds the saved weights of a layer in a list by the name of its class.
QuantizedEmbedding.__name__ = keras.layers.ReversibleEmbedding.__name__


def _names_of(names: Quantized, shapes: Quantized) -> list[str]:
    """Returns the names of the arrays that are present in `shapes`."""
    flat_names, flat_shapes = (jax.tree.leaves(tree, is_leaf=lambda leaf: leaf is None) for tree in (names, shapes))
    present = [shape is not None for shape in flat_shapes]
    return [name for name, there in zip(flat_names[: len(present)], present, strict=True) if there]
