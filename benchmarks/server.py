"""`gemma-tune serve` for benchmarks, in a process whose memory is its own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

_MEMORY_GROWTH = 0.05


class Server:
    """`gemma-tune serve` as a process of its own. Use as a context manager."""

    def __init__(self, model: str, *arguments: str):
        command = [sys.executable, "-m", "gemma_tune", "serve", f"--model={model}", "--port=0", "--json"]
        command += arguments
        environment = {"JAX_PLATFORMS": "cpu", **os.environ}
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

    def __enter__(self) -> "Server":
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith("{"):
            raise SystemExit(f"The server ended with exit code {self._process.wait()}; its last words are above.")
        about = json.loads(line)
        self.url, self.models, self.model = about["url"], about["models"], about["models"][0]
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait()

    @property
    def memory_bytes(self) -> int:
        """Memory that the process holds now."""
        return int(Path(f"/proc/{self._process.pid}/status").read_text().split("VmRSS:")[1].split()[0]) * 1024


def shortfalls(figures: dict[str, Any]) -> list[str]:
    """Returns what a server must do and this one didn't."""
    found = [f"{each['kind']}: status {each['status']}, or another answer than alone" for each in figures["wrong"]]
    if figures["slots_left"] or figures["queued_left"]:
        found.append(f"{figures['slots_left']} slots are taken and {figures['queued_left']} requests wait at the end")
    if figures["compilations"]:
        found.append(f"{figures['compilations']:.0f} programs were compiled after the start")
    memory = figures["memory_bytes"]
    settled = max(memory[: max(len(memory) // 4, 1)])
    if max(memory) > settled * (1 + _MEMORY_GROWTH):
        found.append(f"memory grew from {settled / 1e6:,.0f} to {max(memory) / 1e6:,.0f} MB")
    return found
