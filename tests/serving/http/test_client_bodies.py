"""What clients send besides the plain question: their defaults, roles in any order, tools, and forms of answers."""

import itertools
import json

import pytest
from helpers.chat_requests import CHAT, TEXT, USER, answer_at_once, asked_of, events_of

from gemma_tune.models.load import load_tokenizer
from gemma_tune.serving.engine.request import AnswerDelta
from gemma_tune.serving.http.api_errors import ApiError
from gemma_tune.serving.http.chat_turns import turns_of
from gemma_tune.serving.http.schema.message_schema import Message
from gemma_tune.serving.logit_changes import NO_CHANGES, LogitChanges

FIND = {
    "type": "function",
    "function": {
        "name": "find_book",
        "description": "Finds a book's shelf.",
        "parameters": {"type": "object", "properties": {"title": {"type": "string"}}, "required": ["title"]},
    },
}
CLOSE = {"type": "function", "function": {"name": "close_library"}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "find_book", "arguments": '{"title": "Emma"}'}}


def prompt_of(client, **body):
    """The text of the prompt that a chat becomes, without <bos>."""
    (request,) = asked_of(client, **body)
    return load_tokenizer("tiny")[0].decode(request.prompt_ids[1:])


def turn(role, content, **rest):
    return {"role": role, "content": content, **rest}


def rendered(*turns):
    written = "".join(f"<start_of_turn>{role}\n{text}<end_of_turn>\n" for role, text in turns)
    return f"{written}<start_of_turn>model\n"


@pytest.mark.parametrize(
    "neutral",
    [
        {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "n": 1, "top_p": 1, "stop": None, "user": ""},
        {"max_tokens": None, "max_completion_tokens": None, "stop": [], "stream": False, "stream_options": None},
        {"tools": None, "tool_choice": None, "parallel_tool_calls": True, "response_format": None, "logit_bias": None},
        {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "reasoning_effort": None},
        {"functions": [], "function_call": "none", "modalities": ["text"], "audio": None, "verbosity": "medium"},
        {"store": False, "metadata": {"chat": "1"}, "service_tier": "auto", "seed": None, "prediction": None},
        {"chat_template_kwargs": {"enable_thinking": False}, "ignore_eos": False, "min_tokens": 0, "best_of": 1},
        {"logprobs": False, "top_logprobs": 0},
    ],
)  # fmt: skip
def test_what_asks_for_nothing_changes_nothing(scripted, neutral):
    (plain,), (asked,) = asked_of(scripted()), asked_of(scripted(), **neutral)
    assert asked._replace(seed=0) == plain._replace(seed=0)
    assert asked.changes == NO_CHANGES and asked.constraint is None


def test_penalties_and_bias_reach_the_engine(scripted):
    said = {"frequency_penalty": 1, "presence_penalty": -0.5, "logit_bias": {"300": 2, "7": -100, "8": 0}}
    for path in (CHAT, TEXT):
        (request,) = asked_of(scripted(), path, **said)
        assert request.changes == LogitChanges(-0.5, 1.0, ((300, 2.0), (7, -100.0)))


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_more_tokens_than_there_is_room_are_the_room(scripted, name):
    (plain,) = asked_of(scripted())
    room = 64 - len(plain.prompt_ids)
    lengths = {value: asked_of(scripted(), **{name: value})[0].max_new_tokens for value in (32_000, room, -1, 3)}
    assert lengths == {32_000: room, room: room, -1: room, 3: 3}


def test_only_a_prompt_without_room_for_an_answer_is_too_long(scripted):
    for max_tokens in (None, 1, -1):
        body = {"model": "m", "prompt": [5] * 63, "max_tokens": max_tokens}
        error = scripted().post(TEXT, json=body).json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    (request,) = asked_of(scripted(), TEXT, prompt=[5] * 62, max_tokens=500)
    assert request.max_new_tokens == 1


SHAPES = {
    "two users": ([turn("user", "Translate:"), turn("user", "Good night")], [("user", "Translate:\n\nGood night")]),
    "two assistants": (
        [turn("user", "a"), turn("assistant", "b"), turn("assistant", "c"), turn("user", "d")],
        [("user", "a"), ("model", "b\n\nc"), ("user", "d")],
    ),
    "systems at the beginning": (
        [turn("system", "Short."), turn("developer", "Kind."), turn("user", "a")],
        [("user", "Short.\n\nKind.\n\na")],
    ),
    "a system later": (
        [turn("user", "a"), turn("assistant", "b"), turn("system", "In French."), turn("user", "c")],
        [("user", "a"), ("model", "b"), ("user", "In French.\n\nc")],
    ),
    "a system between users": (
        [turn("user", "a"), turn("system", "s"), turn("user", "c")],
        [("user", "a\n\ns\n\nc")],
    ),
    "a system before an answer": (
        [turn("user", "a"), turn("system", "s"), turn("assistant", "b"), turn("user", "c")],
        [("user", "a"), ("model", "b"), ("user", "s\n\nc")],
    ),
    "a system before the last answer": (
        [turn("user", "a"), turn("system", "s"), turn("user", "b"), turn("assistant", "c"), turn("user", "d")],
        [("user", "a\n\ns\n\nb"), ("model", "c"), ("user", "d")],
    ),
    "a system last": (
        [turn("user", "a"), turn("assistant", "b"), turn("system", "Sum up.")],
        [("user", "a"), ("model", "b"), ("user", "Sum up.")],
    ),
    "a system after the last user": ([turn("user", "a"), turn("system", "s")], [("user", "a\n\ns")]),
    "names": ([turn("user", "a", name="ada<end_of_turn>")], [("user", "a")]),
    "an empty answer": (
        [turn("user", "a"), turn("assistant", None), turn("user", "b")],
        [("user", "a"), ("model", ""), ("user", "b")],
    ),
    "echoed nulls": (
        [turn("user", "a"), turn("assistant", "b", tool_calls=None, refusal=None, audio=None, annotations=[], function_call=None), turn("user", "c")],
        [("user", "a"), ("model", "b"), ("user", "c")],
    ),
    "parts with hints of caching": (
        [turn("user", [{"type": "text", "text": "a ", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "b"}])],
        [("user", "a b")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_roles_in_any_order_become_turns(scripted, name):
    messages, wanted = SHAPES[name]
    assert prompt_of(scripted(max_length=200), messages=messages) == rendered(*wanted)


def test_no_order_of_roles_loses_text_or_fails():
    """Every order of up to six messages: all texts are in turns that alternate, or the conversation is refused."""
    num_refused = num_taken = 0
    for count in range(1, 7):
        for roles in itertools.product(("system", "user", "assistant"), repeat=count):
            messages = [Message(role=role, content=f"text{index}.") for index, role in enumerate(roles)]
            without_system = [role for role in roles if role != "system"]
            if without_system[:1] in ([], ["assistant"]) or roles[-1] == "assistant":
                with pytest.raises(ApiError, match="messages"):
                    turns_of(messages, ())
                num_refused += 1
                continue
            turns = turns_of(messages, ())
            text = "".join(turn.content for turn in turns)
            assert all(text.count(message.text) == 1 for message in messages), roles
            spoken = [turn.role for turn in turns if turn.role != "system"]
            assert spoken == ["user", "model"] * (len(spoken) // 2) + ["user"], roles
            num_taken += 1
    assert num_refused > 300 and num_taken > 200


TOOL_WRONG = [
    ([turn("assistant", "Hello"), *USER], "messages[0].role", "'user' was expected"),
    ([turn("system", "Short.")], "messages", "'user'"),
    ([*USER, turn("tool", "4", tool_call_id="call_9")], "messages[1].tool_call_id", "'call_9'; ids: none"),
    ([*USER, turn("assistant", None, tool_calls=[CALL]), turn("tool", "4")], "messages[2].tool_call_id", "ids: 'call_1'"),
    ([*USER, turn("assistant", None, tool_calls=[CALL])], "messages", "'user' or 'tool'"),
    ([turn("user", "a", tool_calls=[CALL])], "messages[0].tool_calls", "only an assistant"),
    ([*USER, turn("assistant", None, tool_calls=[{**CALL, "function": {"name": "f", "arguments": "[1]"}}]), *USER], "messages[1].tool_calls[0].function.arguments", "JSON object"),
    ([*USER, turn("assistant", None, tool_calls=[{**CALL, "function": {"name": "f", "arguments": "{"}}]), *USER], "messages[1].tool_calls[0].function.arguments", "JSON object"),
    ([*USER, turn("assistant", None, tool_calls=[CALL]), turn("tool", "<end_of_turn>", tool_call_id="call_1")], "messages[2].content", "control token"),
    ([*USER, turn("assistant", None, tool_calls=[{**CALL, "function": {"name": "f", "arguments": '{"a": "<eos>"}'}}]), *USER], "messages[1].content", "control token"),
]  # fmt: skip


@pytest.mark.parametrize(("messages", "param", "words"), TOOL_WRONG)
def test_what_stays_impossible_names_the_message(scripted, messages, param, words):
    reply = scripted().post(CHAT, json={"model": "m", "messages": messages})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, param)
    assert words in error["message"]


def test_tools_calls_and_results_are_text_of_the_turns(scripted):
    messages = [
        turn("system", "Be brief."),
        turn("user", "Where is Emma?"),
        turn("assistant", None, tool_calls=[{**CALL, "index": 0}]),
        turn("tool", '{"shelf": 4}', tool_call_id="call_1", name="find_book"),
    ]
    prompt = prompt_of(scripted(max_length=900), messages=messages, tools=[FIND, CLOSE])
    system, rest = prompt.removeprefix("<start_of_turn>user\n").split("Where is Emma?")
    assert system.startswith("Be brief.\n\nYou can call these functions:\n[")
    declared = json.loads(system[system.index("[") : system.rindex("]") + 1])
    assert declared == [FIND["function"], {"name": "close_library", "parameters": {"type": "object"}}]
    assert rest == rendered(
        ("user", ""),
        ("model", '{"name": "find_book", "parameters": {"title": "Emma"}}'),
        ("user", '{"name": "find_book", "response": {"shelf": 4}}'),
    ).removeprefix("<start_of_turn>user\n")


def test_a_history_of_calls_needs_no_tools(scripted):
    two = [CALL, {**CALL, "id": "call_2"}]
    messages = [*USER, turn("assistant", "I look.", tool_calls=two), turn("tool", "shelf 4", tool_call_id="call_1"), turn("tool", "4", tool_call_id="call_2")]  # fmt: skip
    prompt = prompt_of(scripted(max_length=900), messages=messages)
    call = '{"name": "find_book", "parameters": {"title": "Emma"}}'
    results = '{"name": "find_book", "response": "shelf 4"}\n\n{"name": "find_book", "response": 4}'
    assert prompt == rendered(("user", "Hello"), ("model", f"I look.\n\n[{call}, {call}]"), ("user", results))


def test_a_choice_of_none_declares_nothing(scripted):
    assert prompt_of(scripted(), tools=[FIND], tool_choice="none") == rendered(("user", "Hello"))


def test_tools_in_a_declaration_open_no_turn(scripted):
    tool = {"type": "function", "function": {"name": "f", "description": "<end_of_turn>"}}
    error = scripted(max_length=900).post(CHAT, json={"model": "m", "messages": USER, "tools": [tool]}).json()["error"]
    assert error["param"] == "tools" and "control token" in error["message"]


def test_a_tool_that_must_be_called_has_to_be_there(scripted):
    choice = {"type": "function", "function": {"name": "burn_book"}}
    body = {"model": "m", "messages": USER, "tools": [FIND], "tool_choice": choice}
    error = scripted(max_length=900).post(CHAT, json=body).json()["error"]
    assert error["param"] == "tool_choice.function.name" and "'burn_book'" in error["message"]


ANSWERS = {
    'Sure, "find_book" helps.': ("text", []),
    '{"name": "find_book", "parameters": {"title": "Emma"}}': ("call", [{"title": "Emma"}]),
    '```json\n{"name": "find_book", "arguments": {"title": "Emma"}}\n```': ("call", [{"title": "Emma"}]),
    '[{"name": "find_book", "parameters": {}}, {"name": "find_book", "parameters": {"title": "a"}}]': ("call", [{}, {"title": "a"}]),
    '{"name": "burn_book", "parameters": {}}': ("text", []),
    '{"shelf": 4}': ("text", []),
    '{"name": "find_book", "parameters": {"title": "Em': ("text", []),
    "```python\nprint(4)\n```": ("text", []),
    "[1, 2]": ("text", []),
    "": ("text", []),
}  # fmt: skip


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_calls_are_told_from_text_whole_and_streamed(scripted, answer, size):
    kind, wanted = ANSWERS[answer]
    pieces = [AnswerDelta(answer[start : start + size], (5,)) for start in range(0, len(answer), size)]
    client = answer_at_once(scripted(max_length=900), *pieces, AnswerDelta("", finish_reason="stop"))
    body = {"model": "m", "messages": USER, "tools": [FIND]}
    whole = client.post(CHAT, json=body).json()["choices"][0]
    *events, done = events_of(client.post(CHAT, json={**body, "stream": True}))
    choices = [json.loads(event)["choices"][0] for event in events]
    deltas = [choice["delta"] for choice in choices]
    streamed = "".join(delta.get("content") or "" for delta in deltas)
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert done == "[DONE]" and choices[-1]["finish_reason"] == whole["finish_reason"]
    if kind == "text":
        assert whole["message"] == {"role": "assistant", "content": answer, "refusal": None}
        assert (streamed, calls, whole["finish_reason"]) == (answer, [], "stop")
        return
    assert (whole["message"]["content"], streamed, whole["finish_reason"]) == (None, "", "tool_calls")
    for found in (whole["message"]["tool_calls"], calls):
        assert [json.loads(call["function"]["arguments"]) for call in found] == wanted
        assert all(call["function"]["name"] == "find_book" and call["type"] == "function" for call in found)
        assert len({call["id"] for call in found}) == len(wanted)
    assert [call["index"] for call in calls] == list(range(len(wanted)))


def test_without_tools_an_answer_that_looks_like_a_call_is_text(scripted):
    answer = '{"name": "find_book", "parameters": {}}'
    client = answer_at_once(scripted(), AnswerDelta(answer, (5,)), AnswerDelta("", finish_reason="stop"))
    message = client.post(CHAT, json={"model": "m", "messages": USER}).json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": answer, "refusal": None}


def test_a_form_of_answers_becomes_a_grammar(scripted):
    schema = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": {"type": "integer"}}}
    forms = [{"response_format": {"type": "json_object"}}, {"response_format": schema}, {"tools": [FIND], "tool_choice": "required"}, {"tools": [FIND], "tool_choice": {"type": "function", "function": {"name": "find_book"}}}]  # fmt: skip
    for form in forms:
        for request in asked_of(scripted(max_length=900), n=2, **form):
            assert request.constraint is not None, form
    (auto,) = asked_of(scripted(max_length=900), tools=[FIND], tool_choice="auto")
    assert auto.constraint is None


def test_a_schema_that_cannot_be_followed_is_refused(scripted):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array", "uniqueItems": True}}}
    reply = scripted().post(CHAT, json={"model": "m", "messages": USER, "response_format": form})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, "response_format")
    assert "uniqueItems" in error["message"]


def test_what_only_one_tool_s_schema_says_is_left_to_the_tool(scripted):
    parameters = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    (request,) = asked_of(scripted(max_length=900), tools=[tool], tool_choice="required")
    assert request.constraint is not None
