"""Tables of what becomes of the rows of a data set, for the terminal."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from gemma_tune.cli.output import make_listing, make_table
from gemma_tune.data import DataReport, TokenizedExample
from gemma_tune.data.cleaning_report import CUT_REASONS, DROP_REASONS

_MAX_BARS = 10
_BAR_WIDTH = 40
MANY_REPEATS = 4.0  # arXiv:2305.16264: up to four passes are nearly as good as new data.


def render_tokens(tokens: TokenizedExample, tokenizer: Any) -> Text:
    """Returns the text of an example: learnt tokens in green, line ends and control tokens visible."""
    text = Text()
    for token, is_target in zip(tokens.token_ids.tolist(), tokens.is_target.tolist(), strict=True):
        piece = tokenizer.piece(token).replace("▁", " ").replace("\n", "⏎\n")
        is_control = piece.startswith("<") and piece.endswith(">")
        text.append(piece, style="bold green" if is_target else "magenta" if is_control else "dim")
    return text


def length_histogram(lengths: np.ndarray, max_length: int) -> RenderableType:
    """Returns a histogram of at most ten rows, or a sentence where all lengths are equal.

    Args:
        lengths: [n] tokens in each example.
        max_length: Maximum length of an example; rows beyond it are red.
    """
    low, high = int(lengths.min()), int(lengths.max())
    if low == high:
        return Text(f" All examples have {low} tokens.")
    width = -(-(high - low + 1) // _MAX_BARS)
    counts = np.bincount((lengths - low) // width).tolist()
    table = make_listing(f"Tokens in an example: {low} to {high}, mean {lengths.mean():.0f}")
    table.show_header = True
    table.add_column("tokens", justify="right")
    table.add_column("examples", justify="right")
    table.add_column("")
    for index, count in enumerate(counts):
        first = low + index * width
        last = min(first + width - 1, high)
        bar = "█" * round(_BAR_WIDTH * count / max(counts)) or ("▏" if count else "")
        label = f"{first}–{last}" if last > first else f"{first}"
        table.add_row(label, f"{count:,}", Text(bar), style="red" if first > max_length + 1 else "")
    return table


def rows_table(report: DataReport) -> Table:
    """Returns the numbers of rows, and an example of each reason; reasons that concern none are left out."""
    table = make_listing("Rows")
    table.add_column()
    table.add_column(justify="right")
    table.add_column(overflow="fold", style="dim")
    table.add_row("read", f"{report.num_rows:,}", "")
    for name, reason in DROP_REASONS.items():
        if count := getattr(report, name):
            table.add_row(f"dropped: {reason}", f"{count:,}", Text(_example_of(report, name)))
    for name, reason in CUT_REASONS.items():
        if count := getattr(report, name):
            table.add_row(reason, f"{count:,}", Text(_example_of(report, name)))
    for words, count in report.row_change_reasons().items():
        table.add_row(words, f"{count:,}", "", style="dim")
    table.add_row("for training", f"{report.num_train:,}", _pieces_note(report))
    table.add_row("held out", f"{report.num_heldout:,}", "")
    return table


def sources_table(report: DataReport, counts: Sequence[int]) -> Table:
    """Returns what is read and kept of each source, its share of an epoch, and how often its examples occur in it.

    Args:
        report: The report.
        counts: Number of examples that an epoch has of each training source.
    """
    table = make_table("Sources", "source", "rows", "dropped", "training", "held out", "tokens", "epoch")
    total = sum(counts)
    for number, source in enumerate(report.sources):
        count, num_train = counts[number] if number < len(counts) else 0, source["num_train"]
        times = count / num_train if num_train else 0.0
        table.add_row(
            Text(source["name"], overflow="fold"),
            *(f"{source[name]:,}" for name in ("num_rows", "num_dropped", "num_train", "num_heldout")),
            f"{source['num_train_tokens'] + source['num_heldout_tokens']:,}",
            Text(f"{count / total:.0%}, {times:.3g}×" if count else "", "yellow" if times > MANY_REPEATS else ""),
        )
    return table


def repeats_advice(report: DataReport, counts: Sequence[int]) -> str:
    """Returns a warning if the examples of a source occur many times in an epoch; otherwise an empty string."""
    for source, count in zip(report.sources, counts, strict=False):
        if source["num_train"] and count / source["num_train"] > MANY_REPEATS:
            return (
                f"Each example of {source['name']} occurs {count / source['num_train']:.3g} times in an epoch. "
                f"--config.data.mixture_max_repeats={MANY_REPEATS:g} limits that."
            )
    return ""


def _example_of(report: DataReport, name: str) -> str:
    """Returns where one of the rows is that a field counts, and a note on it."""
    if name == "num_unreadable":
        return ""  # Their messages stand below the table.
    for sample in report.samples.get(name, []):
        note = f" ({_without_folders(sample['note'])})" if sample["note"] else ""
        return f"e.g. {_without_folders(sample['origin'])}{note}"
    return ""


def _without_folders(text: str) -> str:
    return re.sub(r"\S*/(?=[^/\s])", "", text)


def _pieces_note(report: DataReport) -> str:
    return "each piece of a document counts" if report.num_cut_up else ""
