"""Recognizes the format of a row and makes an Example of it.

    chat                 {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}, or
                         ShareGPT's {"conversations": [{"from": "human", "value": "…"}, …]}
    instruction          {"instruction": "…", "response": "…"}, with an optional "input" or "context"
    prompt_completion    {"prompt": "…", "completion": "…"}, as texts or as lists of messages
    text                 {"text": "…"}: a document, learnt completely

Each row is recognized by its columns (data/rows/columns.py), but documents and conversations don't stand in one file.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from gemma_tune.data.example import Example, OnRowError, Row, Turn
from gemma_tune.data.rows.chat_rows import chat_turns
from gemma_tune.data.rows.columns import ColumnPlan, check_mapping, parse_columns, plan_columns, propose_mapping
from gemma_tune.data.rows.flat_rows import (
    context_text,
    document_turns,
    flat_turns,
    is_labelled_bad,
    row_thoughts,
    template_fields,
)
from gemma_tune.data.rows.row_options import RowCounter, RowOptions
from gemma_tune.data.rows.thoughts import apply_thoughts
from gemma_tune.data.rows.tool_steps import tools_turn
from gemma_tune.data.rows.turn_order import order_turns
from gemma_tune.errors import DataError

_KNOWN = (
    "messages; conversations; instruction (+ input or context) and response or output; prompt and completion; question "
    "and answer; text"
)


def to_examples(
    rows: Iterable[Row], on_error: OnRowError, options: RowOptions | None = None, counter: RowCounter | None = None
) -> Iterator[Example]:
    """Yields an Example for each row, except for those whose answer is labelled as a bad one.

    Args:
        rows: Rows of one or several files.
        on_error: Function that is called with the error of each row that can't be used.
        options: Settings of how rows become turns; None: the defaults.
        counter: Counter of what was changed in rows.

    Raises:
        ConfigError: `options.columns` or `options.prompt_template` is wrong.
    """
    counter = RowCounter() if counter is None else counter
    converter = _RowConverter(options or RowOptions(), counter)
    for row in rows:
        changes: list[str] = []
        try:
            turns = converter.turns_to_learn(row, changes)
        except DataError as error:
            on_error(error)
            continue
        if changes:
            counter.count(changes)
        if turns:
            yield Example(tuple(turns), row.origin)


def to_conversation(row: Row, options: RowOptions | None = None) -> tuple[Turn, ...]:
    """Returns the turns of a row that is asked, not learnt: the last turn may be the user's, without a wanted answer.

    Thoughts are left out, and labels have no meaning.

    Raises:
        DataError: The row has no known format.
    """
    return tuple(_RowConverter(options or RowOptions(), RowCounter()).turns_to_ask(row))


def detect_format(row: Row, options: RowOptions | None = None) -> ColumnPlan:
    """Returns the format of a row, and which columns are used for what.

    Raises:
        DataError: The row has no known format; says which columns were found and which are known.
    """
    return _RowConverter(options or RowOptions(), RowCounter()).plan(row, for_learning=True)


class _RowConverter:
    """Converts the rows of one or several files, whose formats it remembers."""

    def __init__(self, options: RowOptions, counter: RowCounter):
        self._options, self._counter = options, counter
        self._mapping = parse_columns(options.columns)
        self._template_names = template_fields(options.prompt_template)
        self._plans: dict[tuple[str, tuple[str, ...]], ColumnPlan] = {}  # By file and columns.
        self._first: dict[str, tuple[str, str]] = {}  # Format of each file's first row, and where that is.

    def turns_to_learn(self, row: Row, changes: list[str]) -> list[Turn]:
        """Returns the turns of a row; none if its answer is labelled as a bad one."""
        plan = self.plan(row, for_learning=True)
        if "label" in plan.column_of and is_labelled_bad(row.fields, plan):
            changes.append("labelled_bad")
            return []
        unused: dict[str, None] = {}
        turns = self._turns(row, plan, changes, unused)
        if unused:
            self._counter.add_unused(_file(row.origin), unused)
        if turns[0].role == "text":
            if "other_templates" in changes:
                self._counter.add_note(_other_template_note(_file(row.origin)))
            return turns
        return self._arranged(turns, row.origin, changes, self._options.thoughts)

    def turns_to_ask(self, row: Row) -> list[Turn]:
        """Returns the turns of a row whose last turn may be the user's."""
        plan = self.plan(row, for_learning=False)
        if "choices" in row.fields and plan.name in ("instruction", "prompt_completion"):
            plan = plan._replace(column_of={k: v for k, v in plan.column_of.items() if k != "completion"})
        turns = self._turns(row, plan, [], {})
        return turns if turns[0].role == "text" else self._arranged(turns, row.origin, [], "drop", keep_question=True)

    def plan(self, row: Row, for_learning: bool) -> ColumnPlan:
        """Returns what the columns of a row are used for."""
        fields, file = row.fields, _file(row.origin)
        names = tuple(fields)
        if None in fields.values():
            names = tuple(name for name in names if fields[name] is not None)
        plan = self._plans.get((file, names))
        if plan is None:
            plan = self._plans[file, names] = self._make_plan(row, names, for_learning)
            self._counter.add_unused(file, plan.unused)
        format_of_first, origin_of_first = self._first.setdefault(file, (plan.name, row.origin))
        if (plan.name == "text") != (format_of_first == "text"):
            raise DataError(
                f"{row.origin}: {origin_of_first} has the format {format_of_first!r}, but this row has the keys "
                f"{sorted(map(str, names))}: documents and conversations can't stand in one file. Put them into two."
            )
        return plan

    def _make_plan(self, row: Row, names: tuple[str, ...], for_learning: bool) -> ColumnPlan:
        every = [str(name) for name in row.fields]
        check_mapping(every, self._mapping, self._template_names, row.origin)
        # A null answer is an empty one: then the format is that of all the columns.
        plan = plan_columns(names, self._mapping, self._template_names)
        if plan is None or (plan.name == "prompt_only" and for_learning):
            plan = plan_columns(every, self._mapping, self._template_names)
        if plan is None and not for_learning:  # A question is asked whatever stands beside it.
            others = [name for name in names if name.strip().lower() not in ("text", "chosen", "rejected")]
            plan = plan_columns(others, self._mapping, self._template_names)
        if plan is None or (plan.name == "prompt_only" and for_learning):
            raise DataError(f"{row.origin}: {_why_unknown(row.fields, plan)}")
        label = next((name for name in names if name.strip().lower() == "label"), "")
        if for_learning and plan.name == "text" and label and not {"text", "label"} & set(self._mapping):
            text = plan.column_of["text"]
            raise DataError(
                f"{row.origin}: {text!r} with {label!r} isn't learnt as a document, because its label would be left "
                f"out. To learn to say the label: --columns=prompt:{text},completion:{label}. To learn the text alone: "
                f"--columns=text:{text}."
            )
        return plan

    def _turns(self, row: Row, plan: ColumnPlan, changes: list[str], unused: dict[str, None]) -> list[Turn]:
        fields, origin = row.fields, row.origin
        if plan.name == "text":
            return document_turns(fields, plan, origin, changes)
        if plan.name == "chat":
            turns = _chat(fields, plan, origin, changes, unused)
        else:
            turns = flat_turns(fields, plan, self._options.prompt_template, origin, changes, unused)
        if "tools" in plan.column_of and (tools := tools_turn(fields[plan.column_of["tools"]], origin)):
            changes.append("with_tools")
            turns.insert(0, tools)
        return turns

    def _arranged(
        self, turns: list[Turn], origin: str, changes: list[str], thoughts: str, keep_question: bool = False
    ) -> list[Turn]:
        """Returns turns in the order that the chat templates need, with the thoughts that are wanted."""
        if len(turns) == 2 and turns[0].role == "user" and turns[1].role == "model" and turns[1].is_learnt:
            return turns  # Most rows.
        turns = order_turns(turns, self._options.on_role_order, origin, changes, keep_question)
        if any(turn.role == "thought" for turn in turns):
            turns = apply_thoughts(turns, thoughts, changes)
        return turns


def _chat(
    fields: Mapping[str, Any], plan: ColumnPlan, origin: str, changes: list[str], unused: dict[str, None]
) -> list[Turn]:
    name = plan.column_of["messages"]
    turns = chat_turns(fields[name], origin, changes, unused, name)
    if len(plan.column_of) == 1:
        return turns
    system = context_text(fields, plan, "system", origin, changes)
    if system.strip() and not (turns[0].role == "system" and turns[0].content.strip() == system.strip()):
        turns.insert(0, Turn("system", system))
    given = [context_text(fields, plan, kind, origin, changes) for kind in ("context", "input")]
    asked = next((i for i, turn in enumerate(turns) if turn.role == "user"), -1)
    if asked >= 0 and any(text.strip() for text in given):
        content = "\n\n".join(text for text in (*given, turns[asked].content) if text.strip())
        turns[asked] = turns[asked]._replace(content=content)
    last = next((i for i in reversed(range(len(turns))) if turns[i].role == "model"), -1)
    if last >= 0:
        turns[last:last] = row_thoughts(fields, plan, "", origin)
    return turns


def _why_unknown(fields: Mapping[str, Any], plan: ColumnPlan | None) -> str:
    keys = sorted(map(str, fields))
    lower = {str(name).lower(): name for name in fields}
    if "chosen" in lower and "rejected" in lower:
        is_whole = isinstance(fields[lower["chosen"]], list) or not {"prompt", "question", "instruction"} & set(lower)
        kind = "messages" if is_whole else "completion"
        return (
            "a pair of a chosen and a rejected answer is for preference training, and is no row to imitate. To learn "
            f"the chosen answers alone: --columns={kind}:{lower['chosen']}."
        )
    proposal = propose_mapping(fields)
    hint = f" Say what they are, for example {proposal}." if proposal else ""
    if plan is not None:
        question = next(iter(plan.column_of.values()))
        return f"there is no answer beside {question!r}. Columns: {keys}. Name it with --columns=completion:COLUMN."
    return f"no known row format has the keys {keys}. Known: {_KNOWN}.{hint}"


def _other_template_note(file: str) -> str:
    return (
        f"{file}: some documents hold a chat template of another kind (such as ### Response:). They are learnt as they "
        "are, questions included. To learn the answers alone, give questions and answers in columns of their own."
    )


def _file(origin: str) -> str:
    return origin.rsplit("[", 1)[0] if origin.endswith("]") else origin.rsplit(":", 1)[0]
