"""What all bodies of requests have in common: nothing is guessed, and what isn't supported is refused by name."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

# Known parameter that isn't supported -> values that ask for nothing. Besides OpenAI's these are those that clients of
# vLLM and llama.cpp send.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "functions": (None, []),
    "function_call": (None, "none"),
    "audio": (None,),
    "annotations": (None, []),
    "refusal": (None, ""),
    "reasoning": (None, ""),
    "reasoning_content": (None, ""),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "reasoning_effort": (None, "none"),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
    "store": (None, False),
    "suffix": (None, ""),
    "echo": (None, False),
    "best_of": (None, 1),
    "min_tokens": (None, 0),
    "length_penalty": (None, 1),
    "use_beam_search": (None, False),
    "ignore_eos": (None, False),
    "skip_special_tokens": (None, True),
    "add_generation_prompt": (None, True),
    "continue_final_message": (None, False),
    "chat_template_kwargs": (None, {}, {"enable_thinking": False}),
    "cache_prompt": (None, True, False),
}


def _without_lone_surrogates(text: str) -> str:
    """Returns the text if it is valid Unicode. JSON can spell lone surrogates."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("value", "must be valid Unicode, but contains a lone surrogate") from None
    return text


Unicode = Annotated[str, AfterValidator(_without_lone_surrogates)]


class StrictBody(BaseModel):
    """A body without guesses: "1" is not a number, and a parameter that doesn't exist is an error."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_unsupported(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        kept = {}
        for name, value in values.items():
            if name in cls.model_fields or name not in _UNSUPPORTED:
                kept[name] = value
            elif value not in _UNSUPPORTED[name]:
                raise PydanticCustomError("unsupported", "is not supported by this server", {"param": name})
        return kept
