"""Runs the trials of a search until its budget is spent."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from gemma_tune.errors import TrainingError
from gemma_tune.tuning.search import Search
from gemma_tune.tuning.storage import optuna_module, study_lock
from gemma_tune.tuning.trial_run import PROBLEM, TrialEvent, TrialRun
from gemma_tune.tuning.trials import (
    SLOT,
    attempts_by_slot,
    next_slot,
    requeue_lost_trials,
    signed_on,
    take_trial,
    waiting_trials,
)


class Runner(Protocol):
    """What trains trials: `tuning.runner.trial_runner.TrialRunner`, or another object with its methods."""

    def run(self, config: Any, on_evaluation: Any, *, start: Any, on_checkpoint: Any) -> Any:
        """Runs a trial and returns its `metrics`, `num_steps` and `best_step`."""

    def run_many(self, configs: Any, on_evaluations: Any) -> list[Any]:
        """Runs trials, side by side where they share a program, and returns the result or the exception of each."""

    def save_last_adapter(self, folder: Path) -> Any:
        """Saves the adapter of the trial that `run` ended last."""


def run_search(search: Search, runner: Runner, on_event: Callable[[TrialEvent], None] = lambda event: None) -> Any:
    """Runs trials until the budget is spent, and returns the Optuna study. A search that was stopped goes on.

    Args:
        search: What is searched, how, and where.
        runner: Trains the trials.
        on_event: Called when something happens to a trial.

    Raises:
        ConfigError: The space contains settings that are not allowed.
        TrainingError: The workdir holds a search of something else.
    """
    search.space.check(search.base)
    study = search.open()
    with signed_on(search.workdir) as worker:
        while trials := _next_trials(search, study, worker):
            runs = [TrialRun(search, study, trial, on_event) for trial in trials]
            runs = [run for run in runs if run.begin()]
            if len(runs) == 1:
                _run_one(runs[0], runner)
            elif runs:
                _run_side_by_side(runs, runner)
    return study


def _run_one(run: TrialRun, runner: Runner) -> None:
    try:
        result = runner.run(run.config, run.on_evaluation, start=run.start, on_checkpoint=run.keep)
    except Exception as error:
        run.fail(error)
        return
    run.finish(result, runner.save_last_adapter if run.config.training.method != "full" else None)


def _run_side_by_side(runs: list[TrialRun], runner: Runner) -> None:
    results = runner.run_many([run.config for run in runs], [run.on_evaluation for run in runs])
    for run, result in zip(runs, results, strict=True):
        if isinstance(result, Exception):
            run.fail(result)
        else:
            run.finish(result)


def spent_seconds(study: Any) -> float:
    """Returns the time that all finished trials have taken together."""
    times = [trial.duration.total_seconds() for trial in study.get_trials(deepcopy=False) if trial.duration]
    return float(sum(times))


def is_spent(search: Search, study: Any) -> bool:
    """Returns whether the budget allows no further trial."""
    budget = search.settings.budget
    if budget.num_trials and not waiting_trials(study) and next_slot(study) >= budget.num_trials:
        return True
    return bool(budget.seconds and spent_seconds(study) >= budget.seconds * search.settings.num_at_once)


def _next_trials(search: Search, study: Any, worker: str) -> list[Any]:
    """Returns the next trials, with all their parameters; none: the budget is spent."""
    trials: list[Any] = []
    with study_lock(search.workdir):
        requeue_lost_trials(study, search.workdir)
        while len(trials) < search.settings.num_side_by_side and not is_spent(search, study):
            trials.append(take_trial(study, search.space, search.base, worker, search.sampler))
    return trials


def best_trials(study: Any) -> list[Any]:
    """Returns the best trial, or the Pareto front of several metrics, by number of the first metric.

    Raises:
        TrainingError: No trial was finished; says why.
    """
    if best := best_so_far(study):
        return best
    problems = [trial.user_attrs[PROBLEM] for trial in attempts_by_slot(study).values() if PROBLEM in trial.user_attrs]
    raise TrainingError(f"No trial was finished. {problems[0] if problems else 'Give the search a larger budget.'}")


def best_so_far(study: Any) -> list[Any]:
    """Returns what `best_trials` does; nothing while no trial is finished."""
    states = optuna_module().trial.TrialState
    finished = [trial for trial in attempts_by_slot(study).values() if trial.state == states.COMPLETE]
    if not finished:
        return []
    if len(study.directions) > 1:
        return sorted(study.best_trials, key=lambda trial: trial.values[0])
    sign = 1 if study.direction.name == "MINIMIZE" else -1
    return [min(finished, key=lambda trial: (sign * trial.value, trial.user_attrs[SLOT]))]
