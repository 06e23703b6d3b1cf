"""Makes the report of a search: one HTML file that loads nothing from elsewhere."""

import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gemma_tune.evaluation.html_report import as_svg, figure_with_interval, html_document, html_table
from gemma_tune.evaluation.resampling import CONFIDENCE
from gemma_tune.tuning.results.setting_worth import FEWEST_TRIALS, ComparedTrials, setting_worth
from gemma_tune.tuning.search import Search
from gemma_tune.tuning.spaces.space import SearchedSetting, short
from gemma_tune.tuning.study import best_trials
from gemma_tune.tuning.trial_run import PROBLEM
from gemma_tune.tuning.trials import SLOT, attempts_by_slot

_MOST_NAMED = 8  # Trials in a legend.


def search_report(search: Search, study: Any, compared: ComparedTrials, shares: Mapping[str, float]) -> str:
    """Returns the report of a search as HTML.

    Args:
        search: What was searched.
        study: Its Optuna study.
        compared: From `comparable_values`.
        shares: From `importances`.

    Raises:
        TrainingError: No trial was finished.
    """
    goals = search.settings.goals
    best = best_trials(study)
    finished = [trial for trial in attempts_by_slot(study).values() if trial.state.name == "COMPLETE"]
    parts = [
        f"<h1>Search: {html.escape(', '.join(goal.name for goal in goals))}</h1>",
        _best_table(search, study, best),
    ]
    parts.append("<h2>History</h2>" + _history(search, study))
    if search.settings.prunes:
        parts.append("<h2>Curves</h2>" + _curves(search, study))
    if len(goals) > 1:
        parts.append("<h2>Pareto front</h2>" + _front(search, finished, best))
    if len(compared.values) >= FEWEST_TRIALS:
        parts.append(_settings_part(search, compared, shares))
    else:
        parts.append(f"<p>With fewer than {FEWEST_TRIALS} trials, nothing is said about single settings.</p>")
    parts.append(_trial_table(search, study))
    return html_document("Search of hyperparameters", parts)


def _settings_part(search: Search, compared: ComparedTrials, shares: Mapping[str, float]) -> str:
    name = html.escape(compared.name)
    rows = [
        [html.escape(each.path), html.escape(each.group), str(each.num_trials),
         figure_with_interval(each.mean, each.low, each.high)]
        for each in setting_worth(search, compared)
    ]  # fmt: skip
    return (
        f"<h2>Importances</h2><p>Share of the differences in {name} that a setting explains (PED-ANOVA, "
        f"arXiv:2304.10255).</p>{_importances(shares)}"
        f"<h2>What each setting is worth</h2><p>Mean {name}, and its {CONFIDENCE:.0%} bootstrap interval. Other "
        "settings differ between these trials too.</p>"
        + html_table(rows, ("setting", "value", "trials", name), css_class="figures")
        + f"<h2>Slices</h2>{_slices(search, compared)}<h2>Parallel coordinates</h2>{_parallel(search, compared)}"
    )


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
        rows.append([html.escape(setting.path), *("–" if v is None else html.escape(short(v)) for v in values)])
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
    return ", ".join(f"{path}={short(value)}" for path, value in trial.params.items())


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


def _importances(shares: Mapping[str, float]) -> str:
    if not shares:
        return "<p>They can't be computed from these trials.</p>"

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        names = list(shares)[::-1]
        axes.barh(names, [shares[name] for name in names])
        axes.set(xlabel="importance")

    return _draw(8, 0.8 + 0.35 * len(shares), draw)


def _slices(search: Search, compared: ComparedTrials) -> str:
    settings = search.space.settings
    columns = min(3, len(settings))
    rows = -(-len(settings) // columns)

    def draw(figure: Any) -> None:
        panels = np.atleast_1d(figure.subplots(rows, columns)).ravel()
        for axes, setting in zip(panels, settings, strict=False):
            pairs = compared.by_value(setting.path)
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
