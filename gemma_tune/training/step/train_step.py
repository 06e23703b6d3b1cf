"""The training and evaluation steps: pure functions of state, frozen weights and batch, compiled once."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gemma_tune.data import Batch
from gemma_tune.models.functional import Params
from gemma_tune.models.lora.dropout import make_dropout_values
from gemma_tune.models.sharding.placement import MeshSharding
from gemma_tune.runtime.backend import keras
from gemma_tune.training.losses.cross_entropy import LossSums
from gemma_tune.training.losses.loss_scale import scale_of_sum
from gemma_tune.training.optimizer import as_float32
from gemma_tune.training.state import StepMetrics, TrainState
from gemma_tune.training.state_shardings import shardings_of
from gemma_tune.training.step.compile_once import CompiledOnce
from gemma_tune.training.step.dropout import with_dropout
from gemma_tune.training.step.loss import make_loss_fn, make_loss_of_hidden
from gemma_tune.training.step.per_block import PerBlockProgram
from gemma_tune.training.step.per_block_gradients import PerBlockGradients
from gemma_tune.training.step.per_block_step import PerBlockTrainStep
from gemma_tune.training.step.update import make_update

TrainStep = Callable[[TrainState, Params, Batch], tuple[TrainState, StepMetrics]]
EvalStep = Callable[[Params, Params, Batch], LossSums]


def make_train_step(
    model: keras.Model,
    optimizer: optax.GradientTransformation,
    num_targets: int | Sequence[int],
    grad_accum_steps: int,
    per_block: PerBlockProgram | None = None,
    spike_factor: float = 0.0,
    sharding: MeshSharding | None = None,
) -> TrainStep:
    """Returns the compiled training step. The state's buffers are reused; the frozen weights' are not.

    Gradients of the summed loss are added up over the micro-batches and divided once by all their weights: with unequal
    token counts the mean of means would be another number.

    Args:
        model: A CausalLM.
        optimizer: From `make_optimizer`.
        num_targets: Most positions with a loss in any micro-batch; on a mesh, in the rows of one device. Of several
            numbers the largest is that; with `per_block`, a micro-batch takes the smallest that holds it.
        grad_accum_steps: Number of micro-batches in a batch.
        per_block: Programs by kind of decoder block; None compiles one program for the whole step.
        spike_factor: With a guard in the state, how many times the usual loss is bad; 0: only a loss that is not
            finite.
        sharding: Mesh sharding of the model, or None.
    """
    sizes = [num_targets] if isinstance(num_targets, int) else num_targets
    if per_block:
        num_summed = max(sizes) * grad_accum_steps
        update, dropout = make_update(optimizer, num_summed, spike_factor), make_dropout_values(model.backbone)
        gradients = PerBlockGradients(per_block, {size: make_loss_of_hidden(model, size) for size in sizes})
        return PerBlockTrainStep(gradients, update, num_summed, grad_accum_steps, dropout)
    train_step = make_pure_train_step(model, optimizer, max(sizes), grad_accum_steps, spike_factor, sharding)
    out_shardings = (lambda state, *_: (shardings_of(state), sharding.replicated)) if sharding else None
    return CompiledOnce(train_step, out_shardings=out_shardings, donate_argnums=0)


def make_pure_train_step(
    model: keras.Model,
    optimizer: optax.GradientTransformation,
    num_targets: int,
    grad_accum_steps: int,
    spike_factor: float = 0.0,
    sharding: MeshSharding | None = None,
) -> TrainStep:
    """Returns the whole training step as a function to transform or compile. Arguments as in `make_train_step`."""
    num_summed = num_targets * grad_accum_steps * (sharding.shape.num_row_shards if sharding else 1)
    update, dropout = make_update(optimizer, num_summed, spike_factor), make_dropout_values(model.backbone)
    sum_gradients = _make_sum_gradients(make_loss_fn(model, num_targets, sharding), grad_accum_steps, sharding)

    def train_step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, StepMetrics]:
        def frozen_in(micro_batch: Any) -> Params:
            return with_dropout(frozen, dropout, state, micro_batch)

        scale = scale_of_sum(state.loss_scale, num_summed)
        return update(state, *sum_gradients(state.trainable, frozen_in, batch, scale), batch.segment_ids)

    return train_step


def _make_sum_gradients(
    loss_fn: EvalStep, grad_accum_steps: int, sharding: MeshSharding | None
) -> Callable[[Params, Callable[[Any], Params], Batch, Any], tuple[dict, LossSums]]:
    """Returns (trainable, function from a micro-batch's number to the frozen weights, batch, loss scale or None) ->
    (float32 gradients by path, LossSums) of a batch.
    """

    def sum_gradients(
        trainable: Params, frozen_in: Callable[[Any], Params], batch: Batch, scale: Any
    ) -> tuple[dict, LossSums]:
        def loss_and_sums(trainable: Params, frozen: Params, micro: Batch):
            sums = loss_fn(trainable, frozen, micro)
            return sums.loss_sum if scale is None else sums.loss_sum * scale, sums

        def add(carry, numbered: tuple[Any, Batch]):
            number, micro = numbered
            weights = trainable, frozen_in(number)
            if sharding:
                # Else XLA gathers what `fsdp` shards before the loop, for all blocks at once: it stays the same.
                weights, micro = jax.lax.optimization_barrier((weights, micro))
            grads, sums = jax.grad(loss_and_sums, has_aux=True)(*weights, micro)
            return jax.tree.map(jnp.add, carry, (as_float32(grads), sums)), None

        if grad_accum_steps == 1:
            grads, sums = jax.grad(loss_and_sums, has_aux=True)(trainable, frozen_in(0), batch)
            return as_float32(grads), sums
        micro_batches = Batch(*(field.reshape(grad_accum_steps, -1, field.shape[-1]) for field in batch))
        if sharding:
            micro_batches = jax.lax.with_sharding_constraint(micro_batches, sharding.micro_batches)
        zero = (
            jax.tree.map(lambda value: jnp.zeros(value.shape, jnp.float32), dict(trainable)),
            LossSums(*[jnp.zeros(())] * 3),
        )
        return jax.lax.scan(add, zero, (jnp.arange(grad_accum_steps), micro_batches))[0]

    return sum_gradients


def make_eval_step(
    model: keras.Model, num_targets: int, per_block: PerBlockProgram | None = None, sharding: MeshSharding | None = None
) -> EvalStep:
    """Returns the compiled evaluation step: (trainable, frozen, batch) -> LossSums.

    Arguments as in `make_train_step`.
    """
    if per_block:
        return per_block.make_loss(make_loss_of_hidden(model, num_targets))
    out_shardings = (lambda *_: sharding.replicated) if sharding else None
    return CompiledOnce(make_loss_fn(model, num_targets, sharding), out_shardings=out_shardings)
