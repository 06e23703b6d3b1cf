"""Runs one trial: tells the study how it goes and how it ended, and keeps what a killed trial goes on from."""

import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gemma_tune.config import Config
from gemma_tune.errors import ModelError, TrainingError
from gemma_tune.runtime.interrupts import Interrupted
from gemma_tune.tuning.metrics import goal_values
from gemma_tune.tuning.runner.trial_state import TrialState, load_state, save_state
from gemma_tune.tuning.search import Search
from gemma_tune.tuning.storage import optuna_module
from gemma_tune.tuning.trials import SLOT, previous_values

PROBLEM, ENDED_AS, METRICS, STEPS, BEST_STEP, SECONDS = (
    "problem", "ended as", "metrics", "num_steps", "best_step", "seconds",
)  # fmt: skip
TOO_LARGE, FAILED = "too large", "failed"
_STATE = "state.npz"


class TrialEvent(NamedTuple):
    """Something that happened to a trial.

    Attributes:
        slot: Number of the trial.
        params: Values of the searched settings by path.
        step: Step of training; 0 at the start.
        value: Value of the first metric; None: not known yet.
        state: `running`, `done`, `pruned`, `too large`, `failed`.
    """

    slot: int
    params: Mapping[str, Any]
    step: int
    value: float | None
    state: str


class TrialRun:
    """A trial from its start to its end.

    Args:
        search: What is searched, how, and where.
        study: Optuna study.
        trial: Optuna trial with all its parameters.
        on_event: Called when something happens to it.

    Attributes:
        slot: Number of the trial.
        config: Its settings.
        start: State that it goes on from; None: the beginning.
    """

    def __init__(self, search: Search, study: Any, trial: Any, on_event: Callable[[TrialEvent], None]):
        self._search, self._study, self._trial, self._on_event = search, study, trial, on_event
        self.slot: int = trial.user_attrs[SLOT]
        self.config: Config = search.config_of(trial.params, self.slot)
        self.start: TrialState | None = None
        self._last: tuple[int, float | None] = (0, None)
        self._memory, self._seconds_before, self._began = 0.0, 0.0, time.monotonic()

    def begin(self) -> bool:
        """Starts the trial, and returns whether it can be trained: not if it takes too much memory."""
        self._tell("running")
        self._memory = self._search.planned_bytes(self.config) if self._search.planned_bytes else 0.0
        if self._is_too_large():
            self._study.tell(self._trial, state=optuna_module().trial.TrialState.PRUNED)
            self._end(TOO_LARGE)
            return False
        state = load_state(self._state_file)
        if state is not None:
            self._seconds_before = state.metrics.pop(SECONDS, 0.0)
            self.start = state
            for step, value in previous_values(self._study, self._trial).items():
                if step <= state.step:
                    self._trial.report(value, step)
                    self._last = (step, value)
        self._began = time.monotonic()
        return True

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes held-out metrics.

        Raises:
            optuna.TrialPruned: The trial falls behind.
        """
        goal = self._search.settings.goals[0]
        value = metrics.get(goal.key)
        self._last = (step, value)
        self._tell("running")
        # The evaluation before the first step says nothing about the settings.
        if step and value is not None and self._search.settings.prunes:
            self._trial.report(value, step)
            self._trial.set_user_attr(STEPS, step)
            if self._trial.should_prune():
                raise optuna_module().TrialPruned

    def keep(self, state: TrialState) -> None:
        """Keeps a state to go on from. On a full disk there is none: the trial would begin again."""
        seconds = self._seconds_before + time.monotonic() - self._began
        try:
            save_state(self._state_file, state._replace(metrics={**state.metrics, SECONDS: seconds}))
        except OSError:
            self._state_file.unlink(missing_ok=True)

    def finish(self, result: Any, save_adapter: Callable[[Path], object] | None = None) -> None:
        """Takes the result of the training: an object with `metrics`, `num_steps`, `best_step` and
        `model_bytes`.

        Args:
            result: The result.
            save_adapter: Saves the trained adapter into a folder; None: it can't be saved.
        """
        seconds = self._seconds_before + time.monotonic() - self._began
        metrics = {
            **result.metrics,
            SECONDS: seconds,
            "memory_bytes": self._memory,
            "model_bytes": result.model_bytes,
            STEPS: result.num_steps,
        }
        values = goal_values(self._search.settings.goals, metrics)
        if any(value != value for value in values):  # Not a number: training has diverged.
            return self.fail(TrainingError("The metric is not a number."))
        self._last = (result.num_steps, values[0])
        self._trial.set_user_attr(METRICS, {key: float(each) for key, each in metrics.items() if _is_number(each)})
        self._trial.set_user_attr(STEPS, result.num_steps)
        self._trial.set_user_attr(BEST_STEP, result.best_step)
        if save_adapter is not None:
            save_adapter(self._search.trial_folder(self.slot))
        self._study.tell(self._trial, values)
        return self._end("done")

    def fail(self, error: Exception) -> None:
        """Takes what ended the training early; raises it again if it isn't about this trial alone."""
        optuna = optuna_module()
        pruned = optuna.trial.TrialState.PRUNED
        if isinstance(error, optuna.TrialPruned):
            self._study.tell(self._trial, state=pruned)
            return self._end("pruned")
        if isinstance(error, Interrupted) or not isinstance(error, (ModelError, TrainingError, FloatingPointError)):
            raise error
        # As an infeasible trial, TPE learns from it; a failed one it would ignore.
        self._trial.set_user_attr(PROBLEM, str(error))
        self._trial.set_user_attr(ENDED_AS, FAILED)
        self._trial.set_constraint("failed", 1.0)
        self._study.tell(self._trial, state=pruned)
        return self._end(FAILED)

    def _is_too_large(self) -> bool:
        """Tells the study by how much the trial exceeds the memory, so that TPE avoids its like."""
        limit = self._search.settings.memory_limit
        if not limit or not self._search.planned_bytes:
            return False
        self._trial.set_constraint("memory over the limit", self._memory / limit - 1)
        if self._memory <= limit:
            return False
        needed = f"{self._memory / 1e9:.2f} GB by plan, and {limit / 1e9:.2f} GB are allowed"
        self._trial.set_user_attr(PROBLEM, f"It would take {needed}.")
        self._trial.set_user_attr(ENDED_AS, TOO_LARGE)
        return True

    @property
    def _state_file(self) -> Path:
        return self._search.trial_folder(self.slot) / _STATE

    def _end(self, state: str) -> None:
        self._state_file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._state_file.parent.rmdir()  # Unless it holds an adapter.
        self._tell(state)

    def _tell(self, state: str) -> None:
        self._on_event(TrialEvent(self.slot, self._trial.params, *self._last, state))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
