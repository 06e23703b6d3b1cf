"""Which rows are recognised, what becomes of their columns, and what is refused."""

import datetime
import decimal
import json

import pyarrow
import pyarrow.parquet
import pytest

from gemma_tune.data import Turn, load_examples
from gemma_tune.data.example import Row
from gemma_tune.data.rows.row_options import ROW_CHANGES, RowCounter, RowOptions
from gemma_tune.data.sources.row_formats import detect_format, to_conversation, to_examples
from gemma_tune.errors import ConfigError, DataError

QUESTION_ANSWER = (Turn("user", "Q"), Turn("model", "A"))
SYSTEM = Turn("system", "S")


def raise_error(error):
    raise error


def read(*rows, **options):
    """Returns the turns of rows, what was counted, and the notes."""
    counter = RowCounter()
    rows = [Row(fields, f"desk.jsonl:{line}") for line, fields in enumerate(rows, 1)]
    examples = list(to_examples(rows, raise_error, RowOptions(**options), counter))
    assert set(counter.changes) <= set(ROW_CHANGES)
    return [example.turns for example in examples], dict(counter.changes), counter.notes()


@pytest.mark.parametrize(
    ("name", "fields", "turns"),
    [
        ("chat", {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}, QUESTION_ANSWER),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, {"role": "model", "content": "A"}]}, QUESTION_ANSWER),
        ("chat", {"conversations": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
         (SYSTEM, *QUESTION_ANSWER)),
        ("chat", {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, QUESTION_ANSWER),
        ("chat", {"system": "S", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, (SYSTEM, *QUESTION_ANSWER)),
        ("chat", {"Conversation": ["Q", "A"]}, QUESTION_ANSWER),
        ("chat", {"context": "C", "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
         (Turn("user", "C\n\nQ"), Turn("model", "A"))),
        ("chat", {"messages": "\n\nHuman: Q\n\nAssistant: A"}, QUESTION_ANSWER),
        ("chat", {"messages": '[{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]'}, QUESTION_ANSWER),
        ("instruction", {"instruction": "Q", "response": "A"}, QUESTION_ANSWER),
        ("instruction", {"instruction": "Q", "input": "", "output": "A"}, QUESTION_ANSWER),
        ("instruction", {"instruction": "Q", "context": "C", "response": "A"}, (Turn("user", "Q\n\nC"), Turn("model", "A"))),
        ("instruction", {"Instruction": "Q", "Input": "I", "context": "C", "Response": "A", "system": "S"},
         (SYSTEM, Turn("user", "Q\n\nI\n\nC"), Turn("model", "A"))),
        ("prompt_completion", {"prompt": "Q", "completion": "A"}, QUESTION_ANSWER),
        ("prompt_completion", {"question": "Q", "answer": "A", "id": 7}, QUESTION_ANSWER),
        ("prompt_completion", {"QUESTION": "Q", "Answer ": "A"}, QUESTION_ANSWER),
        ("prompt_completion", {"context": "C", "question": "Q", "answers": {"text": ["A", "A"], "answer_start": [1, 1]}},
         (Turn("user", "C\n\nQ"), Turn("model", "A"))),
        ("prompt_completion", {"input": "Q", "output": "A"}, QUESTION_ANSWER),
        ("prompt_completion", {"prompt": "Q", "input": None, "completion": None, "response": "A"}, QUESTION_ANSWER),
        ("prompt_completion", {"System Prompt": "S", "prompt": "Q", "response": "A"}, (SYSTEM, *QUESTION_ANSWER)),
        ("prompt_completion", {"prompt": "Q", "reasoning_content": "T", "completion": "A"}, (Turn("user", "Q"), Turn("thought", "T"), Turn("model", "A"))),
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
        ({"txt": "x"}, r"no known row format has the keys \['txt'\]. Known: messages.*--columns=text:txt"),
        ({"User Question": "x", "Bot Answer": "y"}, r"--columns='prompt:User Question,completion:Bot Answer'"),
        ({"thread": [{"role": "user", "content": "Q"}]}, r"--columns=messages:thread"),
        ({"question": "x", "topic": "y"}, r"there is no answer beside 'question'.*--columns=completion:COLUMN"),
        ({"instruction": "Q", "response": [1]}, r"'response' must be a text or a number, found list: \[1\]"),
        ({"messages": []}, r"'messages': expected a list of turns, found \[\]"),
        ({"messages": None}, r"'messages': expected a list of turns, found None"),
        ({"messages": [{"content": "x"}]}, r"a turn needs 'role' and 'content'"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, r"role 'narrator' is not one of system"),
        ({"messages": [{"role": "user", "content": "x"}]}, r"there is no model turn, so there is nothing to learn"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, r"there is no user turn, so there is no question"),
        (
            {"messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "x"}]},
            r"none of the model's turns is to be learnt|there is no user turn",
        ),
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, r"pair of a chosen.*--columns=completion:chosen"),
        (
            {"chosen": [{"role": "user", "content": "Q"}], "rejected": []},
            r"pair of a chosen.*--columns=messages:chosen",
        ),
        ({"text": "x", "label": 1}, r"--columns=prompt:text,completion:label.*--columns=text:text"),
        ({"text": "x", "question": "y"}, r"no known row format"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": 0.5}]},
            r"'weight' of a turn must be 0 or 1, found 0.5",
        ),
    ],
)
def test_rows_that_teach_nothing_are_refused(write, fields, message):
    with pytest.raises(DataError, match=r"a.jsonl:1: .*" + f"({message})"):
        load_examples(str(write("a.jsonl", json.dumps(fields))))


def test_documents_and_conversations_in_one_file_are_refused_naming_both_rows(write):
    path = write("a.jsonl", '{"instruction": "Q", "response": "A"}\n{"text": "a"}\n')
    with pytest.raises(
        DataError, match=r"a.jsonl:2: .*a.jsonl:1 has the format 'instruction', but this row has the keys \['text'\]"
    ):
        load_examples(str(path))


def test_conversations_of_several_formats_may_share_a_file():
    rows = ({"instruction": "Q", "response": "A"}, {"messages": ["Q", "A"]}, {"question": "Q", "answer": "A"})
    assert read(*rows)[0] == [QUESTION_ANSWER] * 3


def test_two_files_may_have_different_formats(write, tmp_path):
    write("a.jsonl", '{"instruction": "Q", "response": "A"}\n')
    write("b.jsonl", '{"text": "a"}\n')
    assert len(load_examples(f"{tmp_path}/*.jsonl")) == 2


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (7, "7"), (7.0, "7"), (0.1, "0.1"), (-2.5, "-2.5"), (1e20, "1e+20"), (123456789.0, "123456789"), (True, "true"), (False, "false"),
        (float("nan"), ""), (decimal.Decimal("2.50"), "2.5"), (datetime.date(2026, 5, 1), "2026-05-01"), ({"a": [1]}, '{"a": [1]}'),
        (["first", "second"], "first"),
    ],
)  # fmt: skip
def test_answers_become_text_as_people_write_them(value, text):
    (turns,), changes, _ = read({"question": "Q", "answer": value})
    assert turns == (Turn("user", "Q"), Turn("model", text))
    assert sum(changes.values()) == (text != "")


def test_numbers_of_a_parquet_file(tmp_path):
    path = tmp_path / "a.parquet"
    column = pyarrow.array([4.0, None, 0.1], pyarrow.float32())
    pyarrow.parquet.write_table(pyarrow.table({"question": ["a", "b", "c"], "answer": column}), path)
    assert [example.answer for example in load_examples(str(path))] == ["4", "", "0.1"]


def test_rows_that_are_labelled_bad_are_not_learnt():
    labels = (True, False, "true", "False", 1, 0, None, "polite")
    rows = [{"prompt": f"Q{i}", "completion": "A", "label": label} for i, label in enumerate(labels)]
    learnt, changes, _ = read(*rows)
    assert [turns[0].content for turns in learnt] == ["Q0", "Q2", "Q4", "Q6", "Q7"]
    assert changes == {"labelled_bad": 3}
    assert len(read(*rows, columns=("label:",))[0]) == len(rows)  # Somebody says that the column is no such label.
    assert to_conversation(Row(rows[1], "a:1"))[-1].content == "A"  # As a question it is asked.


def test_every_column_is_used_or_named_once():
    rows = [{"question": "Q", "answer": "A", "topic": "t", "id": i} for i in range(3)]
    *_, notes = read(*rows, {"question": "Q", "answer": "A", "editor": "e"})
    (note,) = notes
    assert note.startswith("desk.jsonl: not used: topic, id, editor. (--columns=context:COLUMN")
    assert read({"question": "Q", "answer": "A", "topic": None})[2] == []  # A null says nothing.
    assert read({"messages": [{"role": "user", "content": "Q", "mood": "x"}, {"role": "assistant", "content": "A"}]})[
        2
    ][0].startswith("desk.jsonl: not used: messages[].mood.")


def test_columns_that_a_user_names():
    row = {"User Question": "Q", "Bot Answer": "A", "system": "S", "answer": "another"}
    (turns,), _, notes = read(row, columns=("prompt:User Question", "completion:Bot Answer"))
    assert turns == (SYSTEM, *QUESTION_ANSWER)
    assert "not used: answer." in notes[0]
    assert read({"body": "A document."}, columns=("text:body",))[0] == [(Turn("text", "A document."),)]
    pair = {
        "prompt": "Q",
        "chosen": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}],
        "rejected": "B",
    }
    assert read(pair, columns=("completion:chosen",))[0] == [QUESTION_ANSWER]
    with pytest.raises(DataError, match=r"data.columns=prompt:User Questoin .*Columns: User Question, .*Did you mean"):
        read(row, columns=("prompt:User Questoin",))
    with pytest.raises(ConfigError, match=r"can't be a 'promt'. Known: messages, .*Did you mean prompt"):
        read(row, columns=("promt:User Question",))
    with pytest.raises(ConfigError, match=r"entries like prompt:COLUMN, got 'prompt'"):
        read(row, columns=("prompt",))


def test_a_prompt_template():
    row = {"Title": "T", "body": "a {Title} \\n b", "answer": "A", "rest": 1}
    (turns,), _, notes = read(row, prompt_template="{title}\\n---\n{body}")
    assert turns == (
        Turn("user", "T\n---\na {Title} \\n b"),
        Turn("model", "A"),
    )  # What a value holds isn't a template.
    assert "not used: rest." in notes[0]
    with pytest.raises(DataError, match=r"data.prompt_template names the column 'titel'.*Did you mean"):
        read(row, prompt_template="{titel}")
    with pytest.raises(ConfigError, match="must name columns in braces"):
        read(row, prompt_template="title")


def test_questions_without_answers_are_asked():
    assert to_conversation(Row({"question": "Q", "choices": ["A", "B"], "answer": "A"}, "a:1")) == (Turn("user", "Q"),)
    assert to_conversation(Row({"prompt": "Q", "context": "C"}, "a:1")) == (Turn("user", "C\n\nQ"),)
    assert to_conversation(Row({"messages": ["Q", "A", "And?"]}, "a:1")) == (*QUESTION_ANSWER, Turn("user", "And?"))
