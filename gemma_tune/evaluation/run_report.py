"""Writes a run's report: one HTML file with its figures, curves, data, answers and settings."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gemma_tune.config import Config
from gemma_tune.data.mixture import source_labels
from gemma_tune.data.rows.row_options import ROW_CHANGES
from gemma_tune.evaluation.evaluation_report import WANTED_ANSWER, answers_html, figures_html, slices_html
from gemma_tune.evaluation.heldout import HELDOUT_LABELS
from gemma_tune.evaluation.html_report import (
    card_grid,
    chart_grid,
    coloured_difference,
    cut_text,
    difference_legend,
    html_document,
    html_table,
)
from gemma_tune.evaluation.resampling import mean_interval
from gemma_tune.evaluation.result import Evaluation
from gemma_tune.evaluation.run_charts import length_chart, run_charts
from gemma_tune.runtime.atomic_files import write_text
from gemma_tune.settings import flatten

REPORT_FILE = "report.html"
_MAX_SAMPLES = 50
_CHART_NOTE = "<p><small>Dotted: the step whose weights were saved. Vertical bars: intervals of 95 %.</small></p>"
_COUNTS = {
    "num_rows": "rows read",
    "num_unreadable": "unreadable",
    "num_empty": "empty",
    "num_control_tokens": "with control tokens",
    "num_duplicates": "duplicates",
    "num_near_duplicates": "near duplicates",
    "num_in_heldout": "with a held-out question",
    "num_cut_up": "documents in pieces",
    "num_truncated": "shortened",
    "num_overlong_dropped": "dropped as too long",
    "num_without_target": "no answer fits",
    "num_tokens_lost": "tokens cut off or dropped",
    "num_train": "for training",
    "num_heldout": "held out",
}


class AnswerHistory(NamedTuple):
    """Answers to one question at several steps of training.

    Attributes:
        question: The question.
        reference: The wanted answer.
        answers: Step and answer, in order.
    """

    question: str
    reference: str
    answers: Sequence[tuple[int, str]]


class RunReport(NamedTuple):
    """What the report of a run shows.

    Attributes:
        config: Settings of the run, from `Config.to_dict()`.
        result: Result of the run, from `RunResult.to_dict()`.
        metrics: Metrics of the run, as in the lines of metrics.jsonl.
        lengths: [n] tokens in each example.
        evaluation: Held-out figures and answers `before` and `after` training.
        histories: Answers at several steps.
    """

    config: Mapping[str, Any]
    result: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    lengths: np.ndarray
    evaluation: Evaluation
    histories: Sequence[AnswerHistory] = ()


def write_report(workdir: Path, run: RunReport) -> Path:
    """Writes report.html in the run's workdir, and returns its path."""
    config, result, evaluation = run.config, run.result, run.evaluation
    charts = run_charts(run.metrics, result["heldout_intervals"], result["best_step"]) if run.metrics else []
    figures = figures_html(evaluation)
    answers_file = f"answers/step_{result['best_step']:06d}.jsonl"
    parts = [
        f"<h1>{html.escape(config['model']['source'])} tuned on {html.escape(config['data']['source'])}</h1>",
        _summary(config, result, run.metrics),
        card_grid(_cards(result)),
        chart_grid(charts),
        _CHART_NOTE if result["heldout_after"] else "",
        f"<h2>Held-out figures</h2>{figures}" if figures else "",
        *(slices_html(evaluation, column) for column in evaluation.slice_columns),
        answers_html(evaluation, answers_file) if evaluation.cases else _samples(result["samples"]),
        _histories(run.histories),
        _data(config, result, run.lengths),
        _settings(config),
    ]
    path = workdir / REPORT_FILE
    write_text(path, html_document("gemma_tune report", parts))
    return path


def _summary(config: Mapping[str, Any], result: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    seconds = sum(row.get("step_seconds", 0.0) for row in metrics)
    time = f"{seconds / 60:.1f} minutes" if seconds >= 60 else f"{seconds:.1f} seconds"
    texts = [
        f"{config['training']['method']}, {result['num_trainable_parameters']:,} trained parameters",
        f"{result['num_steps']} steps in {time}",
        f"weights of step {result['best_step']}"
        + (f", the best by {result['best_by'].replace('_', ' ')}" if result["heldout_after"] else ""),
    ]
    return f"<p>{html.escape('; '.join(texts))}.</p>"


def _cards(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Returns label, value and note of each card."""
    before, after = result["heldout_before"], result["heldout_after"]
    cards = [
        (f"held-out {label}", format(after[name], style), f"before: {before[name]:{style}}")
        for name, label, style in HELDOUT_LABELS
        if name in before and name in after and name != "perplexity"
    ]
    for name, each in result["heldout_intervals"].get("after", {}).items():
        first = result["heldout_intervals"].get("before", {}).get(name)
        note = f"before: {first['value']:.3f}" if first else ""
        cards.append((f"held-out {html.escape(name)}", f"{each['value']:.3f}", note))
    if result["num_answers_scored"]:
        num_right, num_scored = result["num_answers_right"], result["num_answers_scored"]
        low, high = mean_interval([1.0] * num_right + [0.0] * (num_scored - num_right))
        cards.append(
            (
                "right answers",
                f"{num_right} of {num_scored}",
                "" if np.isnan(low) else f"95 % interval {low:.0%} to {high:.0%}",
            )
        )
    return cards


def _samples(samples: Sequence[Mapping[str, str]]) -> str:
    if not samples:
        return ""
    rows = [
        [
            html.escape(sample["question"]),
            html.escape(cut_text(sample["reference"])),
            *(coloured_difference(sample[name], sample["reference"]) for name in ("base_answer", "tuned_answer")),
        ]
        for sample in samples[:_MAX_SAMPLES]
    ]
    header = ("question", "wanted answer", "base model", "tuned model")
    more = f"<p>{len(samples) - len(rows)} more are in samples.json.</p>" if len(samples) > len(rows) else ""
    table = html_table(rows, header, css_class="answers", has_labels=False)
    return f"<h2>Answers to held-out questions</h2>{difference_legend(WANTED_ANSWER)}{table}{more}"


def _histories(histories: Sequence[AnswerHistory]) -> str:
    """Returns how answers changed during training, a closed section for each question."""
    parts = []
    for each in histories:
        rows = [(f"step {step}", coloured_difference(answer, each.reference)) for step, answer in each.answers]
        rows.append(("wanted", html.escape(cut_text(each.reference))))
        table = html_table(rows, css_class="listing")
        parts.append(f"<details><summary>{html.escape(cut_text(each.question))}</summary>{table}</details>")
    return f"<h2>How answers changed</h2>{''.join(parts)}" if parts else ""


def _data(config: Mapping[str, Any], result: Mapping[str, Any], lengths: np.ndarray) -> str:
    settings, data = config["data"], result["data"]
    sources = [("training", settings["source"]), ("held out", settings["eval_source"])]
    rows = [(label, html.escape(source)) for label, source in sources if source]
    rows += [(label, f"{data[key]:,}") for key, label in _COUNTS.items() if data.get(key)]
    changes = data.get("row_changes", {})
    rows += [(words, f"{changes[name]:,}") for name, words in ROW_CHANGES.items() if changes.get(name)]
    rows += [("note", html.escape(note)) for note in data.get("notes", ())]
    if "length_tokens" in data:
        found = data["length_tokens"]
        rows.append(
            (
                "tokens in an example",
                f"{found['min']} to {found['max']}, mean {found['mean']}, median {found['median']:g}",
            )
        )
    chart = chart_grid([length_chart(lengths, settings["max_length"])]) if len(lengths) else ""
    return f"<h2>Data</h2>{html_table(rows, css_class='listing')}{_sources(result)}{chart}"


def _sources(result: Mapping[str, Any]) -> str:
    """Returns the examples and the held-out loss of each source, if there are several."""
    sources = result["data"].get("sources", [])
    if len(sources) < 2:
        return ""
    header = ("source", "training", "held out", "held-out loss before", "after")
    rows = []
    for source, label in zip(sources, source_labels([each["name"] for each in sources]), strict=True):
        losses = (result[when].get(f"loss/{label}") for when in ("heldout_before", "heldout_after"))
        rows.append(
            [
                html.escape(source["name"]),
                f"{source['num_train']:,}",
                f"{source['num_heldout']:,}",
                *("" if loss is None else f"{loss:.4f}" for loss in losses),
            ]
        )
    return f"<h3>Sources</h3>{html_table(rows, header, css_class='figures')}"


def _settings(config: Mapping[str, Any]) -> str:
    defaults, settings = flatten(Config().to_dict()), flatten(config)
    changed = {path: value for path, value in settings.items() if value != defaults.get(path)}
    parts = [f"<h2>Settings</h2>{_listing('Changed from the defaults', changed)}", _listing("All", settings)]
    return "".join(parts)


def _listing(title: str, settings: Mapping[str, Any]) -> str:
    lines = "\n".join(f"{path} = {value!r}" for path, value in settings.items())
    return f"<details><summary>{title} ({len(settings)})</summary><pre>{html.escape(lines)}</pre></details>"
