"""The end of a training step: from summed gradients to new weights and optimizer state."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gemma_tune.models.functional import Params
from gemma_tune.training.guard import is_bad, next_guard
from gemma_tune.training.losses.cross_entropy import LossSums
from gemma_tune.training.losses.loss_scale import next_loss_scale, scale_of_sum
from gemma_tune.training.optimizer import as_float32
from gemma_tune.training.state import StepMetrics, TrainState

Update = Callable[[TrainState, Params, LossSums, Any], tuple[TrainState, StepMetrics]]


def make_update(optimizer: optax.GradientTransformation, num_targets: int, spike_factor: float = 0.0) -> Update:
    """Returns (state, summed gradients, LossSums, [B, L] segment ids) -> (state, metrics).

    The gradients are float32, and with loss scaling still multiplied by `scale_of_sum(loss_scale, num_targets)`. If
    they are not all finite, weights and optimizer state stay as they were; with a guard in the state, also if the step
    is a bad one.

    Args:
        optimizer: From `make_optimizer`.
        num_targets: Number of tokens that are summed, about.
        spike_factor: With a guard in the state, how many times the usual loss is bad; 0: only a loss that is not
            finite.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def update(
        state: TrainState, grads: Params, sums: LossSums, segment_ids: jax.Array
    ) -> tuple[TrainState, StepMetrics]:
        mean, factor = 1.0 / jnp.maximum(sums.weight_sum, 1.0), scale_of_sum(state.loss_scale, num_targets)
        scale = mean if factor is None else mean / factor
        # The norm of the sums is scaled: XLA on CPU would hold all scaled gradients beside them to square those.
        grad_norm = optax.tree.norm(grads) * scale

        def updated(trainable: Params, opt_state: Any, grads: Params) -> tuple[dict[str, jax.Array], Any]:
            masters = as_float32(trainable)
            # Inside the branch: before it, XLA would write them to memory beside the sums.
            mean_grads = {path: gradient * scale for path, gradient in grads.items()}
            updates, opt_state = optimizer.update(
                mean_grads, opt_state, masters, grad_norm=grad_norm, hyperparameters=state.hyperparameters
            )
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
            trainable, opt_state = updated(state.trainable, state.opt_state, grads)
            return state._replace(step=state.step + 1, trainable=trainable, opt_state=opt_state), metrics
        is_good = is_finite = jnp.isfinite(grad_norm)  # Squares of what float16 can hold don't overflow in float32.
        if guard is not None:
            bad = is_bad(guard, loss, spike_factor)
            if loss_scale is None:
                bad |= ~is_finite  # With loss scaling that is an overflow, which lowers the scale.
            is_good &= ~bad
            guard, metrics = next_guard(guard, loss, bad), metrics._replace(is_bad=bad.astype(jnp.float32))
        if loss_scale is not None:
            loss_scale = next_loss_scale(loss_scale, is_finite)
        # A choice between old and new arrays would make XLA on CPU hold both, of weights and moments alike.
        trainable, opt_state = jax.lax.cond(
            is_good, updated, lambda *old: old[:2], dict(state.trainable), state.opt_state, grads
        )
        return TrainState(state.step + 1, trainable, opt_state, loss_scale, guard, state.hyperparameters), metrics

    return update
