"""Turns the messages of a conversation into Gemma's turns.

Gemma's templates know a system text, and user and model in turn. Clients send more than that, and nothing of it is
lost: neighbours of one role are joined; system messages at the beginning are joined into the system text; the text of a
later one is put before the next user's message. Results of tools are the user's, calls are the model's.
"""

import json
from collections.abc import Mapping, Sequence

from gemma_tune.data import Turn
from gemma_tune.serving.http.api_errors import ApiError, invalid
from gemma_tune.serving.http.schema.message_schema import Message, MessageToolCall
from gemma_tune.serving.tools.tool_text import CalledTool, Tool, calls_text, declaration_text, result_text

_ROLES = {"system": "system", "developer": "system", "user": "user", "tool": "user", "assistant": "model"}


def turns_of(
    messages: Sequence[Message], control_tokens: Sequence[str], tools: Sequence[Tool] = ()
) -> tuple[Turn, ...]:
    """Returns a conversation's turns: a system turn, if there is anything for it, then user and model in turn.

    Args:
        messages: Messages of the conversation.
        control_tokens: Control tokens, with which a text could pass for another role's turn.
        tools: Tools that the model may call.

    Raises:
        ApiError: The assistant is first or last, a message lacks its content, the result of a tool belongs to no call,
            or a text holds a control token.
    """
    system, turns = _system_and_turns(messages, control_tokens)
    if not turns or turns[-1].role != "user":
        raise invalid("messages", "the last message must have the role 'user' or 'tool'")
    declared = declaration_text(tools)
    _check_no_control(declared, "tools", control_tokens)
    system_text = _joined([*system, declared])
    return (Turn("system", system_text), *turns) if system_text else tuple(turns)


def _system_and_turns(messages: Sequence[Message], control_tokens: Sequence[str]) -> tuple[list[str], list[Turn]]:
    """Returns the system texts at the beginning, and the turns of user and model."""
    system: list[str] = []
    waiting: list[str] = []  # Texts of later system messages.
    turns: list[Turn] = []
    names: dict[str, str] = {}  # Id of a call -> name of the function.
    for index, message in enumerate(messages):
        text = _text_of(message, f"messages[{index}]", names)
        _check_no_control(text, f"messages[{index}].content", control_tokens)
        role = _ROLES[message.role]
        if role == "system":
            (waiting if turns else system).append(text)
            continue
        if role == "model" and not turns:
            raise invalid(
                f"messages[{index}].role", "'user' was expected, got 'assistant': a conversation begins with the user"
            )
        if role == "user":
            text, waiting = _joined([*waiting, text]), []
        _add(turns, role, text)
    if waiting and messages[-1].role != "assistant":
        _add(turns, "user", _joined(waiting))
    return system, turns


def _add(turns: list[Turn], role: str, text: str) -> None:
    """Appends a turn, or joins it to the last if that has the same role."""
    if turns and turns[-1].role == role:
        turns[-1] = Turn(role, _joined([turns[-1].content, text]))
    else:
        turns.append(Turn(role, text))


def _joined(texts: Sequence[str]) -> str:
    return "\n\n".join(text for text in texts if text)


def _text_of(message: Message, place: str, names: dict[str, str]) -> str:
    """Returns a message as text, and remembers the names of the functions that it calls."""
    if message.role != "assistant":
        if message.tool_calls:
            raise invalid(f"{place}.tool_calls", "only an assistant calls tools")
        if message.content is None:
            raise ApiError(
                400, f"{place}.content is missing.", param=f"{place}.content", code="missing_required_parameter"
            )
        return _result_of(message, place, names) if message.role == "tool" else message.text
    calls = [
        _call_of(call, f"{place}.tool_calls[{index}].function") for index, call in enumerate(message.tool_calls or ())
    ]
    names.update((call.id, call.function.name) for call in message.tool_calls or ())
    return _joined([message.text, calls_text(calls) if calls else ""])


def _result_of(message: Message, place: str, names: Mapping[str, str]) -> str:
    if message.tool_call_id is None or message.tool_call_id not in names:
        known = ", ".join(map(repr, names)) or "none"
        raise invalid(
            f"{place}.tool_call_id",
            f"must be the id of a tool call in an assistant's message before it, got {message.tool_call_id!r}; "
            f"ids: {known}",
        )
    return result_text(names[message.tool_call_id], message.text)


def _call_of(call: MessageToolCall, place: str) -> CalledTool:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise invalid(f"{place}.arguments", "must be the text of a JSON object")
    return CalledTool(call.function.name, arguments)


def _check_no_control(text: str, place: str, control_tokens: Sequence[str]) -> None:
    if found := [token for token in control_tokens if token in text]:
        raise invalid(place, f"a message must not contain the control token {found[0]!r}")
