"""Formats the help texts: what a verb does, examples that work, and its flags in groups."""

import re
import shutil
import textwrap
from collections.abc import Mapping

from gemma_tune.cli.verb import GROUPS, Flag, Verb

_MIN_WIDTH, _MAX_WIDTH = 60, 110  # Longer lines are hard to read.
_FLAG_COLUMN = 26
_NO_BREAK = "\u00a0"  # A space at which no line is broken.
_FIRST_STEPS = (
    "quickstart",
    "data  --data=questions.jsonl",
    "train --data=questions.jsonl --workdir=runs/mine",
    "chat  --model=runs/mine",
)
_CONFIG = (
    "--config=FILE starts from the Config that get_config() in FILE returns, or from that of an earlier run, given its "
    "workdir. --config.KEY=value sets any setting, for example --config.optimizer.weight_decay=0. Flags win over the "
    "file, and --config.KEY over both. gemma_tune/config_groups.py describes all settings; `gemma-tune train "
    "--dry_run` prints those of a run."
)


def overview(verbs: Mapping[str, str]) -> str:
    """Returns what `gemma-tune --help` prints.

    Args:
        verbs: What each verb does, by name.
    """
    lines = ["usage: gemma-tune VERB [--flag=value …]", "", "Fine-tune Google's Gemma models with Keras 3 on JAX.", ""]
    lines += ["verbs:"]
    for verb, text in verbs.items():
        lines += _entry(f"  {verb}", text, 14)
    lines += ["", "first steps:", *(f"  gemma-tune {step}" for step in _FIRST_STEPS), ""]
    lines += _paragraph("`gemma-tune VERB --help` shows a verb's flags. `gemma-tune --version` prints the version.")
    return "\n".join(lines)


def for_verb(verb: Verb) -> str:
    """Returns what `gemma-tune VERB --help` prints."""
    usage = textwrap.wrap(f"usage: gemma-tune {verb.name} {verb.usage}".rstrip(), _width(), subsequent_indent=" " * 8,
                          break_on_hyphens=False, break_long_words=False)  # fmt: skip
    lines = [*usage, "", *_paragraph(verb.description), "", "examples:"]
    for example in verb.examples:
        lines += _command(example)
    lines += ["", "flags:"]
    for group in GROUPS:
        flags = [flag for flag in verb.all_flags if flag.group == group]
        if flags:
            lines += [f"\n  {group}", *(line for flag in flags for line in _flag_lines(flag))]
    if verb.takes_config:
        lines += ["", *_paragraph(_CONFIG)]
    return "\n".join(lines)


def _width() -> int:
    return min(max(shutil.get_terminal_size().columns, _MIN_WIDTH), _MAX_WIDTH)


def _flag_lines(flag: Flag) -> list[str]:
    value = {bool: "", int: "=N", float: "=X"}.get(flag.type, "=…")
    is_switch = flag.type is bool and flag.default is not False
    head = f"    --[no]{flag.name}" if is_switch else f"    --{flag.name}{value}"
    default = f" (default:{_NO_BREAK}{flag.default_text})" if flag.default_text else ""
    return _entry(head, f"{flag.help}{default}", _FLAG_COLUMN)


def _entry(head: str, text: str, column: int) -> list[str]:
    """Returns lines with `head` on the left and the text from a column on."""
    body = _paragraph(text, column)
    if len(head) >= column - 1:
        return [head, *(" " * column + line for line in body)]
    return [head.ljust(column) + body[0], *(" " * column + line for line in body[1:])]


def _command(text: str) -> list[str]:
    """Returns an example in lines that can be pasted: a backslash ends each but the last."""
    lines = [" "]
    for word in re.findall(r"""(?:"[^"]*"|'[^']*'|\S)+""", text):
        if len(lines[-1]) + len(word) + 3 > _width() and lines[-1].strip():
            lines[-1] += " \\"
            lines.append(" " * 5)
        lines[-1] += f" {word}"
    return lines


def _paragraph(text: str, indent: int = 0) -> list[str]:
    """Returns lines that leave room for an indent; words and what `_NO_BREAK` joins stay in one piece."""
    words = re.sub(r"\s+", " ", text, flags=re.ASCII).strip()
    lines = textwrap.wrap(words, _width() - indent, break_on_hyphens=False, break_long_words=False)
    return [line.replace(_NO_BREAK, " ") for line in lines]
