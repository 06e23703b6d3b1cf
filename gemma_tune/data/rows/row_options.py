"""The settings of how rows become turns, and the counts of what was changed on the way."""

import collections
import dataclasses
from collections.abc import Iterable

from gemma_tune.config_groups import DataConfig

# What happens to rows, by the name under which it is counted.
ROW_CHANGES = {
    "turns_joined": "turns of one speaker joined",
    "system_moved": "later system turns moved into the user's turn",
    "assistant_first": "model speaks first: its turn is context",
    "last_question_dropped": "question without an answer at the end dropped",
    "turns_not_learnt": "with model turns that are context (weight 0)",
    "values_as_text": "numbers, booleans or objects written as text",
    "first_of_answers": "first of several answers taken",
    "templates_parsed": "ready-made Gemma template parsed into turns",
    "end_tokens_removed": "control tokens at an end removed",
    "other_templates": "ready-made template of another kind kept as text",
    "with_tools": "with tools or tool calls",
    "thoughts_kept": "thoughts learnt",
    "thoughts_masked": "thoughts as context (--thoughts=mask)",
    "thoughts_dropped": "thoughts left out (--thoughts=drop)",
    "earlier_thoughts_dropped": "thoughts of earlier turns left out, as the template does",
    "labelled_bad": "dropped: labelled as bad answers",
}
ROWS_DROPPED = ("labelled_bad",)  # Of these changes no example is left.

_HOW_TO_USE = "(--columns=context:COLUMN puts one before the question; --prompt_template='…{COLUMN}…' writes it there.)"


@dataclasses.dataclass(frozen=True)
class RowOptions:
    """Settings of how rows become turns, as in `config.DataConfig`."""

    columns: tuple[str, ...] = DataConfig.columns
    prompt_template: str = DataConfig.prompt_template
    on_role_order: str = DataConfig.on_role_order
    thoughts: str = DataConfig.thoughts


class RowCounter:
    """Counts what was changed in rows, each change once a row, and remembers what a user should know of each file.

    Attributes:
        changes: Number of rows by change, with the names in `ROW_CHANGES`.
    """

    def __init__(self) -> None:
        self.changes: collections.Counter[str] = collections.Counter()
        self._unused: dict[str, dict[str, None]] = {}
        self._notes: dict[str, None] = {}

    @property
    def num_dropped(self) -> int:
        """Number of rows of which no example is left."""
        return sum(self.changes[name] for name in ROWS_DROPPED)

    def count(self, changes: Iterable[str]) -> None:
        """Counts the changes of one row."""
        self.changes.update(set(changes))

    def add_unused(self, file: str, columns: Iterable[str]) -> None:
        """Remembers the columns of a file that aren't used."""
        self._unused.setdefault(file, {}).update(dict.fromkeys(columns))

    def add_note(self, note: str) -> None:
        """Remembers a sentence, once."""
        self._notes[note] = None

    def notes(self) -> list[str]:
        """Returns what a user should know: columns that aren't used, and how to use them; and the sentences added."""
        notes = []
        for file, columns in self._unused.items():
            if columns:
                notes.append(f"{file}: not used: {', '.join(columns)}. {_HOW_TO_USE}")
        return [*notes, *self._notes]
