"""`gemma-tune generate`."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags as absl_flags

from gemma_tune.cli import flags
from gemma_tune.cli.output import Output
from gemma_tune.errors import ConfigError

USAGE = '--model=WORKDIR "QUESTION" ["QUESTION" …]'
DESCRIPTION = (
    """Answers questions, given as arguments or one a line on stdin. A single answer appears while it is written."""
)
EXAMPLES = (
    'gemma-tune generate --model=runs/mine "How do I reset my phone?"',
    "gemma-tune generate --model=runs/mine --json < questions.txt",
    'gemma-tune generate --model=demo --adapter=runs/mine/adapter --temperature=0.7 "My screen is black."',
)


def define_flags(values: absl_flags.FlagValues) -> None:
    """Defines the verb's flags."""
    flags.define_for_answers(values)


def run(
    values: absl_flags.FlagValues, overrides: Sequence[str], positional: Sequence[str], output: Output
) -> dict[str, Any]:
    """Prints the answers."""
    config = flags.to_config(values, overrides)
    prompts = list(positional)
    if not prompts and not sys.stdin.isatty():
        prompts = [line.strip() for line in sys.stdin if line.strip()]
    if not prompts:
        raise ConfigError("No question. Give one as an argument, in quotes, or one a line on stdin.")
    from gemma_tune.models.load import load_configured
    from gemma_tune.serving import generate, stream

    model = load_configured(config, values.adapter)
    sampling = {**dataclasses.asdict(config.generation), "seed": config.seed}
    if len(prompts) == 1:
        pieces = []
        for piece in stream(model, prompts[0], **sampling):
            pieces.append(piece)
            output.console.print(piece, end="", markup=False, soft_wrap=True)
        output.console.print()
        answers = ["".join(pieces)]
    else:
        answers = list(generate(model, prompts, **sampling))
        for prompt, answer in zip(prompts, answers, strict=True):
            output.console.print(prompt, style="bold", markup=False, soft_wrap=True)
            output.console.print(answer, markup=False, soft_wrap=True, end="\n\n")
    command = f"gemma-tune chat --model={config.model.source}" + (
        f" --adapter={values.adapter}" if values.adapter else ""
    )
    if output.console.is_terminal:
        output.next(command)
    return {"answers": [{"question": q, "answer": a} for q, a in zip(prompts, answers, strict=True)], "next": [command]}
