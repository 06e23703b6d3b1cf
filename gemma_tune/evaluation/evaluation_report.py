"""Writes an evaluation to a folder: a report for a browser, all answers, and all figures.

The parts of the report are also those of a run's report.
"""

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path

from gemma_tune.evaluation.heldout import HELDOUT_LABELS
from gemma_tune.evaluation.html_report import (
    breakable_name,
    card_grid,
    coloured_difference,
    counts_bar,
    cut_text,
    difference_legend,
    figure_with_interval,
    html_document,
    html_table,
)
from gemma_tune.evaluation.metrics.metric import Metric
from gemma_tune.evaluation.resampling import PairedComparison, row_figures, significant_change
from gemma_tune.evaluation.result import EvaluatedModel, Evaluation, Figure, Slice
from gemma_tune.runtime.atomic_files import write_json, write_lines, write_text

WANTED_ANSWER = "the wanted answer"
REPORT_FILE, FIGURES_FILE, ANSWERS_FILE = "evaluation.html", "evaluation.json", "answers.jsonl"
_OUTCOMES = {"win": "wins", "tie": "ties", "loss": "losses"}
_UNITS = {"loss": ", nats per token"}
_MAX_ANSWERS = 200  # In a report; in each group where answers are in groups, half as many.
_MAX_SLICES, _FIRST_SLICES = 40, 10  # In a report, and of them before one asks for more.
_GROUPS = {"worse": "Worse than {other}", "better": "Better than {other}", "same": "As good as {other}"}


def write_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Writes `evaluation.html`, `evaluation.json` and `answers.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FIGURES_FILE, evaluation.to_dict())
    lines = (json.dumps(row, ensure_ascii=False, default=str) for row in evaluation.answer_rows())
    write_lines(folder / ANSWERS_FILE, lines)
    write_text(folder / REPORT_FILE, evaluation_html(evaluation))


def evaluation_html(evaluation: Evaluation) -> str:
    """Returns the report: figures with intervals and paired tests, slices, and the answers, the worst first."""
    name = evaluation.model.name
    compared = f"{name} compared with {evaluation.models[0].name}" if len(evaluation.models) > 1 else name
    judged = judge_sentence(evaluation)
    parts = [
        f"<h1>{html.escape(compared)}</h1>",
        f"<p>{len(evaluation.cases):,} questions of {html.escape(evaluation.data_source)}.</p>",
        card_grid(_cards(evaluation)),
        "<h2>Figures</h2>",
        figures_html(evaluation),
        f"<p>{html.escape(judged)}</p>" if judged else "",
        *(f"<p>{html.escape(f'{name} was left out: {need}')}</p>" for name, need in evaluation.left_out.items()),
        *(slices_html(evaluation, column) for column in evaluation.slice_columns),
        answers_html(evaluation, f"{ANSWERS_FILE}"),
    ]
    return html_document(f"gemma_tune evaluation: {name}", parts)


def judge_sentence(evaluation: Evaluation) -> str:
    """Returns what a judge found; '' without one."""
    verdicts = evaluation.judge_verdicts
    if verdicts is None:
        return ""
    counts = ", ".join(f"{verdicts.count(outcome)} {name}" for outcome, name in _OUTCOMES.items())
    missing = verdicts.count("unreadable") + verdicts.count("unanswered")
    return (
        f"Judge {evaluation.judge_name}: {evaluation.model.name} has {counts} against {evaluation.models[0].name} "
        f"(p = {verdicts.p_value:.4f}). The judge agrees with itself on {verdicts.agreement:.0%} of the pairs"
        + (f"; {missing} questions have no verdict." if missing else ".")
    )


def figures_html(evaluation: Evaluation) -> str:
    """Returns the table of all figures: a row for each metric, a column for each model, and how they differ."""
    models = evaluation.models
    has_pair = len(models) > 1 and bool(evaluation.metrics)
    header = ["", *(html.escape(model.name) for model in models)]
    header += ["difference", "better, as good, worse", "p"] if has_pair else []
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
        label = f'<abbr title="{html.escape(metric.description)}">{breakable_name(metric.name)}</abbr>'
        figures = [_figure(figure) for figure in evaluation.figures[metric.name]]
        compared = _comparison(metric, evaluation.comparisons[metric.name]) if has_pair else []
        rows.append([label, *figures, *compared])
    if not rows:
        return ""
    texts = ["Intervals are of 95 %."] if evaluation.metrics else []
    if has_pair:
        texts.append(
            "The difference and its p-value are of a paired test: p is how likely such a difference would be by chance "
            "if both were equally good."
        )
    note = f"<p><small>{' '.join(texts)}</small></p>" if texts else ""
    return html_table(rows, header, css_class="figures") + note


def slices_html(evaluation: Evaluation, column: str) -> str:
    """Returns a section with the figure of the first metric for each value of a column, the worst first."""
    metric, slices = evaluation.metrics[0], evaluation.slices[column]
    has_pair = len(evaluation.models) > 1
    header = [html.escape(column), "questions", *(html.escape(model.name) for model in evaluation.models)]
    header += ["difference", "better, as good, worse"] if has_pair else []
    rows = [_slice_cells(metric, each) for each in slices[:_MAX_SLICES]]
    text = f"<h2>{html.escape(metric.name)} by {html.escape(column)}, the worst first</h2>"
    text += html_table(rows[:_FIRST_SLICES], header, css_class="figures")
    if rest := rows[_FIRST_SLICES:]:
        text += f"<details><summary>{len(rest)} more</summary>{html_table(rest, header, css_class='figures')}</details>"
    hidden = len(slices) - len(rows)
    return text + (f"<p>{hidden:,} more are in {FIGURES_FILE}.</p>" if hidden else "")


def answers_html(evaluation: Evaluation, file: str) -> str:
    """Returns a section with the answers, the worst first; those of two models by which one is better.

    Args:
        evaluation: The answers.
        file: Name of the file that has all of them.
    """
    if not any(any(model.answers) for model in evaluation.models):
        return ""
    has_references = any(case.reference for case in evaluation.cases)
    legend = ""
    if has_references or len(evaluation.models) > 1:
        legend = difference_legend(WANTED_ANSWER if has_references else f"the answer of {evaluation.models[0].name}")
    rows, metric = evaluation.worst_rows(), evaluation.ordering_metric
    if len(evaluation.models) < 2 or metric is None:
        title = "Answers, the worst first" if metric else "Answers"
        return f"<h2>{title}</h2>{legend}" + _answer_table(evaluation, rows, file, _MAX_ANSWERS)
    changes = evaluation.row_changes()
    parts, is_open = [f"<h2>Answers by {html.escape(metric.name)}, the worst first</h2>{legend}"], True
    for change, label in _GROUPS.items():
        chosen = [row for row in rows if changes[row] == change]
        if chosen:
            title = html.escape(label.format(other=evaluation.models[0].name))
            table = _answer_table(evaluation, chosen, file, _MAX_ANSWERS // 2)
            parts.append(
                f"<details{' open' if is_open else ''}><summary class={change}>{title}: {len(chosen):,} of "
                f"{len(rows):,}</summary>{table}</details>"
            )
            is_open = False
    return "".join(parts)


def _cards(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    """Returns label, value and note of each card: the most important metric, wins and losses, loss and time."""
    model, other = evaluation.model, evaluation.models[0] if len(evaluation.models) > 1 else None
    cards = []
    if evaluation.metrics:
        metric = evaluation.ordering_metric or evaluation.metrics[0]
        figures, name = evaluation.figures[metric.name], html.escape(metric.name)
        note = f"{html.escape(other.name)}: {_rounded(figures[0].value)}" if other else _interval(figures[-1])
        cards.append((name, _rounded(figures[-1].value), note))
        if other and metric.is_higher_better is not None:
            found = evaluation.comparisons[metric.name]
            cards.append(
                ("better, as good, worse", f"{found.num_wins}, {found.num_ties}, {found.num_losses}", _p_text(found))
            )
    for name, label, style in HELDOUT_LABELS:
        if name != "perplexity" and name in model.heldout:
            note = f"{html.escape(other.name)}: {other.heldout[name]:{style}}" if other else ""
            cards.append((label, format(model.heldout[name], style), note))
    if any(model.answers):
        note = f"{html.escape(other.name)}: {other.seconds:.1f} s" if other else "eight at once"
        cards.append(("time for the answers", f"{model.seconds:.1f} s", note))
    return cards


def _comparison(metric: Metric, found: PairedComparison) -> Sequence[str]:
    if math.isnan(found.difference):
        return ("–", "–", "–")
    difference = figure_with_interval(found.difference, *found.interval)
    if metric.is_higher_better is None:
        return (difference, "–", "–")
    p_value = f"{found.p_value:.4f}"
    if change := significant_change(metric, found):
        p_value = f"<strong class={change}>{p_value}</strong>"
    return (difference, counts_bar(found.num_wins, found.num_ties, found.num_losses), p_value)


def _slice_cells(metric: Metric, each: Slice) -> list[str]:
    compared = _comparison(metric, each.comparison)[:2] if each.comparison else []
    return [breakable_name(each.value), str(len(each.rows)), *map(_figure, each.figures), *compared]


def _answer_table(evaluation: Evaluation, rows: Sequence[int], file: str, most: int) -> str:
    has_references = any(evaluation.cases[row].reference for row in rows)
    names = [html.escape(model.name) for model in evaluation.models]
    header = ["question", *(["wanted answer"] if has_references else []), *names]
    lines = []
    for row in rows[:most]:
        case = evaluation.cases[row]
        wanted = [html.escape(cut_text(case.reference))] if has_references else []
        lines.append([html.escape(cut_text(case.question)), *wanted, *_answer_cells(evaluation, row)])
    hidden = len(rows) - len(lines)
    more = f"<p>{hidden:,} more are in {file}.</p>" if hidden else ""
    return html_table(lines, header, css_class="answers", has_labels=False) + more


def _answer_cells(evaluation: Evaluation, row: int) -> list[str]:
    """Returns each model's answer, coloured by what differs from the wanted one, or from the other model's."""
    reference, first = evaluation.cases[row].reference, evaluation.models[0]
    cells = []
    for model in evaluation.models:
        compared = reference or ("" if model is first else first.answers[row])
        answer = model.answers[row]
        text = coloured_difference(answer, compared) if compared else html.escape(cut_text(answer))
        cells.append(text + _score_note(evaluation, model, row))
    if evaluation.judge_verdicts:
        verdict = evaluation.judge_verdicts.verdicts[row]
        reason = next((text for text in verdict.reasons if text), "")
        cells[-1] += f"<span class=note>{html.escape(cut_text(f'judge: {verdict.outcome}. {reason}'))}</span>"
    return cells


def _score_note(evaluation: Evaluation, model: EvaluatedModel, row: int) -> str:
    metric = evaluation.ordering_metric
    score = float(row_figures(metric, model.statistics[metric.name][row : row + 1])[0]) if metric else math.nan
    return "" if metric is None or math.isnan(score) else f"<span class=note>{metric.name} {_rounded(score)}</span>"


def _p_text(found: PairedComparison) -> str:
    return "" if math.isnan(found.p_value) else f"p = {found.p_value:.4f}"


def _interval(figure: Figure) -> str:
    low, high = figure.interval
    return "" if math.isnan(low) else f"{_rounded(low)} to {_rounded(high)}"


def _rounded(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.{3 if abs(value) < 10 else 1}f}"


def _figure(figure: Figure) -> str:
    return "–" if math.isnan(figure.value) else figure_with_interval(figure.value, *figure.interval)
