"""What a benchmark must reach, beside what it measured."""

from collections.abc import Iterable

from rich.table import Table

Verdict = tuple[str, float, str, bool]  # What, measured, must be, whether it is reached.


def verdict_table(verdicts: Iterable[Verdict]) -> Table:
    """Returns a table with a row for each verdict."""
    table = Table("", "measured", "must be", "", title="What must be reached", title_justify="left")
    for what, value, must, is_reached in verdicts:
        table.add_row(what, f"{value:.4g}", must, "reached" if is_reached else "missed")
    return table
