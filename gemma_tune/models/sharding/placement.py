"""Where each array of a model lies on a mesh of devices: rules by path, and the way there.

Weights are cut along two axes of the mesh: `model`, which also cuts the products that they are in, and `fsdp`, along
which a layer's parts are gathered before it computes. An embedding's rows are cut along both. LoRA factors and
optimizer state follow their kernels. What is computed where follows from there by GSPMD (arXiv:2105.04663), with what
`sharded_layers` says between the blocks.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gemma_tune.errors import ModelError
from gemma_tune.mesh import AUTO_MESH, MeshShape, fitting_mesh, parse_mesh
from gemma_tune.models.layers import quantized_layers
from gemma_tune.runtime.backend import keras, keras_hub
from gemma_tune.runtime.processes import is_distributed

BATCH_AXES = ("data", "fsdp")  # The mesh axes that cut the rows of a batch.
Axes = tuple[str | tuple[str, ...] | None, ...]

# Path of a float variable -> the mesh axis that cuts each of its axes. What a head is made of stays together.
_RULES: tuple[tuple[str, Axes], ...] = (
    (r"token_embedding/embeddings", (("model", "fsdp"), None)),
    (r"attention/(query|key|value)/kernel", ("model", "fsdp", None)),
    (r"attention/attention_output/kernel", ("model", None, "fsdp")),
    (r"(ffw_gating|ffw_gating_2|per_layer_input_gate|per_layer_model_projection)/kernel", ("fsdp", "model")),
    (r"(ffw_linear|per_layer_up_proj)/kernel", ("model", "fsdp")),
    (r"(gate_proj|up_proj)", ("model", "fsdp", None)),  # Experts.
    (r"down_proj", ("model", None, "fsdp")),
    (r"moe_router/.*kernel", (None, None)),
    (r"(scale|per_expert_scale|per_dim_scale|layer_scalar)", ()),
)


class MeshSharding:
    """Says for each array where it lies on a mesh.

    Attributes:
        mesh: Of devices, with the axes of `MeshShape`.
        everywhere: Whole on each device. rows: Cut along the first axis as a batch is; micro_rows: along the second.
    """

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self.replicated, self.batch = NamedSharding(mesh, P()), NamedSharding(mesh, P(BATCH_AXES))
        self.micro_batches = NamedSharding(mesh, P(None, BATCH_AXES))

    def __str__(self) -> str:
        return f"{self.shape} of {self.mesh.size} × {self.mesh.devices.flat[0].device_kind}"

    @property
    def shape(self) -> MeshShape:
        """Parts along each axis."""
        return MeshShape(**self.mesh.shape)

    def place(self, backbone: keras_hub.models.Backbone) -> None:
        """Gives each variable its place, and those with a value move there.

        Raises:
            ModelError: No rule covers a variable; names it.
        """
        for layer in quantized_layers(backbone):
            kernel = layer._float_kernel
            axes = matrix_mesh_axes(kernel.path, kernel.shape, layer._matrix_shape)
            object.__setattr__(kernel, "sharding", self.sharding_for(axes, layer._matrix_shape))
        for variable, sharding in self._shardings(backbone):
            variable._layout = sharding  # Keras puts there what is assigned.
            if variable._value is not None:
                variable._value = put_sharded(variable._value, sharding)

    def _shardings(self, backbone: keras_hub.models.Backbone) -> list[tuple[keras.Variable, NamedSharding]]:
        found = []
        quantized = {id(variable): layer for layer in quantized_layers(backbone) for variable in layer._code_variables}
        for variable in backbone.variables:
            shape = tuple(variable.shape)
            if layer := quantized.get(id(variable)):
                found.append((variable, self._of_codes(layer, variable.name, shape)))
            else:
                found.append((variable, self.sharding_for(mesh_axes_of(variable.path, len(shape)), shape)))
        return found

    def _of_codes(self, layer: Any, name: str, shape: tuple[int, ...]) -> NamedSharding:
        if name.endswith(("_scale_step", "_scale_lowest")):  # Of 256 scales each, wherever these are.
            return self.replicated
        first, inputs, last = matrix_mesh_axes(layer._float_kernel.path, layer._float_kernel.shape, layer._matrix_shape)
        return self.sharding_for((first, inputs, None, last) if len(shape) == 4 else (first, inputs, last), shape)

    def sharding_for(self, axes: Axes, shape: tuple[int, ...]) -> NamedSharding:
        """Returns the sharding where each axis can be cut: a single key/value head is on every device. What `fsdp`
        can't cut at its place, it cuts along the longest axis that it divides.
        """
        cut = list(axes)
        for place, (axis, length) in enumerate(zip(axes, shape, strict=True)):
            if isinstance(axis, tuple):
                cut[place] = self.vocabulary_axes(length)
            elif axis and length % self.mesh.shape[axis]:
                cut[place] = None
                others = [i for i, free in enumerate(axes) if free is None and not shape[i] % self.mesh.shape[axis]]
                if axis == "fsdp" and others:
                    cut[max(others, key=lambda i: shape[i])] = axis
        return NamedSharding(self.mesh, P(*cut))

    def vocabulary_axes(self, vocabulary: int) -> tuple[str, ...]:
        """Returns the axes that cut the rows of an embedding, the outer one first: as many as divide their number."""
        for axes in (("model", "fsdp"), ("fsdp",), ("model",)):
            if not vocabulary % math.prod(self.mesh.shape[axis] for axis in axes):
                return axes
        return ()

    def assign_shards(self, backbone: keras_hub.models.Backbone) -> None:
        """Makes the variables of a skeleton take NumPy's arrays part by part. Keras would put each whole on the first
        device, and cut it there.
        """
        for variable in backbone.variables:
            convert = functools.partial(_in_parts, variable, variable._convert_to_tensor)
            object.__setattr__(variable, "_convert_to_tensor", convert)

    def put_batch(self, num_rows: int, make: Callable[[int, int], Any]) -> Any:
        """Puts a batch's rows where they are computed with.

        Args:
            num_rows: In the batch.
            make: (start, stop) -> a tree of these rows, [stop - start, …] each. Called for those of this process alone.
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
    """Returns how a run lies on the devices, as `training.mesh` asks for; None if it takes one.

    Args:
        text: `data:2,fsdp:2,model:2`, `auto`, or empty.
        num_rows: That go through the model at a time.

    Raises:
        ModelError: There are fewer devices, or more while several processes share them.
    """
    if not text:
        return None
    devices = jax.devices()
    shape = fitting_mesh(len(devices), num_rows) if text == AUTO_MESH else parse_mesh(text)
    wrong = len(devices) < shape.num_devices or (is_distributed() and len(devices) != shape.num_devices)
    if wrong:
        raise ModelError(
            f"training.mesh={text} takes {shape.num_devices} devices, and there are {len(devices)} "
            f"({devices[0].device_kind}). Choose a mesh of as many, or --mesh=auto."
        )
    if shape.num_devices == 1:
        return None
    types = (jax.sharding.AxisType.Auto,) * len(shape)
    return MeshSharding(jax.make_mesh(tuple(shape), MeshShape._fields, types, devices=devices[: shape.num_devices]))


def mesh_sharding_of(backbone: keras_hub.models.Backbone) -> MeshSharding | None:
    """Returns the layout that a backbone was loaded with."""
    sharding = backbone.token_embedding.variables[0]._layout
    return MeshSharding(sharding.mesh) if sharding is not None else None


def _in_parts(variable: keras.Variable, convert: Callable, value: Any, dtype: Any = None) -> Any:
    if variable._layout is None or isinstance(value, jax.Array) or tuple(np.shape(value)) != tuple(variable.shape):
        return convert(value, dtype)
    return put_sharded(np.asarray(value).astype(dtype or variable.dtype), variable._layout)


def mesh_axes_of(path: str, num_axes: int) -> Axes:
    """Returns the mesh axis that cuts each axis of a float variable, or of a LoRA factor of one.

    Raises:
        ModelError: No rule covers it; names it.
    """
    owner, _, name = path.rpartition("/")
    if factor := re.fullmatch(r"lora_(kernel|embeddings)_(a|b|magnitude)", name):
        return _axes_of_factor(factor[2], _rule_of(f"{owner}/{factor[1]}", path), num_axes)
    axes = _rule_of(path, path)
    return axes or (None,) * num_axes


def _axes_of_factor(factor: str, kernel: Axes, num_axes: int) -> Axes:
    """A factor's axes are cut as those of its kernel; low_rank.py says which they are. Where a kernel's input is the
    middle one of three axes, PEFT's A has that one, and its B the other two.
    """
    if factor == "a":
        return (*kernel[:-1], None) if num_axes == len(kernel) else (kernel[1], None)
    outputs = kernel[-1:] if num_axes == (2 if factor == "b" else 1) else (kernel[0], kernel[-1])
    return (None, *outputs) if factor == "b" else outputs


def _rule_of(path: str, named: str) -> Axes:
    for pattern, axes in _RULES:
        if re.search(rf"(^|/|_){pattern}$", path):
            return axes
    raise ModelError(
        f"No rule says how {named} is spread over a mesh. Train without --mesh, and report this: a line in "
        "models/sharding/placement.py is missing."
    )


def matrix_mesh_axes(path: str, shape: tuple[int, ...], matrix_shape: tuple[int, ...]) -> Axes:
    """Returns the mesh axes of a float kernel that is taken as a [P, C, Q] (quantization/codes.py)."""
    axes = mesh_axes_of(path, len(shape))
    if len(shape) == 3:
        return axes if shape == tuple(matrix_shape) else (None, axes[0], axes[2])
    return (None, *axes) if matrix_shape[0] == 1 else (*axes, None)


def put_sharded(values: Any, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """Puts an array where it belongs; a NumPy array part by part, so that no device holds it whole."""
    if sharding is None:
        return jax.device_put(values)
    if isinstance(values, jax.Array):
        if values.sharding.is_equivalent_to(sharding, values.ndim):
            return values
        if not is_distributed():
            return jax.device_put(values, sharding)
        if not values.is_fully_addressable:
            return jax.jit(lambda same: same, out_shardings=sharding)(values)
        values = np.asarray(values)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def local_rows(shape: tuple[int, ...], sharding: jax.sharding.Sharding | None) -> tuple[int, int]:
    """Returns the first row, and the one behind the last, that this process's devices hold of an array."""
    if sharding is None or not shape:
        return 0, shape[0] if shape else 0
    here = sharding.addressable_devices_indices_map(shape).values()
    parts = [index[0].indices(shape[0])[:2] for index in here if index]
    return min(start for start, _ in parts), max(stop for _, stop in parts)
