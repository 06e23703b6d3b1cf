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
from gemma_tune.training.batches import TrainingBatches
from gemma_tune.training.checkpoints import Checkpoints, Progress
from gemma_tune.training.interrupts import Interrupted, Interrupts
from gemma_tune.training.loss_scale import LossScale
from gemma_tune.training.metrics import MetricsWriter
from gemma_tune.training.prefetch import Prefetch
from gemma_tune.training.step import StepMetrics, TrainState, TrainStep

_FLOAT16_OVERFLOWS = (
    "float16 ends at 65504, and this model computes larger values. Take --precision=mixed_bfloat16 or float32, with "
    "another --workdir."
)


class Reporter(Protocol):
    """Shows a run's progress."""

    def on_step(self, step: int, num_steps: int, values: dict[str, float]) -> None: ...

    def on_evaluation(self, step: int, values: dict[str, float]) -> None: ...


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """Intervals, as in `config.TrainingConfig`."""

    eval_every_steps: int
    checkpoint_every_steps: int
    early_stopping_patience: int
    log_every_steps: int


@dataclasses.dataclass
class Loop:
    """Runs a training run from its state to its end.

    Attributes:
        train_step: From `make_train_step`.
        frozen: The weights that stay.
        batches: By step.
        evaluate: trainable -> held-out values, with `loss` among them; None when nothing is held out.
        schedule: step -> learning rate, for the log.
    """

    train_step: TrainStep
    frozen: Params
    batches: TrainingBatches
    evaluate: Callable[[Params], dict[str, float]] | None
    schedule: optax.Schedule
    settings: LoopSettings
    checkpoints: Checkpoints
    metrics: MetricsWriter
    reporter: Reporter

    def run(self, state: TrainState, progress: Progress) -> tuple[TrainState, Progress]:
        """Trains from `state.step` to the last step.

        Returns:
            The last state, and the progress, which knows the best step.

        Raises:
            TrainingError: The loss is no number any more, or no loss scale is small enough for float16; names the step
                and the last good checkpoint.
            Interrupted: Ctrl-C or SIGTERM; a checkpoint was saved.
        """
        step, num_steps = int(state.step), len(self.batches)
        if step == 0 and self.evaluate:
            progress, _ = self._evaluate(state, progress)
        self._clock = time.perf_counter()
        with Interrupts() as interrupts, Prefetch(self.batches, step) as batches:
            while step < num_steps and not self._is_exhausted(progress):
                state, values = self.train_step(state, self.frozen, batches.next())
                step += 1
                self._log(step, values, state.loss_scale, batches.wait_seconds)
                is_last = step == num_steps
                if self._is_due(step, self.settings.eval_every_steps) or is_last:
                    progress, heldout_loss = self._evaluate(state, progress)
                    if progress.best_step == step:
                        self.checkpoints.save(state, progress, heldout_loss)
                if self._is_due(step, self.settings.checkpoint_every_steps) or is_last or self._is_exhausted(progress):
                    self.checkpoints.save(state, progress)
                if interrupts.received and not is_last:
                    self.checkpoints.save(state, progress)
                    raise Interrupted(
                        f"Stopped at step {step} of {num_steps}, and saved. Run the same command again to go on.",
                        interrupts.received,
                    )
        return state, progress

    def _is_exhausted(self, progress: Progress) -> bool:
        patience = self.settings.early_stopping_patience
        return bool(patience) and progress.num_bad_evals >= patience

    @staticmethod
    def _is_due(step: int, every: int) -> bool:
        return bool(every) and step % every == 0

    def _log(self, step: int, metrics: StepMetrics, loss_scale: LossScale | None, wait_seconds: float) -> None:
        loss = float(jax.device_get(metrics.loss))  # Waits for the step.
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        grad_norm = float(metrics.grad_norm)
        self._check(step, loss, grad_norm, loss_scale)
        num_skipped = int(loss_scale.num_skipped) if loss_scale else 0
        values = {
            "loss": loss,
            "learning_rate": float(self.schedule(max(step - 1 - num_skipped, 0))),  # Skipped steps don't count there.
            **({"grad_norm": grad_norm} if math.isfinite(grad_norm) else {}),
            **({"loss_scale": float(loss_scale.scale), "num_skipped_steps": num_skipped} if loss_scale else {}),
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

    def _check(self, step: int, loss: float, grad_norm: float, loss_scale: LossScale | None) -> None:
        """Raises TrainingError when a step is neither good nor one that loss scaling has skipped."""
        if math.isfinite(loss) and (math.isfinite(grad_norm) or (loss_scale and float(loss_scale.scale) >= 1)):
            return
        saved = self.checkpoints.steps
        last = f"The checkpoint of step {saved[-1]} is good" if saved else "No checkpoint had been written yet"
        what = f"the loss is {loss} and the gradient's norm {grad_norm}"
        advice = (
            "Try a lower --learning_rate, a longer optimizer.warmup_steps, or --precision=float32, with another "
            "--workdir."
        )
        if loss_scale:
            what += f", at a loss scale of {float(loss_scale.scale):g}"
            advice = _FLOAT16_OVERFLOWS
        raise TrainingError(f"Step {step}: {what}. {last}; nothing of this step was saved. {advice}")

    def _evaluate(self, state: TrainState, progress: Progress) -> tuple[Progress, float]:
        if self.evaluate is None:
            return progress, math.inf
        step = int(state.step)
        values = self.evaluate(state.trainable)
        if state.loss_scale and not math.isfinite(values["loss"]):
            raise TrainingError(f"The held-out loss at step {step} is {values['loss']}. {_FLOAT16_OVERFLOWS}")
        self.metrics.write(step, **{f"heldout_{name}": value for name, value in values.items()})
        self.reporter.on_evaluation(step, values)
        self._clock = time.perf_counter()  # Evaluation doesn't count as a slow step.
        loss: Any = values["loss"]
        if loss < progress.best_loss:
            return Progress(loss, step, 0), loss
        return progress._replace(num_bad_evals=progress.num_bad_evals + 1), loss
