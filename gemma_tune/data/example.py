"""Defines the values that travel through the data pipeline."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from gemma_tune.errors import DataError


class Row(NamedTuple):
    """One record of a file or data set.

    Attributes:
        fields: Values by name.
        origin: File and line, such as `support.jsonl:17`.
    """

    fields: Mapping[str, Any]
    origin: str


class Turn(NamedTuple):
    """One turn of a conversation.

    Attributes:
        role: `system`, `user` or `model`; `text` for a document, which is no conversation.
        content: Text of the turn.
    """

    role: str
    content: str


class Example(NamedTuple):
    """One conversation, or one document.

    Attributes:
        turns: Turns of the conversation, or a single `text` turn.
        origin: File and line that it was read from.
    """

    turns: tuple[Turn, ...]
    origin: str = ""

    @property
    def num_characters(self) -> int:
        """Returns the length of its text."""
        return sum(len(turn.content) for turn in self.turns)

    @property
    def question(self) -> str:
        """Returns the first user turn, or the document itself. Equal questions are never split."""
        return next((turn.content for turn in self.turns if turn.role in ("user", "text")), "")

    @property
    def answer(self) -> str:
        """Returns the last model turn; empty for a document."""
        return next((turn.content for turn in reversed(self.turns) if turn.role == "model"), "")


class TokenizedExample(NamedTuple):
    """An example as tokens.

    Attributes:
        token_ids: [n] int32 token ids, beginning with `<bos>`.
        is_target: [n] bool, true for tokens that the model learns; never for the first one.
    """

    token_ids: np.ndarray
    is_target: np.ndarray


class Batch(NamedTuple):
    """Rows of packed examples.

    At position t of a row, the model reads token_ids[t] and predicts target_ids[t], the next token.

    Attributes:
        token_ids: [B, L] int32 tokens to read.
        segment_ids: [B, L] int32 number of the example in its row, from 1; 0 is padding.
        positions: [B, L] int32 position in the example, from 0.
        target_ids: [B, L] int32 tokens to predict.
        loss_weights: [B, L] float32 weight of each prediction; 0 where nothing is learnt.
    """

    token_ids: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    target_ids: np.ndarray
    loss_weights: np.ndarray


class Tokenizer(Protocol):
    """The part of a tokenizer that the data pipeline uses. Control tokens such as `<end_of_turn>` become their ids.

    Attributes:
        proto: Serialized SentencePiece model.
        bos_id: Token id of `<bos>`.
        eos_id: Token id of `<eos>`.
    """

    proto: bytes
    bos_id: int
    eos_id: int

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text."""
        ...


# A function that is called with each unreadable row's error: it raises the error, or counts it and returns.
OnRowError = Callable[[DataError], None]

# A function that is told, in a sentence, something about a file that its user should know.
OnNote = Callable[[str], None]
