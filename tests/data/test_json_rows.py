"""JSON by content: each arrangement of the same rows gives them, whatever the file is called."""

import json

import pytest

from gemma_tune.data import load_examples
from gemma_tune.data.sources.readers import read_rows
from gemma_tune.errors import DataError

ROWS = [{"prompt": f"Question {i}, «q»?", "completion": f"Answer {i}\nin two lines."} for i in range(3)]
CHAT = {"id": 7, "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}


def read(path, split="train"):
    """Returns rows, errors and notes."""
    errors, notes = [], []
    rows = [dict(row.fields) for row in read_rows(str(path), split, errors.append, notes.append)]
    return rows, [str(error) for error in errors], notes


COLUMNS = {name: [row[name] for row in ROWS] for name in ROWS[0]}
ARRANGEMENTS = {
    "lines": "\n".join(map(json.dumps, ROWS)),
    "blank first line": "\n\n" + "\n\n".join(map(json.dumps, ROWS)) + "\n",
    "array": json.dumps(ROWS),
    "array, a row a line": "[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]",
    "indented array": json.dumps(ROWS, indent=2),
    "objects of several lines": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "columns": json.dumps(COLUMNS),
    "indented columns": json.dumps(COLUMNS, indent=2),
    "columns with an index": json.dumps({k: {str(i): v for i, v in enumerate(c)} for k, c in COLUMNS.items()}),
    "under data": json.dumps({"version": "1", "data": ROWS}),
    "under train": json.dumps({"train": ROWS}, indent=1),
    "splits": json.dumps({"train": ROWS, "test": ROWS[:1]}),
}


@pytest.mark.parametrize("arrangement", ARRANGEMENTS.values(), ids=ARRANGEMENTS)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson"])
def test_every_arrangement_gives_the_same_rows_under_every_name(write, name, arrangement):
    rows, errors, _ = read(write(name, arrangement))
    assert (rows, errors) == (ROWS, [])


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize(
    "row",
    [
        CHAT,
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
        {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello."}]},
        ROWS[0],
        {"prompt": "Hi", "tools": [{"name": "f"}], "completion": "Hello."},
        {"question": "Which?", "choices": ["a", "b"], "answer": "a"},
    ],
)
def test_one_row_is_one_row(write, name, row, indent):
    """Its lists are neither columns nor lists of rows."""
    assert read(write(name, json.dumps(row, indent=indent))) == ([row], [], [])


def test_a_column_of_chats(write):
    chats = [CHAT["messages"], CHAT["messages"] * 2]
    rows, _, _ = read(write("a.json", json.dumps({"messages": chats})))
    assert rows == [{"messages": chat} for chat in chats]


@pytest.mark.parametrize(
    ("split", "expected"), [("train", ROWS), ("validation", ROWS[:2]), ("dev", ROWS[:2]), ("test", ROWS[:1])]
)
def test_a_document_with_splits_gives_one_and_names_the_others(write, split, expected):
    path = write("a.json", json.dumps({"train": ROWS, "dev": ROWS[:2], "test": ROWS[:1]}))
    rows, _, notes = read(path, split)
    assert rows == expected
    assert len(notes) == 1 and notes[0].count("'") == 6 and "rows are read from" in notes[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train": ROWS, "test": ROWS}, r"a.json has no split 'validation'. It has train, test: set data.split"),
        ({"first": ROWS, "second": ROWS}, r"a.json: expected a list of objects, .* found keys \['first', 'second'\]"),
        ({"count": 3}, r"a.json: expected a list of objects, .* found keys \['count'\]"),
        ({"data": [{"paragraphs": [{"qas": []}]}]}, r"a.json: data\[1\].paragraphs\[1\] has no 'context'"),
        ({"data": [{"paragraphs": [{"context": "c"}]}]}, r"a.json: data\[1\].paragraphs\[1\] has no 'qas'"),
        (
            {"data": [{"paragraphs": [{"context": "c", "qas": [{"id": 1}]}]}]},
            r"a.json: data\[1\].paragraphs\[1\].qas\[1\] has no 'question'",
        ),
        (
            {"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q", "answers": ["a"]}]}]}]},
            r"a.json: data\[1\].paragraphs\[1\].qas\[1\].answers has no list of objects with 'text'",
        ),
    ],
)
def test_errors_name_key_and_place(write, content, message):
    with pytest.raises(DataError, match=message):
        read(write("a.json", json.dumps(content)), "validation")


def test_an_entry_that_is_no_object_is_named_and_skipped(write):
    rows, errors, _ = read(write("a.json", json.dumps({"data": [ROWS[0], 3, ROWS[1]]})))
    assert rows == ROWS[:2]
    assert errors == [errors[0]] and "a.json: data[2]: expected a JSON object, found int: '3'" in errors[0]


@pytest.mark.parametrize("broken", ['{"prompt": ', "broken", "[1]", '{"prompt": "a"}}'])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_broken_line_is_named_and_skipped_wherever_it_stands(write, broken, place):
    lines = [json.dumps(row) for row in ROWS]
    lines.insert(place, broken)
    rows, errors, _ = read(write("a.jsonl", "\n".join(lines)))
    assert rows == ROWS
    assert len(errors) == 1 and f"a.jsonl:{place + 1}: " in errors[0]


def test_objects_of_several_lines_are_named_by_their_first_line(write):
    rows = list(read_rows(str(write("a.json", ARRANGEMENTS["objects of several lines"])), "train", print))
    assert [row.origin.rsplit(":", 1)[1] for row in rows] == ["1", "5", "9"]


SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "Bridge",
            "paragraphs": [
                {
                    "context": "The bridge was opened in 1902. It has nine arches.",
                    "qas": [
                        {"id": "1", "question": "When was it opened?", "answers": [{"text": "in 1902"}, {"text": "1902"}]},
                        {"id": "2", "question": "Who paid?", "answers": [], "is_impossible": True},
                    ],
                },
                {"context": "Ferries stopped.", "qas": [{"id": "3", "question": "What stopped?", "answers": [{"text": "Ferries"}]}]},
            ],
        },
        {"title": "Empty", "paragraphs": []},
    ],
}  # fmt: skip


@pytest.mark.parametrize("indent", [None, 1])
def test_squad_gives_a_row_for_each_answered_question_and_counts_the_others(write, indent):
    rows, errors, notes = read(write("a.json", json.dumps(SQUAD, indent=indent)))
    context = SQUAD["data"][0]["paragraphs"][0]["context"]
    assert rows == [
        {"title": "Bridge", "context": context, "question": "When was it opened?", "answer": "in 1902"},
        {"title": "Bridge", "context": "Ferries stopped.", "question": "What stopped?", "answer": "Ferries"},
    ]
    assert not errors
    assert len(notes) == 1 and "1 of 3 questions have no answer" in notes[0]


def test_a_file_of_one_arrangement_is_learnt(write):
    """From the file to examples, through the row formats."""
    examples = load_examples(str(write("a.jsonl", ARRANGEMENTS["columns"])))
    assert [(e.question, e.answer) for e in examples] == [(row["prompt"], row["completion"]) for row in ROWS]
