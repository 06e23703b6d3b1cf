"""Writes what becomes of a data set as one HTML file: numbers, lengths by source, and samples of what was dropped."""

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gemma_tune.config import Config
from gemma_tune.data import DataReport, Splits, TokenizedExample, TokenizedSplits
from gemma_tune.data.cleaning_report import CUT_REASONS, DROP_REASONS
from gemma_tune.errors import DataError
from gemma_tune.evaluation.html_report import card_grid, chart_grid, cut_text, html_document, html_table
from gemma_tune.evaluation.run_charts import length_chart
from gemma_tune.runtime.atomic_files import disk_errors_as, write_text

_MAX_CHARTS = 12
_NUM_SHOWN = 5
_WHAT_TO_DO = {
    "num_unreadable": "Mend these rows: each message says what was expected.",
    "num_empty": "A question or an answer has no text, so there is nothing to learn.",
    "num_control_tokens": "A turn contains a control token of the chat template, which would end it early.",
    "num_duplicates": "All turns repeat an earlier row but for what --dedup ignores. --dedup=exact or none keeps more.",
    "num_near_duplicates": "Most wording repeats an earlier row. A higher --near_dedup_threshold keeps more.",
    "num_in_heldout": "The question is in the held-out data, where it must be new.",
    "num_overlong_dropped": "The example has more tokens than --max_length. Raise it, or choose another --overlong.",
    "num_without_target": "The question alone fills --max_length, so no token of the answer fits. Raise --max_length.",
    "num_truncated": "The end is cut off at --max_length, and the model doesn't learn that the answer ends there.",
    "num_cut_up": "The document is longer than --max_length. Its pieces hold each of its tokens once.",
}
_LEARNT = "<p><small><ins>Coloured</ins>: what the model learns. The rest is what it reads.</small></p>"


class DataPage(NamedTuple):
    """What the page shows.

    Attributes:
        config: Settings of the data.
        data: Tokenized examples.
        splits: Cleaned examples.
        counts: Number of examples that an epoch has of each training source.
        tokenizer: Tokenizer of the model.
    """

    config: Config
    data: TokenizedSplits
    splits: Splits
    counts: Sequence[int]
    tokenizer: Any


def write_data_page(path: Path, page: DataPage) -> Path:
    """Writes the page and returns its path.

    Raises:
        DataError: It can't be written.
    """
    config, report = page.config, page.data.report
    parts = [
        f"<h1>What {html.escape(config.model.source)} would learn from {html.escape(config.data.source)}</h1>",
        card_grid(_cards(report)),
        _sources(page),
        "<h2>Lengths</h2>",
        chart_grid(_charts(page)),
        *_dropped(report),
        _examples(page),
        _settings(config),
    ]
    with disk_errors_as(DataError, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, html_document("What is in the data", parts))
    return path


def _cards(report: DataReport) -> list[tuple[str, str, str]]:
    """Returns label, value and note of each card."""
    return [
        ("rows read", f"{report.num_rows:,}", ""),
        ("dropped", f"{report.num_dropped:,}", f"{report.num_dropped / max(1, report.num_rows):.1%} of the rows"),
        ("for training", f"{report.num_train:,}", "examples"),
        ("held out", f"{report.num_heldout:,}", "examples"),
        ("tokens", f"{report.num_tokens:,}", "before cutting"),
        ("tokens lost", f"{report.num_tokens_lost:,}", f"{report.share_lost:.1%}, in examples that are too long"),
    ]


def _sources(page: DataPage) -> str:
    """Returns a table with a row for each source, if there are several."""
    sources, total = page.data.report.sources, sum(page.counts)
    if len(sources) < 2:
        return ""
    header = ("source", "rows", "dropped", "training", "held out", "tokens", "of an epoch", "times in it")
    rows = []
    for number, source in enumerate(sources):
        count = page.counts[number] if number < len(page.counts) else 0
        names = ("num_rows", "num_dropped", "num_train", "num_heldout")
        rows.append(
            [
                html.escape(source["name"]),
                *(f"{source[name]:,}" for name in names),
                f"{source['num_train_tokens'] + source['num_heldout_tokens']:,}",
                f"{count / total:.1%}" if count else "",
                f"{count / source['num_train']:.2f}" if count else "",
            ]
        )
    return f"<h2>Sources</h2>{html_table(rows, header, css_class='figures')}"


def _charts(page: DataPage) -> list[str]:
    """Returns histograms of lengths, of all examples and of those of each source."""
    report, max_length = page.data.report, page.config.data.max_length
    charts = [length_chart(report.lengths, max_length)]
    numbers = np.concatenate([page.splits.train_sources, page.splits.heldout_sources])
    if len(report.sources) > 1:
        for number, source in enumerate(report.sources[:_MAX_CHARTS]):
            lengths = report.lengths[numbers == number]
            if len(lengths):
                charts.append(length_chart(lengths, max_length, source["name"]))
    return charts


def _dropped(report: DataReport) -> list[str]:
    """Returns what was dropped and cut, with samples of each reason."""
    parts = []
    for title, reasons in (("What is dropped", DROP_REASONS), ("What is cut", CUT_REASONS)):
        found = {name: reason for name, reason in reasons.items() if getattr(report, name)}
        sections = "".join(_section(report, name, reason) for name, reason in found.items())
        if sections or reasons is DROP_REASONS:
            parts.append(f"<h2>{title}</h2>{sections or '<p>Nothing.</p>'}")
    return parts


def _section(report: DataReport, name: str, reason: str) -> str:
    count = getattr(report, name)
    samples = report.samples.get(name, [])
    if name == "num_unreadable":
        rows = [[html.escape(message)] for message in report.errors]
        table = html_table(rows, ("message",), has_labels=False)
    else:
        rows = [[_place(each["origin"], each["note"]), _shown(each["text"])] for each in samples]
        table = html_table(rows, css_class="listing")
    shown = f"The first {len(rows)}:" if count > len(rows) else ""
    summary = f"<summary><b>{count:,}</b> {html.escape(reason)}</summary>"
    advice = re.sub(r"--\w+(=\w+)?", r'<code style="white-space: nowrap">\g<0></code>', _WHAT_TO_DO[name])
    return f"<details open>{summary}<p>{advice} {shown}</p>{table}</details>"


def _place(origin: str, note: str) -> str:
    return f"{html.escape(origin)}<span class=note>{html.escape(note)}</span>"


def _shown(text: str) -> str:
    return f'<span style="white-space: pre-wrap">{html.escape(text)}</span>'


def _examples(page: DataPage) -> str:
    """Returns some training examples as the model reads them."""
    examples = page.data.train[:_NUM_SHOWN]
    texts = (f"<pre>{_tokens_html(tokens, page.tokenizer)}</pre>" for tokens in examples)
    return f"<h2>Examples as the model reads them</h2>{_LEARNT}{''.join(texts)}"


def _tokens_html(tokens: TokenizedExample, tokenizer: Any) -> str:
    parts, start = [], 0
    marks = tokens.is_target.tolist()
    while start < len(marks):
        end = next((i for i in range(start, len(marks)) if marks[i] != marks[start]), len(marks))
        text = html.escape(cut_text(tokenizer.decode(tokens.token_ids[start:end].tolist())))
        parts.append(f"<ins>{text}</ins>" if marks[start] else text)
        start = end
    return "".join(parts)


def _settings(config: Config) -> str:
    lines = "\n".join(f"data.{name} = {value!r}" for name, value in config.to_dict()["data"].items())
    return f"<h2>Settings</h2><details><summary>All of the data</summary><pre>{html.escape(lines)}</pre></details>"
