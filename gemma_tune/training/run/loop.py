"""The training loop: steps, evaluations, checkpoints, early stopping, and a clean way out of each mishap."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any, Protocol

import jax
import optax

from gemma_tune.errors import TrainingError
from gemma_tune.models.functional import Params
from gemma_tune.runtime.interrupts import Interrupted, Interrupts, StopRequested
from gemma_tune.runtime.processes import all_reduce_max
from gemma_tune.training.prefetch import Batches, Prefetch
from gemma_tune.training.run.checkpoint_content import Progress
from gemma_tune.training.run.checkpoints import Checkpoints
from gemma_tune.training.run.metrics import MetricsWriter
from gemma_tune.training.state import StepMetrics, TrainState
from gemma_tune.training.step.train_step import TrainStep

_MOST_BAD_IN_A_ROW = 20
_OF_BAD_STEPS = (
    "The same command with --config.training.on_bad_step=skip goes on {where} and leaves such steps out. Or try a "
    "lower --learning_rate, a longer optimizer.warmup_steps, or --precision=float32, with another --workdir."
)
_FLOAT16_OVERFLOWS = (
    "float16 ends at 65504, and this model computes larger values. Take --precision=mixed_bfloat16 or float32, with "
    "another --workdir."
)


class Reporter(Protocol):
    """Shows a run's progress."""

    def on_step(self, step: int, num_steps: int, values: dict[str, float]) -> None: ...

    def on_evaluation(self, step: int, values: dict[str, float]) -> None: ...

    def on_problem(self, message: str) -> None: ...


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """Intervals, as in `config.TrainingConfig`."""

    eval_every_steps: int
    checkpoint_every_steps: int
    early_stopping_patience: int
    log_every_steps: int
    skips_bad_steps: bool = False


@dataclasses.dataclass
class Loop:
    """Runs a training run from its state to its end.

    Attributes:
        train_step: From `make_train_step`.
        frozen: The weights that stay.
        batches: By step.
        evaluate: trainable, a function to call now and then, which may raise -> held-out values, with `loss` among
            them; None when nothing is held out.
        schedule: step -> learning rate, for the log.
        origins: step, counted from 0 -> where its examples come from, such as `support.jsonl:17`.
    """

    train_step: TrainStep
    frozen: Params
    batches: Batches
    evaluate: Callable[[Params, Callable[[], None]], dict[str, float]] | None
    schedule: optax.Schedule
    settings: LoopSettings
    checkpoints: Checkpoints
    metrics: MetricsWriter
    reporter: Reporter
    origins: Callable[[int], list[str]] = lambda step: []

    def run(self, state: TrainState, progress: Progress) -> tuple[TrainState, Progress]:
        """Trains from `state.step` to the last step.

        Returns:
            The last state, and the progress, which knows the best step.

        Raises:
            TrainingError: A step is bad and the run is to stop then, or no loss scale is small enough for float16;
                names the step, its examples and the last good checkpoint.
            Interrupted: Ctrl-C or SIGTERM; a checkpoint was saved, if the disk takes it.
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
        """Saves, and returns what to raise."""
        step = int(state.step)
        what = f"Stopped at step {step} of {len(self.batches)}"
        if step:
            self.checkpoints.save(state, progress)
        if not step:
            what += ", before anything was learnt"
        elif self.checkpoints.wait():
            what += ", and saved"
        else:
            what += f", and could not save. Good checkpoints: {', '.join(map(str, self.checkpoints.steps)) or 'none'}"
        return Interrupted(f"{what}. Run the same command again to go on.", signal_number)

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
        values = {
            **({"loss": loss} if math.isfinite(loss) else {}),
            "learning_rate": float(self.schedule(max(step - 1 - num_skipped, 0))),  # Skipped steps don't count there.
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
        loss, grad_norm = float(metrics.loss), float(metrics.grad_norm)
        loss_scale, guard = state.loss_scale, state.guard
        has_overflown = loss_scale is not None and float(loss_scale.scale) >= 1  # Its update was left out.
        is_spike = bool(metrics.is_bad) and math.isfinite(loss)
        if math.isfinite(loss) and (math.isfinite(grad_norm) or has_overflown) and not is_spike:
            return
        what = f"the loss is {loss} and the gradient's norm {grad_norm}"
        if is_spike and guard and math.isfinite(grad_norm):
            what = f"the loss is {loss:.4g}, where {float(guard.mean_loss):.4g} was usual"
        origins = self.origins(step - 1)
        held = f" Its examples: {_grouped(origins)}." if origins else ""
        self.metrics.write_bad_step(step, what, origins)
        if guard and self.settings.skips_bad_steps and int(guard.num_bad_in_a_row) < _MOST_BAD_IN_A_ROW:
            self.reporter.on_problem(f"Step {step} was skipped: {what}.{held}")
            return
        self.checkpoints.wait()
        saved = self.checkpoints.steps
        last = f"The checkpoint of step {saved[-1]} is good" if saved else "No checkpoint had been written yet"
        advice = _OF_BAD_STEPS.format(where="from there" if saved else "from the start")
        if guard and int(guard.num_bad_in_a_row) > 1:
            what += f", the {int(guard.num_bad_in_a_row)}th bad step in a row"
        if loss_scale:
            what += f", at a loss scale of {float(loss_scale.scale):g}"
            advice = _FLOAT16_OVERFLOWS
        raise TrainingError(f"Step {step}: {what}.{held} {last}; nothing of this step was saved. {advice}")

    def _evaluate(self, state: TrainState, progress: Progress, interrupts: Interrupts) -> Progress:
        """Returns the progress with the held-out loss in it.

        Raises:
            Interrupted: A signal came; the state was saved, and will be evaluated when the run goes on.
        """
        assert self.evaluate is not None
        step = int(state.step)
        try:
            values = self.evaluate(state.trainable, interrupts.check)
        except StopRequested:
            raise self._interrupted(state, progress._replace(pending_evaluation=True), interrupts.received) from None
        if state.loss_scale and not math.isfinite(values["loss"]):
            raise TrainingError(f"The held-out loss at step {step} is {values['loss']}. {_FLOAT16_OVERFLOWS}")
        self.metrics.write(step, **{f"heldout_{name}": value for name, value in values.items()})
        self.reporter.on_evaluation(step, values)
        self._clock = time.perf_counter()  # Evaluation doesn't count as a slow step.
        loss: Any = values["loss"]
        was_pending = progress.pending_evaluation
        if loss < progress.best_loss:
            progress = Progress(loss, step, 0)
        else:
            progress = progress._replace(num_bad_evals=progress.num_bad_evals + 1, pending_evaluation=False)
        if was_pending:
            self.checkpoints.save(state, progress, replace=True)
        return progress


def _grouped(origins: list[str], most: int = 16) -> str:
    """Says where examples come from, each file once.

    Args:
        origins: Such as `support.jsonl:17`.
        most: That many are named.
    """
    lines: dict[str, list[str]] = {}
    for origin in origins[:most]:
        file, _, line = origin.rpartition(":")
        lines.setdefault(file, []).append(line)
    said = "; ".join(f"{file}:{','.join(numbers)}" if file else ", ".join(numbers) for file, numbers in lines.items())
    return said + (f" and {len(origins) - most} more" if len(origins) > most else "")
