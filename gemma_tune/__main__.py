"""Entry point of `python -m gemma_tune VERB` and of the console script `gemma-tune`."""

import os
import sys

_CLOSED_PIPE = 141  # 128 + SIGPIPE, as in a shell.


def main() -> None:
    """Runs the command line and exits with its code."""
    from gemma_tune.cli.main import run
    from gemma_tune.runtime.process_memory import dedicate_process

    dedicate_process()
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # The reader stopped: `gemma-tune --help | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = _CLOSED_PIPE
    sys.exit(code)


if __name__ == "__main__":
    main()
