"""Writes a run's report: one HTML file with its figures, curves, data, answers and settings."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gemma_tune.config import Config
from gemma_tune.evaluation.html_report import (
    card_grid,
    chart_grid,
    coloured_difference,
    figure_with_interval,
    html_document,
    html_table,
)
from gemma_tune.evaluation.run_charts import length_chart, run_charts
from gemma_tune.runtime.atomic_files import write_text
from gemma_tune.settings import flatten

REPORT_FILE = "report.html"
_HELDOUT = (("loss", "loss", ".4f"), ("perplexity", "perplexity", ".2f"), ("token_accuracy", "token accuracy", ".1%"))
_MAX_SAMPLES, _MAX_CHARACTERS = 50, 2000  # So that the file stays below a megabyte.
_COUNTS = {
    "num_rows": "rows read",
    "num_unreadable": "unreadable",
    "num_empty": "empty",
    "num_control_tokens": "with control tokens",
    "num_duplicates": "duplicates",
    "num_in_heldout": "with a held-out question",
    "num_truncated": "shortened",
    "num_overlong_dropped": "dropped as too long",
    "num_without_target": "without an answer to learn",
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


def write_report(
    workdir: Path,
    config: dict[str, Any],
    result: dict[str, Any],
    metrics: Sequence[dict[str, Any]],
    lengths: np.ndarray,
    histories: Sequence[AnswerHistory] = (),
) -> Path:
    """Writes report.html, and returns its path.

    Args:
        workdir: Workdir of the run.
        config: Settings of the run, from `Config.to_dict()`.
        result: Result of the run, from `RunResult.to_dict()`.
        metrics: Metrics of the run, as in the lines of metrics.jsonl.
        lengths: [n] tokens in each example.
        histories: Answers at several steps.
    """
    charts = run_charts(metrics, result["heldout_intervals"], result["best_step"]) if metrics else []
    parts = [
        f"<h1>{html.escape(config['model']['source'])} tuned on {html.escape(config['data']['source'])}</h1>",
        _summary(config, result, metrics),
        card_grid(_cards(result)),
        chart_grid(charts),
        _figures(result),
        _answers(result["samples"]),
        _histories(histories),
        _data(config, result["data"], lengths),
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
        f"weights of step {result['best_step']}, the best by {result['best_by'].replace('_', ' ')}",
    ]
    return f"<p>{html.escape('; '.join(texts))}.</p>"


def _cards(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Returns label, value and note of each card."""
    before, after = result["heldout_before"], result["heldout_after"]
    cards = [
        (f"held-out {label}", format(after[name], style), f"before: {before[name]:{style}}")
        for name, label, style in _HELDOUT
        if name in before and name in after and name != "perplexity"
    ]
    for name, each in result["heldout_intervals"].get("after", {}).items():
        first = result["heldout_intervals"].get("before", {}).get(name)
        note = f"before: {first['value']:.3f}" if first else ""
        cards.append((f"held-out {html.escape(name)}", f"{each['value']:.3f}", note))
    if result["num_answers_scored"]:
        share = f"{result['num_answers_right']} of {result['num_answers_scored']}"
        cards.append(("right answers", share, f"mean word F1 {result['mean_answer_f1']:.3f}"))
    return cards


def _figures(result: Mapping[str, Any]) -> str:
    before, after, intervals = result["heldout_before"], result["heldout_after"], result["heldout_intervals"]
    if not (before and after):
        return ""
    rows = [
        (label, format(before[name], style), format(after[name], style))
        for name, label, style in _HELDOUT
        if name in before and name in after
    ]
    known = [name for name, _, _ in _HELDOUT]
    for name in dict.fromkeys((*before, *after)):
        if name not in known and name != "num_tokens":
            cells = (
                _figure(name, values, intervals.get(when, {}))
                for when, values in (("before", before), ("after", after))
            )
            rows.append((html.escape(name), *cells))
    note = "<p><small>Intervals are of 95 %.</small></p>" if any(intervals.values()) else ""
    return "<h2>Held-out figures</h2>" + html_table(rows, ("", "before", "after"), css_class="figures") + note


def _figure(name: str, values: Mapping[str, float], intervals: Mapping[str, Mapping[str, float]]) -> str:
    if name in intervals:
        return figure_with_interval(**intervals[name])
    return f"{values[name]:.3f}" if name in values else "–"


def _answers(samples: Sequence[Mapping[str, str]]) -> str:
    if not samples:
        return ""
    rows = [
        [
            html.escape(sample["question"]),
            html.escape(_cut(sample["reference"])),
            *(_coloured(sample[name], sample["reference"]) for name in ("base_answer", "tuned_answer")),
        ]
        for sample in samples[:_MAX_SAMPLES]
    ]
    header = ("question", "wanted answer", "base model", "tuned model")
    more = f"<p>{len(samples) - len(rows)} more are in samples.json.</p>" if len(samples) > len(rows) else ""
    legend = (
        "<p><small><ins>Coloured</ins>: words that the wanted answer doesn't have. <del>Struck out</del>: words that "
        "are missing.</small></p>"
    )
    table = html_table(rows, header, css_class="answers", has_labels=False)
    return f"<h2>Answers to held-out questions</h2>{legend}{table}{more}"


def _histories(histories: Sequence[AnswerHistory]) -> str:
    """Returns how answers changed during training, a closed section for each question."""
    parts = []
    for each in histories:
        rows = [(f"step {step}", _coloured(answer, each.reference)) for step, answer in each.answers]
        rows.append(("wanted", html.escape(_cut(each.reference))))
        table = html_table(rows, css_class="listing")
        parts.append(f"<details><summary>{html.escape(_cut(each.question))}</summary>{table}</details>")
    return f"<h2>How answers changed</h2>{''.join(parts)}" if parts else ""


def _coloured(answer: str, reference: str) -> str:
    return coloured_difference(_cut(answer), _cut(reference))


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_CHARACTERS else text[:_MAX_CHARACTERS] + "…"


def _data(config: Mapping[str, Any], data: Mapping[str, Any], lengths: np.ndarray) -> str:
    settings = config["data"]
    sources = [("training", settings["source"]), ("held out", settings["eval_source"])]
    rows = [(label, html.escape(source)) for label, source in sources if source]
    rows += [(label, f"{data[key]:,}") for key, label in _COUNTS.items() if data[key]]
    if "length_tokens" in data:
        found = data["length_tokens"]
        rows.append(
            (
                "tokens in an example",
                f"{found['min']} to {found['max']}, mean {found['mean']}, median {found['median']:g}",
            )
        )
    chart = chart_grid([length_chart(lengths, settings["max_length"])]) if len(lengths) else ""
    return f"<h2>Data</h2>{html_table(rows, css_class='listing')}{chart}"


def _settings(config: Mapping[str, Any]) -> str:
    defaults, settings = flatten(Config().to_dict()), flatten(config)
    changed = {path: value for path, value in settings.items() if value != defaults.get(path)}
    parts = [f"<h2>Settings</h2>{_listing('Changed from the defaults', changed)}", _listing("All", settings)]
    return "".join(parts)


def _listing(title: str, settings: Mapping[str, Any]) -> str:
    lines = "\n".join(f"{path} = {value!r}" for path, value in settings.items())
    return f"<details><summary>{title} ({len(settings)})</summary><pre>{html.escape(lines)}</pre></details>"
