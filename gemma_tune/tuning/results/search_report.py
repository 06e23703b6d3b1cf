"""Makes the report of a search: one HTML file that loads nothing from elsewhere."""

import html
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gemma_tune.evaluation.html_report import as_svg, figure_with_interval, html_document, html_table
from gemma_tune.evaluation.resampling import CONFIDENCE, mean_interval
from gemma_tune.tuning.search import Search
from gemma_tune.tuning.spaces.space import SearchedSetting
from gemma_tune.tuning.storage import optuna_module
from gemma_tune.tuning.study import best_trials
from gemma_tune.tuning.trial_run import PROBLEM
from gemma_tune.tuning.trials import SLOT, attempts_by_slot

_MOST_NAMED = 8  # Trials in a legend.
_FEWEST = 4  # Trials without which nothing can be said about settings.


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


def search_report(search: Search, study: Any) -> str:
    """Returns the report of a search as HTML.

    Raises:
        TrainingError: No trial was finished.
    """
    goals = search.settings.goals
    best = best_trials(study)
    finished = [trial for trial in attempts_by_slot(study).values() if trial.state.name == "COMPLETE"]
    compared = comparable_values(search, study)
    parts = [
        f"<h1>Search: {html.escape(', '.join(goal.name for goal in goals))}</h1>",
        _best_table(search, study, best),
    ]
    parts.append("<h2>History</h2>" + _history(search, study))
    if search.settings.prunes:
        parts.append("<h2>Curves</h2>" + _curves(search, study))
    if len(goals) > 1:
        parts.append("<h2>Pareto front</h2>" + _front(search, finished, best))
    if len(compared.values) >= _FEWEST:
        parts.append(_settings_part(search, compared))
    else:
        parts.append(f"<p>With fewer than {_FEWEST} trials, nothing is said about single settings.</p>")
    parts.append(_trial_table(search, study))
    return html_document("Search of hyperparameters", parts)


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


def _settings_part(search: Search, compared: ComparedTrials) -> str:
    name = html.escape(compared.name)
    rows = [
        [html.escape(each.path), html.escape(each.group), str(each.num_trials),
         figure_with_interval(each.mean, each.low, each.high)]
        for each in setting_worth(search, compared)
    ]  # fmt: skip
    return (
        f"<h2>Importances</h2><p>Share of the differences in {name} that a setting explains (PED-ANOVA, "
        f"arXiv:2304.10255).</p>{_importances(search, compared)}"
        f"<h2>What each setting is worth</h2><p>Mean {name}, and its {CONFIDENCE:.0%} bootstrap interval. Other "
        "settings differ between these trials too.</p>"
        + html_table(rows, ("setting", "value", "trials", name), css_class="figures")
        + f"<h2>Slices</h2>{_slices(search, compared)}<h2>Parallel coordinates</h2>{_parallel(search, compared)}"
    )


def setting_worth(search: Search, compared: ComparedTrials) -> list[GroupWorth]:
    """Returns the metric by value of each setting. Ranges are cut into three parts with equally many trials."""
    found, value_of = [], dict(zip(map(id, compared.trials), compared.values, strict=True))
    for setting in search.space.settings:
        having = [trial for trial in compared.trials if setting.path in trial.params]
        for label, group in _groups(setting, having):
            values = np.array([value_of[id(trial)] for trial in group])
            low, high = mean_interval(values.tolist())
            found.append(GroupWorth(setting.path, label, len(values), float(values.mean()), low, high))
    return found


def _groups(setting: SearchedSetting, trials: Sequence[Any]) -> list[tuple[str, list[Any]]]:
    def value(trial: Any) -> Any:
        return trial.params[setting.path]

    if setting.choices:
        groups = [(str(choice), [t for t in trials if value(t) == choice]) for choice in setting.choices]
        return [(label, group) for label, group in groups if group]
    ordered = sorted(trials, key=value)
    cuts = [len(ordered) * part // 3 for part in range(4)]
    parts = [ordered[start:end] for start, end in itertools.pairwise(cuts) if end > start]
    return [(f"{value(part[0]):.3g} to {value(part[-1]):.3g}", part) for part in parts]


def _best_table(search: Search, study: Any, best: Sequence[Any]) -> str:
    first = attempts_by_slot(study)[0]
    shown = [first, *(trial for trial in best if trial.number != first.number)]
    headers = ["", "first trial", *(f"trial {trial.user_attrs[SLOT]}" for trial in shown[1:])]
    rows = [
        [html.escape(goal.name), *(f"{trial.values[index]:.5g}" if trial.values else "–" for trial in shown)]
        for index, goal in enumerate(search.settings.goals)
    ]
    for setting in search.space.settings:
        values = [trial.params.get(setting.path) for trial in shown]
        rows.append([html.escape(setting.path), *("–" if v is None else html.escape(_short(v)) for v in values)])
    title = "Pareto front" if len(search.settings.goals) > 1 else "Best settings"
    return f"<h2>{title}</h2>" + html_table(rows, headers, css_class="figures")


def _trial_table(search: Search, study: Any) -> str:
    rows = []
    for slot, trial in attempts_by_slot(study).items():
        values = [f"{value:.5g}" for value in trial.values or []]
        figures = values + [""] * (len(search.settings.goals) - len(values))
        state = html.escape(trial.user_attrs.get(PROBLEM, "") or trial.state.name.lower())
        rows.append([str(slot), *figures, state, html.escape(_params(trial))])
    header = ("trial", *(html.escape(goal.name) for goal in search.settings.goals), "state", "settings")
    return f"<details><summary>All trials</summary>{html_table(rows, header)}</details>"


def _params(trial: Any) -> str:
    return ", ".join(f"{path}={_short(value)}" for path, value in trial.params.items())


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _draw(width: float, height: float, draw: Callable[[Any], None]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    draw(figure)
    return f"<figure>{as_svg(figure)}</figure>"


def _history(search: Search, study: Any) -> str:
    """Draws the first metric of each trial, those pruned with their last value, and the best so far."""
    goal = search.settings.goals[0]
    done, pruned = [], []
    for slot, trial in attempts_by_slot(study).items():
        if trial.state.name == "COMPLETE":
            done.append((slot, trial.values[0]))
        elif trial.state.name == "PRUNED" and trial.value is not None:
            pruned.append((slot, trial.value))

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        running = np.minimum.accumulate if goal.direction == "minimize" else np.maximum.accumulate
        slots, values = zip(*done, strict=True)
        axes.scatter(slots, values, label="finished")
        axes.step(slots, running(np.array(values)), where="post", label="best so far")
        if pruned:
            axes.scatter(*zip(*pruned, strict=True), marker="x", color="gray", label="pruned")
        axes.set(xlabel="trial", ylabel=goal.name)
        axes.legend()

    return _draw(8, 3.5, draw)


def _curves(search: Search, study: Any) -> str:
    """Draws the first metric of each trial by step; those that were finished in color."""
    goal = search.settings.goals[0]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for slot, trial in attempts_by_slot(study).items():
            if trial.intermediate_values:
                steps, values = zip(*sorted(trial.intermediate_values.items()), strict=True)
                is_done = trial.state.name == "COMPLETE"
                style = {"label": f"trial {slot}"} if is_done else {"color": "gray", "alpha": 0.6, "linewidth": 1}
                axes.plot(steps, values, ".-", **style)
        axes.set(xlabel="step", ylabel=goal.name)
        if len(axes.get_legend_handles_labels()[0]) <= _MOST_NAMED:
            axes.legend()

    return _draw(8, 3.5, draw)


def _front(search: Search, trials: Sequence[Any], best: Sequence[Any]) -> str:
    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.scatter([t.values[0] for t in trials], [t.values[1] for t in trials], color="gray", label="finished")
        axes.plot([t.values[0] for t in best], [t.values[1] for t in best], "o-", label="Pareto front")
        axes.set(xlabel=search.settings.goals[0].name, ylabel=search.settings.goals[1].name)
        axes.legend()

    return _draw(6, 4, draw)


def importances(search: Search, study: Any) -> dict[str, float]:
    """Returns the share of the differences between trials that each setting explains, the largest first.

    Nothing can be said about fewer than four trials, or about trials that are all as good. Source: PED-ANOVA
    (arXiv:2304.10255).
    """
    return _importances_of(search, comparable_values(search, study))


def _importances_of(search: Search, compared: ComparedTrials) -> dict[str, float]:
    optuna = optuna_module()
    if len(compared.values) < _FEWEST:
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


def _importances(search: Search, compared: ComparedTrials) -> str:
    found = _importances_of(search, compared)
    if not found:
        return "<p>They can't be computed from these trials.</p>"

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        names = list(found)[::-1]
        axes.barh(names, [found[name] for name in names])
        axes.set(xlabel="importance")

    return _draw(8, 0.8 + 0.35 * len(found), draw)


def _slices(search: Search, compared: ComparedTrials) -> str:
    settings = search.space.settings
    columns = min(3, len(settings))
    rows = -(-len(settings) // columns)

    def draw(figure: Any) -> None:
        panels = np.atleast_1d(figure.subplots(rows, columns)).ravel()
        for axes, setting in zip(panels, settings, strict=False):
            pairs = [
                (trial.params[setting.path], value)
                for trial, value in zip(compared.trials, compared.values, strict=True)
                if setting.path in trial.params
            ]
            axes.scatter([str(v) if setting.choices else v for v, _ in pairs], [value for _, value in pairs], s=12)
            axes.set_title(setting.path, fontsize=8)
            if setting.log:
                axes.set_xscale("log")
        for axes in panels[len(settings) :]:
            axes.set_visible(False)

    return _draw(9, 2.6 * rows, draw)


def _position(setting: SearchedSetting, trial: Any) -> float:
    """Returns where a trial's value lies on the setting's axis: 0 to 1, or NaN where it has none."""
    if setting.path not in trial.params:
        return float("nan")
    value = trial.params[setting.path]
    if setting.choices:
        return setting.choices.index(value) / max(1, len(setting.choices) - 1)
    low, high = setting.low, setting.high
    if setting.log:
        low, high, value = np.log(low), np.log(high), np.log(value)
    return float((value - low) / (high - low))


def _parallel(search: Search, compared: ComparedTrials) -> str:
    settings = search.space.settings
    values = np.array(compared.values)
    span = float(values.max() - values.min()) or 1.0

    def draw(figure: Any) -> None:
        from matplotlib import colormaps

        axes = figure.subplots()
        for trial, share in zip(compared.trials, (values - values.min()) / span, strict=True):
            heights = [share, *(_position(setting, trial) for setting in settings)]
            axes.plot(range(len(heights)), heights, color=colormaps["viridis"](share), alpha=0.7)
        axes.set_xticks(range(len(settings) + 1), [compared.name, *(s.path for s in settings)])
        axes.tick_params(axis="x", rotation=20, labelsize=8)
        axes.set_yticks([0, 1], ["lowest", "highest"])

    return _draw(9, 4, draw)
