"""Shows a search while it runs: a table that changes on a terminal or in a notebook, lines elsewhere."""

import time
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gemma_tune.runtime import progress
from gemma_tune.tuning.results.result_files import state_of
from gemma_tune.tuning.search import Search
from gemma_tune.tuning.spaces.space import base_values, short
from gemma_tune.tuning.study import best_so_far, spent_seconds
from gemma_tune.tuning.trial_run import FAILED, STEPS, TOO_LARGE, TrialEvent
from gemma_tune.tuning.trials import SLOT, attempts_by_slot

_MOST_ROWS = 15
_STYLES = {
    "done": "green",
    "running": "bold",
    "pruned": "dim",
    "waiting": "dim",
    TOO_LARGE: "yellow",
    FAILED: "red",
}
_OVER = ("done", "pruned", TOO_LARGE, FAILED)


class LiveTable:
    """A context manager that shows the trials of a search: number, settings, metric, rung and state, and the time left.

    Args:
        search: What is searched.
        study: Its Optuna study.
    """

    def __init__(self, search: Search, study: Any):
        self._search, self._study = search, study
        self._base = base_values(search.base)
        self._is_live = progress.console.is_terminal or progress.console.is_jupyter
        self._start, self._num_over, self._num_over_before, self._caption = time.monotonic(), 0, 0, ""
        self._shown: set[int] = set()
        self._table: Table | None = None
        self._live: Live | None = None

    def __enter__(self) -> "LiveTable":
        self._shown = {slot for slot, trial in attempts_by_slot(self._study).items() if state_of(trial) in _OVER}
        self._num_over_before = len(self._shown)
        if self._is_live:
            self.update()
            self._live = Live(get_renderable=self._render, console=progress.console, refresh_per_second=2)
            self._live.start()
        elif self._shown:
            progress.console.print(f"The search goes on after {len(self._shown)} trials.")
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self.update()
            self._live.stop()
            self._live = None

    def __call__(self, event: TrialEvent) -> None:
        """Takes what happened to a trial of this process."""
        self.update()

    def update(self) -> None:
        """Reads the study."""
        trials = attempts_by_slot(self._study)
        self._num_over = sum(state_of(trial) in _OVER for trial in trials.values())
        if self._is_live:
            self._table, self._caption = self._make_table(trials), f"Best so far: {self._best()}."
        else:
            self._print_ended(trials)

    def _print_ended(self, trials: Mapping[int, Any]) -> None:
        for slot, trial in trials.items():
            if slot not in self._shown and (state := state_of(trial)) in _OVER:
                self._shown.add(slot)
                step, value = last_value(trial)
                progress.console.print(
                    f"trial {slot}: {state}, {self._goal} {_number(value)} at step {step}, {self._settings(trial)}. "
                    f"Best so far: {self._best()}. {self._times()}",
                    markup=False,
                    soft_wrap=True,
                )

    def _make_table(self, trials: Mapping[int, Any]) -> Table:
        table = Table(box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left")
        for heading in ("trial", "state", "step", self._goal):
            table.add_column(heading, justify="right" if heading != "state" else "left", no_wrap=True, min_width=5)
        table.add_column("settings", ratio=1)
        rows = list(trials.items())
        best = self._best_slot()
        kept = [(slot, trial) for slot, trial in rows[:-_MOST_ROWS] if slot == best] + rows[-_MOST_ROWS:]
        for slot, trial in kept:
            state = state_of(trial)
            step, value = last_value(trial)
            table.add_row(
                f"★ {slot}" if slot == best else str(slot), state, str(step), _number(value), self._settings(trial),
                style=_STYLES.get(state, ""),
            )  # fmt: skip
        if len(rows) > len(kept):
            table.title = f"The last {_MOST_ROWS} of {len(rows)} trials"
        return table

    def _render(self) -> Group:
        assert self._table is not None
        return Group(self._table, Text(f"{self._caption} {self._times()}"))

    @property
    def _goal(self) -> str:
        return self._search.settings.goals[0].name

    def _settings(self, trial: Any) -> str:
        """Returns what the trial's settings have that the base config has not."""
        changed = {path: value for path, value in trial.params.items() if value != self._base[path]}
        text = ", ".join(f"{path.partition('.')[2] or path}={short(value)}" for path, value in changed.items())
        return text or "as given"

    def _best_slot(self) -> int | None:
        best = best_so_far(self._study)
        return best[0].user_attrs[SLOT] if len(best) == 1 and not self._is_front else None

    def _best(self) -> str:
        best = best_so_far(self._study)
        if self._is_front:
            return f"{len(best)} trials on the Pareto front"
        return f"trial {best[0].user_attrs[SLOT]}, {self._goal} {_number(best[0].values[0])}" if best else "none"

    @property
    def _is_front(self) -> bool:
        return len(self._search.settings.goals) > 1

    def _times(self) -> str:
        elapsed = time.monotonic() - self._start
        left = self._seconds_left(elapsed)
        return f"{_clock(elapsed)} elapsed" + (f", about {_clock(left)} left." if left is not None else ".")

    def _seconds_left(self, elapsed: float) -> float | None:
        budget = self._search.settings.budget
        if budget.seconds:
            return max(0.0, budget.seconds - spent_seconds(self._study) / self._search.settings.num_at_once)
        num_ended = self._num_over - self._num_over_before
        return elapsed / num_ended * max(0, budget.num_trials - self._num_over) if num_ended else None


def last_value(trial: Any) -> tuple[int, float | None]:
    """Returns the step that a trial has reached, and the first metric there; None: not known yet."""
    if trial.values and trial.state.name == "COMPLETE":
        return trial.user_attrs.get(STEPS, 0), trial.values[0]
    if not trial.intermediate_values:
        return 0, None
    step = max(trial.intermediate_values)
    return step, trial.intermediate_values[step]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.5g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
