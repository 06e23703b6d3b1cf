"""What a benchmark must reach, beside what it measured."""

import json
import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

Verdict = tuple[str, float, str, bool]  # What, measured, must be, whether it is reached.


def verdict_table(verdicts: Iterable[Verdict]) -> Table:
    """Returns a table with a row for each verdict."""
    table = Table("", "measured", "must be", "", title="What must be reached", title_justify="left")
    for what, value, must, is_reached in verdicts:
        table.add_row(what, f"{value:.4g}", must, "reached" if is_reached else "missed")
    return table


def exit_with(verdicts: Sequence[Verdict], as_json: bool) -> None:
    """Prints the verdicts, with `as_json` as one JSON object on stdout too, and exits with 1 if one is missed."""
    Console(stderr=as_json).print(verdict_table(verdicts))
    if as_json:
        print(json.dumps({what: value for what, value, *_ in verdicts}))
    sys.exit(not all(reached for *_, reached in verdicts))
