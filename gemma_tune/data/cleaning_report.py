"""What happened to the rows on their way to the model."""

import dataclasses
from typing import Any

import numpy as np

from gemma_tune.data.tokenize import TokenizedChunk


@dataclasses.dataclass
class DataReport:
    """What happened to the rows, in the order in which it happens. lengths are in tokens, before shortening."""

    num_rows: int = 0
    num_unreadable: int = 0
    errors: list[str] = dataclasses.field(default_factory=list)  # The first unreadable rows' messages.
    num_empty: int = 0
    num_control_tokens: int = 0
    num_duplicates: int = 0
    num_in_heldout: int = 0
    num_truncated: int = 0
    num_overlong_dropped: int = 0
    num_without_target: int = 0
    num_train: int = 0
    num_heldout: int = 0
    lengths: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, np.int32))

    def counts(self) -> dict[str, Any]:
        """Returns everything but the lengths, as plain values."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "lengths"]
        return {name: getattr(self, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, with the lengths summed up."""
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
        """Adds what was shortened and dropped in a chunk."""
        self.num_truncated += chunk.num_truncated
        self.num_overlong_dropped += chunk.num_overlong_dropped
        self.num_without_target += chunk.num_without_target

    def reasons(self) -> str:
        """Returns why cleaning and splitting dropped rows, as a sentence."""
        reasons = {
            "unreadable": self.num_unreadable,
            "empty": self.num_empty,
            "with control tokens": self.num_control_tokens,
            "duplicates": self.num_duplicates,
            "with a held-out question": self.num_in_heldout,
        }
        return "Dropped: " + ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count) + "."
