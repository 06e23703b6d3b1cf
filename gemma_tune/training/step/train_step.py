"""The training and evaluation steps: pure functions of state, frozen weights and batch, compiled once."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gemma_tune.data import Batch
from gemma_tune.models.functional import Params, final_soft_cap, hidden_states, lm_head_weights, params_scope
from gemma_tune.models.sharding.layers import batch_sharded_inputs
from gemma_tune.models.sharding.placement import MeshSharding
from gemma_tune.runtime.backend import keras
from gemma_tune.training.guard import is_bad, next_guard
from gemma_tune.training.losses.cross_entropy import LossSums, fused_linear_cross_entropy
from gemma_tune.training.losses.loss_scale import next_loss_scale, scale_of_sum
from gemma_tune.training.losses.sharded import sharded_linear_cross_entropy
from gemma_tune.training.optimizer import as_float32
from gemma_tune.training.sharded_state import places
from gemma_tune.training.state import StepMetrics, TrainState
from gemma_tune.training.step.compile_once import CompiledOnce
from gemma_tune.training.step.per_block import PerBlockProgram
from gemma_tune.training.step.per_block_step import BlockwiseTrainStep, Update

TrainStep = Callable[[TrainState, Params, Batch], tuple[TrainState, StepMetrics]]
EvalStep = Callable[[Params, Params, Batch], LossSums]


def make_loss_fn(
    model: keras.Model, num_targets: int, sharding: MeshSharding | None = None
) -> Callable[[Params, Params, Batch], LossSums]:
    """Returns (trainable, frozen, batch) -> LossSums of one micro-batch.

    Args:
        model: A CausalLM; its variables are not touched.
        num_targets: Most positions with a weight in any batch; on a mesh, in the part of one device. Only these reach
            the head.
        sharding: Of the mesh that the model is on.
    """
    backbone, loss_of_hidden = model.backbone, make_loss_of_hidden(model, num_targets, sharding)

    def loss_fn(trainable: Params, frozen: Params, batch: Batch) -> LossSums:
        with params_scope(model, trainable, frozen), batch_sharded_inputs() if sharding else contextlib.nullcontext():
            hidden = hidden_states(backbone, batch.token_ids, batch.segment_ids, batch.positions)
            return loss_of_hidden(trainable, frozen, hidden, batch)

    return loss_fn


def make_loss_of_hidden(
    model: keras.Model, num_targets: int, sharding: MeshSharding | None = None
) -> Callable[[Params, Params, jax.Array, Batch], LossSums]:
    """Returns (trainable, frozen, [B, L, D] final hidden states, batch) -> LossSums, to be called within `params_scope`."""
    backbone = model.backbone
    head_variable = backbone.token_embedding.path
    soft_cap = final_soft_cap(backbone)

    def loss_of_hidden(trainable: Params, frozen: Params, hidden: jax.Array, batch: Batch) -> LossSums:
        head_is_trained = any(path.startswith(head_variable) for path in trainable)
        if sharding:
            return sharded_linear_cross_entropy(
                sharding,
                hidden,
                lm_head_weights(backbone),
                jnp.asarray(batch.target_ids),
                jnp.asarray(batch.loss_weights),
                num_targets=num_targets,
                soft_cap=soft_cap,
                head_is_trained=head_is_trained,
            )
        weights = batch.loss_weights.reshape(-1)
        (chosen,) = jnp.nonzero(weights, size=num_targets, fill_value=0)
        is_filled = jnp.arange(num_targets) < jnp.count_nonzero(weights)
        return fused_linear_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1])[chosen],
            lm_head_weights(backbone),
            batch.target_ids.reshape(-1)[chosen],
            jnp.where(is_filled, weights[chosen], 0.0),
            soft_cap=soft_cap,
            head_is_trained=head_is_trained,
        )

    return loss_of_hidden


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

    Args:
        model: A CausalLM.
        optimizer: From `make_optimizer`.
        num_targets: Most positions with a weight in any micro-batch; on a mesh, in the part of one device. Of several
            numbers, the largest is that; with `per_block`, a micro-batch takes the smallest that holds it.
        grad_accum_steps: Micro-batches in a batch.
        per_block: Computes by one program for each kind of decoder block; None by one for the whole step.
        spike_factor: With a guard in the state, a loss so many times the usual one is bad; 0: only one that is no
            number.
        sharding: Of the mesh that the model is on.

    Gradients of the summed loss are added up over the micro-batches and divided once by all their weights: with unequal
    token counts the mean of means would be another number.
    """
    sizes = [num_targets] if isinstance(num_targets, int) else num_targets
    num_summed = max(sizes) * grad_accum_steps * (sharding.shape.num_row_shards if sharding else 1)
    update = make_update(optimizer, num_summed, spike_factor)
    if per_block:
        gradients = per_block.make_gradients({size: make_loss_of_hidden(model, size) for size in sizes})
        return BlockwiseTrainStep(gradients, update, num_summed, grad_accum_steps)
    sum_gradients = _make_sum_gradients(make_loss_fn(model, max(sizes), sharding), grad_accum_steps, sharding)

    def train_step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, StepMetrics]:
        scale = scale_of_sum(state.loss_scale, num_summed)
        return update(state, *sum_gradients(state.trainable, frozen, batch, scale), batch.segment_ids)

    where = (lambda state, *_: (places(state), sharding.replicated)) if sharding else None
    return CompiledOnce(train_step, places=where, donate_argnums=0)


def _make_sum_gradients(
    loss_fn: EvalStep, grad_accum_steps: int, sharding: MeshSharding | None
) -> Callable[[Params, Params, Batch, Any], tuple[dict, LossSums]]:
    """Returns (trainable, frozen, batch, loss scale or None) -> (float32 gradients by path, LossSums) of a batch."""

    def sum_gradients(trainable: Params, frozen: Params, batch: Batch, scale: Any) -> tuple[dict, LossSums]:
        def loss_and_sums(trainable: Params, frozen: Params, micro: Batch):
            sums = loss_fn(trainable, frozen, micro)
            return sums.loss_sum if scale is None else sums.loss_sum * scale, sums

        def add(carry, micro: Batch):
            weights = trainable, frozen
            if sharding:
                # Else XLA gathers what `fsdp` cuts before the loop, of all blocks at once: it stays the same.
                weights, micro = jax.lax.optimization_barrier((weights, micro))
            grads, sums = jax.grad(loss_and_sums, has_aux=True)(*weights, micro)
            return jax.tree.map(jnp.add, carry, (as_float32(grads), sums)), None

        if grad_accum_steps == 1:
            grads, sums = jax.grad(loss_and_sums, has_aux=True)(trainable, frozen, batch)
            return as_float32(grads), sums
        micro_batches = Batch(*(field.reshape(grad_accum_steps, -1, field.shape[-1]) for field in batch))
        if sharding:
            micro_batches = jax.lax.with_sharding_constraint(micro_batches, sharding.micro_batches)
        zero = (
            jax.tree.map(lambda value: jnp.zeros(value.shape, jnp.float32), dict(trainable)),
            LossSums(*[jnp.zeros(())] * 3),
        )
        return jax.lax.scan(add, zero, micro_batches)[0]

    return sum_gradients


def make_update(optimizer: optax.GradientTransformation, num_targets: int, spike_factor: float = 0.0) -> Update:
    """Returns (state, summed gradients, LossSums, [B, L] segment ids) -> (state, metrics): the end of a step.

    The gradients are float32, and with loss scaling still multiplied with `scale_of_sum(loss_scale, num_targets)`. If
    they are then not all finite, weights and optimizer state stay as they were; and, with a guard in the state, if the
    step is a bad one.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def update(
        state: TrainState, grads: Params, sums: LossSums, segment_ids: jax.Array
    ) -> tuple[TrainState, StepMetrics]:
        mean, factor = 1.0 / jnp.maximum(sums.weight_sum, 1.0), scale_of_sum(state.loss_scale, num_targets)
        scale = mean if factor is None else mean / factor
        # Of the sums: squares of what is scaled, XLA on CPU would hold beside the gradients, all of them at once.
        grad_norm = optax.tree.norm(grads) * scale

        def updated(trainable: Params, opt_state: Any, grads: Params) -> tuple[dict[str, jax.Array], Any]:
            masters = as_float32(trainable)
            # Not before the branch, where XLA would write them down beside the sums.
            mean_grads = {path: gradient * scale for path, gradient in grads.items()}
            updates, opt_state = optimizer.update(mean_grads, opt_state, masters, grad_norm=grad_norm)
            updated = optax.apply_updates(masters, updates)
            return {path: value.astype(trainable[path].dtype) for path, value in updated.items()}, opt_state

        loss = sums.loss_sum * mean
        metrics = StepMetrics(
            loss=loss,
            num_target_tokens=sums.weight_sum,
            num_tokens=jnp.sum(segment_ids > 0, dtype=jnp.float32),
            grad_norm=grad_norm,
        )
        loss_scale, guard = state.loss_scale, state.guard
        if loss_scale is None and guard is None:
            return TrainState(state.step + 1, *updated(state.trainable, state.opt_state, grads)), metrics
        is_good = is_finite = jnp.isfinite(grad_norm)  # Of what float16 can hold, squares don't overflow in float32.
        if guard is not None:
            bad = is_bad(guard, loss, spike_factor)
            if loss_scale is None:
                bad |= ~is_finite  # With loss scaling that is an overflow, which the scale is there for.
            is_good &= ~bad
            guard, metrics = next_guard(guard, loss, bad), metrics._replace(is_bad=bad.astype(jnp.float32))
        if loss_scale is not None:
            loss_scale = next_loss_scale(loss_scale, is_finite)
        # A choice between old and new arrays would make XLA on CPU hold both, of weights and moments alike.
        trainable, opt_state = jax.lax.cond(
            is_good, updated, lambda *old: old[:2], dict(state.trainable), state.opt_state, grads
        )
        return TrainState(state.step + 1, trainable, opt_state, loss_scale, guard), metrics

    return update


def make_eval_step(
    model: keras.Model, num_targets: int, per_block: PerBlockProgram | None = None, sharding: MeshSharding | None = None
) -> EvalStep:
    """Returns the compiled evaluation step: (trainable, frozen, batch) -> LossSums.

    Arguments as in `make_train_step`.
    """
    if per_block:
        return per_block.make_loss(make_loss_of_hidden(model, num_targets))
    where = (lambda *_: sharding.replicated) if sharding else None
    return CompiledOnce(make_loss_fn(model, num_targets, sharding), places=where)
