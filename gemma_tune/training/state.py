"""What changes while training, before the first step and after each."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gemma_tune.models.functional import parameters, variables_by_path
from gemma_tune.models.precision import computes_in_float16
from gemma_tune.models.sharding.placement import MeshSharding, put_sharded
from gemma_tune.runtime.backend import keras
from gemma_tune.training.guard import LossGuard, init_guard
from gemma_tune.training.losses.loss_scale import LossScale, init_loss_scale
from gemma_tune.training.optimizer import as_float32
from gemma_tune.training.state_shardings import optimizer_shardings


class TrainState(NamedTuple):
    """Everything that changes while training. Its buffers are given to each step and come back new.

    step: [] int32. trainable: path -> array. opt_state: Optax's. loss_scale: None unless the arithmetic is float16.
    guard: None unless bad steps are to be found before they do harm.
    """

    step: jax.Array
    trainable: dict[str, jax.Array]
    opt_state: Any
    loss_scale: LossScale | None = None
    guard: LossGuard | None = None


class StepMetrics(NamedTuple):
    """All [] float32: mean loss in nats per learnt token, learnt tokens, tokens that are no padding, norm of the
    gradient. With loss scaling, a step whose norm is not finite was skipped; with a guard, one that is_bad: 1 or 0.
    """

    loss: jax.Array
    num_target_tokens: jax.Array
    num_tokens: jax.Array
    grad_norm: jax.Array
    is_bad: jax.Array | float = 0.0


def init_state(
    model: keras.Model,
    optimizer: optax.GradientTransformation,
    *,
    take_over: bool = False,
    guarded: bool = False,
    sharding: MeshSharding | None = None,
) -> TrainState:
    """Returns the state before the first step.

    Args:
        model: A CausalLM.
        optimizer: From `make_optimizer`.
        take_over: Steps take over the buffers they are given. With True these are the model's own, so that the weights
            are held once, and the model can't be used from the first step until `assign`.
        guarded: Leave out the updates of bad steps.
        sharding: Of the mesh that the model is on.
    """
    trainable, variables = {}, variables_by_path(model)
    for path in list(parameters(model).trainable):
        # A copy in any case, one at a time: XLA can't reuse memory that NumPy owns, as that of loaded weights.
        trainable[path] = jnp.array(variables[path].value, copy=True)
        if take_over:
            variables[path].assign(trainable[path])
    on_mesh = {"out_shardings": optimizer_shardings(optimizer, trainable, sharding)} if sharding else {}
    state = TrainState(
        jnp.zeros((), jnp.int32),
        {},
        jax.jit(lambda tree: optimizer.init(as_float32(tree)), **on_mesh)(trainable),
        init_loss_scale() if computes_in_float16(model) else None,
        init_guard() if guarded else None,
    )
    if sharding:
        few = jax.tree.map(lambda leaf: put_sharded(leaf, sharding.replicated), state._replace(opt_state=None))
        state = few._replace(opt_state=state.opt_state)
    return state._replace(trainable=trainable)
