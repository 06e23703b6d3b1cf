"""Runs a command line: finds the verb, parses its flags, runs it, and turns errors into a message and an exit code."""

import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence

from absl import flags

from gemma_tune.cli import help as help_text
from gemma_tune.cli.output import Output
from gemma_tune.cli.verb import Invocation, Verb
from gemma_tune.errors import ConfigError, GemmaTuneError, did_you_mean
from gemma_tune.version import __version__

# Verb -> what it does, in the order in which a user meets them.
VERBS = {
    "quickstart": "Fine-tune a real Gemma on sample data and see the difference.",
    "doctor": "Check this machine: packages, devices, memory, disk, credentials.",
    "models": "List the Gemma models, and which fit into your memory.",
    "plan": "Predict memory, time and cost of a run on other devices.",
    "data": "Look at a data set: rendered examples, lengths, dropped rows.",
    "train": "Fine-tune a model.",
    "eval": "Score a tuned model and its base model on held-out data.",
    "tune": "Search for better settings.",
    "quantize": "Quantize a trained model, with or without calibration data.",
    "merge": "Merge LoRA into the weights of the base model.",
    "export": "Write a model for Keras, transformers, vLLM, llama.cpp and others.",
    "compare": "Compare models: memory, speed, loss and answers, side by side.",
    "generate": "Answer questions.",
    "chat": "Chat with a model in the terminal.",
    "serve": "Serve a model over HTTP: OpenAI's API, and a chat page.",
}
_USAGE, _FAILED, _INTERRUPTED, _TERMINATED = 2, 1, 130, 143
_WHEN_STOPPED = dict.fromkeys(("train", "quickstart", "tune"), " Run the same command again to go on.")


class _Terminated(BaseException):
    """Raised when SIGTERM arrives, so that whatever is being written is finished or removed."""


def run(arguments: Sequence[str]) -> int:
    """Runs a command line, without the program's name, and returns the exit code: 0 done, 1 failed, 2 wrong usage, 130
    Ctrl-C, 143 SIGTERM.
    """
    arguments = list(arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        if len(arguments) > 1 and arguments[1] in VERBS:
            arguments = [arguments[1], "--help"]
        else:
            print(help_text.overview(VERBS))
            return 0
    if arguments[0] == "--version":
        print(f"gemma_tune {__version__}")
        return 0
    verb, *rest = arguments
    if verb not in VERBS:
        print(
            f"gemma-tune: there is no verb {verb!r}.{did_you_mean(verb, VERBS)} Verbs: {', '.join(VERBS)}.",
            file=sys.stderr,
        )
        return _USAGE
    return _run_verb(verb, rest)


def _run_verb(name: str, arguments: list[str]) -> int:
    verb: Verb = importlib.import_module(f"gemma_tune.cli.{name}").VERB
    try:
        values, overrides, positional = verb.parse(arguments)
    except flags.Error as error:
        print(f"gemma-tune {name}: {_what_is_wrong(error, verb)} See `gemma-tune {name} --help`.", file=sys.stderr)
        return _USAGE
    if values.help:
        print(help_text.for_verb(verb))
        return 0
    with Output(values.json) as output, _terminable():
        code = _guarded(Invocation(verb, arguments, values, overrides, positional, output))
    if "distributed" in values and values["distributed"].value:
        from gemma_tune.runtime.processes import shutdown_distributed

        shutdown_distributed(code)
    return code


def _what_is_wrong(error: flags.Error, verb: Verb) -> str:
    """Returns absl's message, with the nearest flag's name where it doesn't know one."""
    text, quote, rest = f"{error}".split(" Did you mean")[0].rstrip("."), "'", f"{error}".partition("'")[2]
    if "Unknown" not in text:
        return f"{text}."
    return f"{text}.{did_you_mean(rest.partition(quote)[0].lstrip('-'), [flag.name for flag in verb.all_flags])}"


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Makes SIGTERM raise _Terminated, except where the training loop catches the signal itself."""

    def terminate(number: int, frame: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():  # Elsewhere Python lets nobody set handlers.
        yield
        return
    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _guarded(invocation: Invocation) -> int:
    """Runs the verb and returns the exit code; errors that the user can act on become one message."""
    verb, output = invocation.verb, invocation.output
    try:
        result = verb.run(invocation)
        if result.get("next") and (output.console.is_terminal or not verb.writes_data):
            output.print_next(result["next"])
        output.write_result(result)
        return 0
    except GemmaTuneError as error:
        code = getattr(error, "exit_code", _USAGE if isinstance(error, ConfigError) else _FAILED)
        output.write_error(f"gemma-tune {verb.name}: {error}", code)
        return code
    except (KeyboardInterrupt, _Terminated) as error:
        code = _TERMINATED if isinstance(error, _Terminated) else _INTERRUPTED
        output.write_error(f"gemma-tune {verb.name}: stopped.{_WHEN_STOPPED.get(verb.name, '')}", code)
        return code
    except BrokenPipeError:  # The reader of stdout went away, as `head` does.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
