"""Draws the chart of a comparison: divergence over memory, and loss over memory."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from gemma_tune.evaluation.comparison_figures import (
    FidelityReport,
    ModelFigures,
    kl_text,
    share_text,
    short_name,
    size_text,
)

_COLORS = {"int8": "#2a78b8", "nf4": "#2b9461", "int4": "#d2762a"}
_OTHER, _REFERENCE = "#7a5aa6", "#333333"
_MAX_TICKS = 7
_LABEL_SHIFT, _LABEL_HEIGHT = 0.035, 0.11  # Fractions of the chart's size.


def draw_comparison(report: FidelityReport) -> Any:
    """Returns a matplotlib figure. Memory has a log axis, and so has the divergence, unless it is 0 everywhere."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), dpi=150, layout="constrained")
    fidelity, loss = figure.subplots(1, 2)
    for axes, draw in ((fidelity, _draw_fidelity), (loss, _draw_loss)):
        labels = draw(axes, report)
        _draw_memory_axis(axes, report)
        _write_labels(axes, labels)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2, which="major")
        axes.set_axisbelow(True)
    figure.suptitle(f"Compared with {short_name(report.reference.name)}", fontsize=14, weight="bold")
    figure.supxlabel(f"{report.scope} · {report.precision} · gemma-tune compare", fontsize=8, color="#666666")
    return figure


def color_of(model: ModelFigures) -> str:
    """Returns the color of a model in all charts."""
    return _COLORS.get(model.name.rpartition("@")[2], _OTHER) if model.divergence else _REFERENCE


class _Label(NamedTuple):
    """Label beside a point of the chart."""

    model: ModelFigures
    height: float
    detail: str


def _draw_fidelity(axes: Any, report: FidelityReport) -> list[_Label]:
    pairs = [(model, model.divergence) for model in report.candidates if model.divergence]
    positive = [value for _, each in pairs for value in (each.mean_kl, each.p99_kl) if value > 0]
    floor = min(positive) / 4 if positive else 0.0  # A log axis has no 0: it is drawn here.
    labels = []
    for model, each in pairs:
        color, mean, p99 = color_of(model), max(each.mean_kl, floor), max(each.p99_kl, floor)
        axes.plot([model.memory_bytes] * 2, [mean, p99], color=color, linewidth=1.5, alpha=0.5, zorder=2)
        axes.plot(model.memory_bytes, p99, marker="_", markersize=12, color=color, alpha=0.7, zorder=2)
        axes.plot(model.memory_bytes, mean, marker="o", markersize=9, color=color, zorder=3)
        labels.append(_Label(model, mean, f"KL {kl_text(each.mean_kl)}, {share_text(each.agreement)} same token"))
    if positive:
        axes.set_yscale("log")
        low = floor if any(each.mean_kl == 0 for _, each in pairs) else min(value.mean_kl for _, value in pairs)
        axes.set_ylim(low / 2, max(positive) * 2)
        axes.yaxis.set_major_formatter(lambda value, _: kl_text(value))
    else:
        axes.set_ylim(-0.1, 1)
    axes.axvline(report.reference.memory_bytes, color=_REFERENCE, linestyle=":", linewidth=1.2)
    axes.text(
        report.reference.memory_bytes,
        0.98,
        f" {short_name(report.reference.name)}",
        transform=axes.get_xaxis_transform(),
        rotation=90,
        ha="left",
        va="top",
        fontsize=9,
        color=_REFERENCE,
        in_layout=False,
    )
    axes.set_ylabel("KL from the reference, nats" + (" (log)" if positive else ""))
    axes.set_title("Divergence from the reference: mean, and 99th percentile (–)", fontsize=10.5, loc="left")
    return labels


def _draw_loss(axes: Any, report: FidelityReport) -> list[_Label]:
    reference = report.reference.quality.loss
    axes.axhline(reference, color=_REFERENCE, linestyle=":", linewidth=1.2)
    losses, labels = [], []
    for model in report.models:
        loss, error = model.quality.loss, (model.divergence.loss_increase_error or 0.0) if model.divergence else 0.0
        axes.errorbar(
            model.memory_bytes, loss, error or None, fmt="o", markersize=9, color=color_of(model), capsize=4, zorder=3
        )
        losses += [loss - error, loss + error]
        labels.append(_Label(model, loss, f"{loss - reference:+.3f}" if model.divergence else f"loss {loss:.3f}"))
    spread = max(losses) - min(losses) or 0.1
    axes.set_ylim(min(losses) - 0.2 * spread, max(losses) + 0.2 * spread)
    axes.set_ylabel("loss, nats per token")
    axes.set_title("Loss on the wanted answers, ± one standard error", fontsize=10.5, loc="left")
    return labels


def _draw_memory_axis(axes: Any, report: FidelityReport) -> None:
    """Draws a tick for each size that differs enough from those that have one."""
    sizes = sorted({model.memory_bytes for model in report.models})
    margin = max((sizes[-1] / sizes[0]) ** 0.25, 1.25)
    low, high = sizes[0] / margin, sizes[-1] * margin
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    ticks: list[int] = []
    for size in [report.reference.memory_bytes, *sizes]:
        if all(abs(math.log(size / other)) > math.log(high / low) / _MAX_TICKS for other in ticks):
            ticks.append(size)
    axes.set_xticks(ticks, [size_text(size) for size in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("memory of the weights (log)")


def _write_labels(axes: Any, labels: Sequence[_Label]) -> None:
    """Writes a label beside each point, on the side with more room, so that no two overlap."""
    places = [
        axes.transAxes.inverted().transform(axes.transData.transform((label.model.memory_bytes, label.height)))
        for label in labels
    ]
    for label, (x, y), height in zip(labels, places, _apart([y for _, y in places]), strict=True):
        is_right = x > 0.5
        color, shift = color_of(label.model), -_LABEL_SHIFT if is_right else _LABEL_SHIFT
        axes.plot([x, x + shift * 0.8], [y, height], transform=axes.transAxes, color=color, linewidth=0.8)
        axes.text(
            x + shift,
            height,
            f"{short_name(label.model.name)}\n{label.detail}",
            transform=axes.transAxes,
            ha="right" if is_right else "left",
            va="center",
            fontsize=9,
            color=color,
            linespacing=1.3,
            zorder=4,
            in_layout=False,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )


def _apart(heights: Sequence[float]) -> list[float]:
    """Returns heights, as fractions of the chart's height, moved apart by at least a label's height."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    moved = [max(height, _LABEL_HEIGHT / 2) for height in heights]
    for below, above in itertools.pairwise(order):
        moved[above] = max(moved[above], moved[below] + _LABEL_HEIGHT)
    ceiling = 1 - _LABEL_HEIGHT / 2
    for place in reversed(order):
        moved[place] = min(moved[place], ceiling)
        ceiling = moved[place] - _LABEL_HEIGHT
    return moved
