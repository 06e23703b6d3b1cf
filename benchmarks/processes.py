"""Starts contenders as processes of their own, so that each one's peak memory is its own, and talks with them."""

import json
import os
import subprocess
import sys
from typing import Any


class Contender:
    """One contender's process.

    Args:
        who: Name of a module in benchmarks.contenders.
        arguments: Of its command line.
    """

    def __init__(self, who: str, *arguments: Any):
        self._who = who
        self._command = [sys.executable, "-m", f"benchmarks.contenders.{who}", *map(str, arguments)]
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> dict[str, Any]:
        """Starts it and waits until it is ready; returns what it said, with what it said of loading as `loaded`."""
        environment = {**os.environ, "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")}
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        loaded = self._read()
        return {**self._read(), "loaded": loaded}

    def ask(self, request: str) -> dict[str, Any]:
        """Sends a line and returns the answer."""
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(request + "\n")
        self._process.stdin.flush()
        return self._read()

    def stop(self) -> None:
        """Closes its stdin and waits for its end."""
        if self._process is not None:
            self._process.communicate()

    def _read(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"{self._who} ended with exit code {self._process.wait()}; its last words are above.")
