"""Recomputes activations in the backward pass instead of keeping them (gradient checkpointing, arXiv:1604.06174).

A decoder block keeps some twenty arrays for its backward pass, most of them results of cheap elementwise operations.
The values of `training.remat` are named after JAX's checkpoint policies:

- `none` keeps all of them.
- `dots` keeps the results of matrix products with weights, as `dots_with_no_batch_dims_saveable` does, except LoRA's
  thin products, and recomputes the rest.
- `full` keeps the block's input alone (`nothing_saveable`), so that its forward pass runs twice.

On GPU and TPU this is `jax.checkpoint`. XLA on CPU drops the barriers that it relies on, finds that the recomputation
equals the first computation, and keeps everything after all. There a block's backward pass is put into a branch, since
XLA doesn't look for equal computations inside and outside of one.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gemma_tune.errors import ModelError
from gemma_tune.models.cpu.bfloat16 import CPU_MATMUL_NAME
from gemma_tune.models.functional import value_in_scope
from gemma_tune.runtime.backend import keras, keras_hub

_MIN_TERMS = 64  # Sums of fewer terms are LoRA's, over the rank.
_is_named_product = jax.checkpoint_policies.save_only_these_names(CPU_MATMUL_NAME)


def _is_dot_with_weights(primitive: Any, *avals: Any, **parameters: Any) -> bool:
    """Returns whether a result is a product with weights: the policy of `dots`.

    LoRA's x·A·B is as large as x·W, but sums over the rank alone, so that recomputing it costs less than keeping it.
    """
    if _is_named_product(primitive, *avals, **parameters):
        return True
    if not jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *avals, **parameters):
        return False
    if parameters["preferred_element_type"] not in (None, avals[0].dtype):
        return False  # It is rounded next, and the rounded array, which has the name, is kept.
    (summed, _), _ = parameters["dimension_numbers"]
    return math.prod(avals[0].shape[axis] for axis in summed) >= _MIN_TERMS


POLICIES = {
    "none": None,
    "dots": _is_dot_with_weights,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def enable_remat(backbone: keras_hub.models.Backbone, remat: str) -> None:
    """Makes the decoder blocks recompute activations in training. Decoding with a KV cache stays as it is.

    Args:
        backbone: Backbone; LoRA and packing are to be enabled before.
        remat: `none`, `dots` or `full`.

    Raises:
        ModelError: The backbone has no list of decoder blocks.
    """
    if remat == "none":
        return
    blocks = getattr(backbone, "transformer_layers", [])
    if not blocks:
        raise ModelError(f"{type(backbone).__name__} has no decoder blocks to recompute. Set training.remat=none.")
    for block in blocks:
        object.__setattr__(block, "call", _recomputing_call(block, block.call, POLICIES[remat]))


def _recomputing_call(block: Any, call: Callable, policy: Callable) -> Callable:
    def recomputing_call(*args: Any, **named: Any) -> Any:
        if not keras.src.backend.common.stateless_scope.in_stateless_scope() or named.get("cache") is not None:
            return call(*args, **named)
        variables = block.variables
        leaves, tree = jax.tree.flatten(([value_in_scope(variable) for variable in variables], args, named))
        has_gradient = [variable.trainable for variable in variables]
        has_gradient += [isinstance(leaf, jax.Array) and _is_float(leaf) for leaf in leaves[len(variables) :]]

        def compute(with_gradient: Sequence[jax.Array], without: Sequence[Any]) -> Any:
            values, args, named = jax.tree.unflatten(tree, _interleave(has_gradient, with_gradient, without))
            with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
                return call(*args, **named)

        with_gradient, without = _partition(has_gradient, leaves)
        if jax.default_backend() != "cpu":
            return jax.checkpoint(lambda leaves: compute(leaves, without), policy=policy)(with_gradient)
        return _with_backward_branch(compute, policy, with_gradient, without)

    return recomputing_call


def _is_float(array: jax.Array) -> bool:
    return jnp.issubdtype(array.dtype, jnp.inexact)


def _partition(is_first: Sequence[bool], values: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Splits values into those that are marked and the others."""
    first = [value for value, yes in zip(values, is_first, strict=True) if yes]
    return first, [value for value, yes in zip(values, is_first, strict=True) if not yes]


def _interleave(is_first: Sequence[bool], first: Sequence[Any], second: Sequence[Any]) -> list[Any]:
    """Puts together what `_partition` split."""
    one, other = iter(first), iter(second)
    return [next(one if yes else other) for yes in is_first]


def _with_backward_branch(compute: Callable, policy: Callable, with_gradient: list[jax.Array], without: list) -> Any:
    """Returns compute(with_gradient, without), whose backward pass is computed within a branch."""
    is_array = [isinstance(leaf, jax.Array) for leaf in without]
    arrays, constants = _partition(is_array, without)

    def compute_joined(with_gradient: list[jax.Array], arrays: list[jax.Array]) -> Any:
        return compute(with_gradient, _interleave(is_array, arrays, constants))

    def forward(with_gradient: list[jax.Array], arrays: list[jax.Array]) -> tuple[Any, Callable]:
        return jax.vjp(jax.checkpoint(lambda leaves: compute_joined(leaves, arrays), policy=policy), with_gradient)

    def backward(pullback: Callable, gradient: Any) -> tuple[Any, None]:
        (shapes,) = jax.eval_shape(pullback, gradient)
        not_numbers = jax.tree.map(lambda shape: jnp.full(shape.shape, jnp.nan, shape.dtype), shapes)
        # Nearly always true, which XLA can't know. With any other gradient the training loop stops or skips the step.
        is_number = jax.tree.leaves(gradient)[0].ravel()[0] < jnp.inf
        return jax.lax.cond(is_number, lambda: pullback(gradient)[0], lambda: not_numbers), None

    computed = jax.custom_vjp(compute_joined)
    computed.defvjp(forward, backward)
    return computed(with_gradient, arrays)
