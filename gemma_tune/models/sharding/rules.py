"""Assigns mesh axes to each array of a model, by rules on its path.

Weights are cut along two axes of the mesh: `model`, which also cuts the products that they are in, and `fsdp`, along
which a layer's parts are gathered before it computes. The rows of an embedding are cut along both. LoRA factors follow
their kernels.
"""

import re

from gemma_tune.errors import ModelError

# For each axis of an array the mesh axis that it is cut along, several of them with the outer one first, or None.
MeshAxes = tuple[str | tuple[str, ...] | None, ...]

# End of a float variable's path -> its mesh axes. The width of an attention head is never cut.
_RULES: tuple[tuple[str, MeshAxes], ...] = (
    (r"token_embedding/embeddings", (("model", "fsdp"), None)),
    (r"attention/(query|key|value)/kernel", ("model", "fsdp", None)),
    (r"attention/attention_output/kernel", ("model", None, "fsdp")),
    (r"(ffw_gating|ffw_gating_2|per_layer_input_gate|per_layer_model_projection)/kernel", ("fsdp", "model")),
    (r"(ffw_linear|per_layer_up_proj)/kernel", ("model", "fsdp")),
    (r"(gate_proj|up_proj)", ("model", "fsdp", None)),  # Experts.
    (r"down_proj", ("model", None, "fsdp")),
    (r"moe_router/.*kernel", (None, None)),
    (r"(scale|per_expert_scale|per_dim_scale|layer_scalar|dropout_rate|dropout_key)", ()),
)


def mesh_axes_of(path: str, num_axes: int) -> MeshAxes:
    """Returns the mesh axes of a float variable, or of a LoRA factor of one.

    Args:
        path: Path of the variable.
        num_axes: Number of its axes.

    Raises:
        ModelError: No rule covers the variable; names it.
    """
    owner, _, name = path.rpartition("/")
    if factor := re.fullmatch(r"lora_(kernel|embeddings)_(a|b|magnitude)", name):
        return _factor_axes(factor[2], _rule_of(f"{owner}/{factor[1]}", path), num_axes)
    return _rule_of(path, path) or (None,) * num_axes


def _factor_axes(factor: str, kernel: MeshAxes, num_axes: int) -> MeshAxes:
    """Returns the mesh axes of a LoRA factor: each of its axes is cut as that axis of its kernel.

    `lora/factors.py` says which axes of the kernel a factor has. Where the input is the middle one of three axes, A in
    PEFT's layout has that one, and B the other two.
    """
    if factor == "a":
        return (*kernel[:-1], None) if num_axes == len(kernel) else (kernel[1], None)
    outputs = kernel[-1:] if num_axes == (2 if factor == "b" else 1) else (kernel[0], kernel[-1])
    return (None, *outputs) if factor == "b" else outputs


def _rule_of(path: str, named: str) -> MeshAxes:
    for pattern, axes in _RULES:
        if re.search(rf"(^|/|_){pattern}$", path):
            return axes
    raise ModelError(
        f"No rule says how {named} is sharded over a mesh. Train without --mesh, and report this: a line in "
        "models/sharding/rules.py is missing."
    )


def matrix_mesh_axes(path: str, shape: tuple[int, ...], matrix_shape: tuple[int, ...]) -> MeshAxes:
    """Returns the mesh axes of a float kernel as the [P, C, Q] that it is quantized as (`quantization/codes.py`).

    Args:
        path: Path of the float variable.
        shape: Shape of the float kernel.
        matrix_shape: Shape of the kernel as [P, C, Q].
    """
    axes = mesh_axes_of(path, len(shape))
    if len(shape) == 3:
        return axes if shape == tuple(matrix_shape) else (None, axes[0], axes[2])
    return (None, *axes) if matrix_shape[0] == 1 else (*axes, None)
