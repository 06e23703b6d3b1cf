"""Finds the rows in a JSON document: a list, columns, splits, one conversation, or the layout of SQuAD."""

from collections.abc import Iterator, Mapping
from typing import Any

from gemma_tune.data.example import OnNote, OnRowError, Row
from gemma_tune.data.rows.columns import USUAL_NAMES
from gemma_tune.data.sources.file_formats.data_file import DataFile, format_of
from gemma_tune.data.sources.locations.split_names import no_split, same_split
from gemma_tune.errors import DataError

_CHAT_KEYS = USUAL_NAMES["messages"]
_TEXT_KEYS = ("prompt", "question", "query", "instruction", "completion", "answer", "response", "output", "text")


def rows_of_document(value: Any, file: DataFile, on_error: OnRowError, on_note: OnNote) -> Iterator[Row]:
    """Yields the rows of a parsed document.

    A list has a row in each entry. An object is one of these, in this order: one row that holds a list of turns; SQuAD;
    columns, which are lists of equal length, or objects with equal keys as pandas writes them; a list of objects under
    one key; splits, of which one is read; one row with texts.

    Args:
        value: The document.
        file: Its file.
        on_error: Function that is called with the error of each entry that isn't an object.
        on_note: Function that is told what isn't read.

    Raises:
        DataError: The document is none of these, or has no such split.
    """
    if isinstance(value, list):
        yield from _rows_of_list(value, file, "", on_error)
    elif not isinstance(value, Mapping):
        raise DataError(f"{file.name}: expected a list of objects, found {type(value).__name__}.")
    elif any(_are_turns(entry) for entry in value.values()) or _is_chat_line(value, file):
        yield Row(value, f"{file.name}:1")
    elif _is_squad(value):
        yield from _rows_of_squad(value["data"], file, on_note)
    elif columns := _columns(value):
        for number, cells in enumerate(zip(*columns.values(), strict=True), 1):
            yield Row(dict(zip(columns, cells, strict=True)), f"{file.name}[{number}]")
    else:
        yield from _rows_under_a_key(value, file, on_error, on_note)


def require_object(value: object, origin: str) -> dict:
    """Returns a value that is an object. Raises DataError, which names the origin, if it is something else."""
    if not isinstance(value, dict):
        found = str(value)
        found = found if len(found) <= 60 else found[:57] + "..."
        raise DataError(f"{origin}: expected a JSON object, found {type(value).__name__}: {found!r}")
    return value


def _rows_of_list(entries: list, file: DataFile, key: str, on_error: OnRowError) -> Iterator[Row]:
    prefix = f"{file.name}: {key}" if key else file.name
    for number, entry in enumerate(entries, 1):
        try:
            yield Row(require_object(entry, f"{prefix}[{number}]"), f"{file.name}[{number}]")
        except DataError as error:
            on_error(error)


def _rows_under_a_key(value: Mapping, file: DataFile, on_error: OnRowError, on_note: OnNote) -> Iterator[Row]:
    lists = [key for key, entry in value.items() if _are_objects_or_empty(entry)]
    has_texts = any(isinstance(value[key], str) for key in (_TEXT_KEYS if lists else value) if key in value)
    if has_texts or (not lists and format_of(file.path.name) == ".jsonl"):  # One line, and so one row.
        yield Row(value, f"{file.name}:1")
        return
    if not lists:
        raise DataError(
            f"{file.name}: expected a list of objects, or an object with one list in it; found keys {sorted(value)}."
        )
    key = lists[0] if len(lists) == 1 else _key_of_split(lists, file)
    unread = [name for name, entry in value.items() if name != key and isinstance(entry, (list, Mapping)) and entry]
    if unread:
        on_note(f"{file.name}: rows are read from {key!r}; not from {', '.join(map(repr, unread))}.")
    yield from _rows_of_list(value[key], file, key, on_error)


def _key_of_split(lists: list[str], file: DataFile) -> str:
    """Returns the key of the split to read, among keys of several lists."""
    if file.split in lists:
        return file.split
    if not all(same_split(key) for key in lists):
        raise DataError(
            f"{file.name}: expected a list of objects, or an object with one list in it; found keys {sorted(lists)}."
        )
    found = [key for key in lists if same_split(key) == same_split(file.split)]
    if not found:
        raise no_split(file.name, file.split, lists)
    return found[0]


def _is_chat_line(value: Mapping, file: DataFile) -> bool:
    """Returns whether the only line of a .jsonl file has the key of a chat, whatever its value is."""
    return format_of(file.path.name) == ".jsonl" and any(key.strip().lower() in _CHAT_KEYS for key in value)


def _are_objects_or_empty(entry: Any) -> bool:
    return isinstance(entry, list) and (not entry or isinstance(entry[0], Mapping))


def _are_turns(entry: Any) -> bool:
    if not _are_objects_or_empty(entry) or not entry:
        return False
    return "role" in entry[0] or ("from" in entry[0] and "value" in entry[0])


def _columns(value: Mapping) -> dict[str, list]:
    """Returns columns of equal length, or nothing where a document doesn't consist of them."""
    columns = list(value.values())
    if all(isinstance(column, Mapping) for column in columns) and len({tuple(column) for column in columns}) == 1:
        if all(key.isdecimal() for key in columns[0]):  # The index of a pandas.DataFrame.to_json().
            return {name: list(column.values()) for name, column in value.items()}
        return {}
    are_lists = all(isinstance(column, list) and column for column in columns)
    if not are_lists or len({len(column) for column in columns}) != 1 or any(map(_are_objects_or_empty, columns)):
        return {}
    return dict(value)


def _is_squad(value: Mapping) -> bool:
    entries = value.get("data")
    return (
        isinstance(entries, list)
        and bool(entries)
        and all(isinstance(entry, Mapping) and isinstance(entry.get("paragraphs"), list) for entry in entries)
    )


def _rows_of_squad(articles: list, file: DataFile, on_note: OnNote) -> Iterator[Row]:
    """Yields a row for each question of SQuAD's files (arXiv:1606.05250), with the first of its answers.

    Questions without an answer (SQuAD 2.0, arXiv:1806.03822) are left out and counted in a note: there is no text that
    a model could learn.
    """
    number = num_unanswered = 0
    for title, context, question, place in _questions(articles, file):
        number += 1
        answers = question.get("answers")
        answer = _first_answer(answers, f"{file.name}: {place}")
        if answer is None:
            num_unanswered += 1
            continue
        row = {"title": title, "context": context, "question": question["question"], "answer": answer}
        yield Row({key: text for key, text in row.items() if text is not None}, f"{file.name}[{number}]")
    if num_unanswered:
        on_note(
            f"{file.name}: {num_unanswered} of {number} questions have no answer and are left out. To learn what to "
            "say to such questions, write rows with that answer."
        )


def _questions(articles: list, file: DataFile) -> Iterator[tuple[Any, str, Mapping, str]]:
    """Yields (title, context, question, place) of each question."""
    for i, article in enumerate(articles, 1):
        for j, paragraph in enumerate(article["paragraphs"], 1):
            place = f"data[{i}].paragraphs[{j}]"
            for key, kind in (("context", str), ("qas", list)):
                if not isinstance(paragraph, Mapping) or not isinstance(paragraph.get(key), kind):
                    raise DataError(f"{file.name}: {place} has no {key!r}, as SQuAD's files have.")
            for k, question in enumerate(paragraph["qas"], 1):
                where = f"{place}.qas[{k}]"
                if not isinstance(question, Mapping) or "question" not in question:
                    raise DataError(f"{file.name}: {where} has no 'question', as SQuAD's files have.")
                yield article.get("title"), paragraph["context"], question, where


def _first_answer(answers: Any, place: str) -> Any:
    if not answers:
        return None
    if not isinstance(answers, list) or not isinstance(answers[0], Mapping) or "text" not in answers[0]:
        raise DataError(f"{place}.answers has no list of objects with 'text', as SQuAD's files have.")
    return answers[0]["text"]
