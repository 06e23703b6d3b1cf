"""Writes a run's report: one HTML file with its metrics, curves, answers and settings."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemma_tune.evaluation.html_report import as_svg, html_document, html_table
from gemma_tune.runtime.atomic_files import write_text
from gemma_tune.settings import flatten

REPORT_FILE = "report.html"


def write_report(
    workdir: Path, config: dict[str, Any], result: dict[str, Any], metrics: Sequence[dict[str, Any]]
) -> Path:
    """Writes report.html, and returns its path.

    Args:
        workdir: Workdir of the run.
        config: Settings of the run, from `Config.to_dict()`.
        result: Result of the run, from `RunResult.to_dict()`.
        metrics: Metrics of the run, as in the lines of metrics.jsonl.
    """
    parts = [
        f"<h1>{html.escape(config['model']['source'])} tuned on {html.escape(config['data']['source'])}</h1>",
        _figures(result),
        f"<figure>{_curves(metrics)}</figure>" if metrics else "",
        _answers(result["samples"]),
        _data(result["data"]),
        f"<details><summary>Settings</summary><pre>{html.escape(_settings(config))}</pre></details>",
    ]
    path = workdir / REPORT_FILE
    write_text(path, html_document("gemma_tune report", parts))
    return path


def _figures(result: dict[str, Any]) -> str:
    before, after = result["heldout_before"], result["heldout_after"]
    rows = []
    for name, label, style in (
        ("loss", "Held-out loss", ".4f"),
        ("perplexity", "Held-out perplexity", ".2f"),
        ("token_accuracy", "Token accuracy", ".1%"),
    ):
        if name in before and name in after:
            rows.append((label, format(before[name], style), format(after[name], style)))
    table = html_table(rows, ("", "before", "after"), css_class="figures") if rows else ""
    scored = (
        f"<p>{result['num_answers_right']} of {result['num_answers_scored']} held-out questions got the wanted "
        "answer.</p>"
        if result["num_answers_scored"]
        else ""
    )
    steps = (
        f"<p>{result['num_steps']} steps, best at step {result['best_step']}; "
        f"{result['num_trainable_parameters']:,} trained parameters.</p>"
    )
    return table + scored + steps


def _curves(metrics: Sequence[dict[str, Any]]) -> str:
    """Returns a chart of training and held-out loss and of the learning rate, as SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    losses, rates = figure.subplots(1, 2, width_ratios=(2, 1))
    steps = [row for row in metrics if "loss" in row]
    heldout = [row for row in metrics if "heldout_loss" in row]
    losses.plot(
        [row["step"] for row in steps], [row["loss"] for row in steps], color="#7aa6da", linewidth=1.2, label="training"
    )
    losses.plot(
        [row["step"] for row in heldout],
        [row["heldout_loss"] for row in heldout],
        color="#c0392b",
        marker="o",
        markersize=4,
        label="held out",
    )
    losses.set(xlabel="step", ylabel="loss (nats per token)", ylim=(0, None))
    losses.legend(frameon=False)
    rates.plot([row["step"] for row in steps], [row["learning_rate"] for row in steps], color="#555")
    rates.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (losses, rates):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return as_svg(figure)


def _answers(samples: Sequence[dict[str, str]]) -> str:
    if not samples:
        return ""
    columns = {
        "question": "Question",
        "base_answer": "Base model",
        "tuned_answer": "Tuned model",
        "reference": "Wanted answer",
    }
    rows = [[html.escape(sample[name]) for name in columns] for sample in samples]
    table = html_table(rows, tuple(columns.values()), css_class="answers", has_labels=False)
    return f"<h2>Held-out questions</h2>{table}"


def _data(data: dict[str, Any]) -> str:
    labels = {
        "num_rows": "rows read",
        "num_unreadable": "unreadable",
        "num_empty": "empty",
        "num_control_tokens": "with control tokens",
        "num_duplicates": "duplicates",
        "num_in_heldout": "with a held-out question",
        "num_truncated": "truncated",
        "num_overlong_dropped": "dropped as too long",
        "num_without_target": "without an answer to learn",
        "num_train": "for training",
        "num_heldout": "held out",
    }
    items = ", ".join(f"{data[key]} {label}" for key, label in labels.items() if data[key])
    return f"<h2>Data</h2><p>{html.escape(items)}.</p>"


def _settings(config: dict[str, Any]) -> str:
    return "\n".join(f"{path} = {value!r}" for path, value in flatten(config).items())
