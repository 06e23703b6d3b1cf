"""`gemma-tune chat`."""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import flags as absl_flags

from gemma_tune.cli import flags
from gemma_tune.cli.output import Output
from gemma_tune.config import Config

USAGE = "--model=WORKDIR"
_MOST_TOKENS = 2048  # Of a conversation and its next answer.
DESCRIPTION = """A conversation in the terminal. The model sees all turns so far. /reset begins anew, /exit or Ctrl-D
leaves; Ctrl-C stops an answer."""
EXAMPLES = (
    "gemma-tune chat --model=runs/mine",
    "gemma-tune chat --model=gemma3_instruct_1b --precision=bfloat16 --temperature=0.7 --top_p=0.9",
)


def define_flags(values: absl_flags.FlagValues) -> None:
    """Defines the verb's flags."""
    flags.define_for_answers(values)
    absl_flags.DEFINE_string("system", "", "A system turn at the beginning.", flag_values=values)


def run(
    values: absl_flags.FlagValues, overrides: Sequence[str], positional: Sequence[str], output: Output
) -> dict[str, Any]:
    """Reads turns until the end of input."""
    del positional
    config = flags.to_config(values, overrides)
    from gemma_tune.data import Turn
    from gemma_tune.models.load import load_configured

    console = output.console
    with console.status(f"Loading {config.model.source}…"):
        model = load_configured(config, values.adapter)
    with console.status("Compiling…"):
        fit, answer = _answering(model, config)
    console.print("Ask away. /reset begins anew, /exit leaves.", style="dim")
    beginning = [Turn("system", values.system)] if values.system else []
    turns = list(beginning)
    while (line := _read_line(output)) is not None:
        if line == "/reset":
            turns = list(beginning)
            console.print("A new conversation.", style="dim")
            continue
        turns.append(Turn("user", line))
        fitting = fit(turns)
        if len(fitting) < len(turns):
            console.print("The conversation is too long: its first turns are left out.", style="dim")
        pieces: list[str] = []
        try:
            for piece in answer(fitting, config.seed + len(turns)):
                pieces.append(piece)
                console.print(piece, end="", markup=False, soft_wrap=True)
        except KeyboardInterrupt:
            console.print(" …", style="dim", end="")
        console.print("\n")
        turns.append(Turn("model", "".join(pieces)))
    command = f"gemma-tune eval --model={config.model.source}"
    output.next(command)
    return {"turns": [turn._asdict() for turn in turns], "next": [command]}


def _answering(model: Any, config: Config) -> tuple[Callable[[Any], Any], Callable[[Any, int], Iterator[str]]]:
    """Returns what shortens turns to what fits, and what answers them with a seed."""
    from gemma_tune.serving import stream
    from gemma_tune.serving.conversation import Conversation
    from gemma_tune.serving.sampling import Sampling

    settings = dataclasses.asdict(config.generation)
    if config.training.mesh:  # The engine computes on one device.
        return lambda turns: turns, lambda turns, seed: stream(model, turns, **settings, seed=seed)
    conversation = Conversation(model, _MOST_TOKENS, settings.pop("max_new_tokens"), Sampling(**settings))
    return conversation.trim, conversation.answer


def _read_line(output: Output) -> str | None:
    """Returns the next line that isn't empty, or None at the end."""
    while True:
        try:
            if sys.stdin.isatty():
                output.console.print("you ", style="bold green", end="")
                import readline  # noqa: F401  (makes input() editable, with a history)
            line = input().strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            output.console.print()
            return None
        if line in ("/exit", "/quit"):
            return None
        if line:
            return line
