"""Encodings: the same rows come out of every one that is recognized, and what isn't recognized is never guessed."""

import csv
import gzip
import io
import json

import pytest

from gemma_tune.data.sources.readers import read_rows
from gemma_tune.errors import DataError

ROWS = [
    {"question": "Où est le café ?", "answer": "À gauche – près de l’entrée."},
    {"question": "Wie groß ist der Saal?", "answer": "Für 80 Gäste.\nBänke: 12."},
    {"question": "¿Cuánto cuesta?", "answer": "5 €"},
]
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"]


def read(path, on_error=None):
    """Returns rows, errors and notes."""
    errors, notes = [], []
    rows = [dict(row.fields) for row in read_rows(str(path), "train", on_error or errors.append, notes.append)]
    return rows, [str(error) for error in errors], notes


def as_csv(rows, delimiter=","):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


CONTENTS = {
    "a.csv": as_csv(ROWS),
    "a.tsv": as_csv(ROWS, "\t"),
    "a.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS),
    "a.json": json.dumps(ROWS, ensure_ascii=False, indent=1),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("zipped", [False, True])
def test_every_encoding_gives_the_same_rows_and_is_named(write, name, encoding, zipped):
    content = CONTENTS[name].encode(encoding)
    path = write(name + ".gz", gzip.compress(content)) if zipped else write(name, content)
    rows, errors, notes = read(path)
    assert (rows, errors) == (ROWS, [])
    family = encoding.replace("utf-8-sig", "utf-8")
    assert len(notes) == (family != "utf-8")
    assert all(family.lower().removesuffix("-le").removesuffix("-be") in note.lower() for note in notes)


def test_the_note_on_cp1252_shows_a_word_that_tells_whether_it_is_right(write):
    _, _, notes = read(write("a.csv", CONTENTS["a.csv"].encode("cp1252")))
    assert "as in 'Où'" in notes[0]


def test_cp1252_is_found_however_late_its_first_letter_comes(write):
    """ASCII is the same in both, so nothing before it can have been read wrongly."""
    lines = [json.dumps({"text": f"line {i}"}) for i in range(20_000)]
    lines.append(json.dumps({"text": "très tard"}, ensure_ascii=False))
    rows, errors, notes = read(write("a.jsonl", "\n".join(lines).encode("cp1252")))
    assert len(rows) == 20_001 and rows[-1] == {"text": "très tard"}
    assert not errors and len(notes) == 1


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1251", "Где находится лифт? Сразу за вами, слева от входа."),
        ("koi8-r", "Где находится лифт? Сразу за вами, слева от входа."),
        ("cp1253", "Πού είναι το ασανσέρ; Ακριβώς πίσω σας."),
        ("cp1256", "أين المصعد؟ خلفك مباشرة."),
        ("gb18030", "电梯在哪里？就在您身后。"),
        ("shift_jis", "エレベーターはどこですか。すぐ後ろです。"),
        ("euc-kr", "엘리베이터는 어디에 있습니까? 바로 뒤에 있습니다."),
    ],
)
def test_other_encodings_are_refused_and_not_taken_for_cp1252(write, encoding, text):
    """Read as cp1252, all of these give letters, and a model would learn them."""
    path = write("a.jsonl", json.dumps({"text": text}, ensure_ascii=False).encode(encoding) + b'\n{"text": "b"}\n')
    rows, errors, notes = read(path)
    assert rows == [{"text": "b"}] and not notes
    assert len(errors) == 1 and "a.jsonl:1: byte " in errors[0] and "is not UTF-8" in errors[0]
    assert "iconv -f" in errors[0]


def test_a_damaged_line_of_a_utf8_file_is_an_error_of_that_line_alone(write):
    lines = ['{"text": "café"}'.encode(), '{"text": "café"}'.encode("latin-1"), b'{"text": "c"}']
    rows, errors, notes = read(write("a.jsonl", b"\n".join(lines)))
    assert rows == [{"text": "café"}, {"text": "c"}] and not notes
    assert len(errors) == 1 and "a.jsonl:2: byte 14 of the line is not UTF-8 (0xe9)" in errors[0]


def test_a_damaged_byte_in_a_document_is_an_error_of_the_file(write):
    path = write("a.json", '[\n{"text": "é"},\n{"text": "'.encode() + b'\xe9"}]')
    with pytest.raises(DataError, match=r"a.json:3: byte 11"):
        read(path)


def test_a_cut_utf16_file_is_named(write):
    with pytest.raises(DataError, match=r"a.csv is not UTF-16 after line \d+"):
        read(write("a.csv", CONTENTS["a.csv"].encode("utf-16")[:-1]))
