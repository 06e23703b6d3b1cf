"""Makes the report of a search: one HTML file that loads nothing from elsewhere."""

import html
import itertools
import warnings
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

_FEWEST = 4  # Finished trials without which nothing can be said about settings.


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
    trials = [trial for trial in attempts_by_slot(study).values() if trial.state.name == "COMPLETE"]
    parts = [f"<h1>Search: {html.escape(', '.join(goal.name for goal in goals))}</h1>", _best_table(search, best)]
    parts.append("<h2>History</h2>" + _history(search, study))
    if len(goals) > 1:
        parts.append("<h2>Pareto front</h2>" + _front(search, trials, best))
    if len(trials) >= _FEWEST:
        parts.append(_settings_part(search, study, trials))
    else:
        parts.append(f"<p>With fewer than {_FEWEST} finished trials, nothing is said about single settings.</p>")
    parts.append(_trial_table(search, study))
    return html_document("Search of hyperparameters", parts)


def _settings_part(search: Search, study: Any, trials: Sequence[Any]) -> str:
    name = html.escape(search.settings.goals[0].name)
    rows = [
        [html.escape(each.path), html.escape(each.group), str(each.num_trials),
         figure_with_interval(each.mean, each.low, each.high)]
        for each in setting_worth(search, trials)
    ]  # fmt: skip
    return (
        "<h2>Importances</h2><p>Share of the differences between trials that a setting explains (PED-ANOVA, "
        f"arXiv:2304.10255).</p>{_importances(study)}"
        f"<h2>What each setting is worth</h2><p>Mean {name} of the finished trials, and its {CONFIDENCE:.0%} bootstrap "
        "interval. Other settings differ between these trials too, and pruned trials are left out.</p>"
        + html_table(rows, ("setting", "value", "trials", name), css_class="figures")
        + f"<h2>Slices</h2>{_slices(search, trials)}<h2>Parallel coordinates</h2>{_parallel(search, trials)}"
    )


def setting_worth(search: Search, trials: Sequence[Any]) -> list[GroupWorth]:
    """Returns the metric by value of each setting. Ranges are cut into three parts with equally many trials.

    Args:
        search: What was searched.
        trials: Finished trials.
    """
    found = []
    for setting in search.space.settings:
        having = [trial for trial in trials if setting.path in trial.params]
        for label, group in _groups(setting, having):
            values = np.array([trial.values[0] for trial in group])
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


def _best_table(search: Search, best: Sequence[Any]) -> str:
    goals = search.settings.goals
    rows = [
        [f"trial {trial.user_attrs[SLOT]}", *(f"{value:.5g}" for value in trial.values), html.escape(_params(trial))]
        for trial in best
    ]
    title = "Pareto front" if len(goals) > 1 else "Best trial"
    return f"<h2>{title}</h2>" + html_table(rows, ("", *(html.escape(goal.name) for goal in goals), "settings"))


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


def _front(search: Search, trials: Sequence[Any], best: Sequence[Any]) -> str:
    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.scatter([t.values[0] for t in trials], [t.values[1] for t in trials], color="gray", label="finished")
        axes.plot([t.values[0] for t in best], [t.values[1] for t in best], "o-", label="Pareto front")
        axes.set(xlabel=search.settings.goals[0].name, ylabel=search.settings.goals[1].name)
        axes.legend()

    return _draw(6, 4, draw)


def importances(study: Any) -> dict[str, float]:
    """Returns how much each setting explains of the first metric, the most important first.

    Nothing can be said about fewer than four finished trials, or about trials that are all as good.
    """
    optuna = optuna_module()
    if sum(trial.state.name == "COMPLETE" for trial in study.get_trials(deepcopy=False)) < _FEWEST:
        return {}
    sign = 1 if study.directions[0].name == "MINIMIZE" else -1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # That lower targets are better, which the sign sees to.
            found = optuna.importance.get_param_importances(
                study,
                evaluator=optuna.importance.PedAnovaImportanceEvaluator(),
                target=lambda trial: sign * trial.values[0],
            )
        return dict(found)
    except (RuntimeError, ValueError):  # Too few trials, or all with the same value.
        return {}


def _importances(study: Any) -> str:
    found = importances(study)
    if not found:
        return "<p>They can't be computed from these trials.</p>"

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        names = list(found)[::-1]
        axes.barh(names, [found[name] for name in names])
        axes.set(xlabel="importance")

    return _draw(8, 0.8 + 0.35 * len(found), draw)


def _slices(search: Search, trials: Sequence[Any]) -> str:
    settings = search.space.settings
    columns = min(3, len(settings))
    rows = -(-len(settings) // columns)

    def draw(figure: Any) -> None:
        panels = np.atleast_1d(figure.subplots(rows, columns)).ravel()
        for axes, setting in zip(panels, settings, strict=False):
            having = [trial for trial in trials if setting.path in trial.params]
            values = [trial.params[setting.path] for trial in having]
            axes.scatter([str(v) for v in values] if setting.choices else values, [t.values[0] for t in having], s=12)
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


def _parallel(search: Search, trials: Sequence[Any]) -> str:
    settings = search.space.settings
    values = np.array([trial.values[0] for trial in trials])
    span = float(values.max() - values.min()) or 1.0

    def draw(figure: Any) -> None:
        from matplotlib import colormaps

        axes = figure.subplots()
        for trial, share in zip(trials, (values - values.min()) / span, strict=True):
            heights = [share, *(_position(setting, trial) for setting in settings)]
            axes.plot(range(len(heights)), heights, color=colormaps["viridis"](share), alpha=0.7)
        axes.set_xticks(range(len(settings) + 1), [search.settings.goals[0].name, *(s.path for s in settings)])
        axes.tick_params(axis="x", rotation=20, labelsize=8)
        axes.set_yticks([0, 1], ["lowest", "highest"])

    return _draw(9, 4, draw)
