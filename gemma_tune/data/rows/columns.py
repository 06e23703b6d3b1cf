"""Recognizes what the columns of a row mean: by their usual names in any case, or by the names that a user gives."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from gemma_tune.errors import ConfigError, DataError, did_you_mean

# What a column can be -> its usual names, compared in lower case, with `_` for spaces and hyphens.
USUAL_NAMES: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations", "conversation", "dialogue", "dialog", "chat"),
    "instruction": ("instruction",),
    "prompt": ("prompt", "question", "query", "problem", "user", "human"),
    "completion": ("completion", "response", "output", "answer", "answers", "solution", "assistant", "reply", "target"),
    "input": ("input",),
    "context": ("context", "passage", "document"),
    "system": ("system", "system_prompt", "system_message"),
    "tools": ("tools", "functions"),
    "thought": ("reasoning_content", "thinking", "reasoning", "thought", "thoughts", "chain_of_thought"),
    "label": ("label",),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "text": ("text",),
}
_PREFERRED_AFTER_INSTRUCTION = ("response", "output")  # Dolly has both an answer and columns that sound like one.
_WEAK_PROMPTS = ("user", "human")  # Without an answer beside them they may hold a name.
_ABOUT_PROMPT = ("instruction", "prompt", "input", "context", "system", "tools")
_USED_KINDS = {
    "chat": ("messages", "input", "context", "system", "tools", "thought", "label"),
    "instruction": (*_ABOUT_PROMPT, "completion", "thought", "label"),
    "prompt_completion": (*_ABOUT_PROMPT, "completion", "thought", "label"),
    "prompt_only": _ABOUT_PROMPT,
    "text": ("text",),
}
_REPLACED_BY_TEMPLATE = ("messages", "instruction", "prompt", "input", "context", "text")
_KIND_OF = {name: kind for kind, names in USUAL_NAMES.items() for name in names}


class ColumnPlan(NamedTuple):
    """What the columns of a row are used for.

    Attributes:
        name: Name of the format: `chat`, `instruction`, `prompt_completion`, `text`, or `prompt_only` for a question
            without an answer.
        column_of: Column by what it is.
        unused: Columns that aren't used.
    """

    name: str
    column_of: Mapping[str, str]
    unused: tuple[str, ...]


def parse_columns(columns: Sequence[str]) -> dict[str, str]:
    """Returns the column that a user names for each kind, `["prompt:User Question", …]`. An empty one means none.

    Raises:
        ConfigError: An entry isn't of the form KIND:COLUMN, or names no kind.
    """
    mapping = {}
    for entry in columns:
        kind, colon, column = entry.partition(":")
        kind = _folded(kind)
        if not colon:
            raise ConfigError(f"data.columns must have entries like prompt:COLUMN, got {entry!r}.")
        if kind not in USUAL_NAMES:
            kinds = [each for each in USUAL_NAMES if each not in ("chosen", "rejected")]
            known = _KIND_OF.get(kind)
            if known is None:
                raise ConfigError(
                    f"data.columns: a column can't be a {kind!r}. Known: {', '.join(kinds)}.{did_you_mean(kind, kinds)}"
                )
            kind = known
        mapping[kind] = column.strip()
    return mapping


def plan_columns(
    names: Iterable[str], mapping: Mapping[str, str], template_names: Sequence[str] = ()
) -> ColumnPlan | None:
    """Returns what the columns of a row are used for, or None where no format has them.

    Args:
        names: Names of the columns that hold something.
        mapping: Columns that a user names, from `parse_columns`.
        template_names: Columns that a prompt template names; they make the prompt.
    """
    names = [name for name in names if isinstance(name, str)]
    found = _found(names, mapping)
    if template_names:
        found = {kind: column for kind, column in found.items() if kind not in _REPLACED_BY_TEMPLATE}
        found["prompt"] = _match(template_names[0], names) or template_names[0]
    if "completion" in found and "input" in found and not {"instruction", "prompt"} & set(found):
        found["prompt"] = found.pop("input")
    name = _format_name(found)
    if name is None:
        return None
    kinds = [kind for kind in _USED_KINDS[name] if kind in found]
    if "instruction" in kinds and "prompt" in kinds:
        kinds.remove("prompt")
    column_of = {kind: found[kind] for kind in kinds}
    used = {*column_of.values(), *(_match(each, names) for each in template_names)}
    return ColumnPlan(name, column_of, tuple(each for each in names if each not in used))


def check_mapping(names: Sequence[str], mapping: Mapping[str, str], template_names: Sequence[str], origin: str) -> None:
    """Checks that the first row of a file has the columns that a user names.

    Raises:
        DataError: It lacks one; says which columns there are.
    """
    for kind, column in (*mapping.items(), *(("prompt_template", name) for name in template_names)):
        if column and _match(column, names) is None:
            where = "data.prompt_template" if kind == "prompt_template" else f"data.columns={kind}:{column}"
            raise DataError(
                f"{origin}: {where} names the column {column!r}, which isn't there. Columns: "
                f"{', '.join(map(str, names))}.{did_you_mean(column, map(str, names))}"
            )


def propose_mapping(fields: Mapping[str, object]) -> str:
    """Returns a proposal for `--columns` from the columns of a row: '--columns=prompt:Q,completion:A'; '' if none."""
    names = [name for name in fields if isinstance(name, str) and fields[name] is not None]
    lists = [name for name in names if isinstance(fields[name], list) and fields[name]]
    if lists and isinstance(fields[lists[0]][0], (Mapping, str)):  # type: ignore[index]
        return f"--columns=messages:{lists[0]}"
    texts = [name for name in names if isinstance(fields[name], (str, int, float))]
    prompts = [name for name in texts if _sounds_like(name, "prompt")]
    answers = [name for name in texts if _sounds_like(name, "completion") and name not in prompts]
    if not prompts or not answers:
        rest = [name for name in texts if name not in (*prompts, *answers)]
        prompts, answers = prompts or rest[:1], answers or [name for name in rest if name not in prompts][:1]
        prompts = prompts if prompts != answers else []
    if prompts and answers:
        return f"--columns={_quoted(f'prompt:{prompts[0]},completion:{answers[0]}')}"
    return f"--columns={_quoted(f'text:{texts[0]}')}" if texts else ""


def _quoted(text: str) -> str:
    return f"'{text}'" if " " in text else text


def _sounds_like(name: str, kind: str) -> bool:
    words = _folded(name).split("_")
    hints = {
        "prompt": ("q", "ask", "title", "in", "source"),
        "completion": ("a", "bot", "model", "out", "body", "result"),
    }
    usual = (*USUAL_NAMES[kind], *(USUAL_NAMES["instruction"] if kind == "prompt" else ()))
    is_answer = any(word in (*USUAL_NAMES["completion"], *hints["completion"]) for word in words)
    return any(word in (*usual, *hints[kind]) for word in words) and (kind == "completion" or not is_answer)


def _folded(name: str) -> str:
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def _match(wanted: str, names: Sequence[str]) -> str | None:
    """Returns the column of a name: spelled so, or in other case, spaces and hyphens."""
    if wanted in names:
        return wanted
    folded = _folded(wanted)
    return next((name for name in names if isinstance(name, str) and _folded(name) == folded), None)


def _found(names: Sequence[str], mapping: Mapping[str, str]) -> dict[str, str]:
    """Returns the column of each kind. What a user names comes first, then the usual names in their order."""
    folded = {_folded(name): name for name in reversed(names)}
    named = {kind: match for kind, column in mapping.items() if column and (match := _match(column, names)) is not None}
    taken = set(named.values())
    found = dict(named)
    for kind, usual in USUAL_NAMES.items():
        if kind in mapping:
            continue
        for name in _preferred(usual, folded):
            if name in folded and folded[name] not in taken:
                found[kind] = folded[name]
                break
    if any(mapping.get(kind) for kind in ("messages", "text", "prompt", "instruction", "completion")):
        # What a user names decides the format.
        shadowed = ("messages", "text", "instruction", "prompt", "completion", "chosen", "rejected")
        keep = {"messages": ("messages",), "text": ("text",)}
        first = next((kind for kind in ("messages", "text") if kind in mapping), "")
        wanted = keep.get(first, ("instruction", "prompt", "completion"))
        found = {kind: column for kind, column in found.items() if kind in wanted or kind not in shadowed}
    return found


def _preferred(usual: Sequence[str], folded: Mapping[str, str]) -> Sequence[str]:
    if "instruction" in folded and "completion" in usual:
        return (*_PREFERRED_AFTER_INSTRUCTION, *usual)
    return usual


def _format_name(found: Mapping[str, str]) -> str | None:
    if "messages" in found:
        return "chat"
    has_prompt = "instruction" in found or "prompt" in found
    if has_prompt and "completion" in found:
        return "instruction" if "instruction" in found else "prompt_completion"
    if has_prompt and _folded(found.get("prompt", "")) in _WEAK_PROMPTS:
        has_prompt = False
    if has_prompt:
        return None if "text" in found or ("chosen" in found and "rejected" in found) else "prompt_only"
    return "text" if "text" in found else None
