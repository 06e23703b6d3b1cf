"""Makes the HTML of reports: one file each, which loads nothing from elsewhere."""

import html
import io
from collections.abc import Sequence
from typing import Any

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; }
th, td { border-bottom: 1px solid var(--line); padding: .45rem .6rem; text-align: left; vertical-align: top; }
th { font-weight: 600; }
table.figures { width: auto; }
.figures :is(th, td):not(:first-child) { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0; background: white; border-radius: .5rem; padding: .5rem; }
figure svg { width: 100%; height: auto; }
.answers td { width: 25%; overflow-wrap: anywhere; } details { margin-top: 1rem; }
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
        header: Cells of the first row, as HTML; none without.
        css_class: Class of the table: `figures` aligns all columns but the first to the right.
        has_labels: Whether the first cell of a row is its label.
    """
    label = "th" if has_labels else "td"
    lines = ["".join(f"<th>{cell}</th>" for cell in header)] if header else []
    lines += [f"<{label}>{first}</{label}>" + "".join(f"<td>{cell}</td>" for cell in rest) for first, *rest in rows]
    opening = f"<table class={css_class}>" if css_class else "<table>"
    return opening + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def as_svg(figure: Any) -> str:
    """Returns a matplotlib figure as an SVG element for an HTML file."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
