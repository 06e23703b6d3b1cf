"""A training step in several programs."""

import jax
import jax.numpy as jnp
import numpy as np

from gemma_tune.data import Batch
from gemma_tune.models.functional import Params
from gemma_tune.models.lora.dropout import DropoutValues
from gemma_tune.training.losses.loss_scale import scale_of_sum
from gemma_tune.training.optimizer import as_float32
from gemma_tune.training.state import StepMetrics, TrainState
from gemma_tune.training.step.compile_once import CompiledOnce, StepMemory, tree_num_bytes
from gemma_tune.training.step.dropout import with_dropout
from gemma_tune.training.step.per_block_gradients import PerBlockGradients
from gemma_tune.training.step.update import Update


class PerBlockTrainStep:
    """A training step whose gradients come from a program for each kind of block.

    Args:
        gradients: Computes the gradients of a micro-batch.
        update: From `make_update`.
        num_targets: Number of tokens that are summed, about, as for `make_update`.
        grad_accum_steps: Number of micro-batches in a batch.
        dropout: From `make_dropout_values`; None without dropout.
    """

    def __init__(
        self,
        gradients: PerBlockGradients,
        update: Update,
        num_targets: int,
        grad_accum_steps: int,
        dropout: DropoutValues | None = None,
    ):
        self._dropout = jax.jit(dropout) if dropout else None
        self._gradients, self._num_targets, self._num_micro = gradients, num_targets, grad_accum_steps
        self._update = CompiledOnce(update, donate_argnums=0)
        self._add = jax.jit(lambda total, more: jax.tree.map(jnp.add, total, more), donate_argnums=0)

    def __call__(self, state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, StepMetrics]:
        """Runs a step."""
        total = None
        scale = scale_of_sum(state.loss_scale, self._num_targets)
        for number, micro in enumerate(self._micro_batches(batch)):
            of_micro = with_dropout(frozen, self._dropout, state, np.int32(number))
            grads, sums = self._gradients(state.trainable, of_micro, scale, micro)
            one = as_float32(grads), sums
            total = self._add(total, one) if total else one
            del grads, one
        assert total is not None
        return self._update(state, *total, batch.segment_ids)

    def memory(self, state: TrainState, frozen: Params, batch: Batch) -> StepMemory:
        """Returns the memory that a call takes, without running it. Takes shapes too."""
        micro = jax.eval_shape(self._micro_batches, batch)[0]
        scale = jax.eval_shape(lambda loss_scale: scale_of_sum(loss_scale, self._num_targets), state.loss_scale)
        memory = self._gradients.memory(state.trainable, frozen, scale, micro)
        optimizer_bytes = tree_num_bytes(state.opt_state)
        accumulated = 4 * sum(leaf.size for leaf in state.trainable.values()) if self._num_micro > 1 else 0
        argument, temporary = memory.argument_bytes + optimizer_bytes, memory.temporary_bytes + accumulated
        return StepMemory(argument, temporary, argument + temporary)

    @property
    def num_programs(self) -> int:
        """Number of batch shapes that it was compiled for."""
        return self._gradients.num_programs

    def _micro_batches(self, batch: Batch) -> list[Batch]:
        rows = [jnp.split(jnp.asarray(field), self._num_micro) for field in batch]
        return [Batch(*fields) for fields in zip(*rows, strict=True)]
