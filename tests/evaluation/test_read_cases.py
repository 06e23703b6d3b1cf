"""Questions of an evaluation, and the columns of their rows."""

import json

import pytest

from gemma_tune.data import Turn, load_examples
from gemma_tune.data.sources.readers import read_rows
from gemma_tune.errors import DataError
from gemma_tune.evaluation.read_cases import cases_of, read_cases


def written(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    "row, prompt, reference",
    [
        ({"question": "Q", "answer": "A", "topic": "t"}, ["Q"], "A"),
        ({"question": "Q", "must_contain": "x"}, ["Q"], ""),
        ({"instruction": "Q", "input": "more", "regex": "x"}, ["Q\n\nmore"], ""),
        ({"question": "Q", "choices": ["a", "b"], "answer": 1}, ["Q"], ""),
        ({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}, ["Q"], "A"),
        ({"messages": [{"role": "user", "content": "Q"}]}, ["Q"], ""),
        (
            {
                "messages": [
                    {"role": "system", "content": "S"},
                    {"role": "user", "content": "1"},
                    {"role": "assistant", "content": "2"},
                    {"role": "user", "content": "3"},
                ]
            },
            ["S", "1", "2", "3"],
            "",
        ),
    ],
)
def test_the_last_answer_is_the_reference(tmp_path, row, prompt, reference):
    (case,) = read_cases(written(tmp_path, row))
    assert [turn.content for turn in case.prompt] == prompt
    assert (case.reference, case.columns, case.prompt[-1].role) == (reference, row, "user")
    assert case.question == prompt[-1]


def test_examples_get_back_the_columns_of_their_rows(tmp_path):
    source = written(tmp_path, *({"question": f"q{i}", "answer": f"a{i}", "topic": i} for i in range(4)))
    examples = load_examples(source)[::-2]
    cases = cases_of(examples, read_rows(source, "train", print))
    assert [(case.question, case.columns["topic"]) for case in cases] == [("q3", 3), ("q1", 1)]
    assert cases[0].prompt == (Turn("user", "q3"),)


def test_bad_rows_are_refused_or_skipped(tmp_path):
    good, bad = {"question": "Q", "answer": "A"}, {"messages": [{"role": "assistant", "content": "A"}]}
    source = written(tmp_path, good, bad)
    with pytest.raises(DataError, match=r"rows.jsonl:2.*on_error=skip"):
        read_cases(source)
    assert len(read_cases(source, on_error="skip")) == 1
    assert read_cases(written(tmp_path, {"text": "A document."})) == []
