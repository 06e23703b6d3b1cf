"""Renders conversations with Gemma's chat templates, and says which parts of them the model learns.

The text equals what the Jinja template in each family's tokenizer_config.json renders
(huggingface.co/google/gemma-3-1b-it, …/gemma-2-2b-it, …/gemma-4-E2B-it, …/functiongemma-270m-it; Google's "Gemma
formatting" guide describes them). Gemma 1 and 2 were trained without a system role, and their template refuses one. The
guide says to put instructions into the first user turn, as Gemma 3's template does; here all three do so.

A model turn may consist of several steps: thoughts, text, calls of tools and, in the families that have tokens for
them, the results. The model learns its own steps, and the token with which it asks for a result.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from gemma_tune.data.example import MODEL_STEPS, Tokenizer, Turn
from gemma_tune.data.tool_markup import (
    FUNCTION_GEMMA_TOOLS,
    GEMMA4_TOOLS,
    TEXT_TOOLS,
    TextToolMarkup,
    TokenToolMarkup,
)

_PLAIN_ROLES = frozenset(("system", "user", "model"))
_SYSTEM_ROLES = ("system", "tools")


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
        system_role: Name of the role of that turn.
        thought: What stands before and after a thought.
        think: What opens the system turn of a conversation with thoughts.
        tools: Markup of tools.
        bos: Control token before a text.
        eos: Control token after a document.
    """

    start_of_turn: str
    end_of_turn: str
    system_has_turn: bool
    system_role: str = "system"
    thought: tuple[str, str] = ("<think>\n", "\n</think>\n\n")
    think: str = ""
    tools: TextToolMarkup | TokenToolMarkup = TEXT_TOOLS
    bos: str = "<bos>"
    eos: str = "<eos>"

    @property
    def turn_tokens(self) -> tuple[str, ...]:
        """Returns the tokens around texts and turns."""
        return (self.start_of_turn, self.end_of_turn, self.bos, self.eos, "<pad>")

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Returns the tokens that must not occur in the content of a turn."""
        thinking = ("<|channel>", "<channel|>", "<|think|>") if self.think else ()
        return (*self.turn_tokens, *thinking, *self.tools.control_tokens)

    def render(self, turns: Sequence[Turn], add_generation_prompt: bool = False) -> str:
        """Returns the whole text, including `<bos>`, as the family's own template renders it.

        Args:
            turns: Turns of a conversation, or a document.
            add_generation_prompt: Whether the beginning of an answer follows.
        """
        text = self.bos + "".join(span.text for span in self.spans(turns))
        return text + self.generation_prompt_after(turns) if add_generation_prompt else text

    @property
    def generation_prompt(self) -> str:
        """Returns the text before an answer."""
        return f"{self.start_of_turn}model\n"

    def generation_prompt_after(self, turns: Sequence[Turn]) -> str:
        """Returns the text before an answer to turns: none where a result stands in the model's turn, which goes on."""
        is_open = bool(turns) and turns[-1].role == "tool" and self.tools.results_in_model_turn
        return "" if is_open else self.generation_prompt

    def spans(self, turns: Sequence[Turn]) -> list[TextSpan]:
        """Returns the text after `<bos>` in spans.

        The model learns what it says and the end of its turn, in every turn of a conversation that isn't marked as not
        learnt.
        """
        if turns and turns[0].role == "text":
            return [TextSpan(turns[0].content, True), TextSpan(self.eos, True)]
        if any(turn.role not in _PLAIN_ROLES for turn in turns):
            return _merged(self._steps(turns))
        spans: list[TextSpan] = []
        context = ""  # Grows until the next target.
        system = ""
        for turn in turns:
            content = turn.content.strip()
            if turn.role == "system" and not self.system_has_turn:
                system = turn.content + "\n\n"
                continue
            context += f"{self.start_of_turn}{self.system_role if turn.role == 'system' else turn.role}\n"
            if turn.role == "model" and turn.is_learnt:
                spans += [TextSpan(context, False), TextSpan(content + self.end_of_turn, True)]
                context = "\n"
                continue
            if turn.role == "user":
                content, system = system + content, ""
            context += f"{content}{self.end_of_turn}\n"
        return [*spans, TextSpan(context, False)] if context else spans

    def _steps(self, turns: Sequence[Turn]) -> Iterator[TextSpan]:
        """Yields the spans of a conversation with tools or thoughts."""
        system = self._system_text([turn for turn in turns if turn.role in _SYSTEM_ROLES], turns)
        if system and self.system_has_turn:
            yield TextSpan(f"{self.start_of_turn}{self.system_role}\n{system}{self.end_of_turn}\n", False)
            system = ""
        spoken = [turn for turn in turns if turn.role not in _SYSTEM_ROLES]
        groups = [(speaker, list(group)) for speaker, group in groupby(spoken, self._speaker)]
        for number, (speaker, steps) in enumerate(groups, 1):
            yield TextSpan(f"{self.start_of_turn}{speaker}\n", False)
            if speaker == "model":
                yield from self._model_steps(steps, number == len(groups))
            else:
                text = "\n\n".join(self._user_text(step) for step in steps)
                opening, system = (f"{system}\n\n" if system else ""), ""
                yield TextSpan(f"{opening}{text}{self.end_of_turn}\n", False)

    def _speaker(self, turn: Turn) -> str:
        is_model = turn.role in MODEL_STEPS or (turn.role == "tool" and self.tools.results_in_model_turn)
        return "model" if is_model else "user"

    def _system_text(self, system: Sequence[Turn], turns: Sequence[Turn]) -> str:
        """Returns the text of the system turn: the switch for thoughts, instructions, and declarations of tools."""
        has_thoughts = self.think and any(turn.role == "thought" for turn in turns)
        text = "\n\n".join(turn.content.strip() for turn in system if turn.role == "system")
        declared = "".join(self.tools.declarations(json.loads(turn.content)) for turn in system if turn.role == "tools")
        between = "\n\n" if text and declared and not self.tools.results_in_model_turn else ""
        return f"{self.think if has_thoughts else ''}{text}{between}{declared}"

    def _model_steps(self, steps: Sequence[Turn], is_last: bool) -> Iterator[TextSpan]:
        """Yields the spans of a model turn after its header.

        Args:
            steps: Thoughts, texts, calls and results, in order. Text stands before the calls beside it, as it is
                generated; Gemma 4's own template puts it behind their results.
            is_last: Whether no turn follows. A model that waits for a result doesn't end its turn.
        """
        begun = ""  # What the model has written of the result that follows.
        for step, after in zip(steps, [*(each.role for each in steps[1:]), ""], strict=True):
            asks = ""
            if step.role == "thought":
                yield TextSpan(self.thought[0] + step.content.strip() + self.thought[1], step.is_learnt)
            elif step.role == "call":
                asks = self.tools.response_start if after in ("tool", "") else ""
                yield TextSpan(self._call(step) + asks, step.is_learnt)
            elif step.role == "model":
                yield TextSpan(step.content.strip(), step.is_learnt)
            else:
                yield TextSpan(self._result(step).removeprefix(begun), False)
            begun = asks
            if after in ("call", "model") and step.role != "thought" and not self.tools.results_in_model_turn:
                yield TextSpan("\n", step.is_learnt)
        last = steps[-1]
        waits = last.role in ("call", "tool") and self.tools.results_in_model_turn
        if not waits or (last.role == "tool" and not is_last):
            yield TextSpan(self.end_of_turn, last.is_learnt and not waits)
            yield TextSpan("\n", False)

    def _user_text(self, turn: Turn) -> str:
        return self._result(turn) if turn.role == "tool" else turn.content.strip()

    def _call(self, turn: Turn) -> str:
        call: dict[str, Any] = json.loads(turn.content)
        return self.tools.call(call["name"], call["arguments"])

    def _result(self, turn: Turn) -> str:
        result: dict[str, Any] = json.loads(turn.content)
        return self.tools.result(result["name"], result["response"])


_GEMMA = ChatTemplate("<start_of_turn>", "<end_of_turn>", system_has_turn=False)
_GEMMA4 = ChatTemplate(
    "<|turn>",
    "<turn|>",
    system_has_turn=True,
    thought=("<|channel>thought\n", "\n<channel|>"),
    think="<|think|>\n",
    tools=GEMMA4_TOOLS,
)
_FUNCTION_GEMMA = ChatTemplate(
    "<start_of_turn>", "<end_of_turn>", system_has_turn=True, system_role="developer", tools=FUNCTION_GEMMA_TOOLS
)


def template_for(family: str, tokenizer: Tokenizer | None = None) -> ChatTemplate:
    """Returns the template of a family.

    Args:
        family: `gemma`, `gemma2`, `gemma3`, `gemma3n` or `gemma4`.
        tokenizer: Tokenizer of the model. FunctionGemma is a Gemma 3 whose vocabulary has tokens for tools.
    """
    if family == "gemma4":
        return _GEMMA4
    has_tool_tokens = tokenizer is not None and len(tokenizer.encode(FUNCTION_GEMMA_TOOLS.calling[0])) == 1
    return _FUNCTION_GEMMA if has_tool_tokens else _GEMMA


def all_control_tokens() -> list[str]:
    """Returns the control tokens of all families. A text that holds one of another family is no use to any."""
    return sorted({token for each in (_GEMMA, _GEMMA4, _FUNCTION_GEMMA) for token in each.control_tokens})


def _merged(spans: Iterable[TextSpan]) -> list[TextSpan]:
    """Returns spans with neighbours of one kind joined."""
    merged: list[TextSpan] = []
    for is_target, group in groupby((span for span in spans if span.text), lambda span: span.is_target):
        merged.append(TextSpan("".join(span.text for span in group), is_target))
    return merged
