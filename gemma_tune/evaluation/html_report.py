"""Makes the HTML of reports: one file each, which loads nothing from elsewhere."""

import difflib
import html
import io
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

from gemma_tune.evaluation.answers import WORD_PATTERN

_PIECE = re.compile(rf"\s*(?:{WORD_PATTERN}|[^\w\s])")
_LEAST_IN_COMMON = 0.5  # Ratio of words, from which a difference can be read word by word.
_MAX_CHARACTERS = 2000  # Of a text, so that a report of many answers stays small.
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --good: #2b8a3e; --bad: #c92a2a; }
@media (prefers-color-scheme: dark) { :root { --good: #69db7c; --bad: #ff8787; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; }
th, td { border-bottom: 1px solid var(--line); padding: .45rem .6rem; text-align: left; vertical-align: top; }
th { font-weight: 600; }
table.figures { width: auto; }
.figures :is(th, td):not(:first-child) { text-align: right; font-variant-numeric: tabular-nums; }
.figures :is(th, td):first-child { position: sticky; left: 0; background: Canvas; overflow-wrap: anywhere; }
.figures :is(th, td):first-child { min-width: 7rem; }
figure { margin: 1rem 0; background: white; border-radius: .5rem; padding: .5rem; overflow-x: auto; }
figure svg { width: 100%; height: auto; min-width: 36rem; }
.charts { display: grid; gap: 1rem; margin: 1rem 0; }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); }
.charts figure { background: none; padding: 0; margin: 0; max-width: 34rem; }
.charts svg { min-width: 0; } .charts svg text { font-family: inherit !important; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1rem 0; }
.card { background: var(--soft); border-radius: .5rem; padding: .6rem .8rem; }
.card span, .card small { display: block; opacity: .75; font-size: .85rem; }
.card b { font-size: 1.4rem; font-variant-numeric: tabular-nums; }
.answers td { width: 25%; overflow-wrap: anywhere; }
ins, del { text-decoration: none; border-radius: .2rem; padding: 0 .1rem; }
ins { background: #e8590c33; } del { background: #2b8a3e33; opacity: .7; text-decoration: line-through; }
.listing { table-layout: fixed; } .listing th { width: 10rem; } .listing :is(th, td) { overflow-wrap: anywhere; }
.better { color: var(--good); } .worse { color: var(--bad); }
.counts { display: flex; gap: 1px; min-width: 9rem; } .counts span { padding: 0 .3rem; text-align: center; }
.counts .win { background: #2b8a3e44; } .counts .tie { background: #8883; } .counts .loss { background: #c92a2a44; }
.note { display: block; opacity: .75; font-size: .85rem; margin-top: .3rem; }
.interval { opacity: .65; font-size: .85em; white-space: nowrap; }
.scroll { overflow-x: auto; } abbr { text-decoration: none; border-bottom: 1px dotted; cursor: help; }
@media (max-width: 40rem) {
  body { margin: 1rem auto; } th, td { padding: .35rem; } .listing th { width: 5.5rem; }
  table.answers, .answers :is(tbody, tr, td) { display: block; width: auto; }
  .answers tr { border-bottom: 2px solid var(--line); padding: .6rem 0; } .answers tr:first-child { display: none; }
  .answers td { border: 0; } .answers td::before { content: attr(data-label); display: block; font-weight: 600; }
}
details { margin-top: .6rem; } details > .scroll { margin-top: .4rem; } summary { cursor: pointer; }
pre { background: var(--soft); padding: 1rem; overflow-x: auto; }
"""


def html_document(title: str, parts: Sequence[str]) -> str:
    """Returns an HTML file whose body is made of `parts`, in the style of all reports."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def html_table(
    rows: Sequence[Sequence[str]], header: Sequence[str] = (), *, css_class: str = "", has_labels: bool = True
) -> str:
    """Returns an HTML table.

    Args:
        rows: Cells of each row, as HTML.
        header: Cells of the first row, as HTML; none without. For `answers` they are escaped texts without tags.
        css_class: Class of the table: `figures` aligns all columns but the first to the right; `answers` puts the cells
            of a row below each other on a phone; `listing` has narrow labels.
        has_labels: Whether the first cell of a row is its label.
    """
    lines = ["".join(f"<th>{cell}</th>" for cell in header)] if header else []
    for row in rows:
        cells = [
            f'<td data-label="{label}">{cell}</td>' if label else f"<td>{cell}</td>"
            for cell, label in itertools.zip_longest(row, header if css_class == "answers" else (), fillvalue="")
        ]
        if has_labels:
            cells[0] = f"<th>{row[0]}</th>"
        lines.append("".join(cells))
    opening = f"<table class={css_class}>" if css_class else "<table>"
    return f"<div class=scroll>{opening}" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"


def coloured_difference(answer: str, reference: str) -> str:
    """Returns an answer as HTML: its words that the reference lacks are marked, and those that it lacks are struck out.

    An answer with less than half in common is another one: it is marked as a whole. Long texts are cut.
    """
    answer, reference = cut_text(answer), cut_text(reference)
    ours, wanted = (_PIECE.findall(text) for text in (answer, reference))
    matcher = difflib.SequenceMatcher(None, ours, wanted, False)
    if matcher.ratio() < _LEAST_IN_COMMON:
        return f"<ins>{html.escape(answer)}</ins>"
    parts = []
    for kind, start, end, wanted_start, wanted_end in matcher.get_opcodes():
        text, missing = (html.escape("".join(each)) for each in (ours[start:end], wanted[wanted_start:wanted_end]))
        parts += [text] if kind == "equal" else [f"<ins>{text}</ins>" if text else ""]
        parts += [f"<del>{missing}</del>"] if kind != "equal" and missing else []
    return "".join(parts)


def difference_legend(reference: str) -> str:
    """Returns a paragraph that says what the colours of `coloured_difference` mean.

    Args:
        reference: Name of what answers are compared with.
    """
    name = html.escape(reference)
    return (
        f"<p><small><ins>Coloured</ins>: words that {name} doesn't have, or an answer with less than half in common "
        f"with it. <del>Struck out</del>: words that only {name} has.</small></p>"
    )


def figure_with_interval(value: float, low: float, high: float) -> str:
    """Returns a figure and its interval, if there is one, as HTML: to three digits below 10, to one above."""
    digits = 3 if abs(value) < 10 else 1
    if math.isnan(low):
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} <span class=interval>[{low:.{digits}f}, {high:.{digits}f}]</span>"


def counts_bar(num_wins: int, num_ties: int, num_losses: int) -> str:
    """Returns wins, ties and losses as a bar whose parts are as wide as their counts, with the counts in them."""
    parts = (
        f'<span class={name} style="flex: {count} 0 auto" title="{count} {label}">{count}</span>'
        for name, label, count in (("win", "wins", num_wins), ("tie", "ties", num_ties), ("loss", "losses", num_losses))
        if count
    )
    return f"<div class=counts>{''.join(parts)}</div>"


def breakable_name(name: str) -> str:
    """Returns a name as HTML, which may be broken behind `_` and `/` and before `@` where there is little room."""
    return html.escape(name).replace("_", "_<wbr>").replace("/", "/<wbr>").replace("@", "<wbr>@")


def cut_text(text: str) -> str:
    """Returns a text that is short enough for a report."""
    return text if len(text) <= _MAX_CHARACTERS else text[:_MAX_CHARACTERS] + "…"


def card_grid(cards: Sequence[tuple[str, str, str]]) -> str:
    """Returns cards side by side, as many as fit, from their label, value and note, which are HTML."""
    texts = (
        f"<div class=card><span>{label}</span><b>{value}</b><small>{note}</small></div>" for label, value, note in cards
    )
    return f"<div class=cards>{''.join(texts)}</div>" if cards else ""


def chart_grid(charts: Sequence[str]) -> str:
    """Returns SVG charts side by side, as many as fit; on a phone below each other."""
    figures = "".join(f"<figure>{chart}</figure>" for chart in charts)
    return f"<div class=charts>{figures}</div>" if charts else ""


def as_svg(figure: Any, follows_theme: bool = False) -> str:
    """Returns a matplotlib figure as an SVG element for an HTML file.

    Args:
        figure: The figure.
        follows_theme: Whether its background is the page's, and what is black has the color of the page's text. Texts
            then stay texts, in the page's font.
    """
    import matplotlib

    buffer = io.StringIO()
    # The salt makes IDs the same each time, and different from those of other charts with another title.
    titles = "".join(axes.get_title(loc="left") for axes in figure.axes)
    with matplotlib.rc_context({"svg.hashsalt": titles, "svg.fonttype": "none" if follows_theme else "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=follows_theme)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    if follows_theme:
        text = text.replace("#000000", "currentColor").replace("<text ", '<text fill="currentColor" ')
    return text
