"""Writes an evaluation to a folder: a report for a browser, all answers, and all figures."""

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path

from gemma_tune.evaluation.heldout import HELDOUT_LABELS
from gemma_tune.evaluation.html_report import coloured_difference, figure_with_interval, html_document, html_table
from gemma_tune.evaluation.metrics.metric import Metric
from gemma_tune.evaluation.resampling import significant_change
from gemma_tune.evaluation.result import Evaluation, Figure
from gemma_tune.runtime.atomic_files import write_json, write_lines, write_text

REPORT_FILE, FIGURES_FILE, ANSWERS_FILE = "evaluation.html", "evaluation.json", "answers.jsonl"
_UNITS = {"loss": ", nats per token"}
_MAX_ANSWERS, _MAX_SLICES = 200, 40


def write_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Writes `evaluation.html`, `evaluation.json` and `answers.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FIGURES_FILE, evaluation.to_dict())
    lines = (json.dumps(row, ensure_ascii=False, default=str) for row in evaluation.answer_rows())
    write_lines(folder / ANSWERS_FILE, lines)
    write_text(folder / REPORT_FILE, evaluation_html(evaluation))


def evaluation_html(evaluation: Evaluation) -> str:
    """Returns the report: figures with intervals, slices, and the answers, the worst first."""
    names = " and ".join(model.name for model in evaluation.models)
    parts = [
        f"<h1>{html.escape(names)} on {html.escape(evaluation.data_source)}</h1>",
        f"<p>{len(evaluation.cases):,} questions. Intervals are of 95 %.</p>",
        _figures(evaluation),
        *(_slices(evaluation, column) for column in evaluation.slice_columns),
        _answers(evaluation),
    ]
    return html_document("gemma_tune evaluation", parts)


def _figures(evaluation: Evaluation) -> str:
    models = evaluation.models
    has_pair = len(models) > 1
    header = [
        "",
        *(html.escape(model.name) for model in models),
        *(["difference", "wins, ties, losses", "p"] if has_pair else []),
    ]
    rows = [
        [
            label + _UNITS.get(name, ""),
            *(format(model.heldout[name], style) for model in models),
            *([""] * 3 if has_pair else []),
        ]
        for name, label, style in HELDOUT_LABELS
        if all(name in model.heldout for model in models)
    ]
    for metric in evaluation.metrics:
        label = f'<abbr title="{html.escape(metric.description)}">{html.escape(metric.name)}</abbr>'
        rows.append(
            [
                label,
                *(_figure(figure) for figure in evaluation.figures[metric.name]),
                *(_comparison(evaluation, metric) if has_pair else []),
            ]
        )
    return html_table(rows, header, css_class="figures")


def _comparison(evaluation: Evaluation, metric: Metric) -> Sequence[str]:
    found = evaluation.comparisons[metric.name]
    if math.isnan(found.difference):
        return ("–", "–", "–")
    counts = f"{found.num_wins}, {found.num_ties}, {found.num_losses}"
    p_value = f"{found.p_value:.4f}"
    if change := significant_change(metric, found):
        p_value = f"<strong class={change}>{p_value}</strong>"
    return (figure_with_interval(found.difference, *found.interval), counts, p_value)


def _slices(evaluation: Evaluation, column: str) -> str:
    metric = evaluation.metrics[0]
    slices = evaluation.slices[column]
    header = [html.escape(column), "questions", *(html.escape(model.name) for model in evaluation.models)]
    rows = [
        [html.escape(each.value), str(len(each.rows)), *(_figure(figure) for figure in each.figures)]
        for each in slices[:_MAX_SLICES]
    ]
    more = f"<p>{len(slices) - _MAX_SLICES} more are in {FIGURES_FILE}.</p>" if len(slices) > _MAX_SLICES else ""
    title = f"<h2>{html.escape(metric.name)} by {html.escape(column)}, the worst first</h2>"
    return title + html_table(rows, header, css_class="figures") + more


def _answers(evaluation: Evaluation) -> str:
    has_references = any(case.reference for case in evaluation.cases)
    header = [
        "question",
        *(["wanted answer"] if has_references else []),
        *(html.escape(m.name) for m in evaluation.models),
    ]
    rows = []
    for row in evaluation.worst_rows()[:_MAX_ANSWERS]:
        case = evaluation.cases[row]
        answers = [_answer(model.answers[row], case.reference) for model in evaluation.models]
        wanted = [html.escape(case.reference)] if has_references else []
        rows.append([html.escape(case.question), *wanted, *answers])
    hidden = len(evaluation.cases) - len(rows)
    more = f"<p>{hidden:,} more are in {ANSWERS_FILE}.</p>" if hidden else ""
    return f"<h2>Answers, the worst first</h2>{html_table(rows, header, css_class='answers', has_labels=False)}{more}"


def _answer(answer: str, reference: str) -> str:
    return coloured_difference(answer, reference) if reference else html.escape(answer)


def _figure(figure: Figure) -> str:
    return "–" if math.isnan(figure.value) else figure_with_interval(figure.value, *figure.interval)
