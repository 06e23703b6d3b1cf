"""Gemma's chat templates: the text that a conversation becomes, and which parts of it are learnt.

The rendered text is what the Jinja template in each family's tokenizer_config.json gives
(huggingface.co/google/gemma-3-1b-it, …/gemma-2-2b-it, …/gemma-4-E2B-it; Google's "Gemma formatting" guide describes
both forms). Gemma 1 and 2 were trained without a system role and their template refuses one; the guide says to put
instructions into the first user turn, which is what Gemma 3's template does and what is done here for all three.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from gemma_tune.data.example import Turn


class Piece(NamedTuple):
    """A part of a rendered conversation that is tokenized by itself, and whether it is learnt."""

    text: str
    is_target: bool


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """How one family writes turns.

    Attributes:
        start_of_turn, end_of_turn: Control tokens around a turn.
        system_has_turn: Whether a system turn stands by itself; else it opens the first user turn.
    """

    start_of_turn: str
    end_of_turn: str
    system_has_turn: bool
    bos: str = "<bos>"
    eos: str = "<eos>"

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Tokens that must not occur in what a turn says."""
        return (self.start_of_turn, self.end_of_turn, self.bos, self.eos, "<pad>")

    def render(self, turns: Sequence[Turn], add_generation_prompt: bool = False) -> str:
        """Returns the whole text, `<bos>` included, as the family's own template renders it."""
        text = self.bos + "".join(piece.text for piece in self.pieces(turns))
        return text + self.generation_prompt if add_generation_prompt else text

    @property
    def generation_prompt(self) -> str:
        """What stands before an answer."""
        return f"{self.start_of_turn}model\n"

    def pieces(self, turns: Sequence[Turn]) -> list[Piece]:
        """Returns the text behind `<bos>` in pieces.

        Learnt are what the model says and its end of turn, in every turn.
        """
        if turns and turns[0].role == "text":
            return [Piece(turns[0].content, True), Piece(self.eos, True)]
        pieces: list[Piece] = []
        context = ""  # Grows until something is to be learnt.
        system = ""
        for turn in turns:
            content = turn.content.strip()
            if turn.role == "system" and not self.system_has_turn:
                system = turn.content + "\n\n"
                continue
            context += f"{self.start_of_turn}{turn.role}\n{system}"
            system = ""
            if turn.role == "model":
                pieces += [Piece(context, False), Piece(content + self.end_of_turn, True)]
                context = "\n"
            else:
                context += f"{content}{self.end_of_turn}\n"
        return [*pieces, Piece(context, False)] if context else pieces


_GEMMA = ChatTemplate("<start_of_turn>", "<end_of_turn>", system_has_turn=False)
_GEMMA4 = ChatTemplate("<|turn>", "<turn|>", system_has_turn=True)


def template_for(family: str) -> ChatTemplate:
    """Returns the template of a family: `gemma`, `gemma2`, `gemma3`, `gemma3n` or `gemma4`."""
    return _GEMMA4 if family == "gemma4" else _GEMMA
