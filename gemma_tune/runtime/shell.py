"""Writes commands that can be pasted into a shell."""

import shlex
from collections.abc import Iterable


def gemma_tune_command(verb: str, *arguments: object, **flags: object) -> str:
    """Returns `gemma-tune VERB --flag=value … ARGUMENT …`, with values quoted where the shell needs it.

    Args:
        verb: Verb of the command line.
        arguments: Arguments behind the flags, such as the question of `generate`.
        flags: Values by flag name. `True` gives the bare flag; a flag whose value is empty, None or False is left out.
    """
    words = ["gemma-tune", verb]
    for name, value in flags.items():
        if value is True:
            words.append(f"--{name}")
        elif value not in ("", None, False):
            words.append(f"--{name}={value}")
    texts = [str(argument) for argument in arguments]
    if any(text.startswith("-") for text in texts):
        words.append("--")  # What follows are no flags.
    return quoted_command([*words, *texts])


def quoted_command(words: Iterable[str]) -> str:
    """Returns a command as one line for the shell. Of `--flag=value`, only the value is quoted."""
    return " ".join(_quoted(word) for word in words)


def _quoted(word: str) -> str:
    name, equals, value = word.partition("=")
    if equals and value and shlex.quote(name) == name:
        return f"{name}={shlex.quote(value)}"
    return shlex.quote(word)
