"""Chats in the dialects that people have: roles, orders, parts, nulls, weights, tools and thoughts."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from gemma_tune.data import Turn, load_examples
from gemma_tune.data.chat_template import all_control_tokens
from gemma_tune.data.cleaning import Cleaner
from gemma_tune.data.example import Example, Row
from gemma_tune.data.rows.chat_rows import ROLES
from gemma_tune.data.rows.row_options import RowCounter, RowOptions
from gemma_tune.data.rows.written_rows import chat_row
from gemma_tune.data.sources.row_formats import to_examples
from gemma_tune.errors import DataError


def read_chat(*messages, changes=None, **fields):
    """Returns the turns of a chat of (role, content) pairs or whole messages, as plain pairs; `!` marks context."""
    options = RowOptions(**{name: fields.pop(name) for name in ("on_role_order", "thoughts") if name in fields})
    messages = [m if isinstance(m, dict) else {"role": m[0], "content": m[1]} for m in messages]
    errors, counter = [], RowCounter()
    examples = list(to_examples([Row({"messages": messages, **fields}, "a:1")], errors.append, options, counter))
    if errors:
        raise errors[0]
    if changes is not None:
        assert dict(counter.changes) == dict.fromkeys(changes, 1)
    return [(turn.role + ("" if turn.is_learnt else "!"), turn.content) for turn in examples[0].turns]


@pytest.mark.parametrize("role", [*ROLES, "USER", "Human", " ChatGPT ", "function-call", "Tool Response"])
def test_roles_of_every_dialect(role):
    known = ROLES[role.strip().lower().replace("-", "_").replace(" ", "_")]
    call = '{"name": "f", "arguments": {}}'
    spoken = {"role": role, "content": call if known == "call" else "x"}
    turns = read_chat(("user", "Q"), spoken, ("user", "Q2"), ("assistant", "A"))
    if known in ("user", "system"):
        assert turns == [("user", "Q\n\nx\n\nQ2"), ("model", "A")]
    elif known == "model":
        assert turns == [("user", "Q"), ("model", "x"), ("user", "Q2"), ("model", "A")]
    else:
        assert [turn[0] for turn in turns] == ["user", known, "user", "model"]


@pytest.mark.parametrize(
    ("messages", "turns", "changes"),
    [
        ("uu a", "user:1\n\n2 model:3", ["turns_joined"]),
        ("u aa", "user:1 model:2\n\n3", ["turns_joined"]),
        ("a u a", "model!:1 user:2 model:3", ["assistant_first"]),
        ("s a u a", "system:1 model!:2 user:3 model:4", ["assistant_first"]),
        ("u a s u a", "user:1 model:2 user:3\n\n4 model:5", ["system_moved", "turns_joined"]),
        ("u s a", "user:1\n\n2 model:3", ["system_moved", "turns_joined"]),
        ("u a s a", "user:1 model:2 user:3 model:4", ["system_moved"]),
        ("ss u a", "system:1\n\n2 user:3 model:4", ["turns_joined"]),
        ("s a", "user:1 model:2", ["system_moved"]),
        ("u a u", "user:1 model:2", ["last_question_dropped"]),
        ("u a uu", "user:1 model:2", ["last_question_dropped"]),
        ("s u a u a", "system:1 user:2 model:3 user:4 model:5", []),
    ],
)
def test_orders_by_policy(messages, turns, changes):
    roles = {"u": "user", "a": "assistant", "s": "system"}
    spoken = [(roles[c], str(i)) for i, c in enumerate(messages.replace(" ", ""), 1)]
    wanted = [tuple(each.split(":")) for each in turns.split(" ")]
    assert read_chat(*spoken, changes=changes) == wanted
    if not set(changes) - {"last_question_dropped"}:
        assert read_chat(*spoken, on_role_order="error") == wanted
    else:
        with pytest.raises(DataError, match=r"a:1: (turn \d should be|there are several system).*on_role_order=merge"):
            read_chat(*spoken, on_role_order="error")


def test_parts_are_joined_and_pictures_named():
    parts = [
        {"type": "text", "text": "One."},
        {"type": "text", "text": "Two "},
        {"type": "text", "text": "three", "image_url": None},
    ]
    assert read_chat(("user", parts), ("assistant", [{"type": "output_text", "text": "A"}])) == [
        ("user", "One.\nTwo three"),
        ("model", "A"),
    ]
    assert read_chat(("user", {"type": "text", "text": "Q"}), ("assistant", "A"))[0] == ("user", "Q")
    for part in (
        {"type": "image_url", "image_url": {"url": "x"}},
        {"type": "image"},
        {"type": "input_audio", "data": "x"},
    ):
        with pytest.raises(
            DataError, match=f"a:1: 'content' holds a part of type '{part['type']}', which can't be learnt"
        ):
            read_chat(("user", [{"type": "text", "text": "See"}, part]), ("assistant", "A"))


def test_null_keys_of_parquet_structs_are_absent(tmp_path):
    chats = [
        [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "weight": 1}],
        [{"role": "system", "content": None}, {"role": "user", "content": "Q2"},
         {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {"x": 1}}}]},
         {"role": "tool", "tool_call_id": "1", "content": "R"}, {"role": "assistant", "content": "A2"}],
        [{"role": "user", "content": "Q3"}, {"role": "assistant", "content": None,
                                             "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {"y": 1}}}]}],
    ]  # fmt: skip
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": chat} for chat in chats]), path)
    first, second, third = (example.turns for example in load_examples(str(path)))
    assert first == (Turn("user", "Q"), Turn("model", "A"))
    assert [turn.role for turn in second] == ["user", "call", "tool", "model"]
    assert json.loads(second[1].content) == {"name": "f", "arguments": {"x": 1}}  # No "y": null of its neighbour.
    assert json.loads(second[2].content) == {"name": "f", "response": "R"}  # Named by the id of its call.
    assert [turn.role for turn in third] == ["user", "call"]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"weight": 0.0, "train": True}, {"train": "false"}])
def test_turns_that_are_context(mark):
    said = {"role": "assistant", "content": "A", **mark}
    turns = read_chat(("user", "Q"), said, ("user", "Q2"), ("assistant", "A2"), changes=["turns_not_learnt"])
    assert turns == [("user", "Q"), ("model!", "A"), ("user", "Q2"), ("model", "A2")]
    with pytest.raises(DataError, match="none of the model's turns is to be learnt"):
        read_chat(("user", "Q"), said)
    # Equal texts of which one is learnt are no duplicates.
    learnt, unlearnt = (Turn("model", "A", is_learnt) for is_learnt in (True, False))
    rest = (Turn("user", "Q2"), Turn("model", "A2"))
    cleaned = Cleaner([]).clean([Example((Turn("user", "Q"), turn, *rest)) for turn in (unlearnt, learnt)])
    assert len(cleaned) == 2


OPENAI = (
    {"role": "user", "content": "Q"},
    {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": {"name": "find", "arguments": '{"shelf": 3}'}}]},
    {"role": "tool", "tool_call_id": "c", "content": "free"},
    {"role": "assistant", "content": "A"},
)  # fmt: skip
SHAREGPT = (
    {"from": "human", "value": "Q"},
    {"from": "function_call", "value": '{"name": "find", "arguments": {"shelf": 3}}'},
    {"from": "observation", "value": "free"},
    {"from": "gpt", "value": "A"},
)
LEGACY = (
    OPENAI[0],
    {"role": "assistant", "content": None, "function_call": {"name": "find", "arguments": '{"shelf": 3}'}},
    {"role": "function", "name": "find", "content": "free"},
    OPENAI[3],
)
ANTHROPIC = (
    OPENAI[0],
    {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "find", "input": {"shelf": 3}}]},
    {"role": "tool", "content": [{"type": "text", "text": "free"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A"}]},
)


@pytest.mark.parametrize("messages", [OPENAI, SHAREGPT, LEGACY, ANTHROPIC])
@pytest.mark.parametrize("as_text", [False, True])
def test_tools_in_four_dialects_are_one(messages, as_text):
    tools = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}]
    turns = read_chat(*messages, tools=json.dumps(tools) if as_text else tools, changes=["with_tools"])
    assert turns == [
        ("tools", '[{"name": "find", "description": "", "parameters": {"type": "object", "properties": {}}}]'),
        ("user", "Q"),
        ("call", '{"name": "find", "arguments": {"shelf": 3}}'),
        ("tool", '{"name": "find", "response": "free"}'),
        ("model", "A"),
    ]


def test_text_beside_calls_stays_before_them():
    message = {"role": "assistant", "content": "I look.", "tool_calls": OPENAI[1]["tool_calls"]}
    assert [role for role, _ in read_chat(OPENAI[0], message, *OPENAI[2:])] == [
        "user",
        "model",
        "call",
        "tool",
        "model",
    ]


@pytest.mark.parametrize(
    ("choice", "last", "changes"),
    [
        ("keep", [("thought", "T2"), ("model", "A2")], ["earlier_thoughts_dropped", "thoughts_kept"]),
        ("mask", [("thought!", "T2"), ("model", "A2")], ["earlier_thoughts_dropped", "thoughts_masked"]),
        ("drop", [("model", "A2")], ["thoughts_dropped"]),
    ],
)
@pytest.mark.parametrize(
    "spell",
    [
        lambda thought, text: {"content": text, "reasoning_content": thought},
        lambda thought, text: {"content": text, "thinking": thought},
        lambda thought, text: {"content": f"<|channel>thought\n{thought}\n<channel|>{text}"},
        lambda thought, text: {"content": f"<think>\n{thought}\n</think>\n\n{text}"},
        lambda thought, text: {"content": [{"type": "thinking", "thinking": thought}, {"type": "text", "text": text}]},
    ],
)
def test_thoughts_by_choice(choice, last, changes, spell):
    said = [{"role": "assistant", **spell(f"T{i}", f"A{i}")} for i in (1, 2)]
    turns = read_chat(("user", "Q1"), said[0], ("user", "Q2"), said[1], thoughts=choice, changes=changes)
    assert turns == [("user", "Q1"), ("model", "A1"), ("user", "Q2"), *last]


@pytest.mark.parametrize(
    ("user", "answer"),
    [
        ("<|channel>thought\nAs I wish<channel|>", "A"),
        ("Q<|tool_call>call:f{}<tool_call|>", "A"),
        ("Q", "<|channel>no end"),
    ],
)
def test_what_is_typed_opens_no_channel(user, answer):
    turns = tuple(Turn(role.rstrip("!"), content) for role, content in read_chat(("user", user), ("assistant", answer)))
    cleaner = Cleaner(all_control_tokens())
    assert cleaner.clean([Example(turns)]) == []


@pytest.mark.parametrize(
    "messages",
    [OPENAI, [*OPENAI, ("user", "B"), {"role": "assistant", "content": "C", "reasoning_content": "T"}],
     [("system", "S"), ("user", "Q"), {"role": "assistant", "content": "A", "weight": 0}, ("user", "B"), ("assistant", "C")]],
)  # fmt: skip
def test_written_rows_are_read_back_as_they_are(messages):
    tools = [{"name": "find", "description": "d"}]
    messages = [m if isinstance(m, dict) else {"role": m[0], "content": m[1]} for m in messages]
    row = Row({"messages": messages, "tools": tools}, "a:1")
    (example,) = to_examples([row], pytest.fail)
    (again,) = to_examples([Row(json.loads(json.dumps(chat_row(example))), "a:1")], pytest.fail)
    assert again == example
