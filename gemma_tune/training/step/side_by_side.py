"""Trains several runs at once on one frozen base: each layer multiplies the rows of all runs by its kernel together.

The states of the runs, their batches, and the few frozen arrays that differ between them (LoRA's scales) are stacked
along a new first axis, over which the whole step is vectorized. Products with frozen kernels, which belong to all, then
are one product of more rows: the base is read once for all runs.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gemma_tune.data import Batch
from gemma_tune.models.functional import Params
from gemma_tune.runtime.backend import keras
from gemma_tune.training.step.compile_once import CompiledOnce
from gemma_tune.training.step.loss import make_loss_fn
from gemma_tune.training.step.train_step import EvalStep, TrainStep


def stacked(trees: Sequence[Any]) -> Any:
    """Returns trees of arrays as one, each array with a new first axis: the run."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def of_run(tree: Any, run: int) -> Any:
    """Returns the arrays of one run."""
    return jax.tree.map(lambda leaf: leaf[run], tree)


def make_side_by_side_train_step(train_step: TrainStep, own_paths: Collection[str]) -> TrainStep:
    """Returns the compiled training step of several runs. The states' buffers are reused.

    Args:
        train_step: From `make_pure_train_step`.
        own_paths: Paths of the frozen arrays that each run has for itself, stacked.
    """

    def side_by_side_train_step(states: Any, frozen: Params, batches: Batch) -> Any:
        return jax.vmap(train_step, in_axes=(0, _axes(frozen, own_paths), 0))(states, dict(frozen), batches)

    return CompiledOnce(side_by_side_train_step, donate_argnums=0)


def make_side_by_side_eval_step(model: keras.Model, num_targets: int, own_paths: Collection[str]) -> EvalStep:
    """Returns the compiled evaluation step of several runs on the same batch: its LossSums have an axis for the run.

    Args:
        model: CausalLM, transformed for training.
        num_targets: Most positions with a loss in any batch.
        own_paths: As in `make_side_by_side_train_step`.
    """
    loss_fn: Callable = make_loss_fn(model, num_targets)

    def side_by_side_eval_step(trainable: Params, frozen: Params, batch: Batch) -> Any:
        return jax.vmap(loss_fn, in_axes=(0, _axes(frozen, own_paths), None))(dict(trainable), dict(frozen), batch)

    return CompiledOnce(side_by_side_eval_step)


def _axes(frozen: Params, own_paths: Collection[str]) -> dict[str, int | None]:
    return {path: 0 if path in own_paths else None for path in frozen}
