"""Row formats, and what is refused."""

import json

import pytest

from gemma_tune.data import Turn, load_examples
from gemma_tune.data.example import Row
from gemma_tune.data.sources.row_formats import detect_format
from gemma_tune.errors import DataError

QUESTION_ANSWER = (Turn("user", "Q"), Turn("model", "A"))
SYSTEM = Turn("system", "S")


@pytest.mark.parametrize(
    ("name", "fields", "turns"),
    [
        ("chat", {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}, QUESTION_ANSWER),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, {"role": "model", "content": "A"}]}, QUESTION_ANSWER),
        ("chat", {"conversations": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
         (SYSTEM, *QUESTION_ANSWER)),
        ("sharegpt", {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, QUESTION_ANSWER),
        ("sharegpt", {"system": "S", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, (SYSTEM, *QUESTION_ANSWER)),
        ("instruction", {"instruction": "Q", "response": "A"}, QUESTION_ANSWER),
        ("instruction", {"instruction": "Q", "input": "", "output": "A"}, QUESTION_ANSWER),
        ("instruction", {"instruction": "Q", "context": "C", "response": "A"}, (Turn("user", "Q\n\nC"), Turn("model", "A"))),
        ("prompt_completion", {"prompt": "Q", "completion": "A"}, QUESTION_ANSWER),
        ("prompt_completion", {"question": "Q", "answer": "A", "id": 7}, QUESTION_ANSWER),
        ("prompt_completion", {"prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}],
                               "completion": [{"role": "assistant", "content": "A"}]}, (SYSTEM, *QUESTION_ANSWER)),
        ("text", {"text": "A document."}, (Turn("text", "A document."),)),
    ],
)  # fmt: skip
def test_formats_are_recognised(write, name, fields, turns):
    assert detect_format(Row(fields, "a:1")).name == name
    (example,) = load_examples(str(write("a.jsonl", json.dumps(fields))))
    assert example.turns == turns
    assert example.origin.endswith("a.jsonl:1")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"txt": "x"}, r"no known row format has the keys \['txt'\]. Known: messages"),
        ({"instruction": "Q", "response": None}, r"'response' must be a string, found NoneType"),
        ({"messages": []}, r"expected a list of turns, found \[\]"),
        ({"messages": [{"role": "user"}]}, r"a turn needs 'role' and 'content'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, r"role 'tool' is not one of system"),
        ({"messages": [{"role": "user", "content": "x"}]}, r"there is no model turn, so there is nothing to learn"),
        (
            {"messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "x"}]},
            r"turn 1 should be the user's, found model",
        ),
        ({"messages": [{"role": "user", "content": "x"}] * 2}, r"turn 2 should be the model's, found user"),
        (
            {"conversations": [{"from": "human", "value": 3}, {"from": "gpt", "value": "A"}]},
            r"'value' must be a string, found int: 3",
        ),
    ],
)
def test_rows_that_teach_nothing_are_refused(write, fields, message):
    with pytest.raises(DataError, match=r"a.jsonl:1: " + message):
        load_examples(str(write("a.jsonl", json.dumps(fields))))


def test_mixed_formats_are_refused_naming_both_rows(write):
    path = write("a.jsonl", '{"instruction": "Q", "response": "A"}\n{"text": "a"}\n')
    with pytest.raises(
        DataError, match=r"a.jsonl:2: .*a.jsonl:1 has the format 'instruction', but this row has the keys \['text'\]"
    ):
        load_examples(str(path))


def test_two_files_may_have_different_formats(write, tmp_path):
    write("a.jsonl", '{"instruction": "Q", "response": "A"}\n')
    write("b.jsonl", '{"text": "a"}\n')
    assert len(load_examples(f"{tmp_path}/*.jsonl")) == 2
