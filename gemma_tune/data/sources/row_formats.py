"""Recognizes the format of a row and makes an Example of it.

    chat                 {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    sharegpt             {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}
    instruction          {"instruction": "…", "response": "…"}, with an optional "input" or "context"
    prompt_completion    {"prompt": "…", "completion": "…"}, as texts or as lists of messages
    text                 {"text": "…"}: a document, learnt completely

All rows of a file have the format of its first row.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from gemma_tune.data.example import Example, OnRowError, Row, Turn
from gemma_tune.errors import DataError

_ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "model": "model", "assistant": "model", "gpt": "model", "bot": "model",
}  # fmt: skip
_PROMPTS = ("prompt", "question", "query")
_COMPLETIONS = ("completion", "answer", "response", "output")
_INPUTS = ("input", "context")
_RESPONSES = ("response", "output", "answer", "completion")


class RowFormat(NamedTuple):
    """A row format.

    Attributes:
        name: Name of the format.
        matches: Function that returns whether a row's fields have the format.
        turns: Function that returns the turns in a row's fields, given the row's origin.
    """

    name: str
    matches: Callable[[Mapping[str, Any]], bool]
    turns: Callable[[Mapping[str, Any], str], list[Turn]]


def to_examples(rows: Iterable[Row], on_error: OnRowError) -> Iterator[Example]:
    """Yields an Example for each row.

    Args:
        rows: Rows of one or several files.
        on_error: Function that is called with the error of each row that can't be used.
    """
    formats: dict[str, tuple[RowFormat, str]] = {}  # Format of each file, and the row that it comes from.
    for row in rows:
        try:
            file = _file(row.origin)
            if file not in formats:
                formats[file] = (detect_format(row), row.origin)
            settled, first = formats[file]
            if not settled.matches(row.fields):
                raise DataError(
                    f"{row.origin}: {first} has the format {settled.name!r}, but this row has the keys "
                    f"{sorted(row.fields)}. Use one format in a file."
                )
            yield Example(tuple(_checked(settled.turns(row.fields, row.origin), row.origin)), row.origin)
        except DataError as error:
            on_error(error)


def to_conversation(row: Row) -> tuple[Turn, ...]:
    """Returns the turns of a row that is asked, not learnt: the last turn may be the user's, without a wanted answer.

    Raises:
        DataError: The row has no known format.
    """
    fields = row.fields
    question = _first(fields, ("instruction", *_PROMPTS))
    if isinstance(fields.get(question), str) and ("choices" in fields or not _first(fields, _COMPLETIONS)):
        without_answer = {
            "instruction": fields[question],
            "response": "",
            **{n: fields[n] for n in _INPUTS if n in fields},
        }
        return _asked(_instruction_turns(without_answer, row.origin)[:-1], row.origin)
    return _asked(detect_format(row).turns(fields, row.origin), row.origin)


def detect_format(row: Row) -> RowFormat:
    """Returns the format of a row.

    Raises:
        DataError: The row has no known format; says which keys were found and which are known.
    """
    for candidate in ROW_FORMATS:
        if candidate.matches(row.fields):
            return candidate
    raise DataError(
        f"{row.origin}: no known row format has the keys {sorted(map(str, row.fields))}. Known: messages; "
        "conversations; instruction (+ input or context) and response or output; prompt and completion; question and "
        "answer; text."
    )


def _file(origin: str) -> str:
    return origin.rsplit("[", 1)[0] if origin.endswith("]") else origin.rsplit(":", 1)[0]


def _first(fields: Mapping[str, Any], names: tuple[str, ...]) -> str:
    return next((name for name in names if name in fields), "")


def _chat_turns(fields: Mapping[str, Any], origin: str) -> list[Turn]:
    return _messages(fields["messages" if "messages" in fields else "conversations"], "role", "content", origin)


def _sharegpt_turns(fields: Mapping[str, Any], origin: str) -> list[Turn]:
    turns = _messages(fields["conversations"], "from", "value", origin)
    system = fields.get("system")
    return [Turn("system", _text(system, "system", origin)), *turns] if system else turns


def _instruction_turns(fields: Mapping[str, Any], origin: str) -> list[Turn]:
    instruction = _text(fields["instruction"], "instruction", origin)
    name = _first(fields, _INPUTS)
    extra = _text(fields[name] or "", name, origin) if name else ""
    question = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    name = _first(fields, _RESPONSES)
    system = fields.get("system")
    turns = [Turn("user", question), Turn("model", _text(fields[name], name, origin))]
    return [Turn("system", _text(system, "system", origin)), *turns] if system else turns


def _prompt_turns(fields: Mapping[str, Any], origin: str) -> list[Turn]:
    turns = []
    for names, role in ((_PROMPTS, "user"), (_COMPLETIONS, "model")):
        name = _first(fields, names)
        if isinstance(fields[name], list):
            turns += _messages(fields[name], "role", "content", origin)
        else:
            turns.append(Turn(role, _text(fields[name], name, origin)))
    return turns


def _text_turns(fields: Mapping[str, Any], origin: str) -> list[Turn]:
    return [Turn("text", _text(fields["text"], "text", origin))]


def _messages(messages: Any, role_key: str, content_key: str, origin: str) -> list[Turn]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{origin}: expected a list of turns, found {messages!r:.60}.")
    turns = []
    for message in messages:
        if not isinstance(message, Mapping) or role_key not in message or content_key not in message:
            raise DataError(f"{origin}: a turn needs {role_key!r} and {content_key!r}, found {message!r:.60}.")
        role = _ROLES.get(str(message[role_key]).lower())
        if role is None:
            raise DataError(f"{origin}: role {message[role_key]!r} is not one of {', '.join(_ROLES)}.")
        turns.append(Turn(role, _text(_joined(message[content_key]), content_key, origin)))
    return turns


def _joined(content: Any) -> Any:
    """Joins the parts of a content list, `[{"type": "text", "text": "…"}]`, as in OpenAI's chat format."""
    if isinstance(content, list) and all(
        isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    return content


def _text(value: Any, name: str, origin: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{origin}: {name!r} must be a string, found {type(value).__name__}: {value!r:.60}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:  # JSON can spell a lone surrogate, which no tokenizer can read.
            half = value[error.start]
            raise DataError(f"{origin}: {name!r} holds {half!r}, half of a surrogate pair.") from error
    return value


def _checked(turns: list[Turn], origin: str) -> list[Turn]:
    """Checks the order of turns that the chat templates need: maybe a system turn, then user and model alternately."""
    if turns[0].role == "text":
        return turns
    spoken = turns[1:] if turns[0].role == "system" else turns
    for index, turn in enumerate(spoken):
        expected = ("user", "model")[index % 2]
        if turn.role != expected:
            raise DataError(
                f"{origin}: turn {index + 1} should be the {expected}'s, found {turn.role}. User and model take turns, "
                "and the user begins."
            )
    if len(spoken) < 2:
        raise DataError(f"{origin}: there is no model turn, so there is nothing to learn.")
    return turns


def _asked(turns: list[Turn], origin: str) -> tuple[Turn, ...]:
    """Checks the order of turns that may end with the user's."""
    if turns[-1].role != "user":
        return tuple(_checked(turns, origin))
    return tuple(_checked([*turns, Turn("model", "")], origin)[:-1])


def _is_list_with(fields: Mapping[str, Any], name: str, key: str) -> bool:
    entries = fields.get(name)
    return isinstance(entries, list) and bool(entries) and isinstance(entries[0], Mapping) and key in entries[0]


ROW_FORMATS = (
    RowFormat("chat", lambda f: "messages" in f or _is_list_with(f, "conversations", "role"), _chat_turns),
    RowFormat("sharegpt", lambda f: "conversations" in f, _sharegpt_turns),
    RowFormat("instruction", lambda f: "instruction" in f and bool(_first(f, _RESPONSES)), _instruction_turns),
    RowFormat(
        "prompt_completion", lambda f: bool(_first(f, _PROMPTS)) and bool(_first(f, _COMPLETIONS)), _prompt_turns
    ),
    RowFormat("text", lambda f: "text" in f, _text_turns),
)
