"""Makes the turns of rows whose columns are a question and its answer, or a document."""

import re
from collections.abc import Mapping
from typing import Any

from gemma_tune.data.example import Turn
from gemma_tune.data.rows.cell_text import answer_text, cell_text, joined_parts
from gemma_tune.data.rows.chat_rows import chat_turns
from gemma_tune.data.rows.columns import ColumnPlan
from gemma_tune.data.rows.ready_made import other_template, parse_gemma_text, without_end_tokens
from gemma_tune.data.rows.thoughts import split_thoughts
from gemma_tune.errors import ConfigError, DataError

_FIELD = re.compile(r"\{([^{}]+)\}")
_BAD_LABELS = ("false", "0", "bad", "rejected", "undesirable")


def template_fields(template: str) -> tuple[str, ...]:
    """Returns the columns that a prompt template names, `{title}\\n{body}`.

    Raises:
        ConfigError: It names none.
    """
    names = tuple(dict.fromkeys(_FIELD.findall(template)))
    if template and not names:
        raise ConfigError(f"data.prompt_template must name columns in braces, like {{title}}; got {template!r}.")
    return names


def is_labelled_bad(fields: Mapping[str, Any], plan: ColumnPlan) -> bool:
    """Returns whether a label says that a row's answer is a bad one: false, as in data for KTO (arXiv:2402.01306)."""
    value = fields[plan.column_of["label"]] if "label" in plan.column_of else None
    return (
        value is not None and isinstance(value, (bool, int, float, str)) and str(value).strip().lower() in _BAD_LABELS
    )


def flat_turns(
    fields: Mapping[str, Any], plan: ColumnPlan, template: str, origin: str, changes: list[str], unused: dict[str, None]
) -> list[Turn]:
    """Returns the turns of a question and its answer; of a question alone where the plan has no answer.

    Args:
        fields: Values by column.
        plan: What the columns are used for.
        template: The setting `data.prompt_template`; '' for none.
        origin: File and line, for the errors.
        changes: List that gets what was changed.
        unused: Dict that gets the keys of messages that aren't used.

    Raises:
        DataError: A value is no text.
    """
    turns = _prompt_turns(fields, plan, template, origin, changes, unused)
    if "completion" not in plan.column_of:
        return turns
    name = plan.column_of["completion"]
    answer = fields[name]
    if _is_messages(answer):
        said = chat_turns(answer, origin, changes, unused, name)
        # The answer of a preference pair may be the whole conversation.
        return said if any(turn.role == "user" for turn in said) else [*turns, *said]
    if isinstance(answer, list) and answer and all(isinstance(part, Mapping) and "type" in part for part in answer):
        answer = joined_parts(answer, name, origin, changes)
    inline, text = split_thoughts(without_end_tokens(answer_text(answer, name, origin, changes), changes))
    return [*turns, *row_thoughts(fields, plan, inline, origin), Turn("model", text)]


def document_turns(fields: Mapping[str, Any], plan: ColumnPlan, origin: str, changes: list[str]) -> list[Turn]:
    """Returns the turn of a document, or the turns of the conversation that it is in one of Gemma's templates."""
    name = plan.column_of["text"]
    text = cell_text(fields[name], name, origin, changes)
    if turns := parse_gemma_text(text):
        changes.append("templates_parsed")
        return turns
    if other_template(text):
        changes.append("other_templates")
    return [Turn("text", without_end_tokens(text, changes))]


def context_text(fields: Mapping[str, Any], plan: ColumnPlan, kind: str, origin: str, changes: list[str]) -> str:
    """Returns the text of a column that belongs to a question; '' where there is none. A list of texts is joined."""
    name = plan.column_of.get(kind)
    if name is None:
        return ""
    value = fields[name]
    if isinstance(value, Mapping) and isinstance(value.get("contexts"), list):
        value = value["contexts"]  # PubMedQA.
    if isinstance(value, list):
        return "\n\n".join(cell_text(each, name, origin, changes) for each in value)
    return cell_text(value, name, origin, changes)


def row_thoughts(fields: Mapping[str, Any], plan: ColumnPlan, inline: str, origin: str) -> list[Turn]:
    """Returns the thoughts of a row: those of a column of their own, and those in its answer."""
    name = plan.column_of.get("thought")
    given = cell_text(fields[name], name, origin, []).strip() if name else ""
    return [Turn("thought", thought) for thought in dict.fromkeys((given, inline)) if thought]


def _prompt_turns(
    fields: Mapping[str, Any], plan: ColumnPlan, template: str, origin: str, changes: list[str], unused: dict[str, None]
) -> list[Turn]:
    if template:
        return [*_system_turns(fields, plan, origin, changes), Turn("user", _filled(template, fields, origin, changes))]
    kind = "instruction" if "instruction" in plan.column_of else "prompt"
    name = plan.column_of[kind]
    if _is_messages(fields[name]):
        return [*_system_turns(fields, plan, origin, changes), *chat_turns(fields[name], origin, changes, unused, name)]
    question = cell_text(fields[name], name, origin, changes)
    if "<" in question:
        if turns := parse_gemma_text(question):
            changes.append("templates_parsed")
            return turns
        question = without_end_tokens(question, changes)
    if other_template(question):
        changes.append("other_templates")
    context = context_text(fields, plan, "context", origin, changes)
    given = context_text(fields, plan, "input", origin, changes)
    parts = (question, given, context) if kind == "instruction" else (context, question, given)
    asked = "\n\n".join(part for part in parts if part.strip()) if context or given else question
    return [*_system_turns(fields, plan, origin, changes), Turn("user", asked)]


def _system_turns(fields: Mapping[str, Any], plan: ColumnPlan, origin: str, changes: list[str]) -> list[Turn]:
    system = context_text(fields, plan, "system", origin, changes)
    return [Turn("system", system)] if system.strip() else []


def _filled(template: str, fields: Mapping[str, Any], origin: str, changes: list[str]) -> str:
    """Returns a prompt template with the values of a row. A written-out `\\n` or `\\t` is one."""
    folded = {str(name).strip().lower(): name for name in fields}

    def value(found: re.Match) -> str:
        name = found[1] if found[1] in fields else folded.get(found[1].strip().lower())
        if name is None:
            raise DataError(
                f"{origin}: data.prompt_template names {found[0]}, but there is no such column. Columns: "
                f"{', '.join(map(str, fields))}."
            )
        return cell_text(fields[name], name, origin, changes)

    return _FIELD.sub(value, template.replace("\\n", "\n").replace("\\t", "\t"))


def _is_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], Mapping)
        and bool({"role", "from"} & set(value[0]))
    )
