"""Puts the turns of a conversation into the order that the chat templates need.

First maybe a system turn and declarations of tools; then user and model in turn, and the user begins. The model's turn
may have several steps. With `data.on_role_order=merge`:

- Turns of one speaker in a row become one, with an empty line between their texts.
- System turns at the beginning become one. A later one becomes a part of the user's turn there.
- Where the model speaks first, its turn stays as context, before the first question, and isn't learnt. Without any
  question, the system turn becomes it.
- A question without an answer at the end is left out.
"""

from collections.abc import Sequence

from gemma_tune.data.example import Turn
from gemma_tune.errors import DataError

_MODEL_STEPS = ("thought", "model", "call", "tool")
_OPENING = ("system", "tools")


def order_turns(
    turns: Sequence[Turn], policy: str, origin: str, changes: list[str], keep_question: bool = False
) -> list[Turn]:
    """Returns turns in the order that the chat templates need.

    Args:
        turns: Turns in the order in which they were read.
        policy: The setting `data.on_role_order`: `merge`, or `error`, which changes nothing but a question at the end.
        origin: File and line, for the errors.
        changes: List that gets what was changed.
        keep_question: Whether a question without an answer may stand at the end.

    Raises:
        DataError: No model turn is there to learn; or the order is another and `policy` is `error`.
    """
    if policy == "error":
        _check_order(turns if keep_question else _without_last_question(list(turns), []), origin)
    num_opening = next((i for i, turn in enumerate(turns) if turn.role not in _OPENING), len(turns))
    opening, spoken = list(turns[:num_opening]), list(turns[num_opening:])
    system = _join([turn for turn in opening if turn.role == "system"], changes)
    tools = [turn for turn in turns if turn.role == "tools"]
    spoken = [_as_user(turn, changes) for turn in spoken if turn.role != "tools"]
    if not keep_question:
        spoken = _without_last_question(spoken, changes)
    if spoken and not any(turn.role == "user" for turn in spoken):
        if not system:
            raise DataError(f"{origin}: there is no user turn, so there is no question to the answer.")
        changes.append("system_moved")
        spoken, system = [*(turn._replace(role="user") for turn in system), *spoken], []
    spoken = _join(_with_leading_context(spoken, changes), changes)
    if not keep_question or not spoken or spoken[-1].role != "user":
        _check_learnt(spoken, origin)
    return [*system, *tools, *spoken]


def _as_user(turn: Turn, changes: list[str]) -> Turn:
    if turn.role != "system":
        return turn
    changes.append("system_moved")
    return turn._replace(role="user")


def _without_last_question(turns: list[Turn], changes: list[str]) -> list[Turn]:
    end = len(turns)
    while end and turns[end - 1].role in ("user", "tool"):
        end -= 1
    if 0 < end < len(turns):
        changes.append("last_question_dropped")
        return turns[:end]
    return turns


def _with_leading_context(turns: list[Turn], changes: list[str]) -> list[Turn]:
    """Returns turns of which those before the first question aren't learnt."""
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), 0)
    if first:
        changes.append("assistant_first")
    return [turn._replace(is_learnt=False) if i < first else turn for i, turn in enumerate(turns)]


def _join(turns: Sequence[Turn], changes: list[str]) -> list[Turn]:
    """Joins neighbours of one role: texts of one speaker, and thoughts, but not calls and results."""
    joined: list[Turn] = []
    for turn in turns:
        if joined and joined[-1].role == turn.role and turn.role not in ("call", "tool"):
            last = joined.pop()
            if turn.role in ("user", "model", "system"):
                changes.append("turns_joined")
            content = "\n\n".join(text for text in (last.content, turn.content) if text.strip())
            turn = Turn(turn.role, content, last.is_learnt and turn.is_learnt)
        joined.append(turn)
    return joined


def _check_learnt(spoken: Sequence[Turn], origin: str) -> None:
    steps = [turn for turn in spoken if turn.role in ("model", "call")]
    if not steps:
        raise DataError(f"{origin}: there is no model turn, so there is nothing to learn.")
    if not any(turn.is_learnt for turn in steps):
        raise DataError(f"{origin}: none of the model's turns is to be learnt, so there is nothing to learn.")


def _check_order(turns: Sequence[Turn], origin: str) -> None:
    """Checks that user and model take turns, and that no system turn stands between them."""
    number_opening = next((i for i, turn in enumerate(turns) if turn.role not in _OPENING), len(turns))
    if sum(turn.role == "system" for turn in turns[:number_opening]) > 1:
        raise DataError(f"{origin}: there are several system turns. {_ADVICE}")
    previous = Turn("model", "")
    for index, turn in enumerate(turns[number_opening:], 1):
        expected = "the user's" if previous.role == "model" else "the model's"
        speaker = "model" if turn.role in _MODEL_STEPS else turn.role
        goes_on = speaker == "model" and previous.role in ("thought", "call", "tool", "user")
        calls_after_text = turn.role == "call" and previous.role == "model" and index > 1
        if not (goes_on or calls_after_text or (speaker == "user" and previous.role in ("model", "call", "tool"))):
            raise DataError(f"{origin}: turn {index} should be {expected}, found {turn.role}. {_ADVICE}")
        previous = turn


_ADVICE = "User and model take turns, and the user begins. --on_role_order=merge brings the turns into that order."
