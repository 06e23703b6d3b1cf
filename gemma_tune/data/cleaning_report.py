"""Counts what happens to the rows of a data set before training."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from gemma_tune.data.cleaning import SAMPLES_KEPT, Cleaner, DroppedSample, text_shown
from gemma_tune.data.example import Example
from gemma_tune.data.fit_length import TokenizedChunk
from gemma_tune.data.rows.row_options import ROW_CHANGES, ROWS_DROPPED, RowCounter

# Reasons for which rows are dropped or changed, by the field of DataReport that counts them.
DROP_REASONS = {
    "num_unreadable": "unreadable",
    "num_labelled_bad": "labelled as bad answers",
    "num_empty": "empty",
    "num_control_tokens": "with control tokens",
    "num_duplicates": "duplicates",
    "num_near_duplicates": "near duplicates",
    "num_in_heldout": "with a held-out question",
    "num_overlong_dropped": "too long",
    "num_without_target": "no answer fits",
}
CUT_REASONS = {"num_truncated": "shortened", "num_cut_up": "documents in pieces"}
_MANY_LOST = 0.05
_NOT_IN_COUNTS = ("lengths",)


@dataclasses.dataclass
class DataReport:
    """The numbers of rows that were read, dropped, shortened and kept.

    Attributes:
        num_rows: Number of rows that were read.
        num_unreadable: Number of rows dropped because they can't be read.
        errors: Messages of the first unreadable rows.
        notes: Sentences on how files were read: an encoding, a delimiter, what of them wasn't read.
        num_labelled_bad: Number of rows that are not learnt because their answer is labelled as a bad one.
        num_empty: Number of rows dropped because a turn is empty.
        num_control_tokens: Number of rows dropped because they contain control tokens.
        num_duplicates: Number of rows dropped because they are duplicates.
        num_near_duplicates: Number of rows dropped because they are near duplicates.
        num_in_heldout: Number of training rows dropped because their question is in the held-out source.
        num_cut_up: Number of documents cut into pieces.
        num_truncated: Number of examples shortened to the maximum length.
        num_overlong_dropped: Number of examples dropped because they are too long.
        num_without_target: Number of examples dropped because no answer fits after the question.
        num_tokens_lost: Number of tokens that were cut off or dropped because examples are too long.
        longest_lost: Number of tokens of the longest example that is cut off or dropped for its length; 0: none is.
        num_train: Number of examples for training, each piece of a document counted.
        num_heldout: Number of held-out examples, counted in the same way.
        sources: Name of each source, with its own numbers of rows read, rows dropped, and examples and tokens kept.
        samples: The first examples that were dropped or cut, by the field that counts them; each with the fields of
            `DroppedSample`.
        lengths: [n] int32 tokens in each example, before shortening; those for training come first.
        row_changes: Number of rows by what was changed in them, with the names in `ROW_CHANGES`.
    """

    num_rows: int = 0
    num_unreadable: int = 0
    errors: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    num_labelled_bad: int = 0
    num_empty: int = 0
    num_control_tokens: int = 0
    num_duplicates: int = 0
    num_near_duplicates: int = 0
    num_in_heldout: int = 0
    num_cut_up: int = 0
    num_truncated: int = 0
    num_overlong_dropped: int = 0
    num_without_target: int = 0
    num_tokens_lost: int = 0
    longest_lost: int = 0
    num_train: int = 0
    num_heldout: int = 0
    sources: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    samples: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)
    row_changes: dict[str, int] = dataclasses.field(default_factory=dict)
    lengths: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, np.int32))

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all examples, before shortening."""
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def num_dropped(self) -> int:
        """Number of rows and examples that were dropped, for all reasons together."""
        return sum(getattr(self, name) for name in DROP_REASONS)

    @property
    def share_lost(self) -> float:
        """Share of the tokens that were cut off or dropped because examples are too long."""
        return self.num_tokens_lost / max(1, self.num_tokens)

    @property
    def loses_much(self) -> bool:
        """Whether so many rows or tokens are lost that one should look at the data again."""
        return max(self.share_lost, self.num_dropped / max(1, self.num_rows)) >= _MANY_LOST

    def counts(self) -> dict[str, Any]:
        """Returns everything except the lengths, as plain values."""
        names = [field.name for field in dataclasses.fields(self) if field.name not in _NOT_IN_COUNTS]
        return {name: getattr(self, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, with a summary of the lengths and without the samples."""
        values = {name: value for name, value in self.counts().items() if name != "samples"}
        if len(self.lengths):
            values["num_tokens"] = self.num_tokens
            values["length_tokens"] = {
                "min": int(self.lengths.min()),
                "mean": round(float(self.lengths.mean()), 1),
                "median": float(np.median(self.lengths)),
                "max": int(self.lengths.max()),
            }
        return values

    def count_cleaned(self, cleaner: Cleaner, before: dict[str, int]) -> int:
        """Adds what a cleaner has dropped, and returns how many examples that are.

        Args:
            cleaner: The cleaner.
            before: Its counts at the last call.
        """
        for reason, count in cleaner.counts.items():
            name = f"num_{reason}"
            setattr(self, name, getattr(self, name) + count - before[reason])
        return sum(cleaner.counts.values()) - sum(before.values())

    def count_tokenized(
        self, chunk: TokenizedChunk, examples: Sequence[Example], sources: np.ndarray, split: str
    ) -> None:
        """Adds the numbers of examples and tokens that were kept, cut, shortened and dropped in a chunk.

        Args:
            chunk: The chunk.
            examples: [m] examples that its indices refer to.
            sources: [m] numbers of their sources.
            split: `train` or `heldout`.
        """
        first = int(chunk.first)
        for name, places in (
            ("num_cut_up", chunk.cut_up),
            ("num_truncated", chunk.truncated),
            ("num_overlong_dropped", chunk.overlong),
            ("num_without_target", chunk.without_target),
        ):
            setattr(self, name, getattr(self, name) + len(places))
            room = SAMPLES_KEPT - len(self.samples.get(name, []))
            for place in places[:room].tolist():
                example, note = examples[place], f"{chunk.lengths[place - first]:,} tokens"
                self.add_samples(name, [DroppedSample(example.origin, text_shown(example), note)])
        self.num_tokens_lost += chunk.num_tokens_lost
        dropped = np.concatenate([chunk.overlong, chunk.without_target])
        lost = chunk.lengths[np.concatenate([chunk.truncated, dropped]) - first]
        self.longest_lost = max(self.longest_lost, int(lost.max(initial=0)))
        num_dropped = np.bincount(sources[dropped], minlength=len(self.sources))
        num_kept = np.bincount(sources[chunk.kept], minlength=len(self.sources))
        num_tokens = np.bincount(sources[chunk.kept], chunk.num_tokens, minlength=len(self.sources))
        for number, source in enumerate(self.sources):
            count, tokens = int(num_kept[number]), num_tokens[number]
            source["num_dropped"] += int(num_dropped[number])
            source[f"num_{split}"] = source.get(f"num_{split}", 0) + count
            source[f"num_{split}_tokens"] = source.get(f"num_{split}_tokens", 0) + int(tokens)

    def add_samples(self, name: str, samples: list[DroppedSample]) -> None:
        """Keeps the first of some samples, under the field that counts them."""
        kept = self.samples.setdefault(name, [])
        kept += [sample._asdict() for sample in samples[: SAMPLES_KEPT - len(kept)]]

    def count_row_changes(self, counter: RowCounter, with_notes: bool = True) -> None:
        """Adds what was changed in the rows of a source.

        Args:
            counter: The counter of these rows.
            with_notes: Whether its notes on files are kept, such as which columns aren't used.
        """
        for name, count in counter.changes.items():
            self.row_changes[name] = self.row_changes.get(name, 0) + count
        self.num_labelled_bad += counter.num_dropped
        for note in counter.notes() if with_notes else ():
            self.add_note(note)

    def add_note(self, note: str) -> None:
        """Adds a sentence on the files, once."""
        if note not in self.notes:
            self.notes.append(note)

    def row_change_reasons(self) -> dict[str, int]:
        """Returns the numbers of changed rows by what was done to them, in words."""
        counts = {name: self.row_changes.get(name, 0) for name in ROW_CHANGES if name not in ROWS_DROPPED}
        return {ROW_CHANGES[name]: count for name, count in counts.items() if count}

    def drop_reasons(self) -> str:
        """Returns a sentence that says why rows were dropped; empty if none were."""
        reasons = {reason: getattr(self, name) for name, reason in DROP_REASONS.items()}
        named = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count)
        return f"Dropped: {named}." if named else ""

    def tokens_lost(self) -> str:
        """Returns a sentence on the tokens that are lost because examples are too long; empty if none are."""
        if not self.num_tokens_lost:
            return ""
        return (
            f"{self.num_tokens_lost:,} of {self.num_tokens:,} tokens ({self.share_lost:.1%}) are cut off or dropped "
            f"because examples are too long. --max_length={self.longest_lost - 1} loses none."
        )

    def summary(self) -> str:
        """Returns in a few sentences what is trained on, what is held out, and what is lost."""
        what = f"{self.num_train:,} examples for training, {self.num_heldout:,} held out."
        return " ".join(filter(None, (what, self.drop_reasons(), self.tokens_lost())))
