"""Uses a KerasHub model as pure functions of its parameters.

Parameters are plain dicts, variable path -> array, which jit, grad, Optax and Orbax take as they are. Within
`params_scope` the model computes with the given arrays instead of its own, and nothing is written to its variables.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from gemma_tune.errors import ModelError
from gemma_tune.quantization.codes import Quantized
from gemma_tune.quantization.fake import FakeQuantized
from gemma_tune.runtime.backend import jax, keras, keras_hub
from gemma_tune.runtime.processes import fetch_to_host

Params = Mapping[str, jax.Array]


class Parameters(NamedTuple):
    """A model's arrays by variable path.

    Attributes:
        trainable: Arrays that training changes.
        frozen: All other arrays.
    """

    trainable: dict[str, jax.Array]
    frozen: dict[str, jax.Array]


def variables_by_path(model: keras.Model) -> dict[str, keras.Variable]:
    """Returns path -> variable of all variables that the model computes with.

    Raises:
        ModelError: Two variables have the same path.
    """
    backbone = model.backbone
    variables = {variable.path: variable for variable in backbone.variables}
    if len(variables) != len(backbone.variables):
        raise ModelError("Two variables of the model have the same path, so that they can't be told apart.")
    return variables


def parameters(model: keras.Model) -> Parameters:
    """Returns the model's current arrays, without copying them."""
    trainable = {id(variable) for variable in model.backbone.trainable_variables}
    groups = Parameters({}, {})
    for path, variable in variables_by_path(model).items():
        groups[0 if id(variable) in trainable else 1][path] = variable.value
    return groups


def assign(model: keras.Model, params: Mapping[str, Any]) -> None:
    """Assigns arrays to the model's variables, by their paths."""
    variables = variables_by_path(model)
    for path, value in params.items():
        variables[path].assign(value)


def gather_to_host(model: keras.Model) -> None:
    """Fetches arrays of which other processes hold parts into this process's memory, so that the model can be saved."""
    for variable in variables_by_path(model).values():
        if not variable.value.is_fully_addressable:
            variable._layout, variable._value = None, fetch_to_host(variable.value)


def params_scope(model: keras.Model, *groups: Params) -> keras.StatelessScope:
    """Returns a Keras scope in which a model computes with other arrays than its own.

    Args:
        model: CausalLM.
        groups: Arrays by variable path, in one or more dicts. Variables that none names keep their own value.
    """
    variables = variables_by_path(model)
    return keras.StatelessScope(
        state_mapping=[(variables[path], value) for group in groups for path, value in group.items()]
    )


def value_in_scope(variable: keras.Variable) -> jax.Array:
    """Returns a variable's value in the current stateless scope, or else its own, not cast to the compute dtype."""
    scope = keras.src.backend.common.stateless_scope.get_stateless_scope()
    value = scope.get_current_value(variable) if scope is not None else None
    return variable._value if value is None else value


def hidden_states(backbone: keras_hub.models.Backbone, token_ids: Any, segment_ids: Any, positions: Any) -> jax.Array:
    """Runs a backbone on packed rows.

    Args:
        backbone: Backbone, prepared by `enable_packing` if rows hold several segments.
        token_ids, segment_ids, positions: [B, L] int32 arrays, as in a Batch.

    Returns:
        [B, L, D] final hidden states, in the model's compute dtype.
    """
    inputs = {"token_ids": token_ids, "padding_mask": segment_ids, "position_ids": positions}
    return backbone({name: inputs[name] for name in backbone.input})


def check_text_only(model: keras.Model) -> None:
    """Raises ModelError if the backbone can't run on text alone."""
    needed = set(model.backbone.input) - {"token_ids", "padding_mask", "position_ids"}
    if needed:
        raise ModelError(
            f"{type(model.backbone).__name__} also needs {', '.join(sorted(needed))}: only text models can be trained."
        )


def lm_head_weights(backbone: keras_hub.models.Backbone) -> jax.Array | Quantized | FakeQuantized:
    """Returns the LM head, which is the tied embedding with LoRA merged: [V, D] floats.

    A quantized embedding is returned as its codes, [V, D, 1]; in quantization-aware training as floats that count as
    rounded.
    """
    embedding = backbone.token_embedding
    return embedding.lm_head() if hasattr(embedding, "lm_head") else keras.ops.convert_to_tensor(embedding.embeddings)


def final_soft_cap(backbone: keras_hub.models.Backbone) -> float | None:
    """Returns the soft cap c of the logits c·tanh(x / c) (Gemma 2, arXiv:2408.00118, and Gemma 4), or None."""
    cap = backbone.token_embedding.logit_soft_cap
    return float(cap) if cap else None
