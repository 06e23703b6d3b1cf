"""An answer's text as its tokens come: whole characters only, and nothing that may turn out to be a stop string."""

from collections.abc import Callable, Sequence

_UNFINISHED = "\ufffd"  # What the bytes of a character decode to until all are there.


class TextStream:
    """Turns tokens into text, one after the other.

    Attributes:
        stopped: A stop string has come; nothing comes behind it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop_strings: Sequence[str] = ()):
        self._decode = decode
        self._stop_strings = [text for text in stop_strings if text]
        self._tokens: list[int] = []
        self._context = self._read = 0  # Tokens from `_context` are decoded together; up to `_read` they are text.
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Takes the next token, and returns what is new and certain."""
        self._tokens.append(token_id)
        text = self._new_text()
        if text.endswith(_UNFINISHED):
            return ""
        # Decoding begins some tokens back: how a token reads can depend on the one before it.
        self._context, self._read = self._read, len(self._tokens)
        return self._certain(text)

    def finish(self) -> str:
        """Returns what was held back, at the end of the answer."""
        if self.stopped:
            return ""
        text = self._certain(self._new_text())
        self._read = len(self._tokens)
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _new_text(self) -> str:
        known = self._decode(self._tokens[self._context : self._read])
        return self._decode(self._tokens[self._context :])[len(known) :]

    def _certain(self, text: str) -> str:
        text = self._held + text
        found = [place for stop in self._stop_strings if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        self._held = text[len(text) - max((_overlap(text, stop) for stop in self._stop_strings), default=0) :]
        return text[: len(text) - len(self._held)]


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest end of `text` with which `stop` begins."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
