"""Cleans examples: brings their text into one form, and drops empty ones, duplicates and those with control tokens.

Text is learnt as it stands. Only what no reader sees is changed: the Unicode form, line ends, and white space around a
turn. Spaces, blank lines and punctuation inside it are content: of code, tables, Markdown and poems.
"""

import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from gemma_tune.data.dedup import DedupIndex, NearDuplicates, hash_text
from gemma_tune.data.example import Example, Turn

# Unicode's white space, and what is as invisible: NUL, zero-width space, word joiner, byte order mark.
_OUTER = "".join(c for c in map(chr, range(0x3001)) if c.isspace()) + "\x00\u200b\u2060\ufeff"
_FINAL_PUNCTUATION = ".!?…‼⁇⁈⁉。．！？｡؟۔।॥։።፧ "
SAMPLES_KEPT = 10  # Of each reason, for a report.
_CHARACTERS_SHOWN = 400


def normalize(text: str) -> str:
    """Returns a text in Unicode form NFC, with `\\n` as line end, and without white space around it.

    Nothing inside it changes.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.strip(_OUTER)


def comparison_key(text: str) -> str:
    """Returns a text without differences in case, in spaces, and in the punctuation at its end.

    Texts with equal keys are duplicates. C, C++ and C# differ, and so do `==` and `!=`. Case is folded as Unicode's
    canonical caseless matching does it (The Unicode Standard, section 3.13, D145).
    """
    if not text.isascii():
        text = unicodedata.normalize("NFC", unicodedata.normalize("NFD", text).casefold())
    words = " ".join(text.lower().split())
    return words.rstrip(_FINAL_PUNCTUATION) or words  # A text of such punctuation alone is compared as it is.


class Cleaned(NamedTuple):
    """An example that is kept.

    Attributes:
        example: Example with normalized text.
        question_key: Comparison key of its question.
        content_hash: Hash by which its duplicates are recognized.
    """

    example: Example
    question_key: str
    content_hash: int


class DroppedSample(NamedTuple):
    """An example that was dropped, as a report shows it.

    Attributes:
        origin: File and line that it was read from.
        text: Its beginning.
        note: What happened to it, such as the example that it repeats.
        content_hash: Hash of its content; 0 where no other example has to be found by it.
    """

    origin: str
    text: str
    note: str = ""
    content_hash: int = 0


class Cleaner:
    """Normalizes the turns of examples, and drops empty examples, duplicates, and examples with control tokens.

    It keeps a hash of each example, to recognize duplicates.

    Args:
        control_tokens: Control tokens such as `<end_of_turn>`, which would end a turn early. Documents may contain
            them.
        system_prompt: System turn to put before conversations that have none.
        dedup: What counts as a duplicate: `normalized` (equal comparison keys of all turns), `exact` (equal text of all
            turns) or `none` (nothing).
        near_duplicates: Index that recognizes near duplicates; None: they are kept.

    Attributes:
        counts: Number of examples dropped so far, by reason: `empty`, `control_tokens`, `duplicates`,
            `near_duplicates`.
        samples: The first examples dropped for each reason.
    """

    def __init__(
        self,
        control_tokens: Sequence[str],
        system_prompt: str = "",
        dedup: str = "normalized",
        near_duplicates: NearDuplicates | None = None,
    ):
        self._control_tokens, self._system_prompt = control_tokens, system_prompt
        self._dedup, self._near_duplicates = dedup, near_duplicates
        self._index = DedupIndex()
        self.counts = dict.fromkeys(("empty", "control_tokens", "duplicates", "near_duplicates"), 0)
        self.samples: dict[str, list[DroppedSample]] = {reason: [] for reason in self.counts}

    def clean(self, examples: Iterable[Example]) -> list[Cleaned]:
        """Cleans the next examples of a stream and returns those that are kept."""
        cleaned = [each for example in examples if (each := self._cleaned(example))]
        if self._dedup == "none":
            return self._far_apart(cleaned)
        is_new = self._index.add(np.array([each.content_hash for each in cleaned], np.uint64)).tolist()
        for each, new in zip(cleaned, is_new, strict=True):
            if not new:
                self._drop("duplicates", each.example, content_hash=each.content_hash)
        return self._far_apart([each for each, new in zip(cleaned, is_new, strict=True) if new])

    def _cleaned(self, example: Example) -> Cleaned | None:
        """Returns an example with normalized turns, or None if it is dropped, which is counted."""
        turns = self._usable_turns(example)
        if not turns:
            return None
        keys = [comparison_key(turn.content) for turn in turns]
        compared = [turn.content for turn in turns] if self._dedup == "exact" else keys
        content = "\x00".join(f"{_marked(turn)}\x01{text}" for turn, text in zip(turns, compared, strict=True))
        question = next((i for i, turn in enumerate(turns) if turn.role in ("user", "text")), None)
        if self._system_prompt and turns[0].role not in ("system", "text"):
            turns = (Turn("system", self._system_prompt), *turns)
        kept = example._replace(turns=turns)
        return Cleaned(kept, "" if question is None else keys[question], hash_text(content))

    def _usable_turns(self, example: Example) -> tuple[Turn, ...]:
        turns = tuple(turn for turn in map(_normalized, example.turns) if turn.content or turn.role != "system")
        if not all(turn.content for turn in turns):
            self._drop("empty", example)
            return ()
        tagged = [turn.content for turn in turns if "<" in turn.content and turn.role != "text"]
        if any(token in content for content in tagged for token in self._control_tokens):
            self._drop("control_tokens", example)
            return ()
        return turns

    def _far_apart(self, cleaned: list[Cleaned]) -> list[Cleaned]:
        """Returns the examples that are no near duplicates of earlier ones."""
        if self._near_duplicates is None:
            return cleaned
        kept = []
        for each in cleaned:
            text = "\n".join(comparison_key(turn.content) for turn in each.example.turns)
            similar = self._near_duplicates.find_or_add(text, each.example.origin)
            if similar is None:
                kept.append(each)
            else:
                self._drop("near_duplicates", each.example, f"like {similar}")
        return kept

    def _drop(self, reason: str, example: Example, note: str = "", content_hash: int = 0) -> None:
        self.counts[reason] += 1
        if len(self.samples[reason]) < SAMPLES_KEPT:
            self.samples[reason].append(DroppedSample(example.origin, text_shown(example), note, content_hash))


def text_shown(example: Example) -> str:
    """Returns the beginning of an example's text, one turn a line, for a report."""
    text = "\n".join(f"{turn.role}: {turn.content[:_CHARACTERS_SHOWN]}" for turn in example.turns)
    return text if len(text) <= _CHARACTERS_SHOWN else text[:_CHARACTERS_SHOWN] + "…"


def _normalized(turn: Turn) -> Turn:
    content = normalize(turn.content)
    return turn if content is turn.content else turn._replace(content=content)  # Most are as they should be.


def _marked(turn: Turn) -> str:
    return turn.role if turn.is_learnt else f"{turn.role} as context"
