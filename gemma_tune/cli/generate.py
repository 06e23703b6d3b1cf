"""`gemma-tune generate`: answers questions."""

import dataclasses
import sys
from typing import Any

from gemma_tune.cli.flags import generation_flags
from gemma_tune.cli.verb import Invocation, Verb
from gemma_tune.errors import ConfigError
from gemma_tune.runtime.shell import gemma_tune_command


def _run(invocation: Invocation) -> dict[str, Any]:
    """Prints the answers."""
    config, adapter, console = invocation.config(), invocation.flags.adapter, invocation.output.console
    prompts = list(invocation.positional)
    if not prompts and not sys.stdin.isatty():
        prompts = [line.strip() for line in sys.stdin if line.strip()]
    if not prompts:
        raise ConfigError("There is no question. Give one as an argument, in quotes, or one a line on stdin.")
    from gemma_tune.models.load import load_configured
    from gemma_tune.serving import generate, stream

    model = load_configured(config, adapter)
    sampling = {**dataclasses.asdict(config.generation), "seed": config.seed}
    if len(prompts) == 1:
        pieces = []
        for piece in stream(model, prompts[0], **sampling):
            pieces.append(piece)
            console.print(piece, end="", markup=False, soft_wrap=True)
        console.print()
        answers = ["".join(pieces)]
    else:
        answers = list(generate(model, prompts, **sampling))
        for prompt, answer in zip(prompts, answers, strict=True):
            console.print(prompt, style="bold", markup=False, soft_wrap=True)
            console.print(answer, markup=False, soft_wrap=True, end="\n\n")
    return {
        "answers": [{"question": q, "answer": a} for q, a in zip(prompts, answers, strict=True)],
        "next": [gemma_tune_command("chat", model=config.model.source, adapter=adapter)],
    }


VERB = Verb(
    name="generate",
    usage='--model=WORKDIR "QUESTION" ["QUESTION" …]',
    description="""Answers questions, given as arguments or one a line on stdin. A single answer is printed while it is
    generated.""",
    examples=(
        'gemma-tune generate --model=runs/mine "How do I reset my phone?"',
        "gemma-tune generate --model=runs/mine --json < questions.txt",
        'gemma-tune generate --model=demo --adapter=runs/mine/adapter --temperature=0.7 "My screen is black."',
    ),
    flags=generation_flags(),
    run=_run,
    writes_data=True,
)
