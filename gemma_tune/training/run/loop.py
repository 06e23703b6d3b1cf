"""The training loop: steps, evaluations, checkpoints, early stopping, and an orderly end after interrupts or errors."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import optax

from gemma_tune.errors import TrainingError
from gemma_tune.models.functional import Params
from gemma_tune.runtime.interrupts import Interrupted, Interrupts, StopRequested
from gemma_tune.runtime.processes import all_reduce_max
from gemma_tune.training.prefetch import Batches, Prefetch
from gemma_tune.training.run.bad_steps import (
    FLOAT16_OVERFLOWS,
    describe_examples,
    find_problem,
    may_skip,
    stop_message,
)
from gemma_tune.training.run.checkpoint_content import Progress
from gemma_tune.training.state import StepMetrics, TrainState
from gemma_tune.training.step.train_step import TrainStep


class Reporter(Protocol):
    """Shows a run's progress."""

    def on_step(self, step: int, num_steps: int, values: dict[str, float]) -> None: ...

    def on_evaluation(self, step: int, values: dict[str, float]) -> None: ...

    def on_problem(self, message: str) -> None: ...


class CheckpointStore(Protocol):
    """Keeps states of a run, as `Checkpoints` does on the disk."""

    @property
    def steps(self) -> list[int]: ...

    def save(self, state: TrainState, progress: Progress, replace: bool = False) -> None: ...

    def wait(self) -> bool: ...


class MetricsLog(Protocol):
    """Takes rows of metrics, as `MetricsWriter` does into files."""

    def write(self, step: int, **values: float) -> None: ...

    def write_bad_step(self, step: int, what: str, origins: Sequence[str]) -> None: ...


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """Settings of the loop, as in `config.TrainingConfig`. Of the intervals, 0 means never.

    Attributes:
        eval_every_steps: Steps between evaluations.
        checkpoint_every_steps: Steps between checkpoints.
        early_stopping_patience: Number of evaluations without a new best value that end the run; 0: none do.
        log_every_steps: Steps between rows of metrics.
        skips_bad_steps: Whether bad steps are skipped. If not, the first one ends the run.
        best_by: Held-out metric that says which step is the best.
        is_higher_better: Whether its highest value is the best.
    """

    eval_every_steps: int
    checkpoint_every_steps: int
    early_stopping_patience: int
    log_every_steps: int
    skips_bad_steps: bool = False
    best_by: str = "loss"
    is_higher_better: bool = False


@dataclasses.dataclass
class Loop:
    """Runs a training run from its state to its end.

    Attributes:
        train_step: Training step, from `make_train_step`.
        frozen: Frozen weights by variable path.
        batches: Batches by step.
        evaluate: Function of the trained weights, and of a function to be called between batches, which may raise.
            Returns held-out metrics, `loss` among them. None if nothing is held out.
        schedule: Learning rate by step, for the log.
        settings: Intervals, and what bad steps do.
        checkpoints: Keeps states of the run.
        metrics: Takes the run's metrics.
        reporter: Shows progress and problems.
        origins: Function of a step, counted from 0, that returns where its examples come from, such as
            `support.jsonl:17`.
        evaluate_answers: Function of the step, the trained weights, and of a function to be called between batches,
            which may raise. Returns further held-out metrics, of generated answers. None if there are none.
    """

    train_step: TrainStep
    frozen: Params
    batches: Batches
    evaluate: Callable[[Params, Callable[[], None]], dict[str, float]] | None
    schedule: optax.Schedule
    settings: LoopSettings
    checkpoints: CheckpointStore
    metrics: MetricsLog
    reporter: Reporter
    origins: Callable[[int], list[str]] = lambda step: []
    evaluate_answers: Callable[[int, Params, Callable[[], None]], dict[str, float]] | None = None

    def run(self, state: TrainState, progress: Progress) -> tuple[TrainState, Progress]:
        """Trains from `state.step` to the last step.

        Args:
            state: State to begin with.
            progress: Progress to begin with.

        Returns:
            The last state, and the progress, which knows the best step.

        Raises:
            TrainingError: A step is bad and ends the run, or no loss scale is small enough for float16. The message
                names the step, its examples and the last good checkpoint.
            Interrupted: Ctrl-C or SIGTERM came. A checkpoint was saved if there was room for it.
        """
        step, num_steps = int(state.step), len(self.batches)
        with Interrupts() as interrupts, Prefetch(self.batches, step) as batches:
            if self.evaluate and (step == 0 or progress.pending_evaluation):
                progress = self._evaluate(state, progress, interrupts)
            self._clock = time.perf_counter()
            while step < num_steps and not self._is_exhausted(progress):
                state, values = self.train_step(state, self.frozen, batches.next())
                step += 1
                self._log(step, values, state, batches.wait_seconds)
                is_last = step == num_steps
                if self.evaluate and (self._is_due(step, self.settings.eval_every_steps) or is_last):
                    progress = self._evaluate(state, progress, interrupts)
                    if progress.best_step == step:
                        self.checkpoints.save(state, progress)
                if self._is_due(step, self.settings.checkpoint_every_steps) or is_last or self._is_exhausted(progress):
                    self.checkpoints.save(state, progress)
                if (signal_number := all_reduce_max(interrupts.received)) and not is_last:
                    raise self._interrupted(state, progress, signal_number)
        self.checkpoints.wait()
        return state, progress

    def _interrupted(self, state: TrainState, progress: Progress, signal_number: int) -> Interrupted:
        """Saves a checkpoint, and returns the error to raise."""
        step = int(state.step)
        what = f"Stopped at step {step} of {len(self.batches)}"
        if step:
            self.checkpoints.save(state, progress)
        if not step:
            what += ", before training began"
        elif self.checkpoints.wait():
            what += ", and saved"
        else:
            good = ", ".join(map(str, self.checkpoints.steps)) or "none"
            what += f"; it could not be saved. Good checkpoints: {good}"
        return Interrupted(f"{what}. Run the same command again to go on.", signal_number)

    def _is_better(self, value: float, best: float | None) -> bool:
        if not math.isfinite(value) or best is None:
            return math.isfinite(value)
        return value > best if self.settings.is_higher_better else value < best

    def _is_exhausted(self, progress: Progress) -> bool:
        patience = self.settings.early_stopping_patience
        return bool(patience) and progress.num_bad_evals >= patience

    @staticmethod
    def _is_due(step: int, every: int) -> bool:
        return bool(every) and step % every == 0

    def _log(self, step: int, metrics: StepMetrics, state: TrainState, wait_seconds: float) -> None:
        loss = float(jax.device_get(metrics.loss))  # Waits for the step.
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        grad_norm = float(metrics.grad_norm)
        loss_scale, guard = state.loss_scale, state.guard
        self._check(step, metrics, state)
        num_skipped = (int(loss_scale.num_skipped) if loss_scale else 0) + (int(guard.num_bad) if guard else 0)
        num_updates = step - 1 - num_skipped  # Before this step; the schedule counts updates.
        values = {
            **({"loss": loss} if math.isfinite(loss) else {}),
            "learning_rate": float(self.schedule(max(num_updates, 0))),
            **({"grad_norm": grad_norm} if math.isfinite(grad_norm) else {}),
            **({"loss_scale": float(loss_scale.scale)} if loss_scale else {}),
            **({"num_skipped_steps": num_skipped} if loss_scale or guard else {}),
            "num_tokens": float(metrics.num_tokens),
            "num_target_tokens": float(metrics.num_target_tokens),
            "step_seconds": seconds,
            "input_wait_seconds": wait_seconds,
            "input_wait_share": wait_seconds / seconds,
            "tokens_per_second": float(metrics.num_tokens) / seconds,
        }
        if step % self.settings.log_every_steps == 0 or step == len(self.batches):
            self.metrics.write(step, **values)
        self.reporter.on_step(step, len(self.batches), values)

    def _check(self, step: int, metrics: StepMetrics, state: TrainState) -> None:
        """Raises TrainingError at a bad step, unless its update was left out and the run may go on."""
        problem = find_problem(metrics, state)
        if not problem:
            return
        origins = self.origins(step - 1)
        examples = describe_examples(origins)
        self.metrics.write_bad_step(step, problem, origins)
        if self.settings.skips_bad_steps and may_skip(state):
            self.reporter.on_problem(f"Step {step} was skipped: {problem}.{examples}")
            return
        self.checkpoints.wait()
        raise TrainingError(stop_message(step, problem, state, examples, self.checkpoints.steps))

    def _evaluate(self, state: TrainState, progress: Progress, interrupts: Interrupts) -> Progress:
        """Evaluates, and returns the progress with the result in it.

        Raises:
            Interrupted: A signal came. The state was saved, and will be evaluated when the run is resumed.
        """
        assert self.evaluate is not None
        step = int(state.step)
        try:
            values = self.evaluate(state.trainable, interrupts.check)
            if self.evaluate_answers:
                values = {**values, **self.evaluate_answers(step, state.trainable, interrupts.check)}
        except StopRequested:
            raise self._interrupted(state, progress._replace(pending_evaluation=True), interrupts.received) from None
        if state.loss_scale and not math.isfinite(values["loss"]):
            raise TrainingError(f"The held-out loss at step {step} is {values['loss']}. {FLOAT16_OVERFLOWS}")
        self.metrics.write(step, **{f"heldout_{name}": value for name, value in values.items()})
        self.reporter.on_evaluation(step, values)
        self._clock = time.perf_counter()  # Evaluation doesn't count as a slow step.
        value = values.get(self.settings.best_by, math.nan)  # A metric has no value where it can't judge any answer.
        was_pending = progress.pending_evaluation
        if self._is_better(value, progress.best_value):
            progress = Progress(value, step, 0)
        else:
            progress = progress._replace(num_bad_evals=progress.num_bad_evals + 1, pending_evaluation=False)
        if was_pending:
            self.checkpoints.save(state, progress, replace=True)
        return progress
