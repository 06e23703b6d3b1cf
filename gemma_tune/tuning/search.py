"""Puts a search together from a Config, a space and a budget."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gemma_tune.config import Config
from gemma_tune.errors import ConfigError
from gemma_tune.tuning.budget import parse_budget
from gemma_tune.tuning.memory import planned_bytes
from gemma_tune.tuning.metrics import parse_goals
from gemma_tune.tuning.results import write_results
from gemma_tune.tuning.spaces.default_spaces import default_space
from gemma_tune.tuning.spaces.read_space import parse_space, read_space
from gemma_tune.tuning.spaces.space import Space
from gemma_tune.tuning.storage import optuna_module
from gemma_tune.tuning.study import Search, SearchSettings, TrialEvent, check_choice, run_search


def tune(
    config: Config,
    space: Space | Mapping[str, Any] | str | Path | None = None,
    *,
    budget: str = "20_trials",
    metric: str = "heldout_loss",
    storage: str = "",
    pruner: str = "asha",
    runner: Any = None,
) -> Any:
    """Searches for better settings, and returns the Optuna study.

    A search that was stopped goes on when it is started again with the same arguments. Several processes that are
    started with the same arguments share the work.

    Args:
        config: Settings to start from. `workdir` holds the search.
        space: Searched settings: a mapping as in space.yaml, the path of such a file, or None for the default space of
            the method.
        budget: Number of trials (`30_trials`) or time (`2h`).
        metric: Metric to improve; several with commas between give a Pareto front.
        storage: URL of a database; empty: a journal file in the workdir.
        pruner: `asha`, `hyperband` or `none`.
        runner: Object whose `run(config, on_evaluation)` runs a trial; None: training on the config's data.

    Raises:
        ConfigError, DataError, ModelError, TrainingError: The message says what is wrong and what to do.
    """
    search = make_search(config, space, budget=budget, metric=metric, storage=storage, pruner=pruner)
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
        num_workers: Number of workers that share the budget.
        memory_limit: Bytes that a trial may take; 0: the memory of the device.
        flags: Path of a setting by the name of its flag, for spaces that name flags.

    Raises:
        ConfigError: An argument is wrong, or the space contains settings that are not allowed.
    """
    optuna_module()
    check_choice(pruner)
    if num_workers < 1:
        raise ConfigError(f"--workers must be at least 1, got {num_workers}.")
    if space is None:
        space = default_space(config)
    elif isinstance(space, (str, Path)):
        space = read_space(Path(space).expanduser(), flags or {})
    elif not isinstance(space, Space):
        space = parse_space(space, flags or {})
    settings = SearchSettings(
        budget=parse_budget(budget),
        goals=parse_goals(metric),
        storage=storage,
        pruner=pruner,
        num_workers=num_workers,
        memory_limit=memory_limit,
        seed=config.seed,
    )
    search = Search(config, space.including(config), settings)
    search.space.check(config)
    return search


def start_search(
    search: Search, runner: Any = None, on_event: Callable[[TrialEvent], None] = lambda event: None
) -> Any:
    """Reads the data, loads the model once, runs the search's trials, and returns the Optuna study.

    Args:
        search: From `make_search`.
        runner: Object that runs trials; None: training on the config's data.
        on_event: Called when something happens to a trial.
    """
    if runner is not None:
        return run_search(search, runner, on_event)
    import dataclasses

    from gemma_tune.pipeline import read_splits
    from gemma_tune.runtime.device_memory import available_device_bytes
    from gemma_tune.tuning.runner.trial_runner import TrialRunner

    # The key names the data's content, so that a search isn't continued on other data.
    search = dataclasses.replace(search, data_key=read_splits(search.base).key, planned_bytes=planned_bytes)
    if not search.settings.memory_limit:
        limit = available_device_bytes() / search.settings.num_workers
        search = dataclasses.replace(search, settings=dataclasses.replace(search.settings, memory_limit=limit))
    search.open()  # Another search there is refused before the model is loaded.
    has_dropout = any(setting.path == "lora.dropout" for setting in search.space.settings)
    return run_search(search, TrialRunner(search.base, has_dropout), on_event)
