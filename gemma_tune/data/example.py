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
    """One turn of a conversation, or a step of the model's turn.

    Attributes:
        role: `system`, `user` or `model`; `text` for a document, which is no conversation. `tools` declares tools after
            the system turn, as a JSON list of `{"name", "description", "parameters"}`. Steps of the model beside its
            text are a `thought`, and a `call` of a tool, `{"name", "arguments"}`. `tool` is its result, `{"name",
            "response"}`.
        content: Text of the turn.
        is_learnt: Whether the model learns it, if it is a step of the model's; otherwise it is context.
    """

    role: str
    content: str
    is_learnt: bool = True


MODEL_STEPS = ("thought", "model", "call")  # What the model says itself.


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
        """Returns what the model says at the end, with its calls as JSON in tags; empty for a document."""
        said = [step for step in self.turns[len(self.prompt) :] if step.role != "thought"]
        texts = (
            step.content if step.role == "model" else f"<tool_call>\n{step.content}\n</tool_call>" for step in said
        )
        return "\n".join(texts)

    @property
    def prompt(self) -> tuple[Turn, ...]:
        """Returns the turns before the model's last steps: its text or calls, and the thoughts that lead to them."""
        end = len(self.turns)
        while end and self.turns[end - 1].role in MODEL_STEPS:
            end -= 1
        return self.turns[:end]


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
