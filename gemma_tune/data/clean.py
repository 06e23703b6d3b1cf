"""Normalises text, drops what can't teach anything, finds duplicates, and splits by content."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from gemma_tune.data.example import Example, Turn

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2060\ufeff]")  # Keeps tab and line feed.
_SPACES_INSIDE = re.compile(r"(?<=\S)[^\S\n]{2,}(?=\S)")  # Not at the start of a line: indentation stays.
_SPACES_AT_END = re.compile(r"[^\S\n]+$", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n{3,}")
_NOT_WORD = re.compile(r"[\W_]+")


def normalize(text: str) -> str:
    """Returns text in Unicode form NFC, without control characters and surplus white space.

    Line ends become `\\n`, runs of spaces inside a line one space, runs of blank lines one blank line; indentation
    stays.
    """
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n").replace("\u00a0", " ")
    text = _CONTROL.sub("", text)
    text = _SPACES_AT_END.sub("", _SPACES_INSIDE.sub(" ", text))
    return _BLANK_LINES.sub("\n\n", text).strip()


def comparison_key(text: str) -> str:
    """Returns what stays of a text when case, spaces and punctuation don't count.

    Two texts with equal keys are duplicates.
    """
    words = _NOT_WORD.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()
    return words or text.strip()  # A text of signs alone is compared as it is.


class Cleaned(NamedTuple):
    """What is left, and how many rows were dropped and why."""

    examples: list[Example]
    num_empty: int
    num_control_tokens: int
    num_duplicates: int


def clean(examples: Iterable[Example], control_tokens: Sequence[str], system_prompt: str = "") -> Cleaned:
    """Normalises the turns, and drops empty rows, rows with control tokens in them, and duplicates.

    Args:
        examples: As read.
        control_tokens: Such as `<end_of_turn>`: in a turn's content they would end the turn early. Documents may hold
            them.
        system_prompt: Put before conversations that have no system turn.
    """
    kept: list[Example] = []
    seen: set[str] = set()
    num_empty = num_control = num_duplicates = 0
    for example in examples:
        turns = tuple(Turn(turn.role, normalize(turn.content)) for turn in example.turns)
        turns = tuple(turn for turn in turns if turn.content or turn.role != "system")
        if not all(turn.content for turn in turns):
            num_empty += 1
            continue
        if any(turn.role != "text" and token in turn.content for turn in turns for token in control_tokens):
            num_control += 1
            continue
        key = "\x00".join(f"{turn.role}\x01{comparison_key(turn.content)}" for turn in turns)
        if key in seen:
            num_duplicates += 1
            continue
        seen.add(key)
        if system_prompt and turns[0].role == "user":
            turns = (Turn("system", system_prompt), *turns)
        kept.append(Example(turns, example.origin))
    return Cleaned(kept, num_empty, num_control, num_duplicates)


def split_by_question(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Splits into (training, held out) so that equal questions stay on one side.

    A question is held out when a hash of it and the seed falls below `fraction`. So the split stays put when rows are
    added, removed or put in another order. Where chance holds out nothing, the question with the smallest hash is.
    """
    places = [_place(example, seed) for example in examples]
    limit = max(fraction, min(places, default=0.0))
    if len(set(places)) < 2:
        limit = -1.0  # One question can't be on both sides.
    train = [example for example, place in zip(examples, places, strict=True) if place > limit]
    heldout = [example for example, place in zip(examples, places, strict=True) if place <= limit]
    return train, heldout


def without_questions_of(examples: Iterable[Example], heldout: Iterable[Example]) -> list[Example]:
    """Returns the examples whose question is none of the held-out questions, nor a duplicate of one."""
    taken = {comparison_key(example.question) for example in heldout}
    return [example for example in examples if comparison_key(example.question) not in taken]


def _place(example: Example, seed: int) -> float:
    digest = hashlib.sha256(f"{seed}\x00{comparison_key(example.question)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
