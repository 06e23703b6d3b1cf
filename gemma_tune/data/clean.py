"""Normalises text, drops what can't teach anything, finds duplicates, and splits by content."""

import hashlib
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
    """Returns text in Unicode form NFC, without control characters and surplus white space.

    Line ends become `\\n`, runs of spaces inside a line one space, runs of blank lines one blank line; indentation
    stays.
    """
    if text.isascii() and text.isprintable() and "  " not in text:
        return text.strip()  # Most texts; what follows would find nothing to do in one line.
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n").replace("\u00a0", " ")
    text = _CONTROL.sub("", text)
    text = _SPACES_AT_END.sub("", _SPACES_INSIDE.sub(" ", text))
    return _BLANK_LINES.sub("\n\n", text).strip()


def comparison_key(text: str) -> str:
    """Returns what stays of a text when case, spaces and punctuation don't count.

    Two texts with equal keys are duplicates.
    """
    if text.isascii():
        words = " ".join(text.lower().translate(_ASCII_NOT_WORD).split())  # The same, in a third of the time.
    else:
        words = _NOT_WORD.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()
    return words or text.strip()  # A text of signs alone is compared as it is.


class Cleaned(NamedTuple):
    """An example that stays, and the comparison key of its question."""

    example: Example
    question_key: str


class Cleaner:
    """Normalises the turns, and drops empty rows, rows with control tokens in them, and duplicates.

    Of what went by it keeps a hash each, to know duplicates.

    Args:
        control_tokens: Such as `<end_of_turn>`: in a turn's content they would end the turn early. Documents may hold
            them.
        system_prompt: Put before conversations that have no system turn.

    Attributes:
        num_empty, num_control_tokens, num_duplicates: Rows dropped so far.
    """

    def __init__(self, control_tokens: Sequence[str], system_prompt: str = ""):
        self._control_tokens, self._system_prompt = control_tokens, system_prompt
        self._seen = DedupIndex()
        self.num_empty = self.num_control_tokens = self.num_duplicates = 0

    def clean(self, examples: Iterable[Example]) -> list[Cleaned]:
        """Returns what stays of the next examples of a stream."""
        kept: list[Cleaned] = []
        hashes: list[int] = []
        for example in examples:
            turns = self._usable_turns(example)
            if turns:
                keys = [comparison_key(turn.content) for turn in turns]
                hashes.append(
                    hash_text("\x00".join(f"{turn.role}\x01{key}" for turn, key in zip(turns, keys, strict=True)))
                )
                question = next((i for i, turn in enumerate(turns) if turn.role in ("user", "text")), None)
                if self._system_prompt and turns[0].role == "user":
                    turns = (Turn("system", self._system_prompt), *turns)
                kept.append(Cleaned(Example(turns, example.origin), "" if question is None else keys[question]))
        is_new = self._seen.add(np.array(hashes, np.uint64))
        self.num_duplicates += len(kept) - int(is_new.sum())
        return list(itertools.compress(kept, is_new))

    def _usable_turns(self, example: Example) -> tuple[Turn, ...]:
        """Returns normalised turns, or none, counting why."""
        turns = tuple(Turn(turn.role, normalize(turn.content)) for turn in example.turns)
        turns = tuple(turn for turn in turns if turn.content or turn.role != "system")
        if not all(turn.content for turn in turns):
            self.num_empty += 1
            return ()
        if any(turn.role != "text" and token in turn.content for turn in turns for token in self._control_tokens):
            self.num_control_tokens += 1
            return ()
        return turns


def question_hash(question_key: str, seed: int) -> int:
    """Returns a pseudo-random 64-bit number that depends on the question and the seed alone."""
    digest = hashlib.sha256(f"{seed}\x00{question_key}".encode("utf-8", errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")


def heldout_by_question(question_hashes: np.ndarray, fraction: float) -> np.ndarray:
    """Chooses what to hold out so that equal questions stay on one side.

    A question is held out when its hash, as a share of the largest there can be, falls below `fraction`. So the split
    stays put when rows are added, removed or put in another order. Where chance holds out nothing, the question with
    the smallest hash is.

    Args:
        question_hashes: [n] uint64, from `question_hash`.
        fraction: Between 0 and 1.

    Returns:
        [n] bool: held out.
    """
    places = question_hashes.astype(np.float64) / 2.0**64
    if not len(places) or places.min() == places.max():
        return np.zeros(len(places), bool)  # One question can't be on both sides.
    return places <= max(fraction, places.min())
