"""Writes the files of a comparison: `comparison.json`, `comparison.png`, `comparison.md` and `comparison.html`."""

import html
import json
import re
from collections.abc import Sequence
from pathlib import Path

from gemma_tune.evaluation.comparison_chart import draw_comparison
from gemma_tune.evaluation.comparison_figures import FidelityReport, figure_rows, notes, summaries
from gemma_tune.evaluation.html_report import (
    as_svg,
    breakable_name,
    coloured_difference,
    difference_legend,
    html_document,
    html_table,
)
from gemma_tune.runtime.atomic_files import write_text

JSON_FILE, CHART_FILE, MARKDOWN_FILE = "comparison.json", "comparison.png", "comparison.md"
HTML_FILE = "comparison.html"


def write_comparison(folder: Path, report: FidelityReport) -> None:
    """Writes the files of a comparison, over those of an earlier one.

    Raises:
        OSError: A file can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figure = draw_comparison(report)
    texts = {
        JSON_FILE: json.dumps(report.to_dict(), indent=2, ensure_ascii=False) + "\n",
        MARKDOWN_FILE: as_markdown(report),
        HTML_FILE: as_html(report, as_svg(figure)),
    }
    figure.savefig(folder / CHART_FILE)
    for name, text in texts.items():
        write_text(folder / name, text)


def as_markdown(report: FidelityReport) -> str:
    """Returns the report in Markdown: the table, the notes and the answers."""
    names = [model.name for model in report.models]
    lines = [f"## Compared with {names[0]}", "", f"{report.scope}.", "", f"![chart]({CHART_FILE})", ""]
    lines += _markdown_table(["", f"{names[0]} (reference)", *names[1:]], figure_rows(report))
    lines += ["", *(f"- {note}" for note in notes(report))]
    for index, (question, wanted) in enumerate(zip(report.questions, report.wanted_answers, strict=True)):
        rows = [("wanted answer", [wanted]), *((model.name, [model.answers[index]]) for model in report.models)]
        lines += ["", f"**{_one_line(question)}**", "", *_markdown_table(["model", "answer"], rows)]
    return "\n".join(lines) + "\n"


def as_html(report: FidelityReport, chart: str) -> str:
    """Returns the report as an HTML file.

    Args:
        report: Figures of the models.
        chart: Chart as an SVG element.
    """
    name = html.escape(report.reference.name)
    parts = [
        f"<h1>Compared with {name}</h1><p>{html.escape(report.scope)}.</p>",
        "<ul>" + "".join(f"<li>{html.escape(sentence)}</li>" for sentence in summaries(report)) + "</ul>",
        f"<figure>{chart}</figure>",
        _html_figures(report),
        "".join(f"<small>{html.escape(note)}<br></small>" for note in notes(report)),
        _html_answers(report),
    ]
    return html_document(f"gemma_tune: compared with {report.reference.name}", parts)


def first_difference(text: str, reference: str) -> int:
    """Returns the position in `text` of the first word that differs from the reference's, or len(text)."""
    position = 0
    for match, word in zip(re.finditer(r"\S+\s*", text), reference.split(), strict=False):
        if match[0].rstrip() != word:
            return match.start()
        position = match.end()
    return position


def _html_figures(report: FidelityReport) -> str:
    names = [html.escape(model.name) + ("" if model.divergence else "<br>(reference)") for model in report.models]
    rows = [[label, *map(html.escape, texts)] for label, texts in figure_rows(report)]
    return html_table(rows, ("", *names), css_class="figures")


def _html_answers(report: FidelityReport) -> str:
    if not report.questions:
        return ""
    parts = [f"<h2>Answers</h2>{difference_legend(f'the answer of {report.reference.name}')}"]
    for index, (question, wanted) in enumerate(zip(report.questions, report.wanted_answers, strict=True)):
        rows = [("wanted answer", html.escape(wanted))]
        for model in report.models:  # The reference's own answer has no difference from itself.
            text = coloured_difference(model.answers[index], report.reference.answers[index])
            rows.append((breakable_name(model.name), text))
        parts.append(f"<h3>{html.escape(question)}</h3>{html_table(rows, css_class='listing')}")
    return "".join(parts)


def _markdown_table(header: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    lines = [header, ["---", *["---:" if len(header) > 2 else "---"] * (len(header) - 1)]]
    lines += [[label, *texts] for label, texts in rows]
    return [f"| {' | '.join(_one_line(cell) for cell in line)} |" for line in lines]


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
