"""Runs several trials at once on one frozen base, which each step reads once for all of them."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from gemma_tune.config import Config
from gemma_tune.data import Batch
from gemma_tune.errors import ConfigError, TrainingError
from gemma_tune.evaluation import evaluate_batches
from gemma_tune.models.functional import Params
from gemma_tune.pipeline.program import Program
from gemma_tune.pipeline.setup import Setup
from gemma_tune.training.step.side_by_side import (
    make_side_by_side_eval_step,
    make_side_by_side_train_step,
    of_run,
    stacked,
)
from gemma_tune.training.step.train_step import make_pure_train_step

OnEvaluation = Callable[[int, Mapping[str, float]], None]


class SideBySideSteps(NamedTuple):
    """Compiled steps of trials that share a program.

    Attributes:
        train_step: Training step of all.
        eval_step: Evaluation step of all, on the same batch.
        own_paths: Paths of the frozen arrays that each trial has for itself.
    """

    train_step: Any
    eval_step: Any
    own_paths: frozenset[str]


@dataclasses.dataclass
class SideBySideTrial:
    """A trial among others.

    Attributes:
        setup: What it needs before its first step.
        on_evaluation: Called with the step and the held-out metrics of each evaluation; may raise to end the trial.
        metrics: Held-out metrics by step.
        num_steps: Number of steps done.
        error: What ended it early; None if nothing did.
    """

    setup: Setup
    on_evaluation: OnEvaluation
    metrics: dict[int, dict[str, float]] = dataclasses.field(default_factory=dict)
    num_steps: int = 0
    error: Exception | None = None

    def is_due(self, step: int) -> bool:
        """Returns whether it is evaluated after so many steps."""
        every = self.setup.config.training.eval_every_steps
        is_over = step > len(self.setup.batches) or self.error is not None
        return not is_over and (step in (0, len(self.setup.batches)) or bool(every and step % every == 0))

    @property
    def best_step(self) -> int:
        """Returns the step of the lowest held-out loss; the last one if none is below that before training."""
        best = min(self.metrics, key=lambda step: (self.metrics[step]["loss"], step))
        return best or self.num_steps

    def take(self, step: int, metrics: dict[str, float]) -> None:
        """Takes the metrics of an evaluation."""
        self.metrics[step] = metrics
        try:
            self.on_evaluation(step, metrics)
        except Exception as error:
            self.error = error  # It is raised by whoever asked for this trial, not by the others.


def make_side_by_side_steps(
    config: Config, program: Program, num_targets: int, num_heldout_targets: int
) -> SideBySideSteps:
    """Returns the steps of trials that share a program.

    Args:
        config: Settings that shape the program.
        program: The program.
        num_targets: Most positions with a loss in a micro-batch.
        num_heldout_targets: The same in a held-out batch.

    Raises:
        ConfigError: The model is on a mesh.
    """
    if program.sharding:
        raise ConfigError("Trials can't be trained side by side on a mesh. Leave training.mesh empty.")
    training, model = config.training, program.model
    train_step = make_pure_train_step(
        model, program.optimizer, num_targets, training.grad_accum_steps, training.loss_spike_factor
    )
    own_paths = frozenset(v.path for v in model.backbone.variables if v.path.endswith("/factor_scale"))
    return SideBySideSteps(
        make_side_by_side_train_step(train_step, own_paths),
        make_side_by_side_eval_step(model, num_heldout_targets, own_paths),
        own_paths,
    )


def run_side_by_side(steps: SideBySideSteps, trials: Sequence[SideBySideTrial]) -> float:
    """Runs trials to their ends, of which each says how it ended, and returns the seconds that this took.

    Args:
        steps: Steps of their program.
        trials: Trials, of which each has a number of steps, an order of the data and intervals of its own.
    """
    start, setups = time.perf_counter(), [trial.setup for trial in trials]
    own = {path: stacked([setup.frozen[path] for setup in setups]) for path in steps.own_paths}
    frozen, states = {**setups[0].frozen, **own}, stacked([setup.state for setup in setups])
    _evaluate(steps, trials, states.trainable, frozen, 0)
    for step in range(1, max(len(setup.batches) for setup in setups) + 1):
        if all(trial.error or step > len(trial.setup.batches) for trial in trials):
            break
        # A trial that is over goes on with its last batch, and nobody looks at it any more.
        batches = [setup.batches[min(step, len(setup.batches)) - 1] for setup in setups]
        states, metrics = steps.train_step(states, frozen, Batch(*map(np.stack, zip(*batches, strict=True))))
        losses = np.asarray(metrics.loss)
        for trial, loss in zip(trials, losses, strict=True):
            if trial.error is None and step <= len(trial.setup.batches):
                trial.num_steps = step
                if not math.isfinite(loss):
                    trial.error = TrainingError(f"Step {step}: the loss is {loss}. Try a lower learning rate.")
        _evaluate(steps, trials, states.trainable, frozen, step)
    return time.perf_counter() - start


def _evaluate(
    steps: SideBySideSteps, trials: Sequence[SideBySideTrial], trainable: Params, frozen: Params, step: int
) -> None:
    """Evaluates the trials that are due after a step."""
    if not any(trial.is_due(step) for trial in trials):
        return
    sums: list[Any] = [jax.device_get(steps.eval_step(trainable, frozen, batch)) for batch in trials[0].setup.heldout]
    for run, trial in enumerate(trials):
        if trial.is_due(step):
            trial.take(step, evaluate_batches(functools.partial(of_run, run=run), sums))


def num_side_by_side(memory_limit: float, weights_bytes: float, total_bytes: float) -> int:
    """Returns how many trials fit into memory beside each other, by plan; at least 1.

    Args:
        memory_limit: Bytes that they may take together.
        weights_bytes: Bytes of the frozen weights, which they share.
        total_bytes: Bytes of one trial with the weights.
    """
    return max(1, int((memory_limit - weights_bytes) / max(total_bytes - weights_bytes, 1.0)))
