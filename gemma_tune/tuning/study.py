"""Runs a search: takes trials one after the other, prunes what falls behind, and leaves what doesn't fit."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from gemma_tune.config import Config
from gemma_tune.errors import ConfigError, ModelError, TrainingError
from gemma_tune.settings import flatten
from gemma_tune.tuning.budget import Budget
from gemma_tune.tuning.metrics import Goal, goal_values
from gemma_tune.tuning.spaces.space import Space, apply_values
from gemma_tune.tuning.storage import open_study, optuna_module, study_lock
from gemma_tune.tuning.trials import (
    SLOT,
    attempts_by_slot,
    next_slot,
    requeue_lost_trials,
    signed_on,
    take_trial,
    waiting_trials,
)

PRUNERS = ("asha", "hyperband", "none")
PROBLEM, CONFIG, METRICS, STEPS = "problem", "config", "metrics", "num_steps"


class _Runner(Protocol):
    def run(self, config: Config, on_evaluation: Callable[[int, Mapping[str, float]], None]) -> Any:
        """Runs a trial."""


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


@dataclasses.dataclass(frozen=True)
class SearchSettings:
    """How a search runs.

    Attributes:
        budget: Number of trials, or time.
        goals: Metrics to improve; several give a Pareto front, without pruning.
        storage: URL of a database; empty: a journal file in the workdir.
        pruner: `asha` (arXiv:1810.05934), `hyperband` (arXiv:1603.06560) or `none`.
        reduction_factor: Number of trials that reach a rung for each one that goes on.
        num_random_trials: Number of trials at the start whose parameters are random, before TPE learns from them.
        num_workers: Number of workers that share the budget.
        memory_limit: Bytes that a trial may take by plan; 0: no limit.
        seed: Random seed of the suggestions.
    """

    budget: Budget
    goals: tuple[Goal, ...]
    storage: str = ""
    pruner: str = "asha"
    reduction_factor: int = 3
    num_random_trials: int = 10
    num_workers: int = 1
    memory_limit: float = 0.0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Search:
    """A search: what is searched, how, and where.

    Attributes:
        base: Config that trials start from; its workdir holds the search.
        space: Searched settings.
        settings: How the search runs.
        data_key: Key of the data's content.
        planned_bytes: Function from a Config to the bytes that it takes by plan; None: unknown.
    """

    base: Config
    space: Space
    settings: SearchSettings
    data_key: str = ""
    planned_bytes: Callable[[Config], float] | None = None

    @property
    def workdir(self) -> Path:
        """Returns the folder of the search."""
        return Path(self.base.workdir).expanduser()

    def fingerprint(self) -> dict[str, Any]:
        """Returns what must stay the same for trials to be comparable, by name."""
        settings = flatten(self.base.to_dict())
        del settings["workdir"]
        goals = [goal.name for goal in self.settings.goals]
        return {**settings, "data content": self.data_key, "metrics": goals, "space": self.space.to_dict()}

    def open(self) -> Any:
        """Opens the Optuna study, or makes it; raises what `open_study` does."""
        with study_lock(self.workdir):
            directions = [goal.direction for goal in self.settings.goals]
            study = open_study(self.workdir, self.settings.storage, directions, self.fingerprint())
        study.pruner = self._pruner()
        return study

    def config_of(self, params: Mapping[str, Any], slot: int) -> Config:
        """Returns the Config of a trial."""
        config = apply_values(self.space, self.base, params)
        return config.replace({"workdir": str(self.workdir / "trials" / str(slot))})

    def sampler(self, slot: int) -> Any:
        """Returns the sampler of a slot: TPE (arXiv:2304.11127) over groups of settings that occur together."""
        settings, optuna = self.settings, optuna_module()
        return optuna.samplers.TPESampler(
            n_startup_trials=settings.num_random_trials,
            multivariate=True,
            group=True,
            seed=(settings.seed * 1_000_003 + slot) % 2**32,
        )

    def _pruner(self) -> Any:
        settings, pruners = self.settings, optuna_module().pruners
        rung = max(1, self.base.training.eval_every_steps)
        if settings.pruner == "asha":
            return pruners.SuccessiveHalvingPruner(min_resource=rung, reduction_factor=settings.reduction_factor)
        if settings.pruner == "hyperband":
            return pruners.HyperbandPruner(min_resource=rung, reduction_factor=settings.reduction_factor)
        return pruners.NopPruner()


def run_search(search: Search, runner: _Runner, on_event: Callable[[TrialEvent], None] = lambda event: None) -> Any:
    """Runs trials until the budget is spent, and returns the Optuna study. A search that was stopped goes on.

    Args:
        search: What is searched, how, and where.
        runner: Object whose `run(config, on_evaluation)` trains and returns a result with `metrics`, `num_steps` and
            `seconds`.
        on_event: Called when something happens to a trial.

    Raises:
        ConfigError: The space contains settings that are not allowed.
        TrainingError: The workdir holds a search of something else.
    """
    search.space.check(search.base)
    study = search.open()
    with signed_on(search.workdir) as worker:
        while (trial := _next_trial(search, study, worker)) is not None:
            _run_trial(search, study, trial, runner, on_event)
    return study


def spent_seconds(study: Any) -> float:
    """Returns the time that all finished trials have taken together."""
    times = [trial.duration.total_seconds() for trial in study.get_trials(deepcopy=False) if trial.duration]
    return float(sum(times))


def _next_trial(search: Search, study: Any, worker: str) -> Any:
    """Returns the next trial, with all its parameters; None: the budget is spent."""
    budget = search.settings.budget
    with study_lock(search.workdir):
        requeue_lost_trials(study, search.workdir)
        if budget.num_trials and not waiting_trials(study) and next_slot(study) >= budget.num_trials:
            return None
        if budget.seconds and spent_seconds(study) >= budget.seconds * search.settings.num_workers:
            return None
        return take_trial(study, search.space, search.base, worker, search.sampler)


def _run_trial(search: Search, study: Any, trial: Any, runner: _Runner, on_event: Callable[[TrialEvent], None]) -> None:
    """Runs a trial and tells the study how it ended."""
    optuna, goals, slot = optuna_module(), search.settings.goals, trial.user_attrs[SLOT]
    pruned = optuna.trial.TrialState.PRUNED
    last: tuple[int, float | None] = (0, None)

    def report(state: str, step: int, value: float | None) -> None:
        on_event(TrialEvent(slot, trial.params, step, value, state))

    def on_evaluation(step: int, metrics: Mapping[str, float]) -> None:
        nonlocal last
        value = metrics.get(goals[0].key)
        last = (step, value)
        report("running", step, value)
        # The evaluation before the first step says nothing about the settings.
        if step and value is not None and len(goals) == 1 and goals[0].is_known_early:
            trial.report(value, step)
            trial.set_user_attr(STEPS, step)
            if trial.should_prune():
                raise optuna.TrialPruned

    report("running", 0, None)
    try:
        config = search.config_of(trial.params, slot)
        trial.set_user_attr(CONFIG, config.to_dict())
        memory = search.planned_bytes(config) if search.planned_bytes else 0.0
        if _is_too_large(search, trial, memory):
            study.tell(trial, state=pruned)
            return report("too large", 0, None)
        started = time.monotonic()
        result = runner.run(config, on_evaluation)
        metrics = {"seconds": time.monotonic() - started, "memory_bytes": memory, **result.metrics}
        metrics["num_steps"] = result.num_steps
        values = goal_values(goals, metrics)
    except optuna.TrialPruned:
        study.tell(trial, state=pruned)
        return report("pruned", *last)
    except (ModelError, TrainingError, FloatingPointError) as error:
        _tell_failed(study, trial, str(error))
        return report("failed", *last)
    if any(value != value for value in values):  # Not a number: training has diverged.
        _tell_failed(study, trial, "The metric is not a number.")
        return report("failed", *last)
    trial.set_user_attr(METRICS, {name: float(value) for name, value in metrics.items() if _is_number(value)})
    trial.set_user_attr(STEPS, result.num_steps)
    study.tell(trial, values)
    return report("done", result.num_steps, values[0])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_too_large(search: Search, trial: Any, memory: float) -> bool:
    """Tells the study by how much a trial exceeds the memory, so that TPE avoids its like; returns whether it does."""
    limit = search.settings.memory_limit
    if not limit or not search.planned_bytes:
        return False
    trial.set_constraint("memory over the limit", memory / limit - 1)
    if memory <= limit:
        return False
    trial.set_user_attr(PROBLEM, f"It would take {memory / 1e9:.2f} GB by plan, and {limit / 1e9:.2f} GB are allowed.")
    return True


def _tell_failed(study: Any, trial: Any, reason: str) -> None:
    """Ends a trial that can't be finished. As an infeasible one, TPE learns from it; a failed one it would ignore."""
    trial.set_user_attr(PROBLEM, reason)
    trial.set_constraint("failed", 1.0)
    study.tell(trial, state=optuna_module().trial.TrialState.PRUNED)


def best_trials(study: Any) -> list[Any]:
    """Returns the best trial, or the Pareto front of several metrics, by number of the first metric.

    Raises:
        TrainingError: No trial was finished; says why.
    """
    states = optuna_module().trial.TrialState
    finished = [trial for trial in attempts_by_slot(study).values() if trial.state == states.COMPLETE]
    if not finished:
        problems = [t.user_attrs[PROBLEM] for t in attempts_by_slot(study).values() if PROBLEM in t.user_attrs]
        raise TrainingError(f"No trial was finished. {problems[0] if problems else 'Give the search a larger budget.'}")
    if len(study.directions) > 1:
        return sorted(study.best_trials, key=lambda trial: trial.values[0])
    sign = 1 if study.direction.name == "MINIMIZE" else -1
    return [min(finished, key=lambda trial: (sign * trial.value, trial.user_attrs[SLOT]))]


def check_choice(pruner: str) -> None:
    """Checks the name of a pruner.

    Raises:
        ConfigError: There is no such pruner.
    """
    if pruner not in PRUNERS:
        raise ConfigError(f"pruner must be one of {', '.join(PRUNERS)}, got {pruner!r}.")
