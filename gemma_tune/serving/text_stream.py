"""Turns the tokens of an answer into text as they come: whole characters only, and nothing of a stop string."""

from collections.abc import Callable, Iterable, Iterator, Sequence

_INCOMPLETE = "\ufffd"  # What the bytes of a character decode to until all of them are there.


class TextStream:
    """Decodes tokens one after the other. Each one costs the same, however long the answer is.

    Attributes:
        stopped: Whether a stop string has come. No text follows it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop_strings: Sequence[str] = ()):
        self._decode = decode
        self._stop_strings = [text for text in stop_strings if text]
        self._tokens: list[int] = []
        # Tokens from `_context_start` on are decoded together; those before `_num_decoded` are text already.
        self._context_start = self._num_decoded = 0
        self._held_back = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Takes the next token, and returns the text that is new and certain."""
        self._tokens.append(token_id)
        text = self._new_text()
        if text.endswith(_INCOMPLETE):
            return ""
        # Decoding begins some tokens back: how a token reads can depend on the one before it.
        self._context_start, self._num_decoded = self._num_decoded, len(self._tokens)
        return self._certain(text)

    def finish(self) -> str:
        """Returns the text that was held back, at the end of the answer."""
        if self.stopped:
            return ""
        text = self._certain(self._new_text())
        self._num_decoded = len(self._tokens)
        held_back, self._held_back = self._held_back, ""
        return text if self.stopped else text + held_back

    def _new_text(self) -> str:
        known = self._decode(self._tokens[self._context_start : self._num_decoded])
        return self._decode(self._tokens[self._context_start :])[len(known) :]

    def _certain(self, text: str) -> str:
        """Returns the text up to a stop string, or up to where one may have begun; holds back the rest."""
        text = self._held_back + text
        found = [start for stop in self._stop_strings if (start := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held_back = True, ""
            return text[: min(found)]
        num_held_back = max((_overlap(text, stop) for stop in self._stop_strings), default=0)
        self._held_back = text[len(text) - num_held_back :]
        return text[: len(text) - num_held_back]


def without_outer_space(texts: Iterable[str]) -> Iterator[str]:
    """Yields a text's parts as they come, without the white space at its beginning and end, and no empty part."""
    space, has_begun = "", False
    for text in texts:
        text = space + text
        if not has_begun:
            text = text.lstrip()
        ready = text.rstrip()
        space = text[len(ready) :]
        if ready:
            has_begun = True
            yield ready


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest end of `text` that is a beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
