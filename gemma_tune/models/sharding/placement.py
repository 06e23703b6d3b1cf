"""Places the arrays of a model on a mesh of devices.

`rules.py` says which axes of a weight are cut, and optimizer state follows its weights. What is computed where GSPMD
(arXiv:2105.04663) derives from that, with what `layers.py` says between the decoder blocks.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gemma_tune.errors import ModelError
from gemma_tune.mesh import AUTO_MESH, MeshShape, fitting_mesh, parse_mesh
from gemma_tune.models.layers import quantized_layers
from gemma_tune.models.sharding.rules import MeshAxes, matrix_mesh_axes, mesh_axes_of
from gemma_tune.runtime.backend import keras, keras_hub
from gemma_tune.runtime.processes import is_distributed

BATCH_AXES = ("data", "fsdp")  # Mesh axes that the rows of a batch are cut along.


class MeshSharding:
    """The shardings of a model's arrays, and of the batches it reads, on one mesh of devices.

    It is made once, by `make_mesh_sharding`, and passed on to whatever makes arrays. A variable's own NamedSharding is
    kept by Keras, in `variable._layout`.

    Attributes:
        mesh: Mesh of devices with the axes of `MeshShape`.
        replicated: Sharding of an array that each device holds as a whole.
        batch: Sharding of an array whose first axis is the rows of a batch.
        micro_batches: Sharding of an array whose second axis is the rows of a micro-batch.
    """

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self.replicated, self.batch = NamedSharding(mesh, P()), NamedSharding(mesh, P(BATCH_AXES))
        self.micro_batches = NamedSharding(mesh, P(None, BATCH_AXES))

    def __str__(self) -> str:
        return f"{self.shape} of {self.mesh.size} × {self.mesh.devices.flat[0].device_kind}"

    @property
    def shape(self) -> MeshShape:
        """Number of devices along each axis of the mesh."""
        return MeshShape(**self.mesh.shape)

    def place(self, backbone: keras_hub.models.Backbone) -> None:
        """Gives each variable of a backbone its sharding, and moves the values that are there.

        Values that are assigned later, such as a checkpoint's, follow it too. Variables that are added later, such as
        LoRA factors, need another call.

        Raises:
            ModelError: No rule covers a variable; names it.
        """
        for layer in quantized_layers(backbone):
            kernel = layer.float_kernel
            axes = matrix_mesh_axes(kernel.path, kernel.shape, layer.matrix_shape)
            object.__setattr__(kernel, "sharding", self.sharding_for(axes, layer.matrix_shape))
        for variable, named_sharding in self.variable_shardings(backbone):
            variable._layout = named_sharding  # Keras places what is assigned accordingly.
            if variable._value is not None:
                variable._value = put_sharded(variable._value, named_sharding)

    def variable_shardings(self, backbone: keras_hub.models.Backbone) -> list[tuple[keras.Variable, NamedSharding]]:
        """Returns (variable, its sharding) of all variables of a backbone.

        Raises:
            ModelError: No rule covers a variable; names it.
        """
        found = []
        quantized = {id(variable): layer for layer in quantized_layers(backbone) for variable in layer.code_variables}
        for variable in backbone.variables:
            shape = tuple(variable.shape)
            if layer := quantized.get(id(variable)):
                found.append((variable, self._code_sharding(layer, variable.name, shape)))
            else:
                found.append((variable, self.sharding_for(mesh_axes_of(variable.path, len(shape)), shape)))
        return found

    def _code_sharding(self, layer: Any, name: str, shape: tuple[int, ...]) -> NamedSharding:
        if name.endswith(("_scale_step", "_scale_lowest")):  # Shared by 256 scales, on any device.
            return self.replicated
        first, inputs, last = matrix_mesh_axes(layer.float_kernel.path, layer.float_kernel.shape, layer.matrix_shape)
        return self.sharding_for((first, inputs, None, last) if len(shape) == 4 else (first, inputs, last), shape)

    def sharding_for(self, axes: MeshAxes, shape: tuple[int, ...]) -> NamedSharding:
        """Returns the sharding of an array, without the cuts that its shape doesn't allow.

        An axis that the mesh axis doesn't divide stays whole: a single key/value head is on every device. `fsdp` then
        cuts the longest other axis that it divides, if there is one.

        Args:
            axes: Mesh axes of the array, from `mesh_axes_of`.
            shape: Shape of the array.
        """
        cut = list(axes)
        for index, (axis, length) in enumerate(zip(axes, shape, strict=True)):
            if isinstance(axis, tuple):
                cut[index] = self.vocabulary_axes(length)
            elif axis and length % self.mesh.shape[axis]:
                cut[index] = None
                others = [i for i, free in enumerate(axes) if free is None and not shape[i] % self.mesh.shape[axis]]
                if axis == "fsdp" and others:
                    cut[max(others, key=lambda i: shape[i])] = axis
        return NamedSharding(self.mesh, P(*cut))

    def vocabulary_axes(self, num_rows: int) -> tuple[str, ...]:
        """Returns the mesh axes that the rows of an embedding are cut along, the outer one first.

        These are `model` and `fsdp`, or the one that divides the number of rows alone, or none.
        """
        for axes in (("model", "fsdp"), ("fsdp",), ("model",)):
            if not num_rows % math.prod(self.mesh.shape[axis] for axis in axes):
                return axes
        return ()

    def assign_shards(self, backbone: keras_hub.models.Backbone) -> None:
        """Makes variables that have no values yet take NumPy arrays shard by shard.

        Keras would put each whole array on the first device, and cut it there.
        """
        for variable in backbone.variables:
            convert = functools.partial(_convert_to_shards, variable, variable._convert_to_tensor)
            object.__setattr__(variable, "_convert_to_tensor", convert)

    def put_batch(self, num_rows: int, make: Callable[[int, int], Any]) -> Any:
        """Makes a batch whose rows are on the devices that compute with them.

        Args:
            num_rows: Number of rows in the batch.
            make: (start, stop) -> tree of NumPy arrays with these rows, [stop - start, …]. It is called only for rows
                of this process's devices.

        Returns:
            Tree of sharded arrays, [num_rows, …].
        """
        cut = self.batch.addressable_devices_indices_map((num_rows,)).values()
        made = {part: make(*part) for part in {index[0].indices(num_rows)[:2] for index in cut if index}}

        def whole(*parts: Any) -> jax.Array:
            by_rows = dict(zip(made, parts, strict=True))
            shape = (num_rows, *parts[0].shape[1:])

            def rows_of(index: Any) -> Any:
                return by_rows[index[0].indices(num_rows)[:2]]

            return jax.make_array_from_callback(shape, self.batch, rows_of)

        return jax.tree.map(whole, *made.values())


def make_mesh_sharding(text: str, num_rows: int) -> MeshSharding | None:
    """Returns the mesh sharding that `training.mesh` asks for, or None for one device.

    Args:
        text: Axes and sizes such as `data:2,fsdp:2,model:2`, `auto`, or an empty text.
        num_rows: Number of rows that go through the model at a time.

    Raises:
        ModelError: There are too few devices, or more than the mesh needs while several processes share them.
    """
    if not text:
        return None
    devices = jax.devices()
    shape = fitting_mesh(len(devices), num_rows) if text == AUTO_MESH else parse_mesh(text)
    if len(devices) < shape.num_devices or (is_distributed() and len(devices) != shape.num_devices):
        raise ModelError(
            f"training.mesh={text} needs {shape.num_devices} devices, but this run has {len(devices)} "
            f"({devices[0].device_kind}). Choose a mesh of that number of devices, or --mesh=auto."
        )
    if shape.num_devices == 1:
        return None
    types = (jax.sharding.AxisType.Auto,) * len(shape)
    return MeshSharding(jax.make_mesh(tuple(shape), MeshShape._fields, types, devices=devices[: shape.num_devices]))


def mesh_sharding_of(backbone: keras_hub.models.Backbone) -> MeshSharding | None:
    """Returns the mesh sharding that a backbone was loaded with, or None."""
    named_sharding = backbone.token_embedding.variables[0]._layout
    return MeshSharding(named_sharding.mesh) if named_sharding is not None else None


def _convert_to_shards(variable: keras.Variable, convert: Callable, value: Any, dtype: Any = None) -> Any:
    if variable._layout is None or isinstance(value, jax.Array) or tuple(np.shape(value)) != tuple(variable.shape):
        return convert(value, dtype)
    return put_sharded(np.asarray(value).astype(dtype or variable.dtype), variable._layout)


def put_sharded(values: Any, named_sharding: NamedSharding | None) -> jax.Array:
    """Puts an array on the devices of its sharding, or on the default device without one.

    A NumPy array is put shard by shard, so that no device holds all of it.
    """
    if named_sharding is None:
        return jax.device_put(values)
    if isinstance(values, jax.Array):
        if values.sharding.is_equivalent_to(named_sharding, values.ndim):
            return values
        if not is_distributed():
            return jax.device_put(values, named_sharding)
        if not values.is_fully_addressable:
            return jax.jit(lambda same: same, out_shardings=named_sharding)(values)
        values = np.asarray(values)
    return jax.make_array_from_callback(values.shape, named_sharding, lambda index: values[index])


def local_rows(shape: tuple[int, ...], named_sharding: NamedSharding | None) -> tuple[int, int]:
    """Returns the range of an array's rows, (start, stop), that this process's devices hold."""
    if named_sharding is None or not shape:
        return 0, shape[0] if shape else 0
    here = named_sharding.addressable_devices_indices_map(shape).values()
    parts = [index[0].indices(shape[0])[:2] for index in here if index]
    return min(start for start, _ in parts), max(stop for _, stop in parts)
