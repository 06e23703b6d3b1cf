"""Reads the messages of a chat, in the dialects of OpenAI, ShareGPT, Anthropic and their relatives, as turns."""

import functools
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from gemma_tune.data.example import Turn
from gemma_tune.data.rows.cell_text import cell_text, joined_parts
from gemma_tune.data.rows.message_lists import message_list
from gemma_tune.data.rows.ready_made import without_end_tokens
from gemma_tune.data.rows.thoughts import THINK_SWITCH, split_thoughts
from gemma_tune.data.rows.tool_steps import call_names, call_turns, is_native_result, native_result_turns, result_turn
from gemma_tune.errors import DataError, did_you_mean

# Role as it is spelled elsewhere, in lower case and with `_` for spaces and hyphens -> role of a turn.
ROLES = {
    **dict.fromkeys(("system", "developer", "system_prompt"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "customer"), "user"),
    **dict.fromkeys(("assistant", "model", "gpt", "chatgpt", "bot", "chatbot", "bing", "bard", "ai"), "model"),
    **dict.fromkeys(("function_call", "tool_call", "tool_calls"), "call"),
    **dict.fromkeys(
        ("tool", "function", "observation", "ipython", "function_response", "function_output", "function_result",
         "tool_response", "tool_result", "tool_output"),
        "tool",
    ),
}  # fmt: skip
_KEYS = {
    "role": ("role", "from", "speaker", "author"),
    "content": ("content", "value", "text", "message"),
    "thought": ("reasoning_content", "thinking", "reasoning"),
    "calls": ("tool_calls", "function_call"),
    "results": ("tool_responses",),
    "weight": ("weight",),
    "train": ("train", "trainable"),
    "name": ("name",),
    "call_id": ("tool_call_id",),
}


class MessageKeys(NamedTuple):
    """The keys of a message, by what they are; '' where there is none.

    It is plain if it has a role and a content alone, and keys that aren't used.
    """

    role: str
    content: str
    thought: str
    calls: str
    results: str
    weight: str
    train: str
    name: str
    call_id: str
    is_plain: bool
    unused: tuple[str, ...]


def chat_turns(messages: Any, origin: str, changes: list[str], unused: dict[str, None], name: str) -> list[Turn]:
    """Returns the turns of a chat, in the order in which they stand.

    Args:
        messages: List of messages; or JSON of one, a list of texts that user and model say in turn, or a transcript
            with `Human:` and `Assistant:` before the paragraphs.
        origin: File and line, for the errors.
        changes: List that gets what was changed, with the names in `ROW_CHANGES`.
        unused: Dict that gets the keys of messages that aren't used.
        name: Name of the column.

    Raises:
        DataError: A message is of another shape, has an unknown role, or holds something that is no text.
    """
    messages = message_list(messages, origin, name)
    turns: list[Turn] = []
    names: dict[str, str] = {}  # Of the tools, by the ids of their calls.
    called: list[str] = []
    for number, message in enumerate(messages):
        if isinstance(message, str):
            message = {"role": ("user", "assistant")[number % 2], "content": message}
        if not isinstance(message, Mapping):
            raise DataError(f"{origin}: a turn needs 'role' and 'content', found {message!r:.60}.")
        keys = _keys_of(message)
        if not keys.role:
            raise DataError(f"{origin}: a turn needs 'role' and 'content', found {message!r:.60}.")
        role = _role(message[keys.role], origin)
        if keys.unused:
            unused.update(dict.fromkeys(f"{name}[].{key}" for key in keys.unused))
        if keys.is_plain and role in ("user", "model"):
            content = message[keys.content]
            if isinstance(content, str) and content.isascii() and "<" not in content:
                turns.append(Turn(role, content))  # Most messages.
                continue
        if role == "tool":
            turns += _results(message, keys, names, called, origin, changes)
            continue
        if keys.name and role != "call":
            unused[f"{name}[].{keys.name}"] = None
        if keys.calls:
            names.update(call_names(message[keys.calls]))
        steps = _steps(message, keys, role, origin, changes)
        called = [json.loads(step.content)["name"] for step in steps if step.role == "call"] or called
        turns += steps
    if not turns:
        raise DataError(f"{origin}: {name!r}: expected a list of turns, found none with content.")
    return turns


def _keys_of(message: Mapping[str, Any]) -> MessageKeys:
    names = tuple(message)
    if None in message.values():  # Parquet's structs have the keys of all their neighbours.
        names = tuple(name for name, value in message.items() if value is not None)
    return _message_keys(names)


@functools.lru_cache(maxsize=1024)
def _message_keys(names: tuple[str, ...]) -> MessageKeys:
    found = {kind: next((key for key in keys if key in names), "") for kind, keys in _KEYS.items()}
    is_plain = {kind for kind, key in found.items() if key} == {"role", "content"}
    return MessageKeys(**found, is_plain=is_plain, unused=tuple(name for name in names if name not in found.values()))


def _role(value: Any, origin: str) -> str:
    if isinstance(value, str) and value in ROLES:
        return ROLES[value]
    spelled = str(value).strip().lower().replace("-", "_").replace(" ", "_")
    role = ROLES.get(spelled)
    if role is None:
        raise DataError(f"{origin}: role {value!r:.40} is not one of {', '.join(ROLES)}.{did_you_mean(spelled, ROLES)}")
    return role


def _is_learnt(message: Mapping[str, Any], keys: MessageKeys, origin: str) -> bool:
    for key, allowed in ((keys.weight, "0 or 1"), (keys.train, "true or false")):
        if key:
            value = message[key]
            if isinstance(value, str) and value.lower() in ("true", "false"):
                value = value.lower() == "true"
            if value not in (0, 1):
                raise DataError(f"{origin}: {key!r} of a turn must be {allowed}, found {value!r:.40}.")
            if not value:
                return False
    return True


def _steps(message: Mapping[str, Any], keys: MessageKeys, role: str, origin: str, changes: list[str]) -> list[Turn]:
    """Returns the turn of a message, in several steps where the model thinks or calls tools."""
    content = message[keys.content] if keys.content else None
    is_learnt = role not in ("model", "call") or _is_learnt(message, keys, origin)
    if not is_learnt:
        changes.append("turns_not_learnt")
    if role == "call":
        changes.append("with_tools")
        return call_turns(content, origin, is_learnt)
    steps: list[Turn] = []
    if isinstance(content, list):
        content, extra = _without_blocks(content, origin, is_learnt)
        steps += [step for step in extra if step.role == "thought"] if role == "model" else []
    else:
        extra = []
    text = without_end_tokens(_content_text(content, keys.content or "content", origin, changes), changes)
    calls = call_turns(message[keys.calls], origin, is_learnt) if keys.calls and message[keys.calls] else []
    calls += [step for step in extra if step.role == "call"]
    if calls:
        changes.append("with_tools")
    if role == "model":
        steps += _thought_steps(message, keys, text, origin, is_learnt)
        text = split_thoughts(text)[1]
        if text.strip() or not calls:
            steps.append(Turn("model", text, is_learnt))
        steps += calls
        for result in (message[keys.results] or []) if keys.results else []:
            steps += native_result_turns(result, origin)
        return steps
    results = [step for step in extra if step.role == "tool"]
    if role == "system" and THINK_SWITCH in text:
        text = text.replace(THINK_SWITCH, "").lstrip()
        changes.append("end_tokens_removed")
    is_nothing = not text.strip() and (results or role == "system")
    return results if is_nothing else [*results, Turn(role, text)]


def _thought_steps(
    message: Mapping[str, Any], keys: MessageKeys, text: str, origin: str, is_learnt: bool
) -> list[Turn]:
    given = cell_text(message[keys.thought], keys.thought, origin, []) if keys.thought else ""
    inline = split_thoughts(text)[0]
    return [Turn("thought", thought, is_learnt) for thought in dict.fromkeys((given.strip(), inline)) if thought]


def _content_text(content: Any, name: str, origin: str, changes: list[str]) -> str:
    if isinstance(content, str):
        return content if content.isascii() else cell_text(content, name, origin, changes)
    if isinstance(content, Mapping) and ("type" in content or "text" in content):
        content = [content]
    if isinstance(content, list):
        return joined_parts(content, name, origin, changes)
    return cell_text(content, name, origin, changes)


def _without_blocks(parts: list, origin: str, is_learnt: bool) -> tuple[list, list[Turn]]:
    """Takes thoughts, calls and results out of a list of parts, as Anthropic's messages have them."""
    kept, steps = [], []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in ("thinking", "reasoning"):
            text = cell_text(part.get("thinking") or part.get("text"), "thinking", origin, [])
            steps += [Turn("thought", text, is_learnt)] if text.strip() else []
        elif kind in ("tool_use", "tool_call", "function_call"):
            steps += call_turns(part, origin, is_learnt)
        elif kind == "tool_result":
            inner = part.get("content")
            steps.append(
                result_turn(
                    "", joined_parts(inner, "content", origin, []) if isinstance(inner, list) else inner, origin
                )
            )
        else:
            kept.append(part)
    return kept, steps


def _results(
    message: Mapping[str, Any], keys: MessageKeys, names: Mapping[str, str], called: list[str], origin: str,
    changes: list[str],
) -> list[Turn]:  # fmt: skip
    """Returns the results in a message of a tool, with the name of the tool where it can be known."""
    changes.append("with_tools")
    content = message[keys.content] if keys.content else ""
    if isinstance(content, list) and content and all(is_native_result(part) for part in content):
        return [step for part in content for step in native_result_turns(part, origin)]
    if is_native_result(content):
        return native_result_turns(content, origin)
    name = message[keys.name] if keys.name else ""
    if not name and keys.call_id:
        name = names.get(str(message[keys.call_id]), "")
    if not name and len(set(called)) == 1:
        name = called[0]
    if not isinstance(content, Mapping) or "type" in content:
        content = _content_text(content, keys.content, origin, changes)
    return [result_turn(cell_text(name, "name", origin, []), content, origin)]
