"""Finds the thoughts in a model's text, and applies the choice of whether they are learnt."""

import re
from collections.abc import Sequence

from gemma_tune.data.example import Turn

# Gemma 4's channel, and the tags of models such as DeepSeek-R1 and Qwen 3, which open an answer.
_CHANNEL = re.compile(r"<\|channel>(?:thought\b)?(.*?)<channel\|>", re.DOTALL)
_TAGS = re.compile(r"\s*<think>(.*?)</think>", re.DOTALL)
THINK_SWITCH = "<|think|>"  # Of Gemma 4's system turn. The chat template writes it where there are thoughts.


def split_thoughts(content: str) -> tuple[str, str]:
    """Returns the thoughts in a model's text, joined, and the text without them."""
    if "<|channel>" in content:
        thoughts = [thought.strip() for thought in _CHANNEL.findall(content)]
        content = _CHANNEL.sub("", content)
        return "\n\n".join(thought for thought in thoughts if thought), content
    if "<think>" in content and (found := _TAGS.match(content)):
        return found[1].strip(), content[found.end() :].lstrip()
    return "", content


def apply_thoughts(turns: Sequence[Turn], choice: str, changes: list[str]) -> list[Turn]:
    """Returns turns whose thoughts are learnt (`keep`), only read (`mask`) or left out (`drop`).

    Thoughts before the last question are left out in any case: Gemma 4's template leaves them out when the conversation
    goes on, so the model never reads them there.

    Args:
        turns: Turns of a conversation.
        choice: The setting `data.thoughts`.
        changes: List that gets what was done.
    """
    last_question = max((i for i, turn in enumerate(turns) if turn.role == "user"), default=-1)
    kept = []
    for index, turn in enumerate(turns):
        if turn.role != "thought":
            kept.append(turn)
        elif choice == "drop":
            changes.append("thoughts_dropped")
        elif index < last_question:
            changes.append("earlier_thoughts_dropped")
        else:
            changes.append("thoughts_masked" if choice == "mask" else "thoughts_kept")
            kept.append(turn._replace(is_learnt=turn.is_learnt and choice == "keep"))
    return kept
