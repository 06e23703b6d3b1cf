"""Recomputes activations in the backward pass instead of keeping them (gradient checkpointing, arXiv:1604.06174).

A decoder block keeps some twenty arrays for its backward pass, most of them results of cheap elementwise operations.
With `dots` it keeps the results of its matrix products with weights and computes the rest anew; with `full` it keeps
its input alone, and the forward pass runs twice.

On GPU and TPU this is `jax.checkpoint`. XLA on CPU drops the barriers that this relies on, finds the recomputation
equal to the first computation, and keeps everything after all. There a block's backward pass becomes a branch: XLA
doesn't look for equal computations inside and outside of one.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gemma_tune.errors import ModelError
from gemma_tune.models.cpu.bfloat16 import PRODUCT
from gemma_tune.models.functional import value_in_scope
from gemma_tune.runtime.backend import keras, keras_hub

_FEW_TERMS = 64
_is_named_product = jax.checkpoint_policies.save_only_these_names(PRODUCT)


def _is_worth_keeping(primitive: Any, *avals: Any, **parameters: Any) -> bool:
    """Says whether a result is a product with weights. LoRA's x·A·B is as large as x·W, but sums over the rank alone:
    it takes less to compute it anew than to keep it.
    """
    if _is_named_product(primitive, *avals, **parameters):
        return True
    if not jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *avals, **parameters):
        return False
    if parameters["preferred_element_type"] not in (None, avals[0].dtype):
        return False  # What it is rounded to has the name.
    (summed, _), _ = parameters["dimension_numbers"]
    return math.prod(avals[0].shape[axis] for axis in summed) >= _FEW_TERMS


POLICIES = {
    "none": None,
    "dots": _is_worth_keeping,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def enable_remat(backbone: keras_hub.models.Backbone, remat: str) -> None:
    """Makes the decoder blocks recompute, in training; decoding with a cache stays as it is.

    Args:
        backbone: With LoRA and packing enabled already.
        remat: `none`, `dots` or `full`.

    Raises:
        ModelError: The backbone has no decoder blocks that could be wrapped.
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
        # Everything that the block computes with: what is learnt or computed before, and what gets no gradient.
        leaves, tree = jax.tree.flatten(([value_in_scope(variable) for variable in variables], args, named))
        is_trained = [variable.trainable for variable in variables]
        is_trained += [isinstance(leaf, jax.Array) and _is_float(leaf) for leaf in leaves[len(variables) :]]

        def compute(some: Sequence[jax.Array], others: Sequence[Any]) -> Any:
            first, second = iter(some), iter(others)
            values, args, named = jax.tree.unflatten(tree, [next(first if yes else second) for yes in is_trained])
            with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
                return call(*args, **named)

        some = [leaf for leaf, yes in zip(leaves, is_trained, strict=True) if yes]
        others = [leaf for leaf, yes in zip(leaves, is_trained, strict=True) if not yes]
        if jax.default_backend() != "cpu":
            return jax.checkpoint(lambda some: compute(some, others), policy=policy)(some)
        return _with_backward_branch(compute, policy, some, others)

    return recomputing_call


def _is_float(array: jax.Array) -> bool:
    return jnp.issubdtype(array.dtype, jnp.inexact)


def _with_backward_branch(compute: Callable, policy: Callable, some: list[jax.Array], others: list[Any]) -> Any:
    """Returns compute(some, others); the gradients in `some` are computed within a branch."""
    is_array = [isinstance(other, jax.Array) for other in others]
    arrays = [other for other, yes in zip(others, is_array, strict=True) if yes]
    constants = [other for other, yes in zip(others, is_array, strict=True) if not yes]

    def compute_joined(some: list[jax.Array], arrays: list[jax.Array]) -> Any:
        first, second = iter(arrays), iter(constants)
        return compute(some, [next(first if yes else second) for yes in is_array])

    def forward(some: list[jax.Array], arrays: list[jax.Array]) -> tuple[Any, Callable]:
        return jax.vjp(jax.checkpoint(lambda some: compute_joined(some, arrays), policy=policy), some)

    def backward(pullback: Callable, gradient: Any) -> tuple[Any, None]:
        (shapes,) = jax.eval_shape(pullback, gradient)
        not_numbers = jax.tree.map(lambda shape: jnp.full(shape.shape, jnp.nan, shape.dtype), shapes)
        # Practically always true, but XLA can't know. At any other gradient the training loop stops, or skips the step.
        is_number = jax.tree.leaves(gradient)[0].ravel()[0] < jnp.inf
        return jax.lax.cond(is_number, lambda: pullback(gradient)[0], lambda: not_numbers), None

    computed = jax.custom_vjp(compute_joined)
    computed.defvjp(forward, backward)
    return computed(some, arrays)
