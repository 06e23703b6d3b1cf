"""Prints a verb's results: tables on stdout for people, or one JSON object there and everything else on stderr."""

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


class Output:
    """The streams that a verb prints to. Use as a context manager.

    Attributes:
        console: Console for what people read: stdout, or stderr when stdout belongs to the JSON object.
        is_json: Whether `--json` was given.
    """

    def __init__(self, is_json: bool):
        self.is_json = is_json
        # Without emoji, since the text of a model or a path may hold :x: or :100:.
        self.console = Console(stderr=is_json, highlight=False, soft_wrap=False, emoji=False)
        self._json_fd: int | None = None
        self._is_primary = True
        self._has_written = False

    def __enter__(self) -> "Output":
        if self.is_json:
            # Libraries that print, in C++ too, then can't spoil the JSON.
            sys.stdout.flush()
            self._json_fd = os.dup(1)
            os.dup2(2, 1)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._json_fd is not None:
            sys.stdout.flush()
            os.dup2(self._json_fd, 1)
            os.close(self._json_fd)
            self._json_fd = None

    def print_only_if(self, is_primary: bool) -> None:
        """Keeps all of several processes silent except for the primary one. Errors are always printed."""
        from gemma_tune.runtime import progress

        self.console.quiet = progress.console.quiet = not is_primary
        self._is_primary = is_primary

    def write_result(self, value: dict[str, Any]) -> None:
        """Writes the verb's JSON object, if `--json` was given and none has been written yet."""
        if self._is_primary:
            self._write_json(value)

    def write_error(self, message: str, code: int) -> None:
        """Prints an error on stderr and, if `--json` was given, writes it as the JSON object."""
        print(message, file=sys.stderr)
        self._write_json({"error": message, "exit_code": code})

    def print_next(self, commands: Sequence[str]) -> None:
        """Prints commands to run next, each in one line, so that they can be copied."""
        self.console.print("\nNext:")
        for command in commands:
            self.console.print(f"  {command}", style="bold", markup=False, soft_wrap=True)

    def _write_json(self, value: dict[str, Any]) -> None:
        if self._json_fd is not None and not self._has_written:
            self._has_written = True
            os.write(self._json_fd, (json.dumps(value, ensure_ascii=False) + "\n").encode())


def make_table(title: str, *columns: str, num_left: int = 1, **options: Any) -> Table:
    """Returns a table with a heading over each column.

    Args:
        title: Title above the table.
        columns: Headings.
        num_left: Number of columns that are aligned to the left; those behind them hold numbers.
        options: Options of rich's Table.
    """
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", **options)
    for index, heading in enumerate(columns):
        table.add_column(heading, justify="left" if index < num_left else "right")
    return table


def make_listing(title: str = "") -> Table:
    """Returns a table of labels and values, without headings."""
    return Table(box=box.SIMPLE, title=title or None, title_justify="left", show_header=False)


def shorten(text: str, limit: int = 240) -> str:
    """Returns a text as one line of at most `limit` characters."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
