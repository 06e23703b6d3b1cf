"""Defines the questions that a model is evaluated on."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from gemma_tune.data import Turn


class EvalCase(NamedTuple):
    """One question of an evaluation, with what is known about it.

    Attributes:
        prompt: Conversation that ends with the user's turn.
        reference: Wanted answer; '' where none is given.
        columns: All values of its row by name, such as `topic`.
        origin: File and line that it was read from.
    """

    prompt: tuple[Turn, ...]
    reference: str
    columns: Mapping[str, Any]
    origin: str = ""

    @property
    def question(self) -> str:
        """Returns the last user turn."""
        return next((turn.content for turn in reversed(self.prompt) if turn.role == "user"), "")
