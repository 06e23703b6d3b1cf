"""Grammar rules for answers that must be a tool call, or JSON of a given form."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gemma_tune.serving.grammar.constraints import json_rule
from gemma_tune.serving.tools.tool_text import Tool


def answer_rules(called: Sequence[Tool], schema: Mapping[str, Any] | None) -> str:
    """Returns the grammar of answers that call one of some tools, or follow a JSON schema.

    The calls have the form of `tool_text`. What a tool's schema says in keywords that the grammar doesn't support is
    left to the tool; a schema for answers must be supported as a whole.

    Args:
        called: Tools that may be called.
        schema: JSON schema of an answer without a call; None: the answer must be a call.
    """
    rules, choices = [], []
    for index, tool in enumerate(called):
        beginning = json.dumps(f'{{"name": {json.dumps(tool.name)}, "parameters": ')
        rules += [f'call{index}: {beginning} arguments{index} "}}"', f"arguments{index}: {_arguments_rule(tool)}"]
        choices.append(f"call{index}")
    if schema is not None:
        rules.append(f"answer: {json_rule(schema)}")
        choices.append("answer")
    return "\n".join([f"start: {' | '.join(choices)}", *rules])


def _arguments_rule(tool: Tool) -> str:
    nothing = {"type": "object", "properties": {}, "additionalProperties": False}
    schema = nothing if tool.parameters is None else {"type": "object", **tool.parameters}
    return json_rule(schema, is_lenient=True)
