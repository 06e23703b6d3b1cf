"""Finds the list of messages in a column of chats, which may be a text."""

import json
import re
from typing import Any

from gemma_tune.errors import DataError

_SPEAKER = re.compile(r"(?:\A|\n\n)\s*(Human|Assistant|User): ?")


def message_list(messages: Any, origin: str, name: str) -> list:
    """Returns the messages of a chat.

    Args:
        messages: A list of messages; or JSON of one, as columns of CSV files have it, or a transcript with `Human:` and
            `Assistant:` before its paragraphs, as in Anthropic's HH set (arXiv:2204.05862).
        origin: File and line, for the error.
        name: Name of the column, for the error.

    Raises:
        DataError: It is something else, or empty.
    """
    if isinstance(messages, str) and messages.strip()[:1] in ("[", "{"):
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{origin}: {name!r} is a text, but no JSON of a list of turns: {error}.") from error
    if isinstance(messages, str) and (spoken := _SPEAKER.split(messages))[0].strip() == "" and len(spoken) > 1:
        pairs = zip(spoken[1::2], spoken[2::2], strict=True)
        messages = [{"role": speaker, "content": text.strip()} for speaker, text in pairs]
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{origin}: {name!r}: expected a list of turns, found {messages!r:.60}.")
    return messages
