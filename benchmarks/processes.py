"""Starts contenders as processes of their own, so that each one's peak memory is its own, and talks with them."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple


class ContenderFailed(SystemExit):
    """Ends the benchmark, unless it can do without this contender."""


class Contender:
    """One contender's process.

    Args:
        who: Name of a module in benchmarks.contenders.
        arguments: Of its command line.
        environment: Variables to add. Unless it or the outside says something else, JAX runs on the CPU.
    """

    def __init__(self, who: str, *arguments: Any, environment: Mapping[str, str] | None = None):
        self._who = who
        self._command = [sys.executable, "-m", f"benchmarks.contenders.{who}", *map(str, arguments)]
        self._environment = {"JAX_PLATFORMS": "cpu", **os.environ, **(environment or {})}
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> dict[str, Any]:
        """Starts it and waits until it is ready; returns what it said, with what it said of loading as `loaded`."""
        self._start()
        loaded = self._read()
        return {**self._read(), "loaded": loaded}

    def run(self) -> dict[str, Any]:
        """Starts one that needs no requests, and returns the one thing that it says."""
        self._start()
        return self._read()

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

    def _start(self) -> None:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self._environment
        )

    def _read(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                said = json.loads(line)
                if "error" in said:
                    raise ContenderFailed(f"{self._who}: {said['error']}")
                return said
        raise ContenderFailed(f"{self._who} ended with exit code {self._process.wait()}; its last words are above.")


class Measured(NamedTuple):
    """What a contender said when it was ready, how long each pass took, and its peak memory in the end."""

    ready: dict[str, Any]
    seconds: list[float]
    peak_bytes: int


def take_turns(contenders: Mapping[str, Contender], num_passes: int, loss_tolerance: float) -> dict[str, Measured]:
    """Starts all contenders, and lets one after the other train for a pass, again and again, so that whatever else the
    machine does hits all alike.

    Raises:
        SystemExit: Their losses before training differ by more than the tolerance: they don't do the same.
    """
    try:
        ready = {who: contender.start() for who, contender in contenders.items()}
        losses = {who: values["loss"] for who, values in ready.items()}
        if max(losses.values()) - min(losses.values()) > loss_tolerance:
            raise SystemExit(f"The contenders' losses differ: {losses}")
        answers: dict[str, list[dict[str, Any]]] = {who: [] for who in contenders}
        for index in range(num_passes):
            for who, contender in contenders.items():
                answers[who].append(contender.ask("pass"))
                print(f"{index + 1}/{num_passes} {who}: {answers[who][-1]['seconds']:.1f} s", file=sys.stderr)
    finally:
        for contender in contenders.values():
            contender.stop()
    return {
        who: Measured(ready[who], [answer["seconds"] for answer in each], each[-1]["peak_bytes"])
        for who, each in answers.items()
    }
