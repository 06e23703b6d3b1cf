"""Writes commands that can be pasted into a shell."""

import shlex


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
            words.append(f"--{name}={shlex.quote(str(value))}")
    return " ".join([*words, *(shlex.quote(str(argument)) for argument in arguments)])
