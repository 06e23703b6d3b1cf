"""Help texts: what a verb is for, examples that work, and its flags with their defaults."""

import textwrap
from collections.abc import Mapping
from typing import Any

from absl import flags

_WIDTH, _FLAG_COLUMN = 110, 28
_BUILT_IN = ("flagfile", "undefok")
_FIRST_STEPS = (
    "quickstart",
    "data  --data=questions.jsonl",
    "train --data=questions.jsonl --workdir=runs/mine",
    "chat  --model=runs/mine",
)


def overview(verbs: Mapping[str, str]) -> str:
    """Returns what `gemma-tune --help` prints."""
    lines = [
        "usage: gemma-tune VERB [--flag=value …]",
        "",
        "Fine-tune Google's Gemma models with Keras 3 on JAX.",
        "",
        "verbs:",
    ]
    lines += [f"  {verb:<12}{text}" for verb, text in verbs.items()]
    lines += ["", "`gemma-tune VERB --help` shows a verb's flags. `gemma-tune --version` prints the version.", ""]
    lines += ["first steps:", *(f"  gemma-tune {step}" for step in _FIRST_STEPS)]
    return "\n".join(lines)


def for_verb(verb: str, module: Any, values: flags.FlagValues) -> str:
    """Returns what `gemma-tune VERB --help` prints."""
    lines = [f"usage: gemma-tune {verb} {module.USAGE}", "", *_paragraph(module.DESCRIPTION), "", "examples:"]
    lines += [f"  {example}" for example in module.EXAMPLES]
    lines += ["", "flags:"]
    for name in _in_order_of_definition(values):
        lines += _flag_lines(values[name])
    if "config" in values:
        lines += ["", *_paragraph(
            "--config=FILE loads the Config that the file's get_config() returns; a workdir or its config.json will do "
            "too. --config.KEY=value "
            "sets any setting, for example --config.optimizer.weight_decay=0. Flags win over the file, --config.KEY "
            "over both. All keys with their "
            "defaults stand in gemma_tune/config.py, and `--dry_run` prints those of a run."
        )]  # fmt: skip
    return "\n".join(lines)


def _in_order_of_definition(values: flags.FlagValues) -> list[str]:
    names = [name for name, flag in values._flags().items() if name == flag.name and name not in _BUILT_IN]
    return [name for name in names if name not in ("json", "help")] + ["json", "help"]


def _flag_lines(flag: flags.Flag) -> list[str]:
    kind = {"bool": "", "int": "=N", "float": "=X", "string": "=…"}.get(flag.flag_type(), "=…")
    head = f"  --{flag.name}{kind}"
    body = textwrap.wrap(" ".join((flag.help or "").split()), _WIDTH - _FLAG_COLUMN)
    if len(head) >= _FLAG_COLUMN:
        return [head, *[" " * _FLAG_COLUMN + line for line in body]]
    return [head.ljust(_FLAG_COLUMN) + body[0], *[" " * _FLAG_COLUMN + line for line in body[1:]]]


def _paragraph(text: str) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), _WIDTH)
