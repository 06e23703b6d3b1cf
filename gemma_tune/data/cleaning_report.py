"""Counts what happens to the rows of a data set before training."""

import dataclasses
from typing import Any

import numpy as np

from gemma_tune.data.rows.row_options import ROW_CHANGES, ROWS_DROPPED, RowCounter
from gemma_tune.data.tokenize import TokenizedChunk


@dataclasses.dataclass
class DataReport:
    """The numbers of rows that were read, dropped, shortened and kept.

    Attributes:
        num_rows: Number of rows that were read.
        num_unreadable: Number of rows dropped because they can't be read.
        errors: Messages of the first unreadable rows.
        num_empty: Number of rows dropped because a turn is empty.
        num_control_tokens: Number of rows dropped because they contain control tokens.
        num_duplicates: Number of rows dropped because they are duplicates.
        num_in_heldout: Number of training rows dropped because their question is in the held-out source.
        num_truncated: Number of examples shortened to the maximum length.
        num_overlong_dropped: Number of examples dropped because they are too long.
        num_without_target: Number of examples dropped because no answer fits after the question.
        num_train: Number of examples for training.
        num_heldout: Number of held-out examples.
        row_changes: Number of rows by what was changed in them, with the names in `ROW_CHANGES`.
        notes: Sentences on the files, such as which columns aren't used.
        lengths: [n] int32 tokens in each example, before shortening.
    """

    num_rows: int = 0
    num_unreadable: int = 0
    errors: list[str] = dataclasses.field(default_factory=list)
    num_empty: int = 0
    num_control_tokens: int = 0
    num_duplicates: int = 0
    num_in_heldout: int = 0
    num_truncated: int = 0
    num_overlong_dropped: int = 0
    num_without_target: int = 0
    num_train: int = 0
    num_heldout: int = 0
    row_changes: dict[str, int] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    lengths: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, np.int32))

    def counts(self) -> dict[str, Any]:
        """Returns everything except the lengths, as plain values."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "lengths"]
        return {name: getattr(self, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, with a summary of the lengths."""
        values = self.counts()
        if len(self.lengths):
            values["length_tokens"] = {
                "min": int(self.lengths.min()),
                "mean": round(float(self.lengths.mean()), 1),
                "median": float(np.median(self.lengths)),
                "max": int(self.lengths.max()),
            }
        return values

    def count_tokenized(self, chunk: TokenizedChunk) -> None:
        """Adds the numbers of examples that were shortened and dropped in a chunk."""
        self.num_truncated += chunk.num_truncated
        self.num_overlong_dropped += chunk.num_overlong_dropped
        self.num_without_target += chunk.num_without_target

    def count_row_changes(self, counter: RowCounter) -> None:
        """Adds what was changed in the rows of a source, and what a user should know of its files."""
        for name, count in counter.changes.items():
            self.row_changes[name] = self.row_changes.get(name, 0) + count
        self.notes += [note for note in counter.notes() if note not in self.notes]

    def row_change_reasons(self) -> dict[str, int]:
        """Returns the numbers of changed rows by what was done to them, in words."""
        return {words: self.row_changes[name] for name, words in ROW_CHANGES.items() if self.row_changes.get(name)}

    def drop_reasons(self) -> str:
        """Returns a sentence that says why cleaning and splitting dropped rows."""
        reasons = {
            "unreadable": self.num_unreadable,
            "empty": self.num_empty,
            "with control tokens": self.num_control_tokens,
            "duplicates": self.num_duplicates,
            "with a held-out question": self.num_in_heldout,
            "labelled as bad answers": sum(self.row_changes.get(name, 0) for name in ROWS_DROPPED),
        }
        return "Dropped: " + ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count) + "."
