"""Where a verb's output goes: tables on stdout for people, or one JSON object there and all else on stderr."""

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console


class Output:
    """A verb's way out.

    Attributes:
        console: For what people read: stdout, or stderr when stdout belongs to the JSON object.
        is_json: Whether `--json` was given.
    """

    def __init__(self, is_json: bool):
        self.is_json = is_json
        self.console = Console(stderr=is_json, highlight=False, soft_wrap=False)
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

    def only_if(self, is_primary: bool) -> None:
        """Keeps all but the first of several processes silent, but for errors."""
        from gemma_tune.runtime import progress

        self.console.quiet = progress.console.quiet = not is_primary
        self._is_primary = is_primary

    def result(self, value: dict[str, Any]) -> None:
        """Prints the verb's JSON object, if asked for and not yet done."""
        if self._is_primary:
            self._write_json(value)

    def error(self, message: str, code: int) -> None:
        """Prints an error on stderr, and as JSON, if asked for."""
        print(message, file=sys.stderr)
        self._write_json({"error": message, "exit_code": code})

    def next(self, *commands: str | Sequence[str]) -> None:
        """Prints the commands that one would run next, whole, so that they can be copied."""
        self.console.print("\nNext:")
        for command in commands:
            self.console.print(
                f"  {command if isinstance(command, str) else ' '.join(command)}",
                style="bold",
                markup=False,
                soft_wrap=True,
            )

    def _write_json(self, value: dict[str, Any]) -> None:
        if self._json_fd is not None and not self._has_written:
            self._has_written = True
            os.write(self._json_fd, (json.dumps(value, ensure_ascii=False) + "\n").encode())


def shorten(text: str, limit: int = 240) -> str:
    """Returns a text in one line, cut where it gets long."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
