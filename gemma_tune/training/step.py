"""The training and evaluation steps: pure functions of state, frozen weights and batch, compiled once."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gemma_tune.data import Batch
from gemma_tune.keras_runtime import keras
from gemma_tune.models.functional import Params, bound, final_soft_cap, head_weights, hidden_states, parameters
from gemma_tune.training.compile_once import CompiledOnce
from gemma_tune.training.losses import LossSums, fused_linear_cross_entropy
from gemma_tune.training.optimizer import as_float32


class TrainState(NamedTuple):
    """Everything that changes while training. Its buffers are given to each step and come back new.

    step: [] int32. trainable: path -> array. opt_state: Optax's.
    """

    step: jax.Array
    trainable: dict[str, jax.Array]
    opt_state: Any


class StepMetrics(NamedTuple):
    """All [] float32: mean loss in nats per learnt token, learnt tokens, tokens that are no padding, norm of the
    gradient.
    """

    loss: jax.Array
    num_target_tokens: jax.Array
    num_tokens: jax.Array
    grad_norm: jax.Array


TrainStep = Callable[[TrainState, Params, Batch], tuple[TrainState, StepMetrics]]
EvalStep = Callable[[Params, Params, Batch], LossSums]


def init_state(model: keras.Model, optimizer: optax.GradientTransformation, *, take_over: bool = False) -> TrainState:
    """Returns the state before the first step.

    Args:
        model: A CausalLM.
        optimizer: From `make_optimizer`.
        take_over: Steps take over the buffers they are given. False makes copies for them; True gives them the model's
            own, so that the weights are held once, and the model can't be used from the first step until `assign`.
    """
    trainable = dict(parameters(model).trainable)
    if not take_over:
        trainable = {path: jnp.array(value, copy=True) for path, value in trainable.items()}
    return TrainState(
        jnp.zeros((), jnp.int32), trainable, jax.jit(lambda tree: optimizer.init(as_float32(tree)))(trainable)
    )


def make_loss_fn(model: keras.Model, num_targets: int) -> Callable[[Params, Params, Batch], LossSums]:
    """Returns (trainable, frozen, batch) -> LossSums of one micro-batch.

    Args:
        model: A CausalLM; its variables are not touched.
        num_targets: Most positions with a weight in any batch. Only these reach the head.
    """
    backbone = model.backbone
    head_variable = backbone.token_embedding.path
    soft_cap = final_soft_cap(backbone)

    def loss_fn(trainable: Params, frozen: Params, batch: Batch) -> LossSums:
        head_is_trained = any(path.startswith(head_variable) for path in trainable)
        with bound(model, trainable, frozen):
            hidden = hidden_states(backbone, batch.token_ids, batch.segment_ids, batch.positions)
            head = head_weights(backbone)
        weights = batch.loss_weights.reshape(-1)
        (chosen,) = jnp.nonzero(weights, size=num_targets, fill_value=0)
        is_filled = jnp.arange(num_targets) < jnp.count_nonzero(weights)
        return fused_linear_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1])[chosen],
            head,
            batch.target_ids.reshape(-1)[chosen],
            jnp.where(is_filled, weights[chosen], 0.0),
            soft_cap=soft_cap,
            head_is_trained=head_is_trained,
        )

    return loss_fn


def make_train_step(
    model: keras.Model, optimizer: optax.GradientTransformation, num_targets: int, grad_accum_steps: int
) -> TrainStep:
    """Returns the compiled training step. The state's buffers are reused; the frozen weights' are not.

    Gradients of the summed loss are added up over the micro-batches and divided once by all their weights: with unequal
    token counts the mean of means would be another number.
    """
    loss_fn = make_loss_fn(model, num_targets)

    def sum_gradients(trainable: Params, frozen: Params, batch: Batch) -> tuple[dict, LossSums]:
        def loss_and_sums(trainable: Params, micro: Batch):
            sums = loss_fn(trainable, frozen, micro)
            return sums.loss_sum, sums

        def add(carry, micro: Batch):
            grads, sums = jax.grad(loss_and_sums, has_aux=True)(trainable, micro)
            return jax.tree.map(jnp.add, carry, (as_float32(grads), sums)), None

        if grad_accum_steps == 1:
            grads, sums = jax.grad(loss_and_sums, has_aux=True)(trainable, batch)
            return as_float32(grads), sums
        micro_batches = Batch(*(field.reshape(grad_accum_steps, -1, field.shape[-1]) for field in batch))
        zero = (
            jax.tree.map(lambda value: jnp.zeros(value.shape, jnp.float32), dict(trainable)),
            LossSums(*[jnp.zeros(())] * 3),
        )
        return jax.lax.scan(add, zero, micro_batches)[0]

    def train_step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, StepMetrics]:
        grads, sums = sum_gradients(state.trainable, frozen, batch)
        scale = 1.0 / jnp.maximum(sums.weight_sum, 1.0)
        grads = jax.tree.map(lambda gradient: gradient * scale, grads)
        masters = as_float32(state.trainable)
        updates, opt_state = optimizer.update(grads, state.opt_state, masters)
        updated = optax.apply_updates(masters, updates)
        trainable = {path: value.astype(state.trainable[path].dtype) for path, value in updated.items()}
        metrics = StepMetrics(
            loss=sums.loss_sum * scale,
            num_target_tokens=sums.weight_sum,
            num_tokens=jnp.sum(batch.segment_ids > 0, dtype=jnp.float32),
            grad_norm=optax.tree.norm(grads),
        )
        return TrainState(state.step + 1, trainable, opt_state), metrics

    return CompiledOnce(train_step, donate_argnums=0)


def make_eval_step(model: keras.Model, num_targets: int) -> EvalStep:
    """Returns the compiled evaluation step: (trainable, frozen, batch) -> LossSums."""
    return CompiledOnce(make_loss_fn(model, num_targets))
