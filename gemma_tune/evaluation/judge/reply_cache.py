"""Keeps a judge's replies on disk, so that no question is asked and paid twice."""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any


def reply_key(model: str, messages: list[dict[str, str]], settings: dict[str, Any]) -> str:
    """Returns the hash that a reply is found by: of the judge's model, what it was asked, and how.

    What it was asked holds the rubric, the question, the answers and their order.
    """
    content = json.dumps([model, messages, settings], sort_keys=True)  # ASCII, so that lone surrogates can be hashed.
    return hashlib.sha256(content.encode()).hexdigest()


class ReplyCache:
    """Replies by key, in memory and in a JSONL file that grows by a line for each new one.

    A line that another process or a full disk has damaged is passed over.
    """

    def __init__(self, file: Path | None) -> None:
        """Reads the file, if there is one.

        Args:
            file: JSONL file; it is made with the first reply. None keeps nothing on disk.
        """
        self._file, self._replies = file, dict[str, str]()
        if file is None or not file.exists():
            return
        for line in file.read_bytes().splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                self._replies[str(entry["key"])] = str(entry["reply"])

    def get(self, key: str) -> str | None:
        """Returns the reply of a key; None if there is none."""
        return self._replies.get(key)

    def put(self, key: str, reply: str) -> None:
        """Keeps a reply. A disk that is full or read-only costs nothing but the question's being asked again."""
        self._replies[key] = reply
        if self._file is None:
            return
        line = json.dumps({"key": key, "reply": reply}) + "\n"
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with open(self._file, "ab") as file:  # One write, so that lines of several processes don't mix.
                file.write(line.encode())
