"""Cleans examples: normalizes their text, and drops empty ones, duplicates and those with control tokens."""

import itertools
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from gemma_tune.data.dedup import DedupIndex, hash_text
from gemma_tune.data.example import Example, Turn

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2060\ufeff]")  # Keeps tab and line feed.
_SPACES_INSIDE = re.compile(r"(?<=\S)[^\S\n]{2,}(?=\S)")  # Not at the start of a line: indentation stays.
_SPACES_AT_END = re.compile(r"[^\S\n]+$", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n{3,}")
_NOT_WORD = re.compile(r"[\W_]+")
_ASCII_NOT_WORD = {code: " " for code in range(128) if not chr(code).isalnum()}


def normalize(text: str) -> str:
    """Returns a text in Unicode form NFC, without control characters and superfluous white space.

    Line ends become `\\n`, several spaces inside a line become one, and several blank lines become one. Indentation
    is kept.
    """
    if text.isascii() and text.isprintable() and "  " not in text:
        return text.strip()  # Most texts: the rest would change nothing in them.
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n").replace("\u00a0", " ")
    text = _CONTROL.sub("", text)
    text = _SPACES_AT_END.sub("", _SPACES_INSIDE.sub(" ", text))
    return _BLANK_LINES.sub("\n\n", text).strip()


def comparison_key(text: str) -> str:
    """Returns a text without case, spaces and punctuation. Texts with equal keys are duplicates."""
    if text.isascii():
        words = " ".join(text.lower().translate(_ASCII_NOT_WORD).split())  # The same as below, in a third of the time.
    else:
        words = _NOT_WORD.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()
    return words or text.strip()  # A text of punctuation alone is compared as it is.


class Cleaned(NamedTuple):
    """An example that is kept.

    Attributes:
        example: Example with normalized text.
        question_key: Comparison key of its question.
    """

    example: Example
    question_key: str


class Cleaner:
    """Normalizes the turns of examples, and drops empty examples, duplicates, and examples with control tokens.

    It keeps a hash of each example, to recognize duplicates.

    Args:
        control_tokens: Control tokens such as `<end_of_turn>`, which would end a turn early. Documents may contain
            them.
        system_prompt: System turn to put before conversations that have none.

    Attributes:
        num_empty: Number of empty examples dropped so far.
        num_control_tokens: Number of examples with control tokens dropped so far.
        num_duplicates: Number of duplicates dropped so far.
    """

    def __init__(self, control_tokens: Sequence[str], system_prompt: str = ""):
        self._control_tokens, self._system_prompt = control_tokens, system_prompt
        self._index = DedupIndex()
        self.num_empty = self.num_control_tokens = self.num_duplicates = 0

    def clean(self, examples: Iterable[Example]) -> list[Cleaned]:
        """Cleans the next examples of a stream and returns those that are kept."""
        kept: list[Cleaned] = []
        hashes: list[int] = []
        for example in examples:
            turns = self._usable_turns(example)
            if turns:
                keys = [comparison_key(turn.content) for turn in turns]
                hashes.append(
                    hash_text("\x00".join(f"{_marked(turn)}\x01{key}" for turn, key in zip(turns, keys, strict=True)))
                )
                question = next((i for i, turn in enumerate(turns) if turn.role in ("user", "text")), None)
                if self._system_prompt and turns[0].role not in ("system", "text"):
                    turns = (Turn("system", self._system_prompt), *turns)
                kept.append(Cleaned(Example(turns, example.origin), "" if question is None else keys[question]))
        is_new = self._index.add(np.array(hashes, np.uint64))
        self.num_duplicates += len(kept) - int(is_new.sum())
        return list(itertools.compress(kept, is_new))

    def _usable_turns(self, example: Example) -> tuple[Turn, ...]:
        """Returns normalized turns, or none if the example is dropped, which is counted."""
        turns = tuple(turn._replace(content=normalize(turn.content)) for turn in example.turns)
        turns = tuple(turn for turn in turns if turn.content or turn.role != "system")
        if not all(turn.content for turn in turns):
            self.num_empty += 1
            return ()
        tagged = [turn.content for turn in turns if "<" in turn.content and turn.role != "text"]
        if any(token in content for content in tagged for token in self._control_tokens):
            self.num_control_tokens += 1
            return ()
        return turns


def _marked(turn: Turn) -> str:
    return turn.role if turn.is_learnt else f"{turn.role} as context"
