"""The training and evaluation steps: pure functions of state, frozen weights and batch, compiled once."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gemma_tune.data import Batch
from gemma_tune.keras_runtime import keras
from gemma_tune.models.functional import (
    Params,
    bound,
    final_soft_cap,
    head_weights,
    hidden_states,
    parameters,
    variables_by_path,
)
from gemma_tune.models.precision import computes_in_float16
from gemma_tune.training.blockwise import Blockwise, BlockwiseGradients
from gemma_tune.training.compile_once import CompiledOnce, StepMemory, num_bytes
from gemma_tune.training.loss_scale import LossScale, init_loss_scale, next_loss_scale, scale_of_sum
from gemma_tune.training.losses import LossSums, fused_linear_cross_entropy
from gemma_tune.training.optimizer import as_float32


class TrainState(NamedTuple):
    """Everything that changes while training. Its buffers are given to each step and come back new.

    step: [] int32. trainable: path -> array. opt_state: Optax's. loss_scale: None unless the arithmetic is float16.
    """

    step: jax.Array
    trainable: dict[str, jax.Array]
    opt_state: Any
    loss_scale: LossScale | None = None


class StepMetrics(NamedTuple):
    """All [] float32: mean loss in nats per learnt token, learnt tokens, tokens that are no padding, norm of the
    gradient. With loss scaling, a step whose norm is not finite was skipped.
    """

    loss: jax.Array
    num_target_tokens: jax.Array
    num_tokens: jax.Array
    grad_norm: jax.Array


TrainStep = Callable[[TrainState, Params, Batch], tuple[TrainState, StepMetrics]]
Update = Callable[[TrainState, Params, LossSums, Any], tuple[TrainState, StepMetrics]]
EvalStep = Callable[[Params, Params, Batch], LossSums]


def init_state(model: keras.Model, optimizer: optax.GradientTransformation, *, take_over: bool = False) -> TrainState:
    """Returns the state before the first step.

    Args:
        model: A CausalLM.
        optimizer: From `make_optimizer`.
        take_over: Steps take over the buffers they are given. With True these are the model's own, so that the weights
            are held once, and the model can't be used from the first step until `assign`.
    """
    trainable, variables = {}, variables_by_path(model)
    for path in list(parameters(model).trainable):
        # A copy in any case, one at a time: XLA can't reuse memory that NumPy owns, as that of loaded weights.
        trainable[path] = jnp.array(variables[path].value, copy=True)
        if take_over:
            variables[path].assign(trainable[path])
    return TrainState(
        jnp.zeros((), jnp.int32),
        trainable,
        jax.jit(lambda tree: optimizer.init(as_float32(tree)))(trainable),
        init_loss_scale() if computes_in_float16(model) else None,
    )


def make_loss_fn(model: keras.Model, num_targets: int) -> Callable[[Params, Params, Batch], LossSums]:
    """Returns (trainable, frozen, batch) -> LossSums of one micro-batch.

    Args:
        model: A CausalLM; its variables are not touched.
        num_targets: Most positions with a weight in any batch. Only these reach the head.
    """
    backbone, loss_of_hidden = model.backbone, make_loss_of_hidden(model, num_targets)

    def loss_fn(trainable: Params, frozen: Params, batch: Batch) -> LossSums:
        with bound(model, trainable, frozen):
            hidden = hidden_states(backbone, batch.token_ids, batch.segment_ids, batch.positions)
            return loss_of_hidden(trainable, frozen, hidden, batch)

    return loss_fn


def make_loss_of_hidden(model: keras.Model, num_targets: int) -> Callable[[Params, Params, jax.Array, Batch], LossSums]:
    """Returns (trainable, frozen, [B, L, D] final hidden states, batch) -> LossSums, to be called within `bound`."""
    backbone = model.backbone
    head_variable = backbone.token_embedding.path
    soft_cap = final_soft_cap(backbone)

    def loss_of_hidden(trainable: Params, frozen: Params, hidden: jax.Array, batch: Batch) -> LossSums:
        weights = batch.loss_weights.reshape(-1)
        (chosen,) = jnp.nonzero(weights, size=num_targets, fill_value=0)
        is_filled = jnp.arange(num_targets) < jnp.count_nonzero(weights)
        return fused_linear_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1])[chosen],
            head_weights(backbone),
            batch.target_ids.reshape(-1)[chosen],
            jnp.where(is_filled, weights[chosen], 0.0),
            soft_cap=soft_cap,
            head_is_trained=any(path.startswith(head_variable) for path in trainable),
        )

    return loss_of_hidden


def make_train_step(
    model: keras.Model,
    optimizer: optax.GradientTransformation,
    num_targets: int,
    grad_accum_steps: int,
    blockwise: Blockwise | None = None,
) -> TrainStep:
    """Returns the compiled training step. The state's buffers are reused; the frozen weights' are not.

    Args:
        model: A CausalLM.
        optimizer: From `make_optimizer`.
        num_targets: Most positions with a weight in any batch.
        grad_accum_steps: Micro-batches in a batch.
        blockwise: Computes by one program for each kind of decoder block; None by one for the whole step.

    Gradients of the summed loss are added up over the micro-batches and divided once by all their weights: with unequal
    token counts the mean of means would be another number.
    """
    update = make_update(optimizer, num_targets)
    if blockwise:
        gradients = blockwise.make_gradients(make_loss_of_hidden(model, num_targets))
        return BlockwiseTrainStep(gradients, update, num_targets, grad_accum_steps)
    loss_fn = make_loss_fn(model, num_targets)

    def sum_gradients(trainable: Params, frozen: Params, batch: Batch, scale: Any) -> tuple[dict, LossSums]:
        def loss_and_sums(trainable: Params, micro: Batch):
            sums = loss_fn(trainable, frozen, micro)
            return sums.loss_sum if scale is None else sums.loss_sum * scale, sums

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
        scale = scale_of_sum(state.loss_scale, num_targets)
        return update(state, *sum_gradients(state.trainable, frozen, batch, scale), batch.segment_ids)

    return CompiledOnce(train_step, donate_argnums=0)


def make_update(optimizer: optax.GradientTransformation, num_targets: int) -> Update:
    """Returns (state, summed gradients, LossSums, [B, L] segment ids) -> (state, metrics): the end of a step.

    The gradients are float32, and with loss scaling still multiplied with `scale_of_sum(loss_scale, num_targets)`. If
    they are then not all finite, weights and optimizer state stay as they were.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def update(
        state: TrainState, grads: Params, sums: LossSums, segment_ids: jax.Array
    ) -> tuple[TrainState, StepMetrics]:
        mean, factor = 1.0 / jnp.maximum(sums.weight_sum, 1.0), scale_of_sum(state.loss_scale, num_targets)
        scale = mean if factor is None else mean / factor
        # Of the sums: squares of what is scaled, XLA on CPU would hold beside the gradients, all of them at once.
        grad_norm = optax.tree.norm(grads) * scale
        grads = {path: gradient * scale for path, gradient in grads.items()}
        masters = as_float32(state.trainable)
        updates, opt_state = optimizer.update(grads, state.opt_state, masters, grad_norm=grad_norm)
        updated = optax.apply_updates(masters, updates)
        trainable = {path: value.astype(state.trainable[path].dtype) for path, value in updated.items()}
        metrics = StepMetrics(
            loss=sums.loss_sum * mean,
            num_target_tokens=sums.weight_sum,
            num_tokens=jnp.sum(segment_ids > 0, dtype=jnp.float32),
            grad_norm=grad_norm,
        )
        if state.loss_scale is None:
            return TrainState(state.step + 1, trainable, opt_state), metrics
        is_finite = jnp.isfinite(grad_norm)  # Of what float16 can hold, squares don't overflow in float32.
        trainable, opt_state = jax.tree.map(
            lambda new, old: jnp.where(is_finite, new, old),
            (trainable, opt_state),
            (dict(state.trainable), state.opt_state),
        )
        return TrainState(state.step + 1, trainable, opt_state, next_loss_scale(state.loss_scale, is_finite)), metrics

    return update


class BlockwiseTrainStep:
    """A training step whose gradients come from `Blockwise`.

    Args:
        gradients: Of a micro-batch.
        update: From `make_update`.
        num_targets: As for `make_update`.
        grad_accum_steps: Micro-batches in a batch.
    """

    def __init__(self, gradients: BlockwiseGradients, update: Update, num_targets: int, grad_accum_steps: int):
        self._gradients, self._num_targets, self._num_micro = gradients, num_targets, grad_accum_steps
        self._update = CompiledOnce(update, donate_argnums=0)
        self._add = jax.jit(lambda total, more: jax.tree.map(jnp.add, total, more), donate_argnums=0)

    def __call__(self, state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, StepMetrics]:
        """Runs a step."""
        total = None
        scale = scale_of_sum(state.loss_scale, self._num_targets)
        for micro in self._micro_batches(batch):
            grads, sums = self._gradients(state.trainable, frozen, scale, micro)
            one = as_float32(grads), sums
            total = self._add(total, one) if total else one
            del grads, one
        assert total is not None
        return self._update(state, *total, batch.segment_ids)

    def memory(self, state: TrainState, frozen: Params, batch: Batch) -> StepMemory:
        """Returns what a call takes, without running it. Takes shapes too."""
        micro = jax.eval_shape(self._micro_batches, batch)[0]
        scale = jax.eval_shape(lambda loss_scale: scale_of_sum(loss_scale, self._num_targets), state.loss_scale)
        memory = self._gradients.memory(state.trainable, frozen, scale, micro)
        optimizer_bytes = num_bytes(state.opt_state)
        accumulated = 4 * sum(leaf.size for leaf in state.trainable.values()) if self._num_micro > 1 else 0
        argument, temporary = memory.argument_bytes + optimizer_bytes, memory.temporary_bytes + accumulated
        return StepMemory(argument, temporary, argument + temporary)

    @property
    def num_programs(self) -> int:
        """For how many shapes it was compiled."""
        return self._gradients.num_programs

    def _micro_batches(self, batch: Batch) -> list[Batch]:
        rows = [jnp.split(jnp.asarray(field), self._num_micro) for field in batch]
        return [Batch(*fields) for fields in zip(*rows, strict=True)]


def make_eval_step(model: keras.Model, num_targets: int, blockwise: Blockwise | None = None) -> EvalStep:
    """Returns the compiled evaluation step: (trainable, frozen, batch) -> LossSums.

    Arguments as in `make_train_step`.
    """
    if blockwise:
        return blockwise.make_loss(make_loss_of_hidden(model, num_targets))
    return CompiledOnce(make_loss_fn(model, num_targets))
