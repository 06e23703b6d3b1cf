"""`gemma-tune serve` for benchmarks, in a process whose memory is its own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path


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
