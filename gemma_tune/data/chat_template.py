"""Renders conversations with Gemma's chat templates, and says which parts of them the model learns.

The text equals what the Jinja template in each family's tokenizer_config.json renders
(huggingface.co/google/gemma-3-1b-it, …/gemma-2-2b-it, …/gemma-4-E2B-it; Google's "Gemma formatting" guide describes
both forms). Gemma 1 and 2 were trained without a system role, and their template refuses one. The guide says to put
instructions into the first user turn, as Gemma 3's template does; here all three do so.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from gemma_tune.data.example import Turn


class TextSpan(NamedTuple):
    """A part of a rendered conversation that is tokenized by itself.

    Attributes:
        text: The text.
        is_target: Whether the model learns it.
    """

    text: str
    is_target: bool


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """The chat template of one family.

    Attributes:
        start_of_turn: Control token before a turn.
        end_of_turn: Control token after a turn.
        system_has_turn: Whether the system prompt is a turn of its own. Otherwise it opens the first user turn.
        bos: Control token before a text.
        eos: Control token after a document.
    """

    start_of_turn: str
    end_of_turn: str
    system_has_turn: bool
    bos: str = "<bos>"
    eos: str = "<eos>"

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Returns the tokens that must not occur in the content of a turn."""
        return (self.start_of_turn, self.end_of_turn, self.bos, self.eos, "<pad>")

    def render(self, turns: Sequence[Turn], add_generation_prompt: bool = False) -> str:
        """Returns the whole text, including `<bos>`, as the family's own template renders it.

        Args:
            turns: Turns of a conversation, or a document.
            add_generation_prompt: Whether the beginning of an answer follows.
        """
        text = self.bos + "".join(span.text for span in self.spans(turns))
        return text + self.generation_prompt if add_generation_prompt else text

    @property
    def generation_prompt(self) -> str:
        """Returns the text before an answer."""
        return f"{self.start_of_turn}model\n"

    def spans(self, turns: Sequence[Turn]) -> list[TextSpan]:
        """Returns the text after `<bos>` in spans.

        The model learns what it says and the end of its turn, in every turn of a conversation.
        """
        if turns and turns[0].role == "text":
            return [TextSpan(turns[0].content, True), TextSpan(self.eos, True)]
        spans: list[TextSpan] = []
        context = ""  # Grows until the next target.
        system = ""
        for turn in turns:
            content = turn.content.strip()
            if turn.role == "system" and not self.system_has_turn:
                system = turn.content + "\n\n"
                continue
            context += f"{self.start_of_turn}{turn.role}\n{system}"
            system = ""
            if turn.role == "model":
                spans += [TextSpan(context, False), TextSpan(content + self.end_of_turn, True)]
                context = "\n"
            else:
                context += f"{content}{self.end_of_turn}\n"
        return [*spans, TextSpan(context, False)] if context else spans


_GEMMA = ChatTemplate("<start_of_turn>", "<end_of_turn>", system_has_turn=False)
_GEMMA4 = ChatTemplate("<|turn>", "<turn|>", system_has_turn=True)


def template_for(family: str) -> ChatTemplate:
    """Returns the template of a family: `gemma`, `gemma2`, `gemma3`, `gemma3n` or `gemma4`."""
    return _GEMMA4 if family == "gemma4" else _GEMMA
