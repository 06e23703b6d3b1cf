"""Encodes questions and conversations as prompts: chat turns to token ids, the same way for every use of a model."""

import functools
from collections.abc import Sequence

from gemma_tune.data import ChatTemplate, Turn, template_for
from gemma_tune.models.family import family_of
from gemma_tune.models.sources.tokenizer import TextTokenizer, tokenizer_of
from gemma_tune.runtime.backend import keras
from gemma_tune.serving.grammar.constraints import Grammars

# A question, or a conversation that ends with the user's turn.
Prompt = str | Sequence[Turn]


class PromptEncoder:
    """Turns prompts into the token ids that a model continues with its answer.

    Attributes:
        tokenizer: The model's tokenizer.
        template: Chat template of the model's family.
        stop_ids: Tokens that end an answer: the end of a turn, `<eos>`, and what asks for the result of a tool.

    Raises:
        ModelError: The vocabulary lacks a token of the chat template.
    """

    def __init__(self, tokenizer: TextTokenizer, template: ChatTemplate):
        self.tokenizer, self.template = tokenizer, template
        self.stop_ids: tuple[int, ...] = (tokenizer.id_of(template.end_of_turn), tokenizer.eos_id)
        response_start = tokenizer.encode(template.tools.response_start)
        if len(response_start) == 1:  # The model waits for the result of a call.
            self.stop_ids += tuple(response_start)

    @functools.cached_property
    def grammars(self) -> Grammars:
        """What compiles grammars for answers of this model."""
        return Grammars(self.tokenizer, self.stop_ids)

    def encode(self, prompt: Prompt) -> list[int]:
        """Returns the token ids of a question or conversation, `<bos>` included, up to where the answer begins."""
        turns = (Turn("user", prompt),) if isinstance(prompt, str) else prompt
        return self.encode_text(self.template.render(turns, add_generation_prompt=True))

    def encode_text(self, text: str) -> list[int]:
        """Returns `<bos>` and the token ids of a text as it is; a `<bos>` that the text begins with is not repeated."""
        return [self.tokenizer.bos_id, *self.tokenizer.encode(text.removeprefix(self.template.bos))]


def prompt_encoder_of(model: keras.Model) -> PromptEncoder:
    """Returns the PromptEncoder of a KerasHub CausalLM.

    Raises:
        ModelError: The model has no preprocessor, hence no tokenizer.
    """
    tokenizer = tokenizer_of(model)
    return PromptEncoder(tokenizer, template_for(family_of(model), tokenizer))
