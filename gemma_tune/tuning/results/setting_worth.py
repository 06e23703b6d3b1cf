"""Says what each searched setting is worth: its share of the differences, and the metric by its values."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gemma_tune.evaluation.resampling import mean_interval
from gemma_tune.tuning.search import Search
from gemma_tune.tuning.spaces.space import SearchedSetting
from gemma_tune.tuning.storage import optuna_module
from gemma_tune.tuning.trials import attempts_by_slot

FEWEST_TRIALS = 4  # Without as many, nothing can be said about settings.


class GroupWorth(NamedTuple):
    """The metric of the trials whose setting is in one group of values.

    Attributes:
        path: Path of the setting.
        group: The value, or the range of values.
        num_trials: Number of trials in the group.
        mean: Mean of the metric.
        low, high: Ends of its confidence interval; NaN for a single trial.
    """

    path: str
    group: str
    num_trials: int
    mean: float
    low: float
    high: float


class ComparedTrials(NamedTuple):
    """Trials, and a metric of each that was measured after equally many steps.

    Attributes:
        name: Name of the metric, and when it was measured.
        trials: Optuna trials.
        values: Their metric.
    """

    name: str
    trials: list[Any]
    values: list[float]

    def by_value(self, path: str) -> list[tuple[Any, float]]:
        """Returns a setting's value and the metric, for each trial that has the setting."""
        pairs = zip(self.trials, self.values, strict=True)
        return [(trial.params[path], metric) for trial, metric in pairs if path in trial.params]


def comparable_values(search: Search, study: Any) -> ComparedTrials:
    """Returns what tells settings apart: the first metric at the last step that all trials have reached.

    Without pruning this is the end. With it, only good trials are finished, and a comparison of those alone would be
    one of the best with the best.
    """
    goal = search.settings.goals[0]
    ended = [trial for trial in attempts_by_slot(study).values() if trial.state.name in ("COMPLETE", "PRUNED")]
    pruned = [trial for trial in ended if trial.state.name == "PRUNED" and trial.intermediate_values]
    if not pruned:
        finished = [trial for trial in ended if trial.state.name == "COMPLETE"]
        return ComparedTrials(goal.name, finished, [trial.values[0] for trial in finished])
    step = min(max(trial.intermediate_values) for trial in pruned)
    reached = [trial for trial in ended if step in trial.intermediate_values]
    values = [trial.intermediate_values[step] for trial in reached]
    return ComparedTrials(f"{goal.name} after {step} steps", reached, values)


def setting_worth(search: Search, compared: ComparedTrials) -> list[GroupWorth]:
    """Returns the metric by value of each setting. Ranges are cut into three parts with equally many trials."""
    found = []
    for setting in search.space.settings:
        for label, values in _groups(setting, compared.by_value(setting.path)):
            low, high = mean_interval(values)
            found.append(GroupWorth(setting.path, label, len(values), float(np.mean(values)), low, high))
    return found


def _groups(setting: SearchedSetting, pairs: Sequence[tuple[Any, float]]) -> list[tuple[str, list[float]]]:
    """Returns the label and the metrics of each group of a setting's values."""
    if setting.choices:
        groups = [(str(choice), [metric for value, metric in pairs if value == choice]) for choice in setting.choices]
        return [(label, metrics) for label, metrics in groups if metrics]
    ordered = sorted(pairs, key=lambda pair: pair[0])
    cuts = [len(ordered) * part // 3 for part in range(4)]
    parts = [ordered[start:end] for start, end in itertools.pairwise(cuts) if end > start]
    return [(f"{part[0][0]:.3g} to {part[-1][0]:.3g}", [metric for _, metric in part]) for part in parts]


def importances(search: Search, compared: ComparedTrials) -> dict[str, float]:
    """Returns the share of the differences between trials that each setting explains, the largest first.

    Nothing can be said about fewer than four trials, or about trials that are all as good. Source: PED-ANOVA
    (arXiv:2304.10255).
    """
    optuna = optuna_module()
    if len(compared.values) < FEWEST_TRIALS:
        return {}
    sign = 1 if search.settings.goals[0].direction == "minimize" else -1
    copy = optuna.create_study()
    for trial, value in zip(compared.trials, compared.values, strict=True):
        copy.add_trial(
            optuna.trial.create_trial(params=trial.params, distributions=trial.distributions, value=sign * value)
        )
    try:
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        return dict(optuna.importance.get_param_importances(copy, evaluator=evaluator))
    except (RuntimeError, ValueError):  # All trials have the same value.
        return {}
