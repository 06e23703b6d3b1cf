"""Defines a search: what is searched, how, and where."""

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gemma_tune.config import Config
from gemma_tune.errors import ConfigError, did_you_mean
from gemma_tune.settings import flatten
from gemma_tune.tuning.budget import Budget
from gemma_tune.tuning.metrics import Goal
from gemma_tune.tuning.spaces.space import Space, apply_values
from gemma_tune.tuning.storage import open_study, optuna_module, study_lock
from gemma_tune.workdir_config import paths_from

PRUNERS = ("asha", "hyperband", "none")
_TRIALS = "trials"
_EVALUATIONS = 9  # Of a whole trial, at least: with a reduction factor of 3, its rungs are at 1/9, 1/3 and the end.


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
        num_side_by_side: Number of trials that a worker trains at once; 0: not chosen yet.
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
    num_side_by_side: int = 1
    memory_limit: float = 0.0
    seed: int = 0

    @property
    def num_at_once(self) -> int:
        """Returns the number of trials that all workers together train at once."""
        return self.num_workers * max(1, self.num_side_by_side)

    @property
    def prunes(self) -> bool:
        """Returns whether trials that fall behind are ended early."""
        return self.pruner != "none" and len(self.goals) == 1 and self.goals[0].is_known_early


@dataclasses.dataclass(frozen=True)
class Search:
    """A search: what is searched, how, and where.

    Attributes:
        base: Config that trials start from; its workdir holds the search.
        space: Searched settings.
        settings: How the search runs.
        data_key: Key of the data's content.
        eval_every_steps: Number of steps between two evaluations of a trial; None: as in `base`.
        planned_bytes: Function from a Config to the bytes that it takes by plan; None: unknown.
    """

    base: Config
    space: Space
    settings: SearchSettings
    data_key: str = ""
    eval_every_steps: int | None = None
    planned_bytes: Callable[[Config], float] | None = None

    @property
    def workdir(self) -> Path:
        """Returns the folder of the search."""
        return Path(self.base.workdir).expanduser()

    def fingerprint(self) -> dict[str, Any]:
        """Returns what must stay the same for trials to be comparable, by name."""
        settings = flatten(self.base.to_dict()) | paths_from(self.base, self.workdir)
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

    def trial_folder(self, slot: int) -> Path:
        """Returns the folder of a trial."""
        return self.workdir / _TRIALS / str(slot)

    def config_of(self, params: Mapping[str, Any], slot: int) -> Config:
        """Returns the Config of a trial."""
        config = apply_values(self.space, self.base, params)
        changes: dict[str, Any] = {"workdir": str(self.trial_folder(slot))}
        if self.eval_every_steps is not None and "training.eval_every_steps" not in params:
            changes["training.eval_every_steps"] = self.eval_every_steps
        return config.replace(changes)

    def evaluated_for(self, num_steps: int) -> "Search":
        """Returns the search with evaluations so often that trials of this many steps can be pruned early."""
        every = self.base.training.eval_every_steps or sys.maxsize
        if not self.settings.prunes or every * _EVALUATIONS <= num_steps:
            return self
        return dataclasses.replace(self, eval_every_steps=max(1, num_steps // _EVALUATIONS))

    @property
    def first_rung(self) -> int:
        """Returns the step of the first evaluation after which a trial may be pruned.

        Until the longest warm-up of the space is over, trials with short ones only seem to be better.
        """
        every = self.base.training.eval_every_steps if self.eval_every_steps is None else self.eval_every_steps
        warmups = [setting.extremes for setting in self.space.settings if setting.path == "optimizer.warmup_steps"]
        longest = max(warmups[0]) if warmups else self.base.optimizer.warmup_steps
        every = max(1, every)
        return max(1, math.ceil(longest / every)) * every

    def sampler(self, slot: int) -> Any:
        """Returns the sampler of a slot: TPE (arXiv:2304.11127) over groups of settings that occur together."""
        settings, optuna = self.settings, optuna_module()
        return optuna.samplers.TPESampler(
            n_startup_trials=settings.num_random_trials,
            multivariate=True,
            group=True,
            constant_liar=settings.num_at_once > 1,
            seed=(settings.seed * 1_000_003 + slot) % 2**32,
        )

    def _pruner(self) -> Any:
        settings, pruners = self.settings, optuna_module().pruners
        if not settings.prunes:
            return pruners.NopPruner()
        make = pruners.SuccessiveHalvingPruner if settings.pruner == "asha" else pruners.HyperbandPruner
        return make(min_resource=self.first_rung, reduction_factor=settings.reduction_factor)


def check_pruner(pruner: str) -> None:
    """Checks the name of a pruner.

    Raises:
        ConfigError: There is no such pruner.
    """
    if pruner not in PRUNERS:
        raise ConfigError(f"pruner must be one of {', '.join(PRUNERS)}, got {pruner!r}.{did_you_mean(pruner, PRUNERS)}")
