"""Gives a backbone's weights as the tensors of a Hugging Face checkpoint: names and shapes at once, values one by one.

KerasHub's converters know which variable each tensor becomes. Their hooks only return views of a tensor with its values
in another order, so that writing through such a view of empty memory puts each value where the tensor has it.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from gemma_tune.errors import ModelError
from gemma_tune.models.quantized.layers import QuantizedKernel
from gemma_tune.models.sources.hf_checkpoint import Port, ports
from gemma_tune.quantization.codes import dequantize, slice_rows
from gemma_tune.runtime.backend import keras_hub

_ROWS_AT_ONCE = 4096  # Rows of an embedding; a multiple of 256, which doubly quantized scales require.


class Tensor(NamedTuple):
    """One tensor of a checkpoint.

    Attributes:
        name: Name in the checkpoint.
        shape: Shape in the checkpoint.
        ports: Variables that the tensor is made of: usually one, several for a concatenation.
    """

    name: str
    shape: tuple[int, ...]
    ports: list[Port]

    def chunks(self, dtype: np.dtype) -> Iterator[np.ndarray]:
        """Yields the values in consecutive pieces of the first axis, so that no copy of a large tensor is made.

        Raises:
            ModelError: float16 can't hold a value.
        """
        if self.ports[0].hook is None:
            yield from (_cast(rows, dtype, self.name) for rows in _rows(self.ports[0].value))
            return
        buffer = np.empty(self.shape, dtype)
        for port in self.ports:
            view = port.hook(buffer, list(port.value.shape))
            if view.shape != tuple(port.value.shape) or not np.may_share_memory(view, buffer):
                raise ModelError(f"{self.name} can't be written: KerasHub's reader does more than reorder its values.")
            for rows in _rows(port.value):
                view[...] = _cast(rows, dtype, self.name)
        yield buffer


def tensors_of(backbone: keras_hub.models.Backbone, config: dict[str, Any]) -> list[Tensor]:
    """Returns the tensors of a checkpoint.

    Args:
        backbone: Backbone without LoRA. The tensors of quantized weights are floats.
        config: Contents of config.json.

    Raises:
        ModelError: A weight of the backbone has no tensor in such a checkpoint.
    """
    parts: dict[str, list[Port]] = {}
    for port in ports(backbone, config):
        parts.setdefault(port.key, []).append(port)
    covered = {port.value.path for group in parts.values() for port in group}
    codes = {
        variable.path
        for group in parts.values()
        for port in group
        if isinstance(port.value, QuantizedKernel)
        for variable in port.value.layer.code_variables
    }
    left = [variable.path for variable in backbone.weights if variable.path not in covered | codes]
    if left:
        raise ModelError(f"A checkpoint for {config['architectures'][0]} has no place for {left[0]}.")
    return [Tensor(name, _stored_shape(name, group[0]), group) for name, group in parts.items()]


def _stored_shape(name: str, port: Port) -> tuple[int, ...]:
    """Returns PyTorch's shape: linear layers are [outputs, inputs], with one axis for heads and head width."""
    shape = tuple(port.value.shape)
    if port.hook is None:
        return shape
    if not shape:
        return (1,)
    if name.endswith("experts.gate_up_proj"):  # Two variables of [E, D, F].
        return shape[0], 2 * shape[2], shape[1]
    if name.endswith("experts.down_proj"):
        return shape[0], shape[2], shape[1]
    if len(shape) == 3 and name.endswith("o_proj.weight"):  # [N, H, D]
        return shape[2], shape[0] * shape[1]
    if len(shape) == 3:  # [N, D, H]
        return shape[0] * shape[2], shape[1]
    return shape[::-1]


def _rows(value: Any) -> Iterator[np.ndarray]:
    """Yields a variable's values: those of an embedding some rows at a time, all others at once."""
    shape = tuple(value.shape)
    is_embedding = value.path.endswith("embeddings")
    if isinstance(value, QuantizedKernel):
        quantized = value.layer.quantized()
        if not is_embedding:
            yield np.asarray(dequantize(quantized)).reshape(shape)
            return
        for start in range(0, shape[0], _ROWS_AT_ONCE):
            count = min(_ROWS_AT_ONCE, shape[0] - start)
            yield np.asarray(dequantize(slice_rows(quantized, start, count))).reshape(count, *shape[1:])
        return
    values = np.asarray(value.value)
    if not is_embedding:
        yield values
        return
    for start in range(0, shape[0], _ROWS_AT_ONCE):
        yield values[start : start + _ROWS_AT_ONCE]


def _cast(values: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore"):
        cast = values.astype(np.float32).astype(dtype)
    if dtype == np.float16 and not np.isfinite(cast).all():
        raise ModelError(f"{name} has a value beyond 65504, where float16 ends. Use --dtype=bfloat16 or float32.")
    return cast
