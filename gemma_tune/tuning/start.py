"""Puts a search together from a Config, a space and a budget, and runs it."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gemma_tune.config import Config
from gemma_tune.config_checks import HELDOUT_FIGURES
from gemma_tune.errors import ConfigError
from gemma_tune.tuning.budget import parse_budget
from gemma_tune.tuning.memory import planned_bytes, planned_side_by_side
from gemma_tune.tuning.metrics import parse_goals, with_goals
from gemma_tune.tuning.results.live_table import LiveTable
from gemma_tune.tuning.results.result_files import best_config, write_results
from gemma_tune.tuning.results.retrain import on_all_data
from gemma_tune.tuning.search import Search, SearchSettings, check_pruner
from gemma_tune.tuning.spaces.default_spaces import default_space
from gemma_tune.tuning.spaces.read_space import parse_space, read_space
from gemma_tune.tuning.spaces.space import Space
from gemma_tune.tuning.storage import optuna_module
from gemma_tune.tuning.study import Runner, best_trials, run_search
from gemma_tune.tuning.trial_run import BEST_STEP, TrialEvent

_DROPOUT = "lora.dropout"
_ONE_AFTER_THE_OTHER = {"training.eval_metrics", "training.best_by", "training.mesh"}


def tune(
    config: Config,
    space: Space | Mapping[str, Any] | str | Path | None = None,
    *,
    budget: str = "20_trials",
    metric: str = "heldout_loss",
    pruner: str = "asha",
    storage: str = "",
    side_by_side: int = 0,
    runner: Runner | None = None,
) -> Any:
    """Searches for better settings, and returns the Optuna study.

    A search that was stopped goes on when it is started again with the same arguments. Several processes that are
    started with the same arguments share the work. The workdir then holds the best settings (`best.py`), all trials
    (`trials.csv`), a report (`report.html`), and the adapters of finished trials (`trials/NUMBER`).

    Args:
        config: Settings to start from. `workdir` holds the search.
        space: Searched settings: a mapping as in space.yaml, the path of such a file, or None for the default space of
            the method.
        budget: Number of trials (`30_trials`) or time (`2h`).
        metric: Metric to improve: `heldout_loss`, `token_accuracy`, a metric of answers such as `f1`. Several with
            commas between, such as `heldout_loss,model_size`, give a Pareto front.
        pruner: What ends trials that fall behind: `asha`, `hyperband` or `none`.
        storage: URL of a database; empty: a journal file in the workdir.
        side_by_side: Number of trials that are trained at once on one base model; 0: 1 on a CPU, else what fits.
        runner: What trains the trials; None: this process.

    Raises:
        ConfigError, DataError, ModelError, TrainingError: The message says what is wrong and what to do.
    """
    search = make_search(
        config, space, budget=budget, metric=metric, storage=storage, pruner=pruner, side_by_side=side_by_side
    )
    study = start_search(search, runner)
    write_results(search, study)
    return study


def make_search(
    config: Config,
    space: Space | Mapping[str, Any] | str | Path | None = None,
    *,
    budget: str,
    metric: str,
    storage: str = "",
    pruner: str = "asha",
    side_by_side: int = 0,
    num_workers: int = 1,
    memory_limit: float = 0.0,
    flags: Mapping[str, str] | None = None,
) -> Search:
    """Returns a checked search, before anything is loaded. Arguments are those of `tune`, and:

    Args:
        config: Settings to start from.
        space: Searched settings.
        budget: Number of trials or time.
        metric: Metrics to improve.
        storage: URL of a database.
        pruner: Name of the pruner.
        side_by_side: Number of trials at once.
        num_workers: Number of workers that share the budget.
        memory_limit: Bytes that a trial may take; 0: the memory of the device.
        flags: Path of a setting by the name of its flag, for spaces that name flags.

    Raises:
        ConfigError: An argument is wrong, or the space contains settings that are not allowed.
    """
    optuna_module()
    check_pruner(pruner)
    if num_workers < 1 or side_by_side < 0:
        raise ConfigError(
            f"A search needs at least one worker, and no negative number of trials side by side, got {num_workers} and "
            f"{side_by_side}."
        )
    goals = parse_goals(metric)
    config = with_goals(config, goals)
    settings = SearchSettings(
        budget=parse_budget(budget),
        goals=goals,
        storage=storage,
        pruner=pruner,
        num_workers=num_workers,
        num_side_by_side=side_by_side,
        memory_limit=memory_limit,
        seed=config.seed,
    )
    search = Search(config, _space_of(space, config, flags or {}).including(config), settings)
    if (search.workdir / "config.json").exists():
        raise ConfigError(f"{search.workdir} holds a training run. Choose another --workdir for the search.")
    search.space.check(config)
    if side_by_side > 1 and _runs_alone(search):
        raise ConfigError(
            "Trials on a mesh, and trials whose answers are judged, can't be trained side by side. Leave "
            "--side_by_side out."
        )
    return search


def _space_of(space: Space | Mapping[str, Any] | str | Path | None, config: Config, flags: Mapping[str, str]) -> Space:
    """Returns the space that a file or a mapping describes, or the default one of the config's method."""
    if isinstance(space, Space):
        return space
    if space is None:
        return default_space(config)
    if isinstance(space, (str, Path)):
        return read_space(Path(space).expanduser(), flags)
    return parse_space(space, flags)


def start_search(
    search: Search,
    runner: Runner | None = None,
    show: Callable[[Search, Any], Any] = LiveTable,
) -> Any:
    """Reads the data, loads the model once, runs the search's trials, and returns the Optuna study.

    Args:
        search: From `make_search`.
        runner: What trains the trials; None: training on the config's data.
        show: Function from the search and its study to a context manager that gives a function of each `TrialEvent`.
    """
    if runner is None:
        search, runner = prepare(search)
    else:
        search = _with_settings(search, num_side_by_side=max(1, search.settings.num_side_by_side))
    with show(search, search.open()) as on_event:
        return run_search(search, runner, on_event)


def with_data(search: Search) -> Search:
    """Reads the data, and returns the search with the key that names its content: it isn't continued on other data."""
    from gemma_tune.pipeline import read_splits

    return dataclasses.replace(search, data_key=read_splits(search.base).content_key)


def prepare(search: Search, opens_study: bool = True, runner: Any = None) -> tuple[Search, Any]:
    """Reads the data and loads the model, and returns the search with all that follows from them, and its runner.

    Args:
        search: From `make_search`.
        opens_study: Whether the study is opened, or made, so that another search in the workdir is refused before the
            model is loaded.
        runner: Runner of another search on the same data, whose programs serve this one too.
    """
    from gemma_tune.runtime.device_memory import available_device_bytes
    from gemma_tune.tuning.runner.trial_runner import TrialRunner

    search = dataclasses.replace(with_data(search), planned_bytes=planned_bytes)
    if not search.settings.memory_limit:
        search = _with_settings(search, memory_limit=available_device_bytes() / search.settings.num_workers)
    if opens_study:
        search.open()
    has_dropout = any(setting.path == _DROPOUT for setting in search.space.settings)
    runner = runner or TrialRunner(search.base, has_dropout)
    search = search.evaluated_for(runner.num_steps(search.base))
    wanted, limit = search.settings.num_side_by_side, search.settings.memory_limit
    num = 1 if _runs_alone(search) else wanted or planned_side_by_side(search.base, limit)
    return _with_settings(search, num_side_by_side=num), runner


def retraining_config(search: Search, study: Any) -> Config:
    """Returns the settings of the best trial, to train with on all data.

    Raises:
        TrainingError: No trial was finished.
        ConfigError: Training and held-out data can't be joined.
    """
    from gemma_tune.pipeline import read_splits

    splits, best = read_splits(search.base), best_trials(study)[0]
    config = best_config(search, best)
    return on_all_data(config, best.user_attrs[BEST_STEP], len(splits.train), len(splits.heldout))


def _runs_alone(search: Search) -> bool:
    """Returns whether one trial is trained at a time, as where answers are generated or a mesh is used."""
    base, searched = search.base, {setting.path for setting in search.space.settings}
    answers = base.training.eval_metrics or base.training.best_by not in HELDOUT_FIGURES
    return bool(base.training.mesh or answers or searched & _ONE_AFTER_THE_OTHER)


def _with_settings(search: Search, **changes: Any) -> Search:
    return dataclasses.replace(search, settings=dataclasses.replace(search.settings, **changes))


@contextmanager
def silently(search: Search, study: Any) -> Iterator[Callable[[TrialEvent], None]]:
    """Shows nothing of a search: what `start_search` takes in a worker, whose trials another process shows."""
    yield lambda event: None
