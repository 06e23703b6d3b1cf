"""Draws the charts of a run: losses, metrics, learning rate, and the lengths of its examples."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gemma_tune.evaluation.html_report import as_svg

_MOST_POINTS = 300  # Of a line; longer ones are drawn as mean and range of as many groups.
_MOST_BARS = 40
_TRAINING, _HELDOUT, _QUIET = "#4c8ed9", "#d9480f", "#888888"
_NO_CHART = ("loss", "perplexity", "num_tokens")  # The loss has one of its own, and perplexity is exp(loss).


class Line(NamedTuple):
    """Points of a line, in groups of neighbours where there are many.

    Attributes:
        steps: Mean step of each group.
        means, lows, highs: Mean, least and greatest value of each group.
    """

    steps: np.ndarray
    means: np.ndarray
    lows: np.ndarray
    highs: np.ndarray


def thinned_line(steps: Sequence[float], values: Sequence[float], most: int = _MOST_POINTS) -> Line:
    """Returns a line with at most `most` points."""
    groups = np.array_split(np.arange(len(steps)), min(most, max(len(steps), 1)))
    x, y = np.asarray(steps, float), np.asarray(values, float)
    return Line(*(np.array([each(array[group]) for group in groups if len(group)]) for each, array in (
        (np.mean, x), (np.mean, y), (np.min, y), (np.max, y)
    )))  # fmt: skip


def run_charts(
    metrics: Sequence[Mapping[str, Any]], intervals: Mapping[str, Mapping[str, Mapping[str, float]]], best_step: int
) -> list[str]:
    """Returns charts of a run over its steps, as SVG: losses, held-out metrics, learning rate.

    Args:
        metrics: Metrics of the run, as in the lines of metrics.jsonl.
        intervals: Intervals of metrics of answers `before` and `after` training, as in `RunResult.intervals`.
        best_step: Step whose weights were saved.
    """
    charts = [_losses(metrics, best_step)]
    names = [name.removeprefix("heldout_") for row in metrics for name in row if name.startswith("heldout_")]
    for name in dict.fromkeys(names):
        if name not in _NO_CHART:
            charts.append(_metric(name, metrics, intervals, best_step))
    rows = [row for row in metrics if "learning_rate" in row]
    if rows:
        figure, axes = _axes("learning rate", "step")
        line = thinned_line([row["step"] for row in rows], [row["learning_rate"] for row in rows])
        axes.plot(line.steps, line.means, color=_QUIET)
        axes.set_ylim(0, None)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        charts.append(as_svg(figure, follows_theme=True))
    return charts


def length_chart(lengths: np.ndarray, max_length: int, title: str = "examples by length") -> str:
    """Returns a histogram of the examples' lengths, as SVG, with a line at the length from which they are shortened."""
    figure, axes = _axes(title, "tokens")
    low, high = int(lengths.min()), int(lengths.max())
    width = math.ceil(
        (high - low + 1) / _MOST_BARS
    )  # In whole tokens: else some bars would have more lengths than others.
    axes.hist(lengths, bins=np.arange(low, high + 1 + width, width) - 0.5, color=_TRAINING)
    if high > max_length:
        axes.axvline(max_length, color=_HELDOUT, linestyle="--", linewidth=1)
        axes.text(max_length, axes.get_ylim()[1], " data.max_length", color=_HELDOUT, fontsize=9, va="top")
    return as_svg(figure, follows_theme=True)


def _losses(metrics: Sequence[Mapping[str, Any]], best_step: int) -> str:
    figure, axes = _axes("loss, nats per token", "step")
    steps = [row for row in metrics if "loss" in row]
    if steps:
        line = thinned_line([row["step"] for row in steps], [row["loss"] for row in steps])
        axes.plot(line.steps, line.means, color=_TRAINING, linewidth=1.2, label="training")
        if len(steps) > _MOST_POINTS:
            axes.fill_between(line.steps, line.lows, line.highs, color=_TRAINING, alpha=0.2, linewidth=0)
    heldout = [row for row in metrics if "heldout_loss" in row]
    if heldout:
        axes.plot(*_points(heldout, "heldout_loss"), color=_HELDOUT, marker="o", markersize=4, label="held out")
        _mark_best(axes, best_step)
    axes.set_ylim(0, None)
    axes.legend(frameon=False, fontsize=9)
    return as_svg(figure, follows_theme=True)


def _metric(
    name: str,
    metrics: Sequence[Mapping[str, Any]],
    intervals: Mapping[str, Mapping[str, Mapping[str, float]]],
    best_step: int,
) -> str:
    figure, axes = _axes(f"held-out {name.replace('_', ' ')}", "step")
    rows = [row for row in metrics if f"heldout_{name}" in row]
    axes.plot(*_points(rows, f"heldout_{name}"), color=_HELDOUT, marker="o", markersize=4)
    for when, step in (("before", 0), ("after", best_step)):
        if name in intervals.get(when, {}):
            each = intervals[when][name]
            axes.vlines(step, each["low"], each["high"], color=_HELDOUT, alpha=0.5, linewidth=3)
    _mark_best(axes, best_step)
    return as_svg(figure, follows_theme=True)


def _axes(title: str, label: str) -> tuple[Any, Any]:
    """Returns a small figure that can still be read where it is as wide as a phone, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 2.7), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(label, fontsize=9)
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    return figure, axes


def _points(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    line = thinned_line([row["step"] for row in rows], [row[name] for row in rows])
    return line.steps, line.means


def _mark_best(axes: Any, step: int) -> None:
    axes.axvline(step, color=_QUIET, linestyle=":", linewidth=1.2)
