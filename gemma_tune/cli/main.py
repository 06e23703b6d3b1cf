"""Finds the verb, parses its flags, runs it, and turns errors into one message and an exit code."""

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
from gemma_tune.errors import ConfigError, GemmaTuneError, did_you_mean
from gemma_tune.version import __version__

# Verb -> what it does, in the order in which a user meets them.
VERBS = {
    "quickstart": "Fine-tune a real Gemma on the shipped support data and see the difference.",
    "doctor": "Check this machine: devices, memory, packages, tokens.",
    "models": "List the Gemma models, and which fit into your memory.",
    "plan": "Predict memory, time and cost of a run on devices that you don't have yet.",
    "data": "Look at a data set: rendered examples, lengths, what is dropped and why.",
    "train": "Fine-tune a model.",
    "eval": "Compare base and tuned model on held-out data.",
    "quantize": "Hold a trained model's weights in few bits, with or without calibration.",
    "merge": "Put LoRA into the weights under it.",
    "export": "Write a model for Keras, transformers, vLLM and others, with a model card.",
    "compare": "Put models side by side: what each takes, and what it costs in answers.",
    "generate": "Answer questions.",
    "chat": "Talk to a model.",
    "serve": "Answer over HTTP: OpenAI's API, and a page to chat on.",
}
_USAGE, _FAILED, _INTERRUPTED, _TERMINATED = 2, 1, 130, 143
_WHEN_STOPPED = dict.fromkeys(("train", "quickstart"), " What was saved stays: run the same command again to go on.")


class _Terminated(BaseException):
    """SIGTERM, wherever the program is: what a run was saving is saved, and a verb leaves nothing half done."""


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


def _run_verb(verb: str, arguments: list[str]) -> int:
    module = importlib.import_module(f"gemma_tune.cli.{verb}")
    values = flags.FlagValues()
    flags.DEFINE_bool("help", False, "Show this help.", short_name="h", flag_values=values)
    flags.DEFINE_bool(
        "json", False, "Print one JSON object on stdout, and everything else on stderr.", flag_values=values
    )
    module.define_flags(values)
    overrides = [a for a in arguments if a.startswith(("--config.", "-config."))]
    values.set_gnu_getopt(True)
    try:
        positional = values([f"gemma-tune {verb}", *[a for a in arguments if a not in overrides]])[1:]
    except flags.Error as error:
        hint = (
            did_you_mean(f"{error}".split("'")[1].lstrip("-") if "'" in f"{error}" else "", list(values))
            if "Unknown" in f"{error}"
            else ""
        )
        text = f"{error}".split(" Did you mean")[0].rstrip(".")
        print(f"gemma-tune {verb}: {text}.{hint} See `gemma-tune {verb} --help`.", file=sys.stderr)
        return _USAGE
    if values.help:
        print(help_text.for_verb(verb, module, values))
        return 0
    with Output(values.json) as output, _terminable():
        code = _guarded(verb, lambda: module.run(values, overrides, positional, output), output)
    if "distributed" in values and values["distributed"].value:
        from gemma_tune.runtime.processes import shutdown_distributed

        shutdown_distributed(code)
    return code


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Within it SIGTERM raises _Terminated, but where the training loop catches the signal itself."""

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


def _guarded(verb: str, call, output: Output) -> int:
    """Calls the verb; errors that the user can act on become one message."""
    try:
        output.result(call())
        return 0
    except GemmaTuneError as error:
        code = getattr(error, "exit_code", _USAGE if isinstance(error, ConfigError) else _FAILED)
        output.error(f"gemma-tune {verb}: {error}", code)
        return code
    except (KeyboardInterrupt, _Terminated) as error:
        code = _TERMINATED if isinstance(error, _Terminated) else _INTERRUPTED
        output.error(f"gemma-tune {verb}: stopped.{_WHEN_STOPPED.get(verb, '')}", code)
        return code
    except BrokenPipeError:  # The reader of stdout went away, as `head` does.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
