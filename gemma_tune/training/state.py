"""The training state: everything that changes from step to step."""

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
from gemma_tune.training.optimizer import Hyperparameters, as_float32
from gemma_tune.training.state_shardings import optimizer_shardings


class TrainState(NamedTuple):
    """Everything that changes while training. A step takes over its buffers and returns new ones.

    Attributes:
        step: [] int32 number of steps done.
        trainable: Trained arrays by variable path.
        opt_state: State of the Optax optimizer.
        loss_scale: Loss scale; None unless the model computes in float16.
        guard: Guard against bad steps, or None.
        hyperparameters: Numbers of the optimizer as inputs of the step, which returns them as they are; None if they
            are constants of its program. Checkpoints don't hold them.
    """

    step: jax.Array
    trainable: dict[str, jax.Array]
    opt_state: Any
    loss_scale: LossScale | None = None
    guard: LossGuard | None = None
    hyperparameters: Hyperparameters | None = None


class StepMetrics(NamedTuple):
    """Metrics of a step, all [] float32.

    Attributes:
        loss: Mean loss, in nats per target token.
        num_target_tokens: Number of target tokens.
        num_tokens: Number of tokens without padding.
        grad_norm: Norm of the gradient. With loss scaling, a step was skipped if it is not finite.
        is_bad: 1 if the guard left out the step's update, else 0.
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
    hyperparameters: Hyperparameters | None = None,
) -> TrainState:
    """Returns the state before the first step.

    Args:
        model: A CausalLM.
        optimizer: From `make_optimizer`.
        take_over: Whether the state's arrays are also the model's, so that the weights are held once. Since steps take
            over the state's buffers, the model can't be used from the first step until `assign`.
        guarded: Whether the updates of bad steps are left out.
        sharding: Mesh sharding of the model, or None.
        hyperparameters: Numbers of the optimizer that are inputs of the step; None: those given to `make_optimizer`.
    """
    trainable, variables = {}, variables_by_path(model)
    for path in list(parameters(model).trainable):
        # Copied in any case, one at a time: XLA can't reuse memory that NumPy owns, such as that of loaded weights.
        trainable[path] = jnp.array(variables[path].value, copy=True)
        if take_over:
            variables[path].assign(trainable[path])
    on_mesh = {"out_shardings": optimizer_shardings(optimizer, trainable, sharding)} if sharding else {}
    state = TrainState(
        jnp.zeros((), jnp.int32),
        {},
        jax.jit(_init_optimizer, static_argnums=0, **on_mesh)(optimizer, trainable),
        init_loss_scale() if computes_in_float16(model) else None,
        init_guard() if guarded else None,
        hyperparameters.as_arrays() if hyperparameters else None,
    )
    if sharding:
        few = jax.tree.map(lambda leaf: put_sharded(leaf, sharding.replicated), state._replace(opt_state=None))
        state = few._replace(opt_state=state.opt_state)
    return state._replace(trainable=trainable)


def _init_optimizer(optimizer: optax.GradientTransformation, trainable: dict[str, jax.Array]) -> Any:
    return optimizer.init(as_float32(trainable))
