"""The values that travel through the data pipeline."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from gemma_tune.errors import DataError


class Row(NamedTuple):
    """One record as a file holds it, and where it stood: `support.jsonl:17`."""

    fields: Mapping[str, Any]
    origin: str


class Turn(NamedTuple):
    """One turn of a conversation. role: `system`, `user` or `model`; `text` for a document that is no conversation."""

    role: str
    content: str


class Example(NamedTuple):
    """One conversation, or one document (a single `text` turn), and where it came from."""

    turns: tuple[Turn, ...]
    origin: str = ""

    @property
    def question(self) -> str:
        """What the split goes by: the first user turn, or the document itself."""
        return next((turn.content for turn in self.turns if turn.role in ("user", "text")), "")

    @property
    def answer(self) -> str:
        """The last model turn; empty for a document."""
        return next((turn.content for turn in reversed(self.turns) if turn.role == "model"), "")


class TokenizedExample(NamedTuple):
    """Token ids of an example and which of them are to be learnt.

    token_ids: [n] int32, beginning with `<bos>`. is_target: [n] bool; never true for the first token.
    """

    token_ids: np.ndarray
    is_target: np.ndarray


class Batch(NamedTuple):
    """Rows of packed examples. Every field is [B, L]; int32 except loss_weights, which is float32.

    Position t of a row reads token_ids[t] and is scored on predicting target_ids[t], the token behind it. segment_ids
    number the examples of a row from 1; 0 is padding. positions count from 0 within each example.
    """

    token_ids: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    target_ids: np.ndarray
    loss_weights: np.ndarray


class Tokenizer(Protocol):
    """What the data pipeline asks of a tokenizer. Special tokens such as `<end_of_turn>` in a text become their ids.

    proto: the serialized SentencePiece model.
    """

    proto: bytes
    bos_id: int
    eos_id: int

    def encode(self, text: str) -> list[int]: ...


# Called with each unreadable row: raises it, or counts it and returns.
Report = Callable[[DataError], None]
