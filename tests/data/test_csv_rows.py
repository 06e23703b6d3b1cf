"""CSV as spreadsheets write it: the delimiter is found and said, and a broken row costs itself alone."""

import csv
import io

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma_tune.data import load_examples, load_splits
from gemma_tune.data.sources.readers import read_rows
from gemma_tune.errors import DataError

ROWS = [
    {"prompt": "Is it open; or closed, now?", "completion": "Open | until 6."},
    {"prompt": 'What is a "G 12"?', "completion": "A shelf;\nG is the floor,\n\n12 the row."},
    {"prompt": "Tab\there?", "completion": "Yes."},
]
DELIMITERS = [",", ";", "\t", "|"]


def read(path):
    """Returns rows, their origins, errors and notes."""
    errors, notes, rows = [], [], []
    for row in read_rows(str(path), "train", errors.append, notes.append):
        rows.append((dict(row.fields), row.origin.rsplit(":", 1)[1]))
    return [fields for fields, _ in rows], [int(line) for _, line in rows], [str(error) for error in errors], notes


def as_csv(rows, delimiter, quoting=csv.QUOTE_MINIMAL, end="\r\n"):
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, quoting=quoting, lineterminator=end)
    writer.writerows([list(rows[0]), *(list(row.values()) for row in rows)])
    return text.getvalue()


@pytest.mark.parametrize("delimiter", DELIMITERS)
@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
@pytest.mark.parametrize(
    ("quoting", "end"),
    [
        (csv.QUOTE_MINIMAL, "\r\n"),
        (csv.QUOTE_MINIMAL, "\n"),
        (csv.QUOTE_ALL, "\r\n"),
        (csv.QUOTE_ALL, "\r"),  # With \r alone, Python's writer doesn't quote \n in a cell unless it quotes all.
    ],
)
def test_the_delimiter_is_found_whatever_the_name_says(write, name, delimiter, quoting, end):
    rows, lines, errors, notes = read(write(name, as_csv(ROWS, delimiter, quoting, end)))
    assert (rows, errors) == (ROWS, [])
    assert lines == [2, 3, 7]
    is_usual = delimiter == {"a.csv": ",", "a.tsv": "\t"}[name]
    assert len(notes) == (not is_usual)
    assert all("separated by" in note and ("tabs" if delimiter == "\t" else delimiter) in note for note in notes)


CELLS = st.text(st.sampled_from('ab ,;|\t"\n'), max_size=12).map(lambda cell: "x" + cell)


@settings(
    derandomize=True, deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=6), st.sampled_from(DELIMITERS))
def test_what_pythons_own_writer_quotes_comes_back(tmp_path, cells, delimiter):
    """Names without any delimiter: the header decides, however many other signs the cells have."""
    rows = [{"prompt": first, "completion": second} for first, second in cells]
    path = tmp_path / "a.csv"
    path.write_bytes(as_csv(rows, delimiter).encode())
    assert read(path)[0] == rows


def test_a_name_with_the_usual_sign_does_not_decide_against_the_rows(write):
    content = "Question, as asked;Answer\r\nWho?;Me, myself.\r\nWhen?;Now\r\n"
    rows, _, errors, _ = read(write("a.csv", content))
    assert rows[0] == {"Question, as asked": "Who?", "Answer": "Me, myself."} and not errors


def test_excels_separator_line(write):
    rows, lines, _, notes = read(write("a.csv", "sep=;\r\nprompt;completion\r\na,b;c\r\n"))
    assert rows == [{"prompt": "a,b", "completion": "c"}] and lines == [3]
    assert notes and "';'" in notes[0]


def test_one_column_has_no_delimiter(write):
    assert read(write("a.csv", 'text\nshort\n"one, two; three"\n'))[0] == [
        {"text": "short"},
        {"text": "one, two; three"},
    ]


def test_empty_cells_behind_the_last_column_are_no_columns(write):
    rows, _, errors, _ = read(write("a.csv", "prompt,completion,,\na,b,,\nc,d\ne,f,,more\n"))
    assert rows == [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    assert len(errors) == 1 and "a.csv:4: expected 2 columns (prompt, completion), found 4" in errors[0]


BROKEN = {
    "a quote too few": '"open, but never closed,x',
    "a quote inside": '"the 5" screen",x',
    "too many cells": "a,b,c",
    "too few cells": "a",
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_broken_row_is_named_by_its_line_and_costs_itself_alone(write, broken, place):
    good = [f"q{i},a{i}" for i in range(3)]
    lines = ["question,answer", *good[:place], broken, *good[place:]]
    rows, _, errors, _ = read(write("a.csv", "\n".join(lines) + "\n"))
    assert rows == [{"question": f"q{i}", "answer": f"a{i}"} for i in range(3)]
    assert len(errors) == 1 and f"a.csv:{place + 2}: " in errors[0]
    path = write("b.csv", "\n".join(lines) + "\n")
    assert len(load_examples(str(path), on_error="skip")) == 3
    with pytest.raises(DataError, match=rf"b.csv:{place + 2}: .*--on_error=skip skips such rows"):
        load_examples(str(path))


def test_several_open_quotes_cost_their_rows_alone(write):
    lines = ["question,answer"]
    for i in range(50):
        lines += [f"q{i},a{i}", f'"open {i},x', f'q{i},"more, and more"']
    rows, _, errors, _ = read(write("a.csv", "\n".join(lines)))
    assert len(rows) == 100 and len(errors) == 50
    assert [error.split(":")[1] for error in errors] == [str(3 * i + 3) for i in range(50)]


def test_the_rest_of_a_broken_row_is_not_taken_for_a_row(write):
    """Where each row begins with a quote, what doesn't is the rest of the broken one."""
    content = '"q","a"\n"one","1"\n"a "bad" cell","with a line\nof two, parts\nand more"\n"two","2"\n'
    rows, _, errors, _ = read(write("a.csv", content))
    assert rows == [{"q": "one", "a": "1"}, {"q": "two", "a": "2"}]
    assert len(errors) == 1 and "a.csv:3" in errors[0]


def test_the_report_says_how_files_were_read(write):
    source = write("a.csv", "prompt;completion\nOù?;Là.\nQui?;Moi.\n".encode("cp1252"))
    settings = {"eval_source": "", "split": "train", "eval_split": "", "eval_fraction": 0.0, "system_prompt": ""}
    splits = load_splits(
        str(source), [], **settings, dedup="normalized", near_dedup_threshold=0.0, on_error="raise", seed=0
    )
    assert len(splits.report.notes) == 2
    assert "cp1252" in splits.report.notes[0] + splits.report.notes[1]
    assert splits.report.to_dict()["notes"] == splits.report.notes
