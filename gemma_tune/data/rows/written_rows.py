"""Writes examples as rows that are read back as they are."""

import json
from typing import Any

from gemma_tune.data.example import Example, Turn

_ROLES = {"model": "assistant", "call": "assistant", "thought": "assistant"}


def chat_row(example: Example) -> dict[str, Any]:
    """Returns an example as a row: a document as `{"text": …}`, a conversation in OpenAI's chat format."""
    if example.turns and example.turns[0].role == "text":
        return {"text": example.turns[0].content}
    row: dict[str, Any] = {"messages": []}
    thought = ""
    for turn in example.turns:
        if turn.role == "tools":
            row["tools"] = [{"type": "function", "function": tool} for tool in json.loads(turn.content)]
        elif turn.role == "thought":
            thought = turn.content
        else:
            _add(row["messages"], turn, thought)
            thought = ""
    return row


def _add(messages: list[dict[str, Any]], turn: Turn, thought: str) -> None:
    """Adds a step to the messages; calls go beside the text before them."""
    content: Any = json.loads(turn.content) if turn.role in ("call", "tool") else turn.content
    if turn.role == "tool":
        messages.append({"role": "tool", "name": content["name"], "content": content["response"]})
        return
    if turn.role == "call":
        last = messages[-1] if messages else {}
        if last.get("role") != "assistant" or thought:
            last = {"role": "assistant", "content": None, **({} if turn.is_learnt else {"train": False})}
            messages.append(last)
        last.setdefault("tool_calls", []).append({"type": "function", "function": content})
    else:
        messages.append({"role": _ROLES.get(turn.role, turn.role), "content": content})
        if not turn.is_learnt:
            messages[-1]["train"] = False
    if thought:
        messages[-1]["reasoning_content"] = thought
