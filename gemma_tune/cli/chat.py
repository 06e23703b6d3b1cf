"""`gemma-tune chat`: a conversation in the terminal."""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console

from gemma_tune.cli.flags import generation_flags
from gemma_tune.cli.verb import Flag, Invocation, Verb
from gemma_tune.config import Config
from gemma_tune.runtime.shell import gemma_tune_command

_MAX_TOKENS = 2048  # Of a conversation and its next answer.


def _run(invocation: Invocation) -> dict[str, Any]:
    """Answers what is typed until the end of input."""
    flags, console, config = invocation.flags, invocation.output.console, invocation.config()
    from gemma_tune.data import Turn
    from gemma_tune.models.load import load_configured

    with console.status(f"Loading {config.model.source}…"):
        model = load_configured(config, flags.adapter)
    with console.status("Compiling…"):
        trim, answer = _functions_for(model, config)
    console.print("Type a message. /reset starts a new conversation, /exit ends the chat.", style="dim")
    first_turns = [Turn("system", flags.system)] if flags.system else []
    turns = list(first_turns)
    while (line := _read_line(console)) is not None:
        if line == "/reset":
            turns = list(first_turns)
            console.print("A new conversation has begun.", style="dim")
            continue
        turns.append(Turn("user", line))
        trimmed = trim(turns)
        if len(trimmed) < len(turns):
            console.print("The conversation is too long: its first turns are left out.", style="dim")
        turns.append(Turn("model", _print_answer(answer(trimmed, config.seed + len(turns)), console)))
    return {
        "turns": [turn._asdict() for turn in turns],
        "next": [gemma_tune_command("eval", model=config.model.source)],
    }


def _functions_for(model: Any, config: Config) -> tuple[Callable[[Any], Any], Callable[[Any, int], Iterator[str]]]:
    """Returns a function that drops the first turns of a conversation that is too long, and one that answers it."""
    from gemma_tune.serving import stream
    from gemma_tune.serving.conversation import Conversation
    from gemma_tune.serving.sampling import Sampling

    settings = dataclasses.asdict(config.generation)
    if config.training.mesh:  # The engine computes on one device.
        return lambda turns: turns, lambda turns, seed: stream(model, turns, **settings, seed=seed)
    conversation = Conversation(model, _MAX_TOKENS, settings.pop("max_new_tokens"), Sampling(**settings))
    return conversation.trim, conversation.answer


def _print_answer(answer: Iterator[str], console: Console) -> str:
    """Prints an answer while it is generated, until Ctrl-C, and returns it."""
    pieces: list[str] = []
    try:
        for piece in answer:
            pieces.append(piece)
            console.print(piece, end="", markup=False, soft_wrap=True)
    except KeyboardInterrupt:
        console.print(" …", style="dim", end="")
    console.print("\n")
    return "".join(pieces)


def _read_line(console: Console) -> str | None:
    """Returns the next line that isn't empty, or None at the end."""
    while True:
        try:
            if sys.stdin.isatty():
                console.print("you ", style="bold green", end="")
                import readline  # noqa: F401  (makes input() editable, with a history)
            line = input().strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            console.print()
            return None
        if line in ("/exit", "/quit"):
            return None
        if line:
            return line


VERB = Verb(
    name="chat",
    usage="--model=WORKDIR",
    description="""A conversation in the terminal. The model sees all turns so far. /reset starts a new conversation,
    /exit or Ctrl-D ends the chat, and Ctrl-C stops an answer.""",
    examples=(
        "gemma-tune chat --model=runs/mine",
        "gemma-tune chat --model=gemma3_instruct_1b --precision=bfloat16 --temperature=0.7 --top_p=0.9",
    ),
    flags=(
        *generation_flags(),
        Flag("system", "System prompt at the beginning of a conversation.", group="Generation"),
    ),
    run=_run,
)
