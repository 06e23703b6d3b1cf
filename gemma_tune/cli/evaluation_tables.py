"""Prints an evaluation: figures with their intervals, slices, and the worst answers."""

import math
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from gemma_tune.cli.output import make_table, shorten
from gemma_tune.evaluation.heldout import HELDOUT_LABELS
from gemma_tune.evaluation.metrics.metric import Metric
from gemma_tune.evaluation.resampling import PairedComparison, significant_change
from gemma_tune.evaluation.result import Evaluation, Figure
from gemma_tune.evaluation.suites.check_suite import Check
from gemma_tune.pipeline import SuiteResult

_MAX_SLICES, _MAX_WORST = 8, 3
_STYLES = {"better": "green", "worse": "red", "": ""}
_PASSED = {True: ("passed", "green"), False: ("failed", "red"), None: ("skipped", "yellow")}


def figures_table(evaluation: Evaluation) -> Table:
    """Returns the table of all figures: a row for each metric, a column for each model, and their difference."""
    models = evaluation.models
    title = f"{len(evaluation.cases):,} questions of {evaluation.data_source}"
    headers = [model.name for model in models] + (["win/tie/loss", "p"] if len(models) > 1 else [])
    table = make_table(title, "", *headers)
    for name, label, style in HELDOUT_LABELS:
        if all(name in model.heldout for model in models):
            table.add_row(label, *(format(model.heldout[name], style) for model in models))
    for metric in evaluation.metrics:
        table.add_row(
            metric.name,
            *(figure_text(figure) for figure in evaluation.figures[metric.name]),
            *_comparison_texts(metric, evaluation.comparisons.get(metric.name)),
        )
    return table


def slices_table(evaluation: Evaluation, column: str) -> Table:
    """Returns the table of the worst slices of a column, by the first metric."""
    slices = evaluation.slices[column]
    hidden = len(slices) - _MAX_SLICES
    title = f"{evaluation.metrics[0].name} by {column}" + (
        f": the worst {_MAX_SLICES} of {len(slices)}" if hidden > 0 else ""
    )
    table = make_table(title, column, "questions", *(model.name for model in evaluation.models))
    for each in slices[:_MAX_SLICES]:
        texts = [figure_text(figure) for figure in each.figures]
        table.add_row(Text(shorten(each.value)), str(len(each.rows)), *texts)
    return table


def worst_answers_table(evaluation: Evaluation) -> Table | None:
    """Returns the table of the worst answers that differ from the wanted ones; None if there are none."""
    answers = evaluation.model.answers
    if not any(answers):
        return None
    rows = [row for row in evaluation.worst_rows() if answers[row] != evaluation.cases[row].reference][:_MAX_WORST]
    if not rows or not any(evaluation.cases[row].reference for row in rows):
        return None
    table = make_table("The worst answers", show_lines=True, expand=True)
    for name, ratio in (("question", 3), ("wanted", 4), (evaluation.model.name, 4)):
        table.add_column(name, ratio=ratio)
    for row in rows:
        case = evaluation.cases[row]
        table.add_row(*(Text(shorten(text)) for text in (case.question, case.reference, answers[row])))
    return table


def figure_text(figure: Figure) -> str:
    """Returns a figure with its interval, such as `0.812 [0.73, 0.88]`; in two lines where there is no room for one."""
    if math.isnan(figure.value):
        return "–"
    digits = 3 if abs(figure.value) < 10 else 1
    text = f"{figure.value:.{digits}f}"
    low, high = figure.interval
    return text if math.isnan(low) else f"{text} [{low:.{digits - 1}f},\u00a0{high:.{digits - 1}f}]"


def _comparison_texts(metric: Metric, found: PairedComparison | None) -> Sequence[str | Text]:
    if found is None:
        return ()
    counts = f"{found.num_wins}/{found.num_ties}/{found.num_losses}"
    if metric.is_higher_better is None or math.isnan(found.p_value):
        return ("–", "–")
    return (counts, Text(f"{found.p_value:.4f}", _STYLES[significant_change(metric, found)]))


def checks_table(result: SuiteResult) -> Table:
    """Returns the table of a suite's checks: what must hold, and whether it does."""
    suite = result.suite
    table = make_table(f"{suite.name}: {len(suite.cases):,} questions in {len(suite.parts)} parts", num_left=4)
    for heading in ("part", "must hold", "", "found"):
        table.add_column(heading, overflow="fold")
    last = ""
    for check in result.checks:
        word, style = _PASSED[check.passed]
        table.add_row(
            check.part if check.part != last else "", Text(check.wanted), Text(word, style), Text(check.message)
        )
        last = check.part
    return table


def failed_rows_table(check: Check) -> Table:
    """Returns the table of the questions that speak most against a check."""
    table = make_table(f"{check.part}: {check.wanted}", show_lines=True, expand=True)
    for heading, ratio in (("question", 3), ("answer", 4), ("why", 2)):
        table.add_column(heading, ratio=ratio)
    for row in check.failed_rows[:_MAX_WORST]:
        table.add_row(Text(shorten(row.case.question)), Text(shorten(row.answer)), Text(row.reason))
    return table
